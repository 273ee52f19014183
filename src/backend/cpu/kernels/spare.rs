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
pub const SMALLEST_BYTES: usize = 1 << 22;
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

    /// The smallest that is large enough, unless it wastes half. Where there is none, as many bytes
    /// of smaller ones make room for what will be a fresh buffer: they are of an earlier stage and
    /// its sizes. As only smaller ones do, steps of one kind soon find all of theirs.
    fn find(&self, len: usize) -> Option<Vec<T>> {
        let mut kept = self.lock();
        let fitting = kept.iter().enumerate();
        let fitting = fitting.filter(|(_, kept)| (len..=2 * len).contains(&kept.capacity()));
        if let Some((best, _)) = fitting.min_by_key(|(_, kept)| kept.capacity()) {
            return kept.remove(best);
        }
        let will_be_kept = len.saturating_mul(size_of::<T>()) <= MOST_BYTES;
        let mut room = if will_be_kept { 0 } else { len };
        kept.retain(|kept| {
            let stays = room >= len || kept.capacity() >= len;
            room += if stays { 0 } else { kept.capacity() };
            stays
        });
        None
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that buffers of so many mebibytes have.
    fn shelf_of(sizes: &[usize]) -> Shelf<u8> {
        let shelf = Shelf::new();
        sizes.iter().for_each(|mebibytes| shelf.give(vec![0; mebibytes << 20]));
        shelf
    }

    fn mebibytes(shelf: &Shelf<u8>) -> Vec<usize> {
        shelf.lock().iter().map(|kept| kept.capacity() >> 20).collect()
    }

    #[test]
    fn a_buffer_is_found_again_and_a_fresh_one_replaces_smaller_ones_of_an_earlier_stage() {
        let check = |sizes: &[usize], wanted: usize, found: bool, left: &[usize]| {
            let shelf = shelf_of(sizes);
            assert_eq!(shelf.find(wanted << 20).is_some(), found, "{sizes:?} {wanted}");
            assert_eq!(mebibytes(&shelf), left, "{sizes:?} {wanted}");
        };
        check(&[8, 12, 10], 9, true, &[8, 12]);
        check(&[14, 12, 10, 18], 13, true, &[12, 10, 18]);
        check(&[8, 12, 10], 11, true, &[8, 10]);
        check(&[30, 12, 10], 13, false, &[30]);
        check(&[60, 5, 55, 6, 7, 8, 9], 26, false, &[60, 55, 9]);
    }

    #[test]
    fn steps_of_one_kind_find_all_of_their_buffers_before_long() {
        let shelf = shelf_of(&[300]);
        let sizes = [5, 7, 20, 5, 60, 9, 100, 25, 60];
        for step in 0..8 {
            // Two at a time are in use.
            let mut used: VecDeque<Vec<u8>> = VecDeque::new();
            for size in sizes {
                let found = shelf.find(size << 20);
                assert!(step < 6 || found.is_some(), "step {step}: {size} MiB are missed");
                used.push_back(found.unwrap_or_else(|| vec![0; size << 20]));
                if used.len() > 2 {
                    used.pop_front().into_iter().for_each(|buffer| shelf.give(buffer));
                }
            }
            used.into_iter().for_each(|buffer| shelf.give(buffer));
        }
    }
}
