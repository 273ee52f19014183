//! The weights of a worker by content, on its disk or in its memory: what clients send once is
//! there for all sessions to come. Separate from [`library`](super::library), which says what a
//! session needs and makes buffers of it.
//!
//! A weight is a file named by its digest. It is received beside the others and renamed once its
//! bytes were verified; it is verified again before it is used by another process, and mapped,
//! never read into memory. What sessions found or sent stays until they end; of the rest, the
//! least recently used goes when room is needed. Several workers may share a folder.

mod file;
mod incoming;
mod session;
mod table;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::library::Library;
use crate::error::Result;
pub use file::{header, verified};
use session::Session;
use table::Table;

/// What the weights of a worker may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all weights, those on their way included.
    pub cache_bytes: u64,
    /// Bytes of one weight.
    pub weight_bytes: u64,
    /// Weights on their way at once, in one session.
    pub transfers: usize,
    /// Bytes of the weights on their way at once, in one session.
    pub transfer_bytes: u64,
    /// How long a session may wait for a weight while none of its bytes come.
    pub stall: Duration,
}

impl Limits {
    /// `cache_bytes` for all weights, and what is sensible for the rest.
    pub fn new(cache_bytes: u64) -> Self {
        Self {
            cache_bytes,
            // The largest tensor of any Stable Diffusion model, an embedding in f32, has 1 GiB.
            weight_bytes: 4 << 30,
            transfers: 64,
            transfer_bytes: 8 << 30,
            stall: Duration::from_secs(30),
        }
    }
}

/// The weights of a worker.
#[derive(Clone)]
pub struct DiskLibrary(Arc<Table>);

impl DiskLibrary {
    /// The weights in `folder`, which is made if it is missing.
    ///
    /// # Errors
    /// If the folder cannot be made, written or listed.
    pub fn open(folder: &Path, limits: Limits) -> Result<Self> {
        Ok(Self(Arc::new(Table::open(folder, limits)?)))
    }

    /// Weights that are kept in memory and go with the worker: `--cache-dir none`.
    pub fn in_memory(limits: Limits) -> Self {
        Self(Arc::new(Table::in_memory(limits)))
    }

    /// The view of one session; what it relies on is let go with it.
    pub fn session(&self) -> Arc<dyn Library> {
        Arc::new(Session::new(self.0.clone()))
    }

    /// Bytes of all weights, those on their way included.
    pub fn used_bytes(&self) -> u64 {
        self.0.used_bytes()
    }
}
