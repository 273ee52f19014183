//! Digests of weight files from earlier runs, so that a second start reads no weights. Separate
//! because it is a cache of what the files say: it may be lost, stale or damaged, and must then
//! only cost time.
//!
//! One file for each weight file. A digest is stored under a key made of everything it depends on:
//! the file's path, size, times and number, and where and how the tensor lies in it.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use candle_core::DType;

use crate::backend::host::{FileStamp, Origin};
use crate::backend::{HostTensor, cache_folder};

/// Bytes of one file: 65,536 tensors.
const MAX_FILE_LEN: u64 = 16 << 20;
/// Of the code that casts: other bits have other digests.
const CAST_VERSION: u32 = 1;
/// Bytes of a key and of a digest.
const DIGEST_LEN: usize = 32;

/// A folder with digests.
#[derive(Debug, Clone)]
pub struct Digests {
    folder: PathBuf,
}

type Known = HashMap<[u8; DIGEST_LEN], [u8; DIGEST_LEN]>;

impl Digests {
    /// The digests in `folder`, which is made when there are some.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// The digests of this user: in `$XDG_CACHE_HOME/tiny-sd` or `~/.cache/tiny-sd`.
    pub fn of_user() -> Option<Self> {
        cache_folder::of_user("digests").map(Self::new)
    }

    /// Tells the tensors the digests that are known, each as the dtype beside it.
    pub fn recall(&self, tensors: &[(&HostTensor, DType)]) {
        for (file, tensors) in by_file(tensors) {
            if tensors.iter().all(|(tensor, _, dtype)| tensor.known_digest(*dtype).is_some()) {
                continue;
            }
            let known = self.load(file);
            for (tensor, origin, dtype) in tensors {
                if let Some(digest) = known.get(&key(tensor, origin, dtype)) {
                    tensor.remember_digest(dtype, *digest);
                }
            }
        }
    }

    /// Keeps the digests of tensors that lie in files; `now` is before any of them was computed.
    /// Those of a file that has just changed are not kept: it may change again unseen.
    pub fn keep(&self, tensors: &[(&HostTensor, DType)], now: SystemTime) {
        for (file, tensors) in by_file(tensors) {
            if !file.is_settled(now) {
                continue;
            }
            let mut known = self.load(file);
            let before = known.len();
            known.extend(tensors.iter().filter_map(|(tensor, origin, dtype)| {
                Some((key(tensor, origin, *dtype), tensor.known_digest(*dtype)?))
            }));
            if known.len() > before && known.len() * 2 * DIGEST_LEN < MAX_FILE_LEN as usize {
                // Without it the next run takes longer, no more.
                let _ = self.save(file, &known);
            }
        }
    }

    /// Forgets what is known of these tensors' files: a worker found other bytes.
    pub fn forget(&self, tensors: &[(&HostTensor, DType)]) {
        for file in by_file(tensors).into_keys() {
            // What cannot be removed cannot be written either, and is found wrong again.
            let _ = std::fs::remove_file(self.path(file));
        }
    }

    /// A file's digests as they are stored; those of another state of it have other keys and go
    /// with the next [`keep`](Self::keep).
    fn load(&self, file: &FileStamp) -> Known {
        let mut bytes = Vec::new();
        let read = std::fs::File::open(self.path(file))
            .and_then(|file| file.take(MAX_FILE_LEN).read_to_end(&mut bytes));
        let Some((check, records)) = bytes.split_first_chunk().filter(|_| read.is_ok()) else {
            return Known::new();
        };
        // Also over the state of the file: records of another are not worth keeping.
        if *check != checksum(file, records) {
            return Known::new();
        }
        let (records, _) = records.as_chunks::<DIGEST_LEN>();
        records.as_chunks::<2>().0.iter().map(|[key, digest]| (*key, *digest)).collect()
    }

    fn save(&self, file: &FileStamp, known: &Known) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        let records: Vec<u8> =
            known.iter().flat_map(|(key, digest)| [*key, *digest].concat()).collect();
        let mut new = tempfile::NamedTempFile::new_in(&self.folder)?;
        new.write_all(&checksum(file, &records))?;
        new.write_all(&records)?;
        new.persist(self.path(file))?;
        Ok(())
    }

    fn path(&self, file: &FileStamp) -> PathBuf {
        let name = blake3::hash(file.path.as_os_str().as_encoded_bytes());
        self.folder.join(name.to_hex().as_str())
    }

    /// Where they are kept.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// A file's tensors, each with its place and a dtype.
type InFile<'t> = Vec<(&'t HostTensor, &'t Origin, DType)>;

fn by_file<'t>(tensors: &[(&'t HostTensor, DType)]) -> HashMap<&'t FileStamp, InFile<'t>> {
    let mut files = HashMap::<&FileStamp, InFile<'_>>::new();
    for (tensor, dtype) in tensors {
        if let Some(origin) = tensor.origin() {
            files.entry(&origin.file).or_default().push((tensor, origin, *dtype));
        }
    }
    files
}

fn put_stamp(hasher: &mut blake3::Hasher, FileStamp { path, len, modified_ns, inode }: &FileStamp) {
    let path = path.as_os_str().as_encoded_bytes();
    hasher.update(&(path.len() as u64).to_le_bytes()).update(path);
    hasher.update(&len.to_le_bytes()).update(&modified_ns.to_le_bytes());
    hasher.update(&inode.to_le_bytes());
}

fn key(tensor: &HostTensor, origin: &Origin, cast: DType) -> [u8; DIGEST_LEN] {
    let mut hasher = blake3::Hasher::new();
    put_stamp(&mut hasher, &origin.file);
    let layout = tensor.layout();
    let (dtype, offset) = (tensor.dtype().as_str(), origin.offset);
    let (dims, stride, start) = (layout.dims(), layout.stride(), layout.start_offset());
    hasher.update(format!("{dtype} {offset} {dims:?} {stride:?} {start}").as_bytes());
    if cast != tensor.dtype() {
        hasher.update(format!(" as {}, {CAST_VERSION}", cast.as_str()).as_bytes());
    }
    *hasher.finalize().as_bytes()
}

fn checksum(file: &FileStamp, records: &[u8]) -> [u8; DIGEST_LEN] {
    let mut hasher = blake3::Hasher::new();
    put_stamp(&mut hasher, file);
    *hasher.update(records).finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use candle_core::Layout;

    use super::*;
    use crate::backend::host::{SharedBytes, map};

    /// The tensors (2, 2) at both ends of a file.
    fn tensors(path: &Path) -> [HostTensor; 2] {
        let file = std::fs::File::open(path).unwrap();
        let stamp = Arc::new(FileStamp::new(path, &file.metadata().unwrap()));
        let whole: SharedBytes = map(&file).unwrap();
        [0, 32].map(|at| {
            let layout = Layout::contiguous((2, 2));
            HostTensor::new(DType::F32, layout, whole.clone(), at).unwrap().in_file(&stamp, &whole)
        })
    }

    #[test]
    fn digests_are_recalled_for_the_same_state_of_a_file_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (path, digests) = (folder.path().join("w"), Digests::new(folder.path().join("d")));
        std::fs::write(&path, (0..48).collect::<Vec<u8>>()).unwrap();
        let later = SystemTime::now() + Duration::from_secs(60);
        let known = || {
            let [a, b] = tensors(&path);
            digests.recall(&[(&a, DType::F32), (&b, DType::F16)]);
            [a.known_digest(DType::F32), b.known_digest(DType::F16)]
        };
        let [a, b] = tensors(&path);
        b.remember_digest(DType::F16, [7; 32]);
        let expected = [Some(a.digest()), Some([7; 32])];
        let both = [(&a, DType::F32), (&b, DType::F16)];
        // Not while the file may change without its time showing it.
        digests.keep(&both, SystemTime::UNIX_EPOCH);
        assert_eq!(known(), [None, None]);
        digests.keep(&both, later);
        assert_eq!(known(), expected);
        // Damaged, and written again.
        let stored = digests.path(&a.origin().unwrap().file);
        let mut bytes = std::fs::read(&stored).unwrap();
        bytes[70] ^= 1;
        std::fs::write(&stored, bytes).unwrap();
        assert_eq!(known(), [None, None]);
        digests.keep(&both, later);
        assert_eq!(known(), expected);
        // A worker found that they are wrong.
        digests.forget(&both);
        assert_eq!(known(), [None, None]);
        digests.keep(&both, later);
        // The file is replaced by another of the same size.
        std::fs::write(folder.path().join("new"), (1..49).collect::<Vec<u8>>()).unwrap();
        std::fs::rename(folder.path().join("new"), &path).unwrap();
        assert_eq!(known(), [None, None]);
    }
}
