//! The numbers that operands are stored as, converted a slice at a time. Separate because kernels
//! compute in f32 on blocks that stay in the cache, whatever a tensor holds.

use candle_core::{CpuStorage, DType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::memory::Gather;
use super::simd::for_each_isa;
use super::spare::Kept;

/// Elements that are converted at once: they stay in the L1 cache until they are used.
pub const BLOCK: usize = 2048;

/// A number that operands are stored as.
pub trait Element: Kept {
    /// Its name among candle's.
    const DTYPE: DType;

    /// Converts a slice; both have the same length.
    fn widen(from: &[Self], to: &mut [f32]);

    /// Rounds a slice to the nearest, halves to even; both have the same length.
    fn narrow(from: &[f32], to: &mut [Self]);

    /// The same slice if it needs no conversion.
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }

    /// The elements of a storage that holds this type.
    fn of(storage: &CpuStorage) -> Option<&[Self]>;

    /// A storage of these elements.
    fn store(values: Vec<Self>) -> CpuStorage;

    /// Lets `compute` fill `to`, by way of `buffer` where this is not f32.
    fn write(to: &mut [Self], buffer: &mut [f32], compute: impl FnOnce(&mut [f32])) {
        let buffer = &mut buffer[..to.len()];
        compute(buffer);
        Self::narrow(buffer, to);
    }

    /// Shows a slice to `see` in blocks of whole `row`s, as f32.
    fn read_blocks(from: &[Self], row: usize, mut see: impl FnMut(&[f32])) {
        let size = (BLOCK / row).max(1) * row;
        let mut wide = Vec::new();
        if Self::as_f32(from).is_none() {
            wide.resize(size.min(from.len()), 0.0);
        }
        for from in from.chunks(size) {
            see(Self::read(from, &mut wide));
        }
    }

    /// Lets `compute` make each block of whole `row`s of `to` from that of `from`, as f32.
    fn map_blocks(
        from: &[Self],
        to: &mut [Self],
        row: usize,
        mut compute: impl FnMut(&[f32], &mut [f32]),
    ) {
        let size = (BLOCK / row).max(1) * row;
        let (mut wide, mut result) = (Vec::new(), Vec::new());
        if Self::as_f32(from).is_none() {
            wide.resize(size.min(from.len()), 0.0);
            result.resize(size.min(to.len()), 0.0);
        }
        for (from, to) in from.chunks(size).zip(to.chunks_mut(size)) {
            let from = Self::read(from, &mut wide);
            Self::write(to, &mut result, |to| compute(from, to));
        }
    }

    /// Reads elements of a view from the `start`-th on, a buffer at a time.
    fn gather(values: &[Self], source: &Gather, start: usize, piece: &mut [f32]) {
        let mut buffer = [Self::default(); 4096];
        for (i, piece) in piece.chunks_mut(buffer.len()).enumerate() {
            let buffer = &mut buffer[..piece.len()];
            source.copy_from(values, start + i * 4096, buffer);
            Self::widen(buffer, piece);
        }
    }
}

/// `$body` with the type `$number` that stands for a dtype; an error where kernels have none.
macro_rules! with_number {
    ($dtype:expr, $number:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $number = f32;
                $body
            }
            candle_core::DType::F16 => {
                type $number = half::f16;
                $body
            }
            candle_core::DType::BF16 => {
                type $number = half::bf16;
                $body
            }
            other => Err($crate::backend::cpu::kernels::memory::unsupported(other)),
        }
    };
}
pub(super) use with_number;

/// What kernels that multiply `N` can read: the same, or something that widens to it.
pub trait As<N> {
    /// The slice as `N`: itself, or in `buffer`, which is at least as long.
    fn read<'a>(from: &'a [Self], buffer: &'a mut [N]) -> &'a [N]
    where
        Self: Sized;

    /// The slice in `to`, which is as long.
    fn copy(from: &[Self], to: &mut [N])
    where
        Self: Sized;
}

impl<T: Element> As<f32> for T {
    fn read<'a>(from: &'a [Self], buffer: &'a mut [f32]) -> &'a [f32] {
        if let Some(same) = T::as_f32(from) {
            return same;
        }
        let buffer = &mut buffer[..from.len()];
        T::widen(from, buffer);
        buffer
    }

    fn copy(from: &[Self], to: &mut [f32]) {
        T::widen(from, to);
    }
}

impl As<bf16> for bf16 {
    fn read<'a>(from: &'a [Self], _: &'a mut [bf16]) -> &'a [bf16] {
        from
    }

    fn copy(from: &[Self], to: &mut [bf16]) {
        to.copy_from_slice(from);
    }
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;

    fn widen(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.copy_from_slice(from);
    }

    fn of(storage: &CpuStorage) -> Option<&[Self]> {
        if let CpuStorage::F32(values) = storage { Some(values) } else { None }
    }

    fn store(values: Vec<Self>) -> CpuStorage {
        CpuStorage::F32(values)
    }

    fn as_f32(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }

    fn write(to: &mut [Self], _: &mut [f32], compute: impl FnOnce(&mut [f32])) {
        compute(to);
    }

    fn gather(values: &[Self], source: &Gather, start: usize, piece: &mut [f32]) {
        source.copy_from(values, start, piece);
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;

    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }

    fn of(storage: &CpuStorage) -> Option<&[Self]> {
        if let CpuStorage::F16(values) = storage { Some(values) } else { None }
    }

    fn store(values: Vec<Self>) -> CpuStorage {
        CpuStorage::F16(values)
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;

    fn widen(from: &[Self], to: &mut [f32]) {
        widen_bf16(from, to);
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        narrow_bf16(from, to);
    }

    fn of(storage: &CpuStorage) -> Option<&[Self]> {
        if let CpuStorage::BF16(values) = storage { Some(values) } else { None }
    }

    fn store(values: Vec<Self>) -> CpuStorage {
        CpuStorage::BF16(values)
    }
}

for_each_isa! {
    pub fn widen_bf16(from: &[bf16], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
    }
}

for_each_isa! {
    pub fn narrow_bf16(from: &[f32], to: &mut [bf16]) {
        for (to, from) in to.iter_mut().zip(from) {
            let bits = from.to_bits();
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
            // The sum would carry some NaNs over into infinity, or into a number.
            let bits = if from.is_nan() { bits | 0x0040_0000 } else { rounded };
            *to = bf16::from_bits((bits >> 16) as u16);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_is_rounded_to_the_nearest_and_halves_to_even() {
        let patterns =
            (0..=u32::MAX).step_by(65_521).chain([0x3f80_8000, 0x3f81_8000, 0x7f7f_ffff]);
        let wide: Vec<f32> =
            patterns.map(f32::from_bits).chain([f32::NAN, f32::INFINITY, -0.0]).collect();
        let mut narrow = vec![bf16::ZERO; wide.len()];
        bf16::narrow(&wide, &mut narrow);
        let mut back = vec![0.0; wide.len()];
        bf16::widen(&narrow, &mut back);
        for ((&wide, &narrow), &back) in wide.iter().zip(&narrow).zip(&back) {
            let expected = bf16::from_f32(wide);
            assert_eq!(narrow.is_nan(), wide.is_nan(), "{wide}");
            assert!(wide.is_nan() || narrow == expected, "{wide} is {narrow}");
            assert!(wide.is_nan() || back == expected.to_f32(), "{narrow} is {back}");
        }
    }
}
