//! Ops that look at one place at a time: the gate of a feed-forward block, sums of latents, bytes
//! of a picture.

use candle_core::{CpuStorage, DType};
use half::{bf16, f16};
use rayon::prelude::*;

use super::super::Storage;
use super::element::{As, BLOCK, Element, with_number};
use super::memory::{Rows, TASK, channels_last, in_order, unsupported, zeroed};
use super::simd::{for_each_isa, gelu};
use super::spare;
use crate::backend::order::memory_order;
use crate::backend::{Meta, View};
use crate::error::{Error, Result};

/// See [`crate::backend::Fused::Geglu`]; row-major.
pub fn geglu(args: &[View<'_, Storage>], meta: &Meta) -> Result<CpuStorage> {
    with_number!(meta.dtype, T => geglu_of::<T>(args, meta))
}

fn geglu_of<T: Element>(args: &[View<'_, Storage>], meta: &Meta) -> Result<CpuStorage> {
    let ([x], Some(&width)) = (args, meta.layout.dims().last()) else {
        return Err(Error::other("geglu takes one operand with dimensions"));
    };
    let x = Rows::<T>::read(*x)?;
    let mut values = spare::take::<T>(meta.layout.shape().elem_count())?;
    let rows = (TASK / width).max(1);
    values.par_chunks_mut(rows * width).enumerate().for_each(|(task, piece)| {
        let mut buffers = [[0f32; BLOCK]; 3];
        let [wide_value, wide_gate, result] = &mut buffers;
        for (i, to) in piece.chunks_exact_mut(width).enumerate() {
            let (value, gate) = x.row(task * rows + i).split_at(width);
            let blocks = value.chunks(BLOCK).zip(gate.chunks(BLOCK));
            for ((value, gate), to) in blocks.zip(to.chunks_mut(BLOCK)) {
                let value = T::read(value, wide_value);
                let gate = T::read(gate, wide_gate);
                T::write(to, result, |to| gated(value, gate, to));
            }
        }
    });
    Ok(T::store(values))
}

for_each_isa! {
    pub fn gated(value: &[f32], gate: &[f32], to: &mut [f32]) {
        for ((to, value), gate) in to.iter_mut().zip(value).zip(gate) {
            *to = value * gelu::<FUSED>(*gate);
        }
    }
}

/// See [`crate::backend::Fused::LinearCombination`]; in the order of the first operand.
pub fn linear_combination(
    coefficients: &[f64],
    args: &[View<'_, Storage>],
    meta: &Meta,
) -> Result<CpuStorage> {
    match meta.dtype {
        DType::F32 => combined(coefficients, args, meta, |sum| sum as f32),
        DType::F16 => combined(coefficients, args, meta, f16::from_f64),
        DType::BF16 => combined(coefficients, args, meta, bf16::from_f64),
        other => Err(unsupported(other)),
    }
}

fn combined<T: Element>(
    coefficients: &[f64],
    args: &[View<'_, Storage>],
    meta: &Meta,
    round: impl Fn(f64) -> T + Sync,
) -> Result<CpuStorage> {
    let order = memory_order(&meta.layout);
    let terms: Vec<_> = args.iter().map(|arg| in_order(*arg, &order)).collect::<Result<_>>()?;
    let mut values = spare::take::<T>(meta.layout.shape().elem_count())?;
    values.par_chunks_mut(TASK).enumerate().for_each(|(task, values)| {
        let (mut sums, mut wide) = ([0f64; BLOCK], [0f32; BLOCK]);
        for (block, to) in values.chunks_mut(BLOCK).enumerate() {
            let (start, sums) = (task * TASK + block * BLOCK, &mut sums[..to.len()]);
            sums.fill(0.0);
            for (coefficient, term) in coefficients.iter().zip(&terms) {
                let term: &[f32] = T::read(&term[start..start + to.len()], &mut wide);
                for (sum, x) in sums.iter_mut().zip(term) {
                    *sum += coefficient * f64::from(*x);
                }
            }
            for (to, sum) in to.iter_mut().zip(sums) {
                *to = round(*sum);
            }
        }
    });
    Ok(T::store(values))
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
