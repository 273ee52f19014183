//! diffusers' `ResnetBlock2D`, `Upsample2D` and `Downsample2D`. Separate because UNet and VAE are
//! both built of them.

use crate::backend::{Backend, Conv2d as Conv2dOp, GroupNorm as GroupNormOp, Size2d};
use crate::error::Result;
use crate::nn::{Bias, Conv2d, GroupNorm, Linear, Names};
use crate::tensor::Tensor;

/// How a model normalises: groups and epsilon of its `GroupNorm`s.
#[derive(Debug, Clone, Copy)]
pub struct Norm {
    /// `norm_num_groups`
    pub groups: usize,
    /// `norm_eps`
    pub eps: f64,
}

impl Norm {
    /// The op that diffusers runs before a convolution: normalisation and SiLU.
    pub fn then_silu(self) -> GroupNormOp {
        GroupNormOp { groups: self.groups, eps: self.eps, silu: true }
    }

    /// The op without SiLU.
    pub fn alone(self) -> GroupNormOp {
        GroupNormOp { groups: self.groups, eps: self.eps, silu: false }
    }
}

/// What stands for a GroupNorm: it, or something with statistics of more than it is given.
pub type Normalize<'n, B> = dyn FnMut(&GroupNorm<B>, &Tensor<B>) -> Result<Tensor<B>> + 'n;

/// Two convolutions, the timestep in between, and a shortcut around them.
pub struct ResnetBlock2D<B> {
    norm1: GroupNorm<B>,
    conv1: Conv2d<B>,
    time_emb_proj: Option<Linear<B>>,
    norm2: GroupNorm<B>,
    conv2: Conv2d<B>,
    conv_shortcut: Option<Conv2d<B>>,
}

impl<B: Backend> ResnetBlock2D<B> {
    /// From `inner` to `out` channels; `time` is the width of the timestep embedding, if any.
    ///
    /// # Errors
    /// If the device fails.
    pub fn load(
        names: &Names<'_, '_, B>,
        inner: usize,
        out: usize,
        time: Option<usize>,
        norm: Norm,
    ) -> Result<Self> {
        let same = Conv2dOp::same;
        let projection = |time| Linear::load(&names.at("time_emb_proj"), time, out, Bias::Yes);
        let shortcut = || Conv2d::load(&names.at("conv_shortcut"), inner, out, 1, same(1));
        Ok(Self {
            norm1: GroupNorm::load(&names.at("norm1"), inner, norm.then_silu())?,
            conv1: Conv2d::load(&names.at("conv1"), inner, out, 3, same(3))?,
            time_emb_proj: time.map(projection).transpose()?,
            norm2: GroupNorm::load(&names.at("norm2"), out, norm.then_silu())?,
            conv2: Conv2d::load(&names.at("conv2"), out, out, 3, same(3))?,
            conv_shortcut: (inner != out).then(shortcut).transpose()?,
        })
    }

    /// (batch, in, height, width) → (batch, out, height, width); `time` is SiLU of the timestep
    /// embedding, (1, width), computed once for all blocks.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward(&self, x: &Tensor<B>, time: Option<&Tensor<B>>) -> Result<Tensor<B>> {
        self.forward_normed(x, time, &mut |norm, x| norm.forward(x))
    }

    /// As [`forward`](Self::forward), with what stands for each of its GroupNorms, in their order.
    ///
    /// # Errors
    /// As `normalize`, or if the device fails.
    pub fn forward_normed(
        &self,
        x: &Tensor<B>,
        time: Option<&Tensor<B>>,
        normalize: &mut Normalize<'_, B>,
    ) -> Result<Tensor<B>> {
        // In one variable: an activation of before is not kept, and its memory is for the next.
        let mut hidden = normalize(&self.norm1, x)?;
        hidden = match (&self.time_emb_proj, time) {
            // The same for all pixels, as the bias is.
            (Some(projection), Some(time)) => {
                let shift = projection.forward(time)?; // (1, out)
                self.conv1.forward_shifted(&hidden, &shift.reshape(shift.elem_count())?)?
            }
            (Some(_) | None, _) => self.conv1.forward(&hidden)?,
        }; // (batch, out, height, width)
        hidden = normalize(&self.norm2, &hidden)?;
        match &self.conv_shortcut {
            Some(shortcut) => self.conv2.forward_onto(&hidden, &shortcut.forward(x)?),
            None => self.conv2.forward_onto(&hidden, x),
        }
    }
}

/// Half the size, by a convolution with stride 2.
pub struct Downsample2D<B>(Conv2d<B>);

impl<B: Backend> Downsample2D<B> {
    /// `names` is the place of the sampler: `downsamplers.0`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn load(names: &Names<'_, '_, B>, channels: usize) -> Result<Self> {
        let op = Conv2dOp { stride: 2, ..Conv2dOp::same(3) };
        Ok(Self(Conv2d::load(&names.at("conv"), channels, channels, 3, op)?))
    }

    /// (batch, channels, height, width) → (batch, channels, ⌈height/2⌉, ⌈width/2⌉)
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward(&self, x: &Tensor<B>) -> Result<Tensor<B>> {
        self.0.forward(x)
    }
}

/// A larger size, by repeating pixels, then a convolution.
pub struct Upsample2D<B>(Conv2d<B>);

impl<B: Backend> Upsample2D<B> {
    /// `names` is the place of the sampler: `upsamplers.0`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn load(names: &Names<'_, '_, B>, channels: usize) -> Result<Self> {
        Ok(Self(Conv2d::load(&names.at("conv"), channels, channels, 3, Conv2dOp::same(3))?))
    }

    /// (batch, channels, height, width) → (batch, channels, size)
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward(&self, x: &Tensor<B>, size: Size2d) -> Result<Tensor<B>> {
        self.0.forward_upsampled(x, size)
    }
}
