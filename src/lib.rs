//! Stable Diffusion inference in pure Rust whose device can be a GPU across the network.

pub mod backend;
pub mod error;
pub mod rng;
pub mod schedule;
pub mod tokenizer;
pub mod weights;

pub use error::{Error, Result};
