//! The CPU: its own storage and device, wrapping candle's `CpuStorage` where candle's ops serve.
//! Separate newtypes because candle's are an enum of `Vec`s and a unit struct: no packed weights,
//! no thread setting, no room for a pool.

mod cores;
mod kernels;
mod storage;

use std::sync::Arc;

use candle_core::backend::BackendDevice;
use candle_core::cpu_backend::CpuDevice as CandleDevice;
use candle_core::{CpuStorage, DType, DeviceLocation, Shape, WithDType};

use crate::backend::{Begun, HostTensor, Noise, Outputs, View};
use crate::error::{Error, Result};

pub use kernels::transformed_bytes;
pub use kernels::{check_path as check_kernel_path, path as kernel_path, paths as kernel_paths};
pub use storage::Storage;

/// The processor that this process runs on, with the threads its kernels use.
#[derive(Clone)]
pub struct Device {
    pool: Arc<rayon::ThreadPool>,
    low_memory: bool,
}

/// How the processor is used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settings {
    /// Threads of the kernels; 0 means one for each physical core.
    pub threads: usize,
    /// Whether weights are kept small where speed would take more memory.
    pub low_memory: bool,
}

impl Settings {
    /// How many threads that is.
    pub fn effective_threads(self) -> usize {
        if self.threads == 0 { cores::physical() } else { self.threads }
    }
}

impl Device {
    /// A device that is used as `settings` say. The process's allocator is told to keep no large
    /// buffers, which only where it is glibc's means something.
    ///
    /// # Errors
    /// As [`with_threads`](Self::with_threads).
    pub fn open(settings: Settings) -> Result<Self> {
        kernels::return_large_buffers();
        Ok(Self::with_threads(settings.threads)?.with_low_memory(settings.low_memory))
    }

    /// A device whose kernels run on `threads` threads; 0 means one for each physical core.
    ///
    /// # Errors
    /// If the threads cannot be started, or the environment asks for kernels that are not here.
    pub fn with_threads(threads: usize) -> Result<Self> {
        kernels::check_path()?;
        let threads = Settings { threads, low_memory: false }.effective_threads();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("kernel-{index}"))
            .build()
            .map_err(|error| Error::other(format!("cannot start {threads} threads: {error}")))?;
        Ok(Self { pool: Arc::new(pool), low_memory: false })
    }

    /// The same device, which keeps weights small (or not) where speed would take more memory.
    pub fn with_low_memory(self, low_memory: bool) -> Self {
        Self { low_memory, ..self }
    }

    /// Whether weights are kept small where speed would take more memory.
    pub fn is_low_memory(&self) -> bool {
        self.low_memory
    }

    /// How many threads the kernels use.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs a kernel where its parallel loops use this device's threads.
    fn run<T: Send>(&self, kernel: impl FnOnce() -> T + Send) -> T {
        self.pool.install(kernel)
    }

    fn wrap(&self, plain: CpuStorage) -> Storage {
        Storage::plain(plain, self.clone())
    }
}

/// The elements of a tensor from a file as another dtype, in row-major order: the bits that
/// [`upload`](super::Device::upload) gives.
///
/// # Errors
/// If the memory cannot be had or the cast is not possible.
pub fn cast(tensor: &HostTensor, dtype: DType) -> Result<CpuStorage> {
    kernels::upload(tensor, dtype)
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cpu::Device({} threads)", self.threads())
    }
}

impl super::Device for Device {
    type Mark = ();

    /// Ops are done when they return.
    fn mark(&self) -> Result<()> {
        Ok(())
    }

    fn wait(&self, (): ()) -> Result<()> {
        Ok(())
    }

    fn is_reached(&self, (): &()) -> bool {
        true
    }

    /// Calling a kernel costs nothing that a recording would save.
    fn begin_program(&self, _: &str, _: &[&Storage]) -> Result<Begun<Storage>> {
        Ok(Begun::Run)
    }

    fn end_program(&self, _: &[View<'_, Storage>]) -> Result<Option<Outputs<Storage>>> {
        Ok(None)
    }

    fn abort_program(&self) {}

    /// Weights are mapped files already.
    fn announce(
        &self,
        _: &[&HostTensor],
        _: DType,
        _: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        Ok(())
    }

    fn name(&self) -> String {
        "cpu".into()
    }

    fn statistics(&self) -> Option<String> {
        let threads = self.threads();
        let plural = if threads == 1 { "" } else { "s" };
        Some(format!("cpu: {threads} thread{plural}, kernels {}", kernel_path()))
    }

    fn kernel_path(&self) -> Option<String> {
        Some(kernels::path().into())
    }

    fn default_dtype(&self) -> DType {
        DType::F32
    }

    fn randn(&self, noise: Noise, shape: &Shape, dtype: DType) -> Result<Storage> {
        let values = crate::rng::randn(noise.seed, noise.skip, shape.elem_count())?;
        let drawn = self.wrap(CpuStorage::F32(values));
        drawn.cast(shape, dtype)
    }

    fn upload(&self, tensor: &HostTensor, dtype: DType) -> Result<Storage> {
        self.run(|| kernels::upload(tensor, dtype)).map(|plain| self.wrap(plain))
    }
}

impl BackendDevice for Device {
    type Storage = Storage;

    fn new(_: usize) -> candle_core::Result<Self> {
        Ok(Self::with_threads(0)?)
    }

    fn location(&self) -> DeviceLocation {
        DeviceLocation::Cpu
    }

    /// Every CPU storage lies in the same memory, whatever threads work on it.
    fn same_device(&self, _: &Self) -> bool {
        true
    }

    fn zeros_impl(&self, shape: &Shape, dtype: DType) -> candle_core::Result<Storage> {
        CandleDevice.zeros_impl(shape, dtype).map(|plain| self.wrap(plain))
    }

    unsafe fn alloc_uninit(&self, shape: &Shape, dtype: DType) -> candle_core::Result<Storage> {
        // Zeroed: a shared worker must not show old memory, and fresh pages are zero anyway.
        self.zeros_impl(shape, dtype)
    }

    fn storage_from_slice<T: WithDType>(&self, values: &[T]) -> candle_core::Result<Storage> {
        Ok(self.wrap(T::to_cpu_storage(values)))
    }

    fn storage_from_cpu_storage(&self, values: &CpuStorage) -> candle_core::Result<Storage> {
        Ok(self.wrap(values.clone()))
    }

    fn storage_from_cpu_storage_owned(&self, values: CpuStorage) -> candle_core::Result<Storage> {
        Ok(self.wrap(values))
    }

    fn rand_uniform(
        &self,
        shape: &Shape,
        dtype: DType,
        from: f64,
        to: f64,
    ) -> candle_core::Result<Storage> {
        CandleDevice.rand_uniform(shape, dtype, from, to).map(|plain| self.wrap(plain))
    }

    fn rand_normal(
        &self,
        shape: &Shape,
        dtype: DType,
        mean: f64,
        std: f64,
    ) -> candle_core::Result<Storage> {
        CandleDevice.rand_normal(shape, dtype, mean, std).map(|plain| self.wrap(plain))
    }

    fn set_seed(&self, _: u64) -> candle_core::Result<()> {
        candle_core::bail!("candle's CPU noise has no seed; use Tensor::randn, which has")
    }

    fn get_current_seed(&self) -> candle_core::Result<u64> {
        candle_core::bail!("candle's CPU noise has no seed; use Tensor::randn, which has")
    }

    fn synchronize(&self) -> candle_core::Result<()> {
        Ok(())
    }
}
