//! VAEs that are given apart from their model: in folders and files of every layout, and the tiny
//! one against diffusers (`tests/generate_vaes.py`).

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use candle_core::DType;
use tempfile::TempDir;
use tiny_sd::backend::cpu;
use tiny_sd::cli::Settings;
use tiny_sd::image::PictureTexts;
use tiny_sd::model::{AutoencoderConfig, AutoencoderDecoder};
use tiny_sd::nn::Loader;
use tiny_sd::tensor::Tensor;
use tiny_sd::weights::{Checkpoint, Component, LoneVae, Model};

use super::end_to_end::{hub, hub_of, read_png, run};
use super::golden::{cases, fixtures, golden_picture, psnr};
use super::single::{Entry, assemble, safetensors};

fn vaes() -> PathBuf {
    fixtures().join("vaes")
}

fn model(name: &str) -> PathBuf {
    fixtures().join("models").join(name)
}

fn decoder(vae: &LoneVae, device: &cpu::Device) -> AutoencoderDecoder<cpu::Storage> {
    let config = AutoencoderConfig::parse(&vae.config().unwrap()).unwrap();
    let weights = vae.checkpoint(None).unwrap();
    let mut loaded = |_| Ok(());
    let loader = Loader::new(&weights, device, DType::F32, &mut loaded);
    AutoencoderDecoder::load(config, loader).unwrap()
}

/// The decoder of the tiny VAE as madebyollin publishes it: the layers are counted from one.
fn taesd() -> Vec<Entry> {
    let weights = LoneVae::open(vaes().join("tiny")).unwrap().checkpoint(None).unwrap();
    let ours = weights.iter().filter_map(|(name, tensor)| {
        let (number, rest) = name.strip_prefix("decoder.layers.")?.split_once('.')?;
        let number: usize = number.parse().unwrap();
        Some(Entry::of(&format!("{}.{rest}", number + 1), tensor))
    });
    ours.collect()
}

#[test]
fn a_tiny_vae_decodes_as_diffusers_does_from_a_folder_and_from_both_kinds_of_file() {
    let scratch = TempDir::new().unwrap();
    let original = scratch.path().join("taesd_decoder.safetensors");
    fs::write(&original, safetensors(&taesd())).unwrap();
    let device = cpu::Device::with_threads(2).unwrap();
    let golden = vaes().join("tiny.safetensors");
    let golden = candle_core::safetensors::load(golden, &candle_core::Device::Cpu).unwrap();
    let values = |name: &str| golden[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let latents = Tensor::from_slice(&values("latents"), (2, 4, 6, 5), &device).unwrap();
    let expected = values("image");
    let folder = vaes().join("tiny");
    let file = folder.join("diffusion_pytorch_model.safetensors");
    for path in [folder, file, original] {
        let decoder = decoder(&LoneVae::open(&path).unwrap(), &device);
        assert_eq!(decoder.scale_factor(), 8);
        let image = decoder.forward(&latents).unwrap();
        assert_eq!(image.dims(), [2, 3, 48, 40]);
        let found = image.to_vec::<f32>().unwrap();
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(worst < 2e-5, "{}: {worst}", path.display());
    }
}

#[test]
fn a_vae_in_one_file_has_the_weights_of_its_folder_under_any_names() {
    let scratch = TempDir::new().unwrap();
    let path = scratch.path().join("vae.safetensors");
    let folder = LoneVae::open(model("sd2").join("vae")).unwrap().checkpoint(None).unwrap();
    let check = |entries: &[Entry]| {
        fs::write(&path, safetensors(entries)).unwrap();
        let file = LoneVae::open(&path).unwrap().checkpoint(None).unwrap();
        let digests = |weights: &Checkpoint| -> Vec<_> {
            weights.iter().map(|(name, tensor)| (name.to_owned(), tensor.digest())).collect()
        };
        assert_eq!(digests(&file), digests(&folder));
    };
    let prefix = "first_stage_model.";
    let whole = assemble("sd2");
    check(&whole);
    let mut alone = whole;
    alone.retain(|entry| entry.name.starts_with(prefix));
    alone.iter_mut().for_each(|entry| entry.name = entry.name.replacen(prefix, "", 1));
    check(&alone);
    check(&folder.iter().map(|(name, tensor)| Entry::of(name, tensor)).collect::<Vec<_>>());
}

fn record(path: &Path) -> Settings {
    let texts = PictureTexts::read(&fs::read(path).unwrap()).unwrap();
    Settings::from_json(&texts.record.unwrap()).unwrap()
}

#[test]
fn a_picture_is_decoded_by_the_vae_that_was_asked_for_and_says_so() {
    let scratch = TempDir::new().unwrap();
    let home = [("HOME", "home")];
    let case = cases("tiny").remove("base").unwrap();
    let request = case.request();
    let (seed, steps) = (request.seed.to_string(), request.steps.to_string());
    let guidance = request.guidance_scale.to_string();
    let paint = |name: &str, vae: &Path| {
        let words = ["--prompt", request.prompt, "-o", name, "-s", &seed, "--steps", &steps];
        let model = model("tiny");
        let more = ["-g", &guidance, "--threads", "2", "-m", model.to_str().unwrap()];
        let more = [&more[..], &["-n", request.negative_prompt]].concat();
        let vae = ["--vae", vae.to_str().unwrap()];
        let output = run(scratch.path(), &[&words[..], &more, &vae].concat(), &home);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{stderr}");
        let path = scratch.path().join(name);
        (read_png(&path).0, record(&path))
    };
    let own = Model::open(model("tiny"), None).unwrap();
    let (rgb, same) = paint("same.png", &model("tiny"));
    let found = psnr(&rgb, &golden_picture("tiny", "base"));
    assert!(found >= 50.0, "{found:.1} dB");
    let hash = tiny_sd::weights::UsedTensors::open(&own, None).unwrap();
    // The same weights in its own VAE's place are the same model.
    assert_eq!(same.model.weights_hash, hash.hash());
    assert_eq!(same.model.vae_hash, Some(hash.hash_of(Component::Vae)));
    let (rgb, tiny) = paint("tiny.png", &vaes().join("tiny"));
    let golden = super::single::pixels(&vaes().join("tiny.png"));
    let found = psnr(&rgb, &golden);
    assert!(found >= 50.0, "{found:.1} dB");
    assert_ne!(tiny.model.weights_hash, same.model.weights_hash);
    assert_eq!(tiny.model.vae.as_deref(), vaes().join("tiny").to_str());
    let output = run(scratch.path(), &["verify", "tiny.png", "--threads", "2"], &home);
    let answer = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(answer.trim(), "tiny.png: bit-exact");
}

#[test]
fn of_repositories_only_what_is_used_is_downloaded() {
    let scratch = TempDir::new().unwrap();
    let model = model("tiny");
    let paint = |url: &str, words: &[&str]| {
        let environment = [("HF_ENDPOINT", url), ("HF_HOME", "cache")];
        let all = [&["a fox", "--steps", "1", "--threads", "2", "-s", "3"], words].concat();
        let output = run(scratch.path(), &all, &environment);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{stderr}");
    };
    let folder = vaes().join("tiny");
    let (local, model) = (folder.to_str().unwrap(), model.to_str().unwrap());
    // The VAE's files are at the top of its repository.
    let server = hub_of(folder.clone());
    paint(&server.url(), &["-m", model, "--vae", "org/name", "-o", "hub.png"]);
    paint(&server.url(), &["-m", model, "--vae", "org/name", "--offline", "-o", "again.png"]);
    paint(&server.url(), &["-m", model, "--vae", local, "-o", "local.png"]);
    let [first, again, here] =
        ["hub.png", "again.png", "local.png"].map(|name| read_png(&scratch.path().join(name)).0);
    assert!(first == here && again == here, "another picture");
    assert_eq!(record(&scratch.path().join("hub.png")).model.vae.as_deref(), Some("org/name"));
    // Of the model the VAE that is not used stays where it is.
    let other = TempDir::new().unwrap();
    let server = hub("tiny");
    let (url, home) = (server.url(), other.path().to_str().unwrap().to_owned());
    let environment = [("HF_ENDPOINT", &*url), ("HF_HOME", &*home)];
    let words = ["a fox", "-m", "org/name", "--vae", local, "--steps", "1", "-o", "x.png"];
    let output = run(scratch.path(), &words, &environment);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let asked: Vec<_> = server.take_log().into_iter().map(|request| request.path).collect();
    assert!(asked.iter().any(|path| path.ends_with("unet/diffusion_pytorch_model.bin")));
    let vae = asked.iter().find(|path| path.ends_with("vae/diffusion_pytorch_model.bin"));
    assert_eq!(vae, None);
}

#[test]
fn who_cannot_have_a_vae_is_told_what_helps_a_vae_and_of_no_model() {
    let (scratch, model) = (TempDir::new().unwrap(), model("tiny"));
    // Nobody listens on a port that was free a moment ago.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{closed}");
    let environment = [("HF_ENDPOINT", &*url), ("HF_HOME", "cache")];
    for words in [
        &["a fox", "-m", model.to_str().unwrap(), "--vae", "org/name", "--offline"][..],
        &["a fox", "-m", model.to_str().unwrap(), "--vae", "org/name"],
        &["models", "pull", "org/name", "--as-vae", "--offline"],
    ] {
        let output = run(scratch.path(), words, &environment);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(3), "{words:?}: {stderr}");
        let advice = ", or give a local folder with --vae DIR\n";
        assert!(stderr.contains("org/name") && stderr.ends_with(advice), "{words:?}: {stderr}");
        assert!(!stderr.contains("-m ") && stderr.lines().count() == 1, "{words:?}: {stderr}");
    }
}

#[test]
fn what_is_no_vae_is_refused_with_what_was_looked_for() {
    let scratch = TempDir::new().unwrap();
    let path = scratch.path().join("x.safetensors");
    fs::write(&path, safetensors(&[])).unwrap();
    for (path, expected) in [
        (path, "it is no VAE: looked for the names of AutoencoderKL"),
        (scratch.path().to_owned(), "it has neither config.json nor vae/config.json"),
        (scratch.path().join("none"), "there is no such folder"),
    ] {
        let error = LoneVae::open(&path).unwrap_err().to_string();
        assert!(error.contains(expected) && error.starts_with("--vae "), "{error}");
    }
}
