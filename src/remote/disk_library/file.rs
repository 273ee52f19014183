//! One weight as a file of the cache: named by its digest, a header of fixed length, then the
//! row-major bytes. Separate because these bytes are not trusted: a disk loses and flips them.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use candle_core::{DType, Layout};

use crate::backend::HostTensor;
use crate::backend::host::{FileStamp, SharedBytes, map};
use crate::error::{Error, Result};
use crate::remote::op::{Digest, Op};
use crate::remote::wire::{Reader, Wire};

/// Where the elements begin: a multiple of 64 bytes, the alignment that every kernel is fine with.
pub const HEADER_LEN: usize = 128;
/// What the file is, and the version of its format.
const MAGIC: &[u8; 8] = b"tinysdw1";

/// A weight that was found intact.
#[derive(Debug, Clone)]
pub struct Kept {
    /// Its elements, mapped or in memory, with the digest known.
    pub tensor: HostTensor,
    /// The file they were verified in; `None` for those in memory.
    pub stamp: Option<FileStamp>,
}

/// What lies under a weight's name.
pub enum Found {
    /// No file.
    Nothing,
    /// A file that is not that weight, and what is wrong with it.
    Damaged(String),
    /// The weight.
    Intact(Kept),
}

/// A weight's file in the folder of the cache.
pub fn path(folder: &Path, digest: &Digest) -> PathBuf {
    folder.join(hex(digest))
}

/// 64 digits.
pub fn hex(digest: &Digest) -> String {
    blake3::Hash::from_bytes(digest.0).to_hex().to_string()
}

/// The weight that a file's name stands for, if it is one.
pub fn digest_of_name(name: &std::ffi::OsStr) -> Option<Digest> {
    let name = name.to_str().filter(|name| !name.contains(|c: char| c.is_ascii_uppercase()))?;
    blake3::Hash::from_hex(name).ok().map(|hash| Digest(*hash.as_bytes()))
}

/// Bytes of the elements of a shape, if this machine can address them.
pub fn byte_len(dtype: DType, dims: &[usize]) -> Option<u64> {
    // Strides multiply dimensions also where there are no elements.
    dims.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim.max(1)))?;
    let count = dims.iter().product::<usize>();
    u64::try_from(count.checked_mul(dtype.size_in_bytes())?).ok()
}

/// What the file begins with.
///
/// # Errors
/// If the shape has too many dimensions to fit.
pub fn header(digest: Digest, dtype: DType, dims: &[usize]) -> Result<Vec<u8>> {
    let mut header = MAGIC.to_vec();
    Op::Weight { digest, dtype, dims: dims.to_vec() }.put(&mut header);
    if header.len() > HEADER_LEN {
        return Err(Error::remote(format!("a weight of {} dimensions", dims.len())));
    }
    header.resize(HEADER_LEN, 0);
    Ok(header)
}

/// Maps and verifies the weight that should lie at `path`.
pub fn load(path: &Path, digest: &Digest) -> Found {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Found::Nothing,
        Err(error) => return Found::Damaged(error.to_string()),
    };
    match read(path, &file) {
        Err(error) => Found::Damaged(error.to_string()),
        Ok(kept) => match check_digest(&kept.tensor, digest) {
            Err(error) => Found::Damaged(error.to_string()),
            Ok(()) => Found::Intact(kept),
        },
    }
}

/// The weight `digest` in the bytes of its file.
///
/// # Errors
/// If they are not that weight.
pub fn verified(whole: SharedBytes, digest: &Digest) -> Result<HostTensor> {
    let tensor = tensor(whole)?;
    check_digest(&tensor, digest).map(|()| tensor)
}

fn check_digest(tensor: &HostTensor, digest: &Digest) -> Result<()> {
    match tensor.digest() == digest.0 {
        true => Ok(()),
        false => Err(Error::other("its bytes are not those it is named for")),
    }
}

/// The tensor in a file, by its header; its bytes were not looked at.
///
/// # Errors
/// If the header is none, or is about more or fewer bytes than follow.
pub fn read(path: &Path, file: &File) -> Result<Kept> {
    let failed = |error: std::io::Error| Error::other(error.to_string());
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() || metadata.len() < HEADER_LEN as u64 {
        return Err(Error::other("it is cut short"));
    }
    let tensor = tensor(map(file).map_err(failed)?)?;
    Ok(Kept { tensor, stamp: Some(FileStamp::new(path, &metadata)) })
}

fn tensor(whole: SharedBytes) -> Result<HostTensor> {
    let (dtype, dims) = parse((*whole).as_ref())?;
    HostTensor::new(dtype, Layout::contiguous(dims), whole, HEADER_LEN)
}

fn parse(whole: &[u8]) -> Result<(DType, Vec<usize>)> {
    let record = whole.get(..HEADER_LEN).and_then(|header| header.strip_prefix(MAGIC));
    let record = record.ok_or_else(|| Error::other("it is no weight of this version"))?;
    let Op::Weight { dtype, dims, .. } = Op::get(&mut Reader::new(record))? else {
        return Err(Error::other("its header is not about a weight"));
    };
    let rest = (whole.len() - HEADER_LEN) as u64;
    if byte_len(dtype, &dims) != Some(rest) {
        return Err(Error::other(format!("{rest} bytes for a weight of shape {dims:?}")));
    }
    Ok((dtype, dims))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_headers_come_back() {
        let digest = Digest(std::array::from_fn(|n| n as u8 * 7));
        assert_eq!(digest_of_name(hex(&digest).as_ref()), Some(digest));
        assert_eq!(digest_of_name(hex(&digest).to_uppercase().as_ref()), None);
        assert_eq!(digest_of_name(".incoming-abc".as_ref()), None);
        let huge = [usize::MAX; 8];
        for dims in [&[][..], &[0, 3], &[320, 4, 3, 3], &huge] {
            let mut file = header(digest, DType::F16, dims).unwrap();
            assert_eq!(file.len(), HEADER_LEN);
            let len = byte_len(DType::F16, dims);
            assert_eq!(len.is_none(), dims == huge);
            file.extend(vec![0; len.unwrap_or(0) as usize]);
            assert_eq!(parse(&file).ok(), len.map(|_| (DType::F16, dims.to_vec())));
        }
    }

    #[test]
    fn no_bytes_make_a_header_panic() {
        let whole = header(Digest([9; 32]), DType::F32, &[2, 2]).unwrap();
        let whole = [whole, vec![1; 16]].concat();
        for len in 0..whole.len() {
            assert!(parse(&whole[..len]).is_err());
        }
        for at in 0..HEADER_LEN {
            for flipped in 0..=255 {
                let mut bytes = whole.clone();
                bytes[at] = flipped;
                // Whether it still is a weight is for the digest to say.
                let _ = parse(&bytes);
            }
        }
    }
}
