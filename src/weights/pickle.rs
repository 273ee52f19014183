//! Reader for what `torch.save` writes: a zip archive of a pickle, `data.pkl`, and one file of raw
//! elements per storage. Only this much of pickle is read, and nothing is ever run: see
//! the list in `globals.rs`. Separate from the archive and the machine because it alone knows both.
//!
//! Tensors keep their storage offset, size and stride: the UNet of segmind/tiny-sd is stored
//! channels_last, and read as contiguous it would give noise without an error.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::Layout;

use self::archive::Archive;
use self::machine::{Storage, StoredTensor};
use super::{Checkpoint, bytes, shown};
use crate::backend::host::{HostTensor, SharedBytes};
use crate::error::{Error, Result};

mod archive;
mod globals;
mod input;
mod machine;

/// Most elements of a tensor that has more of them than its storage, by strides of 0. Such a
/// tensor costs nothing in the file and everything when it is copied.
const MAX_EXPANDED_ELEMENTS: usize = 1 << 28;

/// The tensors of a checkpoint file: of the state_dict at its top, or of the one that a training
/// checkpoint has there. What else is in a state_dict is left with the reason.
///
/// # Errors
/// If it is not a zip archive as PyTorch ≥ 1.6 writes it, is big-endian, has no state_dict, or
/// describes tensors that its storages cannot hold.
pub fn read(file: &SharedBytes) -> Result<Checkpoint> {
    let mut archive = Archive::open(file)?;
    archive.check_byte_order()?;
    let pickle = archive.entry("data.pkl")?;
    let mut storages = BTreeMap::new();
    let mut checkpoint = Checkpoint::default();
    for (name, stored) in machine::state_dict((*pickle).as_ref())? {
        let stored = match stored {
            Ok(stored) => stored,
            Err(reason) => {
                checkpoint.leave(name.to_owned(), reason)?;
                continue;
            }
        };
        let Storage { key, .. } = stored.storage;
        let bytes = match storages.get(key) {
            Some(bytes) => Arc::clone(bytes),
            None => {
                let bytes = archive.entry(&format!("data/{key}"))?;
                storages.insert(key, Arc::clone(&bytes));
                bytes
            }
        };
        let tensor = tensor(stored, bytes)
            .map_err(|error| error.context(format!("tensor {}", shown(name))))?;
        checkpoint.insert(name.to_owned(), tensor)?;
    }
    Ok(checkpoint)
}

fn tensor(stored: StoredTensor<'_>, bytes: SharedBytes) -> Result<HostTensor> {
    let Storage { dtype, key, elements } = stored.storage;
    let found = (*bytes).as_ref().len();
    if elements.checked_mul(dtype.size_in_bytes()) != Some(found) {
        return Err(Error::model(format!(
            "its storage data/{key} has {found} bytes, but should be {elements} elements of {}",
            dtype.as_str()
        )));
    }
    let elements_or_cap = elements.max(MAX_EXPANDED_ELEMENTS);
    let count = stored.shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
    if count.is_none_or(|count| count > elements_or_cap) {
        return Err(Error::model(format!(
            "its shape {:?} has more elements than its storage's {elements}",
            stored.shape
        )));
    }
    let layout = Layout::new(stored.shape.into(), stored.stride, stored.offset);
    HostTensor::new(dtype, layout, bytes, 0)
}
