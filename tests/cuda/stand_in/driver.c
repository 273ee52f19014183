/* A stand-in for NVIDIA's driver on machines without a GPU: libcuda.so.1 as far as this program
 * uses it, with the processor as the one device, so that tests run the unchanged program. It is
 * strict, as a debugging driver would be. Separate because this file is what a device is; what it
 * does is in the files beside it. Built by
 *
 *   cc -std=gnu11 -O2 -Wall -Wextra -shared -fPIC -I tests/cuda -Wl,-soname,libcuda.so.1 \
 *      -Wl,-Bsymbolic -Wl,-z,nodelete -o FOLDER/libcuda.so.1 \
 *      tests/cuda/stand_in/{driver,memory,stream,module,graph}.c tests/cuda/emulator.c \
 *      -ldl -lm -lpthread
 *
 * and found with LD_LIBRARY_PATH=FOLDER, where a link libcuda.so may be beside it.
 *
 * TINY_SD_STAND_IN_MEMORY: bytes of the device (8 GiB). TINY_SD_STAND_IN_CAPABILITY: its compute
 * capability (8.0). TINY_SD_STAND_IN_DRIVER: the CUDA that it serves (13000).
 * TINY_SD_STAND_IN_LAUNCHES: with the launch after so many it fails for good (never).
 * TINY_SD_STAND_IN_LOG: a file to which it adds lines about what was done. */
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "driver.h"

#define NAME "Stand-in GPU"
#define MULTIPROCESSORS 2
#define DEFAULT_BYTES (8ull << 30)
#define BUCKETS 4096

Counts counts;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int is_initialised, capability;
static unsigned long long all_bytes;
static CUresult failed;
static Handle context, pool;
static unsigned retained;
static _Thread_local Handle current;

CUresult enter(int needs_context) {
    pthread_mutex_lock(&lock);
    if (!is_initialised) {
        return CUDA_ERROR_NOT_INITIALIZED;
    }
    if (needs_context && !handle_object(CONTEXT, current)) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    return needs_context ? failed : CUDA_SUCCESS;
}

CUresult leave(CUresult result) {
    pthread_mutex_unlock(&lock);
    return result;
}

void fail_for_good(CUresult error) {
    if (!failed) {
        failed = error;
        log_line("failed: %d", (int)error);
    }
}

CUresult failure(void) { return failed; }

int device_capability(void) { return capability; }

/* From the table of the programming guide, by compute capability. */
int most_shared_bytes(void) {
    switch (capability) {
    case 75:
        return 64 << 10;
    case 80:
    case 87:
        return 163 << 10;
    case 86:
    case 89:
    case 120:
    case 121:
        return 99 << 10;
    default:
        return 227 << 10;
    }
}

unsigned long long device_bytes(void) { return all_bytes; }

/* One write a line, as several processes may share the file. */
void log_line(const char *format, ...) {
    const char *path = getenv("TINY_SD_STAND_IN_LOG");
    if (!path || !*path) {
        return;
    }
    char line[512];
    va_list values;
    va_start(values, format);
    int length = vsnprintf(line, sizeof line - 1, format, values);
    va_end(values);
    int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (file < 0 || length < 0) {
        return;
    }
    length = length > (int)sizeof line - 2 ? (int)sizeof line - 2 : length;
    line[length++] = '\n';
    if (write(file, line, (size_t)length) != length) {
        perror("the stand-in driver's log");
    }
    close(file);
}

static void tell_counts(void) {
    pthread_mutex_lock(&lock);
    log_line("end: launches=%llu kernels=%llu graph_launches=%llu graphs=%llu modules=%llu "
             "live_allocations=%zu peak_bytes=%llu",
             counts.launches, counts.kernels, counts.graph_launches, counts.graphs, counts.modules,
             live_allocations(), counts.peak_bytes);
    pthread_mutex_unlock(&lock);
}

/* Handles are numbers that are looked up, so that a stale one is seen. */
typedef struct Entry {
    struct Entry *next;
    uintptr_t number;
    Kind kind;
    void *object;
} Entry;
static Entry *entries[BUCKETS];

Handle handle_new(Kind kind, void *object) {
    static uintptr_t last;
    Entry *entry = malloc(sizeof *entry);
    if (!entry) {
        abort();
    }
    *entry = (Entry){entries[++last % BUCKETS], last, kind, object};
    entries[last % BUCKETS] = entry;
    return (Handle)(last * 16);
}

static Entry **handle_entry(Handle handle) {
    uintptr_t number = (uintptr_t)handle / 16;
    Entry **entry = &entries[number % BUCKETS];
    while (*entry && (*entry)->number != number) {
        entry = &(*entry)->next;
    }
    return (uintptr_t)handle % 16 == 0 && *entry ? entry : NULL;
}

void *handle_object(Kind kind, Handle handle) {
    Entry **entry = handle_entry(handle);
    return entry && (*entry)->kind == kind ? (*entry)->object : NULL;
}

void handle_forget(Handle handle) {
    Entry **entry = handle_entry(handle);
    if (entry) {
        Entry *old = *entry;
        *entry = old->next;
        free(old);
    }
}

/* Of a call that needs no context: what is wrong with the device's number, or with a pointer. */
static CUresult enter_device(CUdevice device, const void *result) {
    CUresult entered = enter(0);
    if (entered) {
        return entered;
    }
    if (device != 0) {
        return CUDA_ERROR_INVALID_DEVICE;
    }
    return result ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

static CUresult initialise(void) {
    const char *bytes = getenv("TINY_SD_STAND_IN_MEMORY");
    const char *version = getenv("TINY_SD_STAND_IN_CAPABILITY");
    int major = 8, minor = 0;
    if (version && (sscanf(version, "%d.%d", &major, &minor) != 2 || minor < 0 || minor > 9)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    capability = major * 10 + minor;
    all_bytes = bytes ? strtoull(bytes, NULL, 10) : DEFAULT_BYTES;
    pool = handle_new(POOL, &pool);
    is_initialised = 1;
    atexit(tell_counts);
    return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) {
    pthread_mutex_lock(&lock);
    CUresult result = flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
    if (!result && !is_initialised) {
        result = initialise();
    }
    return leave(result);
}

CUresult cuDriverGetVersion(int *version) {
    if (!version) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    const char *set = getenv("TINY_SD_STAND_IN_DRIVER");
    *version = set ? atoi(set) : 13000;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
    CUresult result = enter_device(0, count);
    if (!result) {
        *count = 1;
    }
    return leave(result);
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    CUresult result = enter_device(ordinal, device);
    if (!result) {
        *device = 0;
    }
    return leave(result);
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    CUresult result = enter_device(device, name);
    if (!result && length < 1) {
        result = CUDA_ERROR_INVALID_VALUE;
    }
    if (!result) {
        snprintf(name, (size_t)length, "%s", NAME);
    }
    return leave(result);
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    CUresult result = enter_device(device, bytes);
    if (!result) {
        *bytes = all_bytes;
    }
    return leave(result);
}

CUresult cuDeviceGetUuid_v2(unsigned char *uuid, CUdevice device) {
    CUresult result = enter_device(device, uuid);
    if (!result) {
        memcpy(uuid, "stand-in GPU\0\0\0\0", 16);
    }
    return leave(result);
}

CUresult cuDeviceGetUuid(unsigned char *uuid, CUdevice device) {
    return cuDeviceGetUuid_v2(uuid, device);
}

CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    static const int known[][2] = {
        {1, 1024},       /* threads of a block */
        {2, 1024},       /* in x, */
        {3, 1024},       /* y */
        {4, 64},         /* and z */
        {5, 0x7fffffff}, /* blocks of a grid in x, */
        {6, 65535},      /* y */
        {7, 65535},      /* and z */
        {8, 48 << 10},   /* shared memory of a block */
        {9, 64 << 10},   /* constant memory */
        {10, 32},        /* threads of a warp */
        {12, 64 << 10},  /* registers of a block */
        {13, 1000000},   /* kHz */
        {16, MULTIPROCESSORS},
        {17, 0},  /* kernels may take any time */
        {18, 1},  /* its memory is the host's */
        {19, 1},  /* and the host's memory can be its */
        {31, 1},  /* kernels side by side */
        {41, 1},  /* one address space */
        {115, 1}, /* pools */
    };
    CUresult result = enter_device(device, value);
    if (result) {
        return leave(result);
    }
    const int own[][2] = {{75, capability / 10}, {76, capability % 10}, {97, most_shared_bytes()}};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) {
        if (own[i][0] == attribute) {
            *value = own[i][1];
            return leave(CUDA_SUCCESS);
        }
    }
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (known[i][0] == attribute) {
            *value = known[i][1];
            return leave(CUDA_SUCCESS);
        }
    }
    return leave(CUDA_ERROR_INVALID_VALUE);
}

CUresult cuDevicePrimaryCtxRetain(Handle *result, CUdevice device) {
    CUresult entered = enter_device(device, result);
    if (!entered) {
        if (retained++ == 0) {
            context = handle_new(CONTEXT, &context);
        }
        *result = context;
    }
    return leave(entered);
}

/* The last release ends the context: what is left in it stays, to be counted. */
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    CUresult result = enter_device(device, &context);
    if (!result && retained == 0) {
        result = CUDA_ERROR_INVALID_CONTEXT;
    }
    if (!result && --retained == 0) {
        run_everything();
        handle_forget(context);
    }
    return leave(result);
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    CUresult result = enter_device(device, active);
    if (!result) {
        *active = retained > 0;
        if (flags) {
            *flags = 0;
        }
    }
    return leave(result);
}

CUresult cuCtxGetCurrent(Handle *result) {
    CUresult entered = enter(0);
    if (!entered && !result) {
        entered = CUDA_ERROR_INVALID_VALUE;
    }
    if (!entered) {
        *result = handle_object(CONTEXT, current) ? current : NULL;
    }
    return leave(entered);
}

CUresult cuCtxSetCurrent(Handle chosen) {
    CUresult result = enter(0);
    if (!result && chosen && !handle_object(CONTEXT, chosen)) {
        result = CUDA_ERROR_INVALID_CONTEXT;
    }
    if (!result) {
        current = chosen;
    }
    return leave(result);
}

CUresult cuCtxSynchronize(void) {
    CUresult result = enter(1);
    if (!result) {
        run_everything();
        result = failure();
    }
    return leave(result);
}

CUresult cuDeviceGetDefaultMemPool(Handle *result, CUdevice device) {
    CUresult entered = enter_device(device, result);
    if (!entered) {
        *result = pool;
    }
    return leave(entered);
}

/* The stand-in keeps no freed memory, so that there is nothing to choose. */
CUresult cuMemPoolSetAttribute(Handle chosen, int attribute, void *value) {
    CUresult result = enter(0);
    if (!result && (!handle_object(POOL, chosen) || !value || attribute < 1 || attribute > 4)) {
        result = CUDA_ERROR_INVALID_VALUE;
    }
    return leave(result);
}

CUresult cuMemPoolTrimTo(Handle chosen, size_t bytes) {
    (void)bytes;
    CUresult result = enter(0);
    if (!result && !handle_object(POOL, chosen)) {
        result = CUDA_ERROR_INVALID_VALUE;
    }
    return leave(result);
}

static const struct {
    CUresult code;
    const char *name, *text;
} errors[] = {
#define ERROR(code, text) {code, #code, text}
    ERROR(CUDA_SUCCESS, "no error"),
    ERROR(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    ERROR(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    ERROR(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    ERROR(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    ERROR(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    ERROR(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    ERROR(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    ERROR(CUDA_ERROR_OPERATING_SYSTEM, "OS call failed or operation not supported on this OS"),
    ERROR(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    ERROR(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    ERROR(CUDA_ERROR_NOT_READY, "device not ready"),
    ERROR(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    ERROR(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"),
    ERROR(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    ERROR(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
};

static CUresult error_text(CUresult error, const char **result, int is_name) {
    if (!result) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    *result = NULL;
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++) {
        if (errors[i].code == error) {
            *result = is_name ? errors[i].name : errors[i].text;
        }
    }
    return *result ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) { return error_text(error, text, 0); }

CUresult cuGetErrorName(CUresult error, const char **name) { return error_text(error, name, 1); }
