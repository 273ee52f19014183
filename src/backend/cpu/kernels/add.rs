//! The sum of two tensors, which candle has: but images with a vector per channel are slow there,
//! and large results always come in fresh memory.

use candle_core::{CpuStorage, Layout};
use rayon::prelude::*;

use super::element::{As, BLOCK, Element};
use super::memory::{Gather, TASK, contiguous};
use super::simd::for_each_isa;
use super::spare;
use crate::backend::order::fits;
use crate::error::Result;

/// The sum in row-major order of two equal shapes, if both are of one float dtype, large, and their
/// rows lie without gaps; `None` leaves it to candle.
pub fn add(
    lhs: &CpuStorage,
    rhs: &CpuStorage,
    lhs_layout: &Layout,
    rhs_layout: &Layout,
) -> Option<Result<CpuStorage>> {
    match lhs {
        CpuStorage::F32(lhs) => add_of(lhs, rhs, lhs_layout, rhs_layout),
        CpuStorage::F16(lhs) => add_of(lhs, rhs, lhs_layout, rhs_layout),
        CpuStorage::BF16(lhs) => add_of(lhs, rhs, lhs_layout, rhs_layout),
        _ => None,
    }
}

fn add_of<T: Element>(
    lhs: &[T],
    rhs: &CpuStorage,
    lhs_layout: &Layout,
    rhs_layout: &Layout,
) -> Option<Result<CpuStorage>> {
    let rhs = T::of(rhs)?;
    let (dims, count) = (lhs_layout.dims(), lhs_layout.shape().elem_count());
    let sound = fits(lhs_layout, lhs.len()) && fits(rhs_layout, rhs.len());
    if count < TASK || !sound || dims != rhs_layout.dims() {
        return None;
    }
    let lhs = contiguous(lhs, lhs_layout)?;
    // Rows of the right operand that repeat, or all of it as one.
    let width = match contiguous(rhs, rhs_layout) {
        Some(_) => count,
        None if rhs_layout.stride().last() == Some(&1) => *dims.last()?,
        None => return None,
    };
    let source = Gather::new(rhs_layout);
    Some(spare::take::<T>(count).map(|mut sums| {
        let task = if width == count { TASK } else { (TASK / width).max(1) * width };
        sums.par_chunks_mut(task).zip(lhs.par_chunks(task)).enumerate().for_each(
            |(i, (sums, lhs))| {
                let mut buffers = [[0f32; BLOCK]; 3];
                let rows = sums.chunks_mut(width).zip(lhs.chunks(width));
                for (row, (sums, lhs)) in rows.enumerate() {
                    let start = source.place(i * task + row * width);
                    add_row(lhs, &rhs[start..start + sums.len()], sums, &mut buffers);
                }
            },
        );
        T::store(sums)
    }))
}

fn add_row<T: Element>(lhs: &[T], rhs: &[T], to: &mut [T], buffers: &mut [[f32; BLOCK]; 3]) {
    let [wide_lhs, wide_rhs, result] = buffers;
    let blocks = lhs.chunks(BLOCK).zip(rhs.chunks(BLOCK));
    for ((lhs, rhs), to) in blocks.zip(to.chunks_mut(BLOCK)) {
        let (lhs, rhs) = (T::read(lhs, wide_lhs), T::read(rhs, wide_rhs));
        T::write(to, result, |to| add_all(lhs, rhs, to));
    }
}

for_each_isa! {
    pub fn add_all(lhs: &[f32], rhs: &[f32], to: &mut [f32]) {
        for ((to, lhs), rhs) in to.iter_mut().zip(lhs).zip(rhs) {
            *to = lhs + rhs;
        }
    }
}
