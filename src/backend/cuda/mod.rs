//! An NVIDIA GPU: its own storage and device. The kernels are compiled when they are first needed,
//! by libraries that are loaded where they are there, so that building needs no toolkit and the
//! program starts without a driver.
//!
//! What models use runs on the GPU; what only candle's traits ask for is computed on the host
//! (`on_host`), correct and slow, and counted.

mod arguments;
pub mod driver;
mod fused;
mod launching;
pub mod nvidia;
mod on_host;
pub mod sources;
mod storage;
mod window;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cpu_backend::CpuDevice as CandleDevice;
use candle_core::{CpuStorage, DType, DeviceLocation, Shape, WithDType};

use crate::backend::{Begun, HostTensor, Noise, View, cpu};
use crate::error::{Error, Result};
use driver::{Address, Driver, Launch, Reached};

pub use storage::Storage;

/// A GPU.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    driver: Box<dyn Driver>,
    /// For ops without a kernel.
    host: cpu::Device,
    launches: AtomicU64,
    on_host: AtomicU64,
}

impl Device {
    /// The GPU of a driver.
    ///
    /// # Errors
    /// If the threads for ops without a kernel cannot be started.
    pub fn new(driver: impl Driver) -> Result<Self> {
        let (launches, on_host) = (AtomicU64::new(0), AtomicU64::new(0));
        let host = cpu::Device::with_threads(0)?;
        Ok(Self(Arc::new(Inner { driver: Box::new(driver), host, launches, on_host })))
    }

    /// How many kernels were launched so far.
    pub fn launches(&self) -> u64 {
        self.0.launches.load(Ordering::Relaxed)
    }

    /// How many ops were computed on the host so far, for want of a kernel.
    pub fn ops_on_host(&self) -> u64 {
        self.0.on_host.load(Ordering::Relaxed)
    }

    fn driver(&self) -> &dyn Driver {
        &*self.0.driver
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.0.launches.fetch_add(1, Ordering::Relaxed);
        self.driver().launch(launch)
    }

    fn host(&self) -> &cpu::Device {
        &self.0.host
    }

    fn multiprocessors(&self) -> usize {
        self.driver().multiprocessors()
    }

    /// Whether attention of this type has kernels for tensor cores.
    fn multiplies_halves(&self, dtype: DType) -> bool {
        match dtype {
            DType::F16 => true,
            DType::BF16 => self.driver().architecture() >= 80,
            _ => false,
        }
    }

    /// A buffer for elements that a kernel is to write, all of them.
    fn elements(&self, dtype: DType, elements: usize) -> Result<Storage> {
        let bytes = elements.checked_mul(dtype.size_in_bytes());
        let bytes = bytes.ok_or_else(|| Error::other(format!("{elements} are too many")))?;
        Ok(Storage::new(self.buffer(bytes)?, dtype, elements))
    }

    fn count_on_host(&self) {
        self.0.on_host.fetch_add(1, Ordering::Relaxed);
    }

    /// Memory for so many bytes; its content is not defined.
    fn buffer(&self, bytes: usize) -> Result<Buffer> {
        // Of nothing, a byte: an address that is no other buffer's.
        let address = self.driver().allocate(bytes.max(1))?;
        Ok(Buffer { address, bytes, device: self.clone() })
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda::Device({:?})", self.0.driver)
    }
}

/// A piece of the GPU's memory, given back when it is dropped.
struct Buffer {
    address: Address,
    bytes: usize,
    device: Device,
}

impl Buffer {
    fn of(device: &Device, bytes: &[u8]) -> Result<Self> {
        let buffer = device.buffer(bytes.len())?;
        device.driver().write(buffer.address, bytes)?;
        Ok(buffer)
    }

    fn read(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.bytes];
        self.device.driver().read(self.address, &mut bytes)?;
        Ok(bytes)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.device.driver().free(self.address);
    }
}

impl super::Device for Device {
    type Mark = Box<dyn Reached>;

    fn mark(&self) -> Result<Self::Mark> {
        self.driver().mark()
    }

    fn wait(&self, mark: Self::Mark) -> Result<()> {
        mark.wait()
    }

    fn is_reached(&self, mark: &Self::Mark) -> bool {
        mark.is_reached()
    }

    fn begin_program(&self, _: &str, _: &[&Storage]) -> Result<Begun<Storage>> {
        Ok(Begun::Run)
    }

    fn end_program(&self, _: &[View<'_, Storage>]) -> Result<()> {
        Ok(())
    }

    fn abort_program(&self) {}

    /// The bus is not waited for.
    fn announce(
        &self,
        _: &[&HostTensor],
        _: DType,
        _: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        Ok(())
    }

    fn name(&self) -> String {
        format!("cuda:{}", self.driver().ordinal())
    }

    fn default_dtype(&self) -> DType {
        DType::F16
    }

    fn randn(&self, noise: Noise, shape: &Shape, dtype: DType) -> Result<Storage> {
        let drawn = self.host().randn(noise, shape, dtype)?;
        Storage::of_host(self, &drawn.to_cpu_storage()?)
    }

    fn upload(&self, tensor: &HostTensor, dtype: DType) -> Result<Storage> {
        Storage::of_host(self, &cpu::cast(tensor, dtype)?)
    }
}

impl BackendDevice for Device {
    type Storage = Storage;

    fn new(ordinal: usize) -> candle_core::Result<Self> {
        Ok(Self::new(nvidia::Nvidia::open(ordinal)?)?)
    }

    fn location(&self) -> DeviceLocation {
        DeviceLocation::Cuda { gpu_id: self.driver().ordinal() }
    }

    fn same_device(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn zeros_impl(&self, shape: &Shape, dtype: DType) -> candle_core::Result<Storage> {
        let elements = shape.elem_count();
        let bytes = elements.checked_mul(dtype.size_in_bytes());
        let bytes = bytes.ok_or_else(|| Error::other(format!("{shape:?} is too large")))?;
        let buffer = self.buffer(bytes)?;
        self.driver().clear(buffer.address, bytes)?;
        Ok(Storage::new(buffer, dtype, elements))
    }

    unsafe fn alloc_uninit(&self, shape: &Shape, dtype: DType) -> candle_core::Result<Storage> {
        // Zeroed: a shared worker must not show old memory.
        self.zeros_impl(shape, dtype)
    }

    fn storage_from_slice<T: WithDType>(&self, values: &[T]) -> candle_core::Result<Storage> {
        Ok(Storage::of_host(self, &T::to_cpu_storage(values))?)
    }

    fn storage_from_cpu_storage(&self, values: &CpuStorage) -> candle_core::Result<Storage> {
        Ok(Storage::of_host(self, values)?)
    }

    fn storage_from_cpu_storage_owned(&self, values: CpuStorage) -> candle_core::Result<Storage> {
        Ok(Storage::of_host(self, &values)?)
    }

    fn rand_uniform(
        &self,
        shape: &Shape,
        dtype: DType,
        from: f64,
        to: f64,
    ) -> candle_core::Result<Storage> {
        self.storage_from_cpu_storage_owned(CandleDevice.rand_uniform(shape, dtype, from, to)?)
    }

    fn rand_normal(
        &self,
        shape: &Shape,
        dtype: DType,
        mean: f64,
        std: f64,
    ) -> candle_core::Result<Storage> {
        self.storage_from_cpu_storage_owned(CandleDevice.rand_normal(shape, dtype, mean, std)?)
    }

    fn set_seed(&self, _: u64) -> candle_core::Result<()> {
        candle_core::bail!("this device's own noise has no seed; use Tensor::randn, which has")
    }

    fn get_current_seed(&self) -> candle_core::Result<u64> {
        candle_core::bail!("this device's own noise has no seed; use Tensor::randn, which has")
    }

    fn synchronize(&self) -> candle_core::Result<()> {
        Ok(self.driver().mark()?.wait()?)
    }
}
