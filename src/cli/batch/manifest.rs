//! What a batch has done, in a file in its folder: read at the start, a line longer for each
//! picture. Separate because it must be whole whatever ends the process, and be read whatever is in
//! it.

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The file's name in the batch's folder.
pub(super) const FILE_NAME: &str = "tiny-sd-batch.jsonl";
/// Version of the lines.
const VERSION: u32 = 1;
/// Largest file, in bytes: half a million pictures.
const MAX_BYTES: u64 = 256 << 20;

/// A picture that was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Version of the line.
    pub v: u32,
    /// The hash of all that determines the picture.
    pub settings: String,
    /// Where it is, below the folder.
    pub output: String,
    /// Its size.
    pub bytes: u64,
    /// BLAKE3-256 of the file, in hexadecimal digits.
    pub blake3: String,
}

impl Record {
    /// Of a file with these bytes.
    pub fn new(settings: String, output: String, file: &[u8]) -> Self {
        let blake3 = blake3::hash(file).to_hex().to_string();
        Self { v: VERSION, settings, output, bytes: file.len() as u64, blake3 }
    }
}

/// The manifest of a folder, which nobody else can open while this is there.
pub(super) struct Manifest {
    folder: PathBuf,
    /// Locked; behind its last whole line.
    file: File,
    /// By output; a later line has replaced an earlier one.
    records: HashMap<String, Record>,
    /// Lines that are no records.
    pub unread: usize,
}

impl Manifest {
    /// Opens the manifest of a folder, both made if they are not there.
    ///
    /// # Errors
    /// If they cannot be made or read, or another batch is at work there.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE_NAME);
        let failed = |error: &dyn std::fmt::Display| {
            Error::other(format!("cannot use {}: {error}", path.display()))
        };
        fs::create_dir_all(folder)
            .map_err(|error| Error::other(format!("--out-dir {}: {error}", folder.display())))?;
        // Opening a named pipe would wait, and a link lead to somebody else's file.
        if fs::symlink_metadata(&path).is_ok_and(|found| !found.is_file()) {
            return Err(failed(&"it is not a file"));
        }
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&path).map_err(|error| failed(&error))?;
        file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => Error::other(format!(
                "another tiny-sd batch is at work in {}; wait for it, or give another --out-dir",
                folder.display()
            )),
            TryLockError::Error(error) => failed(&format!("it cannot be locked: {error}")),
        })?;
        let len = file.metadata().map_err(|error| failed(&error))?.len();
        if len > MAX_BYTES {
            return Err(failed(&format!("it is larger than {MAX_BYTES} bytes; move it away")));
        }
        let mut text = Vec::new();
        (&file).take(MAX_BYTES).read_to_end(&mut text).map_err(|error| failed(&error))?;
        // What was being written when the process ended.
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        text.truncate(whole);
        let whole = whole as u64;
        file.set_len(whole)
            .and_then(|()| file.seek(SeekFrom::Start(whole)))
            .map_err(|error| failed(&error))?;
        let mut manifest =
            Self { folder: folder.to_owned(), file, records: HashMap::new(), unread: 0 };
        for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice::<Record>(line) {
                Ok(record) if record.v == VERSION => {
                    manifest.records.insert(record.output.clone(), record);
                }
                Ok(_) | Err(_) => manifest.unread += 1,
            }
        }
        Ok(manifest)
    }

    /// Whether the picture of these settings is there, and whole.
    pub fn is_done(&self, output: &str, settings: &str) -> bool {
        let record = self.records.get(output).filter(|record| record.settings == settings);
        record.is_some_and(|record| is_whole(&self.folder.join(output), record))
    }

    /// Writes down that a picture is there. From then on it survives whatever ends the process.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn add(&mut self, record: Record) -> Result<()> {
        let failed = |error: &dyn std::fmt::Display| {
            let path = self.folder.join(FILE_NAME);
            Error::other(format!("cannot write {}: {error}", path.display()))
        };
        let mut line = serde_json::to_vec(&record).map_err(|error| failed(&error))?;
        line.push(b'\n');
        self.file
            .write_all(&line)
            .and_then(|()| self.file.sync_data())
            .map_err(|error| failed(&error))?;
        self.records.insert(record.output.clone(), record);
        Ok(())
    }
}

/// Closing the file is not enough while a child of this process has it too.
impl Drop for Manifest {
    fn drop(&mut self) {
        // It is gone with the process at the latest.
        let _ = self.file.unlock();
    }
}

fn is_whole(path: &Path, record: &Record) -> bool {
    let read = || -> std::io::Result<bool> {
        let found = fs::metadata(path)?;
        if !found.is_file() || found.len() != record.bytes {
            return Ok(false);
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::open(path)?)?;
        Ok(hasher.finalize().to_hex().as_str() == record.blake3)
    };
    // What cannot be read is made again, and writing says why that fails.
    read().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn made(folder: &TempDir, output: &str, settings: &str, bytes: &[u8]) -> Record {
        fs::write(folder.path().join(output), bytes).unwrap();
        Record::new(settings.into(), output.into(), bytes)
    }

    #[test]
    fn what_is_done_is_what_was_written_down_and_is_there_unchanged() {
        let folder = TempDir::new().unwrap();
        let mut manifest = Manifest::open(folder.path()).unwrap();
        assert!(!manifest.is_done("a.png", "1"));
        manifest.add(made(&folder, "a.png", "1", b"abc")).unwrap();
        manifest.add(made(&folder, "b.png", "2", b"abc")).unwrap();
        drop(manifest);
        let manifest = Manifest::open(folder.path()).unwrap();
        assert!(manifest.is_done("a.png", "1") && manifest.is_done("b.png", "2"));
        assert!(!manifest.is_done("a.png", "2"), "changed settings");
        fs::write(folder.path().join("a.png"), "abd").unwrap();
        assert!(!manifest.is_done("a.png", "1"), "a changed byte");
        fs::write(folder.path().join("a.png"), "ab").unwrap();
        assert!(!manifest.is_done("a.png", "1"), "a lost byte");
        fs::remove_file(folder.path().join("b.png")).unwrap();
        assert!(!manifest.is_done("b.png", "2"), "no file");
        fs::create_dir(folder.path().join("b.png")).unwrap();
        assert!(!manifest.is_done("b.png", "2"), "a folder");
    }

    #[test]
    fn a_line_that_was_cut_off_anywhere_costs_its_picture_alone() {
        let folder = TempDir::new().unwrap();
        let mut manifest = Manifest::open(folder.path()).unwrap();
        manifest.add(made(&folder, "a.png", "1", b"a")).unwrap();
        let path = folder.path().join(FILE_NAME);
        let first = fs::read(&path).unwrap().len();
        manifest.add(made(&folder, "b.png", "2", b"b")).unwrap();
        drop(manifest);
        let whole = fs::read(&path).unwrap();
        for len in 0..whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            let mut manifest = Manifest::open(folder.path()).unwrap();
            assert_eq!(manifest.is_done("a.png", "1"), len >= first, "{len}");
            assert!(!manifest.is_done("b.png", "2"), "{len}");
            manifest.add(made(&folder, "b.png", "2", b"b")).unwrap();
            drop(manifest);
            let manifest = Manifest::open(folder.path()).unwrap();
            assert_eq!(manifest.unread, 0, "{len}");
            assert!(manifest.is_done("b.png", "2"), "{len}");
        }
    }

    #[test]
    fn lines_that_are_no_records_are_counted_and_stay() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join(FILE_NAME);
        let mut manifest = Manifest::open(folder.path()).unwrap();
        manifest.add(made(&folder, "a.png", "1", b"a")).unwrap();
        drop(manifest);
        let record = fs::read_to_string(&path).unwrap();
        let newer = record.replace("\"v\":1", "\"v\":2,\"new\":0").replace("a.png", "b.png");
        fs::write(&path, format!("\u{0}\u{ff}\n{newer}[\n{record}")).unwrap();
        let manifest = Manifest::open(folder.path()).unwrap();
        assert_eq!(manifest.unread, 3);
        assert!(manifest.is_done("a.png", "1") && !manifest.is_done("b.png", "1"));
    }

    #[test]
    fn two_batches_cannot_have_one_folder_and_what_is_no_manifest_is_told() {
        let folder = TempDir::new().unwrap();
        let first = Manifest::open(&folder.path().join("a/b")).unwrap();
        let error = Manifest::open(&folder.path().join("a/b")).err().unwrap().to_string();
        assert!(error.contains("another tiny-sd batch is at work in ") && error.contains("a/b"));
        drop(first);
        Manifest::open(&folder.path().join("a/b")).unwrap();
        fs::create_dir_all(folder.path().join("c").join(FILE_NAME)).unwrap();
        let error = Manifest::open(&folder.path().join("c")).err().unwrap().to_string();
        assert!(error.ends_with("it is not a file"), "{error}");
        fs::write(folder.path().join("d"), "").unwrap();
        let error = Manifest::open(&folder.path().join("d")).err().unwrap().to_string();
        assert!(error.contains("--out-dir"), "{error}");
    }
}
