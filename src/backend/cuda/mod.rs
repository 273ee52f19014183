//! An NVIDIA GPU: its own storage and device. The kernels are compiled when they are first needed,
//! by libraries that are loaded where they are there, so that building needs no toolkit and the
//! program starts without a driver.
//!
//! What models use runs on the GPU; what only candle's traits ask for is computed on the host
//! (`on_host`), correct and slow, and counted.

mod arguments;
pub mod compiler;
pub mod driver;
mod fused;
pub mod kernel_cache;
mod launching;
mod memory;
pub mod nvidia;
mod on_host;
mod programs;
pub mod sources;
mod storage;
mod window;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cpu_backend::CpuDevice as CandleDevice;
use candle_core::{CpuStorage, DType, DeviceLocation, Shape, WithDType};

use crate::backend::{Begun, HostTensor, Noise, Outputs, View, cpu};
use crate::error::{Error, Result};
use driver::{Driver, Launch, Reached};
use memory::{Counts, Hardware, Memory};
use programs::Programs;

pub use storage::Storage;

/// A GPU.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    hardware: Arc<Hardware>,
    /// For ops without a kernel.
    host: cpu::Device,
    programs: Programs,
}

impl Device {
    /// A GPU of this machine, whose compiled kernels are kept for this user.
    ///
    /// # Errors
    /// If there is no driver, or no GPU of this number.
    pub fn open(ordinal: usize) -> Result<Self> {
        Self::new(nvidia::Nvidia::open(ordinal, kernel_cache::KernelCache::of_user())?)
    }

    /// The GPU of a driver.
    ///
    /// # Errors
    /// If the threads for ops without a kernel cannot be started.
    pub fn new(driver: impl Driver) -> Result<Self> {
        let hardware = Hardware { driver: Box::new(driver), counts: Counts::default() };
        let (hardware, host) = (Arc::new(hardware), cpu::Device::with_threads(0)?);
        Ok(Self(Arc::new(Inner { hardware, host, programs: Programs::default() })))
    }

    /// How many kernels were launched so far, one by one.
    pub fn launches(&self) -> u64 {
        self.counts().launches.load(Ordering::Relaxed)
    }

    /// How many programs were launched so far as a whole.
    pub fn replays(&self) -> u64 {
        self.counts().replays.load(Ordering::Relaxed)
    }

    /// How many ops were computed on the host so far, for want of a kernel.
    pub fn ops_on_host(&self) -> u64 {
        self.counts().on_host.load(Ordering::Relaxed)
    }

    fn hardware(&self) -> &Arc<Hardware> {
        &self.0.hardware
    }

    fn driver(&self) -> &dyn Driver {
        &*self.0.hardware.driver
    }

    fn counts(&self) -> &Counts {
        &self.0.hardware.counts
    }

    fn programs(&self) -> &Programs {
        &self.0.programs
    }

    fn launch(&self, launch: Launch) -> Result<()> {
        self.counts().launches.fetch_add(1, Ordering::Relaxed);
        self.driver().launch(&launch)?;
        self.programs().note(launch);
        Ok(())
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
        Ok(Storage::new(Buffer::new(self, bytes)?, dtype, elements))
    }

    fn count_on_host(&self) {
        self.counts().on_host.fetch_add(1, Ordering::Relaxed);
        self.programs().refuse();
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda::Device({:?})", self.driver())
    }
}

/// Memory, and the device that has it.
struct Buffer {
    memory: Arc<Memory>,
    device: Device,
}

impl Buffer {
    /// So many bytes, whose content is not defined until a kernel has written it.
    fn new(device: &Device, bytes: usize) -> Result<Self> {
        Self::take(device, bytes, false)
    }

    /// So many bytes, to be written from here: a recorded program finds them there in every run.
    fn for_content(device: &Device, bytes: usize) -> Result<Self> {
        Self::take(device, bytes, true)
    }

    /// So many bytes that are no program's own, also while one is recorded.
    fn outside_of_programs(device: &Device, bytes: usize) -> Result<Self> {
        Ok(Self {
            memory: Arc::new(Memory::new(device.hardware(), bytes)?),
            device: device.clone(),
        })
    }

    fn take(device: &Device, bytes: usize, is_kept: bool) -> Result<Self> {
        let arena = device.programs().arena();
        let take = || match arena.as_ref().map(|arena| arena.take(bytes, is_kept)).transpose()? {
            Some(Some(block)) => Ok(block),
            // More than a program may hold: it is run, but cannot be replayed.
            Some(None) => {
                device.programs().refuse();
                Memory::new(device.hardware(), bytes)
            }
            None => Memory::new(device.hardware(), bytes),
        };
        // Programs can be recorded again; a picture that fails is lost.
        let is_free = |error: &Error| error.is_out_of_memory() && device.programs().forget_all();
        let memory = match take() {
            Err(error) if is_free(&error) => take()?,
            taken => taken?,
        };
        Ok(Self { memory: Arc::new(memory), device: device.clone() })
    }

    fn of(device: &Device, bytes: &[u8]) -> Result<Self> {
        let buffer = Self::for_content(device, bytes.len())?;
        device.driver().write(buffer.memory.address(), bytes)?;
        Ok(buffer)
    }

    fn read(&self) -> Result<Vec<u8>> {
        // What is known here could change what is asked for next.
        self.device.programs().refuse();
        let mut bytes = vec![0; self.memory.bytes()];
        self.device.driver().read(self.memory.address(), &mut bytes)?;
        Ok(bytes)
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

    fn begin_program(&self, key: &str, inputs: &[&Storage]) -> Result<Begun<Storage>> {
        self.programs().begin(self, key, inputs)
    }

    fn end_program(&self, outputs: &[View<'_, Storage>]) -> Result<Option<Outputs<Storage>>> {
        self.programs().end(self, outputs)
    }

    fn abort_program(&self) {
        drop(self.programs().take());
    }

    fn forget_program(&self, key: &str) {
        self.programs().forget(key);
    }

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

    fn is_lost(&self) -> bool {
        self.driver().is_lost()
    }

    fn statistics(&self) -> Option<String> {
        Some(format!("{}: {}", self.name(), self.counts()))
    }

    /// The GPU's name: two of one kind give equal bits.
    fn kernel_path(&self) -> Option<String> {
        let name = format!("cuda-sm{}-{}", self.driver().architecture(), self.driver().name());
        Some(name.replace(|c: char| !c.is_ascii_alphanumeric() && c != '.', "-"))
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
        Ok(Self::open(ordinal)?)
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
        let buffer = Buffer::for_content(self, bytes)?;
        self.driver().clear(buffer.memory.address(), bytes)?;
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
