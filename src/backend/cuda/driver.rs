//! What the CUDA backend asks of a GPU, in bytes and launches. Separate because this is the line
//! below which nothing can be tested without one: above it, tests put a driver that runs the same
//! kernels on the processor in its place.

use crate::error::Result;

/// Where a buffer begins in the GPU's memory; 0 is nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Address(pub u64);

/// A GPU's memory and its one queue of work: what is asked is done in this order, and only
/// [`read`](Self::read) and [`Reached::wait`] wait for it.
pub trait Driver: std::fmt::Debug + Send + Sync + 'static {
    /// For people: the GPU's name.
    fn name(&self) -> String;

    /// Which GPU of the machine.
    fn ordinal(&self) -> usize;

    /// The compute capability, 80 for 8.0.
    fn architecture(&self) -> i32;

    /// How many multiprocessors share the work.
    fn multiprocessors(&self) -> usize;

    /// Memory for at least one byte, whose content is not defined.
    ///
    /// # Errors
    /// If there is not enough, with how much was asked and how much is free.
    fn allocate(&self, bytes: usize) -> Result<Address>;

    /// Gives memory back, once the work that was asked before is done.
    fn free(&self, address: Address);

    /// Makes bytes zero.
    ///
    /// # Errors
    /// If the GPU fails.
    fn clear(&self, address: Address, bytes: usize) -> Result<()>;

    /// Copies bytes to the GPU.
    ///
    /// # Errors
    /// If the GPU fails.
    fn write(&self, address: Address, bytes: &[u8]) -> Result<()>;

    /// Copies bytes from the GPU, once the work that was asked before is done.
    ///
    /// # Errors
    /// If the GPU fails, or that work did.
    fn read(&self, address: Address, bytes: &mut [u8]) -> Result<()>;

    /// Copies bytes from one place of the GPU to another.
    ///
    /// # Errors
    /// If the GPU fails.
    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()>;

    /// Runs a kernel.
    ///
    /// # Errors
    /// If it cannot be compiled or launched.
    fn launch(&self, launch: &Launch) -> Result<()>;

    /// Kernels that will be run as a whole, one after the other.
    ///
    /// # Errors
    /// If one cannot be compiled, or the GPU fails.
    fn graph(&self, launches: &[Launch]) -> Result<Box<dyn Graph>>;

    /// Whether it has failed so that nothing will work on it any more.
    fn is_lost(&self) -> bool {
        false
    }

    /// A point after all that was asked so far.
    ///
    /// # Errors
    /// If the GPU fails.
    fn mark(&self) -> Result<Box<dyn Reached>>;
}

/// A point in a queue of work.
pub trait Reached: Send {
    /// Whether the work before it is done.
    fn is_reached(&self) -> bool;

    /// Waits until it is.
    ///
    /// # Errors
    /// If the GPU fails, or that work did.
    fn wait(&self) -> Result<()>;
}

/// Kernels that are run as a whole.
pub trait Graph: Send {
    /// Runs them.
    ///
    /// # Errors
    /// If the GPU fails.
    fn launch(&self) -> Result<()>;
}

/// A source of kernels: the file's name in `kernels/` and its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source {
    /// The file's.
    pub name: &'static str,
    /// As it is in the file; [`whole`](super::sources::whole) puts its headers in.
    pub text: &'static str,
}

/// The number type that a source is compiled for: its `-DDTYPE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Numbers {
    /// 0
    F32,
    /// 1
    F16,
    /// 2
    Bf16,
}

impl Numbers {
    /// What the source calls it.
    pub fn code(self) -> u32 {
        match self {
            Numbers::F32 => 0,
            Numbers::F16 => 1,
            Numbers::Bf16 => 2,
        }
    }
}

/// One kernel to run.
#[derive(Debug, Clone)]
pub struct Launch {
    /// Where it is.
    pub source: Source,
    /// What it is compiled for.
    pub numbers: Numbers,
    /// Its name in the source.
    pub kernel: &'static str,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Shared memory that it asks for at the launch.
    pub shared_bytes: u32,
    /// The bytes of its one argument, a struct.
    pub argument: Vec<u8>,
}
