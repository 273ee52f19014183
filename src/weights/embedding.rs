//! Textual-inversion embeddings: vectors that stand for a word, and the word's name. Separate
//! because their files have one tensor, and say in three ways which: diffusers' dictionary of a
//! name, AUTOMATIC1111's safetensors (`emb_params`) and its pickles (`string_to_param`).

use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::{bytes, pickle, safetensors, shown};
use crate::backend::host::{HostTensor, SharedBytes};
use crate::error::{Error, Result};

/// Most vectors of an embedding: as many as a prompt has tokens.
const MAX_VECTORS: usize = 75;
/// Longest name, in bytes.
const MAX_NAME_LEN: usize = 256;
/// AUTOMATIC1111's name of the tensor, which is no name of the word.
const EMB_PARAMS: &str = "emb_params";

/// A file of an embedding, as a flag names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddingFile {
    /// Where it is.
    pub path: PathBuf,
    /// What prompts call it, if not as the file says.
    pub name: Option<String>,
}

/// `FILE` or `NAME=FILE`.
impl FromStr for EmbeddingFile {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let named = text.split_once('=').filter(|(name, _)| !name.contains(['/', '\\']));
        let (name, path) = named.map_or((None, text), |(name, path)| (Some(name.trim()), path));
        if path.is_empty() || name.is_some_and(|name| name.is_empty() || name.len() > MAX_NAME_LEN)
        {
            return Err("FILE, or NAME=FILE".into());
        }
        Ok(Self { path: path.into(), name: name.map(str::to_owned) })
    }
}

/// Vectors that stand for a word.
#[derive(Debug, Clone)]
pub struct Embedding {
    /// The word.
    pub name: String,
    /// (vectors, width), or (width) of a single one.
    pub vectors: HostTensor,
}

impl Embedding {
    /// Reads a file. Without a name it has the one of the tensor in diffusers' files, and the
    /// file's own name in AUTOMATIC1111's.
    ///
    /// # Errors
    /// If it cannot be read, or holds anything but one embedding.
    pub fn read(EmbeddingFile { path, name }: &EmbeddingFile) -> Result<Self> {
        let (file, _) = bytes::map(path)?;
        Self::of(&file, path, name.as_deref()).map_err(|error| error.context(path.display()))
    }

    fn of(file: &SharedBytes, path: &Path, name: Option<&str>) -> Result<Self> {
        let is_safetensors = path.extension().is_some_and(|suffix| suffix == "safetensors");
        let found = match is_safetensors {
            true => safetensors::read(file)?,
            false => pickle::read(file)?.all()?,
        };
        if found.is_empty() {
            return Err(Error::model("an embedding is one tensor, but there is none"));
        }
        let mut tensors = found.iter();
        let (Some((key, vectors)), None) = (tensors.next(), tensors.next()) else {
            let names: Vec<_> = found.iter().take(4).map(|(name, _)| shown(name)).collect();
            return Err(Error::model(format!(
                "an embedding is one tensor, but there are {}: {}",
                found.len(),
                names.join(", ")
            )));
        };
        let stem = || path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let name = match (name, key) {
            (Some(name), _) => name.to_owned(),
            (None, EMB_PARAMS | "*") => stem(),
            (None, key) => key.trim().to_owned(),
        };
        let embedding = Self { name, vectors: vectors.clone() };
        embedding.check()?;
        Ok(embedding)
    }

    /// How many vectors there are, and how wide they are.
    pub fn size(&self) -> (usize, usize) {
        match *self.vectors.layout().dims() {
            [width] => (1, width),
            [vectors, width] => (vectors, width),
            _ => (0, 0),
        }
    }

    fn check(&self) -> Result<()> {
        let (vectors, _) = self.size();
        if !(1..=MAX_VECTORS).contains(&vectors) {
            let dims = self.vectors.layout().dims();
            return Err(Error::model(format!(
                "its tensor has the shape {dims:?}, not that of 1 to {MAX_VECTORS} vectors"
            )));
        }
        if self.name.is_empty() || self.name.len() > MAX_NAME_LEN {
            return Err(Error::model("it has no name; give one: --embedding NAME=FILE"));
        }
        Ok(())
    }
}
