//! diffusers' `AutoencoderKL`, the decoding half: latents to an image. Separate because it is a
//! checkpoint of its own.

use candle_core::DType;
use serde_json::{Value, json};

use crate::backend::{Backend, Conv2d as Conv2dOp, Size2d};
use crate::error::Result;
use crate::model::attention::{Attention, Widths};
use crate::model::config::Fields;
use crate::model::resnet::{Norm, Normalize, ResnetBlock2D, Upsample2D};
use crate::nn::{Bias, Conv2d, GroupNorm, Loader, Names};
use crate::tensor::Tensor;

mod tiles;

/// `vae/config.json`, checked.
#[derive(Debug, Clone)]
pub struct VaeConfig {
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Latents are divided by this before decoding.
    pub scaling_factor: f64,
    pub(super) block_out_channels: Vec<usize>,
    pub(super) layers_per_block: usize,
    groups: usize,
    pub(super) use_quant_conv: bool,
    use_post_quant_conv: bool,
    mid_block_add_attention: bool,
}

/// The decoder.
pub struct Decoder<B> {
    /// What it was built from.
    pub config: VaeConfig,
    dtype: DType,
    post_quant_conv: Option<Conv2d<B>>,
    conv_in: Conv2d<B>,
    mid_block: MidBlock<B>,
    up_blocks: Vec<UpDecoderBlock<B>>,
    conv_norm_out: GroupNorm<B>,
    conv_out: Conv2d<B>,
}

const EPS: f64 = 1e-6;

/// Of the names in the checkpoint, those that only encoding needs.
const ENCODER: &[&str] = &["encoder.", "quant_conv."];

impl VaeConfig {
    /// Reads the config, of which every field must be one that this code covers.
    ///
    /// # Errors
    /// Names the first field that it does not.
    pub fn parse(value: &Value) -> Result<Self> {
        let fields = Fields::new("vae/config.json", value)?;
        let block_out_channels = fields.count_list("block_out_channels")?;
        for (name, kind) in
            [("up_block_types", "UpDecoderBlock2D"), ("down_block_types", "DownEncoderBlock2D")]
        {
            let types = fields.names(name)?;
            if let Some(other) = types.iter().find(|found| **found != kind) {
                return Err(fields.unsupported(name, &json!(other)));
            }
            if types.len() != block_out_channels.len() {
                let (have, want) = (types.len(), block_out_channels.len());
                return Err(fields.error(name, &format!("{have} blocks for {want} sizes")));
            }
        }
        fields.only("act_fn", json!("silu"))?;
        fields.only("out_channels", json!(3))?;
        // Of training, of dtypes in which we accumulate in f32 anyway, or said by the tensors.
        fields.ignore(&["in_channels", "sample_size", "force_upcast"]);
        let groups = fields.count("norm_num_groups", Some(32))?;
        if let Some(channels) = block_out_channels.iter().find(|&&count| count % groups != 0) {
            let message = format!("{channels} channels do not make {groups} groups");
            return Err(fields.error("norm_num_groups", &message));
        }
        let config = Self {
            latent_channels: fields.count("latent_channels", Some(4))?,
            scaling_factor: fields.number("scaling_factor", 0.18215)?,
            layers_per_block: fields.count("layers_per_block", Some(1))?,
            use_quant_conv: fields.flag("use_quant_conv", true)?,
            use_post_quant_conv: fields.flag("use_post_quant_conv", true)?,
            mid_block_add_attention: fields.flag("mid_block_add_attention", true)?,
            block_out_channels,
            groups,
        };
        if !config.scaling_factor.is_normal() {
            return Err(fields.error("scaling_factor", "must be a number other than 0"));
        }
        fields.finish()?;
        Ok(config)
    }

    /// How many pixels of the image a latent stands for, in each direction.
    pub fn scale_factor(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    pub(super) fn norm(&self) -> Norm {
        Norm { groups: self.groups, eps: EPS }
    }
}

impl<B: Backend> Decoder<B> {
    /// The decoder of `config` with the loader's weights.
    ///
    /// # Errors
    /// Names every tensor that does not fit.
    pub fn load(config: VaeConfig, loader: Loader<'_, B>) -> Result<Self> {
        let decoder = Self::load_from(config, &loader.root())?;
        loader.finish(ENCODER)?;
        Ok(decoder)
    }

    pub(super) fn load_from(config: VaeConfig, root: &Names<'_, '_, B>) -> Result<Self> {
        let names = root.at("decoder");
        let latent = config.latent_channels;
        let widest = config.block_out_channels[config.block_out_channels.len() - 1];
        let narrowest = config.block_out_channels[0];
        let (pixelwise, same) = (Conv2dOp::same(1), Conv2dOp::same(3));
        let post_quant = || Conv2d::load(&root.at("post_quant_conv"), latent, latent, 1, pixelwise);
        let mut inner = widest;
        let mut up_blocks = Vec::new();
        for (i, &out) in config.block_out_channels.iter().rev().enumerate() {
            let names = names.at("up_blocks").at(i);
            up_blocks.push(UpDecoderBlock::load(&names, &config, inner, out, i)?);
            inner = out;
        }
        let norm_out = config.norm().then_silu();
        Ok(Self {
            dtype: names.dtype(),
            post_quant_conv: config.use_post_quant_conv.then(post_quant).transpose()?,
            conv_in: Conv2d::load(&names.at("conv_in"), latent, widest, 3, same)?,
            mid_block: MidBlock::load(&names.at("mid_block"), &config, widest)?,
            up_blocks,
            conv_norm_out: GroupNorm::load(&names.at("conv_norm_out"), narrowest, norm_out)?,
            conv_out: Conv2d::load(&names.at("conv_out"), narrowest, 3, 3, same)?,
            config,
        })
    }

    /// Latents (batch, latent_channels, height, width), as the diffusion leaves them, to an image
    /// (batch, 3, height·f, width·f) in about −1..1, where f is the scale factor.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward(&self, latents: &Tensor<B>) -> Result<Tensor<B>> {
        let mut x = self.begin(latents)?;
        for block in &self.up_blocks {
            x = block.forward(x)?; // (batch, out, 2·height, 2·width) but for the last
        }
        self.conv_out.forward(&self.conv_norm_out.forward(&x)?)
    }

    /// Latents to what the blocks take, (batch, widest, height, width).
    fn begin(&self, latents: &Tensor<B>) -> Result<Tensor<B>> {
        let unscaled = latents.affine(1.0 / self.config.scaling_factor, 0.0)?;
        let mut x = unscaled.to_dtype(self.dtype)?;
        if let Some(post_quant_conv) = &self.post_quant_conv {
            x = post_quant_conv.forward(&x)?;
        }
        self.mid_block.forward(&self.conv_in.forward(&x)?)
    }
}

/// `UNetMidBlock2D`: resnet, attention of all pixels with each other, resnet.
pub(super) struct MidBlock<B> {
    first: ResnetBlock2D<B>,
    attention: Option<(GroupNorm<B>, Attention<B>)>,
    second: ResnetBlock2D<B>,
}

impl<B: Backend> MidBlock<B> {
    pub fn load(names: &Names<'_, '_, B>, config: &VaeConfig, width: usize) -> Result<Self> {
        let norm = config.norm();
        let resnet =
            |i: usize| ResnetBlock2D::load(&names.at("resnets").at(i), width, width, None, norm);
        let attention = || -> Result<_> {
            let names = names.at("attentions.0");
            let widths = Widths { query: width, context: width, heads: 1 };
            let group_norm = GroupNorm::load(&names.at("group_norm"), width, norm.alone())?;
            Ok((group_norm, Attention::load(&names, widths, Bias::Yes)?))
        };
        Ok(Self {
            first: resnet(0)?,
            attention: config.mid_block_add_attention.then(attention).transpose()?,
            second: resnet(1)?,
        })
    }

    pub fn forward(&self, x: &Tensor<B>) -> Result<Tensor<B>> {
        let mut x = self.first.forward(x, None)?;
        if let Some((group_norm, attention)) = &self.attention {
            let [batch, channels, height, width] = x.dims_exact()?;
            // Channels-last, so a sequence of pixels is a view: (batch, height·width, channels)
            let sequence = |image: &Tensor<B>| {
                image.permute(&[0, 2, 3, 1])?.reshape(vec![batch, height * width, channels])
            };
            let normed = sequence(&group_norm.forward(&x)?)?;
            let seen = attention.forward_self_onto(&normed, &sequence(&x)?)?;
            x = seen.reshape(vec![batch, height, width, channels])?.permute(&[0, 3, 1, 2])?;
        }
        self.second.forward(&x, None)
    }
}

/// `UpDecoderBlock2D`: resnets, then double the size.
struct UpDecoderBlock<B> {
    resnets: Vec<ResnetBlock2D<B>>,
    upsampler: Option<Upsample2D<B>>,
}

impl<B: Backend> UpDecoderBlock<B> {
    fn load(
        names: &Names<'_, '_, B>,
        config: &VaeConfig,
        inner: usize,
        out: usize,
        index: usize,
    ) -> Result<Self> {
        let resnet = |i: usize| {
            let inner = if i == 0 { inner } else { out };
            ResnetBlock2D::load(&names.at("resnets").at(i), inner, out, None, config.norm())
        };
        let is_last = index + 1 == config.block_out_channels.len();
        let upsampler = || Upsample2D::load(&names.at("upsamplers.0"), out);
        Ok(Self {
            resnets: (0..=config.layers_per_block).map(resnet).collect::<Result<_>>()?,
            upsampler: (!is_last).then(upsampler).transpose()?,
        })
    }

    fn forward(&self, x: Tensor<B>) -> Result<Tensor<B>> {
        self.enlarge(self.resnets(x, &mut |norm, x| norm.forward(x))?)
    }

    /// The resnets, with what stands for each of their GroupNorms.
    fn resnets(&self, mut x: Tensor<B>, normalize: &mut Normalize<'_, B>) -> Result<Tensor<B>> {
        for resnet in &self.resnets {
            x = resnet.forward_normed(&x, None, normalize)?;
        }
        Ok(x)
    }

    /// Double the size, but for the last block.
    fn enlarge(&self, x: Tensor<B>) -> Result<Tensor<B>> {
        match &self.upsampler {
            Some(upsampler) => {
                let [_, _, height, width] = x.dims_exact()?;
                upsampler.forward(&x, Size2d { height: 2 * height, width: 2 * width })
            }
            None => Ok(x),
        }
    }
}
