//! What the cache on disk holds: every model with its revisions and its size. Separate because it
//! looks at everybody's files and changes none; one model's files are the cache's matter.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::HubOptions;
use super::cache::{MAX_DEPTH, MAX_FILES, RepositoryCache, list_into};
use super::names::{Commit, RepositoryId, Revision};
use crate::error::{Error, Result};

/// Most entries of a cache, and of a repository's snapshots, that are looked at.
const MAX_ENTRIES: usize = 10_000;
/// How folders of repositories begin; all but the first kind are never ours.
const KINDS: [&str; 3] = ["models--", "datasets--", "spaces--"];

/// What a cache holds.
#[derive(Debug, Default)]
pub struct Inventory {
    /// The models that have a repository's name, in its order.
    pub repositories: Vec<CachedRepository>,
    /// How many other repositories there are: data sets, spaces, models without an organisation.
    pub others: usize,
}

/// One repository in the cache.
#[derive(Debug)]
pub struct CachedRepository {
    /// Its name on the hub.
    pub id: RepositoryId,
    /// Its folder.
    pub folder: PathBuf,
    /// Its commits, those that have names first.
    pub revisions: Vec<CachedRevision>,
    /// Bytes of its files, each blob once.
    pub size_bytes: u64,
    /// When its largest file was last read or written: small ones are read by whoever lists them.
    pub used: Option<SystemTime>,
    /// Why it is no such folder as the cache has, if it is not.
    pub problem: Option<String>,
}

/// A commit of a repository.
#[derive(Debug)]
pub struct CachedRevision {
    /// The commit.
    pub commit: Commit,
    /// The branches and tags that are it, as far as they were looked up.
    pub names: Vec<Revision>,
    /// The folder with its files; it may not be there.
    pub snapshot: PathBuf,
    /// The paths of the files that are there, with `/`.
    pub files: Vec<String>,
}

impl Inventory {
    /// Looks at a cache; what cannot be read of a model is the model's problem. One that is not
    /// there is empty.
    ///
    /// # Errors
    /// If the cache itself cannot be read.
    pub fn of(options: &HubOptions) -> Result<Self> {
        let cache_dir = &options.cache_dir;
        let entries = match fs::read_dir(cache_dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => {
                return Err(Error::model(format!("{}: {error}", cache_dir.display())));
            }
        };
        let mut inventory = Self::default();
        for entry in entries.flatten().take(MAX_ENTRIES) {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            match RepositoryId::of_folder(&name) {
                Some(id) => inventory.repositories.push(CachedRepository::look(options, id)),
                None if KINDS.iter().any(|kind| name.starts_with(kind)) => inventory.others += 1,
                // Locks, tags and whatever else is not a repository.
                None => {}
            }
        }
        inventory.repositories.sort_by(|a, b| a.id.as_str().cmp(b.id.as_str()));
        Ok(inventory)
    }
}

impl CachedRepository {
    /// Looks at one repository, whether it is there or not.
    pub fn look(options: &HubOptions, id: RepositoryId) -> Self {
        let cache = RepositoryCache::new(options, &id);
        let folder = cache.folder();
        let problem = problem_of(&folder);
        let Weight { size_bytes, used, .. } = Weight::of(&folder);
        let revisions = revisions(&cache);
        Self { id, folder, revisions, size_bytes, used, problem }
    }
}

/// Why a folder is no repository's.
fn problem_of(folder: &Path) -> Option<String> {
    match fs::metadata(folder) {
        Ok(found) if !found.is_dir() => Some("it is no folder".into()),
        Ok(_) => fs::read_dir(folder).err().map(|error| error.to_string()),
        Err(_) if folder.is_symlink() => Some("it is a link that leads nowhere".into()),
        Err(error) => Some(error.to_string()),
    }
}

/// The commits that have a folder or a name.
fn revisions(cache: &RepositoryCache) -> Vec<CachedRevision> {
    let mut commits: BTreeMap<String, Vec<Revision>> = BTreeMap::new();
    let snapshots = fs::read_dir(cache.folder().join("snapshots"));
    for entry in snapshots.into_iter().flatten().flatten().take(MAX_ENTRIES) {
        if let Ok(name) = entry.file_name().into_string() {
            commits.entry(name).or_default();
        }
    }
    let mut names = Vec::new();
    list_into(&mut names, &cache.folder().join("refs"), "", 0);
    names.sort_by(|a, b| a.as_str().cmp(b.as_str()));
    for name in names {
        let Ok(revision) = Revision::parse(name.as_str()) else { continue };
        if let Some(commit) = cache.read_ref(&revision) {
            commits.entry(commit.as_str().to_owned()).or_default().push(revision);
        }
    }
    let revision = |(commit, names): (String, Vec<Revision>)| {
        let commit = Commit::parse(&commit)?;
        let snapshot = cache.snapshot_dir(&commit);
        let files = cache.list(&commit).iter().map(|file| file.as_str().to_owned()).collect();
        Some(CachedRevision { commit, names, snapshot, files })
    };
    let mut revisions: Vec<_> = commits.into_iter().filter_map(revision).collect();
    revisions.sort_by_key(|revision| revision.names.is_empty());
    revisions
}

/// What the files below a folder take; no link is followed, so that each blob counts once.
#[derive(Debug, Default)]
pub(super) struct Weight {
    /// Their bytes.
    pub size_bytes: u64,
    /// How many they are.
    pub files: usize,
    largest_bytes: u64,
    used: Option<SystemTime>,
}

impl Weight {
    /// Of a folder; what cannot be read counts nothing.
    pub fn of(folder: &Path) -> Self {
        let mut weight = Self::default();
        weight.add_below(folder, 0);
        weight
    }

    fn add_below(&mut self, folder: &Path, depth: usize) {
        let Ok(entries) = fs::read_dir(folder) else { return };
        for entry in entries.flatten() {
            // Of the entry itself, not of what it may link to.
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                if depth < MAX_DEPTH + 2 {
                    self.add_below(&entry.path(), depth + 1);
                }
            } else if metadata.is_file() && self.files < MAX_FILES {
                self.add(&metadata);
            }
        }
    }

    fn add(&mut self, metadata: &Metadata) {
        self.files += 1;
        self.size_bytes = self.size_bytes.saturating_add(metadata.len());
        if metadata.len() >= self.largest_bytes {
            self.largest_bytes = metadata.len();
            self.used = metadata.accessed().into_iter().chain(metadata.modified()).max();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn options(cache_dir: &Path) -> HubOptions {
        HubOptions::from_environment(&|name| (name == "HF_HUB_CACHE").then(|| cache_dir.into()))
            .expect("options")
    }

    fn write(path: &Path, text: &str) {
        fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
        fs::write(path, text).expect("a file");
    }

    #[test]
    fn a_cache_that_is_not_there_is_empty_and_one_that_is_a_file_is_an_error() {
        let folder = tempfile::tempdir().expect("a folder");
        let none = Inventory::of(&options(&folder.path().join("none"))).expect("none");
        assert!(none.repositories.is_empty() && none.others == 0);
        let file = folder.path().join("file");
        write(&file, "");
        assert!(Inventory::of(&options(&file)).is_err());
    }

    #[test]
    fn other_repositories_are_counted_and_whatever_is_broken_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        write(&at("datasets--a--b/blobs/x"), "data");
        write(&at("models--gpt2/blobs/x"), "data");
        write(&at("models--a--..--b/blobs/x"), "data");
        write(&at(".locks/models--a--b/x.lock"), "");
        write(&at("version.txt"), "1");
        write(&at("models--a--file"), "a file in the way");
        write(&at("models--a--refs/refs/main"), "../../..");
        write(&at("models--a--refs/refs/v1/a"), COMMIT);
        write(&at("models--a--refs/snapshots/strange/x"), "12345");
        let inventory = Inventory::of(&options(folder.path())).expect("an inventory");
        assert_eq!(inventory.others, 3);
        let [file, refs] = &*inventory.repositories else { panic!("{inventory:?}") };
        assert_eq!(
            (file.id.as_str(), file.problem.as_deref()),
            ("a/file", Some("it is no folder"))
        );
        assert!(refs.problem.is_none());
        let [revision] = &*refs.revisions else { panic!("{refs:?}") };
        assert_eq!((revision.commit.as_str(), revision.names[0].as_str()), (COMMIT, "v1/a"));
        assert!(revision.files.is_empty());
    }

    #[cfg(unix)]
    #[test]
    fn a_blob_counts_once_and_links_count_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join("models--a--b").join(name);
        write(&at("blobs/x"), &"x".repeat(1000));
        write(&at("blobs/y.incomplete"), "part");
        for commit in [COMMIT, &"f".repeat(40)] {
            fs::create_dir_all(at("snapshots").join(commit)).expect("a snapshot");
            let link = at("snapshots").join(commit).join("x");
            std::os::unix::fs::symlink("../../blobs/x", link).expect("a link");
        }
        let outside = tempfile::tempdir().expect("a folder");
        write(&outside.path().join("large"), &"x".repeat(10_000));
        std::os::unix::fs::symlink(outside.path(), at("snapshots/away")).expect("a link");
        let inventory = Inventory::of(&options(folder.path())).expect("an inventory");
        let [found] = &*inventory.repositories else { panic!("{inventory:?}") };
        assert_eq!((found.size_bytes, found.revisions.len()), (1004, 2));
        assert_eq!(found.revisions[0].files, ["x"]);
        assert!(found.used.is_some());
    }
}
