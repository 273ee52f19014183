//! Convolutions and linear layers as launches: the latter are those of a window of one pixel.
//! Separate from the other fused ops because the two share a kernel.

use candle_core::DType;
use candle_core::backend::BackendStorage;

use super::Storage;
use super::arguments::Arguments;
use super::driver::{Address, Launch};
use super::fused::{Dense, ints};
use super::launching::numbers;
use super::sources::CONV2D;
use crate::backend::View as Operand;
use crate::backend::fused::{Activation, Conv2d, Linear, Role};
use crate::backend::weighted::Weighted;
use crate::error::{Error, Result};

/// Rows and columns of a small tile of the result.
const SMALL_TILE: usize = 64;
/// Tiles of one image, counted once for each part of their sums, that it is brought up to at most:
/// so a small image keeps a large GPU busy.
const TILES_OF_AN_IMAGE: usize = 128;
/// Products of one number of the result that a part has at least.
const PRODUCTS_OF_A_PART: usize = 1024;
/// Parts of a sum at most.
const MOST_PARTS: usize = 8;

/// What convolutions and linear layers have in common: an image, a window, and what follows.
struct Window {
    batch: usize,
    size: [usize; 2],
    channels: usize,
    out: usize,
    kernel: [usize; 2],
    stride: usize,
    padding: usize,
    enlarged: [usize; 2],
    out_size: [usize; 2],
    activation: Activation,
    /// Of every sum.
    parts: usize,
}

impl Window {
    /// Into how many parts sums are split: by the size of one image, whatever the batch and the
    /// GPU, so that neither changes a bit.
    fn split(mut self) -> Self {
        let pixels = self.out_size[0] * self.out_size[1];
        let tiles = pixels.div_ceil(SMALL_TILE) * self.out.div_ceil(SMALL_TILE);
        let products = self.kernel[0] * self.kernel[1] * self.channels;
        let most = (products / PRODUCTS_OF_A_PART).clamp(1, MOST_PARTS);
        self.parts = (TILES_OF_AN_IMAGE / tiles.max(1)).clamp(1, most);
        self
    }

    fn launch(
        &self,
        x: Operand<'_, Storage>,
        [image, weight, bias, residual]: [Address; 4],
    ) -> Result<Storage> {
        let dtype = x.storage.dtype();
        let numbers = numbers(dtype).ok_or_else(|| Error::other("no float type"))?;
        let device = x.storage.device();
        let rows = self.batch * self.out_size[0] * self.out_size[1];
        let result = device.elements(dtype, rows * self.out)?;
        let floats = || device.elements(DType::F32, self.parts * rows * self.out);
        let partials = (self.parts > 1).then(floats).transpose()?;
        let partials_or_null = partials.as_ref().map_or(Address(0), Storage::address);
        let sizes = ints([
            self.batch,
            self.size[0],
            self.size[1],
            self.channels,
            self.out,
            self.kernel[0],
            self.kernel[1],
            self.stride,
            self.padding,
            self.enlarged[0],
            self.enlarged[1],
            self.out_size[0],
            self.out_size[1],
        ])?;
        let start = Arguments::default()
            .pointer(image)
            .pointer(weight)
            .pointer(bias)
            .pointer(residual)
            .pointer(result.address())
            .pointer(partials_or_null);
        let argument = sizes.into_iter().fold(start, Arguments::int);
        let [parts] = ints([self.parts])?;
        let argument = argument.int(self.activation.code()).int(parts).finish();
        let large = rows.div_ceil(128) * self.out.div_ceil(128);
        let is_large = self.out > 64 && large >= device.multiprocessors();
        let (kernel, tile, block) =
            if is_large { ("conv2d_large", 128, 256) } else { ("conv2d_small", SMALL_TILE, 128) };
        let run = |kernel, grid: [usize; 3], block| -> Result<()> {
            let grid = ints(grid)?.map(i32::cast_unsigned);
            let (source, argument) = (CONV2D, argument.clone());
            device.launch(Launch {
                source,
                numbers,
                kernel,
                grid,
                block,
                shared_bytes: 0,
                argument,
            })
        };
        if rows > 0 {
            run(kernel, [rows.div_ceil(tile), self.out.div_ceil(tile), self.parts], block)?;
        }
        if rows > 0 && self.parts > 1 {
            let most = 16 * device.multiprocessors();
            run("conv2d_join", [(rows * self.out).div_ceil(256).min(most), 1, 1], 256)?;
        }
        Ok(result)
    }
}

impl Conv2d {
    pub(super) fn launch(&self, operands: &Weighted<'_, Operand<'_, Storage>>) -> Result<Storage> {
        let (x, weight) = (*operands.x, *operands.weight);
        let &[batch, channels, height, width] = x.layout.dims() else {
            return Err(Error::other("an image has 4 dimensions"));
        };
        let &[out, _, kernel_h, kernel_w] = weight.layout.dims() else {
            return Err(Error::other("the weight has 4 dimensions"));
        };
        let image = Dense::channels_last(x)?;
        let role = Role::Conv2d { stride: self.stride };
        let prepared = match weight.storage.prepared_for(role, weight.layout)? {
            Some(address) => Dense { copy: None, address },
            None => Dense::channels_last(weight)?,
        };
        let bias = Dense::maybe(operands.bias.copied(), Dense::row_major)?;
        let residual = Dense::maybe(operands.residual.copied(), Dense::channels_last)?;
        let enlarged = self.upsample.map_or([0, 0], |size| [size.height, size.width]);
        let size = self.input_size(height, width);
        let moves = |size: usize, kernel: usize| {
            (size + 2 * self.padding).saturating_sub(kernel) / self.stride + 1
        };
        let window = Window {
            batch,
            size: [height, width],
            channels,
            out,
            kernel: [kernel_h, kernel_w],
            stride: self.stride,
            padding: self.padding,
            enlarged,
            out_size: [moves(size.height, kernel_h), moves(size.width, kernel_w)],
            activation: Activation::Identity,
            parts: 1,
        };
        let window = window.split();
        let addresses = [image.address, prepared.address, bias.address, residual.address];
        window.launch(x, addresses)
    }
}

impl Linear {
    pub(super) fn launch(&self, operands: &Weighted<'_, Operand<'_, Storage>>) -> Result<Storage> {
        let (x, weight) = (*operands.x, *operands.weight);
        let &[out, inner] = weight.layout.dims() else {
            return Err(Error::other("the weight has 2 dimensions"));
        };
        let rows = x.layout.shape().elem_count() / inner;
        let input = Dense::row_major(x)?;
        let bias = Dense::maybe(operands.bias.copied(), Dense::row_major)?;
        let residual = Dense::maybe(operands.residual.copied(), Dense::row_major)?;
        let weight = match weight.storage.prepared_for(Role::Linear, weight.layout)? {
            Some(address) => Dense { copy: None, address },
            None => Dense::row_major(weight)?,
        };
        let window = Window {
            batch: rows,
            size: [1, 1],
            channels: inner,
            out,
            kernel: [1, 1],
            stride: 1,
            padding: 0,
            enlarged: [0, 0],
            out_size: [1, 1],
            activation: self.activation,
            // Rows are not told from images here.
            parts: 1,
        };
        window.launch(x, [input.address, weight.address, bias.address, residual.address])
    }
}

impl Activation {
    fn code(self) -> i32 {
        match self {
            Activation::Identity => 0,
            Activation::Silu => 1,
            Activation::QuickGelu => 2,
            Activation::Gelu => 3,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_small_images_sums_are_split() {
        // Pixels of a side, channels, out, kernel.
        for (side, channels, out, kernel, parts) in [
            (64, 320, 320, 3, 1),
            (32, 640, 640, 3, 1),
            (16, 1280, 1280, 3, 1),
            (16, 1280, 640, 3, 3),
            (8, 1280, 1280, 3, 6),
            (8, 2560, 1280, 3, 6),
            (8, 1280, 1280, 1, 1),
            (4, 2560, 1280, 3, 6),
            (8, 4, 320, 3, 1),
            (512, 128, 3, 3, 1),
            (0, 128, 0, 3, 1),
        ] {
            let window = Window {
                batch: 2,
                size: [side; 2],
                channels,
                out,
                kernel: [kernel; 2],
                stride: 1,
                padding: kernel / 2,
                enlarged: [0, 0],
                out_size: [side; 2],
                activation: Activation::Identity,
                parts: 1,
            };
            assert_eq!(window.split().parts, parts, "{side}² of {channels} to {out} by {kernel}");
        }
    }
}
