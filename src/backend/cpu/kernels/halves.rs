//! Numbers that are kept in half the memory, if that loses nothing. Separate because no kernel
//! reads them: they are widened again for each op. Most models are published in f16, so that the
//! f32 that kernels compute with says no more than that.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::memory::{Plain, TASK, zeroed};
use super::spare;
use crate::error::Result;

/// Numbers that are f32 to whoever asks.
pub enum Halves {
    /// All of them are in f16's range and precision.
    F16(Vec<f16>),
    /// All of them are in bf16's precision.
    Bf16(Vec<bf16>),
}

impl Halves {
    /// The numbers, in whichever form gives the same bits again; `None` if neither does.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn of(values: &[f32]) -> Result<Option<Self>> {
        if let Some(halves) = halved::<f16>(values)? {
            return Ok(Some(Halves::F16(halves)));
        }
        Ok(halved::<bf16>(values)?.map(Halves::Bf16))
    }

    /// The numbers, in a buffer that wants to be [given back](spare::keep).
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn widen(&self) -> Result<Vec<f32>> {
        match self {
            Halves::F16(halves) => widened(halves),
            Halves::Bf16(halves) => widened(halves),
        }
    }

    /// Bytes of memory.
    pub fn held_bytes(&self) -> u64 {
        match self {
            Halves::F16(halves) => size_of_val(halves.as_slice()) as u64,
            Halves::Bf16(halves) => size_of_val(halves.as_slice()) as u64,
        }
    }
}

/// Half of an f32.
trait Half: Plain + Default {
    fn narrow(from: &[f32], to: &mut [Self]);
    fn widen(from: &[Self], to: &mut [f32]);
}

impl Half for f16 {
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }

    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
}

impl Half for bf16 {
    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }

    fn widen(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
}

fn halved<T: Half>(values: &[f32]) -> Result<Option<Vec<T>>> {
    const PIECE: usize = 1024;
    let is_same = |from: &[f32], to: &mut [T]| {
        T::narrow(from, to);
        let mut again = [0f32; PIECE];
        let again = &mut again[..from.len()];
        T::widen(to, again);
        from.iter().zip(again).all(|(before, after)| before.to_bits() == after.to_bits())
    };
    let mut halves = zeroed::<T>(values.len())?;
    let tasks = halves.par_chunks_mut(TASK).zip(values.par_chunks(TASK));
    let is_exact = tasks.all(|(to, from)| {
        to.chunks_mut(PIECE).zip(from.chunks(PIECE)).all(|(to, from)| is_same(from, to))
    });
    Ok(is_exact.then_some(halves))
}

fn widened<T: Half>(halves: &[T]) -> Result<Vec<f32>> {
    let mut values = spare::take(halves.len())?;
    let tasks = values.par_chunks_mut(TASK).zip(halves.par_chunks(TASK));
    tasks.for_each(|(to, from)| T::widen(from, to));
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_halved_only_where_every_bit_comes_back() -> Result<()> {
        let check = |values: &[f32], expected: &str| -> Result<()> {
            let found = Halves::of(values)?;
            let name = match &found {
                Some(Halves::F16(_)) => "f16",
                Some(Halves::Bf16(_)) => "bf16",
                None => "f32",
            };
            assert_eq!(name, expected, "{:?}", &values[..values.len().min(4)]);
            let Some(halves) = found else { return Ok(()) };
            assert_eq!(halves.held_bytes(), 2 * values.len() as u64);
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&halves.widen()?), bits(values));
            Ok(())
        };
        check(&[], "f16")?;
        check(&[0.0, -0.0, 1.5, 65504.0], "f16")?;
        check(&[1.0, 1e30], "f32")?;
        check(&[1.0, f32::from_bits(0x7100_0000)], "bf16")?;
        check(&[1.0, 1.0 + f32::EPSILON], "f32")?;
        check(&[f32::INFINITY, f32::NEG_INFINITY], "f16")?;
        // Every f16, in tasks of all lengths, and one number that is none, at the very end.
        let all: Vec<f32> = (0..=u16::MAX).map(|bits| f16::from_bits(bits).to_f32()).collect();
        let mut all: Vec<f32> = all.into_iter().filter(|x| !x.is_nan()).collect();
        check(&all, "f16")?;
        all.push(0.1);
        check(&all, "f32")
    }
}
