//! Linear layers: a product with packed weights, the activation applied to each tile while it is
//! still in the cache.

use candle_core::CpuStorage;
use half::bf16;

use super::super::Storage;
use super::element::{As, Element, with_number};
use super::matrix::{Panels, product};
use super::memory::{Rows, row_major};
use super::micro::Unit;
use super::pair::Pair;
use super::simd::{for_each_isa, gelu, quick_gelu, silu};
use super::spare;
use super::weight::{Form, held};
use crate::backend::{Activation, Linear, Meta, Role, View};
use crate::error::{Error, Result};

/// See [`Linear`]; row-major.
pub fn linear(op: &Linear, args: &[View<'_, Storage>], meta: &Meta) -> Result<CpuStorage> {
    let [x, weight, bias @ ..] = args else { return Err(Error::other("linear of one operand")) };
    let weight = held(*weight, Role::Linear)?;
    let bias = bias.first().map(|bias| row_major(*bias)).transpose()?;
    let (bias, activation) = (bias.as_deref(), op.activation);
    match weight.form() {
        Form::Panels(panels) => {
            with_number!(meta.dtype, T => multiply::<T, f32>(*x, panels, bias, activation, meta))
        }
        Form::Pairs(panels) => multiply::<bf16, Pair>(*x, panels, bias, activation, meta),
        Form::Transformed(kernel) => Err(Error::other(format!("{kernel:?} is no matrix"))),
    }
}

fn multiply<T, U>(
    x: View<'_, Storage>,
    panels: &Panels<U>,
    bias: Option<&[f32]>,
    activation: Activation,
    meta: &Meta,
) -> Result<CpuStorage>
where
    T: Element + As<U::Number>,
    U: Unit,
{
    let x = Rows::<T>::read(x)?;
    let mut values = spare::take::<T>(meta.layout.shape().elem_count())?;
    let rows = values.len() / panels.columns();
    let fill = |row: usize, k0: usize, piece: &mut [U::Number]| {
        T::copy(&x.row(row)[k0..k0 + piece.len()], piece);
    };
    product(rows, panels, bias, &mut values, fill, |row| activate(row, activation));
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
