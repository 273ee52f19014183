//! A tensor in the memory of this process that is not on any device yet: what weight files give
//! and what devices take. Separate because both sides name it and neither names the other.

use std::sync::Arc;

use candle_core::{DType, Layout};

use crate::error::{Error, Result};

/// Bytes that somebody keeps alive: a mapped file, or a buffer.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

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
            Some(end) if end <= available => Ok(Self { dtype, layout, bytes, byte_offset }),
            _ => Err(Error::model(format!(
                "a tensor of shape {:?} with strides {:?} at byte {byte_offset} reaches beyond \
                 the {available} bytes it is stored in",
                layout.dims(),
                layout.stride(),
            ))),
        }
    }

    /// The element type in the file.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Shape, strides and offset, in elements.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The stored elements from element 0 on; the layout reaches only into these.
    pub fn bytes(&self) -> &[u8] {
        &(*self.bytes).as_ref()[self.byte_offset..]
    }
}

impl std::fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostTensor({:?}, {:?})", self.dtype, self.layout)
    }
}

/// The highest element that a layout reaches: `Some(None)` if it has no elements at all, `None` on
/// overflow. The arithmetic is checked because strides come from files and from the network.
pub fn last_element(layout: &Layout) -> Option<Option<usize>> {
    let mut elements: usize = 1;
    let mut last = layout.start_offset();
    for (&dim, &stride) in layout.dims().iter().zip(layout.stride()) {
        if dim == 0 {
            return Some(None);
        }
        elements = elements.checked_mul(dim)?;
        last = last.checked_add((dim - 1).checked_mul(stride)?)?;
    }
    Some(Some(last))
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
}
