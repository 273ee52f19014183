//! One model in the cache on disk, in the layout that Python's huggingface_hub reads and writes:
//! `refs/REVISION` holds a commit, `snapshots/COMMIT/PATH` links to `blobs/ETAG`, and
//! `.locks/MODEL/ETAG.lock` is held while a blob is made. Separate because it knows no network.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::HubOptions;
use super::names::{Commit, Etag, FileName, RepositoryId, Revision};
use crate::error::{Error, Result};

/// Says to backup tools that this is a cache (<https://bford.info/cachedir/>).
const CACHE_TAG: &str = "Signature: 8a477f597d28d172789f06886806bc55\n";
/// Deepest folder and most files that a snapshot is listed with.
pub(super) const MAX_DEPTH: usize = 16;
pub(super) const MAX_FILES: usize = 100_000;

pub(super) struct RepositoryCache {
    cache_dir: PathBuf,
    folder_name: String,
    symlinks: bool,
}

/// Held as long as it lives.
pub(super) enum BlobLock {
    Held {
        _file: File,
    },
    /// The file system has no locks.
    Unsupported,
}

impl RepositoryCache {
    pub fn new(options: &HubOptions, id: &RepositoryId) -> Self {
        Self {
            cache_dir: options.cache_dir.clone(),
            folder_name: id.folder_name(),
            symlinks: options.symlinks,
        }
    }

    pub fn cache_dir(&self) -> &Path {
        &self.cache_dir
    }

    pub fn snapshot_dir(&self, commit: &Commit) -> PathBuf {
        self.folder().join("snapshots").join(commit.as_str())
    }

    /// Where a file is seen; it may not be there.
    pub fn pointer(&self, commit: &Commit, name: &FileName) -> PathBuf {
        self.snapshot_dir(commit).join(name.to_path())
    }

    /// Where a file's content is; it may not be there.
    pub fn blob(&self, etag: &Etag) -> PathBuf {
        self.folder().join("blobs").join(etag.as_str())
    }

    /// Where a file's content grows. Under a lock the name is the same for every process, so that
    /// the next one goes on where this one stopped.
    pub fn incomplete(&self, etag: &Etag, lock: &BlobLock) -> PathBuf {
        let own = match lock {
            BlobLock::Held { .. } => String::new(),
            BlobLock::Unsupported => format!(".{:08x}", std::process::id()),
        };
        self.folder().join("blobs").join(format!("{etag}{own}.incomplete"))
    }

    /// The commit that the revision had when it was last looked up, if a snapshot of it is here.
    pub fn cached_commit(&self, revision: &Revision) -> Option<Commit> {
        let commit = revision.as_commit().or_else(|| self.read_ref(revision))?;
        self.snapshot_dir(&commit).is_dir().then_some(commit)
    }

    /// Remembers which commit the revision is; a full commit needs no memory.
    pub fn write_ref(&self, revision: &Revision, commit: &Commit) -> Result<()> {
        if revision.as_str() == commit.as_str() || self.read_ref(revision).as_ref() == Some(commit)
        {
            return Ok(());
        }
        let path = self.ref_path(revision);
        let write = || {
            let folder = path.parent().unwrap_or(&path);
            fs::create_dir_all(folder)?;
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            file.write_all(commit.as_str().as_bytes())?;
            set_default_permissions(file.as_file());
            file.persist(&path).map_err(|error| error.error)
        };
        write().map(|_| ()).map_err(|error| self.error(&path, &error))
    }

    /// The files of a snapshot that are here, in the order of their names.
    pub fn list(&self, commit: &Commit) -> Vec<FileName> {
        let mut files = Vec::new();
        list_into(&mut files, &self.snapshot_dir(commit), "", 0);
        files.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        files
    }

    /// Makes the folders for a blob.
    pub fn prepare(&self) -> Result<()> {
        let blobs = self.folder().join("blobs");
        fs::create_dir_all(&blobs).map_err(|error| self.error(&blobs, &error))?;
        // For backup tools; a cache without it works as well.
        if let Ok(mut tag) = File::create_new(self.cache_dir.join("CACHEDIR.TAG")) {
            let _ = tag.write_all(CACHE_TAG.as_bytes());
        }
        Ok(())
    }

    /// Tries to become the one who makes a blob; `None` while another process is at it.
    /// The file is never removed: those who wait for it hold the same one.
    pub fn try_lock(&self, etag: &Etag) -> Result<Option<BlobLock>> {
        let folder = self.locks_dir();
        let path = folder.join(format!("{etag}.lock"));
        let open = || {
            fs::create_dir_all(&folder)?;
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)
        };
        let file = open().map_err(|error| self.error(&path, &error))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(BlobLock::Held { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(_)) => Ok(Some(BlobLock::Unsupported)),
        }
    }

    /// Shows a blob as a file of a snapshot: a relative link, or the file itself where links are
    /// not to be had; moved there if nothing else can point to the blob yet. Whoever looks finds
    /// the whole file or none, because it appears by a rename.
    pub fn link(&self, etag: &Etag, commit: &Commit, name: &FileName, new: bool) -> Result<()> {
        let (blob, pointer) = (self.blob(etag), self.pointer(commit, name));
        let depth = name.as_str().split('/').count() + 1;
        let target: PathBuf =
            std::iter::repeat_n("..", depth).chain(["blobs", etag.as_str()]).collect();
        let link = || -> io::Result<()> {
            let folder = pointer.parent().unwrap_or(&pointer);
            fs::create_dir_all(folder)?;
            // Made beside the blobs, so that a listing never sees it.
            let blobs = self.folder().join("blobs");
            let names = tempfile::Builder::new().prefix("link-").suffix(".tmp").to_owned();
            if self.symlinks
                && let Ok(made) = names.make_in(&blobs, |path| symlink(&target, path))
            {
                return made.into_temp_path().persist(&pointer).map_err(|error| error.error);
            }
            if new {
                return fs::rename(&blob, &pointer);
            }
            let copy = names.tempfile_in(&blobs)?;
            fs::copy(&blob, copy.path())?;
            copy.persist(&pointer).map(|_| ()).map_err(|error| error.error)
        };
        link().map_err(|error| self.error(&pointer, &error))
    }

    /// What a failure of the disk means for the user.
    pub fn error(&self, path: &Path, error: &io::Error) -> Error {
        let advice = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                "free some space, or set HF_HOME to a folder on another disk"
            }
            _ => "set HF_HOME to a folder that can be written",
        };
        Error::model(format!(
            "cannot write {} in the model cache: {error}; {advice}",
            path.display()
        ))
    }

    /// All that is here of the model.
    pub fn folder(&self) -> PathBuf {
        self.cache_dir.join(&self.folder_name)
    }

    /// The locks of its blobs.
    pub fn locks_dir(&self) -> PathBuf {
        self.cache_dir.join(".locks").join(&self.folder_name)
    }

    /// Where it is remembered which commit a revision is.
    pub fn ref_path(&self, revision: &Revision) -> PathBuf {
        self.folder().join("refs").join(revision.to_path())
    }

    /// The commit that the revision had when it was last looked up.
    pub fn read_ref(&self, revision: &Revision) -> Option<Commit> {
        let mut hash = String::new();
        File::open(self.ref_path(revision)).ok()?.take(256).read_to_string(&mut hash).ok()?;
        Commit::parse(hash.trim())
    }
}

/// Files only, through the links; what cannot be read or named is left out, as is a broken link.
pub(super) fn list_into(files: &mut Vec<FileName>, folder: &Path, prefix: &str, depth: usize) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let Ok(file_type) = entry.file_type() else { continue };
        if file_type.is_dir() {
            if depth < MAX_DEPTH {
                list_into(files, &entry.path(), &format!("{prefix}{name}/"), depth + 1);
            }
        } else if files.len() < MAX_FILES && entry.path().is_file() {
            files.extend(FileName::parse(&format!("{prefix}{name}")));
        }
    }
}

/// Temporary files are private to their owner; what lies in a shared cache is not.
fn set_default_permissions(file: &File) {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // A failure leaves the file readable for its owner, which is no reason to stop.
        let _ = file.set_permissions(fs::Permissions::from_mode(0o644));
    }
    #[cfg(not(unix))]
    let _ = file;
}

fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::symlink(target, link);
    #[cfg(windows)]
    return std::os::windows::fs::symlink_file(target, link);
    #[cfg(not(any(unix, windows)))]
    return Err(io::Error::new(io::ErrorKind::Unsupported, format!("{target:?} {link:?}")));
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn cache(folder: &Path, symlinks: bool) -> RepositoryCache {
        RepositoryCache {
            cache_dir: folder.to_owned(),
            folder_name: "models--a--b".to_owned(),
            symlinks,
        }
    }

    fn etag() -> Etag {
        Etag::parse("\"abc\"").expect("an etag")
    }

    #[test]
    fn a_snapshot_links_to_its_blobs_or_holds_them() {
        for (symlinks, new, blob_stays) in
            [(true, true, true), (true, false, true), (false, true, false), (false, false, true)]
        {
            let folder = tempfile::tempdir().expect("a folder");
            let cache = cache(folder.path(), symlinks);
            let commit = Commit::parse(COMMIT).expect("a commit");
            let name = FileName::parse("unet/x/config.json").expect("a name");
            cache.prepare().expect("folders");
            fs::write(cache.blob(&etag()), "content").expect("a blob");
            // What was there before, even a broken link, is replaced.
            let pointer = cache.pointer(&commit, &name);
            fs::create_dir_all(pointer.parent().expect("a parent")).expect("folders");
            symlink(Path::new("nowhere"), &pointer).expect("a broken link");
            cache.link(&etag(), &commit, &name, new).expect("a link");

            assert_eq!(fs::read_to_string(&pointer).expect("the file"), "content");
            assert_eq!(pointer.is_symlink(), symlinks);
            assert_eq!(cache.blob(&etag()).exists(), blob_stays, "{symlinks} {new}");
            assert_eq!(cache.list(&commit), [name]);
            let left = fs::read_dir(folder.path().join("models--a--b/blobs")).expect("blobs");
            assert_eq!(left.count(), usize::from(blob_stays));
        }
    }

    #[test]
    fn a_blob_is_made_by_one_at_a_time() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = cache(folder.path(), true);
        let held = cache.try_lock(&etag()).expect("a lock file");
        assert!(matches!(held, Some(BlobLock::Held { .. })));
        assert!(cache.try_lock(&etag()).expect("a lock file").is_none());
        drop(held);
        assert!(cache.try_lock(&etag()).expect("a lock file").is_some());
    }

    #[test]
    fn a_ref_that_is_no_commit_is_no_way_out_of_the_cache() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = cache(folder.path(), true);
        let revision = Revision::parse("main").expect("a revision");
        for (content, found) in [("../../..", false), ("", false), (COMMIT, true)] {
            fs::create_dir_all(cache.folder().join("refs")).expect("refs");
            fs::create_dir_all(cache.folder().join("snapshots").join(COMMIT)).expect("snapshots");
            fs::write(cache.ref_path(&revision), content).expect("a ref");
            assert_eq!(cache.cached_commit(&revision).is_some(), found, "{content}");
        }
    }

    #[test]
    fn a_cache_that_cannot_be_written_says_what_to_set() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("file");
        fs::write(&file, "").expect("a file");
        let error = cache(&file, true).prepare().expect_err("a file is no folder").to_string();
        assert!(error.contains("HF_HOME") && error.contains("models--a--b"), "{error}");
    }
}
