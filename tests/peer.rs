//! candle-transformers' models with the weights of ours, from the same config.json. Separate
//! because a test takes them as a second opinion and a bench as the one to beat.

use std::collections::HashMap;

use candle_core::{DType, Device, IndexOp, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::clip::text_model::{
    Activation, ClipTextConfig, ClipTextTransformer,
};
use candle_transformers::models::stable_diffusion::unet_2d::{
    BlockConfig, UNet2DConditionModel, UNet2DConditionModelConfig,
};
use candle_transformers::models::stable_diffusion::vae::{AutoEncoderKL, AutoEncoderKLConfig};
use serde_json::Value;
use tiny_sd::rng::Generator;
use tiny_sd::weights::{Checkpoint, Component, Format, names};

/// candle's text encoder; it knows quick_gelu only.
pub fn text_encoder(config: &Value, weights: VarBuilder<'_>) -> Result<ClipTextTransformer> {
    let config = ClipTextConfig {
        vocab_size: count(&config["vocab_size"]),
        embed_dim: count(&config["hidden_size"]),
        activation: Activation::QuickGelu,
        intermediate_size: count(&config["intermediate_size"]),
        max_position_embeddings: count(&config["max_position_embeddings"]),
        pad_with: None,
        num_hidden_layers: count(&config["num_hidden_layers"]),
        num_attention_heads: count(&config["num_attention_heads"]),
        projection_dim: count(&config["hidden_size"]),
    };
    ClipTextTransformer::new(weights.pp("text_model"), &config)
}

/// candle's UNet. It always has a mid block; its resnets outside of it have 32 groups whatever
/// `norm_num_groups` says; and its GEGLU computes gelu by tanh, see [`random`].
pub fn unet(config: &Value, weights: VarBuilder<'_>) -> Result<UNet2DConditionModel> {
    let channels = counts(&config["block_out_channels"]);
    let heads = counts(&config["attention_head_dim"]);
    let kinds = config["down_block_types"].as_array().into_iter().flatten();
    let blocks = kinds.zip(&channels).enumerate().map(|(level, (kind, channels))| BlockConfig {
        out_channels: *channels,
        use_cross_attn: (kind == "CrossAttnDownBlock2D").then_some(1),
        attention_head_dim: heads[level.min(heads.len() - 1)],
    });
    let own = UNet2DConditionModelConfig {
        blocks: blocks.collect(),
        layers_per_block: count(&config["layers_per_block"]),
        norm_num_groups: 32,
        cross_attention_dim: count(&config["cross_attention_dim"]),
        use_linear_projection: config["use_linear_projection"].as_bool().unwrap_or(false),
        ..UNet2DConditionModelConfig::default()
    };
    UNet2DConditionModel::new(weights, 4, 4, false, own)
}

/// candle's VAE.
pub fn vae(config: &Value, weights: VarBuilder<'_>) -> Result<AutoEncoderKL> {
    let own = AutoEncoderKLConfig {
        block_out_channels: counts(&config["block_out_channels"]),
        layers_per_block: count(&config["layers_per_block"]),
        latent_channels: 4,
        norm_num_groups: count(&config["norm_num_groups"]),
        use_quant_conv: true,
        use_post_quant_conv: true,
    };
    AutoEncoderKL::new(weights, 3, 3, own)
}

/// The tensors of a checkpoint for candle, in f32.
pub fn weights(checkpoint: &Checkpoint) -> Result<VarBuilder<'static>> {
    let mut tensors = HashMap::new();
    for (name, host) in checkpoint.iter() {
        let mut bytes = Vec::new();
        host.row_major(&mut |piece| bytes.extend_from_slice(piece));
        let dims = host.layout().dims();
        let tensor = Tensor::from_raw_buffer(&bytes, host.dtype(), dims, &Device::Cpu)?;
        tensors.insert(name.to_owned(), tensor.to_dtype(DType::F32)?);
    }
    Ok(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))
}

/// A checkpoint with whatever tensors `build` asks for, normal numbers that keep the signal's
/// size. They go through a file, which is mapped, as a published model's do.
pub fn random<T>(
    component: Component,
    seed: u64,
    build: impl FnOnce(VarBuilder<'_>) -> Result<T>,
) -> Result<Checkpoint> {
    let map = VarMap::new();
    build(VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu))?;
    let map = map.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut shapes: Vec<_> = map.iter().map(|(name, tensor)| (name, tensor.dims())).collect();
    shapes.sort_unstable();
    let mut generator = Generator::new(seed);
    let mut tensors = HashMap::new();
    for (name, dims) in shapes {
        let Some(today) = names::canonical(component, name) else { continue };
        tensors.insert(today.into_owned(), random_tensor(&mut generator, name, dims)?);
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    candle_core::safetensors::save(&tensors, &path)?;
    Ok(Checkpoint::read(&path, Format::Safetensors)?)
}

fn random_tensor(generator: &mut Generator, name: &str, dims: &[usize]) -> Result<Tensor> {
    let normal = generator.randn(dims.iter().product());
    let normal = Tensor::from_vec(normal, dims, &Device::Cpu)?;
    let is_norm = name.contains("norm") && name.ends_with("weight");
    match dims {
        // GEGLU: where the gate is about 8, gelu is the identity, by erf and by tanh alike.
        [twice] if name.ends_with("ff.net.0.proj.bias") => {
            let open = (normal.i(twice / 2..)? * 0.1)?.affine(1.0, 8.0)?;
            Tensor::cat(&[&(normal.i(..twice / 2)? * 0.1)?, &open], 0)
        }
        _ if name.ends_with("ff.net.0.proj.weight") => normal * (0.2 / (dims[1] as f64).sqrt()),
        [_] if is_norm => (normal * 0.1)?.affine(1.0, 1.0),
        [_] => normal * 0.1,
        [_, inner @ ..] => normal * (1.0 / (inner.iter().product::<usize>() as f64).sqrt()),
        [] => Ok(normal),
    }
}

fn count(value: &Value) -> usize {
    value.as_u64().and_then(|count| usize::try_from(count).ok()).unwrap_or_default()
}

fn counts(value: &Value) -> Vec<usize> {
    match value {
        Value::Array(items) => items.iter().map(count).collect(),
        one => vec![count(one)],
    }
}
