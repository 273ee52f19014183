//! Names of tensors over time. Separate because models know today's names only: those of
//! diffusers ≥ 0.30, and for the text encoder transformers' with the prefix `text_model.` that
//! every published SD checkpoint has.

use std::borrow::Cow;

use super::{Checkpoint, Component, shown};
use crate::error::Result;

/// How the names of the text model's own parts begin.
const TEXT_MODEL_PARTS: [&str; 3] = ["embeddings.", "encoder.", "final_layer_norm."];
const TEXT_MODEL: &str = "text_model.";
/// A buffer 0, 1, 2, … that transformers < 4.31 saved.
const POSITION_IDS: &str = "embeddings.position_ids";
/// The VAE's attention as `AttentionBlock` of diffusers < 0.17 named it, and as `Attention` does
/// (`ModelMixin._convert_deprecated_attention_blocks`). The shapes are the same, (channels,
/// channels): only single-file checkpoints of the original code have (channels, channels, 1, 1).
const VAE_ATTENTION: [(&str, &str); 4] =
    [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")];

/// How the names of the VAE's weights begin that lead from pixels to latents.
const ENCODER: [&str; 2] = ["encoder.", "quant_conv."];

/// Whether every picture needs a component's tensor, by its [`canonical`] name; the others are of
/// the VAE's encoder, which pictures need that are made of others.
pub fn is_used(component: Component, name: &str) -> bool {
    match component {
        Component::TextEncoder | Component::Unet => true,
        Component::Vae => !ENCODER.iter().any(|start| name.starts_with(start)),
    }
}

/// Today's name of a component's tensor, or `None` for one that is not a weight.
pub fn canonical(component: Component, name: &str) -> Option<Cow<'_, str>> {
    match component {
        Component::TextEncoder => text_encoder(name),
        Component::Unet => Some(Cow::Borrowed(name)),
        Component::Vae => Some(vae_attention(name).map_or(Cow::Borrowed(name), Cow::Owned)),
    }
}

/// The checkpoint with every tensor under its [`canonical`] name.
///
/// # Errors
/// If two tensors have the same: one file has old and new names.
pub(super) fn canonical_names(component: Component, checkpoint: Checkpoint) -> Result<Checkpoint> {
    let mut renamed = Checkpoint { left: checkpoint.left, ..Checkpoint::default() };
    for (name, tensor) in checkpoint.tensors {
        if let Some(canonical) = canonical(component, &name) {
            renamed
                .insert(canonical.into_owned(), tensor)
                .map_err(|error| error.context(format!("by an older name, {}", shown(&name))))?;
        }
    }
    Ok(renamed)
}

fn text_encoder(name: &str) -> Option<Cow<'_, str>> {
    let bare = name.strip_prefix(TEXT_MODEL).unwrap_or(name);
    if bare == POSITION_IDS {
        None
    } else if TEXT_MODEL_PARTS.iter().any(|part| name.starts_with(part)) {
        Some(Cow::Owned(format!("{TEXT_MODEL}{name}")))
    } else {
        Some(Cow::Borrowed(name))
    }
}

/// `….attentions.N.query.weight` → `….attentions.N.to_q.weight`, and so on.
fn vae_attention(name: &str) -> Option<String> {
    let (start, rest) = name.split_once(".attentions.")?;
    let (index, rest) = rest.split_once('.')?;
    let (module, parameter) = rest.split_once('.')?;
    let (_, today) = VAE_ATTENTION.iter().find(|row| row.0 == module)?;
    Some(format!("{start}.attentions.{index}.{today}.{parameter}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_names_become_todays_and_todays_stay() {
        let check = |component, name: &str, expected: Option<&str>| {
            assert_eq!(canonical(component, name).as_deref(), expected, "{name}");
        };
        let text = Component::TextEncoder;
        let layer = "text_model.encoder.layers.0.mlp.fc1.weight";
        check(text, "encoder.layers.0.mlp.fc1.weight", Some(layer));
        check(text, layer, Some(layer));
        check(text, "final_layer_norm.bias", Some("text_model.final_layer_norm.bias"));
        check(text, "text_projection.weight", Some("text_projection.weight"));
        check(text, "embeddings.position_ids", None);
        check(text, "text_model.embeddings.position_ids", None);
        check(
            text,
            "embeddings.token_embedding.weight",
            Some("text_model.embeddings.token_embedding.weight"),
        );

        let vae = Component::Vae;
        let attention = |name: &str| format!("decoder.mid_block.attentions.0.{name}");
        for (old, today) in [
            ("query.weight", "to_q.weight"),
            ("key.bias", "to_k.bias"),
            ("value.weight", "to_v.weight"),
            ("proj_attn.bias", "to_out.0.bias"),
            ("to_q.weight", "to_q.weight"),
            ("to_out.0.bias", "to_out.0.bias"),
            ("group_norm.weight", "group_norm.weight"),
        ] {
            check(vae, &attention(old), Some(&attention(today)));
        }
        check(vae, "decoder.conv_in.weight", Some("decoder.conv_in.weight"));
        check(Component::Unet, "x.attentions.0.query.weight", Some("x.attentions.0.query.weight"));
    }
}
