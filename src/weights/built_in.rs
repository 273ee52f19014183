//! The model that is in the program: `models/demo`, small and our own (`scripts/demo-model`).
//! Separate because its files are bytes of the binary, and every other model's are on a disk.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::choice::Component;
use super::model::WeightFile;
use super::{Checkpoint, defaults, json, names, safetensors};
use crate::backend::host::SharedBytes;
use crate::error::{Error, Result};

/// What it is called on a command line.
pub const NAME: &str = "demo";

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_bytes!(concat!("../../models/demo/", $name)))),*]
    };
}

/// Its files by their paths in `models/demo`.
const FILES: [(&str, &[u8]); 11] = files![
    "defaults.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
];

/// What flags are where they are not given, by the flags' names.
///
/// # Errors
/// Never, as a test has it.
pub fn defaults() -> Result<Map<String, Value>> {
    defaults::parse(text(defaults::FILE)?).map_err(|error| error.context(defaults::FILE))
}

/// One of its files of JSON, such as `unet/config.json`.
pub(super) fn config(name: &str) -> Result<Value> {
    let text = text(name)?;
    json::parse(text).map_err(|error| error.context(name))
}

/// Its tokenizer's files, by their names in the folder `tokenizer`.
pub fn tokenizer_files() -> impl Iterator<Item = (&'static str, &'static [u8])> {
    let files = FILES.into_iter();
    files.filter_map(|(name, bytes)| Some((name.strip_prefix("tokenizer/")?, bytes)))
}

/// The texts of `tokenizer_config.json`, `vocab.json` and `merges.txt`.
///
/// # Errors
/// Never, as a test has it.
pub fn tokenizer() -> Result<[&'static str; 3]> {
    let files = ["tokenizer_config.json", "vocab.json", "merges.txt"];
    let [config, vocabulary, merges] = files.map(|name| text(&format!("tokenizer/{name}")));
    Ok([config?, vocabulary?, merges?])
}

/// A component's weights under today's names: nothing is copied.
pub(super) fn checkpoint(component: Component) -> Result<Checkpoint> {
    let name = weights(component);
    let bytes: SharedBytes = Arc::new(file(name)?);
    safetensors::read(&bytes)
        .and_then(Checkpoint::all)
        .and_then(|checkpoint| names::canonical_names(component, checkpoint))
        .map_err(|error| error.context(name))
}

pub(super) fn weight_files(component: Component) -> Result<Vec<WeightFile>> {
    let name = weights(component);
    let bytes = file(name)?.len() as u64;
    Ok(vec![WeightFile { name: name.to_owned(), bytes, is_shared: false }])
}

fn weights(component: Component) -> &'static str {
    match component {
        Component::TextEncoder => "text_encoder/model.safetensors",
        Component::Unet => "unet/diffusion_pytorch_model.safetensors",
        Component::Vae => "vae/diffusion_pytorch_model.safetensors",
    }
}

fn text(name: &str) -> Result<&'static str> {
    std::str::from_utf8(file(name)?).map_err(|_| Error::model(format!("{name} is not UTF-8")))
}

fn file(name: &str) -> Result<&'static [u8]> {
    let found = FILES.iter().find(|file| file.0 == name);
    let missing = || Error::model(format!("the built-in model has no {name}"));
    found.map(|file| file.1).ok_or_else(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_model_is_whole_and_small_enough_for_a_published_crate() {
        let bytes: usize = FILES.iter().map(|(_, bytes)| bytes.len()).sum();
        assert!(bytes <= 9_000_000, "{bytes} bytes");
        for component in Component::ALL {
            assert!(!checkpoint(component).unwrap().is_empty());
            config(component.config_file()).unwrap();
        }
        assert_eq!(defaults().unwrap().len(), 2);
        assert_eq!(tokenizer_files().count(), 3);
    }
}
