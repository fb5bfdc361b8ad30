/* coars_kernels: the Triton kernels of the operations as machine code, loaded and launched without Python.
 *
 *     const coars_kernel_info *info = coars_kernels_find("credit_clipped", 90);
 *     coars_kernel *kernel;
 *     if (coars_kernels_load(info, &kernel)) puts(coars_kernels_error());
 *     void *arguments[] = {&grad, &sums, ...};     // in the order of info->arguments
 *     if (coars_kernels_launch(kernel, num_turns, 1, 1, arguments, info->num_arguments, stream))
 *         puts(coars_kernels_error());
 *
 * The CUDA driver (libcuda.so.1) is opened by the first load; everything before that works on any machine. Functions
 * may be called from several threads. What the arguments mean is said where the kernels are written, in Python.
 *
 * Left out: checks of the tensors behind the arguments (the Python operations do them), and contexts: load and launch
 * use the calling thread's current one, such as cudaFree(0) makes.
 */
#ifndef COARS_KERNELS_H
#define COARS_KERNELS_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#define COARS_KERNELS_API __attribute__((visibility("default")))

/* Grows by one whenever a struct or a function below changes its meaning. */
#define COARS_KERNELS_ABI 1

typedef enum coars_status {
    COARS_OK = 0,
    COARS_BAD_ARGUMENT = 1, /* a null pointer, a wrong number of arguments, an empty grid */
    COARS_NO_DRIVER = 2,    /* libcuda.so.1 is not there, or too old */
    COARS_DRIVER_ERROR = 3  /* the driver refused; coars_kernels_error() has its words */
} coars_status;

typedef struct coars_kernel_info {
    const char *name;     /* "head_rows_bf16": unique together with arch */
    const char *function; /* the symbol in the machine code */
    int arch;             /* compute capability times ten */
    int num_warps;        /* a block has 32 times as many threads */
    int shared_bytes;     /* dynamic shared memory of a block */
    int registers;        /* per thread */
    int local_bytes;      /* per thread: stack and spilled registers */
    int num_arguments;
    const char *arguments;  /* "logits *fp32:16, vocab_size i32": names and types in order; ":16" must be a multiple of
                               16 (an address, a stride), or the kernel reads what it should not */
    const char *constants;  /* "bias=None, BLOCK=2048": what the machine code was made for */
    const char *triton;     /* JSON for the Python operations */
    const void *cubin;
    size_t cubin_bytes;
} coars_kernel_info;

/* A kernel loaded into one context. */
typedef struct coars_kernel coars_kernel;

COARS_KERNELS_API int coars_kernels_abi(void);
COARS_KERNELS_API const char *coars_kernels_version(void);

COARS_KERNELS_API int coars_kernels_count(void);

/* The kernel at an index, or NULL past the end. */
COARS_KERNELS_API const coars_kernel_info *coars_kernels_get(int index);

/* The kernel of that name for that GPU, or NULL. Machine code for 8.0 also runs on 8.6 and 8.9, and is given where
 * there is none of their own; machine code for 9.0 and above runs on that very capability only. */
COARS_KERNELS_API const coars_kernel_info *coars_kernels_find(const char *name, int arch);

/* Load into the current context. *kernel is NULL unless COARS_OK is returned. */
COARS_KERNELS_API coars_status coars_kernels_load(const coars_kernel_info *info, coars_kernel **kernel);

/* Launch. `arguments` holds `num_arguments` addresses of values: of a CUdeviceptr (8 bytes) for a pointer, of an int
 * for i32, of a float for fp32. `stream` is a CUstream or cudaStream_t, or NULL. Returns without waiting for the device. */
COARS_KERNELS_API coars_status coars_kernels_launch(const coars_kernel *kernel, unsigned grid_x, unsigned grid_y,
                                                    unsigned grid_z, void *const *arguments, int num_arguments,
                                                    void *stream);

/* Unload; NULL is allowed. The context in which it was loaded must be current. */
COARS_KERNELS_API coars_status coars_kernels_unload(coars_kernel *kernel);

/* What went wrong in this thread's last call that failed, one line that names the kernel; "" before. */
COARS_KERNELS_API const char *coars_kernels_error(void);

#ifdef __cplusplus
}
#endif
#endif
