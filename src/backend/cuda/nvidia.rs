//! A real GPU, by NVIDIA's driver and run-time compiler, which are loaded if they are there.
//! Separate because all that is unsafe about a GPU is here.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, DriverError, result, sys,
};
use cudarc::nvrtc;

use super::driver::{Address, Driver, Launch, Numbers, Reached, Source};
use super::sources::whole;
use crate::error::{Error, Result};

/// Shared memory of a block that needs no asking.
const PLAIN_SHARED_BYTES: u32 = 48 << 10;

/// A GPU of this machine.
pub struct Nvidia {
    ordinal: usize,
    name: String,
    /// 80 for compute capability 8.0.
    architecture: i32,
    multiprocessors: usize,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    modules: Mutex<HashMap<(Source, Numbers), Arc<CudaModule>>>,
    functions: Mutex<HashMap<(&'static str, Numbers), CudaFunction>>,
}

impl Nvidia {
    /// How many GPUs the driver has, or in one line why it has none.
    ///
    /// # Errors
    /// If there is no driver, or it does not start.
    pub fn count() -> Result<usize> {
        // SAFETY: it only opens and closes libraries.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::usage("there is no NVIDIA driver here (no libcuda.so.1)"));
        }
        let count = CudaContext::device_count().map_err(|error| failed("starting it", error))?;
        Ok(usize::try_from(count).unwrap_or_default())
    }

    /// Opens a GPU.
    ///
    /// # Errors
    /// If there is none of this number, or no run-time compiler.
    pub fn open(ordinal: usize) -> Result<Self> {
        let count = Self::count()?;
        if ordinal >= count {
            let problem = format!("there is no GPU {ordinal}: the driver has {count}");
            return Err(Error::usage(problem));
        }
        let context = CudaContext::new(ordinal).map_err(|error| failed("opening it", error))?;
        // SAFETY: one stream orders all work, so there is nothing for events to track.
        unsafe { context.disable_event_tracking() };
        let named = context.name().map_err(|error| failed("its name", error))?;
        let (major, minor) =
            context.compute_capability().map_err(|error| failed("its capability", error))?;
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors =
            context.attribute(attribute).map_err(|error| failed("its size", error))?;
        let stream = context.new_stream().map_err(|error| failed("a stream", error))?;
        keep_memory(&context).map_err(|error| failed("its memory pool", error))?;
        Ok(Self {
            ordinal,
            name: named,
            architecture: major * 10 + minor,
            multiprocessors: usize::try_from(multiprocessors).unwrap_or(1),
            context,
            stream,
            modules: Mutex::default(),
            functions: Mutex::default(),
        })
    }

    /// Total and free memory in bytes.
    ///
    /// # Errors
    /// If the driver does not say.
    pub fn memory(&self) -> Result<(usize, usize)> {
        let (free, total) = self.context.mem_get_info().map_err(|e| failed("its memory", e))?;
        Ok((total, free))
    }

    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|error| failed("its context", error))
    }

    fn function(&self, launch: &Launch<'_>) -> Result<CudaFunction> {
        let key = (launch.kernel, launch.numbers);
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = functions.get(&key) {
            return Ok(function.clone());
        }
        let module = self.module(launch.source, launch.numbers)?;
        let function = module
            .load_function(launch.kernel)
            .map_err(|error| failed(&format!("the kernel {}", launch.kernel), error))?;
        functions.insert(key, function.clone());
        Ok(function)
    }

    fn module(&self, source: Source, numbers: Numbers) -> Result<Arc<CudaModule>> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(&(source, numbers)) {
            return Ok(module.clone());
        }
        let compiled = compile(source, numbers, self.architecture)?;
        let module = self
            .context
            .load_module(compiled)
            .map_err(|error| failed(&format!("the kernels of {}", source.name), error))?;
        modules.insert((source, numbers), module.clone());
        Ok(module)
    }
}

/// Compiles a source for a compute capability, which needs neither a GPU nor a driver.
///
/// # Errors
/// If there is no run-time compiler, or it refuses: its log.
pub fn compile(source: Source, numbers: Numbers, architecture: i32) -> Result<nvrtc::Ptx> {
    // SAFETY: it only opens and closes libraries.
    if !unsafe { nvrtc::sys::is_culib_present() } {
        return Err(Error::usage(
            "there is no run-time compiler of NVIDIA here (libnvrtc.so): it comes with the CUDA \
             toolkit, or with `pip install nvidia-cuda-nvrtc`",
        ));
    }
    let options = nvrtc::CompileOptions {
        name: Some(source.name.to_owned()),
        options: vec![
            format!("--gpu-architecture=compute_{architecture}"),
            format!("-DDTYPE={}", numbers.code()),
            "--fmad=true".to_owned(),
        ],
        ..Default::default()
    };
    nvrtc::compile_ptx_with_opts(whole(source), options).map_err(|error| {
        let log = match &error {
            nvrtc::CompileError::CompileError { log, .. } => log.to_string_lossy().into_owned(),
            error => format!("{error:?}"),
        };
        Error::other(format!("{} for compute_{architecture}: {}", source.name, log.trim()))
    })
}

/// Lets the pool keep what is freed: else every picture would begin with new memory.
fn keep_memory(context: &CudaContext) -> std::result::Result<(), DriverError> {
    let mut all = u64::MAX;
    // SAFETY: the pool is the device's own, and the attribute is a u64 that is read at once.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, attribute, (&raw mut all).cast())
    }
}

fn failed(what: &str, error: DriverError) -> Error {
    let text = error
        .error_string()
        .map_or_else(|_| format!("{error:?}"), |text| text.to_string_lossy().into_owned());
    Error::other(format!("the GPU: {what}: {text}"))
}

impl Driver for Nvidia {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn ordinal(&self) -> usize {
        self.ordinal
    }

    fn architecture(&self) -> i32 {
        self.architecture
    }

    fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.bind()?;
        // SAFETY: the memory is given back on the same stream, and used on no other.
        let address = unsafe { result::malloc_async(self.stream.cu_stream(), bytes) };
        address.map(Address).map_err(|error| {
            if error.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return failed("memory", error);
            }
            let free = self.memory().map_or(0, |(_, free)| free);
            Error::other(format!(
                "the GPU has no {bytes} bytes more ({free} are free): try a smaller picture, \
                 --dtype f16, --vae-tiling, or a smaller --batch-size"
            ))
        })
    }

    fn free(&self, address: Address) {
        if self.bind().is_ok() {
            // SAFETY: whoever frees does not use it again; work that does came before, in order.
            // A failure is told by the next call.
            let _ = unsafe { result::free_async(address.0, self.stream.cu_stream()) };
        }
    }

    fn clear(&self, address: Address, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's buffer has so many bytes.
        unsafe { result::memset_d8_async(address.0, 0, bytes, self.stream.cu_stream()) }
            .map_err(|error| failed("clearing memory", error))
    }

    fn write(&self, address: Address, bytes: &[u8]) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's buffer has so many bytes. Memory that is not pinned has been read
        // when this returns.
        unsafe { result::memcpy_htod_async(address.0, bytes, self.stream.cu_stream()) }
            .map_err(|error| failed("sending", error))
    }

    fn read(&self, address: Address, bytes: &mut [u8]) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's buffer has so many bytes; they are there after the wait.
        unsafe { result::memcpy_dtoh_async(bytes, address.0, self.stream.cu_stream()) }
            .and_then(|()| self.stream.synchronize())
            .map_err(|error| failed("its work", error))
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.bind()?;
        let function = self.function(launch)?;
        if launch.shared_bytes > PLAIN_SHARED_BYTES {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = launch.shared_bytes.cast_signed();
            function.set_attribute(attribute, bytes).map_err(|e| failed(launch.kernel, e))?;
        }
        let [x, y, z] = launch.grid;
        // The driver copies it at once.
        let mut arguments = [launch.argument.as_ptr().cast_mut().cast()];
        // SAFETY: the argument is the struct that the kernel takes, and what it points to is
        // large enough: both are the caller's, who has checked the op with `infer`.
        unsafe {
            result::launch_kernel(
                function.cu_function(),
                (x, y, z),
                (launch.block, 1, 1),
                launch.shared_bytes,
                self.stream.cu_stream(),
                &mut arguments,
            )
        }
        .map_err(|error| failed(launch.kernel, error))
    }

    fn mark(&self) -> Result<Box<dyn Reached>> {
        let event =
            self.stream.record_event(None).map_err(|error| failed("marking its work", error))?;
        Ok(Box::new(Event(event)))
    }
}

struct Event(CudaEvent);

impl Reached for Event {
    fn is_reached(&self) -> bool {
        self.0.is_complete()
    }

    fn wait(&self) -> Result<()> {
        self.0.synchronize().map_err(|error| failed("its work", error))
    }
}

impl fmt::Debug for Nvidia {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda::Nvidia({}, {})", self.ordinal, self.name)
    }
}
