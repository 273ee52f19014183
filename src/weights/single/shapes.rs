//! Configurations by the shapes of weights, under our names. Separate because a file of weights
//! does not say what it is, and the files that do are another's.

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::weights::{Checkpoint, shown};

/// Features of a head where the number of heads is not the same everywhere.
const HEAD_WIDTH: usize = 64;

/// A tensor's dimensions, as many as the caller expects.
pub(super) fn dims<const N: usize>(weights: &Checkpoint, name: &str) -> Result<[usize; N]> {
    let found = weights.get(name).map(|tensor| tensor.layout().dims());
    found.and_then(|dims| dims.try_into().ok()).ok_or_else(|| {
        let found = found.map_or("missing".to_owned(), |dims| format!("of shape {dims:?}"));
        Error::model(format!("{} is {found}, where {N} dimensions were expected", shown(name)))
    })
}

/// How many numbers there are from 0 on such that the start, the number and the end make a name.
pub(super) fn count(weights: &Checkpoint, start: &str, end: &str) -> usize {
    (0..weights.len()).take_while(|n| weights.get(&format!("{start}{n}{end}")).is_some()).count()
}

/// The number of layers that a text encoder's configuration gives.
pub(super) fn text_layers(config: &Value) -> Option<usize> {
    config.get("num_hidden_layers")?.as_u64()?.try_into().ok()
}

/// `text_encoder/config.json`: `published`, with what the shapes say.
pub(super) fn text_config(published: Value, weights: &Checkpoint) -> Result<Value> {
    let mut config = published;
    let [tokens, width] = dims(weights, "text_model.embeddings.token_embedding.weight")?;
    let [positions, _] = dims(weights, "text_model.embeddings.position_embedding.weight")?;
    let [inner, _] = dims(weights, "text_model.encoder.layers.0.mlp.fc1.weight")?;
    let set = [
        ("hidden_size", width),
        ("vocab_size", tokens),
        ("max_position_embeddings", positions),
        ("intermediate_size", inner),
        ("num_hidden_layers", count(weights, "text_model.encoder.layers.", ".mlp.fc1.weight")),
        ("num_attention_heads", (width / HEAD_WIDTH).max(1)),
    ];
    set.into_iter().for_each(|(name, value)| config[name] = json!(value));
    Ok(config)
}

/// `unet/config.json`: `published`, with what the shapes say. Models that were made smaller lack
/// layers, sizes or the block in the middle.
pub(super) fn unet_config(published: Value, weights: &Checkpoint) -> Result<Value> {
    let mut config = published;
    let has = |name: &str| weights.get(name).is_some();
    let levels = count(weights, "down_blocks.", ".resnets.0.conv1.weight");
    let width = |block: usize| {
        Ok(dims::<4>(weights, &format!("down_blocks.{block}.resnets.0.conv1.weight"))?[0])
    };
    let widths = (0..levels).map(width).collect::<Result<Vec<_>>>()?;
    let layers =
        |block: usize| count(weights, &format!("down_blocks.{block}.resnets."), ".conv1.weight");
    let types = |way: &str, plain: &'static str, attending: &'static str| {
        let kind = |block: usize| {
            let attends = has(&format!("{way}_blocks.{block}.attentions.0.norm.weight"));
            if attends { attending } else { plain }
        };
        json!((0..levels).map(kind).collect::<Vec<_>>())
    };
    let [_, in_channels, _, _] = dims(weights, "conv_in.weight")?;
    let [out_channels, _, _, _] = dims(weights, "conv_out.weight")?;
    let set = [
        ("block_out_channels", json!(widths)),
        ("layers_per_block", json!((0..levels).map(layers).collect::<Vec<_>>())),
        ("down_block_types", types("down", "DownBlock2D", "CrossAttnDownBlock2D")),
        ("up_block_types", types("up", "UpBlock2D", "CrossAttnUpBlock2D")),
        ("in_channels", json!(in_channels)),
        ("out_channels", json!(out_channels)),
    ];
    set.into_iter().for_each(|(name, value)| config[name] = value);
    if !has("mid_block.resnets.0.conv1.weight") {
        config["mid_block_type"] = Value::Null;
    }
    let mut texts = weights.iter().filter(|(name, _)| name.ends_with(".attn2.to_k.weight"));
    if let Some((name, _)) = texts.next() {
        let [_, text] = dims(weights, name)?;
        config["cross_attention_dim"] = json!(text);
    }
    // Those whose projections are matrices have heads of one width, the others as many everywhere.
    let mut projections = weights.iter().filter(|(name, _)| name.ends_with(".proj_in.weight"));
    let is_linear = projections.next().is_some_and(|(_, tensor)| tensor.layout().dims().len() == 2);
    config["use_linear_projection"] = json!(is_linear);
    if is_linear {
        let heads = widths.iter().map(|width| (width / HEAD_WIDTH).max(1));
        config["attention_head_dim"] = json!(heads.collect::<Vec<_>>());
    }
    Ok(config)
}
