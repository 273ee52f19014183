//! A stream of small ops as a UNet mixes them. Separate because a bench times it and a test counts
//! its bytes.

use candle_core::DType;
use candle_core::op::{Add, Mul, Silu};
use tiny_sd::Result;
use tiny_sd::backend::{Activation, Backend, GroupNorm, Role};
use tiny_sd::tensor::{Tensor, Weight};

/// The ops, by number.
pub const NAMES: [&str; 6] = ["add", "silu", "linear", "group_norm", "mul of a view", "cat"];

/// Their operands.
pub struct SmallOps<B> {
    pub x: Tensor<B>,
    pub y: Tensor<B>,
    weight: Weight<B>,
    bias: Tensor<B>,
    image: Tensor<B>,
}

impl<B: Backend> SmallOps<B> {
    pub fn new(device: &B::Device) -> Result<Self> {
        let zeros = |dims: &[usize]| Tensor::<B>::zeros(dims, DType::F32, device);
        Ok(Self {
            x: zeros(&[2, 16, 32])?,
            y: zeros(&[2, 16, 32])?,
            weight: zeros(&[32, 32])?.prepare(Role::Linear)?,
            bias: zeros(&[32])?,
            image: zeros(&[2, 32, 8, 8])?,
        })
    }

    /// The `n`th of the stream.
    pub fn run(&self, n: u64) -> Result<Tensor<B>> {
        let Self { x, y, weight, bias, image } = self;
        match n as usize % NAMES.len() {
            0 => x.binary::<Add>(y),
            1 => x.unary::<Silu>(),
            2 => x.linear(weight, Some(bias), Activation::Identity),
            3 => image.group_norm(bias, bias, GroupNorm { groups: 4, eps: 1e-5, silu: true }),
            4 => {
                let view = x.narrow(1, 4, 8)?;
                view.binary::<Mul>(&view)
            }
            _ => Tensor::cat(&[x, y], 1),
        }
    }
}
