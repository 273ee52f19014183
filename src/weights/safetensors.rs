//! Reader for safetensors files: a length, a JSON header, and the elements
//! (<https://github.com/huggingface/safetensors#format>). Separate from the pickles because the
//! two share nothing but their result.
//!
//! Ours rather than the crate of that name, whose reader adds offsets that the file gives without
//! a check, keeps the last of two tensors of one name, and reports a dtype that it does not know
//! without the tensor that has it.

use std::collections::BTreeMap;
use std::fmt;

use candle_core::{DType, Layout, Shape};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::{Checkpoint, MAX_RANK, MAX_TENSORS, bytes, shown};
use crate::backend::host::{HostTensor, SharedBytes};
use crate::error::{Error, Result};

/// Longest header in bytes, as in the crate.
const MAX_HEADER_LEN: u64 = 100_000_000;
/// The bytes that give the header's length.
const LENGTH_LEN: usize = 8;

/// The tensors of a safetensors file.
///
/// # Errors
/// If the header cannot be read; if a tensor's bytes are not as many as its shape needs; if the
/// tensors overlap or do not cover the file. Of another dtype than f16, bf16, f32 or i64 a tensor
/// is left with the reason.
pub fn read(file: &SharedBytes) -> Result<Checkpoint> {
    let whole = (**file).as_ref();
    let (header, elements_start) = split(whole)?;
    let Header(mut entries) = serde_json::from_slice(header)
        .map_err(|error| Error::model(format!("its header cannot be read: {error}")))?;
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut checkpoint = Checkpoint::default();
    let mut end = 0;
    for (name, entry) in entries {
        let here = |error: Error| error.context(format!("tensor {}", shown(&name)));
        let dtype = match entry.dtype() {
            Ok(dtype) => dtype,
            Err(reason) => {
                end = entry.end_from(end).map_err(here)?;
                checkpoint.leave(name, reason)?;
                continue;
            }
        };
        let tensor = entry.tensor(dtype, file, elements_start, end).map_err(here)?;
        end = entry.data_offsets.1;
        checkpoint.insert(name, tensor)?;
    }
    let found = whole.len().saturating_sub(elements_start);
    if end != found {
        return Err(Error::model(format!(
            "its tensors take {end} bytes, but {found} follow the header: it is cut off or \
             damaged, download it again"
        )));
    }
    Ok(checkpoint)
}

/// What the header says beside tensors, as names and texts; nothing if it cannot be read so.
pub fn metadata(file: &SharedBytes) -> BTreeMap<String, String> {
    #[derive(Deserialize, Default)]
    struct WithMetadata {
        #[serde(rename = "__metadata__", default)]
        metadata: BTreeMap<String, String>,
    }
    let header = split((**file).as_ref()).map(|(header, _)| header).unwrap_or_default();
    serde_json::from_slice::<WithMetadata>(header).unwrap_or_default().metadata
}

/// The header, and where the elements begin.
fn split(whole: &[u8]) -> Result<(&[u8], usize)> {
    let Some((len, rest)) = whole.split_first_chunk::<LENGTH_LEN>() else {
        return Err(Error::model(format!("{} bytes are no safetensors file", whole.len())));
    };
    let len = u64::from_le_bytes(*len);
    if len > MAX_HEADER_LEN {
        return Err(Error::model(format!(
            "not a safetensors file: its first 8 bytes give a header of {len} bytes, more than \
             {MAX_HEADER_LEN}"
        )));
    }
    usize::try_from(len)
        .ok()
        .and_then(|len| Some((rest.get(..len)?, len.checked_add(LENGTH_LEN)?)))
        .ok_or_else(|| {
            Error::model(format!(
                "its header has {len} bytes, but only {} follow: it is cut off or damaged, \
                 download it again",
                rest.len()
            ))
        })
}

/// The tensors in the order of the header, before anything about them is checked.
struct Header(Vec<(String, Entry)>);

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    /// First byte and the one after the last, from the end of the header on.
    data_offsets: (usize, usize),
}

impl Entry {
    fn dtype(&self) -> Result<DType> {
        match self.dtype.as_str() {
            "F16" => Ok(DType::F16),
            "BF16" => Ok(DType::BF16),
            "F32" => Ok(DType::F32),
            "I64" => Ok(DType::I64),
            other => Err(Error::model(format!(
                "it has elements of {}; F16, BF16, F32 and I64 are read",
                shown(other)
            ))),
        }
    }

    /// Where a tensor ends of which no more is known, and which begins where the one before has
    /// ended.
    fn end_from(&self, end: usize) -> Result<usize> {
        let (from, to) = self.data_offsets;
        if from != end || to < from {
            return Err(Error::model(format!("its bytes {from} to {to} should begin at {end}")));
        }
        Ok(to)
    }

    /// The tensor, which has to begin where the one before has ended.
    fn tensor(
        &self,
        dtype: DType,
        file: &SharedBytes,
        elements_start: usize,
        end: usize,
    ) -> Result<HostTensor> {
        if self.shape.len() > MAX_RANK {
            return Err(Error::model(format!(
                "it has {} dimensions, more than {MAX_RANK}",
                self.shape.len()
            )));
        }
        let (from, to) = self.data_offsets;
        let elements = self.shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
        let needed = elements.and_then(|n| n.checked_mul(dtype.size_in_bytes()));
        if from != end || needed.is_none() || to.checked_sub(from) != needed {
            return Err(Error::model(format!(
                "its bytes {from} to {to} should begin at {end} and hold {} of shape {:?}",
                dtype.as_str(),
                self.shape
            )));
        }
        let bytes = elements_start
            .checked_add(from)
            .and_then(|start| bytes::region(file, start, to.checked_sub(from)?))
            .ok_or_else(|| {
                Error::model(format!(
                    "its bytes {from} to {to} reach beyond the end of the file: it is cut off or \
                     damaged, download it again"
                ))
            })?;
        // Contiguous strides multiply dimensions, also those of a tensor without elements.
        let overflow = || Error::model(format!("its shape {:?} is too large", self.shape));
        self.shape
            .iter()
            .try_fold(1usize, |n, &dim| n.checked_mul(dim.max(1)))
            .ok_or_else(overflow)?;
        HostTensor::new(dtype, Layout::contiguous(Shape::from(self.shape.clone())), bytes, 0)
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the description of each tensor by its name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if entries.len() >= MAX_TENSORS {
                return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
            }
            entries.push((name, map.next_value()?));
        }
        Ok(Header(entries))
    }
}
