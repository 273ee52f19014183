//! Runs the targets of `tests/fuzzing` and counts what they take. Separate from the tests because a
//! counting allocator is one for a whole program.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

#[path = "../../tests/fuzzing/mod.rs"]
mod fuzzing;
#[path = "../../tests/numbers.rs"]
#[allow(dead_code, reason = "tensors are for other tests")]
mod numbers;

pub use fuzzing::{TARGETS, Target, target};
pub use numbers::Random;

/// The system's allocator; how much is in use now, and how much was at most.
pub struct Counting {
    used: AtomicUsize,
    peak: AtomicUsize,
}

#[global_allocator]
static MEMORY: Counting = Counting { used: AtomicUsize::new(0), peak: AtomicUsize::new(0) };

impl Counting {
    fn add(&self, bytes: usize) {
        let used = self.used.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak.fetch_max(used, Ordering::Relaxed);
    }
}

// SAFETY: all memory is the system's; nothing but numbers is added.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.add(layout.size());
        // SAFETY: the caller's promise is handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.add(layout.size());
        // SAFETY: the caller's promise is handed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        self.used.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is handed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both exist while one is copied into the other.
        self.add(size);
        self.used.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is handed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Runs a target on bytes; the most memory that it took at once.
///
/// # Panics
/// If it took more than it may.
pub fn run(target: &Target, bytes: &[u8]) -> usize {
    let before = MEMORY.used.load(Ordering::Relaxed);
    MEMORY.peak.store(before, Ordering::Relaxed);
    (target.run)(bytes);
    let took = MEMORY.peak.load(Ordering::Relaxed).saturating_sub(before);
    let max = (target.max_memory_bytes)(bytes.len());
    assert!(took <= max, "{} bytes of memory for {} of input, at most {max}", took, bytes.len());
    took
}

/// Runs a target by name: all that the programs of libFuzzer do.
///
/// # Panics
/// If there is no such target, or it took too much memory.
pub fn fuzz(name: &str, bytes: &[u8]) {
    let target = target(name).expect("a target's name");
    // What is made once and kept is no run's own.
    static FIRST: std::sync::Once = std::sync::Once::new();
    FIRST.call_once(|| warm_up(target));
    run(target, bytes);
}

/// Lets a target make what it makes once.
pub fn warm_up(target: &Target) {
    for seed in 0..100 {
        (target.run)(&(target.draw)(&mut Random(seed)));
    }
}
