//! LoRA files: low-rank changes of weights, by the names that those weights have in the model.
//! Separate because the same change is called in five ways: kohya's underscores, diffusers'
//! attention processors of old and of today, PEFT's, each with or without a component before it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::{Checkpoint, Component, Format, shown};
use crate::backend::host::HostTensor;
use crate::error::{Error, Result};

mod factors;
mod scaling;
#[cfg(test)]
mod tests;

pub use factors::LowRank;
use factors::{Factors, Fit, Kind};

/// The largest scale either way.
const MAX_SCALE: f64 = 100.0;

/// A LoRA's file and how strongly it acts, as a flag names it.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraFile {
    /// Where it is.
    pub path: PathBuf,
    /// 1 is as it was trained.
    pub scale: f64,
}

/// `FILE` or `FILE:SCALE`.
impl FromStr for LoraFile {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let scaled = text.rsplit_once(':').and_then(|(path, scale)| {
            let scale = scale.parse::<f64>().ok()?;
            Some((path, scale))
        });
        let (path, scale) = scaled.unwrap_or((text, 1.0));
        if path.is_empty() {
            return Err("FILE, or FILE:SCALE".into());
        }
        if !(-MAX_SCALE..=MAX_SCALE).contains(&scale) {
            return Err(format!("its scale is a number from -{MAX_SCALE} to {MAX_SCALE}"));
        }
        Ok(Self { path: path.into(), scale })
    }
}

/// The changes of a component's weights, by their names.
pub type Changes = BTreeMap<String, Vec<LowRank>>;

/// The changes of all components.
#[derive(Debug, Clone, Default)]
pub struct ComponentChanges(BTreeMap<Component, Changes>);

impl ComponentChanges {
    /// Of one component; none of one that nothing changes.
    pub fn of(&self, component: Component) -> Option<&Changes> {
        self.0.get(&component)
    }

    /// The factors of a component's changes, as they are in their files.
    pub fn factors(&self, component: Component) -> impl Iterator<Item = &HostTensor> {
        let changes = self.0.get(&component).into_iter().flatten();
        changes.flat_map(|(_, changes)| changes).flat_map(LowRank::factors)
    }

    /// Adds those of a file to a model with these weights. Gives back what changes none of them: a
    /// block that the model does not have, or that is of another size there.
    ///
    /// # Errors
    /// If the file cannot be read, or holds anything but LoRA.
    pub fn add(
        &mut self,
        file: &LoraFile,
        checkpoints: &[(Component, Checkpoint)],
    ) -> Result<Unmatched> {
        self.add_file(file, checkpoints).map_err(|error| {
            // Readers name the file already.
            let (text, path) = (error.to_string(), file.path.display().to_string());
            let rest = text.strip_prefix(&format!("{path}: ")).unwrap_or(&text);
            Error::new(error.kind(), format!("{path}: {rest}"))
        })
    }

    fn add_file(
        &mut self,
        LoraFile { path, scale }: &LoraFile,
        checkpoints: &[(Component, Checkpoint)],
    ) -> Result<Unmatched> {
        let targets = Targets::of(checkpoints);
        let scalings = scaling::of_file(path)?;
        let (parts, count) = parts(path)?;
        let mut unmatched = Unmatched { first: None, count: 0, of: count };
        for (stem, factors) in parts {
            let Some((component, name)) = targets.find(&stem) else {
                unmatched.add(factors.key);
                continue;
            };
            let weight = checkpoints.iter().find(|(of, _)| *of == component);
            let weight = weight.and_then(|(_, checkpoint)| checkpoint.get(&name));
            let dims = weight.map(|weight| weight.layout().dims()).unwrap_or_default();
            match factors.into_change(dims, *scale, scalings.get(&component))? {
                Fit::Fits(change) => {
                    self.0.entry(component).or_default().entry(name).or_default().push(*change);
                }
                Fit::Misfit(how) => unmatched.add(how),
            }
        }
        Ok(unmatched)
    }
}

/// Changes of weights that a model does not have, or not in that shape.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unmatched {
    /// The key of one of them, and how it does not fit.
    pub first: Option<String>,
    /// How many there are.
    pub count: usize,
    /// Of how many changes in all.
    pub of: usize,
}

impl Unmatched {
    fn add(&mut self, what: String) {
        self.count = self.count.saturating_add(1);
        self.first.get_or_insert(what);
    }
}

/// The factors of each change by the beginning of their keys, and how many there are.
fn parts(path: &Path) -> Result<(BTreeMap<String, Factors>, usize)> {
    let format = match path.extension().is_some_and(|suffix| suffix == "safetensors") {
        true => Format::Safetensors,
        false => Format::Pickle,
    };
    let checkpoint = Checkpoint::read(path, format)?;
    let mut parts: BTreeMap<String, Factors> = BTreeMap::new();
    for (key, tensor) in checkpoint.iter() {
        let Some((stem, kind)) = Kind::of(key) else {
            return Err(Error::model(format!(
                "{} is no part of a LoRA: down, up, mid and alpha are covered, but not DoRA, LoHa, \
                 LoKr or whole weights",
                shown(key)
            )));
        };
        let factors = parts.entry(stem.to_owned()).or_insert_with(|| Factors::new(key));
        factors.put(key, kind, tensor)?;
    }
    // An alpha beside nothing changes nothing, but is of a change all the same.
    let count = parts.len();
    match count {
        0 => Err(Error::model("there is nothing in it")),
        _ => Ok((parts, count)),
    }
}

/// The weights that can be changed, by all that files call them.
struct Targets {
    /// kohya's name: the module's with underscores.
    kohya: HashMap<String, (Component, String)>,
    /// The module's name in the model.
    modules: HashSet<(Component, String)>,
}

impl Targets {
    fn of(checkpoints: &[(Component, Checkpoint)]) -> Self {
        let (mut kohya, mut modules) = (HashMap::new(), HashSet::new());
        for (component, checkpoint) in checkpoints {
            let prefixes: &[&str] = match component {
                Component::Unet => &["lora_unet_"],
                Component::TextEncoder => &["lora_te_", "lora_te1_"],
                Component::Vae => continue,
            };
            for (name, tensor) in checkpoint.iter() {
                let Some(module) = name.strip_suffix(".weight") else { continue };
                if !matches!(tensor.layout().dims().len(), 2 | 4) {
                    continue;
                }
                for prefix in prefixes {
                    let name = format!("{prefix}{}", module.replace('.', "_"));
                    kohya.insert(name, (*component, module.to_owned()));
                }
                modules.insert((*component, module.to_owned()));
            }
        }
        Self { kohya, modules }
    }

    /// The weight that the beginning of a key means.
    fn find(&self, stem: &str) -> Option<(Component, String)> {
        let weight =
            |(component, module): (Component, String)| (component, format!("{module}.weight"));
        if let Some(found) = self.kohya.get(stem) {
            return Some(weight(found.clone()));
        }
        let stem = stem.strip_prefix("base_model.model.").unwrap_or(stem);
        let of_unet = stem.strip_prefix("unet.");
        let of_text = stem.strip_prefix("text_encoder.");
        let candidates = [
            (Component::Unet, of_unet.or(of_text.is_none().then_some(stem))),
            (Component::TextEncoder, of_text.or(of_unet.is_none().then_some(stem))),
        ];
        candidates.into_iter().find_map(|(component, stem)| {
            let names = match component {
                Component::Unet => unet_names(stem?),
                Component::TextEncoder => text_names(stem?),
                Component::Vae => return None,
            };
            let names = names.into_iter().map(|name| (component, name));
            names.into_iter().find(|name| self.modules.contains(name)).map(weight)
        })
    }
}

/// What diffusers' attention processors call `to_out.0`, and where they stood.
fn unet_names(stem: &str) -> Vec<String> {
    let name = stem.replace(".processor.", ".");
    let out = name.strip_suffix(".to_out").map(|before| format!("{before}.to_out.0"));
    [Some(name), out].into_iter().flatten().collect()
}

/// The projections have their UNet's names in old files, and transformers dropped the level
/// `text_model`.
fn text_names(stem: &str) -> Vec<String> {
    const OLD: [(&str, &str); 4] =
        [("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")];
    let renamed = OLD.iter().find_map(|(old, new)| {
        let before = stem.strip_suffix(old)?.strip_suffix('.')?;
        Some(format!("{before}.{new}"))
    });
    let name = renamed.unwrap_or_else(|| stem.to_owned());
    vec![format!("text_model.{name}"), name]
}
