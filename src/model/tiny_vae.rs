//! diffusers' `AutoencoderTiny` (madebyollin's TAESD), the decoding half: a small network that was
//! taught to decode as the large one does. Separate because it shares no block with that.

use candle_core::DType;
use candle_core::op::{Relu, Tanh};
use serde_json::{Value, json};

use crate::backend::{Backend, Conv2d as Conv2dOp, Size2d};
use crate::error::Result;
use crate::model::config::Fields;
use crate::model::tiles::Windows;
use crate::nn::{Conv2d, Loader, Names};
use crate::tensor::Tensor;

/// `vae/config.json` of this class, checked.
#[derive(Debug, Clone)]
pub struct TinyConfig {
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Latents are divided by this before decoding.
    pub scaling_factor: f64,
    /// The same everywhere.
    width: usize,
    /// Blocks of each size, from the smallest image to the largest.
    blocks: Vec<usize>,
}

/// Side of a window in latents.
const TILE: usize = 64;
/// Latents are squeezed into ± this.
const LARGEST_LATENT: f64 = 3.0;

impl TinyConfig {
    /// Reads the config, of which every field must be one that this code covers.
    ///
    /// # Errors
    /// Names the first field that it does not.
    pub fn parse(value: &Value) -> Result<Self> {
        let fields = Fields::new("vae/config.json", value)?;
        for (name, value) in [
            ("act_fn", json!("relu")),
            ("upsample_fn", json!("nearest")),
            ("upsampling_scaling_factor", json!(2)),
            ("out_channels", json!(3)),
            ("shift_factor", json!(0)),
        ] {
            fields.only(name, value)?;
        }
        // Of the encoder, of training, or of a form of the latents that no picture takes.
        fields.ignore(&["in_channels", "encoder_block_out_channels", "num_encoder_blocks"]);
        fields.ignore(&["block_out_channels", "latent_magnitude", "latent_shift", "force_upcast"]);
        let blocks = match fields.raw("num_decoder_blocks") {
            None => vec![3, 3, 3, 1],
            Some(_) => fields.count_list("num_decoder_blocks")?,
        };
        let widths = fields.counts("decoder_block_out_channels", 64, blocks.len())?;
        let width = widths[0];
        if widths.iter().any(|&other| other != width) {
            let message = format!("{widths:?} are not all the same, as the network needs them");
            return Err(fields.error("decoder_block_out_channels", &message));
        }
        if blocks.iter().any(|&count| count > 64) {
            return Err(fields.error("num_decoder_blocks", "more than 64 are not supported"));
        }
        let config = Self {
            latent_channels: fields.count("latent_channels", Some(4))?,
            scaling_factor: fields.number("scaling_factor", 1.0)?,
            width,
            blocks,
        };
        if !config.scaling_factor.is_normal() {
            return Err(fields.error("scaling_factor", "must be a number other than 0"));
        }
        fields.finish()?;
        Ok(config)
    }

    /// How many pixels of the image a latent stands for, in each direction.
    pub fn scale_factor(&self) -> usize {
        1 << (self.blocks.len() - 1)
    }
}

/// The decoder.
pub struct TinyDecoder<B> {
    /// What it was built from.
    pub config: TinyConfig,
    dtype: DType,
    conv_in: Conv2d<B>,
    stages: Vec<Stage<B>>,
}

/// The blocks of one size, and the convolution that leads to the next.
struct Stage<B> {
    blocks: Vec<TinyBlock<B>>,
    conv: Conv2d<B>,
}

impl<B: Backend> TinyDecoder<B> {
    /// The decoder of `config` with the loader's weights.
    ///
    /// # Errors
    /// Names every tensor that does not fit.
    pub fn load(config: TinyConfig, loader: Loader<'_, B>) -> Result<Self> {
        let decoder = Self::load_from(config, &loader.root().at("decoder.layers"))?;
        loader.finish(&["encoder."])?;
        Ok(decoder)
    }

    /// The layers are counted through, those without weights too.
    fn load_from(config: TinyConfig, names: &Names<'_, '_, B>) -> Result<Self> {
        let (width, same) = (config.width, Conv2dOp::same(3));
        let conv_in = Conv2d::load(&names.at(0), config.latent_channels, width, 3, same)?;
        let mut next = 2;
        let mut stages = Vec::new();
        for (i, &count) in config.blocks.iter().enumerate() {
            let is_last = i + 1 == config.blocks.len();
            let blocks = (next..next + count).map(|at| TinyBlock::load(&names.at(at), width));
            let blocks = blocks.collect::<Result<Vec<_>>>()?;
            // Before a convolution that is not the last the image is enlarged: a layer of its own.
            let at = next + count + usize::from(!is_last);
            let conv = match is_last {
                true => Conv2d::load(&names.at(at), width, 3, 3, same)?,
                false => Conv2d::load_unbiased(&names.at(at), width, width, 3, same)?,
            };
            stages.push(Stage { blocks, conv });
            next = at + 1;
        }
        Ok(Self { dtype: names.dtype(), conv_in, stages, config })
    }

    /// Latents (batch, latent_channels, height, width), as the diffusion leaves them, to an image
    /// (batch, 3, height·f, width·f) in about −1..1, where f is the scale factor.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward(&self, latents: &Tensor<B>) -> Result<Tensor<B>> {
        self.decode(latents)
    }

    /// As [`forward`](Self::forward) in windows: the very image, since nothing looks farther than
    /// the convolutions reach.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward_tiled(&self, latents: &Tensor<B>) -> Result<Tensor<B>> {
        let [_, _, height, width] = latents.dims_exact()?;
        let windows = self.windows(Size2d { height, width });
        windows.assemble(latents, &mut |seen| self.decode(seen))
    }

    /// Whether latents of this size are more than one window.
    pub fn cuts(&self, latents: Size2d) -> bool {
        !self.windows(latents).is_one()
    }

    fn windows(&self, Size2d { height, width }: Size2d) -> Windows {
        Windows::cover(height, width, TILE, self.halo())
    }

    /// How many latents around a window the convolutions reach: one pixel each.
    fn halo(&self) -> usize {
        let blocks = self.config.blocks.iter().rev().enumerate();
        // The last convolution is of the largest image, the others of one twice as large.
        let reach = blocks.fold(0, |reach: usize, (index, blocks)| {
            let conv = if index == 0 { 1 } else { (reach + 1).div_ceil(2) };
            conv + 3 * blocks
        });
        reach + 1
    }

    fn decode(&self, latents: &Tensor<B>) -> Result<Tensor<B>> {
        let x = latents.affine(1.0 / (self.config.scaling_factor * LARGEST_LATENT), 0.0)?;
        let x = x.to_dtype(self.dtype)?.unary::<Tanh>()?.affine(LARGEST_LATENT, 0.0)?;
        let mut x = self.conv_in.forward(&x)?.unary::<Relu>()?; // (batch, width, height, width)
        for (i, Stage { blocks, conv }) in self.stages.iter().enumerate() {
            for block in blocks {
                x = block.forward(&x)?;
            }
            let [_, _, height, width] = x.dims_exact()?;
            x = match i + 1 == self.stages.len() {
                true => conv.forward(&x)?, // (batch, 3, height, width)
                false => {
                    conv.forward_upsampled(&x, Size2d { height: 2 * height, width: 2 * width })?
                }
            };
        }
        x.affine(2.0, -1.0)
    }
}

/// `AutoencoderTinyBlock`: three convolutions around which there is a shortcut.
struct TinyBlock<B>([Conv2d<B>; 3]);

impl<B: Backend> TinyBlock<B> {
    fn load(names: &Names<'_, '_, B>, width: usize) -> Result<Self> {
        let names = names.at("conv");
        let conv = |at: usize| Conv2d::load(&names.at(at), width, width, 3, Conv2dOp::same(3));
        Ok(Self([conv(0)?, conv(2)?, conv(4)?]))
    }

    fn forward(&self, x: &Tensor<B>) -> Result<Tensor<B>> {
        let Self([first, second, third]) = self;
        let hidden = first.forward(x)?.unary::<Relu>()?;
        let hidden = second.forward(&hidden)?.unary::<Relu>()?;
        third.forward_onto(&hidden, x)?.unary::<Relu>()
    }
}
