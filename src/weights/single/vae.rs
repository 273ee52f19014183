//! The VAE's names in the files of the original code, alone or in a model in one file, and its
//! configuration by its shapes. Separate because a VAE is also given as a file of its own.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::Becomes;
use super::shapes::{count, dims};
use super::text::replaced;
use crate::error::Result;
use crate::weights::Checkpoint;

/// How its names begin in a whole model; the last that is there counts, as in diffusers.
const PREFIXES: [&str; 2] = ["first_stage_model.", "vae."];
/// What training needs.
const UNUSED: [&str; 3] = ["loss.", "model_ema.", "discriminator."];
/// The beginnings of names in either half, and ours.
const HALF: [(&str, &str); 3] = [
    ("norm_out.", "conv_norm_out."),
    ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."),
];
const ATTENTION: [(&str, &str); 5] = [
    ("norm.", "group_norm."),
    ("q.", "to_q."),
    ("k.", "to_k."),
    ("v.", "to_v."),
    ("proj_out.", "to_out.0."),
];

/// The names of a VAE's tensors.
#[derive(Debug, Clone)]
pub struct VaeNames {
    prefix: &'static str,
    /// Sizes of the decoder: it counts them from the largest image, we from the smallest.
    levels: usize,
}

impl VaeNames {
    /// Of the names of a file: a whole model's, or a VAE's alone.
    pub fn of(whole: &Checkpoint) -> Self {
        let names = || whole.iter().map(|(name, _)| name);
        let is_there = |prefix: &&&str| names().any(|name| name.starts_with(**prefix));
        let prefix = PREFIXES.iter().rfind(is_there).copied().unwrap_or_default();
        let start = format!("{prefix}decoder.up.");
        let levels = names().filter_map(|name| name.strip_prefix(&start)?.split_once('.'));
        let levels: BTreeSet<_> = levels.map(|(number, _)| number).collect();
        Self { prefix, levels: levels.len() }
    }

    /// Whether the file has the weights of a decoder.
    pub fn has_decoder(&self, whole: &Checkpoint) -> bool {
        whole.get(&format!("{}decoder.conv_in.weight", self.prefix)).is_some()
    }

    /// What becomes of a tensor of the file; `None` if it is not the VAE's. Today's names stay.
    pub(super) fn becomes(&self, name: &str) -> Option<Becomes> {
        let name = name.strip_prefix(self.prefix)?;
        if UNUSED.iter().any(|start| name.starts_with(start)) {
            return Some(Becomes::Nothing);
        }
        Some(Becomes::One(self.ours(name).unwrap_or_else(|| name.to_owned())))
    }

    fn ours(&self, name: &str) -> Option<String> {
        let (half, rest) = name.split_once('.')?;
        if half != "encoder" && half != "decoder" {
            return None;
        }
        if let Some(ours) = replaced(rest, &HALF) {
            return Some(format!("{half}.{}", shortcut(&ours)));
        }
        if let Some(rest) = rest.strip_prefix("mid.attn_1.") {
            return Some(format!("{half}.mid_block.attentions.0.{}", replaced(rest, &ATTENTION)?));
        }
        let (way, rest) = rest.split_once('.')?;
        let (number, rest) = rest.split_once('.')?;
        let number: usize = number.parse().ok()?;
        let block = match (half, way) {
            ("encoder", "down") => number,
            ("decoder", "up") => self.levels.checked_sub(number.checked_add(1)?)?,
            _ => return None,
        };
        let ours = match rest.split_once('.')? {
            ("block", rest) => format!("resnets.{}", shortcut(rest)),
            ("downsample" | "upsample", rest) => format!("{way}samplers.0.{rest}"),
            _ => return None,
        };
        Some(format!("{half}.{way}_blocks.{block}.{ours}"))
    }
}

fn shortcut(name: &str) -> String {
    name.replace(".nin_shortcut.", ".conv_shortcut.")
}

/// `vae/config.json` of weights under our names: `published`, with what their shapes say.
///
/// # Errors
/// If they are no decoder's.
pub fn vae_config(published: Value, weights: &Checkpoint) -> Result<Value> {
    let mut config = published;
    let levels = count(weights, "decoder.up_blocks.", ".resnets.0.conv1.weight");
    let width = |block: usize| {
        Ok(dims::<4>(weights, &format!("decoder.up_blocks.{block}.resnets.0.conv1.weight"))?[0])
    };
    let widths = (0..levels).rev().map(width).collect::<Result<Vec<_>>>()?;
    let [_, latents, _, _] = dims::<4>(weights, "decoder.conv_in.weight")?;
    let layers = count(weights, "decoder.up_blocks.0.resnets.", ".conv1.weight");
    let set = [
        ("block_out_channels", json!(widths)),
        ("layers_per_block", json!(layers.saturating_sub(1))),
        ("latent_channels", json!(latents)),
        ("down_block_types", json!(vec!["DownEncoderBlock2D"; levels])),
        ("up_block_types", json!(vec!["UpDecoderBlock2D"; levels])),
    ];
    set.into_iter().for_each(|(name, value)| config[name] = value);
    if weights.get("post_quant_conv.weight").is_none() {
        config["use_post_quant_conv"] = json!(false);
    }
    if weights.get("decoder.mid_block.attentions.0.to_q.weight").is_none() {
        config["mid_block_add_attention"] = json!(false);
    }
    Ok(config)
}
