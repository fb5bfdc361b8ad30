/* The library: a table of kernels, their machine code, and a launch by the CUDA driver, opened when first needed.
 *
 * The driver's functions are declared here, so that neither CUDA's headers nor its libraries are needed to build. A
 * launch does what Triton's own launcher does (triton/backends/nvidia/driver.py and driver.c, version 3.6): blocks of
 * 32 * num_warps threads, dynamic shared memory, and two pointers to scratch memory after the kernel's arguments, null
 * because no shipped kernel uses any. aot.build checks this, and that no kernel wants a cluster or a cooperative grid.
 */
#include "coars_kernels.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern const coars_kernel_info coars_kernels_table[];
extern const int coars_kernels_table_length;

/* The machine code, as data of this library. */
__asm__(
    "    .section .rodata\n"
    "    .balign 64\n"
    "    .globl coars_kernels_code\n"
    "    .hidden coars_kernels_code\n"
    "coars_kernels_code:\n"
    "    .incbin \"" COARS_KERNELS_BIN "\"\n"
    "    .previous\n");

enum { DEFAULT_SHARED_BYTES = 48 * 1024, NUM_SCRATCH_ARGUMENTS = 2, MAX_ARGUMENTS = 64 };

/* From cuda.h: values and signatures that CUDA has kept since version 3. */
enum { CUDA_SUCCESS = 0, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8, CU_FUNC_CACHE_PREFER_SHARED = 1 };

typedef struct driver {
    const char *problem; /* NULL where everything below was found */
    int (*cuInit)(unsigned flags);
    int (*cuGetErrorString)(int error, const char **text);
    int (*cuCtxGetCurrent)(void **context);
    int (*cuModuleLoadData)(void **module, const void *image);
    int (*cuModuleUnload)(void *module);
    int (*cuModuleGetFunction)(void **function, void *module, const char *name);
    int (*cuFuncSetAttribute)(void *function, int attribute, int value);
    int (*cuFuncSetCacheConfig)(void *function, int config);
    int (*cuLaunchKernel)(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared_bytes, void *stream, void **arguments,
                          void **extra);
} driver;

struct coars_kernel {
    const coars_kernel_info *info;
    void *module;
    void *function;
};

static driver cuda;
static pthread_once_t cuda_once = PTHREAD_ONCE_INIT;
static _Thread_local char error_text[512];

static coars_status fail(coars_status status, const coars_kernel_info *info, const char *format, ...) {
    int used = 0;
    if (info)
        used = snprintf(error_text, sizeof error_text, "%s for sm_%d: ", info->name, info->arch);
    va_list values;
    va_start(values, format);
    vsnprintf(error_text + used, sizeof error_text - (size_t)used, format, values);
    va_end(values);
    return status;
}

static coars_status fail_in_driver(const coars_kernel_info *info, const char *call, int error) {
    const char *text = NULL;
    if (cuda.cuGetErrorString(error, &text) != CUDA_SUCCESS || !text)
        text = "unknown error";
    return fail(COARS_DRIVER_ERROR, info, "%s: %s (%d)", call, text, error);
}

static void open_driver(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        cuda.problem = "libcuda.so.1 cannot be opened: this machine has no CUDA driver";
        return;
    }
    const struct { const char *name; void *place; } functions[] = {
        {"cuInit", &cuda.cuInit},
        {"cuGetErrorString", &cuda.cuGetErrorString},
        {"cuCtxGetCurrent", &cuda.cuCtxGetCurrent},
        {"cuModuleLoadData", &cuda.cuModuleLoadData},
        {"cuModuleUnload", &cuda.cuModuleUnload},
        {"cuModuleGetFunction", &cuda.cuModuleGetFunction},
        {"cuFuncSetAttribute", &cuda.cuFuncSetAttribute},
        {"cuFuncSetCacheConfig", &cuda.cuFuncSetCacheConfig},
        {"cuLaunchKernel", &cuda.cuLaunchKernel},
    };
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        void *function = dlsym(library, functions[i].name);
        if (!function) {
            cuda.problem = "libcuda.so.1 lacks a function that launches need: the CUDA driver is too old";
            return;
        }
        memcpy(functions[i].place, &function, sizeof function);
    }
    if (cuda.cuInit(0) != CUDA_SUCCESS)
        cuda.problem = "cuInit failed: the CUDA driver finds no device that it can use";
}

int coars_kernels_abi(void) { return COARS_KERNELS_ABI; }

const char *coars_kernels_version(void) { return COARS_KERNELS_VERSION; }

int coars_kernels_count(void) { return coars_kernels_table_length; }

const coars_kernel_info *coars_kernels_get(int index) {
    return index >= 0 && index < coars_kernels_table_length ? &coars_kernels_table[index] : NULL;
}

const coars_kernel_info *coars_kernels_find(const char *name, int arch) {
    const coars_kernel_info *best = NULL;
    for (int i = 0; name && i < coars_kernels_table_length; i++) {
        const coars_kernel_info *info = &coars_kernels_table[i];
        int runs = info->arch == arch || (arch / 10 == 8 && info->arch / 10 == 8 && info->arch < arch);
        if (runs && !strcmp(info->name, name) && (!best || info->arch > best->arch))
            best = info;
    }
    return best;
}

/* Everything of a load after the module is there. */
static coars_status prepare(coars_kernel *kernel) {
    const coars_kernel_info *info = kernel->info;
    int error = cuda.cuModuleGetFunction(&kernel->function, kernel->module, info->function);
    if (error != CUDA_SUCCESS)
        return fail_in_driver(info, "cuModuleGetFunction", error);
    if (info->shared_bytes > DEFAULT_SHARED_BYTES) {
        error = cuda.cuFuncSetCacheConfig(kernel->function, CU_FUNC_CACHE_PREFER_SHARED);
        if (error != CUDA_SUCCESS)
            return fail_in_driver(info, "cuFuncSetCacheConfig", error);
        error = cuda.cuFuncSetAttribute(kernel->function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                        info->shared_bytes);
        if (error != CUDA_SUCCESS)
            return fail_in_driver(info, "cuFuncSetAttribute (shared memory)", error);
    }
    return COARS_OK;
}

coars_status coars_kernels_load(const coars_kernel_info *info, coars_kernel **kernel) {
    if (kernel)
        *kernel = NULL;
    if (!info || !kernel)
        return fail(COARS_BAD_ARGUMENT, info, "coars_kernels_load: %s is NULL", info ? "kernel" : "info");
    pthread_once(&cuda_once, open_driver);
    if (cuda.problem)
        return fail(COARS_NO_DRIVER, info, "%s", cuda.problem);
    void *context = NULL;
    int error = cuda.cuCtxGetCurrent(&context);
    if (error != CUDA_SUCCESS)
        return fail_in_driver(info, "cuCtxGetCurrent", error);
    if (!context)
        return fail(COARS_BAD_ARGUMENT, info, "no CUDA context is current in this thread");
    coars_kernel *loaded = calloc(1, sizeof *loaded);
    if (!loaded)
        return fail(COARS_BAD_ARGUMENT, info, "out of memory");
    loaded->info = info;
    error = cuda.cuModuleLoadData(&loaded->module, info->cubin);
    if (error != CUDA_SUCCESS) {
        free(loaded);
        return fail_in_driver(info, "cuModuleLoadData", error);
    }
    coars_status status = prepare(loaded);
    if (status != COARS_OK) {
        cuda.cuModuleUnload(loaded->module);
        free(loaded);
        return status;
    }
    *kernel = loaded;
    return COARS_OK;
}

coars_status coars_kernels_launch(const coars_kernel *kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                  void *const *arguments, int num_arguments, void *stream) {
    if (!kernel)
        return fail(COARS_BAD_ARGUMENT, NULL, "coars_kernels_launch: kernel is NULL");
    const coars_kernel_info *info = kernel->info;
    if (num_arguments != info->num_arguments || num_arguments > MAX_ARGUMENTS)
        return fail(COARS_BAD_ARGUMENT, info, "takes %d arguments, got %d", info->num_arguments, num_arguments);
    if (!grid_x || !grid_y || !grid_z)
        return fail(COARS_BAD_ARGUMENT, info, "the grid %u x %u x %u is empty", grid_x, grid_y, grid_z);
    void *all[MAX_ARGUMENTS + NUM_SCRATCH_ARGUMENTS];
    for (int i = 0; i < num_arguments; i++) {
        if (!arguments || !arguments[i])
            return fail(COARS_BAD_ARGUMENT, info, "the address of argument %d is NULL", i);
        all[i] = arguments[i];
    }
    unsigned long long no_scratch = 0;
    for (int i = 0; i < NUM_SCRATCH_ARGUMENTS; i++)
        all[num_arguments + i] = &no_scratch;
    unsigned threads = 32u * (unsigned)info->num_warps;
    int error = cuda.cuLaunchKernel(kernel->function, grid_x, grid_y, grid_z, threads, 1, 1,
                                    (unsigned)info->shared_bytes, stream, all, NULL);
    return error == CUDA_SUCCESS ? COARS_OK : fail_in_driver(info, "cuLaunchKernel", error);
}

coars_status coars_kernels_unload(coars_kernel *kernel) {
    if (!kernel)
        return COARS_OK;
    int error = cuda.cuModuleUnload(kernel->module);
    coars_status status = error == CUDA_SUCCESS ? COARS_OK : fail_in_driver(kernel->info, "cuModuleUnload", error);
    free(kernel);
    return status;
}

const char *coars_kernels_error(void) { return error_text; }
