//! Devices: what an op is and who runs it. Separate because everything above it is generic over
//! [`Backend`], and everything below it knows nothing of models.
//!
//! A backend is candle's pair of traits, [`BackendStorage`] and [`BackendDevice`], plus what
//! diffusion lives on: the fused ops of [`fused`], weights from the host, and torch's noise.

pub mod cache_folder;
pub mod cpu;
pub mod cuda;
pub mod elements;
pub mod fused;
pub mod gather;
pub mod host;
pub mod mapped;
pub mod order;
pub mod twin;
pub mod weighted;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, DType, Layout, Shape};

pub use fused::{
    Activation, Attention, Conv2d, Fused, GroupNorm, LayerNorm, Linear, Meta, MetaRef, Role, Size2d,
};
pub use host::HostTensor;

use crate::error::Result;

/// A buffer on some device, with every op that can be asked of it.
///
/// candle's methods take operands as `(storage, layout)` and return a storage in the *logical*
/// (row-major) order of the result, offset 0. [`Backend::fused`] returns the memory order that
/// [`Fused::infer`] says, which is part of each op's definition and equal on every backend.
pub trait Backend:
    BackendStorage<Device: Device<Storage = Self>> + std::fmt::Debug + Send + Sync + 'static
{
    /// Runs one fused op. The caller has checked the operands with [`Fused::infer`].
    ///
    /// # Errors
    /// Whatever the device cannot do: a dtype, memory, a lost connection.
    fn fused(op: &Fused, args: &[View<'_, Self>]) -> Result<Self>;

    /// Asks for the whole buffer and does not wait for it; what is done later is not held up.
    ///
    /// # Errors
    /// If the device is gone.
    fn begin_read(&self) -> Result<Reading> {
        let values = self.to_cpu_storage()?;
        Ok(Box::new(move || Ok(values)))
    }

    /// Bytes of memory that the buffer takes, if they are not those of its elements: a prepared
    /// weight may be kept in another form.
    fn held_bytes(&self) -> Option<u64> {
        None
    }
}

/// Waits for a buffer that was asked for.
pub type Reading = Box<dyn FnOnce() -> Result<CpuStorage> + Send>;

/// An operand: a storage and what of it is meant.
#[derive(Debug)]
pub struct View<'a, S> {
    /// The buffer.
    pub storage: &'a S,
    /// Shape, strides and offset in it, in elements.
    pub layout: &'a Layout,
}

impl<S> Clone for View<'_, S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S> Copy for View<'_, S> {}

/// Makes buffers: what [`BackendDevice`] lacks.
pub trait Device: BackendDevice + Send + Sync + 'static {
    /// A point in the order of ops.
    type Mark: Send;

    /// Marks the point after all ops so far.
    ///
    /// # Errors
    /// If the device is gone.
    fn mark(&self) -> Result<Self::Mark>;

    /// Waits until the ops before the mark are done: how progress is told truly on a device that
    /// runs behind.
    ///
    /// # Errors
    /// If the device is gone.
    fn wait(&self, mark: Self::Mark) -> Result<()>;

    /// Whether a [`wait`](Self::wait) for the mark would return at once.
    fn is_reached(&self, mark: &Self::Mark) -> bool;

    /// Begins work that will be asked for again, with other inputs of the same shapes, under the
    /// same key. A device that can replay it from a recording does so; else the caller runs it.
    ///
    /// # Errors
    /// If the device is gone, or a program is being recorded already.
    fn begin_program(&self, key: &str, inputs: &[&Self::Storage]) -> Result<Begun<Self::Storage>>;

    /// Ends the work that [`Begun::Record`] began: these are its results, or what is to be used
    /// instead of them.
    ///
    /// # Errors
    /// If the device is gone.
    fn end_program(
        &self,
        outputs: &[View<'_, Self::Storage>],
    ) -> Result<Option<Outputs<Self::Storage>>>;

    /// The work that [`Begun::Record`] began failed.
    fn abort_program(&self);

    /// The program of this key will not be asked for again.
    fn forget_program(&self, _key: &str) {}

    /// Hears of weights that will be uploaded as `dtype`, all at once, so that a remote device asks
    /// once for all of them; `progress` is told bytes that were sent, and of how many: 0 of 0 while
    /// that is not known yet.
    ///
    /// # Errors
    /// If the device is gone, or `progress` says so.
    fn announce(
        &self,
        tensors: &[&HostTensor],
        dtype: DType,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<()>;

    /// For people: `cpu`, `cuda:0`, `quic://host:port` (never a token).
    fn name(&self) -> String;

    /// Whether it has failed so that nothing will work on it any more, in this process.
    fn is_lost(&self) -> bool {
        false
    }

    /// For people: what it did so far, in a line; `None` where it does not count.
    fn statistics(&self) -> Option<String> {
        None
    }

    /// Which kernels it has, such as `avx512`: equal ones give equal bits. `None` where it does not
    /// say.
    fn kernel_path(&self) -> Option<String> {
        None
    }

    /// The dtype behind `--dtype auto`: the fastest that keeps the picture.
    fn default_dtype(&self) -> DType;

    /// What torch's CPU generator gives for `seed` after `skip` of its 32-bit outputs: the same
    /// host code for every device, so that all start from the same bits. Drawn in f32, then cast.
    ///
    /// # Errors
    /// If the memory cannot be had.
    fn randn(&self, noise: Noise, shape: &Shape, dtype: DType) -> Result<Self::Storage>;

    /// Takes a tensor from a file, in row-major order and as `dtype`.
    ///
    /// # Errors
    /// If the memory cannot be had or the cast is not possible.
    fn upload(&self, tensor: &HostTensor, dtype: DType) -> Result<Self::Storage>;
}

/// Results of a program: buffers, and which view of each is meant.
pub type Outputs<S> = Vec<(S, Layout)>;

/// What became of a program that began.
pub enum Begun<S> {
    /// Run it; nobody records.
    Run,
    /// Run it; a [`Recording`] ends what is recorded.
    Record,
    /// It was replayed: its results.
    Replayed(Outputs<S>),
}

/// The work that [`Begun::Record`] began: aborted if it is dropped, also by a panic, before it is
/// ended. A device that records for somebody who is gone would record for nobody else.
pub struct Recording<'a, D: Device>(Option<&'a D>);

impl<'a, D: Device> Recording<'a, D> {
    /// What `device` has begun.
    pub fn of(device: &'a D) -> Self {
        Self(Some(device))
    }

    /// As [`Device::end_program`].
    ///
    /// # Errors
    /// As there.
    pub fn end(mut self, outputs: &[View<'_, D::Storage>]) -> Result<Option<Outputs<D::Storage>>> {
        self.0.take().map_or(Ok(None), |device| device.end_program(outputs))
    }
}

impl<D: Device> Drop for Recording<'_, D> {
    fn drop(&mut self) {
        if let Some(device) = self.0 {
            device.abort_program();
        }
    }
}

/// Where in torch's random stream noise begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Noise {
    /// As given to `torch.Generator("cpu").manual_seed`.
    pub seed: u64,
    /// How many 32-bit outputs of the generator were drawn before.
    pub skip: u64,
}

/// Runs `run` on what `convert` makes of `items`. Of few, as most ops have, it makes a list on the
/// stack: between a model and a far device this is a good part of what an op costs.
pub fn with_each<'a, T, U, R>(
    items: &'a [T],
    convert: impl Fn(&'a T) -> U,
    run: impl FnOnce(&[U]) -> R,
) -> R {
    match items {
        [] => run(&[]),
        [a] => run(&[convert(a)]),
        [a, b] => run(&[convert(a), convert(b)]),
        [a, b, c] => run(&[convert(a), convert(b), convert(c)]),
        _ => run(&items.iter().map(convert).collect::<Vec<_>>()),
    }
}
