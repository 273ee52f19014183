//! Weights in the form that products read: packed once at load (`prepare`), or just now where a
//! plain tensor is given. Separate because convolutions and linear layers share all of it.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout};

use super::super::Storage;
use super::choice;
use super::element::Element;
use super::matrix::{HalvedPanels, Panels, Source};
use super::memory::{check, unsupported};
use super::pair::Pair;
use super::winograd::Kernel;
use crate::backend::{Role, View};
use crate::error::{Error, Result};

/// A weight in the form that a kernel reads.
#[derive(Debug)]
pub struct Packed {
    role: Role,
    dtype: DType,
    dims: Vec<usize>,
    kept: Kept,
}

/// What is in memory.
#[derive(Debug)]
enum Kept {
    Whole(Form),
    /// Made whole for each op: linear layers, and all where memory is short.
    Halved(HalvedPanels),
}

/// How a kernel reads a weight.
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

/// Bytes that the weight of a convolution takes where it is transformed for Winograd's; none where
/// it is not, as all with `--low-memory`.
pub fn transformed_bytes(dims: &[usize], stride: usize) -> Option<u64> {
    Kernel::bytes_of(dims, stride)
}

impl Packed {
    /// The dtype of the operands that it goes with.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of memory.
    pub fn held_bytes(&self) -> u64 {
        match &self.kept {
            Kept::Whole(Form::Panels(panels)) => panels.held_bytes(),
            Kept::Whole(Form::Pairs(panels)) => panels.held_bytes(),
            Kept::Whole(Form::Transformed(kernel)) => kernel.held_bytes(),
            Kept::Halved(panels) => panels.held_bytes(),
        }
    }
}

/// See [`crate::backend::Fused::Prepare`].
///
/// # Errors
/// If it is not a weight of that role, or the memory cannot be had.
pub fn prepare(role: Role, weight: View<'_, Storage>) -> Result<Packed> {
    let form = form(role, weight)?;
    let is_small = match role {
        // Their many rows pay for it; half of what they take is a sixth of a model's memory.
        Role::Linear => true,
        Role::Conv2d { .. } => weight.storage.device().is_low_memory(),
    };
    let kept = if is_small { small(form)? } else { Kept::Whole(form) };
    let (dtype, dims) = (weight.storage.dtype(), weight.layout.dims().to_vec());
    Ok(Packed { role, dtype, dims, kept })
}

/// The smallest that gives the same bits.
fn small(mut form: Form) -> Result<Kept> {
    if let Form::Panels(panels) = &mut form
        && let Some(halved) = panels.halved()?
    {
        panels.give();
        return Ok(Kept::Halved(halved));
    }
    Ok(Kept::Whole(form))
}

fn form(role: Role, weight: View<'_, Storage>) -> Result<Form> {
    check(weight)?;
    let (dims, spacious) = (weight.layout.dims(), !weight.storage.device().is_low_memory());
    let transform = match role {
        Role::Linear => false,
        Role::Conv2d { stride } => spacious && Kernel::suits(dims, stride),
    };
    let multiplies_bf16 = !transform && choice::chosen().multiplies_bf16();
    let elements = weight.storage.elements()?;
    with_source(role, weight.layout, |source| match elements {
        CpuStorage::F32(values) => in_f32(values, source, transform),
        CpuStorage::F16(values) => in_f32(values, source, transform),
        CpuStorage::BF16(values) if multiplies_bf16 => {
            Panels::pack(values, source).map(Form::Pairs)
        }
        CpuStorage::BF16(values) => in_f32(values, source, transform),
        other => Err(unsupported(other.dtype())),
    })
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
    Ready(&'a Form),
    /// Packed, or made whole, for this one call.
    Fresh(Form),
}

impl Held<'_> {
    /// How it is read.
    pub fn form(&self) -> &Form {
        match self {
            Held::Ready(form) => form,
            Held::Fresh(form) => form,
        }
    }
}

/// The buffer of a weight that was made for one call serves the next.
impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Held::Fresh(Form::Panels(panels)) = self {
            panels.give();
        }
    }
}

/// The weight operand of an op.
///
/// # Errors
/// If it was prepared for another role, or is viewed as anything but a whole weight.
pub fn held<'a>(weight: View<'a, Storage>, role: Role) -> Result<Held<'a>> {
    let Some(packed) = weight.storage.packed() else {
        return Ok(Held::Fresh(form(role, weight)?));
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
    match &packed.kept {
        Kept::Whole(form) => Ok(Held::Ready(form)),
        Kept::Halved(panels) => panels.widen().map(Form::Panels).map(Held::Fresh),
    }
}
