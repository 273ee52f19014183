// What tensor cores need: products of fragments, their loads from shared memory, and copies into it
// that threads do not wait for. Separate because only here is it said which device can do what; on
// the CPU the emulator does the same with the same registers.
#ifndef TENSOR_CUH
#define TENSOR_CUH

#include "common.cuh"

// Whether there are tensor cores for T that multiply exactly and add in f32.
#if DTYPE == 1 || (DTYPE == 2 && ARCH >= 800)
#define TENSOR 1
#else
#define TENSOR 0
#endif

// 16 bytes from device memory to shared memory, or zeros; both addresses are multiples of 16, and
// `from` is valid in any case.
DEVICE void copy16(void *to, const void *from, int real) {
#if defined(__CUDACC_RTC__) && ARCH >= 800
    unsigned address = (unsigned)__cvta_generic_to_shared(to);
    int bytes = real ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(bytes)
                 : "memory");
#elif ARCH >= 800
    emulated_copy16(to, from, real);
#else
    uint4 value;
    value.x = value.y = value.z = value.w = 0;
    if (real) {
        value = *(const uint4 *)from;
    }
    *(uint4 *)to = value;
#endif
}

// Ends a group of copies.
DEVICE void copies_begun(void) {
#if defined(__CUDACC_RTC__) && ARCH >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#elif ARCH >= 800
    emulated_commit();
#endif
}

// Waits for this thread's copies, but for those of the newest group if `newest_may_wait`.
DEVICE void copies_done(int newest_may_wait) {
#if defined(__CUDACC_RTC__) && ARCH >= 800
    if (newest_may_wait) {
        asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
#elif ARCH >= 800
    emulated_wait(newest_may_wait);
#else
    (void)newest_may_wait;
#endif
}

#if TENSOR
// Four 8×8 matrices: lane i gives the address of row i % 8 of matrix i / 8 (a multiple of 16
// bytes), and gets of each two neighbours: of row lane / 4, columns lane % 4 · 2 and the next.
DEVICE void load_matrices(unsigned *result, const T *row) {
#ifdef __CUDACC_RTC__
    unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(address)
                 : "memory");
#else
    emulated_ldmatrix(result, row, 0);
#endif
}

// The same, each matrix transposed.
DEVICE void load_transposed(unsigned *result, const T *row) {
#ifdef __CUDACC_RTC__
    unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(address)
                 : "memory");
#else
    emulated_ldmatrix(result, row, 1);
#endif
}

#ifdef __CUDACC_RTC__
#if DTYPE == 1
#define MMA_TYPES "f32.f16.f16.f32"
#else
#define MMA_TYPES "f32.bf16.bf16.f32"
#endif
#endif

// d (16×8) += a (16×16, row-major) · b (16×8, column-major), by a warp. Of lane 4g + t: d[0], d[1]
// are row g, columns 2t and 2t + 1; d[2], d[3] those of row g + 8. a[0] holds row g, columns 2t and
// 2t + 1; a[1] those of row g + 8; a[2], a[3] the same 8 columns further. b[0] holds column g, rows
// 2t and 2t + 1; b[1] those 8 rows further.
DEVICE void multiply_add(float *d, const unsigned *a, const unsigned *b) {
#ifndef __CUDACC_RTC__
    emulated_mma(d, a, b, DTYPE == 2);
#elif ARCH >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col." MMA_TYPES " {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    UNROLL
    for (int half = 0; half < 2; half++) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col." MMA_TYPES " {%0, %1, %2, %3}, "
                     "{%4, %5}, {%6}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
#endif
}

// Two neighbours in one register, the first in the lower half.
DEVICE unsigned pair_of(float first, float second) {
#if defined(__CUDACC_RTC__) && ARCH >= 800
    unsigned result;
#if DTYPE == 1
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
#endif
    return result;
#else
    return (unsigned)put(first) | (unsigned)put(second) << 16;
#endif
}
#endif

#endif
