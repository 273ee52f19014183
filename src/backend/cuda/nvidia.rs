//! A real GPU, by NVIDIA's driver, which is loaded if it is there. Separate because what is unsafe
//! about a GPU is here.

mod graph;

use std::collections::VecDeque;
use std::collections::hash_map::{Entry, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, DriverError, result, sys,
};
use cudarc::nvrtc::Ptx;

use super::compiler::{Compiler, loaded_from};
use super::driver::{Address, Driver, Graph, Launch, Numbers, Reached, Source};
use super::kernel_cache::KernelCache;
use crate::error::{Error, Result};
use graph::Instantiated;

/// The oldest CUDA whose drivers have all that is asked of them: graphs by explicit nodes.
const OLDEST_CUDA: (i32, i32) = (12, 0);
/// The oldest compute capability that kernels are compiled for, 75 for 7.5.
const OLDEST_ARCHITECTURE: i32 = 75;
/// Bytes from the host up to which a copy of them waits for the GPU, and not the caller.
const FEW_BYTES: usize = 64 << 10;
/// Such copies at most.
const MOST_COPIES: usize = 1024;
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
    cache: KernelCache,
    /// Looked for when the cache lacks something.
    compiler: OnceLock<Result<Compiler>>,
    /// Bytes from the host that the GPU may not have read yet, the oldest first.
    copies: Mutex<VecDeque<(CudaEvent, Vec<u8>)>>,
    modules: Mutex<HashMap<(Source, Numbers), Arc<CudaModule>>>,
    functions: Mutex<Functions>,
}

/// Kernels by their names, and the most shared memory that each was asked for.
type Functions = HashMap<(&'static str, Numbers), (CudaFunction, u32)>;

/// What the driver says of a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its number, as in `cuda:0`.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Its compute capability, major and minor.
    pub capability: (i32, i32),
    /// Its memory.
    pub memory_bytes: usize,
    /// What of it nobody uses.
    pub free_bytes: usize,
    /// Parts that share the work.
    pub multiprocessors: usize,
}

/// The newest version of CUDA that the driver serves, major and minor, and where the driver is.
///
/// # Errors
/// If there is none, it does not start, or it is too old.
pub fn driver_version() -> Result<((i32, i32), Option<String>)> {
    check_driver()?;
    let mut version = 0;
    // SAFETY: the driver is loaded; the place is there.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }
        .result()
        .map_err(|error| failed("its version", error))?;
    let (major, minor) = (version / 1000, version % 1000 / 10);
    if (major, minor) < OLDEST_CUDA {
        let (least, _) = OLDEST_CUDA;
        return Err(Error::usage(format!(
            "NVIDIA's driver serves CUDA {major}.{minor}, and {least}.0 is needed: update it"
        )));
    }
    Ok(((major, minor), loaded_from("libcuda.so")))
}

fn check_driver() -> Result<()> {
    // SAFETY: it only opens and closes libraries.
    match unsafe { sys::is_culib_present() } {
        true => Ok(()),
        false => Err(Error::usage("there is no NVIDIA driver here (no libcuda.so.1)")),
    }
}

impl Nvidia {
    /// All GPUs that the driver has, or why one cannot be used.
    ///
    /// # Errors
    /// As [`count`](Self::count).
    pub fn list() -> Result<Vec<Result<Found>>> {
        let found = |ordinal| {
            let gpu = Self::open(ordinal, KernelCache::of_user())?;
            let (memory_bytes, free_bytes) = gpu.memory()?;
            Ok(Found {
                ordinal,
                capability: (gpu.architecture / 10, gpu.architecture % 10),
                memory_bytes,
                free_bytes,
                multiprocessors: gpu.multiprocessors,
                name: gpu.name,
            })
        };
        Ok((0..Self::count()?).map(found).collect())
    }

    /// How many GPUs the driver has, or in one line why it has none.
    ///
    /// # Errors
    /// If there is no driver, or it does not start or is too old.
    pub fn count() -> Result<usize> {
        driver_version()?;
        let count = CudaContext::device_count().map_err(|error| failed("starting it", error))?;
        Ok(usize::try_from(count).unwrap_or_default())
    }

    /// Opens a GPU, whose compiled kernels are kept in `cache`.
    ///
    /// # Errors
    /// If there is none of this number.
    pub fn open(ordinal: usize, cache: KernelCache) -> Result<Self> {
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
        let architecture = major * 10 + minor;
        if architecture < OLDEST_ARCHITECTURE {
            let (least, of) = (OLDEST_ARCHITECTURE / 10, OLDEST_ARCHITECTURE % 10);
            return Err(Error::usage(format!(
                "{named} has compute capability {major}.{minor}, and {least}.{of} is the least"
            )));
        }
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors =
            context.attribute(attribute).map_err(|error| failed("its size", error))?;
        let stream = context.new_stream().map_err(|error| failed("a stream", error))?;
        keep_memory(&context).map_err(|error| failed("its memory pool", error))?;
        Ok(Self {
            ordinal,
            name: named,
            architecture,
            multiprocessors: usize::try_from(multiprocessors).unwrap_or(1),
            context,
            stream,
            cache,
            compiler: OnceLock::new(),
            copies: Mutex::default(),
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

    /// Waits for all work, and gives back what the pool keeps.
    fn release_memory(&self) -> std::result::Result<(), DriverError> {
        self.stream.synchronize()?;
        // SAFETY: the pool is the device's own; what is in use stays.
        unsafe {
            let pool = result::device::get_default_mem_pool(self.context.cu_device())?;
            sys::cuMemPoolTrimTo(pool, 0).result()
        }
    }

    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|error| failed("its context", error))
    }

    /// The kernel of a launch, ready for its shared memory.
    fn function(&self, launch: &Launch) -> Result<CudaFunction> {
        let key = (launch.kernel, launch.numbers);
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        let (function, most_bytes) = match functions.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let module = self.module(launch.source, launch.numbers)?;
                let function = module
                    .load_function(launch.kernel)
                    .map_err(|error| failed(&format!("the kernel {}", launch.kernel), error))?;
                place.insert((function, PLAIN_SHARED_BYTES))
            }
        };
        if launch.shared_bytes > *most_bytes {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = launch.shared_bytes.cast_signed();
            function.set_attribute(attribute, bytes).map_err(|e| failed(launch.kernel, e))?;
            *most_bytes = launch.shared_bytes;
        }
        Ok(function.clone())
    }

    fn compile(&self, source: Source, numbers: Numbers) -> Result<Vec<u8>> {
        let find = || {
            let driver = driver_version().ok().map(|(version, _)| version.0);
            Compiler::find(driver, Some(self.architecture))
        };
        let compiler = self.compiler.get_or_init(find).as_ref().map_err(Clone::clone)?;
        let compiled = compiler.compile(source, numbers, self.architecture);
        compiled.map_err(|error| error.context(source.name))
    }

    fn module(&self, source: Source, numbers: Numbers) -> Result<Arc<CudaModule>> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(&(source, numbers)) {
            return Ok(module.clone());
        }
        let key = (source, numbers);
        let compile = || self.compile(source, numbers);
        let load = |code| self.context.load_module(Ptx::from_binary(code));
        let code = self.cache.get_or(key, self.architecture, compile)?;
        let loaded = match load(code) {
            // It may be another compiler's, for another driver.
            Err(_) if self.cache.forget(key, self.architecture) => {
                load(self.cache.get_or(key, self.architecture, compile)?)
            }
            loaded => loaded,
        };
        let module =
            loaded.map_err(|error| failed(&format!("the kernels of {}", source.name), error))?;
        modules.insert((source, numbers), module.clone());
        Ok(module)
    }
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
        let take = || unsafe { result::malloc_async(self.stream.cu_stream(), bytes) };
        let is_full = |error: &DriverError| error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        let address = match take() {
            // What was freed may wait for the work before it, or be in pieces.
            Err(error) if is_full(&error) && self.release_memory().is_ok() => take(),
            address => address,
        };
        address.map(Address).map_err(|error| {
            if !is_full(&error) {
                return failed("memory", error);
            }
            let free = self.memory().map_or(0, |(_, free)| free);
            Error::out_of_memory(format_args!(
                "the GPU has no {bytes} bytes more ({free} are free): try a smaller picture, \
                 --dtype f16, --vae-tiling, or a smaller --batch-size"
            ))
        })
    }

    fn free(&self, address: Address) {
        // It tells of failures before, too, which are the next call's.
        let _ = self.bind();
        // SAFETY: whoever frees does not use it again; work that does came before, in order.
        let _ = unsafe { result::free_async(address.0, self.stream.cu_stream()) };
    }

    fn clear(&self, address: Address, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's buffer has so many bytes.
        unsafe { result::memset_d8_async(address.0, 0, bytes, self.stream.cu_stream()) }
            .map_err(|error| failed("clearing memory", error))
    }

    fn write(&self, address: Address, bytes: &[u8]) -> Result<()> {
        self.bind()?;
        let send = |bytes: &[u8]| {
            // SAFETY: the caller's buffer has so many bytes; these stay until they have been read.
            unsafe { result::memcpy_htod_async(address.0, bytes, self.stream.cu_stream()) }
                .map_err(|error| failed("sending", error))
        };
        if bytes.len() > FEW_BYTES {
            send(bytes)?;
            return self.stream.synchronize().map_err(|error| failed("sending", error));
        }
        let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        while copies.front().is_some_and(|(read, _)| read.is_complete()) {
            copies.pop_front();
        }
        if copies.len() >= MOST_COPIES {
            self.stream.synchronize().map_err(|error| failed("sending", error))?;
            copies.clear();
        }
        let own = bytes.to_vec();
        send(&own)?;
        let read = self.stream.record_event(None).map_err(|error| failed("sending", error))?;
        copies.push_back((read, own));
        Ok(())
    }

    fn read(&self, address: Address, bytes: &mut [u8]) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's buffer has so many bytes; they are there after the wait.
        unsafe { result::memcpy_dtoh_async(bytes, address.0, self.stream.cu_stream()) }
            .and_then(|()| self.stream.synchronize())
            .map_err(|error| failed("its work", error))
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: both of the caller's buffers have so many bytes.
        unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, self.stream.cu_stream()) }
            .map_err(|error| failed("copying", error))
    }

    fn graph(&self, launches: &[Launch]) -> Result<Box<dyn Graph>> {
        self.bind()?;
        let functions = launches.iter().map(|launch| self.function(launch));
        let functions = functions.collect::<Result<Vec<_>>>()?;
        let graph = Instantiated::new(launches, functions, self.stream.clone());
        Ok(Box::new(graph.map_err(|error| failed("a graph", error))?))
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        self.bind()?;
        let function = self.function(launch)?;
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

    fn is_lost(&self) -> bool {
        // SAFETY: the stream is there as long as this.
        let asked =
            self.bind().is_ok().then(|| unsafe { sys::cuStreamQuery(self.stream.cu_stream()) });
        let fine = [sys::CUresult::CUDA_SUCCESS, sys::CUresult::CUDA_ERROR_NOT_READY];
        !asked.is_some_and(|state| fine.contains(&state))
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
        // Of work that failed, waiting tells.
        self.0.try_is_complete().unwrap_or(true)
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
