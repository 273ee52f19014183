//! All weights of a worker, whoever sent them: what is there, what of it is in use, what goes when
//! room is needed. Separate from the sessions, which wait, and from the transfers, which write.

use std::collections::HashMap;
use std::fs::{File, FileTimes, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use super::Limits;
use super::file::{self, Found, Kept};
use crate::backend::HostTensor;
use crate::backend::host::FileStamp;
use crate::error::{Error, Result};
use crate::remote::op::Digest;

/// Files of the cache at most; each is mapped while it is known, and systems allow 65,530 maps.
const MAX_ENTRIES: usize = 32_768;
/// The names of files that are being received.
pub const INCOMING: &str = ".incoming-";
/// Where files cannot be locked, those that nobody has written to for so long were left by a worker
/// that was killed.
const ABANDONED_AFTER: Duration = Duration::from_secs(3600);

/// The weights that a worker has.
pub struct Table {
    /// `None`: they are in memory.
    pub folder: Option<PathBuf>,
    pub limits: Limits,
    /// What comes stays in memory.
    is_read_only: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    entries: HashMap<Digest, Entry>,
    /// Of all entries, and what is reserved for transfers.
    bytes: u64,
    /// Counts uses, to know which was used least recently.
    clock: u64,
}

#[derive(Default)]
struct Entry {
    bytes: u64,
    used: u64,
    /// Sessions that rely on it.
    pins: usize,
    /// Once it was verified.
    kept: Option<Kept>,
}

impl Table {
    /// Weights in memory, none yet.
    pub fn in_memory(limits: Limits) -> Self {
        Self { folder: None, limits, is_read_only: false.into(), state: Mutex::default() }
    }

    /// The weights in `folder`, which are verified when they are asked for. One that cannot be
    /// written serves what it has.
    ///
    /// # Errors
    /// If the folder cannot be made or listed.
    pub fn open(folder: &Path, limits: Limits) -> Result<Self> {
        let failed = |error: std::io::Error| {
            Error::other(format!("--cache-dir {}: {error}", folder.display()))
        };
        std::fs::create_dir_all(folder).map_err(failed)?;
        let folder = folder.canonicalize().map_err(failed)?;
        // A folder that cannot be written is found out now, not in the first transfer.
        let probe = tempfile::Builder::new().prefix(INCOMING).tempfile_in(&folder);
        if let Err(error) = &probe {
            tracing::warn!(
                "--cache-dir {}: {error}; weights that clients send stay in memory",
                folder.display()
            );
        }
        let is_read_only = probe.is_err().into();
        let mut found = Vec::new();
        for entry in folder.read_dir().map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Ok(metadata) = entry.metadata() else { continue };
            if !metadata.is_file() {
                // Not ours, whatever its name: it could not be removed either.
                continue;
            }
            let name = entry.file_name();
            if let Some(digest) = file::digest_of_name(&name) {
                let used = metadata.accessed().or(metadata.modified());
                found.push((used.unwrap_or(SystemTime::UNIX_EPOCH), digest, metadata.len()));
            } else if name.to_string_lossy().starts_with(INCOMING)
                && is_abandoned(&entry.path(), &metadata)
            {
                // If it stays, it stays.
                let _ = std::fs::remove_file(entry.path());
            }
        }
        found.sort();
        let table = Self { folder: Some(folder), limits, is_read_only, state: Mutex::default() };
        let mut state = table.lock();
        for (_, digest, bytes) in found {
            state.clock += 1;
            let entry = Entry { bytes, used: state.clock, ..Entry::default() };
            state.bytes += bytes;
            state.entries.insert(digest, entry);
        }
        // The limit may be lower than the last time.
        table.make_room(&mut state, 0)?;
        drop(state);
        Ok(table)
    }

    /// The folder, unless nothing can be written to it.
    pub fn writable_folder(&self) -> Option<&Path> {
        self.folder.as_deref().filter(|_| !self.is_read_only.load(Ordering::Relaxed))
    }

    /// Whether the weight is there and intact. Verified once, and again when its file changes;
    /// what is damaged goes.
    pub fn is_intact(&self, digest: &Digest) -> bool {
        let Some(folder) = &self.folder else { return self.lock().entries.contains_key(digest) };
        let path = file::path(folder, digest);
        let stamp = std::fs::metadata(&path).map(|metadata| FileStamp::new(&path, &metadata)).ok();
        if let Some(kept) = self.lock().entries.get(digest).and_then(|entry| entry.kept.as_ref())
            && (kept.stamp.is_none() || kept.stamp == stamp)
        {
            return true;
        }
        match file::load(&path, digest) {
            Found::Nothing => {
                self.forget(digest);
                false
            }
            Found::Damaged(why) => {
                tracing::warn!("{}: {why}; it will be sent again", path.display());
                // If it stays, the next transfer replaces it.
                let _ = std::fs::remove_file(&path);
                self.forget(digest);
                false
            }
            Found::Intact(kept) => {
                let mut state = self.lock();
                state.clock += 1;
                let (bytes, used) = (file_len(&kept.tensor), state.clock);
                let entry = state.entries.entry(*digest).or_default();
                let before = std::mem::replace(&mut entry.bytes, bytes);
                (entry.used, entry.kept) = (used, Some(kept));
                state.bytes = state.bytes.saturating_sub(before).saturating_add(bytes);
                true
            }
        }
    }

    /// The weight, which stays until [`unpin`](Self::unpin), if it was verified.
    pub fn pin(&self, digest: &Digest) -> Option<HostTensor> {
        let tensor = {
            let mut state = self.lock();
            state.clock += 1;
            let now = state.clock;
            let entry = state.entries.get_mut(digest)?;
            let tensor = entry.kept.as_ref()?.tensor.clone();
            entry.pins += 1;
            entry.used = now;
            tensor
        };
        if let Some(folder) = &self.folder {
            // For the order of use after a restart; a file that does not take it seems older.
            let times = FileTimes::new().set_accessed(SystemTime::now());
            let _ = File::open(file::path(folder, digest)).map(|file| file.set_times(times));
        }
        Some(tensor)
    }

    /// A session does not rely on the weight any more.
    pub fn unpin(&self, digest: &Digest) {
        if let Some(entry) = self.lock().entries.get_mut(digest) {
            entry.pins = entry.pins.saturating_sub(1);
        }
    }

    /// Makes room for a weight that comes; [`put`](Self::put) or [`release`](Self::release) follow.
    ///
    /// # Errors
    /// If there is none, but for what sessions rely on.
    pub fn reserve(&self, bytes: u64) -> Result<()> {
        let mut state = self.lock();
        self.make_room(&mut state, bytes)?;
        state.bytes += bytes;
        Ok(())
    }

    /// The reserved room is not needed.
    pub fn release(&self, bytes: u64) {
        let mut state = self.lock();
        state.bytes = state.bytes.saturating_sub(bytes);
    }

    /// A weight has come, into room that was reserved for it.
    pub fn put(&self, digest: Digest, kept: Kept, reserved: u64) {
        let mut state = self.lock();
        state.clock += 1;
        let used = state.clock;
        let entry = state.entries.entry(digest).or_default();
        // Two sessions sent it at once: the last file has replaced the first.
        let before = std::mem::replace(&mut entry.bytes, reserved);
        (entry.used, entry.kept) = (used, Some(kept));
        state.bytes = state.bytes.saturating_sub(before);
    }

    /// Bytes of all weights, and of those on their way.
    pub fn used_bytes(&self) -> u64 {
        self.lock().bytes
    }

    fn forget(&self, digest: &Digest) {
        let mut state = self.lock();
        // Whoever relies on it has its bytes, and it counts until they do not.
        let is_pinned = state.entries.get(digest).is_some_and(|entry| entry.pins > 0);
        if !is_pinned && let Some(entry) = state.entries.remove(digest) {
            state.bytes = state.bytes.saturating_sub(entry.bytes);
        }
    }

    fn make_room(&self, state: &mut State, bytes: u64) -> Result<()> {
        let max = self.limits.cache_bytes;
        while state.bytes.saturating_add(bytes) > max || state.entries.len() >= MAX_ENTRIES {
            let unused = state.entries.iter().filter(|(_, entry)| entry.pins == 0);
            let oldest = unused.min_by_key(|(_, entry)| entry.used).map(|(digest, _)| *digest);
            let Some(digest) = oldest else {
                let used = state.bytes;
                return Err(Error::remote(format!(
                    "the worker has no room for a weight of {bytes} bytes: the sessions that run \
                     need {used} of its {max} (worker --cache-size)"
                )));
            };
            let Some(entry) = state.entries.remove(&digest) else { continue };
            state.bytes = state.bytes.saturating_sub(entry.bytes);
            let is_in_memory = entry.kept.is_some_and(|kept| kept.stamp.is_none());
            if let Some(folder) = self.folder.as_ref().filter(|_| !is_in_memory)
                && let Err(error) = std::fs::remove_file(file::path(folder, &digest))
                && error.kind() != ErrorKind::NotFound
                && !self.is_read_only.swap(true, Ordering::Relaxed)
            {
                tracing::warn!(
                    "the cache of weights cannot shrink: {error}; weights that clients send stay \
                     in memory (--cache-dir)"
                );
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes of a weight's file.
pub fn file_len(tensor: &HostTensor) -> u64 {
    tensor.byte_len().saturating_add(file::HEADER_LEN as u64)
}

/// Whether nobody writes the file that was being received there.
fn is_abandoned(path: &Path, metadata: &std::fs::Metadata) -> bool {
    if let Ok(file) = File::options().read(true).write(true).open(path) {
        match file.try_lock() {
            Ok(()) => return true,
            Err(TryLockError::WouldBlock) => return false,
            Err(TryLockError::Error(_)) => {}
        }
    }
    let age = metadata.modified().ok().and_then(|time| time.elapsed().ok());
    age.is_some_and(|age| age > ABANDONED_AFTER)
}
