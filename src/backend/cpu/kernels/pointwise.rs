//! Ops that look at one place at a time: the gate of a feed-forward block, sums of latents, bytes
//! of a picture.

use candle_core::{CpuStorage, DType};
use half::{bf16, f16};
use rayon::prelude::*;

use super::super::Storage;
use super::memory::{Plain, Rows, TASK, channels_last, dense, result, unsupported, zeroed};
use super::simd::{for_each_isa, gelu};
use super::spare;
use crate::backend::order::memory_order;
use crate::backend::{Meta, View};
use crate::error::{Error, Result};

/// See [`crate::backend::Fused::Geglu`]; row-major.
pub fn geglu(args: &[View<'_, Storage>], meta: &Meta) -> Result<CpuStorage> {
    let ([x], Some(&width)) = (args, meta.layout.dims().last()) else {
        return Err(Error::other("geglu takes one operand with dimensions"));
    };
    let x = Rows::read(*x)?;
    let mut values = spare::take(meta.layout.shape().elem_count())?;
    let rows = (TASK / width).max(1);
    values.par_chunks_mut(rows * width).enumerate().for_each(|(task, piece)| {
        for (i, to) in piece.chunks_exact_mut(width).enumerate() {
            let (value, gate) = x.row(task * rows + i).split_at(width);
            gated(value, gate, to);
        }
    });
    result(values, meta.dtype)
}

for_each_isa! {
    pub fn gated(value: &[f32], gate: &[f32], to: &mut [f32]) {
        for ((to, value), gate) in to.iter_mut().zip(value).zip(gate) {
            *to = value * gelu(*gate);
        }
    }
}

/// See [`crate::backend::Fused::LinearCombination`]; in the order of the first operand.
pub fn linear_combination(
    coefficients: &[f64],
    args: &[View<'_, Storage>],
    meta: &Meta,
) -> Result<CpuStorage> {
    let order = memory_order(&meta.layout);
    let terms: Vec<_> = args.iter().map(|arg| dense(*arg, &order)).collect::<Result<_>>()?;
    let mut sums: Vec<f64> = zeroed(meta.layout.shape().elem_count())?;
    sums.par_chunks_mut(TASK).enumerate().for_each(|(task, sums)| {
        for (coefficient, term) in coefficients.iter().zip(&terms) {
            for (sum, x) in sums.iter_mut().zip(&term[task * TASK..]) {
                *sum += coefficient * f64::from(*x);
            }
        }
    });
    match meta.dtype {
        DType::F32 => rounded(&sums, |x| x as f32).map(CpuStorage::F32),
        DType::F16 => rounded(&sums, f16::from_f64).map(CpuStorage::F16),
        DType::BF16 => rounded(&sums, bf16::from_f64).map(CpuStorage::BF16),
        other => Err(unsupported(other)),
    }
}

fn rounded<T: Plain>(sums: &[f64], round: impl Fn(f64) -> T + Sync) -> Result<Vec<T>> {
    let mut values = zeroed(sums.len())?;
    let pieces = values.par_chunks_mut(TASK).zip(sums.par_chunks(TASK));
    pieces.for_each(|(to, from)| {
        for (to, from) in to.iter_mut().zip(from) {
            *to = round(*from);
        }
    });
    Ok(values)
}

/// See [`crate::backend::Fused::Pixels`]; `(batch, height, width, 3)`.
pub fn pixels(args: &[View<'_, Storage>]) -> Result<CpuStorage> {
    let [x] = args else { return Err(Error::other("pixels takes one operand")) };
    let x = channels_last(*x)?;
    let mut bytes = zeroed(x.len())?;
    let pieces = bytes.par_chunks_mut(TASK).zip(x.par_chunks(TASK));
    pieces.for_each(|(to, from)| {
        for (to, x) in to.iter_mut().zip(from) {
            *to = ((x / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
        }
    });
    Ok(CpuStorage::U8(bytes))
}
