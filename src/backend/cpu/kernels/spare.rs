//! Large buffers whose tensors are gone, kept for the next results. Separate because storages give
//! and kernels take. A fresh buffer costs a page fault for every 4 KiB, which takes longer than
//! most kernels need to fill it.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use super::memory::zeroed;
use crate::error::Result;

/// Smaller buffers are left to the allocator, which keeps them itself.
const SMALLEST: usize = 1 << 20;
/// Elements kept at most, over all buffers: 512 MiB.
const MOST: usize = 1 << 27;

/// One for the process, as the memory is.
static SPARE: Mutex<VecDeque<Vec<f32>>> = Mutex::new(VecDeque::new());

/// Keeps a buffer for later if it is large; the oldest make room.
pub fn give(buffer: Vec<f32>) {
    if (SMALLEST..=MOST).contains(&buffer.capacity()) {
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        spare.push_back(buffer);
        shrink(&mut spare, MOST);
    }
}

/// Lets go of all but `most` elements. Loading calls it: each weight is another size, so what it
/// leaves here would only be memory beside the weights.
pub fn trim(most: usize) {
    shrink(&mut SPARE.lock().unwrap_or_else(PoisonError::into_inner), most);
}

fn shrink(spare: &mut VecDeque<Vec<f32>>, most: usize) {
    while spare.iter().map(Vec::capacity).sum::<usize>() > most {
        spare.pop_front();
    }
}

/// A buffer for a result, with anything in it: the kernel must write every element, so that
/// nothing of an earlier tensor shows.
///
/// # Errors
/// If the memory cannot be had.
pub fn take(len: usize) -> Result<Vec<f32>> {
    let kept = if len < SMALLEST { None } else { find(len) };
    let Some(mut buffer) = kept else { return zeroed(len) };
    buffer.resize(len, 0.0);
    Ok(buffer)
}

/// The smallest that is large enough, unless it wastes a quarter.
fn find(len: usize) -> Option<Vec<f32>> {
    let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
    let fitting = spare.iter().enumerate();
    let fitting = fitting.filter(|(_, kept)| (len..=len + len / 4).contains(&kept.capacity()));
    let (best, _) = fitting.min_by_key(|(_, kept)| kept.capacity())?;
    spare.remove(best)
}
