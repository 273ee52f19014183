//! A model, whatever kind of files it lies in. Separate because whoever loads, hashes or describes
//! one asks the same questions of a folder and of a single file.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::choice::{Component, Variant};
use super::folder::ModelFolder;
use super::lone_vae::LoneVae;
use super::single::{SingleFile, TokenizerFiles};
use super::{Checkpoint, built_in};
use crate::error::{Error, Result};

/// A model on this machine's disk, or the one that is in the program.
#[derive(Debug, Clone)]
pub struct Model {
    base: Base,
    /// In the place of its own.
    vae: Option<LoneVae>,
}

#[derive(Debug, Clone)]
enum Base {
    Folder(ModelFolder),
    File(Box<SingleFile>),
    BuiltIn,
}

/// A file with weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightFile {
    /// Its path in the model's folder, with `/`; of a single file its name.
    pub name: String,
    /// How long it is.
    pub bytes: u64,
    /// Whether other components are in it too.
    pub is_shared: bool,
}

impl From<ModelFolder> for Model {
    fn from(folder: ModelFolder) -> Self {
        Self { base: Base::Folder(folder), vae: None }
    }
}

impl Model {
    /// Looks at a folder in diffusers layout, or a model in one file. `configs` is for the latter:
    /// see [`SingleFile::open`].
    ///
    /// # Errors
    /// If there is no such model, naming what is missing.
    pub fn open(path: impl Into<PathBuf>, configs: Option<&Path>) -> Result<Self> {
        let path = path.into();
        if path.is_file() {
            let file = SingleFile::open(path, configs)?;
            return Ok(Self { base: Base::File(Box::new(file)), vae: None });
        }
        ModelFolder::open(path).map(Self::from)
    }

    /// The one that is in the program.
    #[must_use]
    pub fn built_in() -> Self {
        Self { base: Base::BuiltIn, vae: None }
    }

    /// The model with another VAE in the place of its own.
    #[must_use]
    pub fn with_vae(self, vae: Option<LoneVae>) -> Self {
        Self { vae, ..self }
    }

    /// The VAE that is there in the place of its own.
    pub fn vae(&self) -> Option<&LoneVae> {
        self.vae.as_ref()
    }

    /// The VAE if it is given apart and the component is it.
    fn apart(&self, component: Component) -> Option<&LoneVae> {
        self.vae.as_ref().filter(|_| component == Component::Vae)
    }

    /// The folder, or the file; the program has no path.
    pub fn path(&self) -> Option<&Path> {
        match &self.base {
            Base::Folder(folder) => Some(folder.path()),
            Base::File(file) => Some(file.path()),
            Base::BuiltIn => None,
        }
    }

    /// What kind of files it lies in, for people.
    pub fn layout(&self) -> &'static str {
        match &self.base {
            Base::Folder(_) => "diffusers layout",
            Base::File(_) => "one file",
            Base::BuiltIn => "the program itself",
        }
    }

    /// The configuration of a component.
    ///
    /// # Errors
    /// If it cannot be read, or cannot be told from the weights.
    pub fn config(&self, component: Component) -> Result<Value> {
        if let Some(vae) = self.apart(component) {
            return vae.config();
        }
        match &self.base {
            Base::Folder(folder) => folder.config(component),
            Base::File(file) => file.config(component),
            Base::BuiltIn => built_in::config(component.config_file()),
        }
    }

    /// The scheduler's configuration; [`json::as_f64`](super::json::as_f64) reads its `-Infinity`.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn scheduler_config(&self) -> Result<Value> {
        match &self.base {
            Base::Folder(folder) => folder.scheduler_config(),
            Base::File(file) => file.scheduler_config(),
            Base::BuiltIn => built_in::config("scheduler/scheduler_config.json"),
        }
    }

    /// What flags are where they are not given, by the flags' names.
    ///
    /// # Errors
    /// If they cannot be read or are none.
    pub fn defaults(&self) -> Result<Map<String, Value>> {
        match &self.base {
            Base::Folder(folder) => folder.defaults(),
            Base::File(_) => Ok(Map::new()),
            Base::BuiltIn => built_in::defaults(),
        }
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> TokenizerFiles {
        match &self.base {
            Base::Folder(folder) => TokenizerFiles::Folder(folder.tokenizer_dir()),
            Base::File(file) => file.tokenizer(),
            Base::BuiltIn => TokenizerFiles::BuiltIn,
        }
    }

    /// A component's weights under today's names, mapped: nothing is copied.
    ///
    /// # Errors
    /// As [`ModelFolder::checkpoint`]; a single file has no variants.
    pub fn checkpoint(
        &self,
        component: Component,
        variant: Option<&Variant>,
    ) -> Result<Checkpoint> {
        if let Some(vae) = self.apart(component) {
            return vae.checkpoint(variant);
        }
        match &self.base {
            Base::Folder(folder) => folder.checkpoint(component, variant),
            Base::File(file) => {
                no_variant(variant)?;
                file.checkpoint(component)
            }
            Base::BuiltIn => {
                no_variant(variant)?;
                built_in::checkpoint(component)
            }
        }
    }

    /// The files of a component's weights.
    ///
    /// # Errors
    /// As [`checkpoint`](Self::checkpoint).
    pub fn weight_files(
        &self,
        component: Component,
        variant: Option<&Variant>,
    ) -> Result<Vec<WeightFile>> {
        if let Some(vae) = self.apart(component) {
            return vae.weight_files(variant);
        }
        match &self.base {
            Base::Folder(folder) => {
                let names = folder.weight_files(component, variant)?.into_iter();
                let file = |name: String| {
                    let bytes = file_len(&folder.path().join(&name));
                    WeightFile { name, bytes, is_shared: false }
                };
                Ok(names.map(file).collect())
            }
            Base::File(file) => {
                no_variant(variant)?;
                Ok(vec![lone(file.path(), true)])
            }
            Base::BuiltIn => {
                no_variant(variant)?;
                built_in::weight_files(component)
            }
        }
    }
}

/// A file that is no part of a folder.
fn lone(path: &Path, is_shared: bool) -> WeightFile {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    WeightFile { name, bytes: file_len(path), is_shared }
}

/// How long a file is, and 0 if it is gone: that is told where it is read.
pub(super) fn file_len(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}

fn no_variant(variant: Option<&Variant>) -> Result<()> {
    match variant {
        None => Ok(()),
        Some(variant) => Err(Error::usage(format!(
            "--variant {}: the model has its weights once",
            variant.as_str()
        ))),
    }
}
