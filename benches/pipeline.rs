//! The three models at a middle size, 256×256 pixels, beside candle-transformers' with the same
//! weights, and the UNet's evaluation of several pictures together beside that of one:
//! `cargo bench --bench pipeline [-- unet]`. With the folder of a model in TINY_SD_BENCH_MODEL the
//! latter is of that model.

use std::hint::black_box;
use std::time::Duration;

use candle_core::{DType, Device as CandleDevice, Tensor as Candle};
use candle_nn::VarBuilder;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use serde_json::{Value, json};
use tiny_sd::Result;
use tiny_sd::backend::cpu::{Device, Storage};
use tiny_sd::model::clip::TextConfig;
use tiny_sd::model::unet::UNetConfig;
use tiny_sd::model::vae::VaeConfig;
use tiny_sd::model::{Decoder, TextEncoder, UNet};
use tiny_sd::nn::Loader;
use tiny_sd::rng::Generator;
use tiny_sd::tensor::Tensor;
use tiny_sd::weights::{Checkpoint, Component, Model};

#[path = "../tests/peer.rs"]
mod peer;

type Cpu = Tensor<Storage>;

const SEED: u64 = 7;
const TOKENS: usize = 77;
const TEXT_WIDTH: usize = 256;
/// Height and width of the latents.
const LATENT_SIDE: usize = 32;

/// The same normal numbers here and there.
fn noise(dims: &[usize], device: &Device) -> Result<(Cpu, Candle)> {
    let values = Generator::new(SEED).randn(dims.iter().product());
    let ours = Tensor::from_slice(&values, dims, device)?;
    Ok((ours, Candle::from_vec(values, dims, &CandleDevice::Cpu)?))
}

/// Ours and candle's model of one checkpoint.
fn pair<M, C>(
    component: Component,
    device: &Device,
    candle: impl Fn(VarBuilder<'_>) -> candle_core::Result<C>,
    ours: impl FnOnce(Loader<'_, Storage>) -> Result<M>,
) -> Result<(M, C)> {
    let checkpoint: Checkpoint = peer::random(component, SEED, &candle)?;
    let ours = ours(Loader::new(&checkpoint, device, DType::F32, &mut |_| Ok(())))?;
    Ok((ours, candle(peer::weights(&checkpoint)?)?))
}

fn side_by_side(
    criterion: &mut Criterion,
    name: &str,
    mut ours: impl FnMut() -> Result<Cpu>,
    mut candle: impl FnMut() -> candle_core::Result<Candle>,
) -> Result<()> {
    // Two times are worth comparing if they are for the same work.
    let (found, expected) = (ours()?.to_vec::<f32>()?, candle()?.flatten_all()?.to_vec1::<f32>()?);
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(found.len() == expected.len() && worst <= 1e-3 * largest, "{name}: {worst}");
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(500));
    group.measurement_time(Duration::from_secs(3));
    group.bench_function("ours", |bencher| bencher.iter(|| black_box(ours()).is_ok()));
    group.bench_function("candle", |bencher| bencher.iter(|| black_box(candle()).is_ok()));
    group.finish();
    Ok(())
}

fn text_encoder(criterion: &mut Criterion, device: &Device) -> Result<()> {
    let config: Value = json!({
        "hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH, "num_hidden_layers": 6,
        "num_attention_heads": 4, "vocab_size": 1000, "max_position_embeddings": TOKENS,
        "hidden_act": "quick_gelu",
    });
    let parsed = TextConfig::parse(&config)?;
    let candle = |weights: VarBuilder<'_>| peer::text_encoder(&config, weights);
    let (ours, candle) =
        pair(Component::TextEncoder, device, candle, |loader| TextEncoder::load(parsed, loader))?;
    let ids: Vec<u32> = (0..2 * TOKENS as u32).map(|i| i * 7919 % 1000).collect();
    let candle_ids = Candle::from_slice(&ids, (2, TOKENS), &CandleDevice::Cpu)?;
    let ids = Tensor::from_slice(&ids, (2, TOKENS), device)?;
    side_by_side(
        criterion,
        "text encoder",
        || ours.forward(&ids),
        || candle.forward_with_mask(&candle_ids, usize::MAX),
    )
}

fn unet_config() -> Value {
    json!({
        "block_out_channels": [64, 128, 256], "attention_head_dim": 8, "layers_per_block": 1,
        "cross_attention_dim": TEXT_WIDTH,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    })
}

fn unet(criterion: &mut Criterion, device: &Device) -> Result<()> {
    let config = unet_config();
    let parsed = UNetConfig::parse(&config)?;
    let candle = |weights: VarBuilder<'_>| peer::unet(&config, weights);
    let (ours, candle) =
        pair(Component::Unet, device, candle, |loader| UNet::load(parsed, loader))?;
    let (latents, candle_latents) = noise(&[2, 4, LATENT_SIDE, LATENT_SIDE], device)?;
    let (text, candle_text) = noise(&[2, TOKENS, TEXT_WIDTH], device)?;
    // Once for a picture, so not a part of a step.
    let text = ours.text_key_values(&text)?;
    let timestep = Tensor::from_slice(&[500f32], 1, device)?;
    side_by_side(
        criterion,
        "unet step with guidance",
        || ours.forward(&latents, &timestep, &text),
        || candle.forward(&candle_latents, 500.0, &candle_text),
    )
}

/// What a picture costs when several go through the UNet together: `--batch-size`.
fn together(criterion: &mut Criterion, device: &Device) -> Result<()> {
    let (config, checkpoint) = match std::env::var_os("TINY_SD_BENCH_MODEL") {
        Some(folder) => {
            let folder = Model::open(folder, None)?;
            (folder.config(Component::Unet)?, folder.checkpoint(Component::Unet, None)?)
        }
        None => {
            let config = unet_config();
            let candle = |weights: VarBuilder<'_>| peer::unet(&config, weights);
            (config.clone(), peer::random(Component::Unet, SEED, candle)?)
        }
    };
    let width = config["cross_attention_dim"].as_u64().unwrap_or_default() as usize;
    let parsed = UNetConfig::parse(&config)?;
    let unet = UNet::load(parsed, Loader::new(&checkpoint, device, DType::F32, &mut |_| Ok(())))?;
    let timestep = Tensor::from_slice(&[500f32], 1, device)?;
    for side in [LATENT_SIDE, 2 * LATENT_SIDE] {
        let mut group = criterion.benchmark_group(format!(
            "unet step with guidance, {}x{}",
            8 * side,
            8 * side
        ));
        group.sample_size(10).warm_up_time(Duration::from_millis(500));
        group.measurement_time(Duration::from_secs(3));
        for pictures in [1, 2, 4] {
            let (latents, _) = noise(&[2 * pictures, 4, side, side], device)?;
            let (text, _) = noise(&[2 * pictures, TOKENS, width], device)?;
            let text = unet.text_key_values(&text)?;
            group.throughput(Throughput::Elements(pictures as u64));
            group.bench_function(format!("{pictures} together"), |bencher| {
                bencher.iter(|| black_box(unet.forward(&latents, &timestep, &text)).is_ok());
            });
        }
        group.finish();
    }
    Ok(())
}

fn vae(criterion: &mut Criterion, device: &Device) -> Result<()> {
    let config = json!({
        "block_out_channels": [64, 128, 256, 256], "layers_per_block": 1, "norm_num_groups": 32,
        "scaling_factor": 1.0,
        "down_block_types": vec!["DownEncoderBlock2D"; 4],
        "up_block_types": vec!["UpDecoderBlock2D"; 4],
    });
    let parsed = VaeConfig::parse(&config)?;
    let candle = |weights: VarBuilder<'_>| peer::vae(&config, weights);
    let (ours, candle) =
        pair(Component::Vae, device, candle, |loader| Decoder::load(parsed, loader))?;
    let (latents, candle_latents) = noise(&[1, 4, LATENT_SIDE, LATENT_SIDE], device)?;
    side_by_side(
        criterion,
        "vae decode",
        || ours.forward(&latents),
        || candle.decode(&candle_latents),
    )
}

fn all(criterion: &mut Criterion) {
    let run = |criterion: &mut Criterion| -> Result<()> {
        let device = Device::with_threads(0)?;
        text_encoder(criterion, &device)?;
        unet(criterion, &device)?;
        together(criterion, &device)?;
        vae(criterion, &device)
    };
    if let Err(error) = run(criterion) {
        panic!("{error}");
    }
}

criterion_group!(benches, all);
criterion_main!(benches);
