//! Models in one file: the same weights, and the same pictures, as in a folder. The files are put
//! together as `tests/generate_single_files.py` says, which has checked them with diffusers.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::DType;
use tempfile::TempDir;
use tiny_sd::backend::{HostTensor, cpu};
use tiny_sd::pipeline::{Additions, LoadOptions, Pipeline, Placement};
use tiny_sd::progress::Silent;
use tiny_sd::weights::{Checkpoint, Component, Model, TokenizerFiles, UsedTensors};

use super::end_to_end::{read_png, run};
use super::golden::{cases, fixtures, golden_picture, psnr};

fn folder(name: &str) -> PathBuf {
    fixtures().join("models").join(name)
}

fn single(name: &str) -> PathBuf {
    fixtures().join("single").join(name)
}

/// A tensor of a file to be written.
pub struct Entry {
    pub name: String,
    dtype: DType,
    shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Entry {
    /// The tensor under a name.
    pub fn of(name: &str, tensor: &HostTensor) -> Self {
        let mut bytes = Vec::new();
        tensor.row_major(&mut |more| bytes.extend_from_slice(more));
        let (dtype, shape) = (tensor.dtype(), tensor.layout().dims().to_vec());
        Self { name: name.into(), dtype, shape, bytes }
    }
}

/// The bytes of a safetensors file.
pub fn safetensors(entries: &[Entry]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for Entry { name, dtype, shape, bytes } in entries {
        let start = data.len();
        data.extend_from_slice(bytes);
        let dtype = dtype.as_str().to_uppercase();
        let entry = serde_json::json!(
            {"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), entry);
    }
    let header = serde_json::Value::from(header).to_string().into_bytes();
    [&(header.len() as u64).to_le_bytes(), &*header, &*data].concat()
}

fn part<'c>(checkpoint: &'c Checkpoint, name: &str) -> &'c HostTensor {
    checkpoint.get(name).unwrap_or_else(|| panic!("there is no {name}"))
}

/// The tensors that one line of the generator's text stands for.
fn entries(prefix: &str, line: &str, weights: &Checkpoint) -> Vec<Entry> {
    let (theirs, ours) = line.trim().split_once(' ').unwrap();
    let (is_convolution, ours) = match ours.strip_prefix('=') {
        Some(ours) => (true, ours),
        None => (false, ours),
    };
    let kinds: &[&str] = if theirs.ends_with('*') { &["weight", "bias"] } else { &[""] };
    let entry = |kind: &&str| {
        let ours: Vec<_> =
            ours.split(' ').map(|name| part(weights, &name.replace('*', kind))).collect();
        let mut shape = ours[0].layout().dims().to_vec();
        shape[0] *= ours.len();
        if is_convolution && shape.len() == 2 {
            shape.extend([1, 1]);
        }
        let mut bytes = Vec::new();
        ours.iter().for_each(|tensor| tensor.row_major(&mut |more| bytes.extend_from_slice(more)));
        let name = format!("{prefix}{}", theirs.replace('*', kind));
        Entry { name, dtype: ours[0].dtype(), shape, bytes }
    };
    kinds.iter().map(entry).collect()
}

/// The file of the original code with the weights of a miniature model, and what else such files
/// have: weights of training, in types that are not read.
pub fn assemble(name: &str) -> Vec<Entry> {
    let model = Model::open(folder(name), None).unwrap();
    let text = fs::read_to_string(single(&format!("{name}.txt"))).unwrap();
    let (mut file, mut now) = (Vec::new(), None);
    for line in text.lines() {
        if let Some((component, prefix)) = line.split_once(' ').filter(|(name, _)| !name.is_empty())
        {
            let component = Component::ALL.into_iter().find(|known| known.folder() == component);
            now = Some((prefix.to_owned(), model.checkpoint(component.unwrap(), None).unwrap()));
        } else {
            let (prefix, weights) = now.as_ref().unwrap();
            file.extend(entries(prefix, line, weights));
        }
    }
    let other = |name: &str, dtype, bytes: &[u8]| Entry {
        name: name.into(),
        dtype,
        shape: vec![],
        bytes: bytes.to_vec(),
    };
    file.push(other("model_ema.num_updates", DType::U32, &[0; 4]));
    file.push(other("model_ema.diffusion_modelinput_blocks00weight", DType::F16, &[0; 2]));
    file.push(other("first_stage_model.loss.logvar", DType::F64, &[0; 8]));
    file.push(other("alphas_cumprod", DType::F32, &[0; 4]));
    file
}

/// The pixels of a PNG.
pub fn pixels(path: &Path) -> Vec<u8> {
    let file = std::io::BufReader::new(fs::File::open(path).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut rgb).unwrap();
    rgb
}

fn hash(model: &Model) -> String {
    UsedTensors::open(model, None).unwrap().hash()
}

#[test]
fn a_model_in_one_file_has_the_very_weights_of_its_folder() {
    let scratch = TempDir::new().unwrap();
    for name in ["sd2", "tiny"] {
        let path = scratch.path().join("model.safetensors");
        fs::write(&path, safetensors(&assemble(name))).unwrap();
        let (file, folder) =
            (Model::open(&path, Some(&folder(name))), Model::open(folder(name), None));
        let (file, folder) = (file.unwrap(), folder.unwrap());
        for component in Component::ALL {
            let here = file.checkpoint(component, None).unwrap();
            let there = folder.checkpoint(component, None).unwrap();
            let names = |weights: &Checkpoint| -> Vec<_> {
                weights.iter().map(|(name, _)| name.to_owned()).collect()
            };
            assert_eq!(names(&here), names(&there), "{name}");
            for (tensor, found) in here.iter() {
                let expected = part(&there, tensor);
                assert_eq!(found.layout().dims(), expected.layout().dims(), "{name} {tensor}");
                assert_eq!(found.digest(), expected.digest(), "{name} {tensor}");
                // It is where it was in the file: nothing was copied.
                let origin = found.origin().unwrap();
                assert_eq!(origin.file.path, path.canonicalize().unwrap(), "{tensor}");
            }
        }
        assert_eq!(hash(&file), hash(&folder));
        let device = cpu::Device::with_threads(2).unwrap();
        let options = LoadOptions {
            dtype: DType::F32,
            variant: None,
            scheduler: None,
            encodes: false,
            additions: Additions::default(),
        };
        let placement = Placement::whole(&device);
        let pipeline = Pipeline::<cpu::Storage>::load(&file, &options, placement, &Silent).unwrap();
        let case = cases(name).remove("base").unwrap();
        let picture = pipeline.paint(&case.request(), &Silent).unwrap();
        let found = psnr(picture.rgb(), &golden_picture(name, "base"));
        assert!(found >= 50.0, "{name}: {found:.1} dB");
    }
}

#[test]
fn query_key_and_value_of_open_clip_are_parts_of_one_tensor() {
    let scratch = TempDir::new().unwrap();
    let path = scratch.path().join("model.safetensors");
    fs::write(&path, safetensors(&assemble("sd2"))).unwrap();
    let model = Model::open(&path, Some(&folder("sd2"))).unwrap();
    let text = model.checkpoint(Component::TextEncoder, None).unwrap();
    let [q, k, v] = ["q", "k", "v"].map(|kind| {
        part(&text, &format!("text_model.encoder.layers.1.self_attn.{kind}_proj.weight"))
    });
    let starts = [q, k, v].map(|tensor| tensor.layout().start_offset());
    assert_eq!(starts, [0, 32 * 32, 2 * 32 * 32]);
    assert_eq!(q.origin(), v.origin());
    assert_ne!(q.digest(), v.digest());
}

#[test]
fn a_training_checkpoint_alone_makes_diffusers_picture() {
    let scratch = TempDir::new().unwrap();
    let lone = single("lone.ckpt");
    let model = Model::open(&lone, None).unwrap();
    assert_eq!(model.tokenizer(), TokenizerFiles::Clip { pad_token: "<|endoftext|>" });
    let words = ["A red fox, 4k", "-m", lone.to_str().unwrap(), "-o", "lone.png", "-s", "5"];
    let more = ["--steps", "4", "-W", "96", "-H", "64", "--threads", "2", "--dtype", "f32"];
    let home = [("HOME", "home")];
    let output = run(scratch.path(), &[&words[..], &more].concat(), &home);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    let made = scratch.path().join("lone.png");
    let (rgb, parameters) = read_png(&made);
    assert!(parameters.contains("Model: lone,"), "{parameters}");
    let found = psnr(&rgb, &pixels(&single("lone.png")));
    assert!(found >= 50.0, "{found:.1} dB");
    // The record leads back to the file.
    let output = run(scratch.path(), &["verify", "lone.png", "--threads", "2"], &home);
    let answer = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(answer.trim(), "lone.png: bit-exact");
    let output = run(scratch.path(), &["info", lone.to_str().unwrap()], &home);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    for expected in ["lone.ckpt: a model in one file", "pndm", "512x512", "UNet2DConditionModel"] {
        assert!(said.contains(expected), "{said}");
    }
}

#[test]
fn what_is_no_whole_model_of_these_families_is_refused_by_what_it_is() {
    let scratch = TempDir::new().unwrap();
    let path = scratch.path().join("model.safetensors");
    let message = |file: &[Entry], configs: Option<&Path>| {
        fs::write(&path, safetensors(file)).unwrap();
        let read = |model: Model| {
            Component::ALL.into_iter().try_for_each(|component| {
                model.config(component)?;
                model.checkpoint(component, None).map(drop)
            })
        };
        let error = Model::open(&path, configs).and_then(read).unwrap_err().to_string();
        assert!(!error.contains('\n') && error.contains("model.safetensors"), "{error}");
        error
    };
    let named = |name: &str| Entry {
        name: name.into(),
        dtype: DType::F16,
        shape: vec![1],
        bytes: vec![0; 2],
    };
    for (name, expected) in [
        ("conditioner.embedders.0.x", "this is SDXL"),
        ("model.diffusion_model.joint_blocks.0.x", "this is SD 3"),
        ("lora_unet_x.alpha", "this is a LoRA"),
        ("x", "lacks its UNet (model.diffusion_model.input_blocks.…), its VAE"),
        ("model.diffusion_model.input_blocks.0.0.bias", "lacks its VAE (first_stage_model."),
    ] {
        let error = message(&[named(name)], None);
        assert!(error.contains(expected), "{error}");
    }
    let without = |end: &str| -> Vec<Entry> {
        assemble("tiny").into_iter().filter(|entry| !entry.name.ends_with(end)).collect()
    };
    let error = message(&without("first_stage_model.decoder.conv_in.weight"), None);
    assert!(error.contains("\"decoder.conv_in.weight\" is missing"), "{error}");
    let mut doubled = assemble("tiny");
    doubled.iter_mut().filter(|entry| entry.name.ends_with("quant_conv.bias")).for_each(|entry| {
        entry.dtype = DType::F64;
        entry.bytes.resize(entry.shape[0] * 8, 0);
    });
    let error = message(&doubled, None);
    assert!(error.contains("quant_conv.bias\": it has elements of \"F64\""), "{error}");
    let mut thirds = assemble("sd2");
    thirds.iter_mut().filter(|entry| entry.name.ends_with("1.attn.in_proj_bias")).for_each(
        |entry| {
            entry.shape = vec![95];
            entry.bytes.truncate(190);
        },
    );
    let error = message(&thirds, Some(&folder("sd2")));
    assert!(error.contains("95 rows are not those of query, key and value"), "{error}");
    let error = Model::open(&path, Some(scratch.path())).unwrap_err().to_string();
    assert!(error.contains("it has none of text_encoder/config.json, "), "{error}");
    let error = Model::open(scratch.path().join("no.ckpt"), None).unwrap_err().to_string();
    assert!(error.contains("no.ckpt"), "{error}");
}
