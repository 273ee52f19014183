//! One blob, from nothing or from where an earlier run stopped to a verified file in the cache.
//! Separate because here the network's and the disk's troubles meet.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use ureq::http::{HeaderMap, StatusCode};

use super::cache::{BlobLock, RepositoryCache};
use super::client::{Client, Metadata, Subject};
use super::names::{Commit, FileName};
use super::transport::{Answer, Attempt, Failure, POLL};
use super::{Event, Progress};
use crate::error::{Error, Result};

/// Largest file that is taken, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 40;
/// A try that brings this much is a success as far as giving up is concerned: a line that is cut
/// every few hundred megabytes still gets the file.
const WORTHWHILE_BYTES: u64 = 1 << 20;

/// What is to be downloaded, and whom to tell.
pub(super) struct BlobDownload<'d> {
    pub client: &'d Client<'d>,
    pub cache: &'d RepositoryCache,
    pub commit: &'d Commit,
    pub file: &'d FileName,
    pub subject: Subject<'d>,
    pub metadata: &'d Metadata,
    pub progress: &'d mut dyn Progress,
    /// Bytes of the files before this one, for the sum.
    pub bytes_before: u64,
}

/// The file that grows, and what is known of its content.
struct Partial {
    path: PathBuf,
    file: File,
    done_bytes: u64,
    /// Only if there is something to compare it with.
    hash: Option<Sha256>,
}

impl BlobDownload<'_> {
    /// Brings the file into the snapshot, unless another process does so meanwhile, and returns
    /// its length in bytes. A blob that another commit has already is not downloaded again.
    ///
    /// # Errors
    /// If it does not come, or is not what the hub said it is. What has come stays for the next
    /// run, unless it is wrong.
    pub fn run(&mut self) -> Result<u64> {
        let lock = self.lock()?;
        let (etag, file) = (&self.metadata.etag, self.file);
        let pointer = self.cache.pointer(self.commit, file);
        if let Ok(pointer) = std::fs::metadata(&pointer) {
            return Ok(pointer.len());
        }
        let finished = self.finished_len(&self.cache.blob(etag));
        let len = finished.map_or_else(|| self.download(&lock), Ok)?;
        self.cache.link(etag, self.commit, file, finished.is_none())?;
        Ok(len)
    }

    fn download(&mut self, lock: &BlobLock) -> Result<u64> {
        let blob = self.cache.blob(&self.metadata.etag);
        let path = self.cache.incomplete(&self.metadata.etag, lock);
        let mut partial = self.open(&path).map_err(|failure| self.error(failure))?;
        self.progress.report(&Event::FileStarted {
            name: self.file.as_str(),
            file_bytes: partial.done_bytes,
            size_bytes: self.metadata.size_bytes,
        });
        let result = self.fill(&mut partial);
        if matches!(lock, BlobLock::Unsupported) && result.is_err() {
            // No other run would find it by its name.
            let _ = std::fs::remove_file(&path);
        }
        result?;
        let done_bytes = partial.done_bytes;
        // A blob is trusted for ever, so it is on the disk before it has its name.
        let synced = partial.file.sync_all();
        drop(partial);
        synced
            .and_then(|()| std::fs::rename(&path, &blob))
            .map_err(|error| self.cache.error(&path, &error))?;
        self.progress.report(&Event::FileFinished { name: self.file.as_str() });
        Ok(done_bytes)
    }

    /// The length of the blob if it is there and as long as it should be.
    fn finished_len(&self, blob: &Path) -> Option<u64> {
        let len = std::fs::metadata(blob).ok().filter(std::fs::Metadata::is_file)?.len();
        self.metadata.size_bytes.is_none_or(|size| size == len).then_some(len)
    }

    fn lock(&mut self) -> Result<BlobLock> {
        let mut told = false;
        loop {
            if let Some(lock) = self.cache.try_lock(&self.metadata.etag)? {
                return Ok(lock);
            }
            if !std::mem::replace(&mut told, true) {
                self.progress.report(&Event::Waiting { name: self.file.as_str() });
            }
            self.client.transport().check_cancelled().map_err(|failure| self.error(failure))?;
            std::thread::sleep(POLL);
        }
    }

    fn open(&self, path: &Path) -> Attempt<Partial> {
        let disk = |error| Failure::Final(self.cache.error(path, &error));
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(path);
        let mut file = file.map_err(disk)?;
        let hash = self.metadata.etag.sha256().map(|_| Sha256::new());
        let done_bytes = file.metadata().map_err(disk)?.len();
        let mut partial = Partial { path: path.to_owned(), file, done_bytes, hash };
        if done_bytes > self.metadata.size_bytes.unwrap_or(MAX_FILE_BYTES) {
            partial.restart(self.cache)?;
        } else if let Some(hash) = &mut partial.hash {
            file = partial.file.try_clone().map_err(disk)?;
            let mut buffer = vec![0; 1 << 20];
            loop {
                self.client.transport().check_cancelled()?;
                match file.read(&mut buffer).map_err(disk)? {
                    0 => break,
                    len => hash.update(buffer.get(..len).unwrap_or_default()),
                }
            }
        }
        partial.file.seek(SeekFrom::Start(partial.done_bytes)).map_err(disk)?;
        Ok(partial)
    }

    /// Tries until the file is whole and right, or has failed too often in a row.
    fn fill(&mut self, partial: &mut Partial) -> Result<()> {
        let transport = self.client.transport();
        let (mut failures, mut farthest) = (0, partial.done_bytes);
        let mut resumed = partial.done_bytes > 0;
        loop {
            let result = self.attempt(partial).and_then(|()| self.verify(partial));
            let reason = match result {
                Ok(()) => return Ok(()),
                // What an earlier run left may be at fault, so it gets one chance from the start.
                Err(Failure::Refused(_)) if resumed && partial.done_bytes == 0 => {
                    resumed = false;
                    continue;
                }
                Err(Failure::Passing(reason)) => reason,
                Err(failure) => return Err(self.error(failure)),
            };
            if partial.done_bytes >= farthest.saturating_add(WORTHWHILE_BYTES) {
                failures = 0;
            }
            farthest = farthest.max(partial.done_bytes);
            failures += 1;
            if failures >= transport.tries() {
                return Err(Error::model(format!(
                    "{}: {reason}; given up after {failures} tries in a row with {} bytes \
                     done: run again to continue from there",
                    self.subject.what(),
                    partial.done_bytes,
                )));
            }
            self.progress.report(&Event::Retrying { name: self.file.as_str(), reason: &reason });
            transport.pause(failures).map_err(|failure| self.error(failure))?;
        }
    }

    /// One request, for what is missing.
    fn attempt(&mut self, partial: &mut Partial) -> Attempt<()> {
        let size_bytes = self.metadata.size_bytes;
        if size_bytes == Some(partial.done_bytes) {
            return Ok(());
        }
        let start_bytes = partial.done_bytes;
        let answer = self.client.download(&self.subject, self.commit, start_bytes)?;
        let whole_bytes = match answer.status {
            StatusCode::OK => {
                if start_bytes > 0 {
                    partial.restart(self.cache)?;
                }
                content_length(&answer.headers)
            }
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                let continued = continued_size(&answer.headers, start_bytes, size_bytes);
                if continued.is_none() {
                    partial.restart(self.cache)?;
                    return Err(Failure::Passing(format!(
                        "the server does not continue at byte {start_bytes}"
                    )));
                }
                continued
            }
            status => return Err(Failure::Passing(format!("the server answers {status}"))),
        };
        match (size_bytes, whole_bytes) {
            (Some(size), Some(whole)) if size != whole => {
                Err(self.wrong(&format!("the server has {whole} bytes, not {size}")))
            }
            _ => self.receive(answer, partial, size_bytes.or(whole_bytes)),
        }
    }

    fn receive(
        &mut self,
        answer: Answer,
        partial: &mut Partial,
        size_bytes: Option<u64>,
    ) -> Attempt<()> {
        let limit_bytes = size_bytes.unwrap_or(MAX_FILE_BYTES);
        let too_long = self.wrong(&format!("the server sends more than {limit_bytes} bytes"));
        let mut too_long = Some(too_long);
        self.client.transport().read(answer, |chunk| {
            let len = u64::try_from(chunk.len()).unwrap_or(u64::MAX);
            if len > limit_bytes.saturating_sub(partial.done_bytes) {
                partial.restart(self.cache)?;
                let unknown = || Failure::Passing("the server sends too much".to_owned());
                return Err(too_long.take().unwrap_or_else(unknown));
            }
            let written = partial.file.write_all(chunk);
            written.map_err(|error| Failure::Final(self.cache.error(&partial.path, &error)))?;
            partial.done_bytes += len;
            if let Some(hash) = &mut partial.hash {
                hash.update(chunk);
            }
            self.progress.report(&Event::Advanced {
                name: self.file.as_str(),
                file_bytes: partial.done_bytes,
                size_bytes,
                total_bytes: self.bytes_before.saturating_add(partial.done_bytes),
            });
            Ok(())
        })?;
        match size_bytes {
            Some(size) if partial.done_bytes < size => Err(Failure::Passing(format!(
                "the connection was closed after {} of {size} bytes",
                partial.done_bytes
            ))),
            _ => Ok(()),
        }
    }

    /// The content is what its name says, if the name is a SHA-256; else it is thrown away.
    fn verify(&self, partial: &mut Partial) -> Attempt<()> {
        let (Some(expected), Some(hash)) = (self.metadata.etag.sha256(), &partial.hash) else {
            return Ok(());
        };
        let found: String =
            hash.clone().finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if found == expected {
            return Ok(());
        }
        partial.restart(self.cache)?;
        Err(self.wrong(&format!("its SHA-256 is {found}, not {expected}")))
    }

    fn wrong(&self, problem: &str) -> Failure {
        Failure::Refused(Error::model(format!(
            "{}: the download is not the file that the hub names: {problem}; run again, and check \
             HF_ENDPOINT and the proxy if it stays so",
            self.subject.what(),
        )))
    }

    fn error(&self, failure: Failure) -> Error {
        self.client.error(failure, &self.subject.what())
    }
}

impl Partial {
    /// Back to an empty file.
    fn restart(&mut self, cache: &RepositoryCache) -> Attempt<()> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map_err(|error| Failure::Final(cache.error(&self.path, &error)))?;
        self.done_bytes = 0;
        self.hash = self.hash.as_ref().map(|_| Sha256::new());
        Ok(())
    }
}

/// The whole file's length in bytes, if `Content-Range: bytes START-END/SIZE` goes on where the
/// file ends. The range may end before the file does: then there is another request.
fn continued_size(headers: &HeaderMap, start_bytes: u64, size_bytes: Option<u64>) -> Option<u64> {
    let range = headers.get("content-range")?.to_str().ok()?;
    let (start, end, found) = parse_range(range)?;
    let size = size_bytes.or(found)?;
    let fits = start_bytes > 0
        && (start_bytes..size).contains(&end)
        && start == start_bytes
        && found.is_none_or(|found| found == size);
    fits.then_some(size)
}

fn parse_range(range: &str) -> Option<(u64, u64, Option<u64>)> {
    let (span, size) = range.trim().strip_prefix("bytes")?.trim_start().split_once('/')?;
    let (start, end) = span.split_once('-')?;
    let size = match size {
        "*" => None,
        size => Some(size.parse().ok()?),
    };
    Some((start.parse().ok()?, end.parse().ok()?, size))
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get("content-length")?.to_str().ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_continues_only_where_the_file_ends() {
        for (range, size, expected) in [
            ("bytes 5-9/10", Some(10), Some(10)),
            ("bytes 5-9/*", Some(10), Some(10)),
            ("bytes 5-7/10", Some(10), Some(10)),
            ("bytes 5-9/10", None, Some(10)),
            ("bytes 5-9/*", None, None),
            ("bytes 4-9/10", Some(10), None),
            ("bytes 5-9/11", Some(10), None),
            ("bytes 5-10/10", Some(10), None),
            ("bytes 5-4/10", Some(10), None),
            ("bytes */10", Some(10), None),
            ("bytes 5-99999999999999999999/10", Some(10), None),
            ("items 5-9/10", Some(10), None),
            ("", Some(10), None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert("content-range", range.parse().expect("a header"));
            assert_eq!(continued_size(&headers, 5, size), expected, "{range} {size:?}");
        }
        assert_eq!(continued_size(&HeaderMap::new(), 5, Some(10)), None);
    }
}
