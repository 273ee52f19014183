//! The fused ops on the CPU: one kernel a file. Separate from the storage because `unsafe` may
//! appear here and nowhere else.
//!
//! All compute in f32, on blocks of the operands that are widened while they are in the cache; but
//! where the processor multiplies bf16, products of bf16 are of the operands as they are, summed in
//! f32. Results are rounded once.
//!
//! The bits of a result depend on the operands and on the instruction set alone: not on the number
//! of threads, and not on what else is in the batch.

mod add;
mod attention;
mod cat;
mod choice;
mod conv2d;
mod element;
mod flash;
mod halves;
mod linear;
mod matrix;
mod memory;
mod micro;
#[cfg(target_arch = "aarch64")]
mod neon;
mod norm;
mod pair;
mod pointwise;
mod simd;
mod softmax;
mod spare;
mod upload;
mod weight;
mod winograd;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType};

use super::Storage;
use crate::backend::{Fused, Meta, MetaRef, View};
use crate::error::{Error, Result};

pub use add::add;
pub use memory::return_large_buffers;
pub use spare::give;
pub use upload::upload;
pub use weight::{Packed, prepare, transformed_bytes};

/// The name of the kernels that this process runs.
pub fn path() -> &'static str {
    choice::chosen().name()
}

/// The names of all kernels that this processor can run, best first.
pub fn paths() -> Vec<&'static str> {
    choice::available().map(choice::Path::name).collect()
}

/// Whether the environment asks for kernels that are here, or for none.
///
/// # Errors
/// If it does not: a wrong request.
pub fn check_path() -> Result<()> {
    choice::check()
}

/// Runs any op but `Prepare`, which gives no tensor: see [`prepare`].
///
/// # Errors
/// If the operands do not fit the op, or the memory cannot be had.
pub fn fused(op: &Fused, args: &[View<'_, Storage>]) -> Result<CpuStorage> {
    let metas: Vec<_> =
        args.iter().map(|arg| MetaRef { dtype: arg.storage.dtype(), layout: arg.layout }).collect();
    // Inferred again: kernels rely on it for more than the right result.
    let meta = op.infer(&metas)?;
    if meta.layout.shape().elem_count() == 0 {
        return empty(meta.dtype);
    }
    run(op, args, &meta).map_err(|error| error.context(op.name()))
}

fn run(op: &Fused, args: &[View<'_, Storage>], meta: &Meta) -> Result<CpuStorage> {
    match op {
        Fused::Conv2d(op) => conv2d::conv2d(op, args, meta),
        Fused::GroupNorm(op) => norm::group_norm(op, args, meta),
        Fused::LayerNorm(op) => norm::layer_norm(op, args, meta),
        Fused::Attention(op) => attention::attention(op, args, meta),
        Fused::Linear(op) => linear::linear(op, args, meta),
        Fused::Geglu => pointwise::geglu(args, meta),
        Fused::LinearCombination(coefficients) => {
            pointwise::linear_combination(coefficients, args, meta)
        }
        Fused::Cat { dim } => cat::cat(*dim, args, meta),
        Fused::Pixels => pointwise::pixels(args),
        Fused::Prepare(_) => Err(Error::other("a prepared weight is not a tensor")),
    }
}

fn empty(dtype: DType) -> Result<CpuStorage> {
    use candle_core::backend::BackendDevice;
    Ok(candle_core::cpu_backend::CpuDevice.zeros_impl(&0.into(), dtype)?)
}
