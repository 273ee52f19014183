//! Pairs of bf16, which AVX-512 BF16 multiplies and sums in f32 at twice the speed of f32.
//! Separate because only some processors have it: elsewhere bf16 is widened as it is packed.

use std::cell::RefCell;
use std::thread::LocalKey;

use half::bf16;

use super::micro::{Args, Unit};
#[cfg(target_arch = "x86_64")]
use super::micro::{ROW, WIDTH, avx512_kernel, with_rows};
use super::simd::Isa;

/// Two numbers that follow each other along k, the first in the lower half.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Pair(u32);

impl Pair {
    /// From the bits of the first and the second.
    #[inline(always)]
    pub fn from_bits(bits: u32) -> Self {
        Self(bits)
    }
}

impl Unit for Pair {
    type Number = bf16;
    const NUMBERS: usize = 2;

    fn numbers(units: &mut [Self]) -> &mut [bf16] {
        let (start, len) = (units.as_mut_ptr().cast::<bf16>(), 2 * units.len());
        // SAFETY: a pair is 4 bytes without other meaning, at least as aligned as the 2 × 2 bytes
        // of the same memory, which any bits are a value of.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }

    fn runs_on(isa: Isa) -> bool {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => is_x86_feature_detected!("avx512bf16"),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx512 => false,
            Isa::Avx2 | Isa::Neon | Isa::Portable => false,
        }
    }

    fn scratch() -> &'static LocalKey<RefCell<Vec<Self>>> {
        thread_local! {
            static SCRATCH: RefCell<Vec<Pair>> = const { RefCell::new(Vec::new()) };
        }
        &SCRATCH
    }

    #[cfg(target_arch = "x86_64")]
    unsafe fn kernel<const STRIP: bool>(isa: Isa, rows: usize, width: usize, args: Args<Pair>) {
        match (isa, width) {
            (Isa::Avx512, WIDTH) => {
                with_rows!(rows, avx512_bf16, 2, args, [1 2 3 4 5 6 7 8 9 10 11 12 13 14])
            }
            (Isa::Avx512, _) => {
                with_rows!(rows, avx512_bf16, 1, args, [1 2 3 4 5 6 7 8 9 10 11 12 13 14])
            }
            (isa, _) => unreachable!("{isa:?} does not multiply pairs"),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    unsafe fn kernel<const STRIP: bool>(isa: Isa, _: usize, _: usize, _: Args<Pair>) {
        unreachable!("{isa:?} does not multiply pairs")
    }
}

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::__m512;

/// `x · y + sum` over both numbers of each pair.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn multiply_add(x: __m512, y: __m512, sum: __m512) -> __m512 {
    use std::arch::x86_64::{__m512bh, _mm512_dpbf16_ps};
    // SAFETY: vectors of equal size, for which any bits are a value.
    let (x, y) = unsafe {
        (std::mem::transmute::<__m512, __m512bh>(x), std::mem::transmute::<__m512, __m512bh>(y))
    };
    _mm512_dpbf16_ps(sum, x, y)
}

#[cfg(target_arch = "x86_64")]
avx512_kernel!(avx512_bf16, Pair, "avx512f,avx512bf16", multiply_add);
