/* What kernel sources need to compile as C11 and to run on a CPU: the names that CUDA gives, with
 * the threads of a block as fibers (emulator.c). Separate from the kernels because only tests
 * include it: it is the "device" on machines without one.
 *
 * -DARCH=750 or 800 (as __CUDA_ARCH__) chooses which paths of the sources are taken. */
#ifndef EMULATOR_H
#define EMULATOR_H

#include <math.h>
#include <string.h>

#ifndef ARCH
#define ARCH 800
#endif

#define DEVICE static inline __attribute__((unused))
#define SHARED static __attribute__((aligned(16)))
#define DYNAMIC_SHARED(Type, name) Type *name = (Type *)emulated_shared
#define UNROLL
#define KEEP_LOOP
/* A kernel is exported as a function of the array of pointers to its arguments, beside how many
 * threads it is built for and the size of its one argument, which a driver has to copy. */
#define KERNEL(name, threads, Arguments)                                                           \
    static void name##_thread(const Arguments a);                                                  \
    void name(void **arguments) { name##_thread(*(const Arguments *)arguments[0]); }               \
    const int name##_threads = threads;                                                            \
    const int name##_argument_bytes = sizeof(Arguments);                                           \
    static void name##_thread(const Arguments a)

typedef struct {
    unsigned x, y, z;
} uint3;
typedef struct {
    unsigned x, y;
} __attribute__((aligned(8))) uint2;
typedef struct {
    unsigned x, y, z, w;
} __attribute__((aligned(16))) uint4;
typedef struct {
    float x, y, z, w;
} __attribute__((aligned(16))) float4;

extern uint3 threadIdx, blockIdx, blockDim, gridDim;
extern unsigned char *emulated_shared;

void __syncthreads(void);
void __syncwarp(unsigned mask);
float __shfl_xor_sync(unsigned mask, float value, int lanes);

/* mma.sync.aligned.m16n8k16.row.col.f32.{f16 or bf16}.same.f32: d += a b, by all lanes of a warp,
 * with the registers of each lane as PTX lays them out. */
void emulated_mma(float *d, const unsigned *a, const unsigned *b, int is_bfloat);
/* ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16. */
void emulated_ldmatrix(unsigned *result, const void *row, int transposed);

/* cp.async of 16 bytes (or zeros), cp.async.commit_group, and cp.async.wait_group. The bytes arrive
 * as late as they may: when they are waited for. */
void emulated_copy16(void *to, const void *from, int real);
void emulated_commit(void);
void emulated_wait(int groups);

float emulated_float_of_half(unsigned short x);
unsigned short emulated_half_of_float(float x);

DEVICE unsigned bits_of(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
DEVICE float float_of(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

typedef void (*Kernel)(void **arguments);

/* Runs a kernel as cuLaunchKernel would, one block after another; callers of one library wait for
 * each other. 0, or 1 if threads wait for each other for ever (a barrier that not all of them
 * reach). `backwards` runs the threads between barriers in the opposite order: a result that
 * depends on it lacks a barrier. */
int emulate(Kernel kernel, const unsigned grid[3], const unsigned block[3], unsigned shared_bytes,
            void **arguments, int backwards);

/* Memory that ends at a page that must not be touched, filled with ones (NaN); the address is a
 * multiple of `alignment`. guarded_free takes the same address and size. */
void *guarded(unsigned long long bytes, unsigned alignment);
void guarded_free(void *address, unsigned long long bytes);

#endif
