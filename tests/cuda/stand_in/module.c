/* The stand-in driver's modules and kernels. Separate because code is loaded and run here only:
 * compiler.c makes the images, emulator.c runs the threads. */
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "driver.h"
#include "image.h"

#define PLAIN_SHARED_BYTES (48 << 10)
#define MOST_THREADS 1024

typedef struct Function {
    struct Function *next; /* of the same module */
    Handle handle;
    Kernel kernel;
    char *name;
    int threads, dynamic_bytes; /* what it may ask for at a launch */
    size_t argument_bytes;
} Function;

typedef struct {
    void *library;
    int architecture;
    Function *functions;
} Module;

/* A private file that has no name any more once it is loaded. */
static void *load_library(const char *bytes, size_t count) {
    const char *folder = getenv("TMPDIR");
    char path[4096];
    if (snprintf(path, sizeof path, "%s/stand-in-XXXXXX", folder && *folder ? folder : "/tmp") >=
        (int)sizeof path) {
        return NULL;
    }
    int file = mkstemp(path);
    if (file < 0) {
        return NULL;
    }
    size_t written = 0;
    while (written < count) {
        ssize_t some = write(file, bytes + written, count - written);
        if (some <= 0) {
            break;
        }
        written += (size_t)some;
    }
    close(file);
    void *library = written == count ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
    unlink(path);
    if (!library) {
        const char *why = written == count ? dlerror() : "no room for the file";
        fprintf(stderr, "the stand-in driver loads no kernels: %s\n", why);
    }
    return library;
}

/* Binary code runs on later minor versions, portable code on all later versions. */
static int fits(int is_portable, int architecture) {
    int device = device_capability();
    return architecture <= device && (is_portable || architecture / 10 == device / 10);
}

static CUresult load(Module **result, const char *image) {
    Image header;
    memcpy(&header, image, sizeof header.magic);
    int is_portable = memcmp(header.magic, PORTABLE, sizeof header.magic) == 0;
    if (!is_portable && memcmp(header.magic, BINARY, sizeof header.magic) != 0) {
        return CUDA_ERROR_INVALID_IMAGE;
    }
    memcpy(&header, image, sizeof header);
    void *library = load_library(image + sizeof header, header.bytes);
    const int *architecture = library ? dlsym(library, "stand_in_architecture") : NULL;
    if (!architecture || !fits(is_portable, *architecture / 10)) {
        CUresult problem = !library       ? CUDA_ERROR_OPERATING_SYSTEM
                           : architecture ? CUDA_ERROR_NO_BINARY_FOR_GPU
                                          : CUDA_ERROR_INVALID_IMAGE;
        if (library) {
            dlclose(library);
        }
        return problem;
    }
    Module *module = calloc(1, sizeof *module);
    if (!module) {
        dlclose(library);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    module->library = library;
    module->architecture = *architecture / 10;
    counts.modules++;
    log_line("module: %llu bytes for %d", (unsigned long long)header.bytes, module->architecture);
    *result = module;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(Handle *result, const void *image) {
    CUresult entered = enter(1);
    if (!entered && (!result || !image)) {
        entered = CUDA_ERROR_INVALID_VALUE;
    }
    Module *module = NULL;
    entered = entered ? entered : load(&module, image);
    if (!entered) {
        *result = handle_new(MODULE, module);
    }
    return leave(entered);
}

CUresult cuModuleUnload(Handle handle) {
    CUresult result = enter(1);
    Module *module = handle_object(MODULE, handle);
    if (!result && !module) {
        result = CUDA_ERROR_INVALID_HANDLE;
    }
    if (!result) {
        run_everything();
        while (module->functions) {
            Function *function = module->functions;
            module->functions = function->next;
            handle_forget(function->handle);
            free(function->name);
            free(function);
        }
        dlclose(module->library);
        handle_forget(handle);
        free(module);
        result = failure();
    }
    return leave(result);
}

static void *symbol(const Module *module, const char *name, const char *suffix) {
    char whole[256];
    int length = snprintf(whole, sizeof whole, "%s%s", name, suffix);
    return length < (int)sizeof whole ? dlsym(module->library, whole) : NULL;
}

/* Kernels are what has a number of threads and a size of its argument. */
static CUresult function_of(Module *module, const char *name, Handle *result) {
    for (Function *known = module->functions; known; known = known->next) {
        if (strcmp(known->name, name) == 0) {
            *result = known->handle;
            return CUDA_SUCCESS;
        }
    }
    void *kernel = symbol(module, name, "");
    const int *threads = symbol(module, name, "_threads");
    const int *argument_bytes = symbol(module, name, "_argument_bytes");
    if (!kernel || !threads || !argument_bytes) {
        return CUDA_ERROR_NOT_FOUND;
    }
    Function *function = calloc(1, sizeof *function);
    char *copy = strdup(name);
    if (!function || !copy) {
        free(function);
        free(copy);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *function = (Function){.next = module->functions,
                           .name = copy,
                           .threads = *threads,
                           .dynamic_bytes = PLAIN_SHARED_BYTES,
                           .argument_bytes = (size_t)*argument_bytes};
    memcpy(&function->kernel, &kernel, sizeof kernel);
    function->handle = *result = handle_new(FUNCTION, function);
    module->functions = function;
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(Handle *result, Handle handle, const char *name) {
    CUresult entered = enter(1);
    Module *module = handle_object(MODULE, handle);
    if (!entered && (!result || !name)) {
        entered = CUDA_ERROR_INVALID_VALUE;
    }
    if (!entered && !module) {
        entered = CUDA_ERROR_INVALID_HANDLE;
    }
    return leave(entered ? entered : function_of(module, name, result));
}

enum { FUNCTION_THREADS = 0, FUNCTION_DYNAMIC_BYTES = 8, FUNCTION_CARVEOUT = 9 };

CUresult cuFuncSetAttribute(Handle handle, int attribute, int value) {
    CUresult result = enter(1);
    Function *function = handle_object(FUNCTION, handle);
    if (!result && !function) {
        result = CUDA_ERROR_INVALID_HANDLE;
    } else if (!result && attribute == FUNCTION_DYNAMIC_BYTES) {
        if (value < 0 || value > most_shared_bytes()) {
            result = CUDA_ERROR_INVALID_VALUE;
        } else {
            function->dynamic_bytes = value;
        }
    } else if (!result && attribute != FUNCTION_CARVEOUT) {
        result = CUDA_ERROR_INVALID_VALUE;
    }
    return leave(result);
}

CUresult cuFuncGetAttribute(int *value, int attribute, Handle handle) {
    CUresult result = enter(1);
    Function *function = handle_object(FUNCTION, handle);
    if (!result && !function) {
        result = CUDA_ERROR_INVALID_HANDLE;
    } else if (!result && !value) {
        result = CUDA_ERROR_INVALID_VALUE;
    } else if (!result && attribute == FUNCTION_THREADS) {
        *value = function->threads;
    } else if (!result && attribute == FUNCTION_DYNAMIC_BYTES) {
        *value = function->dynamic_bytes;
    } else if (!result) {
        result = CUDA_ERROR_INVALID_VALUE;
    }
    return leave(result);
}

static CUresult check_sizes(const Function *function, const unsigned grid[3],
                            const unsigned block[3], unsigned shared_bytes) {
    unsigned long long threads = (unsigned long long)block[0] * block[1] * block[2];
    int has_none = threads == 0 || grid[0] == 0 || grid[1] == 0 || grid[2] == 0;
    int has_too_many = block[0] > MOST_THREADS || block[1] > MOST_THREADS || block[2] > 64 ||
                       threads > MOST_THREADS || grid[0] > 0x7fffffff || grid[1] > 0xffff ||
                       grid[2] > 0xffff;
    if (has_none || has_too_many || shared_bytes > (unsigned)function->dynamic_bytes) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    return threads > (unsigned)function->threads ? CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
                                                 : CUDA_SUCCESS;
}

CUresult launch_new(Launch *launch, Handle handle, const unsigned grid[3], const unsigned block[3],
                    unsigned shared_bytes, void **parameters, void **extra) {
    Function *function = handle_object(FUNCTION, handle);
    if (!function) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    CUresult result = check_sizes(function, grid, block, shared_bytes);
    if (result) {
        return result;
    }
    if (!parameters || !parameters[0] || extra) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    *launch = (Launch){.name = function->name,
                       .kernel = function->kernel,
                       .shared_bytes = shared_bytes,
                       .argument = malloc(function->argument_bytes),
                       .argument_bytes = function->argument_bytes};
    if (!launch->argument) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    memcpy(launch->grid, grid, sizeof launch->grid);
    memcpy(launch->block, block, sizeof launch->block);
    memcpy(launch->argument, parameters[0], function->argument_bytes);
    return CUDA_SUCCESS;
}

/* A kernel that touches what it must not comes back here from its thread's stack. The emulator is
 * left as it is, locked: nothing runs on a device that has failed. */
static sigjmp_buf escape;
static _Thread_local volatile sig_atomic_t runs_kernel;
static struct sigaction before_segment, before_bus;

static void on_signal(int number) {
    if (runs_kernel) {
        siglongjmp(escape, 1);
    }
    /* Not a kernel's: it happens again, to whom it would have gone to. */
    sigaction(number, number == SIGSEGV ? &before_segment : &before_bus, NULL);
}

/* Separate from its caller, whose variables the escape would spoil. */
static CUresult emulate_or_escape(const Launch *launch) {
    void *arguments[] = {launch->argument};
    if (sigsetjmp(escape, 1)) {
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    runs_kernel = 1;
    int stuck = emulate(launch->kernel, launch->grid, launch->block, launch->shared_bytes,
                        arguments, 0);
    return stuck ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}

void launch_run(const Launch *launch) {
    struct sigaction action = {.sa_handler = on_signal};
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &before_segment);
    sigaction(SIGBUS, &action, &before_bus);
    counts.kernels++;
    CUresult result = emulate_or_escape(launch);
    runs_kernel = 0;
    sigaction(SIGSEGV, &before_segment, NULL);
    sigaction(SIGBUS, &before_bus, NULL);
    if (result) {
        fprintf(stderr, "the stand-in GPU: %s: %s\n", launch->name,
                result == CUDA_ERROR_ILLEGAL_ADDRESS ? "an address that is in no buffer"
                                                     : "not all threads reach a barrier");
        fail_for_good(result);
    }
}

CUresult cuLaunchKernel(Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                        Handle stream_handle, void **parameters, void **extra) {
    CUresult result = enter(1);
    Stream *stream = stream_of(stream_handle);
    if (!result && !stream) {
        result = CUDA_ERROR_INVALID_HANDLE;
    }
    Work work = {.task = RUN_KERNEL};
    const unsigned grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
    if (!result) {
        result = launch_new(&work.launch, function, grid, block, shared_bytes, parameters, extra);
    }
    const char *most = getenv("TINY_SD_STAND_IN_LAUNCHES");
    if (!result && most && counts.launches >= strtoull(most, NULL, 10)) {
        fail_for_good(CUDA_ERROR_LAUNCH_FAILED);
        result = CUDA_ERROR_LAUNCH_FAILED;
    }
    if (!result) {
        counts.launches++;
        result = stream_add(stream, &work);
    }
    return leave(result);
}
