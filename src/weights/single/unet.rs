//! The UNet's names in a model in one file: the original code counts its blocks through, one number
//! for each resnet and each sampler. Separate because which block of ours a number is follows from
//! where the samplers are.

use std::collections::{BTreeMap, BTreeSet};

use super::Becomes;
use super::text::replaced;

/// The names outside of the blocks, or their beginnings, and ours.
const TOP: [(&str, &str); 5] = [
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("input_blocks.0.0.", "conv_in."),
    ("out.0.", "conv_norm_out."),
    ("out.2.", "conv_out."),
];
/// The beginnings of names in a resnet, and ours.
const RESNET: [(&str, &str); 6] = [
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("emb_layers.1.", "time_emb_proj."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("skip_connection.", "conv_shortcut."),
];

/// Where one of the numbered blocks is among ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    block: usize,
    /// Which resnet of the block.
    layer: usize,
}

/// The names of the UNet's tensors.
#[derive(Debug, Clone)]
pub(super) struct UnetNames {
    inputs: BTreeMap<usize, Place>,
    outputs: BTreeMap<usize, Place>,
}

impl UnetNames {
    /// Of a file with these names, without what they all begin with.
    pub fn of<'n>(names: impl Iterator<Item = &'n str>) -> Self {
        let (mut inputs, mut outputs) = (BTreeSet::new(), BTreeSet::new());
        // The numbers behind which a block of ours ends.
        let (mut downsamplers, mut upsamplers) = (BTreeSet::new(), BTreeSet::new());
        for name in names {
            if let Some((number, module)) = numbered(name, "input_blocks.") {
                inputs.insert(number);
                if module.starts_with("0.op.") {
                    downsamplers.insert(number);
                }
            } else if let Some((number, module)) = numbered(name, "output_blocks.") {
                outputs.insert(number);
                if is_upsampler(module) {
                    upsamplers.insert(number);
                }
            }
        }
        // The first is the convolution before all blocks.
        inputs.remove(&0);
        Self { inputs: places(&inputs, &downsamplers), outputs: places(&outputs, &upsamplers) }
    }

    /// What becomes of a tensor.
    pub fn becomes(&self, name: &str) -> Becomes {
        // Under its own name, so that it is told of as unexpected.
        Becomes::One(self.ours(name).unwrap_or_else(|| name.to_owned()))
    }

    fn ours(&self, name: &str) -> Option<String> {
        if let Some(ours) = replaced(name, &TOP) {
            return Some(ours);
        }
        if let Some((number, module)) = numbered(name, "input_blocks.") {
            let Place { block, layer } = self.inputs.get(&number)?;
            let at = format!("down_blocks.{block}.");
            if let Some(rest) = module.strip_prefix("0.op.") {
                return Some(format!("{at}downsamplers.0.conv.{rest}"));
            }
            return in_block(&at, *layer, module);
        }
        if let Some((number, module)) = numbered(name, "output_blocks.") {
            let Place { block, layer } = self.outputs.get(&number)?;
            let at = format!("up_blocks.{block}.");
            if is_upsampler(module) {
                let (_, rest) = module.split_once(".conv.")?;
                return Some(format!("{at}upsamplers.0.conv.{rest}"));
            }
            return in_block(&at, *layer, module);
        }
        let (number, rest) = numbered(name, "middle_block.")?;
        match number {
            0 | 2 => Some(format!("mid_block.resnets.{}.{}", number / 2, replaced(rest, &RESNET)?)),
            1 => Some(format!("mid_block.attentions.0.{rest}")),
            _ => None,
        }
    }
}

/// A resnet is the first module of a number, an attention the second.
fn in_block(at: &str, layer: usize, module: &str) -> Option<String> {
    match module.split_once('.')? {
        ("0", rest) => Some(format!("{at}resnets.{layer}.{}", replaced(rest, &RESNET)?)),
        ("1", rest) => Some(format!("{at}attentions.{layer}.{rest}")),
        _ => None,
    }
}

/// It is the second module of a number, or the third where there is attention.
fn is_upsampler(module: &str) -> bool {
    module.starts_with("1.conv.") || module.starts_with("2.conv.")
}

/// `input_blocks.7.1.norm.weight` → 7 and `1.norm.weight`
fn numbered<'n>(name: &'n str, start: &str) -> Option<(usize, &'n str)> {
    let (number, rest) = name.strip_prefix(start)?.split_once('.')?;
    Some((number.parse().ok()?, rest))
}

/// Numbers that are left out, as where a small model keeps those of a large one, do not count.
fn places(numbers: &BTreeSet<usize>, ends: &BTreeSet<usize>) -> BTreeMap<usize, Place> {
    let mut place = Place { block: 0, layer: 0 };
    let mut places = BTreeMap::new();
    for &number in numbers {
        places.insert(number, place);
        place = match ends.contains(&number) {
            true => Place { block: place.block + 1, layer: 0 },
            false => Place { layer: place.layer + 1, ..place },
        };
    }
    places
}
