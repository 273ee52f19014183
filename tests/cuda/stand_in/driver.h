/* What the files of the stand-in driver share. Separate because the driver is several files:
 * driver.c (what is there), memory.c, stream.c (the order of work), module.c (kernels), graph.c.
 *
 * Everything here is called with the one lock held, which `enter` takes and `leave` gives back. */
#ifndef DRIVER_H
#define DRIVER_H

#include <stddef.h>
#include <stdint.h>

#include "emulator.h"

/* The codes and the layout of arguments are those of NVIDIA's cuda.h of CUDA 13. */
typedef enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_IMAGE = 200,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CUDA_ERROR_OPERATING_SYSTEM = 304,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_ILLEGAL_ADDRESS = 700,
    CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES = 701,
    CUDA_ERROR_LAUNCH_FAILED = 719,
    CUDA_ERROR_NOT_SUPPORTED = 801
} CUresult;

typedef unsigned long long CUdeviceptr;
typedef int CUdevice;
/* An opaque handle of anything: never an address, and never given twice. */
typedef void *Handle;

/* Takes the lock. An error if the driver is not initialised, or, with `needs_context`, if no
 * context is current on this thread or if the device has failed for good. */
CUresult enter(int needs_context);
CUresult leave(CUresult result);

/* The device fails for good: every later call that needs a context says so. */
void fail_for_good(CUresult error);
CUresult failure(void);

/* What is told at the end, and one line for the log, where one is kept. */
typedef struct {
    unsigned long long launches, kernels, graph_launches, graphs, modules, peak_bytes;
} Counts;
extern Counts counts;
void log_line(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* 80 for compute capability 8.0. */
int device_capability(void);
unsigned long long device_bytes(void);
/* Shared memory of a block that asks for more than others get. */
int most_shared_bytes(void);

typedef enum { CONTEXT = 1, POOL, STREAM, EVENT, MODULE, FUNCTION, GRAPH, NODE, EXECUTABLE } Kind;
Handle handle_new(Kind kind, void *object);
/* NULL if there is no such handle (any more), or if it is of another kind. */
void *handle_object(Kind kind, Handle handle);
void handle_forget(Handle handle);

/* Whether all bytes lie in one live allocation; none always do. */
int is_allocated(CUdeviceptr address, size_t bytes);
size_t live_allocations(void);

/* A kernel with its argument, which was copied. */
typedef struct {
    const char *name;
    Kernel kernel;
    unsigned grid[3], block[3], shared_bytes;
    void *argument;
    size_t argument_bytes;
} Launch;
/* Checks what cuLaunchKernel and cuGraphAddKernelNode check, and copies the argument. */
CUresult launch_new(Launch *launch, Handle function, const unsigned grid[3],
                    const unsigned block[3], unsigned shared_bytes, void **parameters,
                    void **extra);
/* Runs it now; if that fails, the device fails for good. */
void launch_run(const Launch *launch);

typedef struct Executable Executable;
void executable_run(const Executable *executable);
/* Work that still has to run holds one, as its owner does. */
void executable_release(Executable *executable);

typedef enum { RUN_KERNEL, RUN_GRAPH, SET, COPY, UNMAP, RECORD, WAIT } Task;

typedef struct Stream Stream;
typedef struct Event Event;

/* Something that a stream has been asked for. What is owned is freed once it has run. */
typedef struct Work {
    struct Work *next;
    unsigned long long number;
    Task task;
    Launch launch;          /* RUN_KERNEL: owns the argument */
    Executable *executable; /* RUN_GRAPH: holds it */
    void *to;               /* SET, COPY, UNMAP */
    const void *from;       /* COPY */
    void *owned;            /* COPY: what the host sent */
    size_t bytes;
    int value;    /* SET */
    Event *event; /* RECORD */
    Stream *other;
    unsigned long long until; /* WAIT: the other stream's work up to this */
} Work;

/* NULL and 1 are the legacy stream. NULL if there is no such stream. */
Stream *stream_of(Handle handle);
/* Adds a copy of the work to the end of the stream; it runs when somebody waits. */
CUresult stream_add(Stream *stream, const Work *work);
/* Runs all that the stream was asked for. */
void stream_run(Stream *stream);
void run_everything(void);

#endif
