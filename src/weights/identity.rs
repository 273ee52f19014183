//! What a model is, by its content: one hash of the weights that pictures need and one of the
//! files that say how they are used. Separate because it makes nothing of what it reads, and
//! because the same weights in another kind of file are the same model.

use std::path::Path;

use candle_core::DType;
use rayon::prelude::*;
use serde_json::Value;

use super::choice::tokenizer_files;
use super::{Checkpoint, Component, Model, TokenizerFiles, Variant, built_in, bytes, json, names};
use crate::backend::host::HostTensor;
use crate::error::{Error, Result};

/// Fields of configurations that say who wrote them, and nothing about the model.
const UNRELATED: [&str; 6] = [
    "_name_or_path",
    "_diffusers_version",
    "_commit_hash",
    "transformers_version",
    "torch_dtype",
    "architectures",
];
/// Largest file of a tokenizer, in bytes. CLIP's largest has 2.3 million.
const MAX_TOKENIZER_LEN: u64 = 64 << 20;

/// The tensors of a model that pictures need, mapped.
pub struct UsedTensors(Vec<(Component, String, HostTensor)>);

impl UsedTensors {
    /// Opens a model's weights.
    ///
    /// # Errors
    /// As [`Model::checkpoint`].
    pub fn open(model: &Model, variant: Option<&Variant>) -> Result<Self> {
        let parts = Component::ALL.map(|component| Self::of(component, model, variant, true));
        let parts = parts.into_iter().collect::<Result<Vec<_>>>()?;
        Ok(Self(parts.into_iter().flat_map(|part| part.0).collect()))
    }

    /// Those that only pictures need that are made of others: the VAE's encoder.
    ///
    /// # Errors
    /// As [`Model::checkpoint`].
    pub fn of_encoder(model: &Model, variant: Option<&Variant>) -> Result<Self> {
        Self::of(Component::Vae, model, variant, false)
    }

    fn of(
        component: Component,
        model: &Model,
        variant: Option<&Variant>,
        are_used: bool,
    ) -> Result<Self> {
        let checkpoint: Checkpoint = model.checkpoint(component, variant)?;
        let tensors =
            checkpoint.iter().filter(|(name, _)| names::is_used(component, name) == are_used);
        let named = |(name, tensor): (&str, &HostTensor)| (component, name.into(), tensor.clone());
        Ok(Self(tensors.map(named).collect()))
    }

    /// [`hash`](Self::hash) of one component alone.
    pub fn hash_of(&self, component: Component) -> String {
        hash(self.0.iter().filter(|part| part.0 == component))
    }

    /// Each tensor with the dtype whose digest is needed: the one it is stored in.
    pub fn as_stored(&self) -> Vec<(&HostTensor, DType)> {
        self.0.iter().map(|(_, _, tensor)| (tensor, tensor.dtype())).collect()
    }

    /// BLAKE3-256 of component, name and digest of each tensor, in hexadecimal digits: it changes
    /// with any bit of the weights and not with how files store them. The digests that are not
    /// known yet are computed on all threads of rayon's pool that this is called in.
    pub fn hash(&self) -> String {
        self.0.par_iter().for_each(|(_, _, tensor)| {
            tensor.digest();
        });
        hash(self.0.iter())
    }
}

fn hash<'t>(tensors: impl Iterator<Item = &'t (Component, String, HostTensor)>) -> String {
    let mut hasher = blake3::Hasher::new();
    for (component, name, tensor) in tensors {
        let folder = component.folder();
        hasher.update(format!("{folder} {} {name}\n", name.len()).as_bytes());
        hasher.update(&tensor.digest());
    }
    hasher.finalize().to_hex().to_string()
}

/// BLAKE3-256 of what a model's configurations and its tokenizer say, in hexadecimal digits:
/// pictures of equal weights with another `prediction_type` or vocabulary are other pictures.
///
/// # Errors
/// If a file cannot be read.
pub fn config_hash(model: &Model) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut add = |name: &str, bytes: &[u8]| {
        hasher.update(format!("{name} {}\n", bytes.len()).as_bytes()).update(bytes);
    };
    for component in Component::ALL {
        let config = related(model.config(component)?);
        add(component.config_file(), config.to_string().as_bytes());
    }
    add("scheduler", related(model.scheduler_config()?).to_string().as_bytes());
    let folder = match model.tokenizer() {
        TokenizerFiles::Folder(folder) => folder,
        TokenizerFiles::Clip { pad_token } => {
            add("tokenizer/clip", pad_token.as_bytes());
            return Ok(hasher.finalize().to_hex().to_string());
        }
        TokenizerFiles::BuiltIn => {
            built_in::tokenizer_files().for_each(|(name, bytes)| add(name, bytes));
            return Ok(hasher.finalize().to_hex().to_string());
        }
    };
    let path = |name: &str| folder.join(name.trim_start_matches("tokenizer/"));
    for name in tokenizer_files(&|name| path(name).is_file()) {
        let path = path(name);
        let failed = |error: std::io::Error| Error::model(format!("{}: {error}", path.display()));
        let len = std::fs::metadata(&path).map_err(failed)?.len();
        if len > MAX_TOKENIZER_LEN {
            let path = path.display();
            return Err(Error::model(format!("{path} is larger than {MAX_TOKENIZER_LEN} bytes")));
        }
        let bytes = std::fs::read(&path).map_err(failed)?;
        // Small ones are rewritten by every tool that saves a model.
        match name.ends_with("_config.json") || name.ends_with("special_tokens_map.json") {
            true => add(name, related(json::read(&path)?).to_string().as_bytes()),
            false => add(name, &bytes),
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// BLAKE3-256 of a file, in hexadecimal digits.
///
/// # Errors
/// If it cannot be read.
pub fn file_hash(path: &Path) -> Result<String> {
    let (file, _) = bytes::map(path)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_rayon((*file).as_ref());
    Ok(hasher.finalize().to_hex().to_string())
}

fn related(mut config: Value) -> Value {
    if let Some(fields) = config.as_object_mut() {
        fields.retain(|name, _| !UNRELATED.contains(&name.as_str()));
    }
    config
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;

    fn model(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name)
    }

    fn copy(name: &str) -> (tempfile::TempDir, Model) {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["text_encoder", "unet", "vae", "scheduler", "tokenizer"] {
            fs::create_dir(dir.path().join(folder)).unwrap();
            for entry in fs::read_dir(model(name).join(folder)).unwrap() {
                let entry = entry.unwrap();
                fs::copy(entry.path(), dir.path().join(folder).join(entry.file_name())).unwrap();
            }
        }
        let folder = Model::open(dir.path(), None).unwrap();
        (dir, folder)
    }

    fn hash_of_all(folder: &Model) -> String {
        UsedTensors::open(folder, None).unwrap().hash()
    }

    /// Writes a component's tensors as safetensors in the place of its pickle.
    fn as_safetensors(dir: &Path, folder: &Model, component: Component) {
        let checkpoint = folder.checkpoint(component, None).unwrap();
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, tensor) in checkpoint.iter() {
            let start = data.len();
            tensor.row_major(&mut |bytes| data.extend_from_slice(bytes));
            let dtype = tensor.dtype().as_str().to_uppercase();
            let shape = tensor.layout().dims();
            let offsets = [start, data.len()];
            let entry = serde_json::json!(
                {"dtype": dtype, "shape": shape, "data_offsets": offsets});
            header.insert(name.to_owned(), entry);
        }
        let header = Value::from(header).to_string().into_bytes();
        let bytes = [&(header.len() as u64).to_le_bytes(), &*header, &*data].concat();
        let stem = dir.join(component.folder()).join("diffusion_pytorch_model");
        fs::write(stem.with_extension("safetensors"), bytes).unwrap();
        fs::remove_file(stem.with_extension("bin")).unwrap();
    }

    #[test]
    fn weights_are_the_same_in_another_kind_of_file_and_others_with_one_bit() {
        let (dir, folder) = copy("tiny");
        let before = hash_of_all(&folder);
        assert_eq!(before.len(), 64);
        as_safetensors(dir.path(), &folder, Component::Unet);
        assert_eq!(hash_of_all(&folder), before);
        let path = dir.path().join("unet/diffusion_pytorch_model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        assert_ne!(hash_of_all(&folder), before);
    }

    #[test]
    fn a_configuration_that_changes_pictures_changes_the_hash_and_who_wrote_it_does_not() {
        let (dir, folder) = copy("tiny");
        let before = config_hash(&folder).unwrap();
        let edit = |file: &str, field: &str, value: Value| {
            let path = dir.path().join(file);
            let mut config = json::read(&path).unwrap();
            config[field] = value;
            fs::write(&path, config.to_string()).unwrap();
        };
        edit("unet/config.json", "_diffusers_version", "99".into());
        edit("text_encoder/config.json", "transformers_version", "99".into());
        assert_eq!(config_hash(&folder).unwrap(), before);
        edit("scheduler/scheduler_config.json", "prediction_type", "v_prediction".into());
        let with_v = config_hash(&folder).unwrap();
        assert_ne!(with_v, before);
        let merges = dir.path().join("tokenizer/merges.txt");
        fs::write(&merges, fs::read_to_string(&merges).unwrap() + "x y\n").unwrap();
        assert_ne!(config_hash(&folder).unwrap(), with_v);
    }
}
