//! Latents to pixels by other ways: in tiles, for lack of memory and unasked, and in f32 where a
//! VAE's numbers are too large for f16.

use std::fs;
use std::path::Path;
use std::sync::Mutex;

use candle_core::DType;
use half::f16;
use tempfile::TempDir;
use tiny_sd::Result;
use tiny_sd::backend::{Backend, cpu};
use tiny_sd::image::ImageSize;
use tiny_sd::model::{AutoencoderConfig, AutoencoderDecoder};
use tiny_sd::nn::Loader;
use tiny_sd::pipeline::{Additions, LoadOptions, PictureRequest, Pipeline, Placement, TextOptions};
use tiny_sd::progress::{Event, Progress, Silent};
use tiny_sd::remote::executor::Limits;
use tiny_sd::remote::storage::Storage;
use tiny_sd::tensor::Tensor;
use tiny_sd::weights::{Component, LoneVae, Model};

use super::golden::{fixtures, psnr};
use super::protocol::{LIMITS, Worker};
use super::single::{Entry, safetensors};

type Cpu = cpu::Storage;

fn model(name: &str) -> Model {
    Model::open(fixtures().join("models").join(name), None).unwrap()
}

fn decoder(path: &Path, device: &cpu::Device) -> AutoencoderDecoder<Cpu> {
    let vae = LoneVae::open(path).unwrap();
    let config = AutoencoderConfig::parse(&vae.config().unwrap()).unwrap();
    let weights = vae.checkpoint(None).unwrap();
    let mut loaded = |_| Ok(());
    let loader = Loader::new(&weights, device, DType::F32, &mut loaded);
    AutoencoderDecoder::load(config, loader).unwrap()
}

/// Latents that change slowly, as those of pictures do, and differ from corner to corner.
fn latents(height: usize, width: usize, device: &cpu::Device) -> Tensor<Cpu> {
    let value = |n: usize| {
        let (channel, y, x) = (n / (height * width), n / width % height, n % width);
        let (y, x) = (y as f32 / 96.0, x as f32 / 96.0);
        let phase = channel as f32;
        (7.0 * y + phase).sin() + (5.0 * x * (1.0 + y) - phase).cos() + 0.5 * (23.0 * x * y).sin()
    };
    let values: Vec<f32> = (0..4 * height * width).map(value).collect();
    Tensor::from_slice(&values, (1, 4, height, width), device).unwrap()
}

#[test]
fn an_image_in_tiles_is_the_untiled_one_without_seams() {
    let device = cpu::Device::with_threads(2).unwrap();
    let models = fixtures().join("models");
    // 768×768, and a strip that is narrower than a tile.
    for (name, height, width) in [("tiny", 96, 96), ("sd2", 96, 64), ("sd1", 150, 5)] {
        let decoder = decoder(&models.join(name).join("vae"), &device);
        let latents = latents(height, width, &device);
        let [whole, tiled] = [decoder.forward(&latents), decoder.forward_tiled(&latents)];
        let [whole, tiled] = [whole.unwrap(), tiled.unwrap()];
        assert_eq!(tiled.dims(), [1, 3, 8 * height, 8 * width]);
        let difference = |values: (&f32, &f32)| f64::from((values.0 - values.1).abs());
        let (a, b) = (whole.to_vec::<f32>().unwrap(), tiled.to_vec::<f32>().unwrap());
        let worst = a.iter().zip(&b).map(difference).fold(0.0, f64::max);
        assert!(worst > 0.0, "{name}: nothing was cut");
        let [a, b] = [&whole, &tiled].map(|image| image.pixels().unwrap().to_vec::<u8>().unwrap());
        let found = psnr(&a, &b);
        assert!(found >= 50.0, "{name}: {found:.1} dB");
    }
}

#[test]
fn a_tiny_vae_in_tiles_makes_the_very_image() {
    let device = cpu::Device::with_threads(2).unwrap();
    let decoder = decoder(&fixtures().join("vaes/tiny"), &device);
    let latents = latents(70, 90, &device);
    let whole = decoder.forward(&latents).unwrap().to_vec::<f32>().unwrap();
    let tiled = decoder.forward_tiled(&latents).unwrap().to_vec::<f32>().unwrap();
    let worst = whole.iter().zip(&tiled).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(worst < 1e-5, "{worst}");
}

/// What a run warned of.
#[derive(Default)]
struct Warnings(Mutex<Vec<String>>);

impl Progress for Warnings {
    fn report(&self, event: Event<'_>) {
        if let Event::Warning(text) = event {
            self.0.lock().unwrap().push(text.to_owned());
        }
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }
}

fn request(size: ImageSize) -> PictureRequest<'static> {
    PictureRequest {
        image: None,
        text: TextOptions::default(),
        prompt: "a red cube",
        negative_prompt: "",
        seed: 4,
        steps: 1,
        guidance_scale: 1.0,
        size,
        scheduler: None,
        preview_every: None,
    }
}

fn load<B: Backend>(model: &Model, dtype: DType, device: &B::Device) -> Pipeline<B> {
    let additions = Additions::default();
    let options = LoadOptions { dtype, variant: None, scheduler: None, encodes: false, additions };
    Pipeline::load(model, &options, Placement::whole(device), &Silent).unwrap()
}

#[test]
fn a_worker_without_the_memory_for_a_decoder_decodes_in_tiles() {
    let worker = Worker::new().unwrap();
    let model = model("tiny");
    for component in Component::ALL {
        for (_, tensor) in model.checkpoint(component, None).unwrap().iter() {
            worker.insert(tensor).unwrap();
        }
    }
    let request = request(ImageSize { height: 768, width: 768 });
    let paint = |memory_bytes: u64, vae_tiling: bool| {
        let limits = Limits { memory_bytes, ..LIMITS };
        let session = worker.connect_with("worker", limits).unwrap();
        let mut pipeline = load::<Storage>(&model, DType::F32, &session.device());
        pipeline.vae_tiling = vae_tiling;
        let warnings = Warnings::default();
        let picture = pipeline.paint(&request, &warnings).unwrap();
        (picture.rgb().to_vec(), warnings.0.into_inner().unwrap())
    };
    let (untiled, none) = paint(1 << 30, false);
    let (tiled, still_none) = paint(MEMORY, true);
    assert!(none.is_empty() && still_none.is_empty(), "{none:?} {still_none:?}");
    let (unasked, warnings) = paint(MEMORY, false);
    let [warning] = &*warnings else { panic!("{warnings:?}") };
    assert!(warning.contains("out of memory: ") && warning.contains("--vae-tiling"), "{warning}");
    assert!(unasked == tiled, "another picture");
    let found = psnr(&untiled, &tiled);
    assert!(found >= 45.0, "{found:.1} dB");
}

/// Too little for a miniature decoder at 768×768, and enough for it in tiles.
const MEMORY: u64 = 40 << 20;

/// The tiny model with a VAE whose first convolution leaves the range of f16.
fn with_large_numbers(scratch: &TempDir) -> Model {
    let vae = fixtures().join("models/tiny/vae");
    let weights = LoneVae::open(&vae).unwrap().checkpoint(None).unwrap();
    let entry = |(name, tensor): (&str, _)| {
        let mut entry = Entry::of(name, tensor);
        if name == "decoder.conv_in.weight" {
            entry.bytes = entry
                .bytes
                .chunks_exact(2)
                .map(|bytes| f16::from_le_bytes([bytes[0], bytes[1]]).to_f32())
                .flat_map(|value| f16::from_f32(value * 20_000.0).to_le_bytes())
                .collect();
        }
        entry
    };
    let file = safetensors(&weights.iter().map(entry).collect::<Vec<_>>());
    fs::write(scratch.path().join("diffusion_pytorch_model.safetensors"), file).unwrap();
    fs::copy(vae.join("config.json"), scratch.path().join("config.json")).unwrap();
    model("tiny").with_vae(Some(LoneVae::open(scratch.path()).unwrap()))
}

fn check_overflow<B: Backend>(device: &B::Device) {
    let scratch = TempDir::new().unwrap();
    let model = with_large_numbers(&scratch);
    let request = request(ImageSize { height: 64, width: 64 });
    let paint = |dtype| {
        let warnings = Warnings::default();
        let pipeline = load::<B>(&model, dtype, device);
        let picture = pipeline.paint(&request, &warnings).unwrap();
        // The second time the decoder is there already.
        assert_eq!(pipeline.paint(&request, &Silent).unwrap(), picture);
        (picture.rgb().to_vec(), warnings.0.into_inner().unwrap())
    };
    let (narrow, warnings) = paint(DType::F16);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].ends_with("decoding again in f32"), "{warnings:?}");
    let (wide, none) = paint(DType::F32);
    assert!(none.is_empty(), "{none:?}");
    let found = psnr(&narrow, &wide);
    assert!(found >= 30.0, "{found:.1} dB");
}

#[test]
fn a_vae_that_leaves_the_range_of_f16_decodes_in_f32() {
    check_overflow::<Cpu>(&cpu::Device::with_threads(2).unwrap());
    let worker = Worker::new().unwrap();
    check_overflow::<Storage>(&worker.connect("worker").unwrap().device());
}
