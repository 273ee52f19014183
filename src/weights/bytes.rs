//! Weight files as shared bytes. Separate because every reader cuts its tensors from here.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::backend::host::{self, FileStamp, SharedBytes};
use crate::error::{Error, Result};

/// What git leaves in a clone in place of a large file.
const GIT_LFS: &[u8] = b"version https://git-lfs.github.com/spec/v1";

/// How the files of ggml begin.
const GGUF: &[u8] = b"GGUF";

/// Maps a file, which is known again by its stamp.
///
/// # Errors
/// If it is not a regular file, cannot be read, is empty, is the note that git-lfs leaves, or a
/// GGUF file.
pub(super) fn map(path: &Path) -> Result<(SharedBytes, Arc<FileStamp>)> {
    let failed = |error: std::io::Error| Error::model(format!("{}: {error}", path.display()));
    // Before opening, because opening a named pipe waits.
    let metadata = std::fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() {
        return Err(Error::model(format!("{} is not a file", path.display())));
    }
    let file = File::open(path).map_err(failed)?;
    if metadata.len() == 0 {
        return Err(Error::model(format!("{} is empty: download it again", path.display())));
    }
    // Of the file that was opened, whatever lies under its name by now.
    let stamp = FileStamp::new(path, &file.metadata().map_err(failed)?);
    let bytes = host::map(&file).map_err(failed)?;
    if (*bytes).as_ref().starts_with(GIT_LFS) {
        return Err(Error::model(format!(
            "{} is a git-lfs pointer, not the weights: run `git lfs pull` in that folder",
            path.display()
        )));
    }
    if (*bytes).as_ref().starts_with(GGUF) {
        return Err(Error::model(format!(
            "{} is a GGUF file, which is not read: take the .safetensors or .ckpt that it was made \
             from",
            path.display()
        )));
    }
    Ok((bytes, Arc::new(stamp)))
}

/// A part of shared bytes that keeps the whole alive.
struct Region {
    whole: SharedBytes,
    range: Range<usize>,
}

impl AsRef<[u8]> for Region {
    fn as_ref(&self) -> &[u8] {
        // The constructor has checked it; a buffer that shrinks later reads as empty.
        (*self.whole).as_ref().get(self.range.clone()).unwrap_or_default()
    }
}

/// `len` bytes from `start` on, or nothing if they are not all there.
pub(super) fn region(whole: &SharedBytes, start: usize, len: usize) -> Option<SharedBytes> {
    let range = start..start.checked_add(len)?;
    (**whole).as_ref().get(range.clone())?;
    Some(Arc::new(Region { whole: Arc::clone(whole), range }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_lies_within_the_whole() {
        let whole: SharedBytes = Arc::new(vec![1u8, 2, 3, 4]);
        let bytes = |start, len| region(&whole, start, len).map(|r| (*r).as_ref().to_vec());
        assert_eq!(bytes(1, 2), Some(vec![2, 3]));
        assert_eq!(bytes(4, 0), Some(vec![]));
        assert_eq!(bytes(3, 2), None);
        assert_eq!(bytes(2, usize::MAX), None);
    }

    #[test]
    fn what_is_no_weight_file_is_refused_by_what_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let check = |content: &[u8], expected: &str| {
            let path = folder.path().join("model.safetensors");
            std::fs::write(&path, content).unwrap();
            let error = map(&path).err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(b"", "is empty");
        check(b"GGUF\x03\0\0\0", "is a GGUF file, which is not read");
        check(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull");
        assert!(map(folder.path()).err().unwrap().to_string().ends_with("is not a file"));
        assert!(map(&folder.path().join("none")).err().unwrap().to_string().contains("none"));
    }
}
