//! Files as bytes: mapped, never read into memory. Separate because it holds the one `unsafe` of
//! everything that reads files: weights on their way to a device, and a worker's copies of them.

use std::fs::{File, Metadata};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use memmap2::Mmap;

use super::host::SharedBytes;

/// Maps a file, which should be a regular one.
///
/// # Errors
/// If the system refuses, as for a file without bytes.
pub fn map(file: &File) -> std::io::Result<SharedBytes> {
    // SAFETY: the map is only read, byte by byte, and no reference into it is kept as anything
    // but `[u8]`, for which every content is valid. What remains is that nobody shortens or
    // rewrites the file in place while it is mapped; the hub's cache, a worker's cache and every
    // tool that writes models replace files by renaming.
    Ok(Arc::new(unsafe { Mmap::map(file) }?))
}

/// Changes on a file's clock that are closer than this may look like none.
const CLOCK_TICK: Duration = Duration::from_secs(2);

/// By what a file is known again without reading it: if none of this changed, its bytes are taken
/// to be the same, as `make` and `rsync` do.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FileStamp {
    /// Without links.
    pub path: PathBuf,
    /// In bytes.
    pub len: u64,
    /// Since the epoch; 0 if the system does not say.
    pub modified_ns: u128,
    /// Where the system numbers files, so that one renamed into the place of another is another.
    pub inode: u64,
}

impl FileStamp {
    /// The stamp of the file at `path`, whose metadata was asked for when it was opened.
    pub fn new(path: &Path, metadata: &Metadata) -> Self {
        let modified = metadata.modified().ok();
        let since = modified.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        Self {
            path: path.canonicalize().unwrap_or_else(|_| path.to_path_buf()),
            len: metadata.len(),
            modified_ns: since.map_or(0, |since| since.as_nanos()),
            inode: inode(metadata),
        }
    }

    /// Whether the file has rested long enough before `now` that a later change would show.
    pub fn is_settled(&self, now: SystemTime) -> bool {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        now.as_nanos() > self.modified_ns.saturating_add(CLOCK_TICK.as_nanos())
    }
}

#[cfg(unix)]
fn inode(metadata: &Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(metadata)
}

#[cfg(not(unix))]
fn inode(_: &Metadata) -> u64 {
    0
}
