//! The tensor that models are written over: a shared storage on any [`Backend`] and candle's
//! [`Layout`]. Separate from the backends because views are arithmetic here and nothing there:
//! `reshape`, `transpose`, `narrow`, `broadcast_as` make no op and no message.
//!
//! Two rules hold everywhere. A view never drops its start offset. The memory order of a result is
//! part of the op's definition: elementwise results follow their first full operand
//! ([`memory_order`](crate::backend::order::memory_order)), so channels-last images stay so.

mod ops;
mod program;
pub mod reference;
mod transfer;
mod view;

pub use ops::Weight;
pub use program::program;

use std::marker::PhantomData;
use std::sync::Arc;

use candle_core::backend::BackendDevice;
use candle_core::{DType, Layout, Shape, WithDType};

use crate::backend::{self, Backend, Device, HostTensor, MetaRef, Noise};
use crate::error::{Error, Result};

/// A view of a storage. Cloning shares the storage.
pub struct Tensor<B> {
    storage: Arc<B>,
    layout: Layout,
}

impl<B> Clone for Tensor<B> {
    fn clone(&self) -> Self {
        Self { storage: self.storage.clone(), layout: self.layout.clone() }
    }
}

impl<B: Backend> std::fmt::Debug for Tensor<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (dims, stride, offset) =
            (self.layout.dims(), self.layout.stride(), self.layout.start_offset());
        write!(f, "{dims:?} {} strides {stride:?} offset {offset}", self.dtype().as_str())
    }
}

impl<B: Backend> Tensor<B> {
    /// Row-major values from the host.
    ///
    /// # Errors
    /// If the shape does not have as many elements, or the memory cannot be had.
    pub fn from_slice<T: WithDType>(
        values: &[T],
        shape: impl Into<Shape>,
        device: &B::Device,
    ) -> Result<Self> {
        let shape = shape.into();
        if shape.elem_count() != values.len() {
            let (have, dims) = (values.len(), shape.dims());
            return Err(Error::other(format!("{have} values for a tensor of shape {dims:?}")));
        }
        Ok(Self::dense(device.storage_from_slice(values)?, shape))
    }

    /// All zeros.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn zeros(shape: impl Into<Shape>, dtype: DType, device: &B::Device) -> Result<Self> {
        let shape = shape.into();
        Ok(Self::dense(device.zeros_impl(&shape, dtype)?, shape))
    }

    /// torch's normal noise (see [`Device::randn`]).
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn randn(
        noise: Noise,
        shape: impl Into<Shape>,
        dtype: DType,
        device: &B::Device,
    ) -> Result<Self> {
        let shape = shape.into();
        Ok(Self::dense(device.randn(noise, &shape, dtype)?, shape))
    }

    /// A tensor of a weight file, row-major and as `dtype`.
    ///
    /// # Errors
    /// If the memory cannot be had or the cast is not possible.
    pub fn upload(host: &HostTensor, dtype: DType, device: &B::Device) -> Result<Self> {
        Ok(Self::dense(device.upload(host, dtype)?, host.layout().shape().clone()))
    }

    /// A storage in row-major order.
    fn dense(storage: B, shape: Shape) -> Self {
        Self { storage: Arc::new(storage), layout: Layout::contiguous(shape) }
    }

    /// The whole layout: shape, strides and start offset.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The buffer that this is a view of.
    pub fn storage(&self) -> &Arc<B> {
        &self.storage
    }

    /// Sizes of the dimensions.
    pub fn dims(&self) -> &[usize] {
        self.layout.dims()
    }

    /// The sizes of exactly `N` dimensions.
    ///
    /// # Errors
    /// If the tensor has another number of dimensions.
    pub fn dims_exact<const N: usize>(&self) -> Result<[usize; N]> {
        self.dims().try_into().map_err(|_| {
            Error::other(format!("expected {N} dimensions, found shape {:?}", self.dims()))
        })
    }

    /// Number of elements.
    pub fn elem_count(&self) -> usize {
        self.layout.shape().elem_count()
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.storage.dtype()
    }

    /// Where it lives.
    pub fn device(&self) -> &B::Device {
        self.storage.device()
    }

    /// What shape inference needs of it.
    pub fn meta(&self) -> MetaRef<'_> {
        MetaRef { dtype: self.dtype(), layout: &self.layout }
    }

    /// The elements in row-major order, read to the host: on a remote device one round trip.
    ///
    /// # Errors
    /// If the dtype is not `T`, or whatever went wrong on the way to this tensor.
    pub fn to_vec<T: WithDType>(&self) -> Result<Vec<T>> {
        self.begin_read::<T>()?.finish()
    }

    /// As [`to_vec`](Self::to_vec), but asks now and waits when the [`Reading`] is finished: what a
    /// remote device does in between is not held up.
    ///
    /// # Errors
    /// If the dtype is not `T`, or the device is gone.
    pub fn begin_read<T: WithDType>(&self) -> Result<Reading<T>> {
        self.check_dtype(T::DTYPE)?;
        let (reading, count) = (self.at_start()?.storage.begin_read()?, self.elem_count());
        Ok(Reading { reading, count, element: PhantomData })
    }

    fn check_dtype(&self, want: DType) -> Result<()> {
        if self.dtype() != want {
            let (have, want) = (self.dtype().as_str(), want.as_str());
            return Err(Error::other(format!("a tensor of {have} was read as {want}")));
        }
        Ok(())
    }

    /// The elements in row-major order at the start of a storage.
    fn at_start(&self) -> Result<Self> {
        let is_at_start = self.layout.is_contiguous() && self.layout.start_offset() == 0;
        if is_at_start { Ok(self.clone()) } else { self.copy() }
    }
}

/// Elements on their way to the host.
pub struct Reading<T> {
    reading: backend::Reading,
    count: usize,
    element: PhantomData<T>,
}

impl<T: WithDType> Reading<T> {
    /// Waits for them.
    ///
    /// # Errors
    /// Whatever went wrong on the way to the tensor.
    pub fn finish(self) -> Result<Vec<T>> {
        let mut values = T::cpu_storage_data((self.reading)()?)?;
        values.truncate(self.count);
        Ok(values)
    }
}
