// What every kernel source shares: the number type of the build, views, and conversions. Separate
// because the sources are valid both for NVRTC (as C++) and for a C11 compiler that emulates the
// device (tests/cuda/emulator.h): what differs between the two is named here, or there, only.
//
// -DDTYPE=0 (f32), 1 (f16) or 2 (bf16) says what T is. Halves are stored as unsigned short: the
// machines that run this have no CUDA headers. All arithmetic is f32 (or f64 where said) and is
// rounded once, to nearest even.
//
// Every kernel takes ONE struct by value, named in the comment above it with the launch geometry.
// Pointers are 8 bytes, int 4, long long and double 8, in C order and alignment.
#ifndef COMMON_CUH
#define COMMON_CUH

#ifdef __CUDACC_RTC__
#define ARCH __CUDA_ARCH__
#define DEVICE static __device__ __forceinline__
#define SHARED __shared__ __align__(16)
#define DYNAMIC_SHARED(Type, name)                                                                 \
    extern __shared__ __align__(16) unsigned char dynamic_shared[];                                \
    Type *name = (Type *)dynamic_shared
#define UNROLL _Pragma("unroll")
#define KEEP_LOOP _Pragma("unroll 1")
#define KERNEL(name, threads, Arguments)                                                           \
    extern "C" __global__ void __launch_bounds__(threads)                                          \
        name(const __grid_constant__ Arguments a)
DEVICE unsigned bits_of(float x) { return __float_as_uint(x); }
DEVICE float float_of(unsigned x) { return __uint_as_float(x); }
#else
#include "emulator.h"
#endif

#ifndef DTYPE
#define DTYPE 0
#endif

#define INFINITE float_of(0x7f800000u)
#define FULL_WARP 0xffffffffu

DEVICE float float_of_half(unsigned short x) {
#ifdef __CUDACC_RTC__
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x));
    return result;
#else
    return emulated_float_of_half(x);
#endif
}

DEVICE unsigned short half_of_float(float x) {
#ifdef __CUDACC_RTC__
    unsigned short result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(x));
    return result;
#else
    return emulated_half_of_float(x);
#endif
}

DEVICE float float_of_bfloat(unsigned short x) { return float_of((unsigned)x << 16); }

DEVICE unsigned short bfloat_of_float(float x) {
#if defined(__CUDACC_RTC__) && ARCH >= 800
    unsigned short result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(x));
    return result;
#else
    unsigned bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (unsigned short)0x7fff;
    }
    return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

// The float towards zero, its last bit set where something was lost: rounding that to a half then
// gives what rounding the double once would give.
DEVICE float odd_of_double(double x) {
    float near = (float)x;
    double back = (double)near;
    if (back == x || x != x) {
        return near;
    }
    unsigned bits = bits_of(near);
    if ((back < 0 ? -back : back) > (x < 0 ? -x : x)) {
        bits -= 1;
    }
    return float_of(bits | 1u);
}

#if DTYPE == 0
typedef float T;
DEVICE float get(T x) { return x; }
DEVICE T put(float x) { return x; }
DEVICE T put_double(double x) { return (float)x; }
#elif DTYPE == 1
typedef unsigned short T;
DEVICE float get(T x) { return float_of_half(x); }
DEVICE T put(float x) { return half_of_float(x); }
DEVICE T put_double(double x) { return half_of_float(odd_of_double(x)); }
#else
typedef unsigned short T;
DEVICE float get(T x) { return float_of_bfloat(x); }
DEVICE T put(float x) { return bfloat_of_float(x); }
DEVICE T put_double(double x) { return bfloat_of_float(odd_of_double(x)); }
#endif

// Four neighbours at once; the address is aligned to all of them.
DEVICE void get4(const T *from, float *to) {
#if DTYPE == 0
    float4 four = *(const float4 *)from;
    to[0] = four.x;
    to[1] = four.y;
    to[2] = four.z;
    to[3] = four.w;
#else
    uint2 four = *(const uint2 *)from;
    to[0] = get((T)(four.x & 0xffffu));
    to[1] = get((T)(four.x >> 16));
    to[2] = get((T)(four.y & 0xffffu));
    to[3] = get((T)(four.y >> 16));
#endif
}

DEVICE void put4(T *to, const float *from) {
#if DTYPE == 0
    float4 four;
    four.x = from[0];
    four.y = from[1];
    four.z = from[2];
    four.w = from[3];
    *(float4 *)to = four;
#else
    uint2 four;
    four.x = (unsigned)put(from[0]) | (unsigned)put(from[1]) << 16;
    four.y = (unsigned)put(from[2]) | (unsigned)put(from[3]) << 16;
    *(uint2 *)to = four;
#endif
}

DEVICE int aligned(const void *address, int bytes) {
    return ((unsigned long long)address & (unsigned long long)(bytes - 1)) == 0;
}

#define RANK_LIMIT 6

// A tensor in memory: element (i0, i1, …) lies at offset + Σ strides[d] · id, counted in elements.
// 88 bytes. Fewer, larger dimensions are quicker: the host merges what lies together.
typedef struct View {
    int rank;
    int dims[RANK_LIMIT];
    long long strides[RANK_LIMIT];
    long long offset;
} View;

// Of sizes that are not negative. Long division is slow, and nearly no tensor needs it.
DEVICE long long quotient(long long index, long long size) {
    if ((index | size) >> 32 == 0) {
        return (long long)((unsigned)index / (unsigned)size);
    }
    return index / size;
}

// Where the index-th element in row-major order of the first `rank` dims lies.
DEVICE long long place_within(const View *view, int rank, long long index) {
    long long place = view->offset;
    UNROLL
    for (int d = RANK_LIMIT - 1; d >= 0; d--) {
        if (d < rank) {
            long long above = quotient(index, view->dims[d]);
            place += (index - above * view->dims[d]) * view->strides[d];
            index = above;
        }
    }
    return place;
}

DEVICE long long view_place(const View *view, long long index) {
    return place_within(view, view->rank, index);
}

// Whether row-major order is the order in memory, without gaps.
DEVICE int view_dense(const View *view) {
    long long expected = 1;
    UNROLL
    for (int d = RANK_LIMIT - 1; d >= 0; d--) {
        if (d < view->rank) {
            if (view->dims[d] != 1 && view->strides[d] != expected) {
                return 0;
            }
            expected *= view->dims[d];
        }
    }
    return 1;
}

// How a view of T can be read in fours of neighbours that begin at a multiple of 4 elements: not at
// all 0, each found by its index 1, one after another from the start on 2.
DEVICE int fours_of(const View *view, const T *start) {
    int fits = view->rank > 0 && view->offset % 4 == 0 && aligned(start, 4 * (int)sizeof(T));
    if (aligned(start + view->offset, 4 * (int)sizeof(T)) && view_dense(view)) {
        return 2;
    }
    UNROLL
    for (int d = 0; d < RANK_LIMIT; d++) {
        if (d < view->rank - 1) {
            fits = fits && view->strides[d] % 4 == 0;
        } else if (d < view->rank) {
            fits = fits && view->strides[d] == 1 && view->dims[d] % 4 == 0;
        }
    }
    return fits;
}

// Kernels over elements walk through all of them with any grid.x and block.x.
DEVICE long long first_element(void) {
    return (long long)blockIdx.x * blockDim.x + threadIdx.x;
}

DEVICE long long element_step(void) { return (long long)gridDim.x * blockDim.x; }

#define SQRT_HALF 0.70710678118654752440f

DEVICE float gelu_erf(float x) { return 0.5f * x * (1.0f + erff(x * SQRT_HALF)); }
DEVICE float gelu_tanh(float x) {
    return 0.5f * x * (1.0f + tanhf(0.79788456080286535588f * x * (1.0f + 0.044715f * x * x)));
}
DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }

enum Activation { IDENTITY = 0, SILU = 1, QUICK_GELU = 2, GELU = 3 };

DEVICE float activate(float x, int activation) {
    switch (activation) {
    case SILU:
        return silu(x);
    case QUICK_GELU:
        return x / (1.0f + expf(-1.702f * x));
    case GELU:
        return gelu_erf(x);
    default:
        return x;
    }
}

// Sums and maxima over the lanes of a warp, in the same order every time; all lanes get them.
DEVICE float warp_sum(float x) {
    UNROLL
    for (int lane = 16; lane > 0; lane /= 2) {
        x += __shfl_xor_sync(FULL_WARP, x, lane);
    }
    return x;
}

// The sum over all threads of a block of at most 1024, a multiple of 32; all threads get it.
DEVICE float block_sum(float x) {
    SHARED float sums[32];
    int warps = (int)blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        sums[threadIdx.x / 32] = x;
    }
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < warps; warp++) {
        sum += sums[warp];
    }
    return sum;
}

#endif
