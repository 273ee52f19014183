//! Weights by content, as the worker sees them: what it has, what is coming, what it makes of them.
//! Separate because this is the one thing that sessions share: equal weights, prepared forms
//! included, exist once for all of them.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use candle_core::DType;

use super::heap::Buffer;
use super::op::Digest;
use super::transport::BulkSink;
use crate::backend::{Backend, Device, Fused, HostTensor, Meta, Role, View};
use crate::error::{Error, Result};

/// One session's view of the weights that lie on the worker's side or are on their way there. What
/// the session found or sent stays until the view goes.
pub trait Library: Send + Sync {
    /// For each weight, whether it is there, whole and intact.
    fn has(&self, digests: &[Digest]) -> Vec<bool>;

    /// The weight; if it is on its way, waits for it, but not for ever.
    ///
    /// # Errors
    /// If it does not come: at once if one of this session's transfers broke off, or at its end.
    fn get(&self, digest: &Digest) -> Result<HostTensor>;

    /// Takes a weight of the client: its row-major bytes follow.
    ///
    /// # Errors
    /// If it is too large, or there is no room.
    fn receive(&self, digest: Digest, dtype: DType, dims: &[usize]) -> Result<Box<dyn BulkSink>>;

    /// The client is gone: whoever waits for its weights is told.
    fn end(&self);
}

/// How a buffer follows from a weight: equal recipes give equal buffers.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Recipe {
    /// The weight.
    pub digest: Digest,
    /// What it is cast to.
    pub dtype: DType,
    /// The shape under which it is used.
    pub dims: Vec<usize>,
    /// What it is packed for, if it is.
    pub role: Option<Role>,
}

/// The buffers made from weights, shared by all sessions of a worker, kept until the room is
/// needed.
pub struct Weights<B> {
    max_bytes: u64,
    table: Mutex<Table<B>>,
    /// Something was made, or could not be.
    made: Condvar,
}

struct Table<B> {
    buffers: HashMap<Recipe, Entry<B>>,
    /// What somebody makes just now.
    making: HashSet<Recipe>,
    /// Of the buffers and of what is being made.
    bytes: u64,
    /// Counts uses, to know which was used least recently.
    clock: u64,
}

struct Entry<B> {
    buffer: Arc<Buffer<B>>,
    bytes: u64,
    used: u64,
}

impl<B: Backend> Weights<B> {
    /// Room for `max_bytes` of buffers.
    pub fn new(max_bytes: u64) -> Self {
        let (buffers, making) = (HashMap::new(), HashSet::new());
        let table = Mutex::new(Table { buffers, making, bytes: 0, clock: 0 });
        Self { max_bytes, table, made: Condvar::new() }
    }

    /// Bytes of memory that the buffers take, those that nobody uses included.
    pub fn used_bytes(&self) -> u64 {
        self.lock().bytes
    }

    /// The buffer of `recipe`, made from the weight that `fetch` gives if nobody has made it
    /// before. Of several that ask at once one makes it, and the others wait. `make` is
    /// [`prepare`], when it may run.
    ///
    /// # Errors
    /// If the weight does not come, does not fit the recipe, or there is no room.
    pub fn get(
        &self,
        recipe: &Recipe,
        fetch: impl FnOnce() -> Result<HostTensor>,
        make: impl Fn(&HostTensor) -> Result<B>,
    ) -> Result<Arc<Buffer<B>>> {
        if let Some(buffer) = self.find(recipe) {
            return Ok(buffer);
        }
        // Waiting for bytes is not making: a client that stalls must not hold others back.
        let host = fetch()?;
        let meta = Meta::row_major(recipe.dtype, recipe.dims.clone())?;
        if host.layout().shape().elem_count() != meta.layout.shape().elem_count() {
            let (have, want) = (host.layout().dims(), &recipe.dims);
            return Err(Error::other(format!("a weight of shape {have:?} was used as {want:?}")));
        }
        let mut making = match self.begin(recipe) {
            Begun::Found(buffer) => return Ok(buffer),
            Begun::Mine(making) => making,
        };
        making
            .reserve(meta.layout.shape().elem_count() as u64 * meta.dtype.size_in_bytes() as u64)?;
        let storage = match make(&host) {
            Err(error) if error.is_out_of_memory() && self.forget_unused() => make(&host)?,
            made => made?,
        };
        debug_assert_eq!(storage.dtype(), recipe.dtype);
        making.reserve(storage.held_bytes().unwrap_or(0))?;
        Ok(making.finish(Arc::new(Buffer::shared(storage, meta))))
    }

    /// Forgets what nobody uses, for its memory; whether there was anything.
    pub fn forget_unused(&self) -> bool {
        let mut table = self.lock();
        let before = table.buffers.len();
        // Held by the table alone; nobody can take it while the table is locked.
        let is_used = |entry: &Entry<B>| Arc::strong_count(&entry.buffer) > 1;
        let unused: u64 = table.buffers.values().filter(|e| !is_used(e)).map(|e| e.bytes).sum();
        table.buffers.retain(|_, entry| is_used(entry));
        table.bytes = table.bytes.saturating_sub(unused);
        table.buffers.len() < before
    }

    fn find(&self, recipe: &Recipe) -> Option<Arc<Buffer<B>>> {
        self.lock().find(recipe)
    }

    fn begin<'w>(&'w self, recipe: &'w Recipe) -> Begun<'w, B> {
        let mut table = self.lock();
        loop {
            if let Some(buffer) = table.find(recipe) {
                return Begun::Found(buffer);
            }
            if table.making.insert(recipe.clone()) {
                return Begun::Mine(Making { weights: self, recipe, reserved: 0 });
            }
            // Whoever makes it needs nobody else: it ends, and so does this.
            table = self.made.wait(table).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table<B>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What `recipe` says, made of a weight that fits it.
///
/// # Errors
/// If the device cannot.
pub fn prepare<B: Backend>(recipe: &Recipe, host: &HostTensor, device: &B::Device) -> Result<B> {
    let plain = device.upload(host, recipe.dtype)?;
    let meta = Meta::row_major(recipe.dtype, recipe.dims.clone())?;
    match recipe.role {
        None => Ok(plain),
        Some(role) => {
            B::fused(&Fused::Prepare(role), &[View { storage: &plain, layout: &meta.layout }])
        }
    }
}

impl<B> Table<B> {
    fn find(&mut self, recipe: &Recipe) -> Option<Arc<Buffer<B>>> {
        self.clock += 1;
        let entry = self.buffers.get_mut(recipe)?;
        entry.used = self.clock;
        Some(entry.buffer.clone())
    }

    /// Forgets what nobody uses, least recently used first, until `bytes` fit.
    fn make_room(&mut self, bytes: u64, max_bytes: u64) -> Result<()> {
        while self.bytes.saturating_add(bytes) > max_bytes {
            // Held by this table alone; nobody can take it while the table is locked.
            let unused = self.buffers.iter().filter(|(_, e)| Arc::strong_count(&e.buffer) == 1);
            let oldest = unused.min_by_key(|(_, e)| e.used).map(|(recipe, _)| recipe.clone());
            let Some(entry) = oldest.and_then(|recipe| self.buffers.remove(&recipe)) else {
                let used = self.bytes;
                return Err(Error::out_of_memory(format_args!(
                    "{bytes} bytes of weights beside the {used} in use are more \
                     than the worker's {max_bytes} (worker --weights-memory)"
                )));
            };
            self.bytes = self.bytes.saturating_sub(entry.bytes);
        }
        Ok(())
    }
}

enum Begun<'w, B: Backend> {
    Found(Arc<Buffer<B>>),
    Mine(Making<'w, B>),
}

/// A buffer that is being made: others wait until this is gone, however it ends.
struct Making<'w, B: Backend> {
    weights: &'w Weights<B>,
    recipe: &'w Recipe,
    reserved: u64,
}

impl<B: Backend> Making<'_, B> {
    /// Counts at least `bytes` for it.
    fn reserve(&mut self, bytes: u64) -> Result<()> {
        let more = bytes.saturating_sub(self.reserved);
        let mut table = self.weights.lock();
        table.make_room(more, self.weights.max_bytes)?;
        table.bytes += more;
        self.reserved += more;
        Ok(())
    }

    fn finish(mut self, buffer: Arc<Buffer<B>>) -> Arc<Buffer<B>> {
        let mut table = self.weights.lock();
        table.clock += 1;
        let (used, bytes) = (table.clock, std::mem::take(&mut self.reserved));
        let entry = Entry { buffer: buffer.clone(), bytes, used };
        table.buffers.insert(self.recipe.clone(), entry);
        buffer
    }
}

impl<B: Backend> Drop for Making<'_, B> {
    fn drop(&mut self) {
        let mut table = self.weights.lock();
        table.bytes = table.bytes.saturating_sub(self.reserved);
        table.making.remove(self.recipe);
        self.weights.made.notify_all();
    }
}
