//! Normalisation: over groups of channels of an image, and over the last dimension. Sums are taken
//! in f64, in an order that follows from the shape alone.

use candle_core::CpuStorage;
use rayon::prelude::*;

use super::super::Storage;
use super::element::{As, Element, with_number};
use super::memory::{Rows, TASK, in_order, row_major};
use super::simd::{for_each_isa, silu};
use super::spare;
use crate::backend::{GroupNorm, LayerNorm, Meta, View};
use crate::error::{Error, Result};

/// See [`GroupNorm`]; `(batch, height, width, channels)` in memory.
pub fn group_norm(op: &GroupNorm, args: &[View<'_, Storage>], meta: &Meta) -> Result<CpuStorage> {
    with_number!(meta.dtype, T => group_norm_of::<T>(op, args, meta))
}

fn group_norm_of<T: Element>(
    op: &GroupNorm,
    args: &[View<'_, Storage>],
    meta: &Meta,
) -> Result<CpuStorage> {
    let ([x, weight, bias], &[_, channels, height, width]) = (args, meta.layout.dims()) else {
        return Err(Error::other("group_norm takes an image, a weight and a bias"));
    };
    let x = in_order::<T>(*x, &[0, 2, 3, 1])?;
    let (weight, bias) = (row_major(*weight)?, row_major(*bias)?);
    let image = channels * height * width;
    // Whole pixels for each task.
    let task = (TASK / channels).max(1) * channels;
    let mut values = spare::take::<T>(x.len())?;
    // One image after another: the second look at it finds it in a cache.
    for (to, from) in values.chunks_mut(image).zip(x.chunks(image)) {
        let sums: Vec<Vec<f64>> = from
            .par_chunks(task)
            .map(|pixels| {
                let mut sums = vec![0.0; 2 * channels];
                T::read_blocks(pixels, channels, |pixels| sum_pixels(pixels, &mut sums));
                sums
            })
            .collect();
        let scale = scale_and_shift(op, &sums, height * width, &weight, &bias);
        let pieces = to.par_chunks_mut(task).zip(from.par_chunks(task));
        pieces.for_each(|(to, from)| {
            let (scale, shift) = scale.split_at(channels);
            T::map_blocks(from, to, channels, |from, to| {
                if op.silu {
                    affine_silu(from, to, scale, shift);
                } else {
                    affine(from, to, scale, shift);
                }
            });
        });
    }
    Ok(T::store(values))
}

/// Per channel: what x is multiplied with, then what is added. From sums and sums of squares per
/// channel of pieces of one image.
fn scale_and_shift(
    op: &GroupNorm,
    pieces: &[Vec<f64>],
    pixels: usize,
    weight: &[f32],
    bias: &[f32],
) -> Vec<f32> {
    let channels = weight.len();
    let mut sums = vec![0.0; 2 * channels];
    for piece in pieces {
        for (sum, piece) in sums.iter_mut().zip(piece) {
            *sum += piece;
        }
    }
    let (sum, squares) = sums.split_at(channels);
    let per_group = channels / op.groups;
    let count = (per_group * pixels) as f64;
    let mut result = vec![0.0; 2 * channels];
    let groups = sum.chunks_exact(per_group.max(1)).zip(squares.chunks_exact(per_group.max(1)));
    for (group, (sum, squares)) in groups.enumerate() {
        let mean = sum.iter().sum::<f64>() / count;
        let square = squares.iter().sum::<f64>() / count;
        let variance = (square - mean * mean).max(0.0);
        let deviation = (variance + op.eps).sqrt();
        for channel in group * per_group..(group + 1) * per_group {
            let scale = f64::from(weight[channel]) / deviation;
            result[channel] = scale as f32;
            result[channels + channel] = (f64::from(bias[channel]) - mean * scale) as f32;
        }
    }
    result
}

for_each_isa! {
    /// Adds each channel's sum over pixels, and its sum of squares.
    pub fn sum_pixels(pixels: &[f32], sums: &mut [f64]) {
        let (sum, squares) = sums.split_at_mut(sums.len() / 2);
        for pixel in pixels.chunks_exact(sum.len()) {
            for ((sum, square), &x) in sum.iter_mut().zip(squares.iter_mut()).zip(pixel) {
                let x = f64::from(x);
                *sum += x;
                *square += x * x;
            }
        }
    }
}

for_each_isa! {
    pub fn affine(from: &[f32], to: &mut [f32], scale: &[f32], shift: &[f32]) {
        let pixels = from.chunks_exact(scale.len()).zip(to.chunks_exact_mut(scale.len()));
        for (from, to) in pixels {
            for (((to, from), scale), shift) in to.iter_mut().zip(from).zip(scale).zip(shift) {
                *to = from * scale + shift;
            }
        }
    }
}

for_each_isa! {
    pub fn affine_silu(from: &[f32], to: &mut [f32], scale: &[f32], shift: &[f32]) {
        let pixels = from.chunks_exact(scale.len()).zip(to.chunks_exact_mut(scale.len()));
        for (from, to) in pixels {
            for (((to, from), scale), shift) in to.iter_mut().zip(from).zip(scale).zip(shift) {
                *to = silu::<FUSED>(from * scale + shift);
            }
        }
    }
}

/// See [`LayerNorm`]; row-major.
pub fn layer_norm(op: &LayerNorm, args: &[View<'_, Storage>], meta: &Meta) -> Result<CpuStorage> {
    with_number!(meta.dtype, T => layer_norm_of::<T>(op, args, meta))
}

fn layer_norm_of<T: Element>(
    op: &LayerNorm,
    args: &[View<'_, Storage>],
    meta: &Meta,
) -> Result<CpuStorage> {
    let ([x, weight, bias], Some(&width)) = (args, meta.layout.dims().last()) else {
        return Err(Error::other("layer_norm takes 3 operands with dimensions"));
    };
    let (x, weight, bias) = (Rows::<T>::read(*x)?, row_major(*weight)?, row_major(*bias)?);
    let mut values = spare::take::<T>(meta.layout.shape().elem_count())?;
    let rows = (TASK / width).max(1);
    values.par_chunks_mut(rows * width).enumerate().for_each(|(task, piece)| {
        let (mut wide, mut normal) = (vec![0.0; width], vec![0.0; width]);
        for (i, to) in piece.chunks_exact_mut(width).enumerate() {
            let from = T::read(x.row(task * rows + i), &mut wide);
            T::write(to, &mut normal, |to| normalise_row(from, to, &weight, &bias, op.eps));
        }
    });
    Ok(T::store(values))
}

for_each_isa! {
    pub fn normalise_row(from: &[f32], to: &mut [f32], weight: &[f32], bias: &[f32], eps: f64) {
        const LANES: usize = 16;
        let (mut sums, mut squares) = ([0f64; LANES], [0f64; LANES]);
        let (blocks, rest) = from.as_chunks::<LANES>();
        for block in blocks {
            for ((sum, square), &x) in sums.iter_mut().zip(&mut squares).zip(block) {
                let x = f64::from(x);
                *sum += x;
                *square += x * x;
            }
        }
        for ((sum, square), &x) in sums.iter_mut().zip(&mut squares).zip(rest) {
            let x = f64::from(x);
            *sum += x;
            *square += x * x;
        }
        let count = from.len() as f64;
        let mean = sums.iter().sum::<f64>() / count;
        let variance = (squares.iter().sum::<f64>() / count - mean * mean).max(0.0);
        let scale = 1.0 / (variance + eps).sqrt();
        let (mean, scale) = (mean as f32, scale as f32);
        for (((to, from), weight), bias) in to.iter_mut().zip(from).zip(weight).zip(bias) {
            *to = (from - mean) * scale * weight + bias;
        }
    }
}
