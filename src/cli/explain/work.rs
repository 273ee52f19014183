//! How many multiplications and additions a picture takes, by the names and shapes of its weights:
//! each is used once for every place of an activation, and the names say at which resolution.
//! Separate because nothing else looks at a model so.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::Said;
use super::prompts::Context;
use crate::cli::job::Job;
use crate::image::ImageSize;
use crate::weights::{Checkpoint, Component, names};

/// The work of one pass of each component over one picture.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Work {
    text: f64,
    unet: f64,
    vae: f64,
}

pub(super) fn say(
    job: &Job,
    weights: &[Checkpoint; 3],
    size: ImageSize,
    context: Context,
    evaluations: usize,
    said: &mut Said,
) {
    let Some(work) = Work::of(weights, size, context) else {
        said.line("work", "not known for this VAE");
        return said.field("flops", Value::Null);
    };
    let passes = if job.guidance_scale.needs_unconditional() { 2.0 } else { 1.0 };
    let Work { text, unet, vae } = work;
    let [text, unet] = [text, unet].map(|flops| flops * passes);
    let picture = text + unet * evaluations as f64 + vae;
    let giga = |flops: f64| match flops {
        10e9.. => format!("{:.0}", flops / 1e9),
        _ => format!("{:.2}", flops / 1e9),
    };
    said.line(
        "work",
        format!(
            "{} GFLOP a picture: {} for the text, {} an evaluation, {} to decode",
            giga(picture),
            giga(text),
            giga(unet),
            giga(vae)
        ),
    );
    let flops = json!({"text": text, "evaluation": unet, "decoding": vae, "picture": picture});
    said.field("flops", flops);
}

impl Work {
    /// For a picture of `size`; `None` if the VAE is not an AutoencoderKL.
    fn of(
        [text, unet, vae]: &[Checkpoint; 3],
        size: ImageSize,
        Context { chunks, length }: Context,
    ) -> Option<Self> {
        let blocks = |weights: &Checkpoint, after: &str| -> i32 {
            let places = weights.iter().filter_map(|(name, _)| number(name, after));
            places.collect::<BTreeSet<_>>().len() as i32
        };
        let (unet_levels, vae_levels) = (blocks(unet, "up_blocks."), blocks(vae, "up_blocks."));
        if vae_levels == 0 {
            return None;
        }
        let pixels = (size.height * size.width) as f64;
        let latents = pixels / 4f64.powi(vae_levels - 1);
        let (chunks, length) = (chunks as f64, length as f64);
        let unet_places = |name: &str| latents / 4f64.powi(unet_halvings(name, unet_levels));
        let vae_places = |name: &str| latents * 4f64.powi(vae_doublings(name, vae_levels));
        let text_places = |_: &str| length;
        Some(Self {
            text: chunks * flops(text, Component::TextEncoder, &text_places, length),
            unet: flops(unet, Component::Unet, &unet_places, chunks * length),
            vae: flops(vae, Component::Vae, &vae_places, length),
        })
    }
}

/// Of all weights that a pass uses, at so many places each.
fn flops(
    weights: &Checkpoint,
    component: Component,
    places: &dyn Fn(&str) -> f64,
    tokens: f64,
) -> f64 {
    let used = weights.iter().filter(|(name, _)| names::is_used(component, name));
    let of_weight = |(name, tensor): (&str, &crate::backend::host::HostTensor)| {
        let dims = tensor.layout().dims();
        if dims.len() < 2 || name.contains("embedding.weight") {
            return 0.0;
        }
        let elements = dims.iter().map(|side| *side as f64).product::<f64>();
        let places = places(name);
        let is_of_text = component == Component::Unet && name.contains("attn2.");
        // Scores and their sums: each query meets each key, twice.
        let scores = |keys: f64| 4.0 * places * keys * dims[0] as f64;
        let queries = ["to_q.weight", "q_proj.weight"].iter().any(|end| name.ends_with(end));
        let of_attention = match (queries, is_of_text) {
            (true, true) => scores(tokens),
            (true, false) => scores(places),
            (false, _) => 0.0,
        };
        let is_once = name.contains("time_emb");
        let is_key = is_of_text && (name.contains("to_k.") || name.contains("to_v."));
        let uses = match (is_once, is_key) {
            (true, _) => 1.0,
            (false, true) => tokens,
            (false, false) => places,
        };
        2.0 * elements * uses + of_attention
    };
    used.map(of_weight).sum()
}

/// How often the latents' sides are halved where a weight of the UNet is used.
fn unet_halvings(name: &str, levels: i32) -> i32 {
    let (down, up) = (number(name, "down_blocks."), number(name, "up_blocks."));
    match (down, up) {
        (Some(block), _) => block + i32::from(name.contains("downsamplers.")),
        (None, Some(block)) => levels - 1 - block - i32::from(name.contains("upsamplers.")),
        (None, None) if name.starts_with("mid_block.") => levels - 1,
        (None, None) => 0,
    }
}

/// How often the latents' sides are doubled where a weight of the VAE's decoder is used.
fn vae_doublings(name: &str, levels: i32) -> i32 {
    match number(name, "up_blocks.") {
        Some(block) => block + i32::from(name.contains("upsamplers.")),
        None if name.contains("conv_out.") => levels - 1,
        None => 0,
    }
}

/// The number behind `part` in a name.
fn number(name: &str, part: &str) -> Option<i32> {
    let at = name.find(part)?;
    let behind = name.get(at + part.len()..)?;
    behind.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::weights::Model;

    #[test]
    fn the_work_is_what_pytorch_counts() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/tiny");
        let model = Model::open(folder, None).unwrap();
        let weights = Component::ALL.map(|component| model.checkpoint(component, None).unwrap());
        let size = ImageSize { height: 64, width: 96 };
        // torch.utils.flop_counter.FlopCounterMode over diffusers 0.42 and transformers 5.
        let cases = [(1, 7_953_792.0, 21_807_808.0), (3, 3.0 * 7_953_792.0, 30_885_184.0)];
        for (chunks, text, unet) in cases {
            let work = Work::of(&weights, size, Context { chunks, length: 77 }).unwrap();
            assert_eq!(work, Work { text, unet, vae: 89_766_912.0 }, "{chunks} chunks");
        }
    }
}
