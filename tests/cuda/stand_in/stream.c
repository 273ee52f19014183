/* The stand-in driver's streams and events. Separate because it decides when work runs: as late as
 * the real device may, that is when somebody waits, so that a missing wait is seen. */
#include <stdlib.h>
#include <time.h>

#include "driver.h"

/* A stream with more work than that runs it: one cannot keep all of a long program. */
#define WORK_LIMIT 4096
#define BYTES_LIMIT (256u << 20)

#define NON_BLOCKING 1u

struct Stream {
    Work *first, *last;
    unsigned long long count, held_bytes;
    int is_blocking;
    Stream *previous, *next;
};

struct Event {
    Stream *stream;            /* whose work it is about, while that has not run */
    unsigned long long number; /* of that work */
    int was_recorded, has_time;
    double milliseconds;
};

/* The legacy stream, and the head of the list of all. */
static Stream legacy = {.is_blocking = 1, .previous = &legacy, .next = &legacy};
static unsigned long long last_number;

Stream *stream_of(Handle handle) {
    return (uintptr_t)handle <= 1 ? &legacy : handle_object(STREAM, handle);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e3 + (double)time.tv_nsec / 1e6;
}

static void run_until(Stream *stream, unsigned long long number);

/* After a failure nothing runs, but memory is given back. */
static void run(Stream *stream, Work *work) {
    int is_failed = failure() != CUDA_SUCCESS;
    switch (work->task) {
    case RUN_KERNEL:
        if (!is_failed) {
            launch_run(&work->launch);
        }
        free(work->launch.argument);
        break;
    case RUN_GRAPH:
        if (!is_failed) {
            executable_run(work->executable);
        }
        executable_release(work->executable);
        break;
    case SET:
        if (!is_failed) {
            memset(work->to, work->value, work->bytes);
        }
        break;
    case COPY:
        if (!is_failed) {
            memmove(work->to, work->from, work->bytes);
        }
        free(work->owned);
        break;
    case UNMAP:
        guarded_free(work->to, work->bytes);
        break;
    case RECORD:
        if (work->event && work->event->stream == stream && work->event->number == work->number) {
            work->event->stream = NULL;
            work->event->milliseconds = now();
        }
        break;
    case WAIT:
        run_until(work->other, work->until);
        break;
    }
}

static void run_until(Stream *stream, unsigned long long number) {
    while (stream->first && stream->first->number <= number) {
        Work *work = stream->first;
        stream->first = work->next;
        if (!stream->first) {
            stream->last = NULL;
        }
        stream->count--;
        stream->held_bytes -= work->owned || work->task == UNMAP ? work->bytes : 0;
        run(stream, work);
        free(work);
    }
}

void stream_run(Stream *stream) { run_until(stream, last_number); }

void run_everything(void) {
    stream_run(&legacy);
    for (Stream *stream = legacy.next; stream != &legacy; stream = stream->next) {
        stream_run(stream);
    }
}

/* Work of the legacy stream comes after what the blocking ones were asked for, and before what they
 * are asked for later. */
static void run_what_comes_before(Stream *stream) {
    if (stream != &legacy) {
        if (stream->is_blocking) {
            stream_run(&legacy);
        }
        return;
    }
    for (Stream *other = legacy.next; other != &legacy; other = other->next) {
        if (other->is_blocking) {
            stream_run(other);
        }
    }
}

CUresult stream_add(Stream *stream, const Work *asked) {
    Work *work = malloc(sizeof *work);
    if (!work) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    run_what_comes_before(stream);
    *work = *asked;
    work->next = NULL;
    work->number = ++last_number;
    if (stream->last) {
        stream->last->next = work;
    } else {
        stream->first = work;
    }
    stream->last = work;
    stream->count++;
    stream->held_bytes += work->owned || work->task == UNMAP ? work->bytes : 0;
    if (stream->count > WORK_LIMIT || stream->held_bytes > BYTES_LIMIT) {
        stream_run(stream);
    }
    return failure();
}

CUresult cuStreamCreateWithPriority(Handle *result, unsigned flags, int priority) {
    (void)priority;
    CUresult entered = enter(1);
    if (!entered && (!result || flags > NON_BLOCKING)) {
        entered = CUDA_ERROR_INVALID_VALUE;
    }
    Stream *stream = entered ? NULL : calloc(1, sizeof *stream);
    if (!entered && !stream) {
        entered = CUDA_ERROR_OUT_OF_MEMORY;
    }
    if (!entered) {
        stream->is_blocking = flags != NON_BLOCKING;
        stream->next = &legacy;
        stream->previous = legacy.previous;
        stream->previous->next = legacy.previous = stream;
        *result = handle_new(STREAM, stream);
    }
    return leave(entered);
}

CUresult cuStreamCreate(Handle *result, unsigned flags) {
    return cuStreamCreateWithPriority(result, flags, 0);
}

static CUresult enter_stream(Handle handle, Stream **stream) {
    CUresult result = enter(1);
    *stream = stream_of(handle);
    return result ? result : *stream ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuStreamDestroy_v2(Handle handle) {
    Stream *stream;
    CUresult result = enter_stream(handle, &stream);
    if (!result && stream == &legacy) {
        result = CUDA_ERROR_INVALID_HANDLE;
    }
    if (!result) {
        /* Others' waits for its work must find that done. */
        stream_run(stream);
        run_everything();
        stream->previous->next = stream->next;
        stream->next->previous = stream->previous;
        handle_forget(handle);
        free(stream);
        result = failure();
    }
    return leave(result);
}

CUresult cuStreamSynchronize(Handle handle) {
    Stream *stream;
    CUresult result = enter_stream(handle, &stream);
    if (!result) {
        run_what_comes_before(stream);
        stream_run(stream);
        result = failure();
    }
    return leave(result);
}

/* As cuEventQuery: what still has to run is told first, and runs then. */
CUresult cuStreamQuery(Handle handle) {
    Stream *stream;
    CUresult result = enter_stream(handle, &stream);
    if (!result && stream->first) {
        stream_run(stream);
        result = failure() ? failure() : CUDA_ERROR_NOT_READY;
    }
    return leave(result);
}

CUresult cuStreamWaitEvent(Handle handle, Handle event_handle, unsigned flags) {
    (void)flags;
    Stream *stream;
    CUresult result = enter_stream(handle, &stream);
    Event *event = handle_object(EVENT, event_handle);
    if (!result && !event) {
        result = CUDA_ERROR_INVALID_HANDLE;
    }
    if (!result && event->stream) {
        Work work = {.task = WAIT, .other = event->stream, .until = event->number};
        result = stream_add(stream, &work);
    }
    return leave(result);
}

CUresult cuEventCreate(Handle *result, unsigned flags) {
    CUresult entered = enter(1);
    if (!entered && (!result || flags > 3)) {
        entered = CUDA_ERROR_INVALID_VALUE;
    }
    Event *event = entered ? NULL : calloc(1, sizeof *event);
    if (!entered && !event) {
        entered = CUDA_ERROR_OUT_OF_MEMORY;
    }
    if (!entered) {
        event->has_time = (flags & 2) == 0;
        *result = handle_new(EVENT, event);
    }
    return leave(entered);
}

static CUresult enter_event(Handle handle, Event **event) {
    CUresult result = enter(1);
    *event = handle_object(EVENT, handle);
    return result ? result : *event ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuEventRecord(Handle handle, Handle stream_handle) {
    Event *event;
    CUresult result = enter_event(handle, &event);
    Stream *stream = stream_of(stream_handle);
    if (!result && !stream) {
        result = CUDA_ERROR_INVALID_HANDLE;
    }
    if (!result) {
        run_what_comes_before(stream);
        event->was_recorded = 1;
        event->stream = stream;
        event->number = last_number + 1;
        Work work = {.task = RECORD, .event = event};
        result = stream_add(stream, &work);
    }
    return leave(result);
}

/* Needs no context. An answer of "not ready" makes the work run, so that asking again ends. */
CUresult cuEventQuery(Handle handle) {
    CUresult result = enter(0);
    Event *event = handle_object(EVENT, handle);
    if (!result && !event) {
        result = CUDA_ERROR_INVALID_HANDLE;
    }
    result = result ? result : failure();
    if (!result && event->stream) {
        run_until(event->stream, event->number);
        result = failure() ? failure() : CUDA_ERROR_NOT_READY;
    }
    return leave(result);
}

CUresult cuEventSynchronize(Handle handle) {
    Event *event;
    CUresult result = enter_event(handle, &event);
    if (!result && event->stream) {
        run_until(event->stream, event->number);
        result = failure();
    }
    return leave(result);
}

CUresult cuEventElapsedTime_v2(float *milliseconds, Handle from, Handle to) {
    Event *start, *end;
    CUresult result = enter_event(from, &start);
    end = handle_object(EVENT, to);
    if (!result && !milliseconds) {
        result = CUDA_ERROR_INVALID_VALUE;
    } else if (!result && (!end || !start->has_time || !end->has_time || !start->was_recorded ||
                           !end->was_recorded)) {
        result = CUDA_ERROR_INVALID_HANDLE;
    } else if (!result && (start->stream || end->stream)) {
        result = CUDA_ERROR_NOT_READY;
    }
    if (!result) {
        *milliseconds = (float)(end->milliseconds - start->milliseconds);
    }
    return leave(result);
}

CUresult cuEventElapsedTime(float *milliseconds, Handle from, Handle to) {
    return cuEventElapsedTime_v2(milliseconds, from, to);
}

/* Work that would record it goes on without it. */
static void forget_event(const Event *event) {
    Stream *stream = &legacy;
    do {
        for (Work *work = stream->first; work; work = work->next) {
            work->event = work->event == event ? NULL : work->event;
        }
        stream = stream->next;
    } while (stream != &legacy);
}

CUresult cuEventDestroy_v2(Handle handle) {
    Event *event;
    CUresult result = enter_event(handle, &event);
    if (!result) {
        forget_event(event);
        handle_forget(handle);
        free(event);
    }
    return leave(result);
}
