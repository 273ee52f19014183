//! Host storages as little-endian bytes: the form in which elements travel to other memories.
//! Separate because the wire and a GPU mean the same bytes.

use candle_core::backend::BackendStorage as _;
use candle_core::{CpuStorage, DType, WithDType};
use half::{bf16, f16};

use crate::error::{Error, Result};

/// A host storage of little-endian bytes.
///
/// # Errors
/// If the dtype is not one that travels.
pub fn from_bytes(dtype: DType, bytes: &[u8]) -> Result<CpuStorage> {
    Ok(match dtype {
        DType::U8 => CpuStorage::U8(bytes.to_vec()),
        DType::U32 => CpuStorage::U32(elements(bytes, u32::from_le_bytes)),
        DType::I64 => CpuStorage::I64(elements(bytes, i64::from_le_bytes)),
        DType::BF16 => CpuStorage::BF16(elements(bytes, bf16::from_le_bytes)),
        DType::F16 => CpuStorage::F16(elements(bytes, f16::from_le_bytes)),
        DType::F32 => CpuStorage::F32(elements(bytes, f32::from_le_bytes)),
        DType::F64 => CpuStorage::F64(elements(bytes, f64::from_le_bytes)),
        other => return Err(Error::other(format!("{} does not travel", other.as_str()))),
    })
}

/// The bytes of a host storage, little-endian.
///
/// # Errors
/// If the dtype is not one that travels.
pub fn to_bytes(storage: &CpuStorage) -> Result<Vec<u8>> {
    Ok(match storage {
        CpuStorage::U8(values) => values.clone(),
        CpuStorage::U32(values) => little_endian(values, u32::to_le_bytes),
        CpuStorage::I64(values) => little_endian(values, i64::to_le_bytes),
        CpuStorage::BF16(values) => little_endian(values, bf16::to_le_bytes),
        CpuStorage::F16(values) => little_endian(values, f16::to_le_bytes),
        CpuStorage::F32(values) => little_endian(values, f32::to_le_bytes),
        CpuStorage::F64(values) => little_endian(values, f64::to_le_bytes),
        other => {
            return Err(Error::other(format!("{} does not travel", other.dtype().as_str())));
        }
    })
}

fn little_endian<T: Copy, const N: usize>(values: &[T], to: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * N];
    for (chunk, value) in bytes.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *chunk = to(*value);
    }
    bytes
}

fn elements<T: WithDType, const N: usize>(bytes: &[u8], from: fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|chunk| from(*chunk)).collect()
}
