//! Every model against candle-transformers', where that is right: a second opinion beside
//! diffusers', written by other people in another language.

use std::path::Path;

use candle_core::{DType, Device, Tensor as Candle};
use serde_json::{Value, json};
use tiny_sd::Result;
use tiny_sd::backend::cpu;
use tiny_sd::model::clip::TextConfig;
use tiny_sd::model::unet::UNetConfig;
use tiny_sd::model::vae::VaeConfig;
use tiny_sd::model::{Decoder, TextEncoder, UNet};
use tiny_sd::nn::Loader;
use tiny_sd::rng::Generator;
use tiny_sd::tensor::Tensor;
use tiny_sd::weights::{Checkpoint, Component, Model};

use super::peer;

type Cpu = cpu::Storage;

const TOLERANCE: f32 = 1e-4;

/// The model `load` makes of a checkpoint, on the CPU in f32.
fn ours<M>(
    checkpoint: &Checkpoint,
    device: &cpu::Device,
    load: impl FnOnce(Loader<'_, Cpu>) -> Result<M>,
) -> M {
    load(Loader::new(checkpoint, device, DType::F32, &mut |_| Ok(()))).unwrap()
}

fn device() -> cpu::Device {
    cpu::Device::with_threads(2).unwrap()
}

/// The same normal numbers here and there.
fn noise(seed: u64, dims: &[usize], device: &cpu::Device) -> (Tensor<Cpu>, Candle) {
    let values = Generator::new(seed).randn(dims.iter().product());
    let candle = Candle::from_slice(&values, dims, &Device::Cpu).unwrap();
    (Tensor::from_slice(&values, dims, device).unwrap(), candle)
}

fn check_close(what: &str, ours: &Tensor<Cpu>, theirs: &Candle) {
    assert_eq!(ours.dims(), theirs.dims(), "{what}");
    let ours = ours.to_vec::<f32>().unwrap();
    let theirs: Vec<f32> = theirs.flatten_all().unwrap().to_vec1().unwrap();
    let largest = theirs.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let worst = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(largest.is_normal() && worst <= TOLERANCE * largest, "{what}: {}", worst / largest);
    assert!(ours.iter().all(|value| value.is_finite()), "{what}");
}

fn fixture() -> Model {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
    Model::open(models.join("sd1"), None).unwrap()
}

#[test]
fn the_text_encoder_agrees_with_candles_on_an_sd1_model() {
    let (folder, device) = (fixture(), device());
    let config = folder.config(Component::TextEncoder).unwrap();
    let checkpoint = folder.checkpoint(Component::TextEncoder, None).unwrap();
    let theirs = peer::text_encoder(&config, peer::weights(&checkpoint).unwrap()).unwrap();
    let config = TextConfig::parse(&config).unwrap();
    let ids: Vec<u32> = (0..2 * 77).map(|i| i * 7919 % config.vocab_size as u32).collect();
    let encoder = ours(&checkpoint, &device, |loader| TextEncoder::load(config, loader));
    let found = encoder.forward(&Tensor::from_slice(&ids, (2, 77), &device).unwrap()).unwrap();
    let ids = Candle::from_vec(ids, (2, 77), &Device::Cpu).unwrap();
    check_close("text encoder", &found, &theirs.forward_with_mask(&ids, usize::MAX).unwrap());
}

#[test]
fn the_decoder_agrees_with_candles_on_an_sd1_model() {
    let (folder, device) = (fixture(), device());
    let config = folder.config(Component::Vae).unwrap();
    let checkpoint = folder.checkpoint(Component::Vae, None).unwrap();
    let theirs = peer::vae(&config, peer::weights(&checkpoint).unwrap()).unwrap();
    let config = VaeConfig::parse(&config).unwrap();
    let scaling_factor = config.scaling_factor;
    let decoder = ours(&checkpoint, &device, |loader| Decoder::load(config, loader));
    for (seed, [height, width]) in [(1, [8, 8]), (2, [9, 5])] {
        let (latents, candle) = noise(seed, &[1, 4, height, width], &device);
        let image = theirs.decode(&(candle / scaling_factor).unwrap()).unwrap();
        check_close("decoder", &decoder.forward(&latents).unwrap(), &image);
    }
}

/// SD 1.x's blocks, narrow, but with the 32 groups that candle's blocks insist on.
fn unet_config(changes: &[(&str, Value)]) -> Value {
    let mut config = json!({
        "block_out_channels": [32, 64, 96, 96],
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
        "down_block_types": [
            "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"
        ],
        "up_block_types": [
            "UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"
        ],
        "layers_per_block": 2,
    });
    for (name, value) in changes {
        config[*name] = value.clone();
    }
    config
}

#[test]
fn the_unet_agrees_with_candles_on_the_topologies_of_sd1_and_sd2() {
    let device = device();
    let linear = [
        ("use_linear_projection", json!(true)),
        ("attention_head_dim", json!([2, 4, 6, 6])),
        ("layers_per_block", json!(1)),
    ];
    for (what, seed, config) in [("sd1", 11, unet_config(&[])), ("sd2", 12, unet_config(&linear))] {
        let build = |weights: candle_nn::VarBuilder<'_>| peer::unet(&config, weights);
        let checkpoint = peer::random(Component::Unet, seed, build).unwrap();
        let theirs = build(peer::weights(&checkpoint).unwrap()).unwrap();
        let parsed = UNetConfig::parse(&config).unwrap();
        let unet = ours(&checkpoint, &device, |loader| UNet::load(parsed, loader));
        let (text, candle_text) = noise(seed + 1, &[2, 77, 24], &device);
        let text = unet.text_key_values(&text).unwrap();
        for ([height, width], timestep) in [([16, 8], 981.0), ([9, 5], 333.25)] {
            let (latents, candle) = noise(seed + 2, &[2, 4, height, width], &device);
            let expected = theirs.forward(&candle, timestep, &candle_text).unwrap();
            let timestep = Tensor::from_slice(&[timestep as f32], 1, &device).unwrap();
            let found = unet.forward(&latents, &timestep, &text).unwrap();
            check_close(&format!("{what} {height}x{width}, seed {seed}"), &found, &expected);
        }
    }
}
