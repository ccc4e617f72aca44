// libcuda.so.1 for a machine without a GPU: one device of sm_86 and a driver for CUDA 13.0 that execute nothing. What is
// launched goes to the file that FAKE_CUDA_LOG names, one line a launch: function, grid, block, shared bytes, stream, then
// every argument, as the function's PTX declares it. It shows what a library of launches asks the driver for. Memory,
// streams, graphs and events are in fake_memory.c.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_FOUND = 500, MOST = 32 };

typedef struct {
    char name[128];
    int count;
    int wide[MOST];  // 8 bytes: an address; else 4
} Function;

static int anything;
static void* context;  // current in this thread, as far as anybody is told

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int* version) { *version = 13000; return SUCCESS; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return ordinal == 0 ? SUCCESS : 101; }
int cuDeviceGetName(char* name, int length, int device) { snprintf(name, length, "fake"); return SUCCESS; }
int cuDeviceGetCount(int* count) { *count = 1; return SUCCESS; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 6 : 1;  // 75, 76: the compute capability
    return SUCCESS;
}
int cuDeviceComputeCapability(int* major, int* minor, int device) { *major = 8; *minor = 6; return SUCCESS; }
int cuDevicePrimaryCtxRetain(void** made, int device) { *made = &anything; return SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }
int cuCtxGetCurrent(void** current) { *current = context; return SUCCESS; }
int cuCtxSetCurrent(void* made) { context = made; return SUCCESS; }
int cuCtxPushCurrent_v2(void* made) { context = made; return SUCCESS; }
int cuCtxPopCurrent_v2(void** old) { if (old) *old = context; context = NULL; return SUCCESS; }
int cuCtxDetach(void* made) { return SUCCESS; }
int cuCtxGetDevice(int* device) { *device = 0; return context ? SUCCESS : 201; }
int cuCtxSynchronize(void) { return SUCCESS; }
int cuGetErrorString(int error, const char** text) { *text = "an error of the fake driver"; return SUCCESS; }
int cuGetErrorName(int error, const char** text) { *text = "CUDA_ERROR_FAKE"; return SUCCESS; }

static int modules;
int fake_modules(void) { return modules; }

int cuModuleLoadData(void** module, const void* image) {
    if (!strstr(image, ".visible .entry")) return 218;  // CUDA_ERROR_INVALID_PTX
    ++modules;
    *module = strdup(image);
    return SUCCESS;
}
int cuModuleLoadDataEx(void** module, const void* image, unsigned count, void* options, void** values) {
    return cuModuleLoadData(module, image);
}
int cuModuleUnload(void* module) { --modules; free(module); return SUCCESS; }

int cuModuleGetFunction(void** function, void* module, const char* name) {
    char wanted[160];
    snprintf(wanted, sizeof wanted, ".entry %s(", name);
    const char* at = strstr(module, wanted);
    if (!at) return NOT_FOUND;
    Function* found = calloc(1, sizeof *found);
    snprintf(found->name, sizeof found->name, "%s", name);
    const char* end = strchr(at, ')');
    while ((at = strstr(at, ".param ")) && at < end && found->count < MOST) {
        const char* type = at + strlen(".param ");
        found->wide[found->count++] = strncmp(type, ".u64", 4) == 0;
        at = type;
    }
    *function = found;
    return SUCCESS;
}

int cuFuncSetBlockShape(void* function, int x, int y, int z) { return SUCCESS; }  // pycuda says it before a launch too

int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** arguments, void** extra) {
    const Function* called = function;
    FILE* log = fopen(getenv("FAKE_CUDA_LOG"), "a");
    if (!log) return INVALID_VALUE;
    fprintf(log, "%s %u %u %u %u %u %u %u %lu", called->name, gx, gy, gz, bx, by, bz, shared, (unsigned long)(uintptr_t)stream);
    const char* packed = extra ? extra[1] : NULL;  // CU_LAUNCH_PARAM_BUFFER_POINTER, as pycuda passes them
    size_t offset = 0;
    for (int i = 0; i < called->count; ++i) {
        const size_t size = called->wide[i] ? 8 : 4;
        offset = (offset + size - 1) / size * size;
        const void* from = packed ? (const void*)(packed + offset) : arguments[i];
        if (called->wide[i]) fprintf(log, " %lu", (unsigned long)*(const uint64_t*)from);
        else fprintf(log, " %d", *(const int32_t*)from);
        offset += size;
    }
    fprintf(log, "\n");
    fclose(log);
    return SUCCESS;
}

// NVRTC, loaded beside this driver, asks for tables of private functions, and calls what it is given: there are none.
int cuGetExportTable(const void** table, const void* id) { *table = NULL; return NOT_FOUND; }

static int find(const char* symbol, void** function) {
    void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    char newer[160];
    snprintf(newer, sizeof newer, "%s_v2", symbol);
    *function = dlsym(self, newer);
    if (!*function) *function = dlsym(self, symbol);
    return *function ? SUCCESS : NOT_FOUND;
}
int cuGetProcAddress(const char* symbol, void** function, int version, uint64_t flags) { return find(symbol, function); }
int cuGetProcAddress_v2(const char* symbol, void** function, int version, uint64_t flags, int* status) {
    const int missing = find(symbol, function);
    if (status) *status = missing ? 1 : 0;
    return missing;
}
