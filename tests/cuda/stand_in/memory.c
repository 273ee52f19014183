/* The stand-in driver's memory: allocations that end at a guard page, and copies that are checked
 * against them. Separate from driver.c because what is live must be known byte for byte. */
#include <stdlib.h>

#include "driver.h"

/* As CUDA aligns what it allocates. */
#define ALIGNMENT 256

typedef struct {
    CUdeviceptr start;
    size_t bytes;
} Allocation;

/* In the order of addresses. */
static Allocation *live;
static size_t live_count, live_room;
static unsigned long long live_bytes;

size_t live_allocations(void) { return live_count; }

/* The place of the first allocation that starts after the address. */
static size_t after(CUdeviceptr address) {
    size_t low = 0, high = live_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (live[middle].start > address) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

int is_allocated(CUdeviceptr address, size_t bytes) {
    size_t place = after(address);
    if (bytes == 0 || place == 0) {
        return bytes == 0;
    }
    Allocation found = live[place - 1];
    CUdeviceptr within = address - found.start;
    return within <= found.bytes && bytes <= found.bytes - within;
}

static CUresult allocate(CUdeviceptr *address, size_t bytes) {
    if (!address || bytes == 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (bytes > device_bytes() || live_bytes > device_bytes() - bytes) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    if (live_count == live_room) {
        size_t room = live_room ? live_room * 2 : 256;
        Allocation *larger = realloc(live, room * sizeof *live);
        if (!larger) {
            return CUDA_ERROR_OUT_OF_MEMORY;
        }
        live = larger;
        live_room = room;
    }
    void *memory = guarded(bytes, ALIGNMENT);
    if (!memory) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *address = (CUdeviceptr)(uintptr_t)memory;
    size_t place = after(*address);
    memmove(live + place + 1, live + place, (live_count - place) * sizeof *live);
    live[place] = (Allocation){*address, bytes};
    live_count++;
    live_bytes += bytes;
    if (live_bytes > counts.peak_bytes) {
        counts.peak_bytes = live_bytes;
    }
    return CUDA_SUCCESS;
}

/* Forgets an allocation at once, so that later calls may not name it: its bytes, or 0. */
static size_t forget(CUdeviceptr address) {
    size_t place = after(address);
    if (place == 0 || live[place - 1].start != address) {
        return 0;
    }
    size_t bytes = live[place - 1].bytes;
    memmove(live + place - 1, live + place, (live_count - place) * sizeof *live);
    live_count--;
    live_bytes -= bytes;
    return bytes;
}

static CUresult illegal(void) {
    fail_for_good(CUDA_ERROR_ILLEGAL_ADDRESS);
    return CUDA_ERROR_ILLEGAL_ADDRESS;
}

CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    CUresult result = enter(1);
    if (!result && (!free_bytes || !total)) {
        result = CUDA_ERROR_INVALID_VALUE;
    }
    if (!result) {
        *free_bytes = device_bytes() - live_bytes;
        *total = device_bytes();
    }
    return leave(result);
}

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    CUresult result = enter(1);
    return leave(result ? result : allocate(address, bytes));
}

CUresult cuMemAllocAsync(CUdeviceptr *address, size_t bytes, Handle handle) {
    CUresult result = enter(1);
    if (!result && !stream_of(handle)) {
        result = CUDA_ERROR_INVALID_HANDLE;
    }
    return leave(result ? result : allocate(address, bytes));
}

/* The memory itself goes when the stream comes to it: work that was asked for before may use it. */
static CUresult free_on(Stream *stream, CUdeviceptr address) {
    size_t bytes = forget(address);
    if (!bytes) {
        return illegal();
    }
    Work work = {.task = UNMAP, .to = (void *)(uintptr_t)address, .bytes = bytes};
    return stream_add(stream, &work);
}

CUresult cuMemFreeAsync(CUdeviceptr address, Handle handle) {
    CUresult result = enter(1);
    Stream *stream = stream_of(handle);
    if (!result && !stream) {
        result = CUDA_ERROR_INVALID_HANDLE;
    }
    return leave(result ? result : free_on(stream, address));
}

/* Waits for all work, as the real one does. */
CUresult cuMemFree_v2(CUdeviceptr address) {
    CUresult result = enter(1);
    if (!result && address) {
        run_everything();
        result = failure();
        result = result ? result : free_on(stream_of(NULL), address);
        run_everything();
    }
    return leave(result);
}

static CUresult set_on(Stream *stream, CUdeviceptr to, int value, size_t bytes) {
    if (!stream) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (!is_allocated(to, bytes)) {
        return illegal();
    }
    Work work = {.task = SET, .to = (void *)(uintptr_t)to, .value = value, .bytes = bytes};
    return stream_add(stream, &work);
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, Handle handle) {
    CUresult result = enter(1);
    return leave(result ? result : set_on(stream_of(handle), to, value, bytes));
}

typedef enum { TO_DEVICE, TO_HOST, WITHIN_DEVICE } Direction;

static CUresult copy_on(Stream *stream, Direction direction, void *to, const void *from,
                        size_t bytes) {
    if (!stream) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (bytes == 0) {
        return CUDA_SUCCESS;
    }
    if ((direction != TO_HOST && !is_allocated((uintptr_t)to, bytes)) ||
        (direction != TO_DEVICE && !is_allocated((uintptr_t)from, bytes))) {
        return illegal();
    }
    if (!to || !from) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    Work work = {.task = COPY, .to = to, .from = from, .bytes = bytes};
    if (direction == TO_DEVICE) {
        /* Host memory that is not pinned has been read when the call returns. */
        work.owned = malloc(bytes);
        if (!work.owned) {
            return CUDA_ERROR_OUT_OF_MEMORY;
        }
        work.from = memcpy(work.owned, from, bytes);
    }
    return stream_add(stream, &work);
}

static CUresult copy(Handle handle, Direction direction, void *to, const void *from, size_t bytes,
                     int waits) {
    CUresult result = enter(1);
    Stream *stream = stream_of(handle);
    result = result ? result : copy_on(stream, direction, to, from, bytes);
    if (!result && waits) {
        stream_run(stream);
        result = failure();
    }
    return leave(result);
}

#define ON_DEVICE(address) ((void *)(uintptr_t)(address))

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, Handle stream) {
    return copy(stream, TO_DEVICE, ON_DEVICE(to), from, bytes, 0);
}

CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, Handle stream) {
    return copy(stream, TO_HOST, to, ON_DEVICE(from), bytes, 0);
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, Handle stream) {
    return copy(stream, WITHIN_DEVICE, ON_DEVICE(to), ON_DEVICE(from), bytes, 0);
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) {
    return copy(NULL, TO_DEVICE, ON_DEVICE(to), from, bytes, 1);
}

CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) {
    return copy(NULL, TO_HOST, to, ON_DEVICE(from), bytes, 1);
}

CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    return copy(NULL, WITHIN_DEVICE, ON_DEVICE(to), ON_DEVICE(from), bytes, 1);
}

CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t bytes) {
    CUresult result = enter(1);
    Stream *stream = stream_of(NULL);
    result = result ? result : set_on(stream, to, value, bytes);
    if (!result) {
        stream_run(stream);
        result = failure();
    }
    return leave(result);
}
