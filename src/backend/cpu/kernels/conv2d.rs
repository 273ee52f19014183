//! Convolution as a matrix product over the pixels of the result: a row of the left operand is
//! the window that a pixel sees, gathered piece by piece and never stored as a whole. Enlarging
//! the image first only changes which pixels the window reads.

use candle_core::CpuStorage;
use half::bf16;

use super::super::Storage;
use super::element::{As, Element, with_number};
use super::matrix::{Onto, Panels, product};
use super::memory::{in_order, row_major};
use super::micro::Unit;
use super::pair::Pair;
use super::spare;
use super::weight::{Form, held};
use super::winograd;
use crate::backend::weighted::Weighted;
use crate::backend::{Conv2d, Meta, Role, View};
use crate::error::{Error, Result};

/// See [`Conv2d`]; `(batch, height, width, out)` in memory.
pub fn conv2d(op: &Conv2d, args: &[View<'_, Storage>], meta: &Meta) -> Result<CpuStorage> {
    let operands = Weighted::of(args, op.residual)?;
    let held = held(*operands.weight, Role::Conv2d { stride: op.stride })?;
    match held.form() {
        Form::Panels(panels) => {
            with_number!(meta.dtype, T => direct::<T, f32>(op, &operands, panels, meta))
        }
        Form::Pairs(panels) => direct::<bf16, Pair>(op, &operands, panels, meta),
        Form::Transformed(kernel) => winograd::conv2d(op, &operands, kernel, meta),
    }
}

fn direct<T, U>(
    op: &Conv2d,
    operands: &Weighted<'_, View<'_, Storage>>,
    panels: &Panels<U>,
    meta: &Meta,
) -> Result<CpuStorage>
where
    T: Element + As<U::Number>,
    U: Unit,
{
    let &Weighted { x, weight, bias, residual } = operands;
    let (&[_, channels, height, width], &[_, _, kernel_h, kernel_w], &[batch, out, out_h, out_w]) =
        (x.layout.dims(), weight.layout.dims(), meta.layout.dims())
    else {
        return Err(Error::other("conv2d of operands without 4 dimensions"));
    };
    let size = op.input_size(height, width);
    let x = in_order::<T>(*x, &[0, 2, 3, 1])?;
    let bias = bias.map(|bias| row_major(*bias)).transpose()?;
    let residual = residual.map(|view| in_order::<T>(*view, &[0, 2, 3, 1])).transpose()?;
    let onto = Onto { bias: bias.as_deref(), residual: residual.as_deref() };
    let rows = seen(op, out_h, kernel_h, size.height, height)?;
    let columns = seen(op, out_w, kernel_w, size.width, width)?;
    let fill = |pixel: usize, k0: usize, mut piece: &mut [U::Number]| {
        let (image, within) = (pixel / (out_h * out_w), pixel % (out_h * out_w));
        let rows = &rows[within / out_w * kernel_h..][..kernel_h];
        let columns = &columns[within % out_w * kernel_w..][..kernel_w];
        let (mut tap, mut channel) = (k0 / channels, k0 % channels);
        while !piece.is_empty() {
            let (row, column) = (rows[tap / kernel_w], columns[tap % kernel_w]);
            // Neighbouring pixels lie side by side in memory.
            let run = column.together * channels - channel;
            let (now, rest) = piece.split_at_mut(run.min(piece.len()));
            match (row.pixel, column.pixel) {
                (Some(row), Some(column)) => {
                    let pixel = (image * height + row) * width + column;
                    T::copy(&x[pixel * channels + channel..][..now.len()], now);
                }
                _ => now.fill(U::Number::default()),
            }
            (tap, channel, piece) = (tap + column.together, 0, rest);
        }
    };
    let mut values = spare::take::<T>(batch * out_h * out_w * out)?;
    product(batch * out_h * out_w, panels, &onto, &mut values, fill, |_| ());
    Ok(T::store(values))
}

/// What a tap of the window sees along one side.
#[derive(Clone, Copy)]
struct Seen {
    /// The source pixel, or `None` in the padding.
    pixel: Option<usize>,
    /// How many taps from this one on see pixels that follow each other, or padding.
    together: usize,
}

/// Along one side: what each tap of the window of each result sees.
fn seen(
    op: &Conv2d,
    results: usize,
    kernel: usize,
    size: usize,
    source: usize,
) -> Result<Vec<Seen>> {
    let mut taps: Vec<Seen> = Vec::new();
    let count = results.checked_mul(kernel).filter(|&count| count <= 1 << 24);
    taps.try_reserve_exact(count.unwrap_or(usize::MAX))
        .map_err(|_| Error::other(format!("a kernel of {kernel} over {results} pixels")))?;
    for target in 0..results {
        taps.extend((0..kernel).map(|tap| {
            let pixel = (target * op.stride + tap).checked_sub(op.padding);
            // ⌊pixel · source / size⌋, which is the pixel itself where nothing is enlarged.
            let nearest = |pixel| (pixel as u128 * source as u128 / size as u128) as usize;
            Seen { pixel: pixel.filter(|&pixel| pixel < size).map(nearest), together: 1 }
        }));
    }
    for window in taps.chunks_mut(kernel) {
        for tap in (1..window.len()).rev() {
            let [before, after] = [window[tap - 1], window[tap]];
            if before.pixel.map(|pixel| pixel + 1) == after.pixel {
                window[tap - 1].together = after.together + 1;
            }
        }
    }
    Ok(taps)
}
