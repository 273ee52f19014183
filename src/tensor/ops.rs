//! Ops: everything that computes. Separate because here, and only here, the memory order of
//! results is decided: by [`Fused::infer`] for fused ops, by `elementwise` for the rest.

use std::sync::Arc;

use candle_core::op::{BinaryOpT, ReduceOp, UnaryOpT};
use candle_core::{DType, Layout, Shape};

use super::Tensor;
use crate::backend::order::{dense_in_order, memory_order};
use crate::backend::{
    Activation, Attention, Backend, Conv2d, Fused, GroupNorm, LayerNorm, Linear, Role, View,
    with_each,
};
use crate::error::{Error, Result};

/// A weight in the form that the device's kernels want. It is not a tensor: only the op that its
/// role names can read it.
pub struct Weight<B>(Tensor<B>);

impl<B: Backend> Weight<B> {
    /// The shape of the weight as in the checkpoint.
    pub fn dims(&self) -> &[usize] {
        self.0.dims()
    }
}

impl<B: Backend> Tensor<B> {
    /// An elementwise op with one operand, such as [`candle_core::op::Silu`].
    ///
    /// # Errors
    /// If the dtype is not supported.
    pub fn unary<U: UnaryOpT>(&self) -> Result<Self> {
        self.elementwise(|storage, layout| storage.unary_impl::<U>(layout))
    }

    /// An elementwise op with two operands, such as [`candle_core::op::Add`], of shapes that
    /// broadcast as torch's do.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit.
    pub fn binary<O: BinaryOpT>(&self, rhs: &Self) -> Result<Self> {
        let are_row_major = self.layout.is_contiguous() && rhs.layout.is_contiguous();
        if are_row_major && self.dims() == rhs.dims() {
            // What follows would say the same, more slowly.
            let storage = self.storage.binary_impl::<O>(&rhs.storage, &self.layout, &rhs.layout)?;
            return Ok(Self::dense(storage, self.layout.shape().clone()));
        }
        let shape = self.layout.shape().broadcast_shape_binary_op(rhs.layout.shape(), O::NAME)?;
        let (lhs, rhs) = (self.broadcast_as(shape.clone())?, rhs.broadcast_as(shape.clone())?);
        let full = if self.dims() == shape.dims() { &lhs } else { &rhs };
        let order = memory_order(&full.layout);
        let (lhs_layout, rhs_layout) = (lhs.layout.permute(&order)?, rhs.layout.permute(&order)?);
        let storage = lhs.storage.binary_impl::<O>(&rhs.storage, &lhs_layout, &rhs_layout)?;
        Ok(Self { storage: Arc::new(storage), layout: dense_in_order(shape.dims(), &order) })
    }

    /// The sum of two tensors.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit.
    pub fn add(&self, rhs: &Self) -> Result<Self> {
        self.binary::<candle_core::op::Add>(rhs)
    }

    /// `mul · x + add`.
    ///
    /// # Errors
    /// If the dtype is not supported.
    pub fn affine(&self, mul: f64, add: f64) -> Result<Self> {
        self.elementwise(|storage, layout| storage.affine(layout, mul, add))
    }

    /// A cast; of the same dtype, nothing at all.
    ///
    /// # Errors
    /// If the dtype is not supported.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        self.elementwise(|storage, layout| storage.to_dtype(layout, dtype))
    }

    /// The same elements in row-major order; this very tensor if they are.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn contiguous(&self) -> Result<Self> {
        if self.layout.is_contiguous() { Ok(self.clone()) } else { self.copy() }
    }

    /// A row-major copy: a cast to the same dtype, which every backend does in logical order.
    pub(super) fn copy(&self) -> Result<Self> {
        let storage = self.storage.to_dtype(&self.layout, self.dtype())?;
        Ok(Self::dense(storage, self.layout.shape().clone()))
    }

    /// The sum over dimensions, which stay with size 1.
    ///
    /// # Errors
    /// If there is no such dimension or the dtype is not supported.
    pub fn sum_keepdim(&self, dims: &[usize]) -> Result<Self> {
        self.reduce(ReduceOp::Sum, dims)
    }

    /// The largest entry along a dimension, which stays with size 1.
    ///
    /// # Errors
    /// If there is no such dimension or the dtype is not supported.
    pub fn max_keepdim(&self, dim: usize) -> Result<Self> {
        self.reduce(ReduceOp::Max, &[dim])
    }

    fn reduce(&self, op: ReduceOp, dims: &[usize]) -> Result<Self> {
        let mut reduced = self.dims().to_vec();
        for &dim in dims {
            match reduced.get_mut(dim) {
                Some(size) => *size = 1,
                None => {
                    let shape = self.dims();
                    return Err(Error::other(format!("{op:?}: no dimension {dim} in {shape:?}")));
                }
            }
        }
        Ok(Self::dense(self.storage.reduce_op(op, &self.layout, dims)?, reduced.into()))
    }

    /// The product of matrices `(…, m, k)` and `(…, k, n)` with equal leading dimensions.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn matmul(&self, rhs: &Self) -> Result<Self> {
        let (lhs, rhs) = (self.contiguous()?, rhs.contiguous()?);
        let (Some((batch, &[m, k])), Some((rhs_batch, &[rhs_k, n]))) =
            (lhs.dims().split_last_chunk::<2>(), rhs.dims().split_last_chunk::<2>())
        else {
            return Err(Error::other(format!("matmul of {lhs:?} and {rhs:?}")));
        };
        if batch != rhs_batch || k != rhs_k {
            return Err(Error::other(format!("matmul of {lhs:?} and {rhs:?}")));
        }
        let count = batch.iter().product();
        let storage =
            lhs.storage.matmul(&rhs.storage, (count, m, n, k), &lhs.layout, &rhs.layout)?;
        Ok(Self::dense(storage, Shape::from([batch, &[m, n]].concat())))
    }

    /// Rows of this `(rows, width)` table, by `ids` of any shape: `(…, width)`.
    ///
    /// # Errors
    /// If an id is not below the number of rows.
    pub fn embedding(&self, ids: &Self) -> Result<Self> {
        let [_, width] = self.dims_exact()?;
        let flat = ids.contiguous()?.reshape(ids.elem_count())?;
        let storage = self.storage.index_select(&flat.storage, &self.layout, &flat.layout, 0)?;
        Ok(Self::dense(storage, Shape::from([ids.dims(), &[width]].concat())))
    }

    /// See [`Conv2d`]; `(batch, out, height, width)`, channels-last.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn conv2d(&self, weight: &Weight<B>, bias: Option<&Self>, op: Conv2d) -> Result<Self> {
        self.conv2d_onto(weight, bias, None, op)
    }

    /// As [`conv2d`](Self::conv2d), with something of the result's shape added to it.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn conv2d_onto(
        &self,
        weight: &Weight<B>,
        bias: Option<&Self>,
        residual: Option<&Self>,
        op: Conv2d,
    ) -> Result<Self> {
        let op = Conv2d { residual: residual.is_some(), ..op };
        self.with_weight(&Fused::Conv2d(op), weight, bias, residual)
    }

    /// See [`Linear`]; `(…, out)`, row-major.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn linear(
        &self,
        weight: &Weight<B>,
        bias: Option<&Self>,
        activation: Activation,
    ) -> Result<Self> {
        self.linear_onto(weight, bias, None, activation)
    }

    /// As [`linear`](Self::linear), with something of the result's shape added to it.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn linear_onto(
        &self,
        weight: &Weight<B>,
        bias: Option<&Self>,
        residual: Option<&Self>,
        activation: Activation,
    ) -> Result<Self> {
        let op = Linear { activation, residual: residual.is_some() };
        self.with_weight(&Fused::Linear(op), weight, bias, residual)
    }

    fn with_weight(
        &self,
        op: &Fused,
        weight: &Weight<B>,
        bias: Option<&Self>,
        residual: Option<&Self>,
    ) -> Result<Self> {
        match (bias, residual) {
            (Some(bias), Some(residual)) => Self::fused(op, &[self, &weight.0, bias, residual]),
            (Some(last), None) | (None, Some(last)) => Self::fused(op, &[self, &weight.0, last]),
            (None, None) => Self::fused(op, &[self, &weight.0]),
        }
    }

    /// See [`GroupNorm`]; channels-last.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn group_norm(&self, weight: &Self, bias: &Self, op: GroupNorm) -> Result<Self> {
        Self::fused(&Fused::GroupNorm(op), &[self, weight, bias])
    }

    /// See [`LayerNorm`]; row-major.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn layer_norm(&self, weight: &Self, bias: &Self, eps: f64) -> Result<Self> {
        Self::fused(&Fused::LayerNorm(LayerNorm { eps }), &[self, weight, bias])
    }

    /// See [`Attention`]; this tensor is the query; row-major.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn attention(&self, key: &Self, value: &Self, op: Attention) -> Result<Self> {
        Self::fused(&Fused::Attention(op), &[self, key, value])
    }

    /// See [`Fused::Geglu`]; `(…, width / 2)`, row-major.
    ///
    /// # Errors
    /// If the last dimension is odd.
    pub fn geglu(&self) -> Result<Self> {
        Self::fused(&Fused::Geglu, &[self])
    }

    /// See [`Fused::LinearCombination`].
    ///
    /// # Errors
    /// If there are no terms or they differ in shape.
    pub fn linear_combination(terms: &[(f64, &Self)]) -> Result<Self> {
        let (coefficients, tensors): (Vec<f64>, Vec<&Self>) = terms.iter().copied().unzip();
        Self::fused(&Fused::LinearCombination(coefficients), &tensors)
    }

    /// Joins tensors along `dim`, in the memory order of the first.
    ///
    /// # Errors
    /// If they differ beside `dim`.
    pub fn cat(tensors: &[&Self], dim: usize) -> Result<Self> {
        Self::fused(&Fused::Cat { dim }, tensors)
    }

    /// See [`Fused::Pixels`]; `(batch, height, width, 3)` u8.
    ///
    /// # Errors
    /// If this is no image with three channels.
    pub fn pixels(&self) -> Result<Self> {
        Self::fused(&Fused::Pixels, &[self])
    }

    /// See [`Fused::Prepare`].
    ///
    /// # Errors
    /// If the weight has not the rank that `role` wants.
    pub fn prepare(&self, role: Role) -> Result<Weight<B>> {
        Ok(Weight(Self::fused(&Fused::Prepare(role), &[self])?))
    }

    /// Runs any fused op on tensors: inference, the device, the result's layout.
    ///
    /// # Errors
    /// If the operands do not fit, or the device cannot.
    pub fn fused<'a>(op: &Fused, args: &[&'a Self]) -> Result<Self> {
        let meta = with_each(args, |tensor| tensor.meta(), |metas| op.infer(metas))?;
        let view = |tensor: &&'a Self| View { storage: &*tensor.storage, layout: &tensor.layout };
        let storage = with_each(args, view, |views| B::fused(op, views))?;
        Ok(Self { storage: Arc::new(storage), layout: meta.layout })
    }

    /// Runs `op` over the buffer in memory order, so that the result keeps that order.
    fn elementwise(&self, op: impl Fn(&B, &Layout) -> candle_core::Result<B>) -> Result<Self> {
        if self.layout.is_contiguous() {
            // What follows would say the same, more slowly.
            let storage = op(&self.storage, &self.layout)?;
            return Ok(Self::dense(storage, self.layout.shape().clone()));
        }
        let order = memory_order(&self.layout);
        let storage = op(&self.storage, &self.layout.permute(&order)?)?;
        Ok(Self { storage: Arc::new(storage), layout: dense_in_order(self.dims(), &order) })
    }
}
