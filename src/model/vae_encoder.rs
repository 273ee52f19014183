//! diffusers' `AutoencoderKL`, the encoding half: an image to the distribution of its latents.
//! Separate from the decoder because most pictures begin with noise alone, and then none of this
//! is loaded.

use candle_core::DType;
use candle_core::op::{Exp, Maximum, Minimum};

use crate::backend::{Backend, Conv2d as Conv2dOp};
use crate::error::Result;
use crate::model::Decoder;
use crate::model::resnet::ResnetBlock2D;
use crate::model::vae::{MidBlock, VaeConfig};
use crate::nn::{Conv2d, GroupNorm, Loader, Names};
use crate::tensor::Tensor;

/// The encoder.
pub struct Encoder<B> {
    dtype: DType,
    latent_channels: usize,
    /// What latents are multiplied by for the diffusion.
    pub scaling_factor: f64,
    conv_in: Conv2d<B>,
    down_blocks: Vec<DownEncoderBlock<B>>,
    mid_block: MidBlock<B>,
    conv_norm_out: GroupNorm<B>,
    conv_out: Conv2d<B>,
    quant_conv: Option<Conv2d<B>>,
    /// The ends of what a logarithm of a variance may be.
    log_variances: [Tensor<B>; 2],
}

/// diffusers' `DiagonalGaussianDistribution`: where an image's latents may be.
pub struct Posterior<B> {
    /// (batch, latent_channels, height, width), f32.
    pub mean: Tensor<B>,
    /// The standard deviation, of the same shape.
    pub deviation: Tensor<B>,
}

impl<B: Backend> Encoder<B> {
    /// Both halves of `config` with the loader's weights.
    ///
    /// # Errors
    /// Names every tensor that does not fit.
    pub fn load_with_decoder(
        config: VaeConfig,
        loader: Loader<'_, B>,
    ) -> Result<(Decoder<B>, Self)> {
        let root = loader.root();
        let encoder = Self::load_from(&config, &root)?;
        let decoder = Decoder::load_from(config, &root)?;
        loader.finish(&[])?;
        Ok((decoder, encoder))
    }

    fn load_from(config: &VaeConfig, root: &Names<'_, '_, B>) -> Result<Self> {
        let names = root.at("encoder");
        let sizes = &config.block_out_channels;
        let (narrowest, widest) = (sizes[0], sizes[sizes.len() - 1]);
        let (pixelwise, same) = (Conv2dOp::same(1), Conv2dOp::same(3));
        // Means, and logarithms of variances.
        let moments = 2 * config.latent_channels;
        let quant = || Conv2d::load(&root.at("quant_conv"), moments, moments, 1, pixelwise);
        let mut inner = narrowest;
        let mut down_blocks = Vec::new();
        for (i, &out) in sizes.iter().enumerate() {
            let names = names.at("down_blocks").at(i);
            let is_last = i + 1 == sizes.len();
            down_blocks.push(DownEncoderBlock::load(&names, config, inner, out, is_last)?);
            inner = out;
        }
        let norm_out = config.norm().then_silu();
        Ok(Self {
            dtype: names.dtype(),
            latent_channels: config.latent_channels,
            scaling_factor: config.scaling_factor,
            conv_in: Conv2d::load(&names.at("conv_in"), 3, narrowest, 3, same)?,
            down_blocks,
            mid_block: MidBlock::load(&names.at("mid_block"), config, widest)?,
            conv_norm_out: GroupNorm::load(&names.at("conv_norm_out"), widest, norm_out)?,
            conv_out: Conv2d::load(&names.at("conv_out"), widest, moments, 3, same)?,
            quant_conv: config.use_quant_conv.then(quant).transpose()?,
            log_variances: [names.constant(&[-30.0])?, names.constant(&[20.0])?],
        })
    }

    /// An image (batch, 3, height, width) in −1..1 to means and logarithms of variances (batch,
    /// 2·latent_channels, height/f, width/f), where f is the scale factor.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward(&self, image: &Tensor<B>) -> Result<Tensor<B>> {
        let mut x = self.conv_in.forward(&image.to_dtype(self.dtype)?)?;
        for block in &self.down_blocks {
            x = block.forward(x)?; // (batch, out, height/2, width/2) but for the last
        }
        x = self.conv_norm_out.forward(&self.mid_block.forward(&x)?)?;
        x = self.conv_out.forward(&x)?;
        match &self.quant_conv {
            Some(quant_conv) => quant_conv.forward(&x),
            None => Ok(x),
        }
    }

    /// The distribution of an image's latents, before they are scaled.
    ///
    /// # Errors
    /// If the device fails.
    pub fn posterior(&self, image: &Tensor<B>) -> Result<Posterior<B>> {
        let moments = self.forward(image)?.to_dtype(DType::F32)?;
        let channels = self.latent_channels;
        let [least, most] = &self.log_variances;
        let log_variance = moments.narrow(1, channels, channels)?;
        let log_variance = log_variance.binary::<Maximum>(least)?.binary::<Minimum>(most)?;
        let deviation = log_variance.affine(0.5, 0.0)?.unary::<Exp>()?;
        Ok(Posterior { mean: moments.narrow(1, 0, channels)?, deviation })
    }
}

/// `DownEncoderBlock2D`: resnets, then half the size.
struct DownEncoderBlock<B> {
    resnets: Vec<ResnetBlock2D<B>>,
    downsampler: Option<Conv2d<B>>,
}

impl<B: Backend> DownEncoderBlock<B> {
    fn load(
        names: &Names<'_, '_, B>,
        config: &VaeConfig,
        inner: usize,
        out: usize,
        is_last: bool,
    ) -> Result<Self> {
        let resnet = |i: usize| {
            let inner = if i == 0 { inner } else { out };
            ResnetBlock2D::load(&names.at("resnets").at(i), inner, out, None, config.norm())
        };
        let halving = Conv2dOp { stride: 2, padding: 0, ..Conv2dOp::same(3) };
        let downsampler = || Conv2d::load(&names.at("downsamplers.0.conv"), out, out, 3, halving);
        Ok(Self {
            resnets: (0..config.layers_per_block).map(resnet).collect::<Result<_>>()?,
            downsampler: (!is_last).then(downsampler).transpose()?,
        })
    }

    fn forward(&self, mut x: Tensor<B>) -> Result<Tensor<B>> {
        for resnet in &self.resnets {
            x = resnet.forward(&x, None)?;
        }
        match &self.downsampler {
            Some(downsampler) => downsampler.forward(&padded(&x)?),
            None => Ok(x),
        }
    }
}

/// The image with a row of zeros below and a column of them to the right: here, and nowhere else
/// in these models, a convolution is padded on two sides only.
fn padded<B: Backend>(x: &Tensor<B>) -> Result<Tensor<B>> {
    let [batch, channels, height, width] = x.dims_exact()?;
    let zeros =
        |height, width| Tensor::zeros((batch, channels, height, width), x.dtype(), x.device());
    let taller = Tensor::cat(&[x, &zeros(1, width)?], 2)?;
    Tensor::cat(&[&taller, &zeros(height + 1, 1)?], 3)
}
