//! The VAE that a model has: the large one of its training, or a tiny one that stands in for it.
//! Separate because the two share nothing but what they are for.

use serde_json::Value;

use crate::backend::{Backend, Size2d};
use crate::error::{Error, Result};
use crate::model::tiny_vae::{TinyConfig, TinyDecoder};
use crate::model::vae::{Decoder, VaeConfig};
use crate::model::vae_encoder::Encoder;
use crate::nn::Loader;
use crate::tensor::Tensor;

/// `vae/config.json` of either class, checked.
#[derive(Debug, Clone)]
pub enum AutoencoderConfig {
    /// `AutoencoderKL`
    Kl(VaeConfig),
    /// `AutoencoderTiny`
    Tiny(TinyConfig),
}

impl AutoencoderConfig {
    /// Reads the config, whose class says which of the two it is.
    ///
    /// # Errors
    /// Names the first field that is not covered.
    pub fn parse(value: &Value) -> Result<Self> {
        match value.get("_class_name").and_then(Value::as_str) {
            Some("AutoencoderTiny") => TinyConfig::parse(value).map(Self::Tiny),
            Some(_) | None => VaeConfig::parse(value).map(Self::Kl),
        }
    }

    /// Whether it can turn an image into latents.
    ///
    /// # Errors
    /// A tiny VAE cannot, here.
    pub fn check_encodes(&self) -> Result<()> {
        match self {
            Self::Kl(_) => Ok(()),
            Self::Tiny(_) => Err(Error::usage(
                "--image needs a VAE that encodes, and of a tiny one only the decoder is here; \
                 leave out --vae",
            )),
        }
    }

    /// Channels of the latents.
    pub fn latent_channels(&self) -> usize {
        match self {
            Self::Kl(config) => config.latent_channels,
            Self::Tiny(config) => config.latent_channels,
        }
    }

    /// How many pixels of the image a latent stands for, in each direction.
    pub fn scale_factor(&self) -> usize {
        match self {
            Self::Kl(config) => config.scale_factor(),
            Self::Tiny(config) => config.scale_factor(),
        }
    }
}

/// The decoder of either VAE.
pub enum AutoencoderDecoder<B> {
    /// Of `AutoencoderKL`.
    Kl(Box<Decoder<B>>),
    /// Of `AutoencoderTiny`.
    Tiny(Box<TinyDecoder<B>>),
}

impl<B: Backend> AutoencoderDecoder<B> {
    /// The decoder of `config` with the loader's weights.
    ///
    /// # Errors
    /// Names every tensor that does not fit.
    pub fn load(config: AutoencoderConfig, loader: Loader<'_, B>) -> Result<Self> {
        Ok(match config {
            AutoencoderConfig::Kl(config) => Self::Kl(Decoder::load(config, loader)?.into()),
            AutoencoderConfig::Tiny(config) => {
                Self::Tiny(TinyDecoder::load(config, loader)?.into())
            }
        })
    }

    /// As [`load`](Self::load), and the encoder.
    ///
    /// # Errors
    /// As there, or if this VAE has none.
    pub fn load_with_encoder(
        config: AutoencoderConfig,
        loader: Loader<'_, B>,
    ) -> Result<(Self, Encoder<B>)> {
        config.check_encodes()?;
        match config {
            AutoencoderConfig::Kl(config) => {
                let (decoder, encoder) = Encoder::load_with_decoder(config, loader)?;
                Ok((Self::Kl(decoder.into()), encoder))
            }
            AutoencoderConfig::Tiny(_) => Err(Error::other("a tiny VAE does not encode")),
        }
    }

    /// How many pixels of the image a latent stands for, in each direction.
    pub fn scale_factor(&self) -> usize {
        match self {
            Self::Kl(decoder) => decoder.config.scale_factor(),
            Self::Tiny(decoder) => decoder.config.scale_factor(),
        }
    }

    /// Latents (batch, latent_channels, height, width), as the diffusion leaves them, to an image
    /// (batch, 3, height·f, width·f) in about −1..1, where f is the scale factor.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward(&self, latents: &Tensor<B>) -> Result<Tensor<B>> {
        match self {
            Self::Kl(decoder) => decoder.forward(latents),
            Self::Tiny(decoder) => decoder.forward(latents),
        }
    }

    /// Whether [`forward_tiled`](Self::forward_tiled) cuts latents of this size.
    pub fn cuts(&self, latents: Size2d) -> bool {
        match self {
            Self::Kl(decoder) => decoder.cuts(latents),
            Self::Tiny(decoder) => decoder.cuts(latents),
        }
    }

    /// As [`forward`](Self::forward) in windows: slower, and a fraction of the memory.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward_tiled(&self, latents: &Tensor<B>) -> Result<Tensor<B>> {
        match self {
            Self::Kl(decoder) => decoder.forward_tiled(latents),
            Self::Tiny(decoder) => decoder.forward_tiled(latents),
        }
    }
}
