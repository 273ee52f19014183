//! The buffers of one session. Separate because here a foreign id becomes a buffer or an error,
//! and here a session's memory is counted.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Layout;

use super::library::Recipe;
use super::op::Id;
use crate::backend::order::fits;
use crate::backend::{Backend, Meta};
use crate::error::{Error, Result};

/// A buffer and what it is.
#[derive(Debug)]
pub struct Buffer<B> {
    /// On the worker's device.
    pub storage: B,
    /// dtype and the layout it was made with, which covers all of it.
    pub meta: Meta,
    /// The memory that is given back when the buffer goes: held for what its end does.
    _charge: Option<Charge>,
}

#[derive(Debug)]
struct Charge {
    bytes: u64,
    total: Arc<AtomicU64>,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.total.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl<B> Buffer<B> {
    /// A buffer that no session pays for.
    pub fn shared(storage: B, meta: Meta) -> Self {
        Self { storage, meta, _charge: None }
    }

    /// Elements of the whole buffer.
    pub fn elem_count(&self) -> usize {
        self.meta.layout.shape().elem_count()
    }

    /// Bytes of the whole buffer.
    pub fn bytes(&self) -> u64 {
        bytes(&self.meta)
    }
}

fn bytes(meta: &Meta) -> u64 {
    meta.layout.shape().elem_count() as u64 * meta.dtype.size_in_bytes() as u64
}

/// Elements, were no dimension empty: how often a loop over the dimensions may run.
fn extent(layout: &Layout) -> u64 {
    layout.dims().iter().fold(1u64, |extent, &dim| extent.saturating_mul(dim.max(1) as u64))
}

/// Why a buffer could not be made: the first cause, handed on by everything that needed it.
pub type Poison = Arc<str>;

/// What an id stands for.
#[derive(Debug)]
pub enum Slot<B> {
    /// A buffer.
    Ready(Arc<Buffer<B>>),
    /// A weight that nobody has needed yet.
    Lazy(Recipe),
    /// A buffer that could not be made.
    Poisoned(Poison),
}

impl<B> Clone for Slot<B> {
    fn clone(&self) -> Self {
        match self {
            Slot::Ready(buffer) => Slot::Ready(buffer.clone()),
            Slot::Lazy(recipe) => Slot::Lazy(recipe.clone()),
            Slot::Poisoned(poison) => Slot::Poisoned(poison.clone()),
        }
    }
}

/// Hashes ids, which are counted here and not chosen by a stranger: a multiplication is enough.
#[derive(Debug, Clone, Copy, Default)]
struct Mixed(u64);

impl Hasher for Mixed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, number: u64) {
        let product = u128::from(self.0 ^ number) * 0x9e37_79b9_7f4a_7c15;
        self.0 = (product >> 64) as u64 ^ product as u64;
    }
}

/// All buffers of a session.
#[derive(Debug)]
pub struct Heap<B> {
    slots: HashMap<Id, Slot<B>, BuildHasherDefault<Mixed>>,
    used: Arc<AtomicU64>,
    /// The most that was in use.
    peak: AtomicU64,
    max_bytes: u64,
    max_buffers: usize,
}

impl<B: Backend> Heap<B> {
    /// An empty heap that may grow to `max_bytes` in `max_buffers` buffers.
    pub fn new(max_bytes: u64, max_buffers: usize) -> Self {
        let (slots, used, peak) = Default::default();
        Self { slots, used, peak, max_bytes, max_buffers }
    }

    /// Bytes in use, those that only programs hold included.
    pub fn used_bytes(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// The most bytes that were in use at once.
    pub fn peak_bytes(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    /// What stands under `id`.
    ///
    /// # Errors
    /// If nothing does.
    pub fn get(&self, id: Id) -> Result<&Slot<B>> {
        let slot = self.slots.get(&id);
        slot.ok_or_else(|| Error::other(format!("buffer #{} is not there", id.0)))
    }

    /// Puts something under `id`.
    ///
    /// # Errors
    /// If there are too many buffers.
    pub fn put(&mut self, id: Id, slot: Slot<B>) -> Result<()> {
        if self.slots.len() >= self.max_buffers {
            let max = self.max_buffers;
            return Err(Error::other(format!("more than {max} buffers in one session")));
        }
        self.slots.insert(id, slot);
        Ok(())
    }

    /// Takes what stands under `id` away.
    pub fn take(&mut self, id: Id) -> Option<Slot<B>> {
        self.slots.remove(&id)
    }

    /// Whether there is room for a result.
    ///
    /// # Errors
    /// Says how much was needed and how much is left.
    pub fn check_room(&self, meta: &Meta) -> Result<()> {
        let (used, max) = (self.used_bytes(), self.max_bytes);
        // An empty result of a large shape costs no memory, but work.
        let needed = extent(&meta.layout).saturating_mul(meta.dtype.size_in_bytes() as u64);
        if used.saturating_add(needed) > max {
            return Err(Error::out_of_memory(format_args!(
                "{needed} bytes beside the {used} in use are more than the \
                 session's {max} (worker --session-memory); a smaller picture needs less"
            )));
        }
        Ok(())
    }

    /// Whether a view is one that somebody could want: repeated elements cost no memory, but each
    /// of them is worked on.
    ///
    /// # Errors
    /// If it repeats a buffer to more than the session may have.
    pub fn check_view(&self, buffer: &Buffer<B>, view: &Layout) -> Result<()> {
        let count = extent(view);
        let bytes = count.saturating_mul(buffer.meta.dtype.size_in_bytes() as u64);
        if count > buffer.elem_count() as u64 && bytes > self.max_bytes {
            let (dims, max) = (view.dims(), self.max_bytes);
            return Err(Error::other(format!(
                "a view repeats {} elements to {dims:?}, more than the session's {max} bytes \
                 (worker --session-memory)",
                buffer.elem_count()
            )));
        }
        Ok(())
    }

    /// A buffer that this session pays for.
    pub fn charge(&self, storage: B, meta: Meta) -> Arc<Buffer<B>> {
        let bytes = bytes(&meta);
        let used = self.used.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if used > self.peak.load(Ordering::Relaxed) {
            self.peak.store(used, Ordering::Relaxed);
        }
        let charge = Some(Charge { bytes, total: self.used.clone() });
        Arc::new(Buffer { storage, meta, _charge: charge })
    }
}

/// The view that an operand means, if it is not the whole buffer and lies within it.
///
/// # Errors
/// If it does not.
pub fn view_of<B>(buffer: &Buffer<B>, layout: Option<&Layout>) -> Result<Option<Layout>> {
    match layout {
        None => Ok(None),
        // Where it begins and how it steps means nothing, and could be anything.
        Some(layout) if layout.dims().contains(&0) => {
            Ok(Some(Layout::contiguous(layout.shape().clone())))
        }
        Some(layout) if fits(layout, buffer.elem_count()) => Ok(Some(layout.clone())),
        Some(layout) => Err(Error::other(format!(
            "a view of shape {:?}, strides {:?}, offset {} reaches beyond its {} elements",
            layout.dims(),
            layout.stride(),
            layout.start_offset(),
            buffer.elem_count()
        ))),
    }
}

/// A buffer and what of it is meant.
#[derive(Debug)]
pub struct Resolved<B> {
    /// The buffer, kept while it is used.
    pub buffer: Arc<Buffer<B>>,
    view: Option<Layout>,
}

impl<B> Resolved<B> {
    /// A view of a buffer; without a layout, the whole.
    ///
    /// # Errors
    /// If it does not lie within.
    pub fn new(buffer: Arc<Buffer<B>>, layout: Option<&Layout>) -> Result<Self> {
        let view = view_of(&buffer, layout)?;
        Ok(Self { buffer, view })
    }

    /// Of the view.
    pub fn layout(&self) -> &Layout {
        self.view.as_ref().unwrap_or(&self.buffer.meta.layout)
    }
}
