//! Every stage against diffusers and transformers, on miniature models in the published layouts.
//! `tests/fixtures/README.md` says how the numbers were made.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor as Golden};
use tiny_sd::backend::cpu;
use tiny_sd::image::{ImageSize, Picture};
use tiny_sd::pipeline::{Additions, LoadOptions, PictureRequest, Pipeline, Placement, TextOptions};
use tiny_sd::progress::Silent;
use tiny_sd::schedule::{SchedulerChoice, SchedulerKind};
use tiny_sd::tensor::Tensor;
use tiny_sd::tokenizer::Tokenizer;
use tiny_sd::weights::Model;

type Cpu = cpu::Storage;

const MODELS: [&str; 3] = ["tiny", "sd1", "sd2"];

/// Where they are now: tests may have been carried to another machine.
pub fn fixtures() -> PathBuf {
    let root = std::env::var_os("CARGO_MANIFEST_DIR");
    let root = root.map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    root.join("tests/fixtures")
}

pub fn goldens(model: &str, file: &str) -> HashMap<String, Golden> {
    let path = fixtures().join("golden").join(model).join(file);
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

pub fn load(
    model: &str,
    scheduler: Option<SchedulerChoice>,
    device: &cpu::Device,
) -> Pipeline<Cpu> {
    let folder = Model::open(fixtures().join("models").join(model), None).unwrap();
    let options = LoadOptions {
        dtype: DType::F32,
        variant: None,
        scheduler,
        encodes: false,
        additions: Additions::default(),
    };
    Pipeline::load(&folder, &options, Placement::whole(device), &Silent).unwrap()
}

fn device() -> cpu::Device {
    cpu::Device::with_threads(2).unwrap()
}

fn values(golden: &Golden) -> Vec<f32> {
    golden.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

pub fn upload(golden: &Golden, device: &cpu::Device) -> Tensor<Cpu> {
    Tensor::from_slice(&values(golden), golden.dims(), device).unwrap()
}

/// The largest difference, as a part of the largest value.
pub fn check_close(what: &str, found: &[f32], golden: &Golden, tolerance: f32) {
    let expected = values(golden);
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(worst <= tolerance * largest, "{what}: {} of {tolerance}", worst / largest);
    assert!(found.iter().all(|value| value.is_finite()), "{what}");
}

fn ids(golden: &Golden) -> Vec<u32> {
    golden.to_dtype(DType::U32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn text_embeddings_are_those_of_transformers() {
    let device = device();
    for model in MODELS {
        let (pipeline, goldens) =
            (load(model, None, &device), goldens(model, "stages.safetensors"));
        for prompt in ["prompt", "negative", "over_long"] {
            let ids = ids(&goldens[&format!("{prompt}_ids")]);
            let ids = Tensor::from_slice(&ids, (1, ids.len()), &device).unwrap();
            let found = pipeline.text_encoder.forward(&ids).unwrap().to_vec::<f32>().unwrap();
            let golden = &goldens[&format!("{prompt}_embeddings")];
            check_close(&format!("{model} {prompt}"), &found, golden, 2e-5);
        }
    }
}

#[test]
fn a_unet_evaluation_is_that_of_diffusers_at_odd_sizes_and_fractional_timesteps_too() {
    let device = device();
    for (model, tolerance) in [("tiny", 1e-5), ("sd1", 1e-5), ("sd2", 5e-5)] {
        let (pipeline, goldens) =
            (load(model, None, &device), goldens(model, "stages.safetensors"));
        let timestep = upload(&goldens["unet_timestep"], &device).reshape(1).unwrap();
        let text =
            Golden::cat(&[&goldens["negative_embeddings"], &goldens["prompt_embeddings"]], 0);
        let text = pipeline.unet.text_key_values(&upload(&text.unwrap(), &device)).unwrap();
        for size in ["unet", "unet_tall", "unet_odd"] {
            let sample = upload(&goldens[&format!("{size}_sample")], &device);
            let found = pipeline.unet.forward(&sample, &timestep, &text).unwrap();
            let golden = &goldens[&format!("{size}_output")];
            assert_eq!(found.dims(), golden.dims());
            let found = found.to_vec::<f32>().unwrap();
            check_close(&format!("{model} {size}"), &found, golden, tolerance);
        }
    }
}

#[test]
fn a_decoded_image_is_that_of_diffusers_and_so_are_its_pixels() {
    let device = device();
    for model in MODELS {
        let (pipeline, goldens) =
            (load(model, None, &device), goldens(model, "stages.safetensors"));
        for size in ["vae", "vae_odd"] {
            let latents = upload(&goldens[&format!("{size}_latents")], &device);
            let image = pipeline.vae.forward(&latents).unwrap();
            let golden = &goldens[&format!("{size}_image")];
            let found = image.to_vec::<f32>().unwrap();
            check_close(&format!("{model} {size}"), &found, golden, 2e-5);
            let exact = upload(golden, &device).pixels().unwrap().to_vec::<u8>().unwrap();
            let pixels: Vec<u8> = values(&goldens[&format!("{size}_pixels")])
                .into_iter()
                .map(|value| value as u8)
                .collect();
            assert_eq!(exact, pixels, "{model} {size}");
        }
    }
}

#[test]
fn whole_trajectories_are_those_of_diffusers() {
    let device = device();
    for model in MODELS {
        let goldens = goldens(model, "trajectories.safetensors");
        let case = cases(model).remove("base").unwrap();
        for name in ["dpm++2m", "ddim", "pndm", "euler", "euler-a"] {
            let choice = SchedulerChoice::parse(name).unwrap();
            let pipeline = load(model, Some(choice), &device);
            for steps in [4, 7] {
                let what = format!("{model} {name} {steps}");
                let request = PictureRequest { steps, ..case.request() };
                let mut found = Vec::new();
                let mut observe = |latents: &Tensor<Cpu>| {
                    found.extend(latents.to_vec::<f32>()?);
                    Ok(())
                };
                pipeline.latents(&[request], &Silent, &mut observe).unwrap();
                let golden = &goldens[&format!("{name}.{steps}.latents")];
                check_close(&what, &found, golden, 1e-4);
                let plan = pipeline.scheduler.plan(steps).unwrap();
                let timesteps: Vec<f64> = plan.steps.iter().map(|step| step.timestep).collect();
                let golden = &goldens[&format!("{name}.{steps}.timesteps")];
                assert_eq!(timesteps, golden.to_vec1::<f64>().unwrap(), "{what}");
            }
        }
    }
}

#[test]
fn every_scheduler_makes_the_latents_of_diffusers_and_draws_its_noise() {
    let pipeline = load("tiny", None, &device());
    let case = cases("tiny").remove("base").unwrap();
    let goldens = goldens("tiny", "schedulers.safetensors");
    let mut made = Vec::new();
    for (name, golden) in &goldens {
        let choice = SchedulerChoice::parse(name).unwrap();
        assert_eq!(choice.to_string(), *name);
        let request = PictureRequest { scheduler: Some(choice), steps: 5, ..case.request() };
        let found = pipeline.latents(&[request], &Silent, &mut |_| Ok(())).unwrap();
        check_close(name, &found.to_vec::<f32>().unwrap(), golden, 1e-4);
        made.push(choice.kind());
    }
    for kind in SchedulerKind::ALL {
        let spreads = if kind.info().takes_sigma_schedules { 3 } else { 0 };
        let count = made.iter().filter(|made| *made == kind).count();
        assert_eq!(count, 1 + spreads, "{kind:?}");
    }
}

/// One entry of cases.json.
pub struct Case {
    pub prompt: String,
    pub negative_prompt: String,
    pub scheduler: Option<SchedulerChoice>,
    size: ImageSize,
    steps: usize,
    guidance_scale: f64,
    seed: u64,
}

impl Case {
    pub fn request(&self) -> PictureRequest<'_> {
        PictureRequest {
            prompt: &self.prompt,
            negative_prompt: &self.negative_prompt,
            seed: self.seed,
            steps: self.steps,
            guidance_scale: self.guidance_scale,
            text: TextOptions::default(),
            size: self.size,
            image: None,
            scheduler: None,
            preview_every: None,
        }
    }
}

pub fn cases(model: &str) -> HashMap<String, Case> {
    let path = fixtures().join("golden").join(model).join("cases.json");
    let cases: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let case = |case: &serde_json::Value| {
        let text = |name: &str| case[name].as_str().map(str::to_owned);
        let number = |name: &str| case[name].as_u64().unwrap();
        let scheduler = text("scheduler").map(|name| SchedulerChoice::parse(&name).unwrap());
        let size = ImageSize { height: number("height") as usize, width: number("width") as usize };
        let case = Case {
            prompt: text("prompt").unwrap(),
            negative_prompt: text("negative_prompt").unwrap_or_default(),
            size,
            scheduler,
            steps: number("steps") as usize,
            guidance_scale: case["guidance_scale"].as_f64().unwrap(),
            seed: number("seed"),
        };
        (text("name").unwrap(), case)
    };
    cases
        .as_array()
        .unwrap()
        .iter()
        .map(|value| {
            let (_, parsed) = case(value);
            (value["name"].as_str().unwrap().to_owned(), parsed)
        })
        .collect()
}

pub fn golden_picture(model: &str, case: &str) -> Vec<u8> {
    let path = fixtures().join("golden").join(model).join(format!("{case}.png"));
    let file = std::io::BufReader::new(std::fs::File::open(path).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut rgb).unwrap();
    rgb
}

/// Peak signal to noise in dB.
pub fn psnr(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len());
    let squares = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
    let mean = squares.sum::<f64>() / a.len() as f64;
    if mean == 0.0 { f64::INFINITY } else { 10.0 * (255.0f64.powi(2) / mean).log10() }
}

#[test]
fn every_picture_is_the_one_that_diffusers_makes() {
    let device = device();
    for model in MODELS {
        for (name, case) in cases(model) {
            let pipeline = load(model, case.scheduler, &device);
            let picture: Picture = pipeline.paint(&case.request(), &Silent).unwrap();
            let found = psnr(picture.rgb(), &golden_picture(model, &name));
            assert!(found >= 50.0, "{model} {name}: {found:.1} dB");
        }
    }
}

#[test]
fn prompts_become_the_ids_that_transformers_gives() {
    let text = std::fs::read_to_string(fixtures().join("golden/tokenizer.json")).unwrap();
    let goldens: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (name, cases) in goldens.as_object().unwrap() {
        // The vocabulary is there once; each tokenizer's own settings lie over it.
        let folder = tempfile::tempdir().unwrap();
        for source in ["tokenizer", name] {
            for entry in std::fs::read_dir(fixtures().join(source)).unwrap() {
                let entry = entry.unwrap();
                std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
            }
        }
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        // What models without a tokenizer have, from the program itself.
        let pad_token = if name == "tokenizer" { "<|endoftext|>" } else { "!" };
        let clip = Tokenizer::clip(pad_token).unwrap();
        for case in cases.as_array().unwrap() {
            let prompt = case["prompt"].as_str().unwrap();
            let encoding = tokenizer.encode(prompt).unwrap();
            assert_eq!(clip.encode(prompt).unwrap(), encoding, "{name} {prompt:?}");
            let ids: Vec<u64> = encoding.ids.iter().map(|id| u64::from(*id)).collect();
            let golden: Vec<u64> =
                case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
            assert_eq!(ids, golden, "{name} {prompt:?}");
            assert_eq!(encoding.truncated.is_some(), case["cut_off"].is_string(), "{prompt:?}");
        }
    }
}
