//! The three networks of Stable Diffusion, generic over the device. Separate from the pipeline
//! because each is a checkpoint of its own, whose names and config.json fields it uses.

mod attention;
mod autoencoder;
pub mod clip;
mod config;
mod resnet;
mod tiles;
pub mod tiny_vae;
pub mod unet;
mod unet_blocks;
pub mod vae;
pub mod vae_encoder;

pub use autoencoder::{AutoencoderConfig, AutoencoderDecoder};
pub use clip::TextEncoder;
pub use unet::UNet;
pub use vae::Decoder;
pub use vae_encoder::Encoder;
