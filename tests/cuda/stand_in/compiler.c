/* A stand-in for NVIDIA's run-time compiler on machines without it: libnvrtc.so.13 as far as this
 * program uses it. It has the C compiler make a shared library of a source of kernels, which the
 * stand-in driver beside it loads. Separate from that because the program finds the two by
 * themselves. Built by
 *
 *   cc -std=gnu11 -O2 -Wall -Wextra -shared -fPIC -DEMULATOR_FOLDER='"…/tests/cuda"' \
 *      -Wl,-soname,libnvrtc.so.13 -Wl,-z,nodelete -o FOLDER/libnvrtc.so.13 \
 *      tests/cuda/stand_in/compiler.c -ldl -lpthread
 *
 * where EMULATOR_FOLDER is the one with emulator.h, as an absolute path, and FOLDER has
 * libcuda.so.1 when this compiles. TINY_SD_STAND_IN_LOG: a file to which it adds a line for each
 * source it compiles. */
#define _GNU_SOURCE /* dladdr */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "image.h"

extern char **environ;

/* The codes are those of nvrtc.h of CUDA 13. */
typedef enum {
    NVRTC_SUCCESS = 0,
    NVRTC_ERROR_OUT_OF_MEMORY = 1,
    NVRTC_ERROR_PROGRAM_CREATION_FAILURE = 2,
    NVRTC_ERROR_INVALID_INPUT = 3,
    NVRTC_ERROR_INVALID_PROGRAM = 4,
    NVRTC_ERROR_INVALID_OPTION = 5,
    NVRTC_ERROR_COMPILATION = 6,
    NVRTC_ERROR_INTERNAL_ERROR = 11
} nvrtcResult;

typedef struct {
    char *source, *name;
    char *library; /* once it is compiled */
    size_t library_bytes;
    char *log;
    size_t log_bytes;
    int architecture, is_portable;
} Program;
typedef Program *nvrtcProgram;

static const int architectures[] = {75, 80, 86, 89, 90, 100, 120};
#define ARCHITECTURES (int)(sizeof architectures / sizeof *architectures)

#define DEFINITIONS 32
#define PATH 4096

/* What the options say. */
typedef struct {
    int architecture, is_portable, definition_count;
    const char *definitions[DEFINITIONS];
} Options;

nvrtcResult nvrtcVersion(int *major, int *minor) {
    if (!major || !minor) {
        return NVRTC_ERROR_INVALID_INPUT;
    }
    *major = 13;
    *minor = 0;
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetNumSupportedArchs(int *count) {
    if (!count) {
        return NVRTC_ERROR_INVALID_INPUT;
    }
    *count = ARCHITECTURES;
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetSupportedArchs(int *result) {
    if (!result) {
        return NVRTC_ERROR_INVALID_INPUT;
    }
    memcpy(result, architectures, sizeof architectures);
    return NVRTC_SUCCESS;
}

const char *nvrtcGetErrorString(nvrtcResult result) {
    static const char *const names[] = {
        "NVRTC_SUCCESS", "NVRTC_ERROR_OUT_OF_MEMORY", "NVRTC_ERROR_PROGRAM_CREATION_FAILURE",
        "NVRTC_ERROR_INVALID_INPUT", "NVRTC_ERROR_INVALID_PROGRAM", "NVRTC_ERROR_INVALID_OPTION",
        "NVRTC_ERROR_COMPILATION",
    };
    unsigned code = (unsigned)result;
    return code < sizeof names / sizeof *names ? names[code]
           : code == NVRTC_ERROR_INTERNAL_ERROR ? "NVRTC_ERROR_INTERNAL_ERROR"
                                                : "NVRTC_ERROR unknown";
}

nvrtcResult nvrtcDestroyProgram(nvrtcProgram *program) {
    if (!program || !*program) {
        return NVRTC_ERROR_INVALID_PROGRAM;
    }
    free((*program)->source);
    free((*program)->name);
    free((*program)->library);
    free((*program)->log);
    free(*program);
    *program = NULL;
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcCreateProgram(nvrtcProgram *result, const char *source, const char *name,
                               int header_count, const char *const *headers,
                               const char *const *header_names) {
    (void)headers;
    (void)header_names;
    if (!result || !source || header_count != 0) {
        return NVRTC_ERROR_INVALID_INPUT;
    }
    Program *program = calloc(1, sizeof *program);
    if (!program) {
        return NVRTC_ERROR_OUT_OF_MEMORY;
    }
    program->source = strdup(source);
    program->name = strdup(name && *name ? name : "default_program");
    if (!program->source || !program->name) {
        nvrtcDestroyProgram(&program);
        return NVRTC_ERROR_OUT_OF_MEMORY;
    }
    *result = program;
    return NVRTC_SUCCESS;
}

/* Replaces the log; the text need not end with a zero. */
static void set_log(Program *program, const char *text, size_t bytes) {
    free(program->log);
    program->log = malloc(bytes + 1);
    program->log_bytes = program->log ? bytes : 0;
    if (program->log) {
        memcpy(program->log, text, bytes);
        program->log[bytes] = 0;
    }
}

static int read_architecture(const char *text, Options *options) {
    options->is_portable = strncmp(text, "compute_", 8) == 0;
    const char *digits = options->is_portable ? text + 8 : strncmp(text, "sm_", 3) ? "" : text + 3;
    char *end;
    long number = strtol(digits, &end, 10);
    if (end == digits || *end) {
        return 0;
    }
    for (int i = 0; i < ARCHITECTURES; i++) {
        options->architecture = architectures[i] == number ? architectures[i]
                                                           : options->architecture;
    }
    return options->architecture == number;
}

static int is_switch(const char *option) {
    static const char *const known[] = {"--fmad=",     "--ftz=",  "--prec-sqrt=",
                                        "--prec-div=", "-fmad=", "-ftz="};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        size_t length = strlen(known[i]);
        if (strncmp(option, known[i], length) == 0) {
            return strcmp(option + length, "true") == 0 || strcmp(option + length, "false") == 0;
        }
    }
    return 0;
}

/* The option that is not known, or NULL. */
static const char *read_options(int count, const char *const *texts, Options *options) {
    static const char architecture[] = "--gpu-architecture=", short_one[] = "-arch=";
    for (int i = 0; i < count; i++) {
        const char *text = texts[i];
        int is_right = 0;
        if (strncmp(text, architecture, sizeof architecture - 1) == 0) {
            is_right = read_architecture(text + sizeof architecture - 1, options);
        } else if (strncmp(text, short_one, sizeof short_one - 1) == 0) {
            is_right = read_architecture(text + sizeof short_one - 1, options);
        } else if (strncmp(text, "-D", 2) == 0 && text[2]) {
            is_right = options->definition_count < DEFINITIONS;
            if (is_right) {
                options->definitions[options->definition_count++] = text;
            }
        } else {
            is_right = is_switch(text);
        }
        if (!is_right) {
            return text;
        }
    }
    return NULL;
}

/* A whole file; NULL if that fails. */
static char *read_file(const char *path, size_t *bytes) {
    FILE *file = fopen(path, "rb");
    struct stat status;
    char *result = NULL;
    if (file && fstat(fileno(file), &status) == 0) {
        *bytes = (size_t)status.st_size;
        result = malloc(*bytes + 1);
        if (result && fread(result, 1, *bytes, file) != *bytes) {
            free(result);
            result = NULL;
        }
    }
    if (file) {
        fclose(file);
    }
    return result;
}

/* The source, under its own name, and what the driver wants to know. */
static int write_source(const Program *program, const char *path) {
    FILE *file = fopen(path, "w");
    if (!file) {
        return 0;
    }
    int written = fprintf(file, "#line 1 \"%s\"\n%s\nconst int stand_in_architecture = ARCH;\n",
                          program->name, program->source);
    return fclose(file) == 0 && written > 0;
}

/* Where this library is: libcuda.so.1 is beside it. */
static int own_folder(char *result) {
    Dl_info information;
    if (!dladdr((void *)(uintptr_t)own_folder, &information) || !information.dli_fname) {
        return 0;
    }
    const char *slash = strrchr(information.dli_fname, '/');
    int length = slash ? (int)(slash - information.dli_fname) : 1;
    return snprintf(result, PATH, "%.*s", length, slash ? information.dli_fname : ".") < PATH;
}

/* 0 if the command ran and was content. */
static int spawn(char **arguments, const char *errors) {
    posix_spawn_file_actions_t actions;
    pid_t child;
    int status = -1;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 2, errors, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    posix_spawn_file_actions_adddup2(&actions, 2, 1);
    int problem = posix_spawnp(&child, arguments[0], &actions, NULL, arguments, environ);
    posix_spawn_file_actions_destroy(&actions);
    if (problem) {
        return problem;
    }
    while (waitpid(child, &status, 0) < 0) {
        if (errno != EINTR) {
            return errno;
        }
    }
    return status;
}

/* Runs the C compiler. The kernels name the driver as a library they need, for the emulator's
 * symbols: those of the driver, which the program loads for itself, are not theirs to see. */
static int compile(const Options *options, const char *source, const char *library,
                   const char *errors) {
    char folder[PATH], search[PATH + 2], architecture[32];
    char *arguments[DEFINITIONS + 32];
    if (!own_folder(folder)) {
        return -1;
    }
    snprintf(search, sizeof search, "-L%s", folder);
    snprintf(architecture, sizeof architecture, "-DARCH=%d", options->architecture * 10);
    const char *const before[] = {"cc",      "-std=gnu11",         "-O2",
                                  "-shared", "-fPIC",              "-ffp-contract=off",
                                  "-I" EMULATOR_FOLDER, architecture};
    const char *const after[] = {"-o", library, "-xc", source, "-xnone", search,
                                 "-l:libcuda.so.1", "-lm"};
    int count = 0;
    for (size_t i = 0; i < sizeof before / sizeof *before; i++) {
        arguments[count++] = (char *)(uintptr_t)before[i];
    }
    for (int i = 0; i < options->definition_count; i++) {
        arguments[count++] = (char *)(uintptr_t)options->definitions[i];
    }
    for (size_t i = 0; i < sizeof after / sizeof *after; i++) {
        arguments[count++] = (char *)(uintptr_t)after[i];
    }
    arguments[count] = NULL;
    return spawn(arguments, errors);
}

static nvrtcResult compile_in(Program *program, const Options *options, const char *folder) {
    char source[PATH], library[PATH], errors[PATH];
    snprintf(source, sizeof source, "%s/source.c", folder);
    snprintf(library, sizeof library, "%s/kernels.so", folder);
    snprintf(errors, sizeof errors, "%s/errors", folder);
    nvrtcResult result = NVRTC_ERROR_INTERNAL_ERROR;
    if (write_source(program, source)) {
        int status = compile(options, source, library, errors);
        size_t bytes = 0;
        char *log = read_file(errors, &bytes);
        set_log(program, log ? log : "", log ? bytes : 0);
        free(log);
        free(program->library);
        program->library = status ? NULL : read_file(library, &program->library_bytes);
        result = program->library ? NVRTC_SUCCESS : NVRTC_ERROR_COMPILATION;
        if (status && program->log_bytes == 0) {
            set_log(program, "the C compiler does not run\n", 28);
        }
    }
    unlink(source);
    unlink(library);
    unlink(errors);
    return result;
}

static void tell(const Program *program, nvrtcResult result) {
    const char *path = getenv("TINY_SD_STAND_IN_LOG");
    int file = path && *path ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666) : -1;
    if (file >= 0) {
        dprintf(file, "compile: %s for %s%d: %s\n", program->name,
                program->is_portable ? "compute_" : "sm_", program->architecture,
                nvrtcGetErrorString(result));
        close(file);
    }
}

nvrtcResult nvrtcCompileProgram(nvrtcProgram program, int count, const char *const *texts) {
    if (!program || count < 0 || (count && !texts)) {
        return program ? NVRTC_ERROR_INVALID_INPUT : NVRTC_ERROR_INVALID_PROGRAM;
    }
    Options options = {75, 1, 0, {NULL}};
    const char *unknown = read_options(count, texts, &options);
    if (unknown) {
        char text[256];
        snprintf(text, sizeof text, "nvrtc: error: invalid value or option: %s\n", unknown);
        set_log(program, text, strlen(text));
        return NVRTC_ERROR_INVALID_OPTION;
    }
    program->architecture = options.architecture;
    program->is_portable = options.is_portable;
    const char *parent = getenv("TMPDIR");
    char folder[PATH / 2];
    snprintf(folder, sizeof folder, "%s/stand-in-XXXXXX", parent && *parent ? parent : "/tmp");
    if (!mkdtemp(folder)) {
        return NVRTC_ERROR_INTERNAL_ERROR;
    }
    nvrtcResult result = compile_in(program, &options, folder);
    rmdir(folder);
    tell(program, result);
    return result;
}

/* Code for one architecture is there only where one was asked for; portable code always is. */
static nvrtcResult image_size(const Program *program, int is_portable, size_t *size) {
    if (!program || !size) {
        return program ? NVRTC_ERROR_INVALID_INPUT : NVRTC_ERROR_INVALID_PROGRAM;
    }
    if (!program->library) {
        return NVRTC_ERROR_INVALID_PROGRAM;
    }
    int is_there = is_portable || !program->is_portable;
    *size = is_there ? sizeof(Image) + program->library_bytes : 0;
    return NVRTC_SUCCESS;
}

static nvrtcResult image(const Program *program, int is_portable, char *to) {
    size_t size = 0;
    nvrtcResult result = image_size(program, is_portable, &size);
    if (result || !to || size == 0) {
        return result ? result : NVRTC_ERROR_INVALID_INPUT;
    }
    Image header = {PORTABLE, program->library_bytes};
    if (!is_portable) {
        memcpy(header.magic, BINARY, sizeof header.magic);
    }
    memcpy(to, &header, sizeof header);
    memcpy(to + sizeof header, program->library, program->library_bytes);
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetCUBINSize(nvrtcProgram program, size_t *size) {
    return image_size(program, 0, size);
}

nvrtcResult nvrtcGetCUBIN(nvrtcProgram program, char *to) { return image(program, 0, to); }

nvrtcResult nvrtcGetPTXSize(nvrtcProgram program, size_t *size) {
    return image_size(program, 1, size);
}

nvrtcResult nvrtcGetPTX(nvrtcProgram program, char *to) { return image(program, 1, to); }

/* With the zero at its end, as the real one counts. */
nvrtcResult nvrtcGetProgramLogSize(nvrtcProgram program, size_t *size) {
    if (!program || !size) {
        return program ? NVRTC_ERROR_INVALID_INPUT : NVRTC_ERROR_INVALID_PROGRAM;
    }
    *size = program->log_bytes + 1;
    return NVRTC_SUCCESS;
}

nvrtcResult nvrtcGetProgramLog(nvrtcProgram program, char *log) {
    if (!program || !log) {
        return program ? NVRTC_ERROR_INVALID_INPUT : NVRTC_ERROR_INVALID_PROGRAM;
    }
    memcpy(log, program->log ? program->log : "", program->log_bytes + 1);
    return NVRTC_SUCCESS;
}
