//! A real GPU, by NVIDIA's driver, which is loaded if it is there. Separate because what is unsafe
//! about a GPU is here.

use std::collections::HashMap;
use std::fmt;
use std::ptr::{null, null_mut};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, DriverError, result, sys,
};
use cudarc::nvrtc::Ptx;

use super::compiler::{Compiler, loaded_from};
use super::driver::{Address, Driver, Graph, Launch, Numbers, Reached, Source};
use super::kernel_cache::KernelCache;
use crate::error::{Error, Result};

/// The oldest CUDA whose drivers have all that is asked of them: graphs by explicit nodes.
const OLDEST_CUDA: (i32, i32) = (12, 0);
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
    modules: Mutex<HashMap<(Source, Numbers), Arc<CudaModule>>>,
    functions: Mutex<HashMap<(&'static str, Numbers), CudaFunction>>,
}

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
    /// All GPUs that the driver has.
    ///
    /// # Errors
    /// As [`count`](Self::count), or if a GPU cannot be opened.
    pub fn list() -> Result<Vec<Found>> {
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
        (0..Self::count()?).map(found).collect()
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
            cache,
            compiler: OnceLock::new(),
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

    /// The kernel of a launch, ready for its shared memory.
    fn function(&self, launch: &Launch) -> Result<CudaFunction> {
        let key = (launch.kernel, launch.numbers);
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        let function = match functions.get(&key) {
            Some(function) => function.clone(),
            None => {
                let module = self.module(launch.source, launch.numbers)?;
                let function = module
                    .load_function(launch.kernel)
                    .map_err(|error| failed(&format!("the kernel {}", launch.kernel), error))?;
                functions.insert(key, function.clone());
                function
            }
        };
        if launch.shared_bytes > PLAIN_SHARED_BYTES {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = launch.shared_bytes.cast_signed();
            function.set_attribute(attribute, bytes).map_err(|e| failed(launch.kernel, e))?;
        }
        Ok(function)
    }

    fn compile(&self, source: Source, numbers: Numbers) -> Result<Vec<u8>> {
        let find = || Compiler::find(driver_version().ok().map(|(version, _)| version.0));
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
        let code = self.cache.get_or(key, self.architecture, compile)?;
        let module = self
            .context
            .load_module(Ptx::from_binary(code))
            .map_err(|error| failed(&format!("the kernels of {}", source.name), error))?;
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
        let address = unsafe { result::malloc_async(self.stream.cu_stream(), bytes) };
        address.map(Address).map_err(|error| {
            if error.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
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
        let graph = Nodes::new().and_then(|mut nodes| {
            let all = launches.iter().zip(&functions);
            all.into_iter().try_for_each(|(launch, function)| nodes.push(launch, function))?;
            nodes.instantiate()
        });
        let graph = graph.map_err(|error| failed("a graph", error))?;
        Ok(Box::new(Instantiated { graph, functions, stream: self.stream.clone() }))
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

    fn mark(&self) -> Result<Box<dyn Reached>> {
        let event =
            self.stream.record_event(None).map_err(|error| failed("marking its work", error))?;
        Ok(Box::new(Event(event)))
    }
}

/// A graph that is being made: its kernels run one after the other.
struct Nodes {
    graph: sys::CUgraph,
    last: Option<sys::CUgraphNode>,
}

impl Nodes {
    fn new() -> std::result::Result<Self, DriverError> {
        let mut graph = null_mut();
        // SAFETY: the place is there.
        unsafe { sys::cuGraphCreate(&raw mut graph, 0) }.result()?;
        Ok(Self { graph, last: None })
    }

    fn push(
        &mut self,
        launch: &Launch,
        function: &CudaFunction,
    ) -> std::result::Result<(), DriverError> {
        let mut arguments = [launch.argument.as_ptr().cast_mut().cast()];
        let [grid_x, grid_y, grid_z] = launch.grid;
        let kernel = sys::CUDA_KERNEL_NODE_PARAMS {
            func: function.cu_function(),
            gridDimX: grid_x,
            gridDimY: grid_y,
            gridDimZ: grid_z,
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            kernelParams: arguments.as_mut_ptr(),
            extra: null_mut(),
            kern: null_mut(),
            ctx: null_mut(),
        };
        let before = self.last.as_ref().map_or(null(), std::ptr::from_ref);
        let count = usize::from(self.last.is_some());
        let mut node = null_mut();
        // SAFETY: the driver copies the argument, which is the struct that the kernel takes; what
        // it points to lasts as long as the program. The node before is of this graph.
        unsafe {
            sys::cuGraphAddKernelNode_v2(
                &raw mut node,
                self.graph,
                before,
                count,
                &raw const kernel,
            )
        }
        .result()?;
        self.last = Some(node);
        Ok(())
    }

    fn instantiate(self) -> std::result::Result<sys::CUgraphExec, DriverError> {
        // SAFETY: the graph is whole.
        unsafe { result::graph::instantiate(self.graph, sys::CUgraphInstantiate_flags(0)) }
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        // SAFETY: what was instantiated is a copy. A failure is told by the next call.
        let _ = unsafe { sys::cuGraphDestroy(self.graph) }.result();
    }
}

/// A graph that can be launched.
struct Instantiated {
    graph: sys::CUgraphExec,
    #[allow(dead_code, reason = "they keep the code as long as the graph")]
    functions: Vec<CudaFunction>,
    stream: Arc<CudaStream>,
}

// SAFETY: a graph belongs to its context and to no thread; who has it uses it alone.
unsafe impl Send for Instantiated {}

impl Graph for Instantiated {
    fn launch(&self) -> Result<()> {
        let launched = self.stream.context().bind_to_thread().and_then(|()| {
            // SAFETY: the graph is whole, and what its kernels point to is its program's.
            unsafe { sys::cuGraphLaunch(self.graph, self.stream.cu_stream()) }.result()
        });
        launched.map_err(|error| failed("a graph", error))
    }
}

impl Drop for Instantiated {
    fn drop(&mut self) {
        // It may be running. A failure is told by the next call.
        let _ = self.stream.synchronize();
        // SAFETY: it is not running, and nobody else has it.
        let _ = unsafe { result::graph::exec_destroy(self.graph) };
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
