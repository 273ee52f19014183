//! In which dtype a weight goes over the wire: as it is stored, or as it is wanted if that is fewer
//! bytes. Separate because the client, which names weights by their digests, and the transfer must
//! mean the same bytes.

use std::sync::Arc;

use candle_core::{DType, Layout};

use super::op::Digest;
use crate::backend::elements::to_bytes;
use crate::backend::{HostTensor, cpu};
use crate::error::Result;

/// A weight as it goes over the wire.
#[derive(Debug, Clone)]
pub struct WireForm {
    tensor: HostTensor,
    dtype: DType,
}

impl WireForm {
    /// Of a weight that the worker will use as `wanted`. A cast there gives the same bits.
    pub fn new(tensor: &HostTensor, wanted: DType) -> Self {
        let stored = tensor.dtype();
        let casts_to_fewer_bytes = stored.is_float()
            && matches!(wanted, DType::F32 | DType::F16 | DType::BF16)
            && wanted.size_in_bytes() < stored.size_in_bytes();
        let dtype = if casts_to_fewer_bytes { wanted } else { stored };
        Self { tensor: tensor.clone(), dtype }
    }

    /// The weight as it is stored.
    pub fn stored(&self) -> &HostTensor {
        &self.tensor
    }

    /// The dtype on the wire.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes on the wire.
    pub fn byte_len(&self) -> u64 {
        self.tensor.layout().shape().elem_count() as u64 * self.dtype.size_in_bytes() as u64
    }

    /// The digest, if it was computed before.
    pub fn known_digest(&self) -> Option<Digest> {
        self.tensor.known_digest(self.dtype).map(Digest)
    }

    /// The digest of the bytes on the wire.
    ///
    /// # Errors
    /// If the weight cannot be cast.
    pub fn digest(&self) -> Result<Digest> {
        if let Some(known) = self.known_digest() {
            return Ok(known);
        }
        let digest = self.cast()?.digest();
        self.tensor.remember_digest(self.dtype, digest);
        Ok(Digest(digest))
    }

    /// The weight whose bytes go over the wire; in memory, if it had to be cast.
    ///
    /// # Errors
    /// If the weight cannot be cast.
    pub fn cast(&self) -> Result<HostTensor> {
        if self.dtype == self.tensor.dtype() {
            return Ok(self.tensor.clone());
        }
        let bytes = to_bytes(&cpu::cast(&self.tensor, self.dtype)?)?;
        let layout = Layout::contiguous(self.tensor.layout().dims());
        HostTensor::new(self.dtype, layout, Arc::new(bytes), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_with_fewer_bytes_goes_over_the_wire() {
        use DType::{BF16, F16, F32, F64, I64, U8};
        let check = |stored: DType, wanted: DType, expected: DType| {
            let bytes = Arc::new(vec![0u8; 4 * stored.size_in_bytes()]);
            let tensor = HostTensor::new(stored, Layout::contiguous(4), bytes, 0).unwrap();
            let form = WireForm::new(&tensor, wanted);
            assert_eq!(form.dtype(), expected, "{stored:?} as {wanted:?}");
            assert_eq!(form.cast().unwrap().dtype(), expected);
            assert_eq!(form.byte_len(), form.cast().unwrap().byte_len());
        };
        check(F32, F16, F16);
        check(F32, BF16, BF16);
        check(F64, F32, F32);
        check(F16, F32, F16);
        check(F16, BF16, F16);
        check(F32, F32, F32);
        check(I64, F32, I64);
        check(F32, U8, F32);
    }
}
