//! The GPU's memory: pieces that are given back when nobody has them any more, and what a recorded
//! program keeps for itself. Separate from the device because a program must not hold its device.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::driver::{Address, Driver};
use crate::error::Result;

/// A block of a program may be so many times as large as what is kept in it.
const MOST_WASTE: usize = 2;
/// A program may hold so many times what was taken at once while it was recorded, and so much more:
/// its blocks are counted by no session.
const MOST_HELD: usize = 4;
const MORE_HELD_BYTES: usize = 256 << 20;

/// A driver, and what it had to do.
pub(super) struct Hardware {
    pub driver: Box<dyn Driver>,
    pub counts: Counts,
}

/// What was done so far.
#[derive(Debug, Default)]
pub(super) struct Counts {
    /// Kernels that were launched one by one.
    pub launches: AtomicU64,
    /// Programs that were launched as a whole.
    pub replays: AtomicU64,
    /// Ops that were computed on the host, for want of a kernel.
    pub on_host: AtomicU64,
    held_bytes: AtomicU64,
    /// The most that was held at once.
    pub peak_bytes: AtomicU64,
}

impl Hardware {
    fn allocate(&self, bytes: usize) -> Result<Address> {
        let address = self.driver.allocate(bytes)?;
        let Counts { held_bytes, peak_bytes, .. } = &self.counts;
        let held = held_bytes.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        peak_bytes.fetch_max(held, Ordering::Relaxed);
        Ok(address)
    }

    fn free(&self, address: Address, bytes: usize) {
        self.driver.free(address);
        self.counts.held_bytes.fetch_sub(bytes as u64, Ordering::Relaxed);
    }
}

/// A piece of the GPU's memory.
pub(super) struct Memory {
    address: Address,
    bytes: usize,
    home: Home,
}

/// Where it goes when it is dropped.
enum Home {
    Hardware(Arc<Hardware>),
    Arena { arena: Arc<Arena>, is_kept: bool },
}

impl Memory {
    /// So many bytes, whose content is not defined.
    pub fn new(hardware: &Arc<Hardware>, bytes: usize) -> Result<Self> {
        // Of nothing, a byte: an address that is no other piece's.
        let address = hardware.allocate(bytes.max(1))?;
        Ok(Self { address, bytes, home: Home::Hardware(hardware.clone()) })
    }

    pub fn address(&self) -> Address {
        self.address
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether it is a block of this arena.
    pub fn is_of(&self, arena: &Arc<Arena>) -> bool {
        match &self.home {
            Home::Hardware(_) => false,
            Home::Arena { arena: own, .. } => Arc::ptr_eq(own, arena),
        }
    }

    /// Whether its content is the same in every run of its program.
    pub fn is_kept(&self) -> bool {
        matches!(self.home, Home::Arena { is_kept: true, .. })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        match &self.home {
            Home::Hardware(hardware) => hardware.free(self.address, self.bytes.max(1)),
            Home::Arena { arena, .. } => arena.give_back(self),
        }
    }
}

/// The memory of one program: its blocks are taken in turns while it is recorded, as they will be
/// in every replay, and stay where they are as long as it may be replayed.
pub(super) struct Arena {
    hardware: Arc<Hardware>,
    blocks: Mutex<Blocks>,
}

#[derive(Default)]
struct Blocks {
    all: Vec<Block>,
    /// Of all of them.
    bytes: usize,
    /// Of those that are taken now, and the most that were at once: what whoever records has paid
    /// for.
    taken_bytes: usize,
    most_bytes: usize,
}

struct Block {
    address: Address,
    bytes: usize,
    is_free: bool,
}

impl Arena {
    pub fn new(hardware: &Arc<Hardware>) -> Self {
        Self { hardware: hardware.clone(), blocks: Mutex::default() }
    }

    /// A block; one that is kept is used for nothing else before or after, so that what is
    /// written there once is there in every run. None if that would be more than a program may
    /// hold.
    pub fn take(self: &Arc<Self>, bytes: usize, is_kept: bool) -> Result<Option<Memory>> {
        let wanted = bytes.max(1);
        let mut blocks = self.lock();
        let fits = |block: &&mut Block| {
            block.is_free
                && block.bytes >= wanted
                && block.bytes <= wanted.saturating_mul(MOST_WASTE)
        };
        let found = blocks.all.iter_mut().filter(fits).min_by_key(|block| block.bytes);
        let address = match found.filter(|_| !is_kept) {
            Some(block) => {
                block.is_free = false;
                block.address
            }
            None => {
                let most = blocks.most_bytes.max(blocks.taken_bytes.saturating_add(wanted));
                let most = most.saturating_mul(MOST_HELD).saturating_add(MORE_HELD_BYTES);
                if blocks.bytes.saturating_add(wanted) > most {
                    return Ok(None);
                }
                let address = self.hardware.allocate(wanted)?;
                blocks.bytes += wanted;
                blocks.all.push(Block { address, bytes: wanted, is_free: false });
                address
            }
        };
        blocks.taken_bytes += wanted;
        blocks.most_bytes = blocks.most_bytes.max(blocks.taken_bytes);
        let home = Home::Arena { arena: self.clone(), is_kept };
        Ok(Some(Memory { address, bytes, home }))
    }

    /// A kept block stays what it is, but nobody has it any more.
    fn give_back(&self, memory: &Memory) {
        let mut blocks = self.lock();
        blocks.taken_bytes = blocks.taken_bytes.saturating_sub(memory.bytes.max(1));
        let own = blocks.all.iter_mut().find(|block| block.address == memory.address);
        if let Some(block) = own {
            block.is_free = !memory.is_kept();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        for block in &self.lock().all {
            self.hardware.free(block.address, block.bytes);
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        write!(
            f,
            "{} launches, {} graph replays, {} ops on the host, {} bytes of memory at most",
            of(&self.launches),
            of(&self.replays),
            of(&self.on_host),
            of(&self.peak_bytes)
        )
    }
}
