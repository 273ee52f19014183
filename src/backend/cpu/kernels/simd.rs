//! Vector instructions: which of them this processor has, and functions of one number that the
//! compiler turns into vector loops. Separate because every kernel needs both and must not care.

use super::choice;

/// The instructions that kernels are compiled for; which of them run, [`choice`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// x86-64 with AVX-512 F.
    Avx512,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// 64-bit ARM.
    Neon,
    /// What every processor of the target has.
    Portable,
}

impl Isa {
    /// That of this process: the best of the processor, unless the environment says otherwise.
    pub fn detect() -> Self {
        choice::chosen().isa()
    }

    /// All that this processor can run, best first.
    pub fn available() -> &'static [Self] {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return &[Isa::Avx512, Isa::Avx2, Isa::Portable];
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return &[Isa::Avx2, Isa::Portable];
            }
        }
        match cfg!(target_arch = "aarch64") {
            true => &[Isa::Neon, Isa::Portable],
            false => &[Isa::Portable],
        }
    }
}

/// Asks for the cache line of an element, to be written or only read; the element need not exist.
/// Streams shorter than a page, as rows of tiles are, are not foreseen by the processor.
#[inline(always)]
pub fn prefetch<const WRITE: bool, T>(element: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint, which neither reads nor writes, at whatever address.
        unsafe {
            match WRITE {
                true => _mm_prefetch::<_MM_HINT_ET0>(element.cast()),
                false => _mm_prefetch::<_MM_HINT_T1>(element.cast()),
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = element;
}

/// Compiles a loop once for each [`Isa`] and picks the copy at run time. All copies give the same
/// bits: they differ in width only, but where the loop asks `FUSED`, which says whether a product
/// is fused with a sum by [`multiply_add`].
macro_rules! for_each_isa {
    (
        $(#[$meta:meta])*
        pub fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $out:ty)? $body:block
    ) => {
        $(#[$meta])*
        pub fn $name($($arg: $type),*) $(-> $out)? {
            #[inline(always)]
            #[allow(clippy::extra_unused_type_parameters, reason = "few loops ask")]
            fn body<const FUSED: bool>($($arg: $type),*) $(-> $out)? $body
            fn portable($($arg: $type),*) $(-> $out)? {
                body::<{ cfg!(target_arch = "aarch64") }>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f")]
            fn avx512($($arg: $type),*) $(-> $out)? {
                body::<true>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $type),*) $(-> $out)? {
                body::<true>($($arg),*)
            }
            match $crate::backend::cpu::kernels::simd::Isa::detect() {
                // SAFETY: `detect` names only what the processor has.
                #[cfg(target_arch = "x86_64")]
                $crate::backend::cpu::kernels::simd::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::backend::cpu::kernels::simd::Isa::Avx2 => unsafe { avx2($($arg),*) },
                #[cfg(not(target_arch = "x86_64"))]
                $crate::backend::cpu::kernels::simd::Isa::Avx512
                | $crate::backend::cpu::kernels::simd::Isa::Avx2 => portable($($arg),*),
                // What every processor of the target has includes NEON where that is.
                $crate::backend::cpu::kernels::simd::Isa::Neon
                | $crate::backend::cpu::kernels::simd::Isa::Portable => portable($($arg),*),
            }
        }
    };
}
pub(super) use for_each_isa;

/// eˣ to 2 units in the last place for x in −87.3..88.3, and the value at that end beyond.
/// (Cephes' `expf`, with the rounding to an integer done by adding 1.5 · 2²³.)
#[inline(always)]
pub fn exp<const FUSED: bool>(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    let x = x.clamp(-87.3, 88.3);
    let shifted = multiply_add::<FUSED>(x, std::f32::consts::LOG2_E, MAGIC);
    let power = shifted - MAGIC;
    // ln 2 in two parts, so that the product with a small integer is exact in the first.
    let rest = multiply_add::<FUSED>(power, -0.693_359_4, x);
    let rest = multiply_add::<FUSED>(power, 2.121_944_4e-4, rest);
    let mut sum = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        sum = multiply_add::<FUSED>(sum, rest, coefficient);
    }
    let mantissa = multiply_add::<FUSED>(sum * rest, rest, rest) + 1.0;
    let exponent = (shifted.to_bits().wrapping_sub(MAGIC.to_bits())).wrapping_add(127) << 23;
    mantissa * f32::from_bits(exponent)
}

/// `x · y + z`, rounded once if `FUSED`: where an instruction does it, since else it is a call.
#[inline(always)]
pub fn multiply_add<const FUSED: bool>(x: f32, y: f32, z: f32) -> f32 {
    if FUSED { x.mul_add(y, z) } else { x * y + z }
}

/// 2ˣ by powers of the rest of x, for x up to 1; below −126 it is 2⁻¹²⁶.
#[inline(always)]
fn exp2<const FUSED: bool, const N: usize>(x: f32, first: f32, coefficients: [f32; N]) -> f32 {
    // Its lowest bits count in ones, from the exponent's bias on.
    const MAGIC: f32 = 12_582_912.0 + 127.0;
    let x = if x < -126.0 { -126.0 } else { x };
    let shifted = x + MAGIC;
    let rest = x - (shifted - MAGIC);
    let mut sum = first;
    for coefficient in coefficients {
        sum = multiply_add::<FUSED>(sum, rest, coefficient);
    }
    sum * f32::from_bits(shifted.to_bits() << 23)
}

/// 2ˣ to 2 units in the last place of f32, for −126 ≤ x ≤ 1 (a minimax polynomial).
#[inline(always)]
pub fn exp2_fine<const FUSED: bool>(x: f32) -> f32 {
    let coefficients = [9.675_541e-3, 5.550_713e-2, 0.240_221_2, 0.693_146_94, 1.000_000_1];
    exp2::<FUSED, _>(x, 1.327_647_2e-3, coefficients)
}

/// 2ˣ to 8e-5, a fiftieth of what bf16 tells apart, for −126 ≤ x ≤ 1.
#[inline(always)]
pub fn exp2_coarse<const FUSED: bool>(x: f32) -> f32 {
    exp2::<FUSED, _>(x, 5.517_167e-2, [0.242_611_13, 0.693_260_97, 0.999_928_06])
}

/// The error function to 1e-7, by N. Juffa's two minimax polynomials: one for the middle, one for
/// ln(1 − erf) outside.
#[inline(always)]
pub fn erf<const FUSED: bool>(x: f32) -> f32 {
    let (size, square) = (x.abs(), x * x);
    let low = multiply_add::<FUSED>(-1.728_534_7e-5, size, 3.831_971_3e-4);
    let high = multiply_add::<FUSED>(-3.883_964_4e-3, size, 2.425_462_2e-2);
    let mut outside = multiply_add::<FUSED>(low, square, high);
    for coefficient in [-1.067_778_8e-1, -6.348_467e-1, -1.287_175_1e-1] {
        outside = multiply_add::<FUSED>(outside, size, coefficient);
    }
    let outside = multiply_add::<FUSED>(outside, size, -size);
    let outside = (1.0 - exp::<FUSED>(outside)).copysign(x);
    let mut middle = -5.967_617e-4;
    for coefficient in
        [4.991_194_2e-3, -2.676_813_5e-2, 1.128_199_25e-1, -3.761_253_4e-1, 1.283_791_7e-1]
    {
        middle = multiply_add::<FUSED>(middle, square, coefficient);
    }
    let middle = multiply_add::<FUSED>(middle, x, x);
    // Beyond 4 the polynomials leave their range and erf is 1 in f32.
    let outside = if size > 4.0 { 1f32.copysign(x) } else { outside };
    if size > 0.927_734_4 { outside } else { middle }
}

/// x · sigmoid(x).
#[inline(always)]
pub fn silu<const FUSED: bool>(x: f32) -> f32 {
    x / (1.0 + exp::<FUSED>(-x))
}

/// The exact gelu, x/2 · (1 + erf(x/√2)).
#[inline(always)]
pub fn gelu<const FUSED: bool>(x: f32) -> f32 {
    0.5 * x * (1.0 + erf::<FUSED>(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// x · sigmoid(1.702 x).
#[inline(always)]
pub fn quick_gelu<const FUSED: bool>(x: f32) -> f32 {
    x / (1.0 + exp::<FUSED>(-1.702 * x))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<const FUSED: bool>() {
        let (mut worst_exp, mut worst_erf) = (0f64, 0f64);
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let true_exp = f64::from(x).exp();
            worst_exp = worst_exp.max((f64::from(exp::<FUSED>(x)) - true_exp).abs() / true_exp);
            let z = x / 10.0;
            let true_erf = candle_core::cpu::erf::erf_f64(f64::from(z));
            worst_erf = worst_erf.max((f64::from(erf::<FUSED>(z)) - true_erf).abs());
        }
        for i in -1_260_000..=10_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp2();
            let error = |found: f32| (f64::from(found) - exact).abs() / exact;
            worst_exp = worst_exp.max(error(exp2_fine::<FUSED>(x)));
            assert!(error(exp2_coarse::<FUSED>(x)) < 8e-5, "2 to the {x}");
        }
        assert!(worst_exp < 2.4e-7, "exp is off by {worst_exp}");
        assert!(worst_erf < 1.2e-7, "erf is off by {worst_erf}");
    }

    #[test]
    fn exp_and_erf_are_exact_to_a_few_units_in_the_last_place() {
        check::<false>();
        check::<true>();
    }

    #[test]
    fn not_a_number_stays_so_and_infinities_saturate() {
        let functions = [exp::<false>, erf::<false>, silu::<false>, exp2_fine::<false>];
        assert!(functions.iter().all(|function| function(f32::NAN).is_nan()));
        assert!(exp2_coarse::<false>(f32::NAN).is_nan());
        assert!(exp::<false>(f32::NEG_INFINITY) < 1.3e-38);
        assert!(exp2_fine::<false>(f32::NEG_INFINITY) < 1.3e-38);
        let ends = (erf::<false>(f32::INFINITY), erf::<false>(f32::NEG_INFINITY));
        assert_eq!(ends, (1.0, -1.0));
        assert_eq!((gelu::<false>(50.0), silu::<false>(100.0)), (50.0, 100.0));
    }
}
