//! Weights in the form that products read: packed once at load (`prepare`), or just now where a
//! plain tensor is given. Separate because convolutions and linear layers share all of it.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout};

use super::super::Storage;
use super::element::Element;
use super::matrix::{Panels, Source};
use super::memory::{check, unsupported};
use super::pair::Pair;
use super::simd::Isa;
use super::winograd::Kernel;
use crate::backend::{Role, View};
use crate::error::{Error, Result};

/// A weight in the form that a kernel reads.
#[derive(Debug)]
pub struct Packed {
    role: Role,
    dtype: DType,
    dims: Vec<usize>,
    form: Form,
}

/// How a weight is kept.
#[derive(Debug)]
pub enum Form {
    /// In f32, whatever dtype it stands for.
    Panels(Panels),
    /// In bf16, where the processor multiplies it.
    Pairs(Panels<Pair>),
    /// Transformed for Winograd's convolution in f32: four times the size, for a quarter of the
    /// products.
    Transformed(Kernel),
}

impl Packed {
    /// The dtype of the operands that it goes with.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of memory.
    pub fn held_bytes(&self) -> u64 {
        match &self.form {
            Form::Panels(panels) => panels.held_bytes(),
            Form::Pairs(panels) => panels.held_bytes(),
            Form::Transformed(kernel) => kernel.held_bytes(),
        }
    }
}

/// See [`crate::backend::Fused::Prepare`].
///
/// # Errors
/// If it is not a weight of that role, or the memory cannot be had.
pub fn prepare(role: Role, weight: View<'_, Storage>) -> Result<Packed> {
    check(weight)?;
    let (dims, spacious) = (weight.layout.dims(), !weight.storage.device().is_low_memory());
    let transform = match role {
        Role::Linear => false,
        Role::Conv2d { stride } => spacious && Kernel::suits(dims, stride),
    };
    let multiplies_bf16 = !transform && Isa::detect().multiplies_bf16();
    let elements = weight.storage.elements()?;
    let form = with_source(role, weight.layout, |source| match elements {
        CpuStorage::F32(values) => in_f32(values, source, transform),
        CpuStorage::F16(values) => in_f32(values, source, transform),
        CpuStorage::BF16(values) if multiplies_bf16 => {
            Panels::pack(values, source).map(Form::Pairs)
        }
        CpuStorage::BF16(values) => in_f32(values, source, transform),
        other => Err(unsupported(other.dtype())),
    })?;
    Ok(Packed { role, dtype: weight.storage.dtype(), dims: dims.to_vec(), form })
}

fn in_f32<T: Element>(values: &[T], source: &Source<'_>, transform: bool) -> Result<Form> {
    match transform {
        true => Kernel::new(values, source).map(Form::Transformed),
        false => Panels::pack(values, source).map(Form::Panels),
    }
}

/// Runs `pack` on where the elements of a weight of a role lie.
fn with_source(
    role: Role,
    layout: &Layout,
    pack: impl FnOnce(&Source<'_>) -> Result<Form>,
) -> Result<Form> {
    let (dims, stride, offset) = (layout.dims(), layout.stride(), layout.start_offset());
    match (role, dims, stride) {
        (Role::Linear, &[columns, channels], &[column_stride, channel_stride]) => {
            let taps = &[0];
            pack(&Source { offset, columns, column_stride, taps, channels, channel_stride })
        }
        (
            Role::Conv2d { .. },
            &[columns, channels, height, width],
            &[of_column, of_channel, of_y, of_x],
        ) => {
            let count = height.checked_mul(width).filter(|&count| count <= 1 << 16);
            if count.is_none() {
                return Err(Error::other(format!("a kernel of {height} x {width} is too large")));
            }
            let taps: Vec<usize> =
                (0..height).flat_map(|y| (0..width).map(move |x| y * of_y + x * of_x)).collect();
            let (column_stride, channel_stride, taps) = (of_column, of_channel, &taps);
            pack(&Source { offset, columns, column_stride, taps, channels, channel_stride })
        }
        (Role::Linear | Role::Conv2d { .. }, dims, _) => {
            Err(Error::other(format!("a weight of shape {dims:?} is none of {role:?}")))
        }
    }
}

/// A weight operand in its form.
pub enum Held<'a> {
    /// Prepared before.
    Ready(&'a Packed),
    /// Packed for this one call.
    Fresh(Packed),
}

impl Held<'_> {
    /// How it is kept.
    pub fn form(&self) -> &Form {
        match self {
            Held::Ready(packed) => &packed.form,
            Held::Fresh(packed) => &packed.form,
        }
    }
}

/// The weight operand of an op.
///
/// # Errors
/// If it was prepared for another role, or is viewed as anything but a whole weight.
pub fn held<'a>(weight: View<'a, Storage>, role: Role) -> Result<Held<'a>> {
    let Some(packed) = weight.storage.packed() else {
        return Ok(Held::Fresh(prepare(role, weight)?));
    };
    let layout = weight.layout;
    let whole = layout.is_contiguous() && layout.start_offset() == 0;
    if packed.role != role || packed.dims != layout.dims() || !whole {
        return Err(Error::other(format!(
            "a weight prepared for {:?} {:?} is used for {role:?} {:?}",
            packed.role,
            packed.dims,
            layout.dims()
        )));
    }
    Ok(Held::Ready(packed))
}
