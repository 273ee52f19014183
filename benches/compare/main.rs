//! Our side of `benches/compare/run`: loads a model, then evaluates a stage for each line of
//! standard input. Separate from the criterion benches because the other side is a process of
//! another language: both stay loaded, and only the one that is told to works.
//!
//! Lines: `run STAGE` and `calibrate` answer with seconds, `save STAGE PATH` writes the result.

use std::fs;
use std::hint::black_box;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::DType;
use tiny_sd::backend::GroupNorm;
use tiny_sd::backend::cpu::{Device, Storage};
use tiny_sd::model::unet::{TextKeyValues, UNetConfig};
use tiny_sd::model::vae::VaeConfig;
use tiny_sd::model::{Decoder, UNet};
use tiny_sd::nn::Loader;
use tiny_sd::tensor::Tensor;
use tiny_sd::weights::{Component, Model};

type Cpu = Tensor<Storage>;
/// Norms in a row that are one evaluation of the stage `norm`, and their channels.
const NORMS: usize = 20;
const NORM_CHANNELS: usize = 320;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// What the command line says.
struct Options {
    model: PathBuf,
    /// Of the operands, as raw f32.
    inputs: PathBuf,
    stages: Vec<String>,
    dtype: DType,
    threads: usize,
    /// Height and width of the latents.
    side: usize,
}

fn main() -> Result<()> {
    // `cargo bench` runs every target; this one has nothing to say alone.
    let Some(options) = options()? else {
        println!("run benches/compare/run, which measures this beside torch");
        return Ok(());
    };
    let began = Instant::now();
    let device = Device::with_threads(options.threads)?;
    let stages = Stages::load(&options, &device)?;
    answer(&[began.elapsed().as_secs_f64(), device.threads() as f64])?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        match line.split(' ').collect::<Vec<_>>().as_slice() {
            ["calibrate"] => answer(&calibrate(device.threads()))?,
            ["run", stage] => {
                let began = Instant::now();
                black_box(stages.evaluate(stage)?);
                answer(&[began.elapsed().as_secs_f64()])?;
            }
            ["save", stage, path] => {
                let values = stages.evaluate(stage)?.to_dtype(DType::F32)?.to_vec::<f32>()?;
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                fs::write(path, bytes)?;
                answer(&[])?;
            }
            _ => return Err(format!("{line:?} is no command").into()),
        }
    }
    Ok(())
}

fn answer(figures: &[f64]) -> Result<()> {
    let figures: Vec<String> = figures.iter().map(f64::to_string).collect();
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "ok {}", figures.join(" "))?;
    Ok(stdout.flush()?)
}

fn options() -> Result<Option<Options>> {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |name: &str| {
        let place = arguments.iter().position(|argument| argument == name)?;
        arguments.get(place + 1).cloned()
    };
    let Some(model) = value("--model") else { return Ok(None) };
    let needed = |name: &str| value(name).ok_or(format!("{name} is missing"));
    Ok(Some(Options {
        model: model.into(),
        inputs: needed("--inputs")?.into(),
        stages: needed("--stages")?.split(',').map(str::to_owned).collect(),
        dtype: needed("--dtype")?.parse()?,
        threads: needed("--threads")?.parse()?,
        side: needed("--side")?.parse()?,
    }))
}

/// What is measured, loaded, with its operands.
struct Stages {
    unet: Option<(UNet<Storage>, Cpu, Cpu, TextKeyValues<Storage>)>,
    vae: Option<(Decoder<Storage>, Cpu)>,
    norm: Option<Norm>,
}

impl Stages {
    fn load(options: &Options, device: &Device) -> Result<Self> {
        let folder = Model::open(&options.model, None)?;
        let has = |stage: &str| options.stages.iter().any(|known| known == stage);
        let (side, inputs) = (options.side, &options.inputs);
        let mut loaded = Self { unet: None, vae: None, norm: None };
        if has("unet") {
            let config = UNetConfig::parse(&folder.config(Component::Unet)?)?;
            let (channels, width) = (config.in_channels, config.cross_attention_dim);
            let checkpoint = folder.checkpoint(Component::Unet, None)?;
            let loaded_bytes = &mut |_| Ok(());
            let loader = Loader::new(&checkpoint, device, options.dtype, loaded_bytes);
            let unet = UNet::load(config, loader)?;
            let latents = input(inputs, "unet-latents", &[2, channels, side, side], device)?;
            let text = input(inputs, "unet-text", &[2, 77, width], device)?;
            // Once for a picture, so no part of an evaluation.
            let text = unet.text_key_values(&text)?;
            let timestep = input(inputs, "unet-timestep", &[1], device)?;
            loaded.unet = Some((unet, latents, timestep, text));
        }
        if has("vae") {
            let config = VaeConfig::parse(&folder.config(Component::Vae)?)?;
            let shape = [1, config.latent_channels, side, side];
            let checkpoint = folder.checkpoint(Component::Vae, None)?;
            let loaded_bytes = &mut |_| Ok(());
            let loader = Loader::new(&checkpoint, device, options.dtype, loaded_bytes);
            let vae = Decoder::load(config, loader)?;
            loaded.vae = Some((vae, input(inputs, "vae-latents", &shape, device)?));
        }
        if has("norm") {
            let shape = [2, NORM_CHANNELS, side, side];
            let image = input(inputs, "norm-image", &shape, device)?.to_dtype(options.dtype)?;
            loaded.norm = Some(Norm {
                // As images lie between ops.
                image: image.permute(&[0, 2, 3, 1])?.contiguous()?.permute(&[0, 3, 1, 2])?,
                weight: input(inputs, "norm-weight", &[NORM_CHANNELS], device)?
                    .to_dtype(options.dtype)?,
            });
        }
        Ok(loaded)
    }

    fn evaluate(&self, stage: &str) -> Result<Cpu> {
        Ok(match (stage, &self.unet, &self.vae, &self.norm) {
            ("unet", Some((unet, latents, timestep, text)), ..) => {
                unet.forward(latents, timestep, text)?
            }
            ("vae", _, Some((vae, latents)), _) => vae.forward(latents)?,
            ("norm", .., Some(norm)) => norm.evaluate()?,
            _ => return Err(format!("{stage} is not loaded").into()),
        })
    }
}

/// GroupNorm with SiLU, again and again, at the size of the UNet's first block.
struct Norm {
    /// (2, channels, height, width)
    image: Cpu,
    /// (channels); the bias too
    weight: Cpu,
}

impl Norm {
    fn evaluate(&self) -> Result<Cpu> {
        let op = GroupNorm { groups: 32, eps: 1e-5, silu: true };
        let mut image = self.image.clone();
        for _ in 0..NORMS {
            image = image.group_norm(&self.weight, &self.weight, op)?;
        }
        Ok(image)
    }
}

fn input(folder: &Path, name: &str, dims: &[usize], device: &Device) -> Result<Cpu> {
    let bytes = fs::read(folder.join(name))?;
    let (values, _) = bytes.as_chunks::<4>();
    let values: Vec<f32> = values.iter().map(|value| f32::from_le_bytes(*value)).collect();
    Ok(Tensor::from_slice(&values, dims, device)?)
}

/// Seconds of a loop that stays in the registers: on one thread, then on all of them at once. Where
/// nobody else works, both are the same as ever.
fn calibrate(threads: usize) -> [f64; 2] {
    let all = |threads: usize| {
        std::thread::scope(|scope| {
            let started: Vec<_> = (0..threads).map(|_| scope.spawn(multiply_and_add)).collect();
            let times = started.into_iter().map(|thread| thread.join().unwrap_or_default());
            times.max().unwrap_or_default().as_secs_f64()
        })
    };
    [all(1), all(threads)]
}

fn multiply_and_add() -> Duration {
    let began = Instant::now();
    let (mut sums, factor) = ([[1f32; 4]; 8], black_box(0.999_999_9));
    for _ in 0..12_000_000u32 {
        for sum in sums.iter_mut().flatten() {
            *sum = *sum * factor + 1e-7;
        }
    }
    black_box(sums);
    began.elapsed()
}
