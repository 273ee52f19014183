//! Convolutions and linear layers as launches: the latter are those of a window of one pixel.
//! Separate from the other fused ops because the two share a kernel.

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
}

impl Window {
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
            .pointer(Address(0));
        let argument = sizes.into_iter().fold(start, Arguments::int);
        let argument = argument.int(self.activation.code()).int(1).finish();
        let large = rows.div_ceil(128) * self.out.div_ceil(128);
        let is_large = self.out > 64 && large >= device.multiprocessors();
        let (kernel, tile, block) =
            if is_large { ("conv2d_large", 128, 256) } else { ("conv2d_small", 64, 128) };
        let [across, down] = ints([rows.div_ceil(tile), self.out.div_ceil(tile)])?;
        if rows > 0 {
            device.launch(Launch {
                source: CONV2D,
                numbers,
                kernel,
                grid: [across.cast_unsigned(), down.cast_unsigned(), 1],
                block,
                shared_bytes: 0,
                argument,
            })?;
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
        };
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
