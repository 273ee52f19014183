//! One session's view of the weights: what it relies on, what it waits for. Separate from the
//! table because all of this ends with the session.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use candle_core::DType;
use rayon::prelude::*;

use super::file::{byte_len, hex};
use super::incoming::{self, Incoming};
use super::table::Table;
use crate::backend::HostTensor;
use crate::error::{Error, Result};
use crate::remote::library::Library;
use crate::remote::op::Digest;
use crate::remote::transport::BulkSink;

/// A session that uses the table.
pub struct Session(pub(super) Arc<Shared>);

/// What a session and its transfers share.
pub struct Shared {
    pub table: Arc<Table>,
    state: Mutex<State>,
    /// A weight came, or none will come.
    changed: Condvar,
    /// Nothing could be written: what comes stays in memory, until another session tries again.
    is_disk_full: AtomicBool,
}

#[derive(Default)]
struct State {
    /// Pinned in the table.
    held: HashMap<Digest, HostTensor>,
    transfers: usize,
    transfer_bytes: u64,
    /// Of all transfers, to notice that they go on.
    received_bytes: u64,
    /// Why nothing more will come.
    failure: Option<Error>,
}

impl Session {
    pub fn new(table: Arc<Table>) -> Self {
        Self(Arc::new(Shared {
            table,
            state: Mutex::default(),
            changed: Condvar::new(),
            is_disk_full: AtomicBool::new(false),
        }))
    }
}

impl Library for Session {
    fn has(&self, digests: &[Digest]) -> Vec<bool> {
        // Verifying reads every byte: all cores, and the disk's queue, take part.
        digests.par_iter().map(|digest| self.0.find(digest).is_some()).collect()
    }

    fn get(&self, digest: &Digest) -> Result<HostTensor> {
        if let Some(tensor) = self.0.find(digest) {
            return Ok(tensor);
        }
        let stall = self.0.table.limits.stall;
        let mut state = self.0.lock();
        loop {
            if let Some(tensor) = state.held.get(digest) {
                return Ok(tensor.clone());
            }
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            let received = state.received_bytes;
            let waited = self.0.changed.wait_timeout(state, stall);
            let timeout;
            (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() && state.received_bytes == received {
                let name = hex(digest);
                let name = name.get(..12).unwrap_or_default();
                return Err(Error::remote(format!(
                    "weight {name} did not come: no weights were received for {stall:?}"
                )));
            }
        }
    }

    fn receive(&self, digest: Digest, dtype: DType, dims: &[usize]) -> Result<Box<dyn BulkSink>> {
        let max = self.0.table.limits.weight_bytes;
        let Some(len) = byte_len(dtype, dims).filter(|&len| len <= max) else {
            return Err(Error::remote(format!(
                "a weight of {} and shape {dims:?} is larger than {max} bytes",
                dtype.as_str()
            )));
        };
        Ok(Box::new(Incoming::new(self.0.clone(), digest, dtype, dims, len, incoming::create)?))
    }

    fn end(&self) {
        self.0.fail(Error::remote("the client is gone"));
    }
}

impl Shared {
    /// The weight, if it is there; it then stays.
    pub fn find(&self, digest: &Digest) -> Option<HostTensor> {
        if let Some(tensor) = self.lock().held.get(digest) {
            return Some(tensor.clone());
        }
        if !self.table.is_intact(digest) {
            return None;
        }
        let tensor = self.table.pin(digest)?;
        self.hold(*digest, tensor.clone());
        Some(tensor)
    }

    /// Where weights that come are written; `None` if they are to stay in memory.
    pub fn folder(&self) -> Option<&Path> {
        let folder = self.table.writable_folder();
        folder.filter(|_| !self.is_disk_full.load(Ordering::Relaxed))
    }

    /// A weight could not be written. Said once: there may be hundreds.
    pub fn cannot_write(&self, error: &std::io::Error) {
        if !self.is_disk_full.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "the cache of weights cannot be written: {error}; what this session sends stays \
                 in memory (--cache-dir, --cache-size)"
            );
        }
    }

    /// Keeps a weight that was pinned for this session.
    pub fn hold(&self, digest: Digest, tensor: HostTensor) {
        if self.lock().held.insert(digest, tensor).is_some() {
            // Pinned twice.
            self.table.unpin(&digest);
        }
        self.changed.notify_all();
    }

    /// A transfer begins.
    pub fn begin(&self, bytes: u64) -> Result<()> {
        let limits = &self.table.limits;
        let mut state = self.lock();
        let all = state.transfer_bytes.saturating_add(bytes);
        if state.transfers >= limits.transfers || all > limits.transfer_bytes {
            return Err(Error::remote(format!(
                "more than {} weights or {} bytes of them at once",
                limits.transfers, limits.transfer_bytes
            )));
        }
        state.transfers += 1;
        state.transfer_bytes = all;
        Ok(())
    }

    /// A transfer goes on.
    pub fn received(&self, bytes: u64) {
        let mut state = self.lock();
        state.received_bytes = state.received_bytes.saturating_add(bytes);
    }

    /// A transfer of `bytes` is over.
    pub fn finished(&self, bytes: u64) {
        let mut state = self.lock();
        state.transfers = state.transfers.saturating_sub(1);
        state.transfer_bytes = state.transfer_bytes.saturating_sub(bytes);
    }

    /// Nothing more will come: the first reason stays.
    pub fn fail(&self, error: Error) {
        self.lock().failure.get_or_insert(error);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        for digest in state.held.keys() {
            self.table.unpin(digest);
        }
    }
}
