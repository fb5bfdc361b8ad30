/* Stands in for libcuda.so.1 in a test: loads nothing and runs nothing, but writes down what it was asked for. */
#include <stdio.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
enum { MAX_ARGUMENTS = 80 };

EXPORT struct {
    unsigned grid[3], block[3], shared_bytes, shared_limit;
    void *stream;
    void *arguments[MAX_ARGUMENTS];
    char function[256];
    int modules; /* loaded and not unloaded */
    int refuse;  /* an error for the next launch */
    void *context;
} stand_in = {.context = &stand_in};

EXPORT int cuInit(unsigned flags) { return (int)flags; }
EXPORT int cuGetErrorString(int error, const char **text) {
    *text = error == 701 ? "too many resources requested for launch" : "an error";
    return 0;
}
EXPORT int cuCtxGetCurrent(void **context) { *context = stand_in.context; return 0; }
EXPORT int cuModuleLoadData(void **module, const void *image) {
    if (memcmp(image, "\177ELF", 4))
        return 200;
    stand_in.modules++;
    *module = &stand_in;
    return 0;
}
EXPORT int cuModuleUnload(void *module) { (void)module; stand_in.modules--; return 0; }
EXPORT int cuModuleGetFunction(void **function, void *module, const char *name) {
    snprintf(stand_in.function, sizeof stand_in.function, "%s", name);
    stand_in.shared_limit = 48 * 1024;
    *function = module;
    return 0;
}
EXPORT int cuFuncSetAttribute(void *function, int attribute, int value) {
    (void)function;
    if (attribute == 8)
        stand_in.shared_limit = (unsigned)value;
    return 0;
}
EXPORT int cuFuncSetCacheConfig(void *function, int config) { (void)function, (void)config; return 0; }
EXPORT int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared_bytes, void *stream, void **arguments,
                          void **extra) {
    (void)function, (void)extra;
    int refuse = stand_in.refuse;
    stand_in.refuse = 0;
    if (refuse)
        return refuse;
    unsigned grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
    memcpy(stand_in.grid, grid, sizeof grid);
    memcpy(stand_in.block, block, sizeof block);
    stand_in.shared_bytes = shared_bytes;
    stand_in.stream = stream;
    /* as the driver does: as many as the machine code takes, which the test tells by arguments[0] */
    int count = *(int *)arguments[0];
    for (int i = 0; i < count; i++)
        stand_in.arguments[i] = arguments[i];
    return 0;
}
