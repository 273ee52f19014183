//! A model's files from the Hugging Face hub, through the cache that Python's huggingface_hub uses.
//! Separate because weights come from folders, and this makes one.
//!
//! It is written on `ureq` rather than on the `hf-hub` crate: 0.5 has no offline mode, knows
//! neither `HF_HUB_CACHE` nor `XDG_CACHE_HOME`, appends whatever a server sends to a partial file,
//! compares no hash, and locks other files than Python does; 1.0 brings an async stack, ignores
//! `HF_HUB_OFFLINE` and restarts plain downloads. Field by field it follows huggingface_hub's
//! `file_download.py` and `_snapshot_download.py`.

mod cache;
mod client;
mod download;
mod inventory;
mod names;
mod options;
mod removal;
mod transport;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use cache::RepositoryCache;
use client::{Client, Listing, Metadata, Subject};
use download::BlobDownload;
pub use inventory::{CachedRepository, CachedRevision, Inventory};
pub use names::{Commit, FileName, RepositoryId, Revision};
pub use options::{HubOptions, Purpose, Token};
pub use removal::Removal;
use transport::{Failure, Transport};

use crate::error::{Error, Result};

/// Tries to look a revision up: fewer than for a download, because the user waits for the first
/// word, and only one if a cached snapshot can take its place.
const LOOKUP_TRIES: u32 = 3;

/// Told what a download does, on the thread that called [`Repository::fetch`].
pub trait Progress {
    /// Called often: after each piece of a few hundred kilobytes at most.
    fn report(&mut self, event: &Event<'_>);
}

/// Silence.
impl Progress for () {
    fn report(&mut self, _: &Event<'_>) {}
}

/// What happens while files are fetched. Positions are absolute, so that one may fall back: a
/// server that cannot continue starts again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<'e> {
    /// First of all, if anything has to be downloaded.
    Started {
        /// Files to download.
        files: usize,
        /// Their sum in bytes, if the hub gives every length.
        size_bytes: Option<u64>,
    },
    /// Another process downloads this file.
    Waiting {
        /// The file.
        name: &'e str,
    },
    /// A file begins.
    FileStarted {
        /// The file.
        name: &'e str,
        /// Bytes that an earlier run has left.
        file_bytes: u64,
        /// Its length in bytes.
        size_bytes: Option<u64>,
    },
    /// Bytes have arrived.
    Advanced {
        /// The file.
        name: &'e str,
        /// Bytes of this file that are here.
        file_bytes: u64,
        /// Its length in bytes, if the hub gives it.
        size_bytes: Option<u64>,
        /// Bytes of all files of this call that are here.
        total_bytes: u64,
    },
    /// The connection failed; it is tried again.
    Retrying {
        /// The file.
        name: &'e str,
        /// One line.
        reason: &'e str,
    },
    /// A file is whole and in the cache.
    FileFinished {
        /// The file.
        name: &'e str,
    },
}

/// The hub as one user sees it.
pub struct Hub<'c> {
    options: HubOptions,
    client: Client<'c>,
}

impl<'c> Hub<'c> {
    /// Nothing is asked of the network yet. Once `cancelled` is true, every call ends within a
    /// fraction of a second with [`Error::interrupted`].
    pub fn new(options: HubOptions, cancelled: &'c AtomicBool) -> Self {
        let client = Client::new(Transport::new(&options, cancelled), options.purpose);
        Self { options, client }
    }

    /// Looks up a model, such as `segmind/tiny-sd`, at the revision of the options. Offline, and
    /// if the hub does not answer or refuses, what the cache has of it is used.
    ///
    /// # Errors
    /// If the name breaks the hub's rules; if the hub has no such revision; if it does not answer
    /// or refuses and the cache has nothing.
    pub fn repository(&self, name: &str) -> Result<Repository<'_>> {
        let id = RepositoryId::parse(name)?;
        let cache = RepositoryCache::new(&self.options, &id);
        let revision = &self.options.revision;
        let cached = cache.cached_commit(revision);
        if self.options.offline {
            let commit = cached.ok_or_else(|| self.not_cached(&id, &cache))?;
            return Ok(self.cached_repository(id, cache, commit, None));
        }
        let most = if cached.is_some() { 1 } else { LOOKUP_TRIES };
        let tries = self.client.transport().tries().min(most);
        let looked_up = self.client.transport().retry(tries, || self.client.listing(&id, revision));
        match (looked_up, cached) {
            (Ok(Listing { commit, files }), _) => {
                Ok(Repository { hub: self, id, commit, files, cache, source: Source::Hub })
            }
            (Err(Failure::Final(error)), _) => Err(error),
            (Err(failure), Some(commit)) => {
                let reason = match failure {
                    Failure::Passing(reason) => format!("{id}: {reason}"),
                    failure => self.client.error(failure, id.as_str()).to_string(),
                };
                Ok(self.cached_repository(id, cache, commit, Some(reason)))
            }
            (Err(Failure::Passing(reason)), None) => Err(Error::model(format!(
                "{id}: {reason}, and it is not in the cache {}; check the network and \
                 HF_ENDPOINT, set HF_HOME if it was downloaded elsewhere (--offline then uses \
                 it), {}",
                cache.cache_dir().display(),
                self.options.purpose.instead()
            ))),
            (Err(Failure::Refused(error)), None) => Err(error),
        }
    }

    fn cached_repository(
        &self,
        id: RepositoryId,
        cache: RepositoryCache,
        commit: Commit,
        why: Option<String>,
    ) -> Repository<'_> {
        let warning =
            why.map(|why| format!("{why}; using what the cache has of it (commit {commit})"));
        let files = cache.list(&commit);
        Repository { hub: self, id, commit, files, cache, source: Source::Cache { warning } }
    }

    fn not_cached(&self, id: &RepositoryId, cache: &RepositoryCache) -> Error {
        Error::model(format!(
            "{id} (revision '{}') is not in the cache {}: run once without --offline and \
             HF_HUB_OFFLINE to download it, {}",
            self.options.revision,
            cache.cache_dir().display(),
            self.options.purpose.instead()
        ))
    }
}

/// A model at one commit.
pub struct Repository<'h> {
    hub: &'h Hub<'h>,
    id: RepositoryId,
    commit: Commit,
    files: Vec<FileName>,
    cache: RepositoryCache,
    source: Source,
}

/// Who said what files there are.
enum Source {
    Hub,
    Cache { warning: Option<String> },
}

impl Repository<'_> {
    /// The commit that the revision is.
    pub fn commit(&self) -> &str {
        self.commit.as_str()
    }

    /// The paths of the files, with `/`: all of the commit if the hub was asked, else those that
    /// the cache has.
    pub fn file_names(&self) -> Vec<&str> {
        self.files.iter().map(FileName::as_str).collect()
    }

    /// Whether only what is in the cache can be had. An error about a file that is missing should
    /// say so, because the hub may have it.
    pub fn is_cache_only(&self) -> bool {
        matches!(self.source, Source::Cache { .. })
    }

    /// One line to show if the hub was asked in vain and the cache has to do.
    pub fn warning(&self) -> Option<&str> {
        match &self.source {
            Source::Hub => None,
            Source::Cache { warning } => warning.as_deref(),
        }
    }

    /// Sees to it that the files are in the cache, and returns the folder that has them under the
    /// same paths. What is there is not asked for again.
    ///
    /// # Errors
    /// If a file does not exist, or does not arrive as the hub describes it; if the cache cannot be
    /// written; if the user interrupts. What has arrived is kept, and the next call continues.
    pub fn fetch<S: AsRef<str>>(
        &self,
        names: &[S],
        progress: &mut dyn Progress,
    ) -> Result<PathBuf> {
        let mut missing = Vec::new();
        let mut unknown = Vec::new();
        for name in names.iter().map(AsRef::as_ref) {
            match self.files.iter().find(|file| file.as_str() == name) {
                None => unknown.push(name),
                Some(file) if self.cache.pointer(&self.commit, file).is_file() => {}
                Some(file) if missing.contains(&file) => {}
                Some(file) => missing.push(file),
            }
        }
        if let Some(first) = unknown.first() {
            return Err(self.unknown_files(first, unknown.len()));
        }
        if !missing.is_empty() {
            self.download_all(&missing, progress)?;
        }
        let remembered = self.cache.write_ref(&self.hub.options.revision, &self.commit);
        // A complete snapshot can be used from a cache that cannot be written.
        if !missing.is_empty() {
            remembered?;
        }
        Ok(self.cache.snapshot_dir(&self.commit))
    }

    fn download_all(&self, missing: &[&FileName], progress: &mut dyn Progress) -> Result<()> {
        self.cache.prepare()?;
        let transport = self.hub.client.transport();
        let mut plan = Vec::new();
        for &file in missing {
            let subject = self.subject(file);
            let ask = || self.hub.client.metadata(&subject, &self.commit);
            let metadata = transport.retry(transport.tries(), ask);
            let failed = |failure| self.hub.client.error(failure, &subject.what());
            plan.push((file, metadata.map_err(failed)?));
        }
        let sum = |plan: &[(&FileName, Metadata)]| {
            plan.iter().try_fold(0u64, |sum, (_, file)| sum.checked_add(file.size_bytes?))
        };
        progress.report(&Event::Started { files: plan.len(), size_bytes: sum(&plan) });
        let mut bytes_before = 0u64;
        for (file, metadata) in &plan {
            let len = BlobDownload {
                client: &self.hub.client,
                cache: &self.cache,
                commit: &self.commit,
                file,
                subject: self.subject(file),
                metadata,
                progress,
                bytes_before,
            }
            .run()?;
            bytes_before = bytes_before.saturating_add(len);
        }
        Ok(())
    }

    fn subject<'s>(&'s self, file: &'s FileName) -> Subject<'s> {
        let revision = self.hub.options.revision.as_str();
        Subject { id: &self.id, revision, file: Some(file) }
    }

    fn unknown_files(&self, first: &str, count: usize) -> Error {
        let more = match count - 1 {
            0 => String::new(),
            more => format!(" (and {more} more)"),
        };
        let (id, revision) = (&self.id, &self.hub.options.revision);
        Error::model(match &self.source {
            Source::Hub => format!("{id} has no file {first}{more} at revision '{revision}'"),
            Source::Cache { .. } => format!(
                "{id} (revision '{revision}') is in the cache {} without {first}{more}: run once \
                 with the network and without --offline to download it",
                self.cache.cache_dir().display()
            ),
        })
    }
}
