//! Linear layers: a product with packed weights, the activation applied to each tile while it is
//! still in the cache.

use candle_core::CpuStorage;
use half::bf16;

use super::super::Storage;
use super::element::{As, Element, with_number};
use super::matrix::{Onto, Panels, product};
use super::memory::{Rows, in_order, row_major};
use super::micro::Unit;
use super::pair::Pair;
use super::simd::{for_each_isa, gelu, quick_gelu, silu};
use super::spare;
use super::weight::{Form, held};
use crate::backend::weighted::Weighted;
use crate::backend::{Activation, Linear, Meta, Role, View};
use crate::error::{Error, Result};

/// See [`Linear`]; row-major.
pub fn linear(op: &Linear, args: &[View<'_, Storage>], meta: &Meta) -> Result<CpuStorage> {
    let operands = Weighted::of(args, op.residual)?;
    let weight = held(*operands.weight, Role::Linear)?;
    match weight.form() {
        Form::Panels(panels) => {
            with_number!(meta.dtype, T => multiply::<T, f32>(op, &operands, panels, meta))
        }
        Form::Pairs(panels) => multiply::<bf16, Pair>(op, &operands, panels, meta),
        Form::Transformed(kernel) => Err(Error::other(format!("{kernel:?} is no matrix"))),
    }
}

fn multiply<T, U>(
    op: &Linear,
    operands: &Weighted<'_, View<'_, Storage>>,
    panels: &Panels<U>,
    meta: &Meta,
) -> Result<CpuStorage>
where
    T: Element + As<U::Number>,
    U: Unit,
{
    let x = Rows::<T>::read(*operands.x)?;
    let bias = operands.bias.map(|bias| row_major(*bias)).transpose()?;
    let order: Vec<_> = (0..meta.layout.dims().len()).collect();
    let residual = operands.residual.map(|view| in_order::<T>(*view, &order)).transpose()?;
    let onto = Onto { bias: bias.as_deref(), residual: residual.as_deref() };
    let mut values = spare::take::<T>(meta.layout.shape().elem_count())?;
    let rows = values.len() / panels.columns();
    let fill = |row: usize, k0: usize, piece: &mut [U::Number]| {
        T::copy(&x.row(row)[k0..k0 + piece.len()], piece);
    };
    product(rows, panels, &onto, &mut values, fill, |row| activate(row, op.activation));
    Ok(T::store(values))
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
            *x = silu::<FUSED>(*x);
        }
    }
}

for_each_isa! {
    pub fn quick_gelu_all(values: &mut [f32]) {
        for x in values {
            *x = quick_gelu::<FUSED>(*x);
        }
    }
}

for_each_isa! {
    pub fn gelu_all(values: &mut [f32]) {
        for x in values {
            *x = gelu::<FUSED>(*x);
        }
    }
}
