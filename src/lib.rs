//! Stable Diffusion inference in pure Rust whose device can be a GPU across the network.
//!
//! This page is the map. Two paths go through the crate, and each can be read in one sitting.
//!
//! **A prompt becomes a picture** in [`pipeline`]: prompt → [`tokenizer`] → ids →
//! [`model::TextEncoder`] → embeddings → [`schedule`] and [`model::UNet`] → latents →
//! [`model::AutoencoderDecoder`] → [`image`].
//!
//! **An op runs**: a [`tensor`] method asks [`backend::Fused::infer`] for the result's layout and
//! its [`backend::Backend`] for the storage. On [`backend::cpu`] that is a kernel. On a remote
//! device it is [`remote::storage`] → [`remote::client`] → [`remote::message`] → the network →
//! [`remote::executor`] → [`remote::heap`] → [`remote::op::execute`] → a kernel over there.
//!
//! What holds everywhere:
//! - Models are generic over [`backend::Backend`] and never name a device.
//! - A view is arithmetic on a layout: no op, no message, and its start offset is never dropped.
//! - The memory order of a result is part of the op's definition, equal on every backend.
//! - Scalars are attributes of ops; noise is an op; nothing else varies between devices.
//! - Bytes from files and from the network are checked before they are used, and capped.
//!
//! `ARCHITECTURE.md` says why, and what must not exist.

pub mod backend;
pub mod cli;
pub mod error;
pub mod image;
pub mod model;
pub mod nn;
pub mod pipeline;
pub mod progress;
pub mod remote;
pub mod rng;
pub mod schedule;
pub mod tensor;
pub mod tokenizer;
pub mod weights;

pub use error::{Error, Result};
