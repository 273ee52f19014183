//! Two devices that look like one: every op runs on both, and their results are compared before
//! the next op. Separate because it is how the first wrong op is found, on any pair of backends,
//! without a line in models, tensors or either backend: what runs is what runs without it.
//!
//! Memory order is part of an op's definition, so the two buffers are compared element by element
//! as they lie. Where they differ within the dtype's [`Tolerance`] the second device goes on with
//! the first one's result: each op is judged on equal operands, and nothing drifts. Where they
//! differ by more, the op fails, and [`Device::findings`] says all about it.
//!
//! A prepared weight is opaque, and each device may keep another form of it: it is not compared,
//! the ops that use it are. Noise of candle's that has no seed is drawn by the first device alone.

mod difference;
mod storage;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, DType, DeviceLocation, Layout, Shape, WithDType};

pub use difference::{Gap, Mismatch, Tolerance};
pub use storage::Storage;

use self::difference::{Verdict, compare};
use super::{Backend, Begun, Device as _, HostTensor, Noise, Outputs, View};
use crate::error::{Error, Result};

/// The message of an op whose results differ: what stands before it is where that happened.
pub const DIFFERS: &str = "the two devices differ";

/// Two devices, and what was found about them. Clones share it.
pub struct Device<A: Backend, B: Backend> {
    a: A::Device,
    b: B::Device,
    findings: Arc<Mutex<Findings>>,
}

/// What a pair of devices did so far.
#[derive(Debug, Clone, Default)]
pub struct Findings {
    /// Ops that were asked for; they are numbered from 1.
    pub ops: u64,
    /// Of these, ops whose results were compared.
    pub compared: u64,
    /// Of these, ops whose results were equal bit for bit.
    pub identical: u64,
    /// Marks that were set: see [`mark`](super::Device::mark).
    pub marks: u64,
    /// Of the results that differ and may, the one that differs most for what its dtype allows.
    pub closest: Option<(Call, Gap)>,
    /// The first op whose results differ beyond the tolerance.
    pub divergence: Option<Divergence>,
}

/// The first op that differs.
#[derive(Debug, Clone)]
pub struct Divergence {
    /// The op.
    pub call: Call,
    /// How its results differ.
    pub mismatch: Mismatch,
}

/// An op that was asked for.
#[derive(Debug, Clone)]
pub struct Call {
    /// Its number, from 1.
    pub number: u64,
    /// As in the traits.
    pub name: &'static str,
    /// Its attributes, for people; may be empty.
    pub attributes: String,
    /// What it was given.
    pub operands: Vec<Operand>,
}

/// An operand of a [`Call`].
#[derive(Debug, Clone)]
pub struct Operand {
    /// The element type.
    pub dtype: DType,
    /// Shape, strides and offset, in elements; `None` is the whole buffer.
    pub layout: Option<Layout>,
    /// Number and name of the op that made its buffer, or wrote into it last.
    pub made_by: (u64, &'static str),
}

impl Call {
    /// Number and name.
    fn id(&self) -> (u64, &'static str) {
        (self.number, self.name)
    }
}

impl<A: Backend, B: Backend> Device<A, B> {
    /// The pair of two devices, of which the first is the one that sets the example.
    pub fn new(a: A::Device, b: B::Device) -> Self {
        Self { a, b, findings: Arc::default() }
    }

    /// What was found so far.
    pub fn findings(&self) -> Findings {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Findings> {
        self.findings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives an op its number.
    fn call(&self, name: &'static str, attributes: String, operands: Vec<Operand>) -> Call {
        let mut findings = self.lock();
        findings.ops += 1;
        Call { number: findings.ops, name, attributes, operands }
    }

    /// Both results of an op, or why there are not both.
    fn done<T, U>(
        &self,
        call: &Call,
        a: std::result::Result<T, impl Into<Error>>,
        b: std::result::Result<U, impl Into<Error>>,
    ) -> Result<(T, U)> {
        let a = a.map_err(|error| failure(call, &self.a.name(), error))?;
        let b = b.map_err(|error| failure(call, &self.b.name(), error))?;
        Ok((a, b))
    }

    /// Both results as one, compared.
    fn join(
        &self,
        call: Call,
        a: std::result::Result<A, impl Into<Error>>,
        b: std::result::Result<B, impl Into<Error>>,
    ) -> Result<Storage<A, B>> {
        let (a, b) = self.done(&call, a, b)?;
        let made_by = call.id();
        let b = self.judge(call, &a, &b)?.unwrap_or(b);
        Ok(Storage { a, b, device: self.clone(), made_by })
    }

    /// Compares the results of an op; returns what the second device must go on with if that is
    /// not its own.
    fn judge(&self, call: Call, a: &A, b: &B) -> Result<Option<B>> {
        let (read_a, read_b) = (a.to_cpu_storage(), b.to_cpu_storage());
        let (a, b) = self.done(&call, read_a, read_b)?;
        let verdict = compare(&a, &b);
        let mut findings = self.lock();
        findings.compared += 1;
        match verdict {
            Verdict::Identical => {
                findings.identical += 1;
                Ok(None)
            }
            Verdict::Within(gap) => {
                let closest = findings.closest.as_ref();
                if closest.is_none_or(|(_, closest)| closest.share() < gap.share()) {
                    findings.closest = Some((call, gap));
                }
                drop(findings);
                Ok(Some(self.b.storage_from_cpu_storage_owned(a)?))
            }
            Verdict::Beyond(mismatch) => {
                findings.divergence.get_or_insert(Divergence { call, mismatch });
                Err(Error::other(DIFFERS))
            }
        }
    }
}

/// Why there is nothing to compare.
fn failure(call: &Call, device: &str, error: impl Into<Error>) -> Error {
    error.into().context(format!("op {}, {}, on {device}", call.number, call.name))
}

impl<A: Backend, B: Backend> Clone for Device<A, B> {
    fn clone(&self) -> Self {
        Self { a: self.a.clone(), b: self.b.clone(), findings: self.findings.clone() }
    }
}

impl<A: Backend, B: Backend> fmt::Debug for Device<A, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "twin::Device({:?}, {:?})", self.a, self.b)
    }
}

/// `conv2d, Conv2d { stride: 1, … }`.
impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        if self.attributes.is_empty() { Ok(()) } else { write!(f, ", {}", self.attributes) }
    }
}

/// `f32 [1, 4, 8, 8] strides [256, 1, 32, 4] offset 0, from op 7 (conv2d)`.
impl fmt::Display for Operand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (dtype, (number, name)) = (self.dtype.as_str(), self.made_by);
        match &self.layout {
            Some(layout) => write!(f, "{dtype} {}, from op {number} ({name})", show(layout)),
            None => write!(f, "{dtype}, the whole buffer, from op {number} ({name})"),
        }
    }
}

/// Shape, strides and offset.
fn show(layout: &Layout) -> String {
    let (dims, stride, offset) = (layout.dims(), layout.stride(), layout.start_offset());
    format!("{dims:?} strides {stride:?} offset {offset}")
}

impl<A: Backend, B: Backend> super::Device for Device<A, B> {
    type Mark = (<A::Device as super::Device>::Mark, <B::Device as super::Device>::Mark);

    fn mark(&self) -> Result<Self::Mark> {
        self.lock().marks += 1;
        Ok((self.a.mark()?, self.b.mark()?))
    }

    fn wait(&self, (a, b): Self::Mark) -> Result<()> {
        self.a.wait(a)?;
        self.b.wait(b)
    }

    fn is_reached(&self, (a, b): &Self::Mark) -> bool {
        self.a.is_reached(a) && self.b.is_reached(b)
    }

    /// Op by op: of what is replayed only the end could be compared.
    fn begin_program(&self, _: &str, _: &[&Storage<A, B>]) -> Result<Begun<Storage<A, B>>> {
        Ok(Begun::Run)
    }

    fn end_program(&self, _: &[View<'_, Storage<A, B>>]) -> Result<Option<Outputs<Storage<A, B>>>> {
        Ok(None)
    }

    fn abort_program(&self) {}

    fn announce(
        &self,
        tensors: &[&HostTensor],
        dtype: DType,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        self.a.announce(tensors, dtype, progress)?;
        self.b.announce(tensors, dtype, progress)
    }

    fn name(&self) -> String {
        format!("{} and {}", self.a.name(), self.b.name())
    }

    fn default_dtype(&self) -> DType {
        self.a.default_dtype()
    }

    fn randn(&self, noise: Noise, shape: &Shape, dtype: DType) -> Result<Storage<A, B>> {
        let Noise { seed, skip } = noise;
        let attributes = format!("seed {seed}, skip {skip}, {dtype:?} {:?}", shape.dims());
        let call = self.call("randn", attributes, Vec::new());
        self.join(call, self.a.randn(noise, shape, dtype), self.b.randn(noise, shape, dtype))
    }

    fn upload(&self, tensor: &HostTensor, dtype: DType) -> Result<Storage<A, B>> {
        let (stored, layout) = (tensor.dtype().as_str(), show(tensor.layout()));
        let attributes = format!("{stored} {layout} as {}", dtype.as_str());
        let call = self.call("upload", attributes, Vec::new());
        self.join(call, self.a.upload(tensor, dtype), self.b.upload(tensor, dtype))
    }
}

impl<A: Backend, B: Backend> Device<A, B> {
    /// What only the first device makes, for both.
    fn copied(&self, a: A) -> candle_core::Result<Storage<A, B>> {
        let call = self.call("random", String::new(), Vec::new());
        let b = a.to_cpu_storage().and_then(|a| self.b.storage_from_cpu_storage_owned(a));
        Ok(self.join(call, candle_core::Result::Ok(a), b)?)
    }
}

impl<A: Backend, B: Backend> BackendDevice for Device<A, B> {
    type Storage = Storage<A, B>;

    fn new(_: usize) -> candle_core::Result<Self> {
        candle_core::bail!("a pair of devices is made of two devices, not by a number")
    }

    /// candle knows no places for pairs; [`same_device`](Self::same_device) decides.
    fn location(&self) -> DeviceLocation {
        self.a.location()
    }

    fn same_device(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.findings, &other.findings)
    }

    fn zeros_impl(&self, shape: &Shape, dtype: DType) -> candle_core::Result<Storage<A, B>> {
        let call = self.call("zeros", format!("{dtype:?} {:?}", shape.dims()), Vec::new());
        let (a, b) = (self.a.zeros_impl(shape, dtype), self.b.zeros_impl(shape, dtype));
        Ok(self.join(call, a, b)?)
    }

    unsafe fn alloc_uninit(
        &self,
        shape: &Shape,
        dtype: DType,
    ) -> candle_core::Result<Storage<A, B>> {
        // Zeroed: old memory is nothing to compare.
        self.zeros_impl(shape, dtype)
    }

    fn storage_from_slice<T: WithDType>(&self, values: &[T]) -> candle_core::Result<Storage<A, B>> {
        let call = self.call("constant", constant(T::DTYPE), Vec::new());
        let (a, b) = (self.a.storage_from_slice(values), self.b.storage_from_slice(values));
        Ok(self.join(call, a, b)?)
    }

    fn storage_from_cpu_storage(&self, values: &CpuStorage) -> candle_core::Result<Storage<A, B>> {
        let call = self.call("constant", constant(values.dtype()), Vec::new());
        let a = self.a.storage_from_cpu_storage(values);
        Ok(self.join(call, a, self.b.storage_from_cpu_storage(values))?)
    }

    fn storage_from_cpu_storage_owned(
        &self,
        values: CpuStorage,
    ) -> candle_core::Result<Storage<A, B>> {
        let call = self.call("constant", constant(values.dtype()), Vec::new());
        let a = self.a.storage_from_cpu_storage(&values);
        Ok(self.join(call, a, self.b.storage_from_cpu_storage_owned(values))?)
    }

    fn rand_uniform(
        &self,
        shape: &Shape,
        dtype: DType,
        from: f64,
        to: f64,
    ) -> candle_core::Result<Storage<A, B>> {
        self.copied(self.a.rand_uniform(shape, dtype, from, to)?)
    }

    fn rand_normal(
        &self,
        shape: &Shape,
        dtype: DType,
        mean: f64,
        std: f64,
    ) -> candle_core::Result<Storage<A, B>> {
        self.copied(self.a.rand_normal(shape, dtype, mean, std)?)
    }

    fn set_seed(&self, seed: u64) -> candle_core::Result<()> {
        self.a.set_seed(seed)
    }

    fn get_current_seed(&self) -> candle_core::Result<u64> {
        self.a.get_current_seed()
    }

    fn synchronize(&self) -> candle_core::Result<()> {
        self.a.synchronize()?;
        self.b.synchronize()
    }
}

/// The attributes of what comes from the host.
fn constant(dtype: DType) -> String {
    dtype.as_str().to_owned()
}
