//! The remote device: makes buffers on a worker. Separate from the storage because everything that
//! brings bytes to the worker is here.

use std::fmt::Write;
use std::sync::Arc;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, DType, DeviceLocation, Result, Shape, WithDType};

use super::client::{self, Output, Session, Ticket};
use super::digests::Digests;
use super::hello::Offer;
use super::op::Op;
use super::storage::{Storage, check_same_worker};
use super::transport::BulkSource;
use super::upload::Uploads;
use super::wire::{MAX_INLINE_BYTES, Wire};
use super::wire_form::WireForm;
use crate::backend::elements::to_bytes;
use crate::backend::{Begun, HostTensor, Noise, Outputs, View};
use crate::error::Error;

/// A worker, by the session with it.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    session: Arc<Session>,
    uploads: Uploads,
    offer: Offer,
}

impl Device {
    /// The device behind `session`, which forgets the digests of weights with it.
    pub fn new(session: Arc<Session>) -> Self {
        Self::with(session, None, Offer::default())
    }

    /// The device behind `session`, which remembers the digests of weights in `digests`, if there
    /// are any, and of which the worker said this.
    pub fn with(session: Arc<Session>, digests: Option<Digests>, offer: Offer) -> Self {
        Self(Arc::new(Inner { session, uploads: Uploads::new(digests), offer }))
    }

    /// The session.
    pub fn session(&self) -> &Arc<Session> {
        &self.0.session
    }

    fn create(&self, op: Op) -> crate::Result<Storage> {
        let meta = op.infer(&[])?;
        let id = self.session().call_op(&op, std::iter::empty())?;
        Ok(Storage::new(self.clone(), id, meta))
    }

    /// Small tensors travel between the ops, large ones beside them.
    fn send(&self, dtype: DType, bytes: Vec<u8>) -> crate::Result<Storage> {
        if bytes.len() <= MAX_INLINE_BYTES {
            return self.create(Op::Constant { dtype, bytes });
        }
        let len = bytes.len() / dtype.size_in_bytes();
        let op = self.session().transfer(|transfer| {
            let op = Op::Received { transfer, dtype, len };
            let mut header = Vec::new();
            op.put(&mut header);
            (source(header, bytes), op)
        })?;
        self.create(op)
    }
}

impl crate::backend::Device for Device {
    type Mark = Ticket;

    fn mark(&self) -> crate::Result<Ticket> {
        self.session().mark()
    }

    fn wait(&self, mark: Ticket) -> crate::Result<()> {
        self.session().done(mark).map(drop)
    }

    fn is_reached(&self, mark: &Ticket) -> bool {
        self.session().is_answered(mark)
    }

    fn begin_program(&self, key: &str, inputs: &[&Storage]) -> crate::Result<Begun<Storage>> {
        check_same_worker(self, inputs.iter().copied())?;
        let ids: Vec<_> = inputs.iter().map(|storage| storage.id()).collect();
        let mut key = key.to_string();
        for (storage, id) in inputs.iter().zip(&ids) {
            // A view that is all of one buffer and a part of another is sent in two ways, and what
            // was one buffer twice says nothing of two.
            let (layout, same) = (&storage.meta().layout, ids.iter().position(|own| own == id));
            let same = same.unwrap_or_default();
            // Writing to a String cannot fail.
            let _ = write!(key, " of {:?} {:?} #{same}", layout.dims(), layout.stride());
        }
        Ok(match self.session().begin_program(&key, ids)? {
            client::Begun::Recording => Begun::Record,
            client::Begun::Replayed(outputs) => {
                let storage =
                    |(id, Output { meta, layout })| (Storage::new(self.clone(), id, meta), layout);
                Begun::Replayed(outputs.into_iter().map(storage).collect())
            }
        })
    }

    fn end_program(
        &self,
        outputs: &[View<'_, Storage>],
    ) -> crate::Result<Option<Outputs<Storage>>> {
        let output = |view: &View<'_, Storage>| {
            let (meta, layout) = (view.storage.meta().clone(), view.layout.clone());
            (view.storage.id(), Output { meta, layout })
        };
        check_same_worker(self, outputs.iter().map(|view| view.storage))
            .inspect_err(|_| self.abort_program())?;
        self.session().end_program(outputs.iter().map(output).collect())?;
        Ok(None)
    }

    fn abort_program(&self) {
        self.session().abort_program();
    }

    fn announce(
        &self,
        tensors: &[&HostTensor],
        dtype: DType,
        progress: &mut dyn FnMut(u64, u64) -> crate::Result<()>,
    ) -> crate::Result<()> {
        let weights: Vec<_> = tensors.iter().map(|tensor| WireForm::new(tensor, dtype)).collect();
        self.0.uploads.announce(self.session(), &weights, progress)
    }

    fn name(&self) -> String {
        self.session().name().to_string()
    }

    fn kernel_path(&self) -> Option<String> {
        self.0.offer.kernel_path.clone()
    }

    /// The worker knows what its device does best.
    fn default_dtype(&self) -> DType {
        self.0.offer.default_dtype.unwrap_or(DType::F32)
    }

    fn randn(&self, noise: Noise, shape: &Shape, dtype: DType) -> crate::Result<Storage> {
        self.create(Op::Randn { noise, dtype, dims: shape.dims().to_vec() })
    }

    fn upload(&self, tensor: &HostTensor, dtype: DType) -> crate::Result<Storage> {
        let weight = WireForm::new(tensor, dtype);
        let digest = self.0.uploads.digest(self.session(), &weight)?;
        self.create(Op::Weight { digest, dtype, dims: tensor.layout().dims().to_vec() })
    }
}

impl BackendDevice for Device {
    type Storage = Storage;

    fn new(_: usize) -> Result<Self> {
        candle_core::bail!("a remote device is made by connecting to a worker, not by a number")
    }

    /// candle knows no remote places; [`same_device`](Self::same_device) decides.
    fn location(&self) -> DeviceLocation {
        DeviceLocation::Cpu
    }

    fn same_device(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn zeros_impl(&self, shape: &Shape, dtype: DType) -> Result<Storage> {
        Ok(self.create(Op::Zeros { dtype, dims: shape.dims().to_vec() })?)
    }

    unsafe fn alloc_uninit(&self, shape: &Shape, dtype: DType) -> Result<Storage> {
        // Zeroed: old memory of a worker may be somebody else's.
        self.zeros_impl(shape, dtype)
    }

    fn storage_from_slice<T: WithDType>(&self, values: &[T]) -> Result<Storage> {
        self.storage_from_cpu_storage_owned(T::to_cpu_storage(values))
    }

    fn storage_from_cpu_storage(&self, values: &CpuStorage) -> Result<Storage> {
        Ok(self.send(values.dtype(), to_bytes(values)?)?)
    }

    fn storage_from_cpu_storage_owned(&self, values: CpuStorage) -> Result<Storage> {
        self.storage_from_cpu_storage(&values)
    }

    fn rand_uniform(&self, shape: &Shape, dtype: DType, from: f64, to: f64) -> Result<Storage> {
        let dims = shape.dims().to_vec();
        Ok(self.create(Op::RandUniform { from, to, dtype, dims })?)
    }

    fn rand_normal(&self, shape: &Shape, dtype: DType, mean: f64, std: f64) -> Result<Storage> {
        let dims = shape.dims().to_vec();
        Ok(self.create(Op::RandNormal { mean, std, dtype, dims })?)
    }

    fn set_seed(&self, _: u64) -> Result<()> {
        candle_core::bail!("a worker's own noise has no seed; use Tensor::randn, which has")
    }

    fn get_current_seed(&self) -> Result<u64> {
        candle_core::bail!("a worker's own noise has no seed; use Tensor::randn, which has")
    }

    fn synchronize(&self) -> Result<()> {
        self.session().done(self.session().mark()?)?;
        Ok(())
    }
}

/// A transfer of bytes that are in memory.
fn source(header: Vec<u8>, bytes: Vec<u8>) -> BulkSource {
    let len = bytes.len() as u64;
    let mut rest = std::io::Cursor::new(bytes);
    let read = move |buffer: &mut [u8]| {
        std::io::Read::read(&mut rest, buffer).map_err(|error| Error::other(error.to_string()))
    };
    BulkSource { header, len, read: Box::new(read) }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "remote::Device({})", self.session().name())
    }
}
