//! Taking a model, or one of its revisions, out of the cache. Separate because nothing else in this
//! program deletes what a user has: it removes what lies in the model's own folder, and follows no
//! link.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use super::HubOptions;
use super::cache::{MAX_DEPTH, RepositoryCache};
use super::inventory::{CachedRepository, CachedRevision, Weight};
use super::names::{Commit, RepositoryId};
use crate::error::{Error, Result};

/// Fewest digits of a commit that stand for it.
const MIN_COMMIT_DIGITS: usize = 7;

/// What would go, found out before anything goes.
#[derive(Debug)]
pub struct Removal {
    /// In this order: whoever stops in the middle leaves no half model that looks like a whole one.
    paths: Vec<PathBuf>,
    commits: Vec<Commit>,
    size_bytes: u64,
    files: usize,
    /// Held until it is done, so that nobody downloads into it.
    _locks: Vec<File>,
}

impl Removal {
    /// Looks at what a repository, or one revision of it, has to itself. A revision is a branch or
    /// a tag, or the first digits of a commit; what other revisions need stays.
    ///
    /// # Errors
    /// If it is not in the cache, is in it by a link only, or is being downloaded.
    pub fn plan(options: &HubOptions, id: &RepositoryId, revision: Option<&str>) -> Result<Self> {
        let cache = RepositoryCache::new(options, id);
        let folder = cache.folder();
        let locks = locks(&cache, id)?;
        let is_folder = match fs::symlink_metadata(&folder) {
            Ok(found) => found.is_dir(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let place = cache.cache_dir().display();
                return Err(Error::model(format!("{id} is not in the cache {place}")));
            }
            Err(error) => return Err(Error::model(format!("{}: {error}", folder.display()))),
        };
        if !is_folder {
            return Err(Error::model(format!(
                "{} is no folder of the cache but a link or a file: remove it yourself",
                folder.display()
            )));
        }
        let found = CachedRepository::look(options, id.clone());
        let chosen = revision.map(|name| choose(&found, name)).transpose()?;
        match chosen.filter(|_| found.revisions.len() > 1) {
            Some(chosen) => Self::of_revision(&cache, &found, chosen, locks),
            None => {
                let Weight { size_bytes, files, .. } = Weight::of(&folder);
                let paths = vec![folder.join("refs"), folder.join("snapshots"), folder];
                let commits = found.revisions.into_iter().map(|found| found.commit).collect();
                Ok(Self { paths, commits, size_bytes, files, _locks: locks })
            }
        }
    }

    fn of_revision(
        cache: &RepositoryCache,
        found: &CachedRepository,
        chosen: &CachedRevision,
        locks: Vec<File>,
    ) -> Result<Self> {
        let folder = cache.folder();
        let blobs = folder.join("blobs");
        for part in [&blobs, &folder.join("snapshots"), &folder.join("refs")] {
            if part.is_symlink() {
                let part = part.display();
                return Err(Error::model(format!("{part} is a link: remove it yourself")));
            }
        }
        let mut own = BTreeSet::new();
        let mut others = BTreeSet::new();
        for revision in &found.revisions {
            let is_own = revision.commit == chosen.commit;
            let names = if is_own { &mut own } else { &mut others };
            linked_blobs(&revision.snapshot, &blobs, 0, names)
                .map_err(|error| error.context(&found.id))?;
        }
        let mut paths: Vec<_> = chosen.names.iter().map(|name| cache.ref_path(name)).collect();
        paths.push(chosen.snapshot.clone());
        paths.extend(own.difference(&others).map(|name| blobs.join(name)));
        let entries = fs::read_dir(&blobs).into_iter().flatten().flatten();
        let is_part = |path: &PathBuf| path.extension().is_some_and(|end| end == "incomplete");
        paths.extend(entries.map(|entry| entry.path()).filter(is_part));
        let (mut size_bytes, mut files) = (0u64, 0);
        for path in &paths {
            let Ok(metadata) = fs::symlink_metadata(path) else { continue };
            if metadata.is_dir() {
                let below = Weight::of(path);
                size_bytes = size_bytes.saturating_add(below.size_bytes);
                files += below.files;
            } else if metadata.is_file() {
                size_bytes = size_bytes.saturating_add(metadata.len());
                files += 1;
            }
        }
        let commits = vec![chosen.commit.clone()];
        Ok(Self { paths, commits, size_bytes, files, _locks: locks })
    }

    /// The commits that it removes.
    pub fn commits(&self) -> &[Commit] {
        &self.commits
    }

    /// Bytes that it frees.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Files that it removes; links do not count.
    pub fn files(&self) -> usize {
        self.files
    }

    /// Removes it.
    ///
    /// # Errors
    /// If something cannot be removed: what comes after it is still there.
    pub fn run(self) -> Result<()> {
        for path in &self.paths {
            remove(path).map_err(|error| {
                Error::model(format!("cannot remove {}: {error}", path.display()))
            })?;
        }
        Ok(())
    }
}

/// The file, the link, or the folder with all that is in it; no link is followed.
fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn choose<'f>(found: &'f CachedRepository, name: &str) -> Result<&'f CachedRevision> {
    let is_named = |revision: &&CachedRevision| {
        revision.names.iter().any(|known| known.as_str() == name)
            || revision.commit.as_str() == name
    };
    let begins = |revision: &&CachedRevision| {
        name.len() >= MIN_COMMIT_DIGITS && revision.commit.as_str().starts_with(name)
    };
    if let Some(revision) = found.revisions.iter().find(is_named) {
        return Ok(revision);
    }
    let mut candidates = found.revisions.iter().filter(begins);
    match (candidates.next(), candidates.next()) {
        (Some(revision), None) => Ok(revision),
        (Some(_), Some(_)) => {
            Err(Error::model(format!("several commits of {} begin with {name}", found.id)))
        }
        (None, _) => {
            let known = found.revisions.iter().map(|revision| match revision.names.first() {
                Some(name) => name.as_str(),
                None => revision.commit.as_str(),
            });
            let known: Vec<_> = known.take(10).collect();
            Err(Error::model(format!(
                "{} has no revision '{name}' in the cache; it has {}",
                found.id,
                if known.is_empty() { "none".into() } else { known.join(", ") }
            )))
        }
    }
}

/// The names of the blobs that a snapshot links to. A snapshot that cannot be read is an error: its
/// blobs would be taken for nobody's.
fn linked_blobs(
    folder: &Path,
    blobs: &Path,
    depth: usize,
    names: &mut BTreeSet<String>,
) -> Result<()> {
    let failed = |error: io::Error| Error::model(format!("{}: {error}", folder.display()));
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound && depth == 0 => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let found = fs::symlink_metadata(&path).map_err(failed)?;
        if found.is_dir() {
            if depth >= MAX_DEPTH {
                return Err(Error::model(format!("{} is too deep", path.display())));
            }
            linked_blobs(&path, blobs, depth + 1, names)?;
        } else if found.is_symlink() {
            // Where it leads nowhere there is nothing to keep, nor to remove.
            let target = fs::canonicalize(&path).ok();
            let within = blobs.canonicalize().ok();
            let name = target.filter(|target| target.parent() == within.as_deref());
            let name = name.and_then(|target| target.file_name()?.to_str().map(str::to_owned));
            names.extend(name);
        }
    }
    Ok(())
}

/// All locks of the model's blobs.
fn locks(cache: &RepositoryCache, id: &RepositoryId) -> Result<Vec<File>> {
    let entries = fs::read_dir(cache.locks_dir()).into_iter().flatten().flatten();
    let mut held = Vec::new();
    for entry in entries {
        let Ok(file) = File::options().read(true).write(true).open(entry.path()) else { continue };
        match file.try_lock() {
            Ok(()) => held.push(file),
            Err(TryLockError::WouldBlock) => {
                return Err(Error::model(format!(
                    "another process is downloading {id}: wait until it is done"
                )));
            }
            // The file system has no locks.
            Err(TryLockError::Error(_)) => {}
        }
    }
    Ok(held)
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    const OLD: &str = "0123456789abcdef0123456789abcdef01234567";
    const NEW: &str = "0123456789abcdef0123456789abcdef89abcdef";

    fn write(path: &Path, text: &str) {
        fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
        fs::write(path, text).expect("a file");
    }

    /// Two commits that share a blob, and what an interrupted download has left.
    struct Cache(tempfile::TempDir);

    impl Cache {
        fn new() -> Self {
            let cache = Self(tempfile::tempdir().expect("a folder"));
            for (blob, text) in [("shared", "11"), ("old", "333"), ("new", "4444")] {
                write(&cache.at("blobs").join(blob), text);
            }
            write(&cache.at("blobs/x.incomplete"), "55555");
            for (commit, blobs) in [(OLD, ["shared", "old"]), (NEW, ["shared", "new"])] {
                let folder = cache.at("snapshots").join(commit).join("unet");
                fs::create_dir_all(&folder).expect("a snapshot");
                for blob in blobs {
                    let target = Path::new("../../../blobs").join(blob);
                    std::os::unix::fs::symlink(target, folder.join(blob)).expect("a link");
                }
            }
            write(&cache.at("refs/v1/a"), OLD);
            write(&cache.at("refs/main"), NEW);
            cache
        }

        fn at(&self, name: &str) -> PathBuf {
            self.0.path().join("models--a--b").join(name)
        }

        fn plan(&self, revision: Option<&str>) -> Result<Removal> {
            let set = |name: &str| (name == "HF_HUB_CACHE").then(|| self.0.path().into());
            let options = HubOptions::from_environment(&set).expect("options");
            Removal::plan(&options, &RepositoryId::parse("a/b").expect("a name"), revision)
        }

        fn blobs(&self) -> Vec<String> {
            let entries = fs::read_dir(self.at("blobs")).expect("blobs");
            let mut names: Vec<_> = entries
                .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
                .collect();
            names.sort();
            names
        }
    }

    #[test]
    fn a_revision_leaves_what_others_need_and_all_is_all() {
        for (revision, size_bytes, files, blobs) in [
            (Some("v1/a"), 3 + 5 + 40, 3, Some(["new", "shared"])),
            (Some(OLD), 3 + 5 + 40, 3, Some(["new", "shared"])),
            (Some("0123456789abcdef0123456789abcdef8"), 4 + 5 + 40, 3, Some(["old", "shared"])),
            (None, 2 + 3 + 4 + 5 + 80, 6, None),
        ] {
            let cache = Cache::new();
            let removal = cache.plan(revision).expect("a plan");
            assert_eq!((removal.size_bytes(), removal.files()), (size_bytes, files));
            assert_eq!(cache.blobs().len(), 4, "a plan removes nothing");
            removal.run().expect("it goes");
            match blobs {
                Some(blobs) => assert_eq!(cache.blobs(), blobs),
                None => assert!(!cache.at("").exists()),
            }
            assert_eq!(cache.at("refs/v1/a").exists(), blobs.is_some_and(|b| b[0] == "old"));
            assert!(cache.0.path().is_dir());
        }
        // The last revision takes everything with it.
        let cache = Cache::new();
        cache.plan(Some("main")).expect("a plan").run().expect("it goes");
        cache.plan(Some("v1/a")).expect("a plan").run().expect("it goes");
        assert!(!cache.at("").exists());
    }

    #[test]
    fn what_is_not_there_or_in_use_is_refused() {
        let cache = Cache::new();
        for (revision, expected) in [
            ("v2", "it has v1/a, main"),
            ("012345", "no revision '012345'"),
            ("0123456789", "several commits"),
            ("../../..", "no revision"),
        ] {
            let error = cache.plan(Some(revision)).expect_err(revision).to_string();
            assert!(error.contains(expected), "{error}");
        }
        let lock = cache.0.path().join(".locks/models--a--b/x.lock");
        write(&lock, "");
        let lock = File::open(&lock).expect("the lock");
        lock.lock().expect("it is free");
        let error = cache.plan(None).expect_err("it is held").to_string();
        assert!(error.contains("another process is downloading a/b"), "{error}");
        drop(lock);
        cache.plan(None).expect("a plan").run().expect("it goes");
        let error = cache.plan(None).expect_err("it is gone").to_string();
        assert!(error.contains("a/b is not in the cache"), "{error}");
    }

    #[test]
    fn no_link_leads_out_of_the_cache() {
        let outside = tempfile::tempdir().expect("a folder");
        let kept = outside.path().join("kept");
        write(&kept, "precious");
        let link = |at: PathBuf| std::os::unix::fs::symlink(outside.path(), at).expect("a link");

        let cache = Cache::new();
        link(cache.at("snapshots").join(OLD).join("away"));
        link(cache.at("blobs/away.incomplete"));
        link(cache.at("away"));
        cache.plan(Some("v1/a")).expect("a plan").run().expect("it goes");
        cache.plan(None).expect("a plan").run().expect("it goes");
        assert!(kept.is_file() && !cache.at("").exists());

        let cache = Cache::new();
        fs::rename(cache.at("blobs"), cache.at("moved")).expect("moved");
        link(cache.at("blobs"));
        let error = cache.plan(Some("main")).expect_err("a link").to_string();
        assert!(error.contains("blobs is a link"), "{error}");
        cache.plan(None).expect("a plan").run().expect("it goes");

        link(cache.0.path().join("models--a--b"));
        let error = cache.plan(None).expect_err("a link").to_string();
        assert!(error.contains("is no folder of the cache"), "{error}");
        assert!(kept.is_file());
    }
}
