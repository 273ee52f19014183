//! A tensor in the memory of this process that is not on any device yet: what weight files give
//! and what devices take. Separate because both sides name it and neither names the other.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Layout};

use super::gather::Gather;
pub use super::mapped::{FileStamp, map};
use crate::backend::order::last_element;
use crate::error::{Error, Result};

/// Bytes that somebody keeps alive: a mapped file, or a buffer.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// How much of a strided tensor is gathered at a time.
const PIECE_BYTES: usize = 1 << 20;

/// A tensor as it lies in a file: dtype, layout (shape, strides in elements, offset in elements)
/// and the bytes they refer to, little-endian and not necessarily aligned.
///
/// The constructor checks that every element the layout reaches lies within the bytes, so readers
/// need not.
#[derive(Clone)]
pub struct HostTensor {
    dtype: DType,
    layout: Layout,
    bytes: SharedBytes,
    /// Where element 0 of the storage begins in `bytes`, in bytes.
    byte_offset: usize,
    origin: Option<Origin>,
    digests: Arc<Digests>,
}

/// The digests of a tensor as it is stored, and cast to other dtypes.
#[derive(Default)]
struct Digests {
    stored: OnceLock<[u8; 32]>,
    f32: OnceLock<[u8; 32]>,
    f16: OnceLock<[u8; 32]>,
    bf16: OnceLock<[u8; 32]>,
}

/// Where in which file a tensor lies: what its digest can be remembered by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Origin {
    /// The file.
    pub file: Arc<FileStamp>,
    /// Where element 0 of the storage begins in it, in bytes.
    pub offset: u64,
}

impl HostTensor {
    /// A tensor whose element 0 begins at `byte_offset` of `bytes`.
    ///
    /// # Errors
    /// If the layout reaches beyond the end of the bytes, or its arithmetic overflows.
    pub fn new(
        dtype: DType,
        layout: Layout,
        bytes: SharedBytes,
        byte_offset: usize,
    ) -> Result<Self> {
        let available = (*bytes).as_ref().len();
        let end = last_element(&layout)
            .and_then(|last| match last {
                Some(last) => last.checked_add(1)?.checked_mul(dtype.size_in_bytes()),
                None => Some(0),
            })
            .and_then(|len| len.checked_add(byte_offset));
        match end {
            Some(end) if end <= available => {
                let (origin, digests) = (None, Arc::default());
                Ok(Self { dtype, layout, bytes, byte_offset, origin, digests })
            }
            _ => Err(Error::model(format!(
                "a tensor of shape {:?} with strides {:?} at byte {byte_offset} reaches beyond \
                 the {available} bytes it is stored in",
                layout.dims(),
                layout.stride(),
            ))),
        }
    }

    /// The same tensor, known to lie in `file`, whose bytes are `whole`.
    #[must_use]
    pub fn in_file(mut self, file: &Arc<FileStamp>, whole: &SharedBytes) -> Self {
        let (whole, own) = ((**whole).as_ref(), self.bytes());
        let offset = own.as_ptr().addr().checked_sub(whole.as_ptr().addr());
        // Bytes from elsewhere, such as an unpacked entry, have no place in the file.
        let offset = offset
            .filter(|offset| offset.checked_add(own.len()).is_some_and(|end| end <= whole.len()));
        self.origin = offset.map(|offset| Origin { file: file.clone(), offset: offset as u64 });
        self
    }

    /// The same stored elements seen by another layout: a part of them, or in another shape.
    ///
    /// # Errors
    /// If the layout reaches beyond the bytes.
    pub fn with_layout(&self, layout: Layout) -> Result<Self> {
        let view = Self::new(self.dtype, layout, self.bytes.clone(), self.byte_offset)?;
        Ok(Self { origin: self.origin.clone(), ..view })
    }

    /// Where it lies, if that is known.
    pub fn origin(&self) -> Option<&Origin> {
        self.origin.as_ref()
    }

    /// The element type in the file.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Shape, strides and offset, in elements.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Bytes of its elements.
    pub fn byte_len(&self) -> u64 {
        self.layout.shape().elem_count() as u64 * self.dtype.size_in_bytes() as u64
    }

    /// BLAKE3-256 of dtype, shape and row-major bytes: equal for equal weights, however a file
    /// stores them. Computed once, shared by clones.
    pub fn digest(&self) -> [u8; 32] {
        *self.digests.stored.get_or_init(|| {
            let mut hasher = digest_of(self.dtype, self.layout.dims());
            self.row_major(&mut |bytes| {
                hasher.update_rayon(bytes);
            });
            *hasher.finalize().as_bytes()
        })
    }

    /// The digest of the tensor as `dtype`, if it was computed before.
    pub fn known_digest(&self, dtype: DType) -> Option<[u8; 32]> {
        self.digest_as(dtype).and_then(OnceLock::get).copied()
    }

    /// Remembers the digest of the tensor as `dtype`, unless it was computed already.
    pub fn remember_digest(&self, dtype: DType, digest: [u8; 32]) {
        if let Some(known) = self.digest_as(dtype) {
            // The first stays.
            let _ = known.set(digest);
        }
    }

    fn digest_as(&self, dtype: DType) -> Option<&OnceLock<[u8; 32]>> {
        match dtype {
            dtype if dtype == self.dtype => Some(&self.digests.stored),
            DType::F32 => Some(&self.digests.f32),
            DType::F16 => Some(&self.digests.f16),
            DType::BF16 => Some(&self.digests.bf16),
            _ => None,
        }
    }

    /// The elements' bytes in row-major order, in pieces.
    pub fn row_major(&self, take: &mut dyn FnMut(&[u8])) {
        let size = self.dtype.size_in_bytes();
        if let Some((start, end)) = self.layout.contiguous_offsets() {
            return take(self.bytes().get(start * size..end * size).unwrap_or_default());
        }
        let mut rest = self.gather();
        let mut piece = vec![0; PIECE_BYTES.min(self.byte_len() as usize)];
        loop {
            match rest.read(self.bytes(), &mut piece) {
                0 => return,
                len => take(&piece[..len]),
            }
        }
    }

    /// A walk over the elements in row-major order, at its beginning; it reads [`Self::bytes`].
    pub fn gather(&self) -> Gather {
        Gather::new(&self.layout, self.dtype.size_in_bytes())
    }

    /// The stored elements from element 0 on; the layout reaches only into these.
    pub fn bytes(&self) -> &[u8] {
        (*self.bytes).as_ref().get(self.byte_offset..).unwrap_or_default()
    }
}

/// The digest of a tensor whose row-major bytes follow.
pub fn digest_of(dtype: DType, dims: &[usize]) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{} {dims:?}\n", dtype.as_str()).as_bytes());
    hasher
}

impl std::fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostTensor({:?}, {:?})", self.dtype, self.layout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(dims: &[usize], stride: &[usize], offset: usize, bytes: usize) -> Result<HostTensor> {
        let layout = Layout::new(dims.into(), stride.to_vec(), offset);
        HostTensor::new(DType::F32, layout, Arc::new(vec![0u8; bytes]), 0)
    }

    #[test]
    fn a_layout_must_lie_within_its_bytes() {
        assert!(host(&[2, 3], &[3, 1], 0, 24).is_ok());
        assert!(host(&[2, 3], &[1, 2], 0, 24).is_ok());
        assert!(host(&[2, 3], &[3, 1], 1, 24).is_err());
        assert!(host(&[2, 3], &[4, 1], 0, 24).is_err());
        assert!(host(&[2, usize::MAX], &[usize::MAX, 1], 0, 24).is_err());
        assert!(host(&[0, 3], &[9, 9], 0, 0).is_ok());
    }

    #[test]
    fn equal_weights_have_equal_digests_however_they_are_stored() {
        // The same (2, 3, 2, 2) row-major and channels-last, the latter behind other bytes.
        let row_major: Vec<u8> = (0..24u16).flat_map(u16::to_le_bytes).collect();
        let mut channels_last = vec![0u8; 10 + 48];
        for (o, i, y, x) in (0..24).map(|n| (n / 12, n / 4 % 3, n / 2 % 2, n % 2)) {
            let value = (o * 12 + i * 4 + y * 2 + x) as u16;
            let place = 10 + 2 * (o * 12 + y * 6 + x * 3 + i);
            channels_last[place..place + 2].copy_from_slice(&value.to_le_bytes());
        }
        let tensor = |stride: [usize; 4], offset, bytes: &[u8], at| {
            let layout = Layout::new((2, 3, 2, 2).into(), stride.to_vec(), offset);
            HostTensor::new(DType::F16, layout, Arc::new(bytes.to_vec()), at).unwrap()
        };
        let plain = tensor([12, 4, 2, 1], 0, &row_major, 0);
        assert_eq!(plain.digest(), tensor([12, 1, 6, 3], 3, &channels_last, 4).digest());
        assert_ne!(plain.digest(), tensor([12, 1, 6, 3], 2, &channels_last, 4).digest());
        // Neither shape nor dtype may be mistaken.
        let other = |dtype, dims: &[usize]| {
            let layout = Layout::contiguous(dims);
            HostTensor::new(dtype, layout, Arc::new(row_major.clone()), 0).unwrap().digest()
        };
        assert_eq!(plain.digest(), other(DType::F16, &[2, 3, 2, 2]));
        assert_ne!(plain.digest(), other(DType::F16, &[2, 3, 4]));
        assert_ne!(plain.digest(), other(DType::BF16, &[2, 3, 2, 2]));
    }
}
