/* Every kernel of the library through a stand-in driver: what reaches the driver is what the table says, and every
 * failure is an error that names the kernel. It says nothing about a GPU. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "coars_kernels.h"

#define CHECK(condition)                                                                              \
    do {                                                                                              \
        if (!(condition)) {                                                                           \
            printf("%s:%d: %s: %s (%s)\n", __FILE__, __LINE__, where, #condition, coars_kernels_error()); \
            exit(1);                                                                                  \
        }                                                                                             \
    } while (0)

static struct {
    unsigned grid[3], block[3], shared_bytes, shared_limit;
    void *stream;
    void *arguments[80];
    char function[256];
    int modules, refuse;
    void *context;
} *stand_in;

static void check_kernel(const coars_kernel_info *info) {
    const char *where = info->name;
    int values[64];
    void *arguments[64];
    CHECK(info->num_arguments > 0 && info->num_arguments <= 64);
    for (int i = 0; i < info->num_arguments; i++)
        arguments[i] = &values[i];
    values[0] = info->num_arguments + 2; /* how many the stand-in reads */

    coars_kernel *kernel;
    CHECK(coars_kernels_find(info->name, info->arch) == info);
    CHECK(coars_kernels_load(info, &kernel) == COARS_OK && kernel);
    CHECK(!strcmp(stand_in->function, info->function));
    CHECK(stand_in->shared_limit >= (unsigned)info->shared_bytes);
    CHECK(coars_kernels_launch(kernel, 7, 2, 3, arguments, info->num_arguments, &values) == COARS_OK);
    CHECK(stand_in->grid[0] == 7 && stand_in->grid[1] == 2 && stand_in->grid[2] == 3);
    CHECK(stand_in->block[0] == 32u * (unsigned)info->num_warps && stand_in->block[1] == 1 && stand_in->block[2] == 1);
    CHECK(stand_in->shared_bytes == (unsigned)info->shared_bytes && stand_in->stream == &values);
    for (int i = 0; i < info->num_arguments; i++)
        CHECK(stand_in->arguments[i] == &values[i]);
    CHECK(stand_in->arguments[info->num_arguments] && stand_in->arguments[info->num_arguments + 1]);

    CHECK(coars_kernels_launch(kernel, 1, 1, 1, arguments, info->num_arguments - 1, NULL) == COARS_BAD_ARGUMENT);
    CHECK(strstr(coars_kernels_error(), info->name));
    CHECK(coars_kernels_launch(kernel, 0, 1, 1, arguments, info->num_arguments, NULL) == COARS_BAD_ARGUMENT);
    CHECK(strstr(coars_kernels_error(), "empty"));
    arguments[0] = NULL;
    CHECK(coars_kernels_launch(kernel, 1, 1, 1, arguments, info->num_arguments, NULL) == COARS_BAD_ARGUMENT);
    arguments[0] = &values[0];
    stand_in->refuse = 701;
    CHECK(coars_kernels_launch(kernel, 1, 1, 1, arguments, info->num_arguments, NULL) == COARS_DRIVER_ERROR);
    CHECK(strstr(coars_kernels_error(), info->name) && strstr(coars_kernels_error(), "too many resources"));
    CHECK(coars_kernels_unload(kernel) == COARS_OK && stand_in->modules == 0);
}

int main(void) {
    const char *where = "library";
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    CHECK(driver);
    stand_in = dlsym(driver, "stand_in");
    if (!stand_in) { /* a loader that prefers the system's driver to LD_LIBRARY_PATH */
        printf("the stand-in driver was not found\n");
        return 1;
    }
    CHECK(coars_kernels_abi() == COARS_KERNELS_ABI && coars_kernels_count() > 0);
    CHECK(coars_kernels_get(-1) == NULL && coars_kernels_get(coars_kernels_count()) == NULL);
    CHECK(coars_kernels_find("no_such_kernel", 80) == NULL && coars_kernels_find(NULL, 80) == NULL);
    for (int i = 0; i < coars_kernels_count(); i++)
        check_kernel(coars_kernels_get(i));
    coars_kernel *kernel;
    CHECK(coars_kernels_load(NULL, &kernel) == COARS_BAD_ARGUMENT && kernel == NULL);
    CHECK(coars_kernels_launch(NULL, 1, 1, 1, NULL, 0, NULL) == COARS_BAD_ARGUMENT);
    stand_in->context = NULL;
    CHECK(coars_kernels_load(coars_kernels_get(0), &kernel) == COARS_BAD_ARGUMENT);
    CHECK(strstr(coars_kernels_error(), "context"));
    coars_kernel_info damaged = *coars_kernels_get(0);
    damaged.cubin = "not machine code";
    stand_in->context = stand_in;
    CHECK(coars_kernels_load(&damaged, &kernel) == COARS_DRIVER_ERROR && kernel == NULL);
    printf("%d kernels\n", coars_kernels_count());
    return 0;
}
