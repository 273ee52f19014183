//! The blocks of the UNet: diffusers' `(CrossAttn)DownBlock2D`, `UNetMidBlock2DCrossAttn`,
//! `(CrossAttn)UpBlock2D`. Separate from [`unet`](super::unet) because each is a place in the
//! checkpoint with the same parts in another order.

use crate::backend::{Backend, Size2d};
use crate::error::{Error, Result};
use crate::model::attention::{KeyValue, Transformer2D, Widths};
use crate::model::resnet::{Downsample2D, Norm, ResnetBlock2D, Upsample2D};
use crate::nn::Names;
use crate::tensor::Tensor;

/// What a block is built of.
#[derive(Debug, Clone)]
pub struct BlockConfig {
    /// Channels of each resnet: (in, out).
    pub resnets: Vec<(usize, usize)>,
    /// Cross-attention after each resnet, if the block has any.
    pub attention: Option<AttentionConfig>,
    /// Whether it ends with a sampler (down or up).
    pub sampler: bool,
    /// Width of the timestep embedding.
    pub time: usize,
    /// `norm_num_groups`, `norm_eps`.
    pub norm: Norm,
}

/// The cross-attention of a block.
#[derive(Debug, Clone, Copy)]
pub struct AttentionConfig {
    /// Number of heads (the config's `attention_head_dim`).
    pub heads: usize,
    /// `cross_attention_dim`
    pub context: usize,
    /// `transformer_layers_per_block`
    pub depth: usize,
}

/// Resnets, and attentions where the block has them.
struct Layers<B> {
    resnets: Vec<ResnetBlock2D<B>>,
    attentions: Vec<Transformer2D<B>>,
}

impl<B: Backend> Layers<B> {
    /// The first `attentions` resnets are each followed by an attention.
    fn load(names: &Names<'_, '_, B>, config: &BlockConfig, attentions: usize) -> Result<Self> {
        let resnet = |(i, &(inner, out)): (usize, &(usize, usize))| {
            let names = names.at("resnets").at(i);
            ResnetBlock2D::load(&names, inner, out, Some(config.time), config.norm)
        };
        let attention = |(i, &(_, out)): (usize, &(usize, usize))| {
            config.attention.map(|AttentionConfig { heads, context, depth }| {
                let widths = Widths { query: out, context, heads };
                let names = names.at("attentions").at(i);
                Transformer2D::load(&names, widths, depth, config.norm.groups)
            })
        };
        let followed = config.resnets.iter().take(attentions).enumerate();
        Ok(Self {
            resnets: config.resnets.iter().enumerate().map(resnet).collect::<Result<_>>()?,
            attentions: followed.filter_map(attention).collect::<Result<_>>()?,
        })
    }

    fn text_key_values(&self, text: &Tensor<B>, into: &mut Vec<KeyValue<B>>) -> Result<()> {
        self.attentions.iter().try_for_each(|attention| attention.text_key_values(text, into))
    }

    /// Resnet `i` and the attention after it, if there is one.
    fn forward<'t>(
        &self,
        i: usize,
        x: &Tensor<B>,
        time: &Tensor<B>,
        text: &mut impl Iterator<Item = &'t KeyValue<B>>,
    ) -> Result<Tensor<B>>
    where
        B: 't,
    {
        let x = self.resnets[i].forward(x, Some(time))?;
        match self.attentions.get(i) {
            Some(attention) => attention.forward(&x, text),
            None => Ok(x),
        }
    }
}

/// `DownBlock2D` or `CrossAttnDownBlock2D`.
pub struct DownBlock<B> {
    layers: Layers<B>,
    downsampler: Option<Downsample2D<B>>,
}

impl<B: Backend> DownBlock<B> {
    pub fn load(names: &Names<'_, '_, B>, config: &BlockConfig) -> Result<Self> {
        let out = config.resnets.last().map_or(0, |&(_, out)| out);
        let sampler = || Downsample2D::load(&names.at("downsamplers.0"), out);
        Ok(Self {
            layers: Layers::load(names, config, config.resnets.len())?,
            downsampler: config.sampler.then(sampler).transpose()?,
        })
    }

    pub fn text_key_values(&self, text: &Tensor<B>, into: &mut Vec<KeyValue<B>>) -> Result<()> {
        self.layers.text_key_values(text, into)
    }

    /// Half the height and width if the block ends with a sampler; each result on the way is kept
    /// in `skips` for the way up.
    pub fn forward<'t>(
        &self,
        mut x: Tensor<B>,
        time: &Tensor<B>,
        text: &mut impl Iterator<Item = &'t KeyValue<B>>,
        skips: &mut Vec<Tensor<B>>,
    ) -> Result<Tensor<B>>
    where
        B: 't,
    {
        for i in 0..self.layers.resnets.len() {
            x = self.layers.forward(i, &x, time, text)?;
            skips.push(x.clone());
        }
        if let Some(downsampler) = &self.downsampler {
            x = downsampler.forward(&x)?; // (batch, out, ⌈height/2⌉, ⌈width/2⌉)
            skips.push(x.clone());
        }
        Ok(x)
    }
}

/// `UNetMidBlock2DCrossAttn`: resnet, attention, resnet.
pub struct MidBlock<B>(Layers<B>);

impl<B: Backend> MidBlock<B> {
    pub fn load(names: &Names<'_, '_, B>, config: &BlockConfig) -> Result<Self> {
        Ok(Self(Layers::load(names, config, config.resnets.len() - 1)?))
    }

    pub fn text_key_values(&self, text: &Tensor<B>, into: &mut Vec<KeyValue<B>>) -> Result<()> {
        self.0.text_key_values(text, into)
    }

    pub fn forward<'t>(
        &self,
        mut x: Tensor<B>,
        time: &Tensor<B>,
        text: &mut impl Iterator<Item = &'t KeyValue<B>>,
    ) -> Result<Tensor<B>>
    where
        B: 't,
    {
        for i in 0..self.0.resnets.len() {
            x = self.0.forward(i, &x, time, text)?;
        }
        Ok(x)
    }
}

/// `UpBlock2D` or `CrossAttnUpBlock2D`.
pub struct UpBlock<B> {
    layers: Layers<B>,
    upsampler: Option<Upsample2D<B>>,
}

impl<B: Backend> UpBlock<B> {
    pub fn load(names: &Names<'_, '_, B>, config: &BlockConfig) -> Result<Self> {
        let out = config.resnets.last().map_or(0, |&(_, out)| out);
        let sampler = || Upsample2D::load(&names.at("upsamplers.0"), out);
        Ok(Self {
            layers: Layers::load(names, config, config.resnets.len())?,
            upsampler: config.sampler.then(sampler).transpose()?,
        })
    }

    pub fn text_key_values(&self, text: &Tensor<B>, into: &mut Vec<KeyValue<B>>) -> Result<()> {
        self.layers.text_key_values(text, into)
    }

    /// Takes one of `skips` for each resnet; grows to the size of the next one, which is double
    /// the size unless that was odd.
    pub fn forward<'t>(
        &self,
        mut x: Tensor<B>,
        time: &Tensor<B>,
        text: &mut impl Iterator<Item = &'t KeyValue<B>>,
        skips: &mut Vec<Tensor<B>>,
    ) -> Result<Tensor<B>>
    where
        B: 't,
    {
        let none_left = || Error::other("the UNet's way up is longer than its way down");
        for i in 0..self.layers.resnets.len() {
            let skip = skips.pop().ok_or_else(none_left)?;
            // (batch, in + skip, height, width)
            x = self.layers.forward(i, &Tensor::cat(&[&x, &skip], 1)?, time, text)?;
        }
        if let Some(upsampler) = &self.upsampler {
            let [_, _, height, width] = skips.last().ok_or_else(none_left)?.dims_exact()?;
            x = upsampler.forward(&x, Size2d { height, width })?; // (batch, out, height, width)
        }
        Ok(x)
    }
}
