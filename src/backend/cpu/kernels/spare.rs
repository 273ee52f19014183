//! Large buffers whose tensors are gone, kept for the next results. Separate because storages give
//! and kernels take. A fresh buffer costs a page fault for every 4 KiB, which takes longer than
//! most kernels need to fill it.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::CpuStorage;
use half::{bf16, f16};

use super::memory::{Plain, zeroed};
use super::pair::Pair;
use crate::error::Result;

/// Smaller buffers are left to the allocator, which keeps them itself.
const SMALLEST_BYTES: usize = 1 << 22;
/// Kept at most, over all buffers of a type.
const MOST_BYTES: usize = 1 << 29;

/// Buffers of one type, the oldest first; one shelf for the process, as the memory is.
pub struct Shelf<T>(Mutex<VecDeque<Vec<T>>>);

/// A number whose buffers are kept.
pub trait Kept: Plain + Default {
    /// Where they are.
    fn shelf() -> &'static Shelf<Self>;
}

impl Kept for f32 {
    fn shelf() -> &'static Shelf<Self> {
        static SHELF: Shelf<f32> = Shelf::new();
        &SHELF
    }
}

impl Kept for f16 {
    fn shelf() -> &'static Shelf<Self> {
        static SHELF: Shelf<f16> = Shelf::new();
        &SHELF
    }
}

impl Kept for bf16 {
    fn shelf() -> &'static Shelf<Self> {
        static SHELF: Shelf<bf16> = Shelf::new();
        &SHELF
    }
}

impl Kept for Pair {
    fn shelf() -> &'static Shelf<Self> {
        static SHELF: Shelf<Pair> = Shelf::new();
        &SHELF
    }
}

impl<T> Shelf<T> {
    const fn new() -> Self {
        Self(Mutex::new(VecDeque::new()))
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Vec<T>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give(&self, buffer: Vec<T>) {
        let bytes = buffer.capacity().saturating_mul(size_of::<T>());
        if (SMALLEST_BYTES..=MOST_BYTES).contains(&bytes) {
            let mut kept = self.lock();
            kept.push_back(buffer);
            shrink(&mut kept, MOST_BYTES);
        }
    }

    /// The smallest that is large enough, unless it wastes a quarter.
    fn find(&self, len: usize) -> Option<Vec<T>> {
        let mut kept = self.lock();
        let fitting = kept.iter().enumerate();
        let fitting = fitting.filter(|(_, kept)| (len..=len + len / 4).contains(&kept.capacity()));
        let (best, _) = fitting.min_by_key(|(_, kept)| kept.capacity())?;
        kept.remove(best)
    }
}

fn shrink<T>(kept: &mut VecDeque<Vec<T>>, most_bytes: usize) {
    while kept.iter().map(|kept| kept.capacity() * size_of::<T>()).sum::<usize>() > most_bytes {
        kept.pop_front();
    }
}

/// Keeps a buffer of a kernel for later if it is large; the oldest make room.
pub fn keep<T: Kept>(buffer: Vec<T>) {
    T::shelf().give(buffer);
}

/// Keeps a buffer for later if it is large and of a dtype that kernels give; the oldest make room.
pub fn give(storage: &mut CpuStorage) {
    match storage {
        CpuStorage::F32(values) => f32::shelf().give(std::mem::take(values)),
        CpuStorage::F16(values) => f16::shelf().give(std::mem::take(values)),
        CpuStorage::BF16(values) => bf16::shelf().give(std::mem::take(values)),
        CpuStorage::U8(_)
        | CpuStorage::U32(_)
        | CpuStorage::I16(_)
        | CpuStorage::I32(_)
        | CpuStorage::I64(_)
        | CpuStorage::F64(_)
        | CpuStorage::F8E4M3(_)
        | CpuStorage::F6E2M3(_)
        | CpuStorage::F6E3M2(_)
        | CpuStorage::F4(_)
        | CpuStorage::F8E8M0(_) => {}
    }
}

/// Lets go of all but `most_bytes` of each type. Loading calls it: each weight is another size, so
/// what it leaves here would only be memory beside the weights.
pub fn trim(most_bytes: usize) {
    shrink(&mut f32::shelf().lock(), most_bytes);
    shrink(&mut f16::shelf().lock(), most_bytes);
    shrink(&mut bf16::shelf().lock(), most_bytes);
    shrink(&mut Pair::shelf().lock(), most_bytes);
}

/// A buffer for a result, with anything in it: the kernel must write every element, so that
/// nothing of an earlier tensor shows.
///
/// # Errors
/// If the memory cannot be had.
pub fn take<T: Kept>(len: usize) -> Result<Vec<T>> {
    let is_small = len.saturating_mul(size_of::<T>()) < SMALLEST_BYTES;
    let kept = if is_small { None } else { T::shelf().find(len) };
    let Some(mut buffer) = kept else { return zeroed(len) };
    buffer.resize(len, T::default());
    Ok(buffer)
}
