//! Tensors from files: bytes of any alignment and layout become a row-major buffer. Separate
//! because nothing else reads bytes.

use candle_core::{CpuStorage, DType, Layout};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::element::Element;
use super::memory::{Gather, Plain, zeroed};
use super::spare;
use crate::backend::HostTensor;
use crate::error::{Error, Result};

/// Elements of earlier weights that stay in memory while the next one is loaded.
const KEPT_BYTES: usize = 1 << 26;

/// See [`crate::backend::Device::upload`].
pub fn upload(tensor: &HostTensor, dtype: DType) -> Result<CpuStorage> {
    spare::trim(KEPT_BYTES);
    match tensor.dtype() {
        DType::U8 => read::<u8, 1>(tensor, dtype, |[x]| x),
        DType::U32 => read(tensor, dtype, u32::from_le_bytes),
        DType::I64 => read(tensor, dtype, i64::from_le_bytes),
        DType::BF16 => read(tensor, dtype, |bytes| bf16::from_bits(u16::from_le_bytes(bytes))),
        DType::F16 => read(tensor, dtype, |bytes| f16::from_bits(u16::from_le_bytes(bytes))),
        DType::F32 => read(tensor, dtype, f32::from_le_bytes),
        DType::F64 => read(tensor, dtype, f64::from_le_bytes),
        other => Err(unsupported(other, dtype)),
    }
}

fn unsupported(from: DType, to: DType) -> Error {
    let (from, to) = (from.as_str(), to.as_str());
    Error::model(format!("tensors of {from} cannot be loaded as {to}"))
}

/// Elements that are converted at once.
const BUFFER: usize = 4096;

/// A number in a file.
trait Stored: Plain + Default {
    fn to_f64(self) -> f64;

    fn to_f32s(from: &[Self], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.to_f64() as f32;
        }
    }
}

impl Stored for u8 {
    fn to_f64(self) -> f64 {
        self.into()
    }
}

impl Stored for u32 {
    fn to_f64(self) -> f64 {
        self.into()
    }
}

impl Stored for i64 {
    fn to_f64(self) -> f64 {
        self as f64
    }
}

impl Stored for f64 {
    fn to_f64(self) -> f64 {
        self
    }
}

impl Stored for f32 {
    fn to_f64(self) -> f64 {
        self.into()
    }

    fn to_f32s(from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

impl Stored for f16 {
    fn to_f64(self) -> f64 {
        self.into()
    }

    fn to_f32s(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
}

impl Stored for bf16 {
    fn to_f64(self) -> f64 {
        self.into()
    }

    fn to_f32s(from: &[Self], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }
}

fn read<T: Stored, const SIZE: usize>(
    tensor: &HostTensor,
    dtype: DType,
    decode: impl Fn([u8; SIZE]) -> T + Sync,
) -> Result<CpuStorage> {
    let (bytes, layout) = (tensor.bytes(), tensor.layout());
    let (values, _) = bytes.as_chunks::<SIZE>();
    let wide = |to: &mut [f32], from: &[T]| T::to_f32s(from, to);
    // By way of f32, which holds each half exactly.
    let half = |to: &mut [f16], from: &[T]| {
        let mut wide = [0f32; BUFFER];
        T::to_f32s(from, &mut wide[..from.len()]);
        to.convert_from_f32_slice(&wide[..from.len()]);
    };
    let brain = |to: &mut [bf16], from: &[T]| {
        let mut wide = [0f32; BUFFER];
        T::to_f32s(from, &mut wide[..from.len()]);
        bf16::narrow(&wide[..from.len()], to);
    };
    let double = |to: &mut [f64], from: &[T]| {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f64());
    };
    // Integers are ids and the like, far below 2⁵³.
    let whole = |to: &mut [i64], from: &[T]| {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f64() as i64);
    };
    let natural = |to: &mut [u32], from: &[T]| {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f64() as u32);
    };
    let byte = |to: &mut [u8], from: &[T]| {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f64() as u8);
    };
    let count = layout.shape().elem_count();
    match dtype {
        // A weight is dropped once it is packed: its buffer serves the next.
        DType::F32 => {
            let result = spare::take(count)?;
            Ok(CpuStorage::F32(convert(values, layout, &decode, wide, result)))
        }
        DType::F16 => {
            let result = spare::take(count)?;
            Ok(CpuStorage::F16(convert(values, layout, &decode, half, result)))
        }
        DType::BF16 => {
            let result = spare::take(count)?;
            Ok(CpuStorage::BF16(convert(values, layout, &decode, brain, result)))
        }
        DType::F64 => Ok(CpuStorage::F64(convert(values, layout, &decode, double, zeroed(count)?))),
        DType::I64 => Ok(CpuStorage::I64(convert(values, layout, &decode, whole, zeroed(count)?))),
        DType::U32 => {
            Ok(CpuStorage::U32(convert(values, layout, &decode, natural, zeroed(count)?)))
        }
        DType::U8 => Ok(CpuStorage::U8(convert(values, layout, &decode, byte, zeroed(count)?))),
        other => Err(unsupported(tensor.dtype(), other)),
    }
}

/// Reads a piece at a time into a small buffer and converts it to its place.
fn convert<T: Stored, U: Plain, const SIZE: usize>(
    values: &[[u8; SIZE]],
    layout: &Layout,
    decode: &(impl Fn([u8; SIZE]) -> T + Sync),
    to: impl Fn(&mut [U], &[T]) + Sync,
    mut result: Vec<U>,
) -> Vec<U> {
    let source = Gather::new(layout);
    source.each_task(&mut result, |start, piece| {
        let mut buffer = [T::default(); BUFFER];
        for (i, piece) in piece.chunks_mut(BUFFER).enumerate() {
            let buffer = &mut buffer[..piece.len()];
            let one = |from: usize| decode(values[from]);
            source.copy(start + i * BUFFER, buffer, one, |from, to: &mut [T]| {
                let run = &values[from..from + to.len()];
                for (to, from) in to.iter_mut().zip(run) {
                    *to = decode(*from);
                }
            });
            to(piece, buffer);
        }
    });
    result
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::backend::BackendStorage;

    use super::*;

    /// Row-major numbers 0, 1, 2, … of `dims`, stored in `order`, one byte off any alignment.
    fn host<const SIZE: usize>(
        dtype: DType,
        dims: &[usize],
        order: &[usize],
        encode: impl Fn(usize) -> [u8; SIZE],
    ) -> Result<HostTensor> {
        let layout = crate::backend::order::dense_in_order(dims, order);
        let layout = Layout::new(dims.into(), layout.stride().to_vec(), 2);
        let count: usize = dims.iter().product();
        let mut bytes = vec![0u8; 1 + (count + 2) * SIZE];
        for flat in 0..count {
            let (mut place, mut rest) = (2, flat);
            for (dim, stride) in dims.iter().zip(layout.stride()).rev() {
                place += rest % dim * stride;
                rest /= dim;
            }
            bytes[1 + place * SIZE..][..SIZE].copy_from_slice(&encode(flat));
        }
        HostTensor::new(dtype, layout, Arc::new(bytes), 1)
    }

    #[test]
    fn bytes_of_any_dtype_and_layout_become_row_major() -> Result<()> {
        let shapes: [(&[usize], &[usize]); 6] = [
            (&[7], &[0]),
            (&[5, 3], &[1, 0]),
            (&[37, 50], &[1, 0]),
            (&[6, 20, 3, 3], &[0, 2, 3, 1]),
            (&[40, 33, 5, 9], &[0, 2, 3, 1]),
            (&[2, 3, 4], &[2, 0, 1]),
        ];
        for (dims, order) in shapes {
            let kept = |flat: usize| flat % 200;
            let half = |n: usize| f16::from_f64(n as f64).to_le_bytes();
            let brain = |n: usize| bf16::from_f64(n as f64).to_le_bytes();
            let hosts = [
                host(DType::U8, dims, order, |i| [kept(i) as u8])?,
                host(DType::U32, dims, order, |i| (kept(i) as u32).to_le_bytes())?,
                host(DType::I64, dims, order, |i| (kept(i) as i64).to_le_bytes())?,
                host(DType::F16, dims, order, |i| half(kept(i)))?,
                host(DType::BF16, dims, order, |i| brain(kept(i)))?,
                host(DType::F32, dims, order, |i| (kept(i) as f32).to_le_bytes())?,
                host(DType::F64, dims, order, |i| (kept(i) as f64).to_le_bytes())?,
            ];
            for (tensor, to) in hosts.iter().flat_map(|host| {
                let to = [DType::F32, DType::F16, DType::BF16, DType::F64, DType::I64, DType::U32];
                to.map(|to| (host, to))
            }) {
                let found = upload(tensor, to)?;
                assert_eq!(found.dtype(), to);
                let layout = Layout::contiguous(dims);
                let CpuStorage::F64(found) = found.to_dtype(&layout, DType::F64)? else {
                    panic!("cast to f64")
                };
                let expected: Vec<f64> = (0..found.len()).map(|i| kept(i) as f64).collect();
                assert_eq!(found, expected, "{tensor:?} as {to:?} from {order:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn a_dtype_that_cannot_be_loaded_is_an_error() -> Result<()> {
        let tensor = host(DType::F32, &[2], &[0], |i| (i as f32).to_le_bytes())?;
        assert!(upload(&tensor, DType::F8E4M3).is_err());
        Ok(())
    }
}
