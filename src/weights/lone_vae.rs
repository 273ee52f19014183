//! A VAE that is given apart from its model: a folder in diffusers layout, or one file in any of
//! the layouts that people share. Separate because it takes a component's place in any kind of
//! model.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::choice::{Component, Variant, choose};
use super::folder::ModelFolder;
use super::model::{WeightFile, file_len};
use super::single::{Family, VaeNames, renamed_vae, vae_config};
use super::{Checkpoint, names};
use crate::error::{Error, Result};

/// A VAE on this machine's disk.
#[derive(Debug, Clone)]
pub struct LoneVae(Place);

#[derive(Debug, Clone)]
enum Place {
    Folder(ModelFolder),
    File { path: PathBuf, layout: Layout },
}

/// Whose names a file has.
#[derive(Debug, Clone)]
enum Layout {
    /// AutoencoderKL, under the original code's names or diffusers'; also a whole model's.
    Kl(VaeNames),
    /// AutoencoderTiny, under diffusers' names.
    Tiny,
    /// Its decoder as madebyollin published it, `taesd_decoder`.
    Taesd,
}

impl LoneVae {
    /// Looks at a folder or at the names of a file.
    ///
    /// # Errors
    /// If there is none, or it is no VAE.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        if !path.is_file() {
            return ModelFolder::vae(path).map(Place::Folder).map(Self);
        }
        let whole = Checkpoint::read_some(&path, None)?;
        let layout = layout_of(&whole).ok_or_else(|| {
            Error::model(format!(
                "--vae {}: it is no VAE: looked for the names of AutoencoderKL \
                 (decoder.conv_in.…), AutoencoderTiny (decoder.layers.0.…) and taesd_decoder \
                 (1.weight, 3.conv.0.…)",
                path.display()
            ))
        })?;
        Ok(Self(Place::File { path, layout }))
    }

    /// The folder, or the file.
    pub fn path(&self) -> &Path {
        match &self.0 {
            Place::Folder(folder) => folder.path(),
            Place::File { path, .. } => path,
        }
    }

    /// Its configuration: the folder's, or what the shapes of the file say.
    ///
    /// # Errors
    /// If it cannot be read, or the weights are no VAE's.
    pub fn config(&self) -> Result<Value> {
        let (path, layout) = match &self.0 {
            Place::Folder(folder) => return folder.config(Component::Vae),
            Place::File { path, layout } => (path, layout),
        };
        let weights = self.checkpoint(None)?;
        let config = match layout {
            Layout::Kl(_) => Family::V1
                .published(Component::Vae.config_file())
                .and_then(|published| vae_config(published, &weights)),
            Layout::Tiny | Layout::Taesd => Ok(tiny_config(&weights)),
        };
        config.map_err(|error| error.context(path.display()))
    }

    /// Its weights under today's names, mapped: nothing is copied. A folder that has no weights of
    /// the variant gives those it has: the variant is asked of the model.
    ///
    /// # Errors
    /// As [`ModelFolder::checkpoint`].
    pub fn checkpoint(&self, variant: Option<&Variant>) -> Result<Checkpoint> {
        match &self.0 {
            Place::Folder(folder) => folder.checkpoint(Component::Vae, existing(folder, variant)),
            Place::File { path, layout } => {
                let whole = Checkpoint::read_some(path, None)?;
                let renamed = match layout {
                    Layout::Kl(names) => renamed_vae(whole, names),
                    Layout::Tiny => whole.all(),
                    Layout::Taesd => whole.all().and_then(taesd),
                };
                renamed.map_err(|error| error.context(path.display()))
            }
        }
    }

    /// The files of its weights.
    ///
    /// # Errors
    /// As [`checkpoint`](Self::checkpoint).
    pub fn weight_files(&self, variant: Option<&Variant>) -> Result<Vec<WeightFile>> {
        match &self.0 {
            Place::Folder(folder) => {
                let names = folder.weight_files(Component::Vae, existing(folder, variant))?;
                let file = |name: String| {
                    let path = folder.weight_path(&name);
                    let (name, bytes) = (path.display().to_string(), file_len(&path));
                    WeightFile { name, bytes, is_shared: false }
                };
                Ok(names.into_iter().map(file).collect())
            }
            Place::File { path, .. } => {
                let name = path.display().to_string();
                Ok(vec![WeightFile { name, bytes: file_len(path), is_shared: true }])
            }
        }
    }
}

/// The variant, if the folder has it.
fn existing<'v>(folder: &ModelFolder, variant: Option<&'v Variant>) -> Option<&'v Variant> {
    variant.filter(|&variant| {
        choose(Component::Vae, Some(variant), &|name| folder.weight_path(name).is_file()).is_ok()
    })
}

fn layout_of(whole: &Checkpoint) -> Option<Layout> {
    let has = |name: &str| whole.get(name).is_some();
    if has("decoder.layers.0.weight") {
        return Some(Layout::Tiny);
    }
    if has("1.weight") && has("3.conv.0.weight") {
        return Some(Layout::Taesd);
    }
    let names = VaeNames::of(whole);
    let kl = names.has_decoder(whole);
    kl.then_some(Layout::Kl(names))
}

/// The layers of the original are counted with the one before the first of diffusers', which
/// squeezes the latents.
fn taesd(whole: Checkpoint) -> Result<Checkpoint> {
    let mut renamed = Checkpoint::default();
    for (name, tensor) in whole.tensors {
        let layer = name
            .split_once('.')
            .and_then(|(number, rest)| Some((number.parse::<usize>().ok()?.checked_sub(1)?, rest)));
        let ours = match layer {
            Some((number, rest)) => format!("decoder.layers.{number}.{rest}"),
            None => name,
        };
        renamed.insert(ours, tensor)?;
    }
    names::canonical_names(Component::Vae, renamed)
}

/// `config.json` of an AutoencoderTiny with these weights. Between two sizes there are an
/// enlargement, which has no weights, and a convolution without a bias.
fn tiny_config(weights: &Checkpoint) -> Value {
    let has =
        |layer: usize, end: &str| weights.get(&format!("decoder.layers.{layer}.{end}")).is_some();
    let (mut blocks, mut count, mut layer) = (Vec::new(), 0, 2);
    loop {
        if has(layer, "conv.0.weight") {
            count += 1;
            layer += 1;
        } else if has(layer + 1, "weight") && !has(layer, "weight") {
            blocks.push(count);
            count = 0;
            layer += 2;
        } else {
            blocks.push(count);
            break;
        }
    }
    let first = weights.get("decoder.layers.0.weight").map(|tensor| tensor.layout().dims());
    let (width, latents) = match first {
        Some(&[width, latents, _, _]) => (width, latents),
        _ => (64, 4),
    };
    json!({
        "_class_name": "AutoencoderTiny",
        "latent_channels": latents,
        "num_decoder_blocks": blocks,
        "decoder_block_out_channels": vec![width; blocks.len()],
    })
}
