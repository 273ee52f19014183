//! Compiled kernels on disk, so that only the first start of a version compiles. Separate from the
//! compiler because what is there needs none.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::driver::{Numbers, Source};
use super::sources::whole;
use crate::backend::cache_folder;
use crate::error::Result;

/// Raised when what is kept for a source changes.
const FORMAT: &str = "tiny-sd kernels 1";
/// Kernels of a few versions, number types and GPUs.
const MAX_FILES: usize = 128;
/// A source's code has some hundred kilobytes.
const MAX_CODE_BYTES: u64 = 16 << 20;
const HASH_BYTES: usize = 32;

/// A folder of compiled kernels, or none.
#[derive(Debug, Clone)]
pub struct KernelCache {
    folder: Option<PathBuf>,
}

impl KernelCache {
    /// This user's.
    pub fn of_user() -> Self {
        Self { folder: cache_folder::of_user("kernels") }
    }

    /// In a folder, which is made when it is needed.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self { folder: Some(folder.into()) }
    }

    /// Where it is.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// Forgets what is kept for a source, if there is something.
    pub fn forget(&self, (source, numbers): (Source, Numbers), architecture: i32) -> bool {
        let path = self.folder.as_ref().map(|f| f.join(name(source, numbers, architecture)));
        path.is_some_and(|path| fs::remove_file(path).is_ok())
    }

    /// The code of a source for a compute capability: what is kept, if it is whole, else what
    /// `compile` makes, which is kept if it can be.
    ///
    /// # Errors
    /// What `compile` says.
    pub fn get_or(
        &self,
        (source, numbers): (Source, Numbers),
        architecture: i32,
        compile: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Vec<u8>> {
        let Some(folder) = &self.folder else { return compile() };
        let path = folder.join(name(source, numbers, architecture));
        if let Some(code) = read(&path) {
            return Ok(code);
        }
        let code = compile()?;
        // Without a cache it is compiled again next time.
        let _ = write(folder, &path, &code);
        Ok(code)
    }
}

/// By what the code of a source is found.
fn name(source: Source, numbers: Numbers, architecture: i32) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in [FORMAT, &whole(source)] {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    hasher.update(&numbers.code().to_le_bytes()).update(&architecture.to_le_bytes());
    format!("{}.kernels", hasher.finalize().to_hex())
}

/// What was written whole.
fn read(path: &Path) -> Option<Vec<u8>> {
    if fs::metadata(path).ok()?.len() > MAX_CODE_BYTES {
        return None;
    }
    let bytes = fs::read(path).ok()?;
    let (hash, code) = bytes.split_at_checked(HASH_BYTES)?;
    (blake3::hash(code).as_bytes() == hash).then(|| code.to_vec())
}

fn write(folder: &Path, path: &Path, code: &[u8]) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(blake3::hash(code).as_bytes())?;
    file.write_all(code)?;
    file.persist(path)?;
    let mut files: Vec<_> = fs::read_dir(folder)?
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    files.sort();
    let surplus = files.len().saturating_sub(MAX_FILES);
    files.iter().take(surplus).try_for_each(|(_, path)| fs::remove_file(path))
}

#[cfg(test)]
mod tests {
    use super::super::sources::ALL;
    use super::*;
    use crate::error::Error;

    #[test]
    fn what_was_compiled_once_is_not_compiled_again_unless_it_is_another_or_broken() {
        let folder = tempfile::tempdir().unwrap();
        let cache = KernelCache::at(folder.path().join("deep/kernels"));
        let get = |source: usize, numbers, architecture, compiled: Option<&[u8]>| {
            let compile = || compiled.map(<[u8]>::to_vec).ok_or_else(|| Error::other("compiles"));
            cache.get_or((ALL[source], numbers), architecture, compile)
        };
        assert_eq!(get(0, Numbers::F32, 80, Some(b"one")).unwrap(), b"one");
        assert_eq!(get(0, Numbers::F32, 80, None).unwrap(), b"one");
        for (source, numbers, architecture) in
            [(1, Numbers::F32, 80), (0, Numbers::F16, 80), (0, Numbers::F32, 90)]
        {
            get(source, numbers, architecture, None).unwrap_err();
        }
        let path = fs::read_dir(cache.folder().unwrap()).unwrap().next().unwrap().unwrap().path();
        let whole = fs::read(&path).unwrap();
        for broken in [&whole[..HASH_BYTES - 1], &whole[..whole.len() - 1], b"", &[0; 40]] {
            fs::write(&path, broken).unwrap();
            get(0, Numbers::F32, 80, None).unwrap_err();
        }
        assert_eq!(get(0, Numbers::F32, 80, Some(b"two")).unwrap(), b"two");
        assert_eq!(get(0, Numbers::F32, 80, None).unwrap(), b"two");
        assert!(cache.forget((ALL[0], Numbers::F32), 80));
        assert!(!cache.forget((ALL[0], Numbers::F32), 80));
        get(0, Numbers::F32, 80, None).unwrap_err();
    }

    #[test]
    fn the_cache_keeps_so_many_files_and_does_without_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let cache = KernelCache::at(folder.path());
        for architecture in 0..MAX_FILES as i32 + 5 {
            cache.get_or((ALL[0], Numbers::F32), architecture, || Ok(vec![1])).unwrap();
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), MAX_FILES);
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let nowhere = KernelCache::at(file.join("below"));
        for _ in 0..2 {
            let code = nowhere.get_or((ALL[0], Numbers::F32), 80, || Ok(vec![7])).unwrap();
            assert_eq!(code, [7]);
        }
    }
}
