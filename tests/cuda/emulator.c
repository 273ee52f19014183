/* Runs kernels on a CPU: the threads of a block are fibers that change places at barriers and at
 * what a warp does together. Separate from emulator.h because it is compiled once. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "emulator.h"

#define THREADS 1024
#define STACK (64 * 1024)
#define COPIES 128

uint3 threadIdx, blockIdx, blockDim, gridDim;
unsigned char *emulated_shared;

typedef struct {
    int generation, arrived;
} Barrier;

/* What the lanes of a warp show each other; two, as a lane may be one exchange ahead. */
typedef struct {
    unsigned words[2][32];
    float numbers[2][32][12]; /* of mma: a lane's 8 of a, then its 4 of b */
    const void *rows[2][32];
    Barrier barrier;
} Warp;

/* A copy that has begun but not arrived. */
typedef struct {
    void *to;
    const void *from;
    int real, group;
} Copy;

typedef struct {
    Copy copies[COPIES];
    int count, group;
} Copies;

static struct {
    Kernel kernel;
    void **arguments;
    int threads, running, step, ended, idle, stuck;
    unsigned char done[THREADS];
    unsigned char parity[THREADS];
    uint3 index[THREADS];
    Barrier barrier;
    Warp warps[THREADS / 32];
    Copies copies[THREADS];
    char *stacks;
} block;

#if defined(__x86_64__)
typedef void *Context;
static Context contexts[THREADS], scheduler;

/* Saves the registers that a call must preserve and the stack, and takes the other's. */
void emulator_switch(Context *from, Context to);
__asm__(".text\n.globl emulator_switch\n.type emulator_switch,@function\nemulator_switch:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n"
        ".size emulator_switch,.-emulator_switch\n");

static void change(Context *from, Context *to) { emulator_switch(from, *to); }

static void prepare(Context *context, char *stack, void (*entry)(void)) {
    void **top = (void **)(stack + STACK);
    *--top = NULL; /* keeps the stack aligned as after a call */
    *--top = (void *)entry;
    for (int i = 0; i < 6; i++) {
        *--top = NULL;
    }
    *context = top;
}
#else
typedef ucontext_t Context;
static Context contexts[THREADS], scheduler;

static void change(Context *from, Context *to) { swapcontext(from, to); }

static void prepare(Context *context, char *stack, void (*entry)(void)) {
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = STACK;
    context->uc_link = NULL;
    makecontext(context, entry, 0);
}
#endif

/* Lets the next thread that has not ended run; back to the scheduler if there is none. */
static void yield(void) {
    int from = block.running, to = from;
    do {
        to = (to + block.step + block.threads) % block.threads;
    } while (block.done[to] && to != from);
    if (block.done[to] || block.idle++ > 4 * block.threads) {
        block.stuck = !block.done[to];
        change(&contexts[from], &scheduler);
        return;
    }
    if (to == from) {
        return;
    }
    block.running = to;
    threadIdx = block.index[to];
    change(&contexts[from], &contexts[to]);
}

static void wait(Barrier *barrier, int threads) {
    int generation = barrier->generation;
    if (++barrier->arrived >= threads) {
        barrier->arrived = 0;
        barrier->generation++;
        block.idle = 0;
        return;
    }
    while (barrier->generation == generation) {
        yield();
    }
}

static void start(void) {
    block.kernel(block.arguments);
    block.done[block.running] = 1;
    block.ended++;
    block.idle = 0;
    yield();
}

static int warp_size(int warp) {
    int rest = block.threads - warp * 32;
    return rest < 32 ? rest : 32;
}

/* The exchange that comes next for this lane; everyone's words are there after it. */
static int show(Warp *warp, int lane, unsigned word, const void *row) {
    int parity = block.parity[block.running] ^= 1;
    warp->words[parity][lane] = word;
    warp->rows[parity][lane] = row;
    wait(&warp->barrier, warp_size((int)(warp - block.warps)));
    return parity;
}

/* Threads that have ended no longer count, as on devices since sm_70. */
void __syncthreads(void) { wait(&block.barrier, block.threads - block.ended); }

void __syncwarp(unsigned mask) {
    (void)mask;
    show(&block.warps[block.running / 32], block.running % 32, mask, NULL);
}

float __shfl_xor_sync(unsigned mask, float value, int lanes) {
    (void)mask;
    int lane = block.running % 32;
    Warp *warp = &block.warps[block.running / 32];
    int parity = show(warp, lane, bits_of(value), NULL);
    return float_of(warp->words[parity][lane ^ lanes]);
}

static float part(unsigned word, int high, int is_bfloat) {
    unsigned short bits = (unsigned short)(high ? word >> 16 : word);
    return is_bfloat ? float_of((unsigned)bits << 16) : emulated_float_of_half(bits);
}

void emulated_mma(float *d, const unsigned *a, const unsigned *b, int is_bfloat) {
    int lane = block.running % 32;
    Warp *warp = &block.warps[block.running / 32];
    float *mine = warp->numbers[block.parity[block.running] ^ 1][lane];
    for (int i = 0; i < 12; i++) {
        mine[i] = part(i < 8 ? a[i / 2] : b[i / 2 - 4], i % 2, is_bfloat);
    }
    int parity = show(warp, lane, 0, NULL);
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        float sum = d[i];
        for (int k = 0; k < 16; k++) {
            const float *of_row = warp->numbers[parity][row % 8 * 4 + k % 8 / 2];
            const float *of_column = warp->numbers[parity][column * 4 + k % 8 / 2];
            sum += of_row[row / 8 * 2 + k / 8 * 4 + k % 2] * of_column[8 + k / 8 * 2 + k % 2];
        }
        d[i] = sum;
    }
}

void emulated_ldmatrix(unsigned *result, const void *row, int transposed) {
    int lane = block.running % 32;
    Warp *warp = &block.warps[block.running / 32];
    if ((uintptr_t)row % 16 != 0) {
        fprintf(stderr, "ldmatrix of an address that is no multiple of 16\n");
        abort();
    }
    int parity = show(warp, lane, 0, row);
    for (int matrix = 0; matrix < 4; matrix++) {
        unsigned short pair[2];
        for (int i = 0; i < 2; i++) {
            int along = lane % 4 * 2 + i, across = lane / 4;
            int from = transposed ? along : across, at = transposed ? across : along;
            pair[i] = ((const unsigned short *)warp->rows[parity][matrix * 8 + from])[at];
        }
        result[matrix] = (unsigned)pair[0] | (unsigned)pair[1] << 16;
    }
    /* Nobody overwrites the rows before all lanes have read them. */
    show(warp, lane, 0, NULL);
}

void emulated_copy16(void *to, const void *from, int real) {
    Copies *copies = &block.copies[block.running];
    if (copies->count == COPIES || (uintptr_t)to % 16 != 0 || (uintptr_t)from % 16 != 0) {
        fprintf(stderr, "cp.async: too many, or an address that is no multiple of 16\n");
        abort();
    }
    copies->copies[copies->count++] = (Copy){to, from, real, copies->group};
}

void emulated_commit(void) { block.copies[block.running].group++; }

void emulated_wait(int groups) {
    Copies *copies = &block.copies[block.running];
    int rest = 0;
    for (int i = 0; i < copies->count; i++) {
        Copy copy = copies->copies[i];
        if (copy.group >= copies->group - groups) {
            copies->copies[rest++] = copy;
        } else if (copy.real) {
            memcpy(copy.to, copy.from, 16);
        } else {
            memset(copy.to, 0, 16);
        }
    }
    copies->count = rest;
}

float emulated_float_of_half(unsigned short x) {
    unsigned sign = (unsigned)(x & 0x8000) << 16, exponent = x >> 10 & 31, mantissa = x & 0x3ff;
    if (exponent == 31) {
        return float_of(sign | 0x7f800000u | mantissa << 13);
    }
    if (exponent == 0) {
        float small = (float)mantissa * 0x1p-24f;
        return sign ? -small : small;
    }
    return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

unsigned short emulated_half_of_float(float x) {
    unsigned bits = bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) {
        return 0x7fff;
    }
    if (size >= 0x477ff000) { /* 65520 and more round to infinity */
        return (unsigned short)(sign | 0x7c00);
    }
    if (size < 0x38800000) { /* below 2^-14: multiples of 2^-24, exact in f32, ties to even */
        float steps = nearbyintf(float_of(size) * 0x1p24f);
        return (unsigned short)(sign | (unsigned)steps);
    }
    unsigned rounded = size + 0xfff + (size >> 13 & 1);
    return (unsigned short)(sign | ((rounded >> 13) - (112 << 10)));
}

static int run_block(void) {
    block.ended = block.idle = block.stuck = 0;
    memset(block.done, 0, sizeof block.done);
    memset(&block.barrier, 0, sizeof block.barrier);
    for (int i = 0; i < block.threads; i++) {
        unsigned at = (unsigned)i;
        block.index[i].x = at % blockDim.x;
        block.index[i].y = at / blockDim.x % blockDim.y;
        block.index[i].z = at / blockDim.x / blockDim.y;
        block.parity[i] = 0;
        block.copies[i].count = block.copies[i].group = 0;
        block.warps[i / 32].barrier.arrived = block.warps[i / 32].barrier.generation = 0;
        prepare(&contexts[i], block.stacks + (size_t)i * STACK, start);
    }
    block.running = block.step > 0 ? 0 : block.threads - 1;
    threadIdx = block.index[block.running];
    change(&scheduler, &contexts[block.running]);
    return block.stuck;
}

static pthread_mutex_t device = PTHREAD_MUTEX_INITIALIZER;

static int run_grid(const unsigned grid[3], unsigned shared_bytes) {
    for (unsigned z = 0; z < grid[2]; z++) {
        for (unsigned y = 0; y < grid[1]; y++) {
            for (unsigned x = 0; x < grid[0]; x++) {
                blockIdx = (uint3){x, y, z};
                memset(emulated_shared, 0xff, shared_bytes);
                if (run_block()) {
                    return 1;
                }
            }
        }
    }
    return 0;
}

int emulate(Kernel kernel, const unsigned grid[3], const unsigned size[3], unsigned shared_bytes,
            void **arguments, int backwards) {
    int threads = (int)(size[0] * size[1] * size[2]);
    if (threads < 1 || threads > THREADS) {
        return 1;
    }
    pthread_mutex_lock(&device);
    block.kernel = kernel;
    block.arguments = arguments;
    block.threads = threads;
    block.step = backwards ? -1 : 1;
    if (!block.stacks) {
        block.stacks = mmap(NULL, (size_t)THREADS * STACK, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
    gridDim = (uint3){grid[0], grid[1], grid[2]};
    blockDim = (uint3){size[0], size[1], size[2]};
    emulated_shared = guarded(shared_bytes, 16);
    int stuck = run_grid(grid, shared_bytes);
    guarded_free(emulated_shared, shared_bytes);
    pthread_mutex_unlock(&device);
    return stuck;
}

/* Pages for the bytes and one more behind them. */
static size_t pages(unsigned long long bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return ((size_t)bytes + page - 1) / page * page + page;
}

void *guarded(unsigned long long bytes, unsigned alignment) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), all = pages(bytes);
    char *start = mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) {
        return NULL;
    }
    memset(start, 0xff, all - page);
    mprotect(start + all - page, page, PROT_NONE);
    size_t at = all - page - (size_t)bytes;
    return start + at / alignment * alignment;
}

void guarded_free(void *address, unsigned long long bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    munmap((void *)((uintptr_t)address / page * page), pages(bytes));
}
