//! A whole model in one file, under the names of the original code: what people call a checkpoint,
//! `.safetensors` or `.ckpt`. Separate because everything else knows today's names only, and each
//! component as a checkpoint of its own.
//!
//! Renaming is an index over the mapped file: no element is copied, and where one tensor of the
//! file is several of ours, or has dimensions more, ours are views of it. Names and arithmetic are
//! those of diffusers' `single_file_utils.py`; the weights of training (`model_ema.…`) are left as
//! there.
//!
//! Such a file has weights alone. Configurations follow from the shapes, and what no shape says
//! from `models/` of this repository, or all from a folder that the user gives.

use std::path::{Path, PathBuf};

use candle_core::Layout;
use serde_json::Value;

use super::{Checkpoint, Component, json, names, shown};
use crate::backend::host::HostTensor;
use crate::error::{Error, Result};
use shapes::text_layers;
pub(super) use vae::{VaeNames, vae_config};

mod shapes;
mod text;
mod unet;
mod vae;

const UNET: &str = "model.diffusion_model.";

/// What becomes of a tensor of the file.
enum Becomes {
    /// No picture needs it.
    Nothing,
    /// One of ours.
    One(String),
    /// Three of ours, of which each has a third of the rows.
    Thirds([String; 3]),
}

/// The two families of models that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Stable Diffusion 1.x: OpenAI's CLIP.
    V1,
    /// Stable Diffusion 2.x: OpenCLIP, of which the last layer is not used.
    V2,
}

impl Family {
    /// The published configuration of this name in a folder in diffusers layout.
    pub(super) fn published(self, name: &str) -> Result<Value> {
        macro_rules! file {
            ($folder:literal) => {
                [
                    ("unet/config.json", include_str!(concat!($folder, "unet/config.json"))),
                    ("vae/config.json", include_str!(concat!($folder, "vae/config.json"))),
                    (
                        "text_encoder/config.json",
                        include_str!(concat!($folder, "text_encoder/config.json")),
                    ),
                    (SCHEDULER, include_str!(concat!($folder, "scheduler/scheduler_config.json"))),
                ]
            };
        }
        let files = match self {
            Family::V1 => file!("../../../models/stable-diffusion-v1/"),
            Family::V2 => file!("../../../models/stable-diffusion-v2/"),
        };
        let text = files.iter().find(|file| file.0 == name).map_or("{}", |file| file.1);
        json::parse(text)
    }
}

const SCHEDULER: &str = "scheduler/scheduler_config.json";

/// The tokenizer of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenizerFiles {
    /// A folder with its files.
    Folder(PathBuf),
    /// CLIP's own, which every model of the two families has, with this token for padding.
    Clip {
        /// `<|endoftext|>` or `!`.
        pad_token: &'static str,
    },
    /// That of the model in the program.
    BuiltIn,
}

/// A model in one file.
#[derive(Debug, Clone)]
pub struct SingleFile {
    path: PathBuf,
    family: Family,
    /// Whose configurations win over what the shapes say.
    configs: Option<PathBuf>,
    unet: unet::UnetNames,
    vae: VaeNames,
    text: text::TextNames,
}

impl SingleFile {
    /// Looks at the names and shapes of a file; `configs` is a folder with those configurations
    /// (and the tokenizer) that are not to be guessed, in diffusers layout.
    ///
    /// # Errors
    /// If the file cannot be read, lacks a component, or holds another kind of model; if there is
    /// no configuration in the folder.
    pub fn open(path: impl Into<PathBuf>, configs: Option<&Path>) -> Result<Self> {
        let path = path.into();
        let whole = Checkpoint::read_some(&path, None)?;
        let family = family_of(&whole).map_err(|error| error.context(path.display()))?;
        if let Some(folder) = configs {
            check_configs(folder)?;
        }
        let names = || whole.iter().map(|(name, _)| name);
        let mut file = Self {
            family,
            configs: configs.map(Path::to_owned),
            unet: unet::UnetNames::of(names().filter_map(|name| name.strip_prefix(UNET))),
            vae: VaeNames::of(&whole),
            text: text::TextNames::of(family, names()),
            path,
        };
        // The file's last layer may be one that the model does not use.
        if let Some(config) = file.given("text_encoder/config.json")? {
            file.text.use_layers(text_layers(&config));
        }
        Ok(file)
    }

    /// Whether these are the tensors of a whole model, by their names.
    pub fn is_one(checkpoint: &Checkpoint) -> bool {
        checkpoint.iter().any(|(name, _)| name.starts_with(UNET))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which family it is of.
    pub fn family(&self) -> Family {
        self.family
    }

    /// A component's weights under today's names, mapped: nothing is copied.
    ///
    /// # Errors
    /// If the file cannot be read, or one of these weights is not read.
    pub fn checkpoint(&self, component: Component) -> Result<Checkpoint> {
        self.read(component).map_err(|error| error.context(self.path.display()))
    }

    fn read(&self, component: Component) -> Result<Checkpoint> {
        let whole = Checkpoint::read_some(&self.path, None)?;
        renamed(component, whole, &|name| match component {
            Component::TextEncoder => self.text.becomes(name),
            Component::Unet => name.strip_prefix(UNET).map(|name| self.unet.becomes(name)),
            Component::Vae => self.vae.becomes(name),
        })
    }

    /// The configuration of a component: the one of the folder that was given, or else the family's
    /// with what the shapes say.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn config(&self, component: Component) -> Result<Value> {
        let name = component.config_file();
        if let Some(config) = self.given(name)? {
            return Ok(config);
        }
        let published = self.family.published(name)?;
        let weights = self.checkpoint(component)?;
        let config = match component {
            Component::TextEncoder => shapes::text_config(published, &weights),
            Component::Unet => shapes::unet_config(published, &weights),
            Component::Vae => vae_config(published, &weights),
        };
        config.map_err(|error| error.context(self.path.display()))
    }

    /// `scheduler_config.json`: the folder's, or the family's. For models of the second family it
    /// predicts velocities, as diffusers takes it; those for 512×512 need a folder that says
    /// otherwise.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn scheduler_config(&self) -> Result<Value> {
        match self.given(SCHEDULER)? {
            Some(config) => Ok(config),
            None => self.family.published(SCHEDULER),
        }
    }

    /// The folder's tokenizer, or CLIP's.
    pub fn tokenizer(&self) -> TokenizerFiles {
        let folder = self.configs.as_ref().map(|folder| folder.join("tokenizer"));
        let has = |name: &str| folder.as_ref().is_some_and(|folder| folder.join(name).is_file());
        match folder {
            Some(ref folder) if has("tokenizer.json") || has("vocab.json") && has("merges.txt") => {
                TokenizerFiles::Folder(folder.clone())
            }
            Some(_) | None => TokenizerFiles::Clip {
                pad_token: match self.family {
                    Family::V1 => "<|endoftext|>",
                    Family::V2 => "!",
                },
            },
        }
    }

    /// A configuration of the folder that was given, if it has it.
    fn given(&self, name: &str) -> Result<Option<Value>> {
        let path = self.configs.as_ref().map(|folder| folder.join(name));
        path.filter(|path| path.is_file()).map(|path| json::read(&path)).transpose()
    }
}

fn check_configs(folder: &Path) -> Result<()> {
    let names = Component::ALL.map(Component::config_file);
    let known = [&names[..], &[SCHEDULER, "tokenizer/tokenizer.json", "tokenizer/vocab.json"]];
    let known = known.concat();
    if known.iter().any(|name| folder.join(name).is_file()) {
        return Ok(());
    }
    let (folder, known) = (folder.display(), known.join(", "));
    Err(Error::model(format!("--config {folder}: it has none of {known}")))
}

/// The family by the names and shapes that tell it from others.
fn family_of(whole: &Checkpoint) -> Result<Family> {
    let has = |start: &str| whole.iter().any(|(name, _)| name.starts_with(start));
    for (start, what) in [
        ("conditioner.embedders.", "SDXL"),
        ("model.diffusion_model.joint_blocks.", "SD 3"),
        ("model.diffusion_model.double_blocks.", "Flux"),
        ("double_blocks.", "Flux"),
        ("lora_", "a LoRA"),
        ("down_blocks.", "a UNet alone, in diffusers layout"),
    ] {
        if has(start) {
            return Err(Error::model(format!(
                "this is {what}; a model in one file is Stable Diffusion 1.x or 2.x with UNet, VAE \
                 and text encoder"
            )));
        }
    }
    let mut missing = Vec::new();
    for (what, starts) in [
        ("UNet", &["model.diffusion_model.input_blocks."][..]),
        ("VAE", &["first_stage_model.decoder.", "vae.decoder."]),
        ("text encoder", &["cond_stage_model.transformer.", "cond_stage_model.model."]),
    ] {
        if !starts.iter().any(|start| has(start)) {
            missing.push(format!("{what} ({}…)", starts.join("… or ")));
        }
    }
    if !missing.is_empty() {
        return Err(Error::model(format!(
            "as a model in one file it lacks its {}",
            missing.join(", its ")
        )));
    }
    Ok(match has("cond_stage_model.model.") {
        true => Family::V2,
        false => Family::V1,
    })
}

/// The VAE's part of a file under our names.
pub(super) fn renamed_vae(whole: Checkpoint, names: &VaeNames) -> Result<Checkpoint> {
    renamed(Component::Vae, whole, &|name| names.becomes(name))
}

/// A component's part of a file under our names. `becomes` says of a name of the file what it is
/// there, `None` for one of another component.
fn renamed(
    component: Component,
    whole: Checkpoint,
    becomes: &dyn Fn(&str) -> Option<Becomes>,
) -> Result<Checkpoint> {
    let mut part = Checkpoint::default();
    for (name, reason) in whole.left {
        match becomes(&name) {
            None | Some(Becomes::Nothing) => {}
            Some(Becomes::One(_) | Becomes::Thirds(_)) => {
                return Err(reason.context(format!("tensor {}", shown(&name))));
            }
        }
    }
    for (name, tensor) in whole.tensors {
        let here = |error: Error| error.context(format!("tensor {}", shown(&name)));
        match becomes(&name) {
            None | Some(Becomes::Nothing) => {}
            Some(Becomes::One(ours)) => {
                let tensor =
                    if component == Component::Vae { linear(&ours, tensor)? } else { tensor };
                part.insert(ours, tensor).map_err(here)?;
            }
            Some(Becomes::Thirds(ours)) => {
                for (index, ours) in ours.into_iter().enumerate() {
                    part.insert(ours, third(&tensor, index).map_err(here)?).map_err(here)?;
                }
            }
        }
    }
    names::canonical_names(component, part)
}

/// The `index`th third of a tensor's rows, where it lies.
fn third(tensor: &HostTensor, index: usize) -> Result<HostTensor> {
    let layout = tensor.layout();
    let rows = layout.dims().first().copied().unwrap_or(0);
    if rows == 0 || rows % 3 != 0 {
        return Err(Error::model(format!("{rows} rows are not those of query, key and value")));
    }
    let third = rows / 3;
    let part = layout.narrow(0, index * third, third);
    tensor.with_layout(part.map_err(|error| Error::model(error.to_string()))?)
}

/// Attention's weights as matrices: the original code has them as convolutions of one pixel.
fn linear(ours: &str, tensor: HostTensor) -> Result<HostTensor> {
    let is_attention = ours.contains(".attentions.") && ours.ends_with(".weight");
    let layout = tensor.layout();
    match (layout.dims(), layout.stride()) {
        (&[rows, columns, 1] | &[rows, columns, 1, 1], &[row, column, ..]) if is_attention => {
            let (shape, stride) = ((rows, columns).into(), vec![row, column]);
            tensor.with_layout(Layout::new(shape, stride, layout.start_offset()))
        }
        _ => Ok(tensor),
    }
}
