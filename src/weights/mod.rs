//! Where weights come from: the files of a model, exactly as they are published.
//!
//! [`Model`] is one, of whatever kind of files: [`ModelFolder`] finds those of a folder in
//! diffusers layout, [`single`] reads a model in one file; [`choose`] says which of them
//! hold a component's weights, and serves a repository's list of files just as well. The readers,
//! [`pickle`] and [`safetensors`], map a file and give its tensors as they lie in it, without a
//! copy; [`names`] calls them all by today's names.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;

pub use choice::{Choice, Component, Format, Variant, choose, config_files};
pub use embedding::{Embedding, EmbeddingFile};
pub use folder::ModelFolder;
pub use identity::{UsedTensors, config_hash, file_hash};
pub use lone_vae::LoneVae;
pub use lora::{Changes, ComponentChanges, LoraFile, LowRank, Unmatched};
pub use mismatch::Mismatch;
pub use model::{Model, WeightFile};
pub use single::{SingleFile, TokenizerFiles};

use crate::backend::host::HostTensor;
use crate::error::{Error, Result};

pub mod built_in;
mod bytes;
mod choice;
pub mod defaults;
mod embedding;
mod folder;
pub mod hub;
mod identity;
pub mod json;
mod lone_vae;
mod lora;
mod mismatch;
mod model;
pub mod names;
pub mod pickle;
pub mod safetensors;
pub mod single;
#[cfg(test)]
mod tests;

/// Most tensors of one file. An SDXL UNet has 1,680.
const MAX_TENSORS: usize = 65_536;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;
/// Longest name of a tensor, in bytes.
const MAX_NAME_LEN: usize = 1024;

/// The tensors of one component by name, as they lie in the mapped files.
#[derive(Debug, Default)]
pub struct Checkpoint {
    tensors: BTreeMap<String, HostTensor>,
    /// What is there and cannot be read, with the reason.
    left: BTreeMap<String, Error>,
}

impl Checkpoint {
    /// Reads one weight file. The names are those of the file; see [`names::canonical`].
    ///
    /// # Errors
    /// If the file cannot be mapped or is not what its format says, or holds what is not read,
    /// naming it.
    pub fn read(path: &Path, format: Format) -> Result<Self> {
        let checkpoint = Self::read_some(path, Some(format))?;
        checkpoint.all().map_err(|error| error.context(path.display()))
    }

    /// Reads what can be read of one weight file, whose first bytes say its format unless the
    /// caller knows it: a whole training checkpoint holds more than weights.
    ///
    /// # Errors
    /// If the file cannot be mapped or is not what its format says, naming it.
    pub fn read_some(path: &Path, format: Option<Format>) -> Result<Self> {
        let (bytes, stamp) = bytes::map(path)?;
        let tensors = match format.unwrap_or_else(|| Format::of((*bytes).as_ref())) {
            Format::Safetensors => safetensors::read(&bytes),
            Format::Pickle => pickle::read(&bytes),
        };
        let mut checkpoint = tensors.map_err(|error| error.context(path.display()))?;
        for tensor in checkpoint.tensors.values_mut() {
            *tensor = tensor.clone().in_file(&stamp, &bytes);
        }
        Ok(checkpoint)
    }

    /// The checkpoint if all that is there could be read.
    ///
    /// # Errors
    /// What could not, and why.
    pub fn all(self) -> Result<Self> {
        match self.left.first_key_value() {
            None => Ok(self),
            Some((name, reason)) => Err(reason.clone().context(format!("tensor {}", shown(name)))),
        }
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&HostTensor> {
        self.tensors.get(name)
    }

    /// All tensors in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &HostTensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Takes in a tensor under a name that is not taken.
    fn insert(&mut self, name: String, tensor: HostTensor) -> Result<()> {
        self.check_name(&name)?;
        match self.tensors.entry(name) {
            Entry::Vacant(entry) => {
                entry.insert(tensor);
                Ok(())
            }
            Entry::Occupied(entry) => {
                Err(Error::model(format!("tensor {} is there twice", shown(entry.key()))))
            }
        }
    }

    /// Notes what is not read, and why.
    fn leave(&mut self, name: String, reason: Error) -> Result<()> {
        self.check_name(&name)?;
        self.left.insert(name, reason);
        Ok(())
    }

    fn check_name(&self, name: &str) -> Result<()> {
        if name.is_empty() || name.len() > MAX_NAME_LEN {
            return Err(Error::model(format!(
                "a tensor's name is {} bytes long, not 1 to {MAX_NAME_LEN}",
                name.len()
            )));
        }
        if self.tensors.len() + self.left.len() >= MAX_TENSORS {
            return Err(Error::model(format!("more than {MAX_TENSORS} tensors")));
        }
        Ok(())
    }
}

/// Text from a file, fit for a one-line message: quoted, escaped, and cut if it is long.
fn shown(text: &str) -> String {
    const MOST_CHARACTERS: usize = 120;
    let mut shown: String = text.chars().take(MOST_CHARACTERS).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("\"{}\"", shown.escape_debug())
}
