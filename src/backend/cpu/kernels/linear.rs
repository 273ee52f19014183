//! Linear layers: a product with packed weights, the activation applied to each tile while it is
//! still in the cache.

use candle_core::CpuStorage;

use super::super::Storage;
use super::matrix::product;
use super::memory::{Rows, result, row_major};
use super::simd::{for_each_isa, gelu, quick_gelu, silu};
use super::spare;
use super::weight::held;
use crate::backend::{Activation, Linear, Meta, Role, View};
use crate::error::{Error, Result};

/// See [`Linear`]; row-major.
pub fn linear(op: &Linear, args: &[View<'_, Storage>], meta: &Meta) -> Result<CpuStorage> {
    let [x, weight, bias @ ..] = args else { return Err(Error::other("linear of one operand")) };
    let (x, weight) = (Rows::read(*x)?, held(*weight, Role::Linear)?);
    let panels = weight.panels()?;
    let bias = bias.first().map(|bias| row_major(*bias)).transpose()?;
    let mut values = spare::take(meta.layout.shape().elem_count())?;
    let rows = values.len() / panels.columns();
    let fill = |row: usize, k0: usize, piece: &mut [f32]| {
        piece.copy_from_slice(&x.row(row)[k0..k0 + piece.len()]);
    };
    let finish = |row: &mut [f32]| activate(row, op.activation);
    product(rows, panels, bias.as_deref(), &mut values, fill, finish);
    result(values, meta.dtype)
}

fn activate(values: &mut [f32], activation: Activation) {
    match activation {
        Activation::Identity => {}
        Activation::Silu => silu_all(values),
        Activation::QuickGelu => quick_gelu_all(values),
        Activation::Gelu => gelu_all(values),
    }
}

for_each_isa! {
    pub fn silu_all(values: &mut [f32]) {
        for x in values {
            *x = silu(*x);
        }
    }
}

for_each_isa! {
    pub fn quick_gelu_all(values: &mut [f32]) {
        for x in values {
            *x = quick_gelu(*x);
        }
    }
}

for_each_isa! {
    pub fn gelu_all(values: &mut [f32]) {
        for x in values {
            *x = gelu(*x);
        }
    }
}
