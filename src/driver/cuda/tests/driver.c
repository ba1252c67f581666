// A stand-in for NVIDIA's driver: device memory is the processor's, kernels are written down and not run.
// Compiled by the tests as libcuda.so.1, so that everything above the driver runs on machines without one.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long address;
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_BINARY_FOR_GPU = 209, NOT_FOUND = 500, UNSUPPORTED = 900 };

static char text[1 << 16];
static size_t written;
static char failing[64];
static int code, bound, capturing;
static size_t used;

#define LOG(...) (written += snprintf(text + written, sizeof text - written, __VA_ARGS__))
// What a call returns: the code that a test has asked for, and success otherwise.
#define ANSWER(call) do { if (!strcmp(failing, call)) return code; } while (0)
// A real driver refuses calls on a thread without a context.
#define IN_CONTEXT(call) do { if (!bound_here) return 201; ANSWER(call); } while (0)
static _Thread_local int bound_here;

// For the tests.
void stand_in_fail(const char *call, int with) { strncpy(failing, call, sizeof failing - 1); code = with; }
const char *stand_in_log(void) { return text; }
void stand_in_clear(void) { written = 0; text[0] = 0; }
size_t stand_in_used(void) { return used; }

int cuInit(unsigned flags) { return OK; }
int cuDriverGetVersion(int *version) { *version = 13000; return OK; }
int cuDeviceGetCount(int *count) { *count = 1; return OK; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal == 0 ? OK : 101; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Stand-in"); return OK; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 1000000; return OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 16: *value = 132; break;     // multiprocessors
    case 75: *value = 9; break;       // compute capability, major
    case 76: *value = 0; break;       // and minor
    case 97: *value = 232448; break;  // shared memory per block, on request
    case 115: *value = 1; break;      // memory pools
    default: return INVALID_VALUE;
    }
    return OK;
}
int cuDeviceGetDefaultMemPool(void **pool, int device) { *pool = text; return OK; }
int cuMemPoolSetAttribute(void *pool, int attribute, void *value) {
    LOG("pool %d %llx\n", attribute, *(address *)value);
    return OK;
}
int cuMemPoolTrimTo(void *pool, size_t bytes) { LOG("trim\n"); return OK; }

int cuDevicePrimaryCtxRetain(void **context, int device) {
    ANSWER("cuDevicePrimaryCtxRetain");
    *context = &bound;
    return OK;
}
int cuDevicePrimaryCtxRelease_v2(int device) { LOG("release\n"); return OK; }
int cuCtxSetCurrent(void *context) { bound_here = context == &bound; return OK; }

int cuStreamCreate(void **stream, unsigned flags) { *stream = &used; LOG("stream %u\n", flags); return OK; }
int cuStreamDestroy_v2(void *stream) { return OK; }
int cuStreamSynchronize(void *stream) {
    IN_CONTEXT("cuStreamSynchronize");
    LOG("wait\n");
    return capturing ? UNSUPPORTED : OK;
}
int cuEventCreate(void **event, unsigned flags) { *event = malloc(1); return OK; }
int cuEventRecord(void *event, void *stream) { ANSWER("cuEventRecord"); LOG("event\n"); return OK; }
int cuEventSynchronize(void *event) { return OK; }
int cuEventElapsedTime_v2(float *milliseconds, void *first, void *last) { *milliseconds = 1.5f; return OK; }
int cuEventDestroy_v2(void *event) { free(event); return OK; }

int cuMemGetInfo_v2(size_t *available, size_t *total) { *available = 600; *total = 1000; return OK; }
int cuMemAllocHost_v2(void **memory, size_t bytes) { *memory = malloc(bytes); return OK; }
int cuMemFreeHost(void *memory) { free(memory); return OK; }
int cuMemAllocAsync(address *memory, size_t bytes, void *stream) {
    IN_CONTEXT("cuMemAllocAsync");
    if (capturing) return UNSUPPORTED;
    *memory = (address)aligned_alloc(256, (bytes + 255) / 256 * 256);
    used++;
    return OK;
}
int cuMemFreeAsync(address memory, void *stream) {
    IN_CONTEXT("cuMemFreeAsync");
    if (capturing) return UNSUPPORTED;
    free((void *)memory);
    used--;
    return OK;
}
int cuMemcpyHtoDAsync_v2(address to, const void *from, size_t bytes, void *stream) {
    IN_CONTEXT("cuMemcpyHtoDAsync");
    memcpy((void *)to, from, bytes);
    return OK;
}
int cuMemcpyDtoHAsync_v2(void *to, address from, size_t bytes, void *stream) {
    IN_CONTEXT("cuMemcpyDtoHAsync");
    memcpy(to, (void *)from, bytes);
    return OK;
}
int cuMemcpyDtoDAsync_v2(address to, address from, size_t bytes, void *stream) {
    IN_CONTEXT("cuMemcpyDtoDAsync");
    memcpy((void *)to, (void *)from, bytes);
    return OK;
}
int cuMemsetD8Async(address to, unsigned char byte, size_t count, void *stream) {
    IN_CONTEXT("cuMemsetD8Async");
    memset((void *)to, byte, count);
    return OK;
}

// An image says how the driver takes it; every one has the kernel `scale` (pointer, 12-byte struct, float).
static const size_t sizes[] = {8, 12, 4}, offsets[] = {0, 8, 20};
int cuModuleLoadData(void **module, const void *image) {
    IN_CONTEXT("cuModuleLoadData");
    LOG("module %.5s aligned %d\n", (const char *)image, (size_t)image % 64 == 0);
    *module = text;
    return strncmp(image, "other", 5) ? OK : NO_BINARY_FOR_GPU;
}
int cuModuleUnload(void *module) { LOG("unload\n"); return OK; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = (void *)sizes;
    return strcmp(name, "scale") ? NOT_FOUND : OK;
}
int cuFuncGetParamInfo(void *function, size_t index, size_t *offset, size_t *size) {
    if (index >= 3) return INVALID_VALUE;
    *offset = offsets[index];
    *size = sizes[index];
    return OK;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    LOG("attribute %d %d\n", attribute, value);
    return OK;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    IN_CONTEXT("cuLaunchKernel");
    LOG("%s %u %u %u, %u %u %u, %u:", capturing ? "record" : "launch", gx, gy, gz, bx, by, bz, shared);
    for (int i = 0; i < 3; i++) {
        LOG(" ");
        for (size_t j = 0; j < sizes[i]; j++) LOG("%02x", ((unsigned char *)parameters[i])[j]);
    }
    LOG("\n");
    return OK;
}

int cuStreamBeginCapture_v2(void *stream, int mode) {
    LOG("begin %d\n", mode);
    capturing = 1;
    return OK;
}
int cuStreamEndCapture(void *stream, void **graph) {
    LOG("end\n");
    capturing = 0;
    *graph = text;
    return OK;
}
int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
    ANSWER("cuGraphInstantiateWithFlags");
    *executable = text;
    return OK;
}
int cuGraphLaunch(void *executable, void *stream) { LOG("run\n"); return OK; }
int cuGraphDestroy(void *graph) { LOG("forget\n"); return OK; }
int cuGraphExecDestroy(void *executable) { LOG("destroy\n"); return OK; }
