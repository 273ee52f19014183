//! The text encoder's names in a model in one file: OpenAI's CLIP as transformers has it, or
//! OpenCLIP with query, key and value in one tensor. Separate because nothing here is an image's.

use std::collections::BTreeSet;

use super::{Becomes, Family};

/// OpenAI's CLIP, as transformers names it behind this.
const CLIP: &str = "cond_stage_model.transformer.";
/// OpenCLIP.
const OPEN_CLIP: &str = "cond_stage_model.model.";
/// So many layers of OpenCLIP's ViT-H are used: all but the last.
const OPEN_CLIP_LAYERS: usize = 23;

/// OpenCLIP's names outside of its layers, or their beginnings, and ours.
const OPEN_CLIP_TOP: [(&str, &str); 3] = [
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("ln_final.", "text_model.final_layer_norm."),
];
/// What OpenCLIP has for the comparison with images.
const OPEN_CLIP_UNUSED: [&str; 3] = ["text_projection", "logit_scale", "attn_mask"];
/// The beginnings of names in a layer of OpenCLIP, and ours.
const OPEN_CLIP_LAYER: [(&str, &str); 5] = [
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
    ("attn.out_proj.", "self_attn.out_proj."),
];

/// The names of the text encoder's tensors.
#[derive(Debug, Clone)]
pub(super) struct TextNames {
    family: Family,
    /// Layers that are used.
    layers: usize,
}

impl TextNames {
    /// Of a file with these names.
    pub fn of<'n>(family: Family, names: impl Iterator<Item = &'n str>) -> Self {
        let layers = match family {
            Family::V1 => usize::MAX,
            Family::V2 => {
                let layer = |name: &'n str| {
                    let rest =
                        name.strip_prefix(OPEN_CLIP)?.strip_prefix("transformer.resblocks.")?;
                    rest.split_once('.').map(|(number, _)| number)
                };
                let all: BTreeSet<_> = names.filter_map(layer).collect();
                all.len().min(OPEN_CLIP_LAYERS)
            }
        };
        Self { family, layers }
    }

    /// So many layers are used, if that is known.
    pub fn use_layers(&mut self, layers: Option<usize>) {
        if let (Family::V2, Some(layers)) = (self.family, layers) {
            self.layers = layers;
        }
    }

    /// What becomes of a tensor of the file; `None` if it is not the text encoder's.
    pub fn becomes(&self, name: &str) -> Option<Becomes> {
        match self.family {
            // `names::canonical` knows the ways in which transformers has named it.
            Family::V1 => Some(Becomes::One(name.strip_prefix(CLIP)?.to_owned())),
            Family::V2 => Some(self.open_clip(name.strip_prefix(OPEN_CLIP)?)),
        }
    }

    fn open_clip(&self, name: &str) -> Becomes {
        if OPEN_CLIP_UNUSED.contains(&name) {
            return Becomes::Nothing;
        }
        if let Some(ours) = replaced(name, &OPEN_CLIP_TOP) {
            return Becomes::One(ours);
        }
        let layer = name.strip_prefix("transformer.resblocks.").and_then(|rest| {
            let (number, rest) = rest.split_once('.')?;
            Some((number.parse::<usize>().ok()?, rest))
        });
        // Under its own name, so that it is told of as unexpected.
        let Some((number, rest)) = layer else { return Becomes::One(name.to_owned()) };
        if number >= self.layers {
            return Becomes::Nothing;
        }
        let at = format!("text_model.encoder.layers.{number}.");
        for (fused, parameter) in [("attn.in_proj_weight", "weight"), ("attn.in_proj_bias", "bias")]
        {
            if rest == fused {
                let ours = |part| format!("{at}self_attn.{part}_proj.{parameter}");
                return Becomes::Thirds(["q", "k", "v"].map(ours));
            }
        }
        match replaced(rest, &OPEN_CLIP_LAYER) {
            Some(ours) => Becomes::One(at + &ours),
            None => Becomes::One(name.to_owned()),
        }
    }
}

/// The name with its beginning replaced by the first row that has it.
pub(super) fn replaced(name: &str, rows: &[(&str, &str)]) -> Option<String> {
    rows.iter().find_map(|(theirs, ours)| Some(format!("{ours}{}", name.strip_prefix(theirs)?)))
}
