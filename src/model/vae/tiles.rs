//! Decoding in windows: a fraction of the memory, and no seams. Separate because it walks the
//! decoder's layers in another order.
//!
//! diffusers decodes overlapping tiles of latents and blends them; each tile then has GroupNorm
//! statistics of its own, so colours drift from tile to tile: 23 to 34 dB against the untiled image
//! of a random decoder, where this has 50 to 60. Here the small images are whole, only the last two
//! sizes are cut, with as much around each window as its convolutions reach, so that nothing has to
//! be blended; and all windows share the statistics of the whole image. Those come in three steps,
//! as a multigrid method has it: of a coarse image; measured over all windows with these; and of
//! the coarse image again, changed as the measured ones differed.

use candle_core::DType;
use candle_core::op::{Mul, Recip, Relu, Silu, Sqr, Sqrt};

use super::Decoder;
use crate::backend::{Backend, GroupNorm as GroupNormOp, Size2d};
use crate::error::Result;
use crate::model::resnet::Normalize;
use crate::model::tiles::Windows;
use crate::nn::GroupNorm;
use crate::tensor::Tensor;

/// Sizes that are cut into windows: those with the most pixels.
const CUT_SIZES: usize = 2;
/// Side of a window in pixels of the image that is cut; the result's is four times that.
const TILE: usize = 64;
/// Largest side of the coarse image that first statistics come from.
const COARSE: usize = 96;
/// Smallest side of it that is made by leaving pixels out.
const LEAST_COARSE: usize = 16;

impl<B: Backend> Decoder<B> {
    /// As [`forward`](Self::forward) in windows: the same image but for the rounding of statistics.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward_tiled(&self, latents: &Tensor<B>) -> Result<Tensor<B>> {
        let [batch, _, height, width] = latents.dims_exact()?;
        let (cut, windows) = self.windows(Size2d { height, width });
        if windows.is_one() {
            return self.forward(latents);
        }
        let images = (0..batch).map(|index| {
            let whole = self.head(&latents.narrow(0, index, 1)?, cut)?;
            self.tail_in_windows(&whole, cut, &windows)
        });
        let images = images.collect::<Result<Vec<_>>>()?;
        match images.as_slice() {
            [one] => Ok(one.clone()),
            several => Tensor::cat(&several.iter().collect::<Vec<_>>(), 0),
        }
    }

    /// Whether latents of this size are more than one window.
    pub fn cuts(&self, latents: Size2d) -> bool {
        !self.windows(latents).1.is_one()
    }

    /// The first block that is cut, and how.
    fn windows(&self, Size2d { height, width }: Size2d) -> (usize, Windows) {
        let cut = self.up_blocks.len().saturating_sub(CUT_SIZES);
        let factor = 1 << cut.saturating_sub(1);
        (cut, Windows::cover(height * factor, width * factor, TILE, self.halo(cut)))
    }

    /// Everything before the images that are cut.
    fn head(&self, latents: &Tensor<B>, cut: usize) -> Result<Tensor<B>> {
        let mut x = self.begin(latents)?;
        for (index, block) in self.up_blocks.iter().enumerate().take(cut) {
            x = block.resnets(x, &mut |norm, x| norm.forward(x))?;
            // The enlargement before the first cut size is part of the windows.
            if index + 1 < cut {
                x = block.enlarge(x)?;
            }
        }
        Ok(x)
    }

    /// The rest, on a window or the whole, with what stands for each GroupNorm.
    fn tail(
        &self,
        mut x: Tensor<B>,
        cut: usize,
        normalize: &mut Normalize<'_, B>,
    ) -> Result<Tensor<B>> {
        if let Some(before) = cut.checked_sub(1).and_then(|index| self.up_blocks.get(index)) {
            x = before.enlarge(x)?;
        }
        for block in self.up_blocks.iter().skip(cut) {
            x = block.resnets(x, normalize)?;
            x = block.enlarge(x)?;
        }
        let x = normalize(&self.conv_norm_out, &x)?;
        self.conv_out.forward(&x)
    }

    /// How many pixels around a window the convolutions of the tail reach: one each.
    fn halo(&self, cut: usize) -> usize {
        let mut reach: usize = 1;
        for block in self.up_blocks.iter().skip(cut).rev() {
            // Behind a block is its enlargement, whose convolution is of the larger image.
            if block.upsampler.is_some() {
                reach = (reach + 1).div_ceil(2);
            }
            reach += 2 * block.resnets.len();
        }
        if cut > 0 { (reach + 1).div_ceil(2) } else { reach }
    }

    fn tail_in_windows(
        &self,
        whole: &Tensor<B>,
        cut: usize,
        windows: &Windows,
    ) -> Result<Tensor<B>> {
        let coarse = coarse(whole)?;
        let mut norms = Vec::new();
        self.tail(coarse.clone(), cut, &mut |norm, x| {
            norms.push(SharedNorm::new(norm, x)?);
            norm.forward(x)
        })?;
        for window in windows.iter() {
            let mut shared = norms.iter_mut();
            self.tail(window.seen(whole)?, cut, &mut |norm, x| match shared.next() {
                Some(shared) => {
                    shared.measure(&window.wanted(x)?)?;
                    shared.forward(x)
                }
                None => norm.forward(x),
            })?;
        }
        // What a norm sees depends on those before it, which had other statistics then. The coarse
        // image says what comes of that.
        let mut shared = norms.iter_mut();
        self.tail(coarse, cut, &mut |norm, x| match shared.next() {
            Some(shared) => {
                shared.correct(x)?;
                shared.forward(x)
            }
            None => norm.forward(x),
        })?;
        windows.assemble(whole, &mut |seen| {
            let mut shared = norms.iter();
            self.tail(seen.clone(), cut, &mut |norm, x| match shared.next() {
                Some(shared) => shared.forward(x),
                None => norm.forward(x),
            })
        })
    }
}

/// Every so manieth pixel of an image.
fn coarse<B: Backend>(whole: &Tensor<B>) -> Result<Tensor<B>> {
    let [_, _, height, width] = whole.dims_exact()?;
    let step = height.max(width).div_ceil(COARSE);
    // A strip stays one: with fewer pixels than a convolution reaches it would be another image.
    let step = |len: usize| step.min((len / LEAST_COARSE).max(1));
    every(&every(whole, 2, step(height))?, 3, step(width))
}

/// Every `step`th entry along a dimension, from the first on.
fn every<B: Backend>(x: &Tensor<B>, dim: usize, step: usize) -> Result<Tensor<B>> {
    let len = x.dims().get(dim).copied().unwrap_or(0) / step * step;
    let mut split = x.dims().to_vec();
    split.splice(dim..=dim, [len / step, step]);
    let mut taken = x.dims().to_vec();
    taken[dim] = len / step;
    x.narrow(dim, 0, len)?.reshape(split)?.narrow(dim + 1, 0, 1)?.reshape(taken)
}

/// Sums over the pixels of an image (1, channels, height, width).
struct Sums<B> {
    /// (1, channels), f32
    values: Tensor<B>,
    /// The same of their squares.
    squares: Tensor<B>,
    pixels: usize,
}

impl<B: Backend> Sums<B> {
    fn of(x: &Tensor<B>) -> Result<Self> {
        let [_, channels, height, width] = x.dims_exact()?;
        let pixels = height * width;
        let rows = x.to_dtype(DType::F32)?.permute(&[0, 2, 3, 1])?;
        let rows = rows.reshape((pixels, channels))?;
        let ones = Tensor::zeros((1, pixels), DType::F32, x.device())?.affine(1.0, 1.0)?;
        let (values, squares) = (ones.matmul(&rows)?, ones.matmul(&rows.unary::<Sqr>()?)?);
        Ok(Self { values, squares, pixels })
    }

    fn plus(&self, more: &Self) -> Result<Self> {
        Ok(Self {
            values: self.values.add(&more.values)?,
            squares: self.squares.add(&more.squares)?,
            pixels: self.pixels + more.pixels,
        })
    }
}

/// Mean and variance of each group, (groups, 1) in f32.
struct Statistics<B> {
    mean: Tensor<B>,
    variance: Tensor<B>,
}

impl<B: Backend> Statistics<B> {
    /// `least` is added to the variance.
    fn of(sums: &Sums<B>, groups: usize, least: f64) -> Result<Self> {
        let each = sums.values.elem_count() / groups;
        let count = (sums.pixels * each) as f64;
        let of_group = |x: &Tensor<B>| -> Result<_> {
            x.reshape((groups, each))?.sum_keepdim(&[1])?.affine(1.0 / count, 0.0)
        };
        let mean = of_group(&sums.values)?;
        let variance = of_group(&sums.squares)?.add(&mean.unary::<Sqr>()?.affine(-1.0, 0.0)?)?;
        // Rounding must not make it less than nothing.
        Ok(Self { mean, variance: variance.unary::<Relu>()?.affine(1.0, least)? })
    }
}

/// GroupNorm with statistics of more than it is given: for each channel a factor and what is added.
struct SharedNorm<B> {
    weight: Tensor<B>,
    bias: Tensor<B>,
    op: GroupNormOp,
    used: Statistics<B>,
    /// (1, channels, 1, 1)
    scale: Tensor<B>,
    shift: Tensor<B>,
    /// What was measured with them.
    sums: Option<Sums<B>>,
}

impl<B: Backend> SharedNorm<B> {
    /// With the statistics of `x`.
    fn new(norm: &GroupNorm<B>, x: &Tensor<B>) -> Result<Self> {
        let (weight, bias, op) = norm.parts();
        let row = |x: &Tensor<B>| x.to_dtype(DType::F32)?.reshape((1, x.elem_count(), 1, 1));
        let (weight, bias) = (row(weight)?, row(bias)?);
        let (scale, shift) = (weight.clone(), bias.clone());
        let used = Statistics::of(&Sums::of(x)?, op.groups, op.eps)?;
        let mut shared = Self { weight, bias, op, used, scale, shift, sums: None };
        shared.take_up()?;
        Ok(shared)
    }

    /// Adds what it sees of a window.
    fn measure(&mut self, x: &Tensor<B>) -> Result<()> {
        let more = Sums::of(x)?;
        self.sums = Some(match &self.sums {
            Some(sums) => sums.plus(&more)?,
            None => more,
        });
        Ok(())
    }

    /// Takes the statistics of the coarse image, changed as those measured differed from the ones
    /// that were used.
    fn correct(&mut self, coarse: &Tensor<B>) -> Result<()> {
        let (groups, eps) = (self.op.groups, self.op.eps);
        let now = Statistics::of(&Sums::of(coarse)?, groups, eps)?;
        let Some(sums) = self.sums.take() else { return Ok(()) };
        let measured = Statistics::of(&sums, groups, eps)?;
        // Both in units of what they were.
        let growth = now.variance.binary::<Mul>(&self.used.variance.unary::<Recip>()?)?;
        let difference = measured.mean.add(&self.used.mean.affine(-1.0, 0.0)?)?;
        let mean = now.mean.add(&difference.binary::<Mul>(&growth.unary::<Sqrt>()?)?)?;
        self.used = Statistics { mean, variance: measured.variance.binary::<Mul>(&growth)? };
        self.take_up()
    }

    fn take_up(&mut self) -> Result<()> {
        let groups = self.op.groups;
        let each = self.weight.elem_count() / groups;
        let of_channel = |x: &Tensor<B>| {
            x.broadcast_as((groups, each))?.contiguous()?.reshape((1, groups * each, 1, 1))
        };
        let inverse = of_channel(&self.used.variance.unary::<Sqrt>()?.unary::<Recip>()?)?;
        self.scale = self.weight.binary::<Mul>(&inverse)?;
        let moved = of_channel(&self.used.mean)?.binary::<Mul>(&self.scale)?;
        self.shift = self.bias.add(&moved.affine(-1.0, 0.0)?)?;
        Ok(())
    }

    fn forward(&self, x: &Tensor<B>) -> Result<Tensor<B>> {
        let y = x.to_dtype(DType::F32)?.binary::<Mul>(&self.scale)?.add(&self.shift)?;
        let y = if self.op.silu { y.unary::<Silu>()? } else { y };
        y.to_dtype(x.dtype())
    }
}
