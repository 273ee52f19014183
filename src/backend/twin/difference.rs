//! Whether two results are equal, equal enough, or not. Separate because it knows nothing of
//! devices: two buffers on the host, and numbers with their reasons.

use std::fmt;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, WithDType};

/// How far results of one op may differ between two devices that are both right.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Tolerance {
    /// Not at all: whole numbers do not depend on the order of sums.
    Exact,
    /// An element may differ by `relative` × the largest magnitude in both results + `absolute`.
    ///
    /// Relative to the largest one, because an element near zero is the sum of larger terms, and
    /// carries their rounding.
    Rounding {
        /// A multiple of the distance from 1 to the next number.
        relative: f64,
        /// The smallest normal number: a device may take smaller ones for zero.
        absolute: f64,
    },
}

impl Tolerance {
    /// The sums behind an element have up to some 20,000 terms (the widest convolution), added in
    /// the order that suits a device: √20,000 rounding errors of half a unit, and some room.
    pub const F32: Self = Self::sums(f32::EPSILON as f64, f32::MIN_POSITIVE as f64);
    /// As [`F32`](Self::F32).
    pub const F64: Self = Self::sums(f64::EPSILON, f64::MIN_POSITIVE);
    /// Sums are made in f32 and rounded to f16 at the end, perhaps once or twice on the way.
    pub const F16: Self = Self::rounded(1.0 / 1024.0, 1.0 / 16384.0);
    /// As [`F16`](Self::F16); its smallest normal number is that of f32.
    pub const BF16: Self = Self::rounded(1.0 / 128.0, f32::MIN_POSITIVE as f64);

    const fn sums(epsilon: f64, absolute: f64) -> Self {
        Self::Rounding { relative: 256.0 * epsilon, absolute }
    }

    const fn rounded(epsilon: f64, absolute: f64) -> Self {
        Self::Rounding { relative: 4.0 * epsilon, absolute }
    }

    /// Of results of `dtype`. Dtypes in which no op here computes must be equal.
    pub fn of(dtype: DType) -> Self {
        match dtype {
            DType::F64 => Self::F64,
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
            _ => Self::Exact,
        }
    }
}

/// How two results differ, at the element where they differ most.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gap {
    /// Their dtype.
    pub dtype: DType,
    /// Elements in the buffer.
    pub len: usize,
    /// How many of them differ at all.
    pub differing: usize,
    /// Which one differs most, counted in the buffer.
    pub index: usize,
    /// What the first device has there.
    pub a: f64,
    /// What the second device has there.
    pub b: f64,
    /// |a − b|; infinite if one of them is no number or infinite.
    pub difference: f64,
    /// The largest difference that the tolerance allows here.
    pub allowed: f64,
}

impl Gap {
    /// How much of what is allowed is used.
    pub(super) fn share(&self) -> f64 {
        if self.difference == 0.0 { 0.0 } else { self.difference / self.allowed }
    }
}

/// `f32 0.25 and 0.5 at element 7 of 12, off by 0.25 where 1.526e-5 is allowed; 2 differ`.
impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dtype, len, differing, index, a, b, difference, allowed } = *self;
        write!(f, "{} ", dtype.as_str())?;
        match dtype {
            // f32 holds them too, and shows no more digits than they have.
            DType::F32 | DType::F16 | DType::BF16 => write!(f, "{} and {}", a as f32, b as f32)?,
            _ => write!(f, "{a} and {b}")?,
        }
        let (difference, allowed) = (short(difference), short(allowed));
        write!(
            f,
            " at element {index} of {len}, off by {difference} where {allowed} is allowed; \
             {differing} differ"
        )
    }
}

/// Four digits say enough.
fn short(value: f64) -> String {
    match value {
        0.0 => "0".into(),
        1e-3..1e6 => format!("{value:.4}").trim_end_matches('0').trim_end_matches('.').into(),
        _ => format!("{value:.3e}"),
    }
}

/// How two results differ that should not.
#[derive(Debug, Clone, PartialEq)]
pub enum Mismatch {
    /// They are not of the same dtype.
    Dtype {
        /// Of the first device.
        a: DType,
        /// Of the second device.
        b: DType,
    },
    /// They have not as many elements.
    Len {
        /// Of the first device.
        a: usize,
        /// Of the second device.
        b: usize,
    },
    /// Their values differ.
    Values(Gap),
}

/// What comes of a comparison.
#[derive(Debug)]
pub(super) enum Verdict {
    /// The same bits.
    Identical,
    /// Not the same bits, but close enough.
    Within(Gap),
    /// Too far apart.
    Beyond(Mismatch),
}

/// Compares two buffers as they lie.
pub(super) fn compare(a: &CpuStorage, b: &CpuStorage) -> Verdict {
    use CpuStorage::{
        BF16, F4, F6E2M3, F6E3M2, F8E4M3, F8E8M0, F16, F32, F64, I16, I32, I64, U8, U32,
    };
    let dtype = a.dtype();
    match (a, b) {
        (U8(a), U8(b))
        | (F6E2M3(a), F6E2M3(b))
        | (F6E3M2(a), F6E3M2(b))
        | (F4(a), F4(b))
        | (F8E8M0(a), F8E8M0(b)) => elements(dtype, a, b),
        (U32(a), U32(b)) => elements(dtype, a, b),
        (I16(a), I16(b)) => elements(dtype, a, b),
        (I32(a), I32(b)) => elements(dtype, a, b),
        (I64(a), I64(b)) => elements(dtype, a, b),
        (BF16(a), BF16(b)) => elements(dtype, a, b),
        (F16(a), F16(b)) => elements(dtype, a, b),
        (F32(a), F32(b)) => elements(dtype, a, b),
        (F64(a), F64(b)) => elements(dtype, a, b),
        (F8E4M3(a), F8E4M3(b)) => elements(dtype, a, b),
        (a, b) => Verdict::Beyond(Mismatch::Dtype { a: a.dtype(), b: b.dtype() }),
    }
}

fn elements<T: WithDType>(dtype: DType, a: &[T], b: &[T]) -> Verdict {
    if a.len() != b.len() {
        return Verdict::Beyond(Mismatch::Len { a: a.len(), b: b.len() });
    }
    let (len, tolerance) = (a.len(), Tolerance::of(dtype));
    let (mut differing, mut magnitude) = (0, 0.0_f64);
    let mut largest: Option<Gap> = None;
    for (index, (&x, &y)) in a.iter().zip(b).enumerate() {
        let (a, b) = (x.to_f64(), y.to_f64());
        for value in [a.abs(), b.abs()] {
            magnitude = if value.is_finite() { magnitude.max(value) } else { magnitude };
        }
        if same_bits(x, y) {
            continue;
        }
        differing += 1;
        let difference = difference(x, y);
        if largest.is_none_or(|largest| difference > largest.difference) {
            largest = Some(Gap { dtype, len, differing: 0, index, a, b, difference, allowed: 0.0 });
        }
    }
    let Some(largest) = largest else { return Verdict::Identical };
    let allowed = match tolerance {
        Tolerance::Exact => 0.0,
        Tolerance::Rounding { relative, absolute } => relative * magnitude + absolute,
    };
    let gap = Gap { differing, allowed, ..largest };
    match tolerance {
        Tolerance::Rounding { .. } if gap.difference <= allowed => Verdict::Within(gap),
        Tolerance::Rounding { .. } | Tolerance::Exact => Verdict::Beyond(Mismatch::Values(gap)),
    }
}

/// f64 holds every value of every dtype but i64, and the sign of a zero.
fn same_bits<T: WithDType>(a: T, b: T) -> bool {
    #[expect(clippy::eq_op, reason = "only NaN differs from itself")]
    let is_nan = a != a;
    a.to_f64().to_bits() == b.to_f64().to_bits() && (a == b || is_nan)
}

/// Zero for equal infinities, for zeros of either sign and for NaN of either kind.
fn difference<T: WithDType>(a: T, b: T) -> f64 {
    let (x, y) = (a.to_f64(), b.to_f64());
    if a == b || (x.is_nan() && y.is_nan()) {
        return 0.0;
    }
    let difference = (x - y).abs();
    if difference.is_nan() { f64::INFINITY } else { difference }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    /// `=`, `~` with the element and the difference, or `!` with them.
    fn verdict<T: WithDType>(a: &[T], b: &[T]) -> String {
        let show = |gap: Gap| format!("{} {} of {}", gap.index, gap.difference, gap.differing);
        match compare(&T::to_cpu_storage(a), &T::to_cpu_storage(b)) {
            Verdict::Identical => "=".into(),
            Verdict::Within(gap) => format!("~ {}", show(gap)),
            Verdict::Beyond(Mismatch::Values(gap)) => format!("! {}", show(gap)),
            Verdict::Beyond(other) => format!("{other:?}"),
        }
    }

    #[test]
    fn a_difference_is_judged_by_its_dtype_and_by_the_largest_element() {
        let next = f32::EPSILON;
        let (nan, other_nan) = (f32::NAN, f32::from_bits(0x7fc0_0001));
        let infinite = f32::INFINITY;
        assert_eq!(verdict(&[1.0_f32, nan, infinite], &[1.0, nan, infinite]), "=");
        assert_eq!(verdict::<f32>(&[], &[]), "=");
        assert_eq!(verdict(&[1.0, nan, 0.0], &[1.0, other_nan, -0.0]), "~ 1 0 of 2");
        assert_eq!(
            verdict(&[1.0, 1.0], &[1.0, 1.0 + next]),
            format!("~ 1 {} of 1", f64::from(next))
        );
        // 256 steps are allowed at the largest element, and a little for what is nearly zero.
        assert!(verdict(&[1.0, 0.0], &[1.0, 3.0e-5_f32]).starts_with('~'));
        assert!(verdict(&[1.0, 0.0], &[1.0, 3.1e-5_f32]).starts_with('!'));
        assert_eq!(verdict(&[1.0, 0.0], &[1.0, 0.0625_f32]), "! 1 0.0625 of 1");
        assert_eq!(verdict(&[4096.0, 0.0], &[4096.0, 0.0625_f32]), "~ 1 0.0625 of 1");
        assert_eq!(verdict(&[infinite, 0.0], &[infinite, 0.0625]), "! 1 0.0625 of 1");
        assert!(verdict(&[0.0_f32], &[1e-40]).starts_with('~'), "a number taken for zero");
        // Of several, the largest.
        assert_eq!(verdict(&[1.0_f32; 4], &[1.0, 1.5, 3.0, 0.5]), "! 2 2 of 3");
        assert_eq!(verdict(&[1.0, 2.0], &[1.0, nan]), "! 1 inf of 1");
        assert_eq!(verdict(&[1.0, 2.0], &[-infinite, nan]), "! 0 inf of 2");
        assert_eq!(verdict(&[infinite], &[-infinite]), "! 0 inf of 1");
    }

    #[test]
    fn each_dtype_has_its_own_tolerance_and_whole_numbers_have_none() {
        let half = |values: [f64; 2]| values.map(f16::from_f64);
        let brain = |values: [f64; 2]| values.map(bf16::from_f64);
        let step = 1.0 / 256.0;
        assert_eq!(verdict(&half([1.0, 0.5]), &half([1.0, 0.5 + step])), "~ 1 0.00390625 of 1");
        assert_eq!(verdict(&half([1.0, 0.5]), &half([1.0, 0.75])), "! 1 0.25 of 1");
        assert_eq!(verdict(&brain([1.0, 0.5]), &brain([1.0, 0.53125])), "~ 1 0.03125 of 1");
        assert_eq!(verdict(&brain([1.0, 0.5]), &brain([1.0, 0.625])), "! 1 0.125 of 1");
        assert_eq!(verdict(&[1.0_f64, 0.0], &[1.0, 1e-9]), "! 1 0.000000001 of 1");
        assert_eq!(verdict(&[1.0_f64, 0.0], &[1.0, 2.0_f64.powi(-50)]).chars().next(), Some('~'));
        assert_eq!(verdict(&[7_u8, 200], &[7, 201]), "! 1 1 of 1");
        assert_eq!(verdict(&[7_u32, 9], &[7, 9]), "=");
        // Equal in f64, and yet not equal.
        assert_eq!(verdict(&[i64::MAX], &[i64::MAX - 1]), "! 0 0 of 1");
    }

    #[test]
    fn a_gap_is_told_with_the_digits_that_its_dtype_has() {
        let show = |a: &CpuStorage, b: &CpuStorage| match compare(a, b) {
            Verdict::Beyond(Mismatch::Values(gap)) | Verdict::Within(gap) => gap.to_string(),
            other => panic!("{other:?}"),
        };
        let found = show(&f32::to_cpu_storage(&[1.0, 0.1]), &f32::to_cpu_storage(&[1.0, 2.0]));
        let expected = "f32 0.1 and 2 at element 1 of 2, off by 1.9 where 6.104e-5 is allowed; \
                        1 differ";
        assert_eq!(found, expected);
        let found = show(&u8::to_cpu_storage(&[0]), &u8::to_cpu_storage(&[200]));
        assert_eq!(
            found,
            "u8 0 and 200 at element 0 of 1, off by 200 where 0 is allowed; 1 differ"
        );
    }

    #[test]
    fn results_of_another_kind_differ_whatever_they_hold() {
        assert_eq!(verdict(&[1.0_f32], &[1.0, 2.0]), "Len { a: 1, b: 2 }");
        let found = compare(&f32::to_cpu_storage(&[0.0]), &u32::to_cpu_storage(&[0]));
        let expected = Mismatch::Dtype { a: DType::F32, b: DType::U32 };
        assert!(matches!(found, Verdict::Beyond(mismatch) if mismatch == expected));
    }
}
