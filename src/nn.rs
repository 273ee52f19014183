//! Layers: a weight, its op, and how both come out of a checkpoint. Separate from the models, which
//! only say how layers follow each other, and from tensors, which know no names.

use std::cell::RefCell;
use std::collections::BTreeSet;

use candle_core::DType;

use crate::backend::{Activation, Backend, Conv2d as Conv2dOp, GroupNorm as GroupNormOp, Role};
use crate::error::Result;
use crate::tensor::{Tensor, Weight};
use crate::weights::{Changes, Checkpoint, Mismatch};

mod low_rank;

/// Loads one model's tensors onto a device: each is cast, packed and dropped before the next, so
/// that at no time more than one lives twice.
pub struct Loader<'a, B: Backend> {
    checkpoint: &'a Checkpoint,
    changes: Option<&'a Changes>,
    device: &'a B::Device,
    dtype: DType,
    ledger: RefCell<Ledger<'a>>,
}

struct Ledger<'a> {
    seen: BTreeSet<String>,
    mismatch: Mismatch,
    /// Told the bytes of each tensor that was loaded, as they are in the file.
    loaded: &'a mut dyn FnMut(u64) -> Result<()>,
}

impl<'a, B: Backend> Loader<'a, B> {
    /// A loader onto `device` as `dtype`; `loaded` hears of each tensor's bytes and may end it.
    pub fn new(
        checkpoint: &'a Checkpoint,
        device: &'a B::Device,
        dtype: DType,
        loaded: &'a mut dyn FnMut(u64) -> Result<()>,
    ) -> Self {
        let ledger = Ledger { seen: BTreeSet::new(), mismatch: Mismatch::default(), loaded };
        Self { checkpoint, changes: None, device, dtype, ledger: RefCell::new(ledger) }
    }

    /// The same loader, of weights with these changes.
    #[must_use]
    pub fn with_changes(self, changes: Option<&'a Changes>) -> Self {
        Self { changes, ..self }
    }

    /// The names at the top of the checkpoint.
    pub fn root(&self) -> Names<'_, 'a, B> {
        Names { loader: self, prefix: String::new() }
    }

    /// Whether everything that was asked for was there, and everything that is there was asked
    /// for, but for names that begin with one of `unused`.
    ///
    /// # Errors
    /// Names all tensors that are missing, of the wrong shape, or unexpected.
    pub fn finish(self, unused: &[&str]) -> Result<()> {
        let Ledger { seen, mut mismatch, .. } = self.ledger.into_inner();
        let expected =
            |name: &str| seen.contains(name) || unused.iter().any(|start| name.starts_with(start));
        let names = self.checkpoint.iter().map(|(name, _)| name);
        mismatch.unexpected.extend(names.filter(|name| !expected(name)).map(str::to_owned));
        mismatch.into_result()
    }

    /// The tensor `name` in the first of `shapes`. Of one that is missing or has another shape a
    /// note is taken, and zeros let the others be looked at too.
    fn take(&self, name: &str, shapes: &[&[usize]]) -> Result<Tensor<B>> {
        let mut ledger = self.ledger.borrow_mut();
        ledger.seen.insert(name.to_string());
        let shape = shapes.first().copied().unwrap_or_default();
        let placeholder = || Tensor::zeros(shape.to_vec(), self.dtype, self.device);
        let Some(host) = self.checkpoint.get(name) else {
            ledger.mismatch.missing.push(name.to_string());
            return placeholder();
        };
        let found = host.layout().dims();
        if !shapes.contains(&found) {
            ledger.mismatch.misshapen.push((name.into(), shape.to_vec(), found.to_vec()));
            return placeholder();
        }
        (ledger.loaded)(host.byte_len())?;
        let tensor = Tensor::upload(host, self.dtype, self.device)
            .map_err(|error| error.context(format!("loading {name}")))?;
        let tensor = tensor.reshape(shape.to_vec())?;
        match self.changes.and_then(|changes| changes.get(name)) {
            Some(changes) => self.changed(tensor, changes),
            None => Ok(tensor),
        }
        .map_err(|error| error.context(format!("changing {name}")))
    }
}

/// A place in the tree of names, such as `down_blocks.0.resnets.1`.
pub struct Names<'l, 'a, B: Backend> {
    loader: &'l Loader<'a, B>,
    prefix: String,
}

impl<'l, 'a, B: Backend> Names<'l, 'a, B> {
    /// The place `name` below this one.
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        Self { loader: self.loader, prefix: format!("{}{name}.", self.prefix) }
    }

    /// The tensor `name` here, of the first of `shapes`; others with as many elements are taken
    /// where checkpoints differ in form.
    ///
    /// # Errors
    /// If the device fails. A missing or wrong tensor is noted for [`Loader::finish`].
    pub fn tensor(&self, name: &str, shapes: &[&[usize]]) -> Result<Tensor<B>> {
        self.loader.take(&format!("{}{name}", self.prefix), shapes)
    }

    /// A constant of the model that is not in its checkpoint, in f32.
    ///
    /// # Errors
    /// If the device fails.
    pub fn constant(&self, values: &[f32]) -> Result<Tensor<B>> {
        Tensor::from_slice(values, values.len(), self.loader.device)
    }

    /// The dtype the model computes in.
    pub fn dtype(&self) -> DType {
        self.loader.dtype
    }
}

/// Whether a layer adds a vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// It does.
    Yes,
    /// It does not.
    No,
}

fn bias<B: Backend>(names: &Names<'_, '_, B>, bias: Bias, out: usize) -> Result<Option<Tensor<B>>> {
    match bias {
        Bias::Yes => names.tensor("bias", &[&[out]]).map(Some),
        Bias::No => Ok(None),
    }
}

/// torch's `Linear`.
pub struct Linear<B> {
    weight: Weight<B>,
    bias: Option<Tensor<B>>,
}

impl<B: Backend> Linear<B> {
    /// `weight` (out, in) and `bias` (out). A weight stored as a 1×1 convolution is taken too: old
    /// VAE attentions and UNets without linear projections are stored so.
    ///
    /// # Errors
    /// If the device fails.
    pub fn load(
        names: &Names<'_, '_, B>,
        inner: usize,
        out: usize,
        with_bias: Bias,
    ) -> Result<Self> {
        let weight = names.tensor("weight", &[&[out, inner], &[out, inner, 1, 1]])?;
        Ok(Self { weight: weight.prepare(Role::Linear)?, bias: bias(names, with_bias, out)? })
    }

    /// (…, in) → (…, out)
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward(&self, x: &Tensor<B>) -> Result<Tensor<B>> {
        self.forward_then(x, Activation::Identity)
    }

    /// (…, in) → (…, out), then the activation.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward_then(&self, x: &Tensor<B>, activation: Activation) -> Result<Tensor<B>> {
        x.linear(&self.weight, self.bias.as_ref(), activation)
    }

    /// (…, in) → (…, out), added to a `residual` of that shape.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward_onto(&self, x: &Tensor<B>, residual: &Tensor<B>) -> Result<Tensor<B>> {
        let (bias, activation) = (self.bias.as_ref(), Activation::Identity);
        x.linear_onto(&self.weight, bias, Some(residual), activation)
    }
}

/// torch's `Conv2d`.
pub struct Conv2d<B> {
    weight: Weight<B>,
    bias: Option<Tensor<B>>,
    op: Conv2dOp,
}

impl<B: Backend> Conv2d<B> {
    /// `weight` (out, in, kernel, kernel) and `bias` (out).
    ///
    /// # Errors
    /// If the device fails.
    pub fn load(
        names: &Names<'_, '_, B>,
        inner: usize,
        out: usize,
        kernel: usize,
        op: Conv2dOp,
    ) -> Result<Self> {
        let bias = bias(names, Bias::Yes, out)?;
        Ok(Self { bias, ..Self::load_unbiased(names, inner, out, kernel, op)? })
    }

    /// `weight` (out, in, kernel, kernel) alone.
    ///
    /// # Errors
    /// If the device fails.
    pub fn load_unbiased(
        names: &Names<'_, '_, B>,
        inner: usize,
        out: usize,
        kernel: usize,
        op: Conv2dOp,
    ) -> Result<Self> {
        let weight = names.tensor("weight", &[&[out, inner, kernel, kernel]])?;
        Ok(Self { weight: weight.prepare(Role::Conv2d { stride: op.stride })?, bias: None, op })
    }

    /// (batch, in, height, width) → (batch, out, height', width')
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward(&self, x: &Tensor<B>) -> Result<Tensor<B>> {
        self.forward_as(x, self.op)
    }

    /// As [`forward`](Self::forward) of the image enlarged to `height` × `width`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward_upsampled(
        &self,
        x: &Tensor<B>,
        size: crate::backend::Size2d,
    ) -> Result<Tensor<B>> {
        self.forward_as(x, Conv2dOp { upsample: Some(size), ..self.op })
    }

    /// As [`forward`](Self::forward), added to a `residual` of the result's shape.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward_onto(&self, x: &Tensor<B>, residual: &Tensor<B>) -> Result<Tensor<B>> {
        x.conv2d_onto(&self.weight, self.bias.as_ref(), Some(residual), self.op)
    }

    /// As [`forward`](Self::forward), with a `shift` (out) added to all pixels.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward_shifted(&self, x: &Tensor<B>, shift: &Tensor<B>) -> Result<Tensor<B>> {
        let bias = self.bias.as_ref().map(|bias| bias.add(shift)).transpose()?;
        x.conv2d(&self.weight, Some(bias.as_ref().unwrap_or(shift)), self.op)
    }

    fn forward_as(&self, x: &Tensor<B>, op: Conv2dOp) -> Result<Tensor<B>> {
        x.conv2d(&self.weight, self.bias.as_ref(), op)
    }
}

/// torch's `GroupNorm`, where diffusers puts a SiLU behind it with that.
pub struct GroupNorm<B> {
    weight: Tensor<B>,
    bias: Tensor<B>,
    op: GroupNormOp,
}

impl<B: Backend> GroupNorm<B> {
    /// `weight` and `bias` (channels).
    ///
    /// # Errors
    /// If the device fails.
    pub fn load(names: &Names<'_, '_, B>, channels: usize, op: GroupNormOp) -> Result<Self> {
        let weight = names.tensor("weight", &[&[channels]])?;
        Ok(Self { weight, bias: names.tensor("bias", &[&[channels]])?, op })
    }

    /// Its weight and bias, (channels) each, and its op.
    pub fn parts(&self) -> (&Tensor<B>, &Tensor<B>, GroupNormOp) {
        (&self.weight, &self.bias, self.op)
    }

    /// (batch, channels, height, width), the same shape.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward(&self, x: &Tensor<B>) -> Result<Tensor<B>> {
        x.group_norm(&self.weight, &self.bias, self.op)
    }
}

/// torch's `LayerNorm` over the last dimension.
pub struct LayerNorm<B> {
    weight: Tensor<B>,
    bias: Tensor<B>,
    eps: f64,
}

impl<B: Backend> LayerNorm<B> {
    /// `weight` and `bias` (width).
    ///
    /// # Errors
    /// If the device fails.
    pub fn load(names: &Names<'_, '_, B>, width: usize, eps: f64) -> Result<Self> {
        let weight = names.tensor("weight", &[&[width]])?;
        Ok(Self { weight, bias: names.tensor("bias", &[&[width]])?, eps })
    }

    /// (…, width), the same shape.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward(&self, x: &Tensor<B>) -> Result<Tensor<B>> {
        x.layer_norm(&self.weight, &self.bias, self.eps)
    }
}
