//! A GPU for machines without one: a driver that runs the very kernels on the processor, compiled
//! with the C compiler by `emulator.c`. Separate because all that is unsafe about it is here.

use std::collections::HashMap;
use std::ffi::{c_int, c_uint, c_ulonglong, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock};

use libloading::Library;
use tiny_sd::backend::cuda::driver::{Address, Driver, Graph, Launch, Numbers, Reached};
use tiny_sd::{Error, Result};

type Kernel = unsafe extern "C" fn(*mut *mut c_void);
type Emulate = unsafe extern "C" fn(
    Kernel,
    *const c_uint,
    *const c_uint,
    c_uint,
    *mut *mut c_void,
    c_int,
) -> c_int;
type Guarded = unsafe extern "C" fn(c_ulonglong, c_uint) -> *mut c_void;
type GuardedFree = unsafe extern "C" fn(*mut c_void, c_ulonglong);

/// As CUDA aligns what it allocates.
const ALIGNMENT: u32 = 256;

/// The sources compiled for one number type, once for all tests.
fn library(numbers: Numbers) -> &'static Library {
    static LIBRARIES: OnceLock<[Library; 3]> = OnceLock::new();
    let all = LIBRARIES.get_or_init(|| [0, 1, 2].map(build));
    &all[numbers.code() as usize]
}

fn build(dtype: u32) -> Library {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (kernels, emulator) = (root.join("src/backend/cuda/kernels"), root.join("tests/cuda"));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kernels.so");
    let sources = std::fs::read_dir(&kernels).unwrap().map(|entry| entry.unwrap().path());
    let sources = sources.filter(|path| path.extension().is_some_and(|suffix| suffix == "cu"));
    let status = Command::new("cc")
        .args(["-std=gnu11", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-xc"])
        .arg(format!("-DDTYPE={dtype}"))
        .args(["-DARCH=800", "-I"])
        .arg(&kernels)
        .arg("-I")
        .arg(&emulator)
        .arg("-o")
        .arg(&path)
        .args(sources)
        .arg(emulator.join("emulator.c"))
        .args(["-lm", "-lpthread"])
        .status()
        .unwrap();
    assert!(status.success());
    // SAFETY: it is what was just compiled, and has no code that runs when it is loaded.
    unsafe { Library::new(&path) }.unwrap()
}

/// The processor as a GPU.
#[derive(Debug, Default, Clone)]
pub struct Emulated {
    /// Bytes of each buffer.
    buffers: Arc<Mutex<HashMap<u64, usize>>>,
    /// How many it has; all if it does not say.
    memory_bytes: Option<usize>,
}

impl Emulated {
    /// With so much memory.
    pub fn with_memory(memory_bytes: usize) -> Self {
        Self { memory_bytes: Some(memory_bytes), ..Self::default() }
    }

    /// Bytes that are allocated.
    pub fn held_bytes(&self) -> usize {
        self.buffers.lock().unwrap().values().sum()
    }

    /// A place for so many bytes within one buffer.
    fn place(&self, address: Address, bytes: usize) -> *mut u8 {
        let buffers = self.buffers.lock().unwrap();
        let is_within = |(start, len): (&u64, &usize)| {
            *start <= address.0 && address.0 + bytes as u64 <= start + *len as u64
        };
        assert!(buffers.iter().any(is_within), "{bytes} bytes at {address:?} are in no buffer");
        address.0 as *mut u8
    }
}

impl Driver for Emulated {
    fn name(&self) -> String {
        "an emulated GPU".into()
    }

    fn ordinal(&self) -> usize {
        0
    }

    fn architecture(&self) -> i32 {
        80
    }

    /// Few, so that both sizes of tiles are used.
    fn multiprocessors(&self) -> usize {
        2
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        if self.memory_bytes.is_some_and(|most| self.held_bytes() + bytes > most) {
            return Err(Error::out_of_memory(format_args!("there are no {bytes} bytes")));
        }
        // SAFETY: the function's signature is that of `guarded`.
        let address = unsafe {
            let guarded = library(Numbers::F32).get::<Guarded>(b"guarded").unwrap();
            guarded(bytes as c_ulonglong, ALIGNMENT)
        };
        if address.is_null() {
            return Err(Error::other(format!("there are no {bytes} bytes")));
        }
        self.buffers.lock().unwrap().insert(address as u64, bytes);
        Ok(Address(address as u64))
    }

    fn free(&self, address: Address) {
        let bytes = self.buffers.lock().unwrap().remove(&address.0).unwrap();
        // SAFETY: it came from `guarded` with this size.
        unsafe {
            let free = library(Numbers::F32).get::<GuardedFree>(b"guarded_free").unwrap();
            free(address.0 as *mut c_void, bytes as c_ulonglong);
        }
    }

    fn clear(&self, address: Address, bytes: usize) -> Result<()> {
        // SAFETY: `place` has checked it.
        unsafe { self.place(address, bytes).write_bytes(0, bytes) };
        Ok(())
    }

    fn write(&self, address: Address, bytes: &[u8]) -> Result<()> {
        let to = self.place(address, bytes.len());
        // SAFETY: `place` has checked it.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    fn read(&self, address: Address, bytes: &mut [u8]) -> Result<()> {
        let from = self.place(address, bytes.len());
        // SAFETY: `place` has checked it.
        unsafe { bytes.as_mut_ptr().copy_from_nonoverlapping(from, bytes.len()) };
        Ok(())
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        let (from, to) = (self.place(from, bytes), self.place(to, bytes));
        // SAFETY: `place` has checked both.
        unsafe { to.copy_from(from, bytes) };
        Ok(())
    }

    fn graph(&self, launches: &[Launch]) -> Result<Box<dyn Graph>> {
        Ok(Box::new(Recorded { driver: self.clone(), launches: launches.to_vec() }))
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        // Aligned as a struct must be.
        let mut argument: Vec<u64> = launch
            .argument
            .as_chunks::<8>()
            .0
            .iter()
            .map(|bytes| u64::from_le_bytes(*bytes))
            .collect();
        let mut arguments = [argument.as_mut_ptr().cast::<c_void>()];
        let block = [launch.block, 1, 1];
        let library = library(launch.numbers);
        // SAFETY: the signatures are those of the sources; the argument is the kernel's struct.
        let stuck = unsafe {
            let kernel = library.get::<Kernel>(launch.kernel.as_bytes());
            let kernel = kernel.map_err(|error| Error::other(error.to_string()))?;
            let emulate = library.get::<Emulate>(b"emulate").unwrap();
            let (grid, block) = (launch.grid.as_ptr(), block.as_ptr());
            emulate(*kernel, grid, block, launch.shared_bytes, arguments.as_mut_ptr(), 0)
        };
        assert_eq!(stuck, 0, "{}: not all threads reach a barrier", launch.kernel);
        Ok(())
    }

    fn mark(&self) -> Result<Box<dyn Reached>> {
        Ok(Box::new(Done))
    }
}

/// Launches that are made again as they were.
struct Recorded {
    driver: Emulated,
    launches: Vec<Launch>,
}

impl Graph for Recorded {
    fn launch(&self) -> Result<()> {
        self.launches.iter().try_for_each(|launch| self.driver.launch(launch))
    }
}

struct Done;

impl Reached for Done {
    fn is_reached(&self) -> bool {
        true
    }

    fn wait(&self) -> Result<()> {
        Ok(())
    }
}
