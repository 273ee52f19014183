//! Pictures that begin with pictures, against diffusers, and by the program itself. Separate from
//! the other goldens because `scripts/golden/images.py` makes what they are held against.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor as Golden};
use tempfile::TempDir;
use tiny_sd::Result;
use tiny_sd::backend::{Backend, cpu};
use tiny_sd::image::{ImageSize, Mask, Picture};
use tiny_sd::model::Encoder;
use tiny_sd::pipeline::{
    Additions, ImageMode, LoadOptions, PictureRequest, Pipeline, Placement, TextOptions,
};
use tiny_sd::progress::Silent;
use tiny_sd::schedule::SchedulerChoice;
use tiny_sd::weights::{Component, Model};

use super::golden::{check_close, fixtures, psnr, upload};
use super::metadata::{ends_with, json, run};

fn goldens() -> PathBuf {
    fixtures().join("golden/images")
}

fn read(path: &Path) -> Picture {
    Picture::from_file(&fs::read(path).unwrap()).unwrap()
}

fn device() -> cpu::Device {
    cpu::Device::with_threads(2).unwrap()
}

fn load<B: Backend>(folder: &Path, device: &B::Device) -> Result<Pipeline<B>> {
    let model = Model::open(folder, None)?;
    let options = LoadOptions {
        dtype: DType::F32,
        variant: None,
        scheduler: None,
        encodes: true,
        additions: Additions::default(),
    };
    Pipeline::load(&model, &options, Placement::whole(device), &Silent)
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let (from, name) = entry.map(|entry| (entry.path(), entry.file_name())).unwrap();
        if from.is_dir() {
            fs::create_dir(to.join(&name)).unwrap();
            copy(&from, &to.join(name));
        } else {
            fs::copy(&from, to.join(name)).unwrap();
        }
    }
}

/// The model sd1 with an inpainting UNet.
fn nine_channels() -> TempDir {
    let folder = TempDir::new().unwrap();
    copy(&fixtures().join("models/sd1"), folder.path());
    let config = folder.path().join("unet/config.json");
    let text = fs::read_to_string(&config).unwrap();
    assert!(text.contains("\"in_channels\": 4"));
    fs::write(&config, text.replace("\"in_channels\": 4", "\"in_channels\": 9")).unwrap();
    let weights = folder.path().join("unet/diffusion_pytorch_model.safetensors");
    let mut tensors = candle_core::safetensors::load(&weights, &Device::Cpu).unwrap();
    let path = goldens().join("nine-channels.safetensors");
    tensors.extend(candle_core::safetensors::load(path, &Device::Cpu).unwrap());
    fs::remove_file(&weights).unwrap();
    candle_core::safetensors::save(&tensors, &weights).unwrap();
    folder
}

#[test]
fn an_encoded_image_is_that_of_diffusers_at_odd_sizes_too() {
    let device = device();
    for model in ["tiny", "sd1", "sd2"] {
        let pipeline = load::<cpu::Storage>(&fixtures().join("models").join(model), &device);
        let pipeline = pipeline.unwrap();
        let encoder: &Encoder<cpu::Storage> = pipeline.encoder.as_ref().unwrap();
        let path = goldens().join(format!("{model}.encoded.safetensors"));
        let goldens: HashMap<String, Golden> =
            candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        for size in ["even", "odd"] {
            let pixels = upload(&goldens[&format!("{size}.pixels")], &device);
            let found = encoder.forward(&pixels).unwrap();
            let golden = &goldens[&format!("{size}.moments")];
            assert_eq!(found.dims(), golden.dims());
            let found: Vec<f32> = found.to_vec().unwrap();
            check_close(&format!("{model} {size}"), &found, golden, 2e-5);
        }
    }
}

/// One entry of cases.json, with the pictures that it begins with.
struct Case {
    name: String,
    model: String,
    prompt: String,
    image: Picture,
    mask: Option<Mask>,
    strength: f64,
    scheduler: Option<SchedulerChoice>,
    steps: usize,
    guidance_scale: f64,
    seed: u64,
}

impl Case {
    fn request(&self) -> PictureRequest<'_> {
        let mode = ImageMode::new(&self.image, self.mask.as_ref(), self.strength).unwrap();
        PictureRequest {
            prompt: &self.prompt,
            negative_prompt: "",
            text: TextOptions::default(),
            seed: self.seed,
            steps: self.steps,
            guidance_scale: self.guidance_scale,
            size: self.image.size(),
            image: Some(mode),
            scheduler: self.scheduler,
            preview_every: None,
        }
    }
}

fn cases() -> Vec<Case> {
    let [image, mask] = ["picture.png", "mask.png"].map(|name| read(&goldens().join(name)));
    let text = fs::read_to_string(goldens().join("cases.json")).unwrap();
    let cases: serde_json::Value = serde_json::from_str(&text).unwrap();
    let case = |case: &serde_json::Value| {
        let text = |name: &str| case[name].as_str().map(str::to_owned);
        let number = |name: &str| case[name].as_u64().map(|number| number as usize);
        let own = image.size();
        let size = ImageSize {
            height: number("height").unwrap_or(own.height / 8 * 8),
            width: number("width").unwrap_or(own.width / 8 * 8),
        };
        let has_mask = case["mask"].as_bool().unwrap();
        Case {
            name: text("name").unwrap(),
            model: text("model").unwrap(),
            prompt: text("prompt").unwrap(),
            image: image.resized(size).unwrap(),
            mask: has_mask.then(|| Mask::of_picture(&mask, size).unwrap()),
            strength: case["strength"].as_f64().unwrap(),
            scheduler: text("scheduler").map(|name| SchedulerChoice::parse(&name).unwrap()),
            steps: number("steps").unwrap(),
            guidance_scale: case["guidance_scale"].as_f64().unwrap(),
            seed: case["seed"].as_u64().unwrap(),
        }
    };
    cases.as_array().unwrap().iter().map(case).collect()
}

#[test]
fn every_picture_of_a_picture_is_the_one_that_diffusers_makes() {
    let (device, nine, cases) = (device(), nine_channels(), cases());
    for model in ["tiny", "sd1", "sd2", "nine-channels"] {
        let stored = fixtures().join("models").join(model);
        let folder = if model == "nine-channels" { nine.path() } else { &stored };
        let pipeline = load::<cpu::Storage>(folder, &device).unwrap();
        for case in cases.iter().filter(|case| case.model == model) {
            let picture = pipeline.paint(&case.request(), &Silent).unwrap();
            let golden = read(&goldens().join(format!("{}.png", case.name)));
            assert_eq!(picture.size(), golden.size(), "{}", case.name);
            let found = psnr(picture.rgb(), golden.rgb());
            assert!(found >= 50.0, "{}: {found:.1} dB", case.name);
        }
    }
    assert_eq!(cases.len(), 19);
}

#[test]
fn pictures_of_one_picture_made_together_are_those_made_alone() {
    let (device, nine, cases) = (device(), nine_channels(), cases());
    let tiny = fixtures().join("models/tiny");
    let names = ["tiny-image-euler-a", "tiny-inpaint-euler-a", "nine-channels-inpaint-weak"];
    for name in names {
        let case = cases.iter().find(|case| case.name == name).unwrap();
        let folder = if case.model == "tiny" { &tiny } else { nine.path() };
        let pipeline = load::<cpu::Storage>(folder, &device).unwrap();
        let requests = [1, 2, 3].map(|seed| PictureRequest { seed, ..case.request() });
        let together = pipeline.paint_together(&requests, &Silent).unwrap();
        for (request, picture) in requests.iter().zip(&together) {
            assert!(&pipeline.paint(request, &Silent).unwrap() == picture, "{name}: {request:?}");
        }
        assert!(together[0] != together[1], "{name}");
        // Another picture does not go with them.
        let small = case.image.resized(ImageSize { height: 8, width: 8 }).unwrap();
        let other = ImageMode::new(&small, None, case.strength).unwrap();
        let other = PictureRequest { image: Some(other), ..requests[0] };
        assert!(requests[0].goes_with(&requests[1]) && !requests[0].goes_with(&other));
        assert!(pipeline.paint(&other, &Silent).is_err(), "of another size");
    }
}

/// A folder with the goldens' pictures.
fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    for name in ["picture.png", "mask.png"] {
        fs::copy(goldens().join(name), folder.path().join(name)).unwrap();
    }
    folder
}

#[test]
fn the_program_makes_them_on_every_device_records_them_and_makes_them_again() {
    let (folder, nine) = (folder(), nine_channels());
    let nine = nine.path().to_str().unwrap();
    let golden = |name: &str| read(&goldens().join(format!("{name}.png")));
    let prompt = "a red boat on a stormy sea";
    let size = ["-W", "64", "-H", "48", "--steps", "5", "-s", "42"];
    for (name, words) in [
        ("tiny-image", &["--strength", "0.6"][..]),
        ("tiny-inpaint", &["--strength", "0.8", "--mask", "mask.png"]),
        ("nine-channels-inpaint", &["--mask", "mask.png", "-m", nine]),
    ] {
        let words = [&[prompt, "--image", "picture.png"], &size[..], words].concat();
        let paint = |device: &str| {
            let file = format!("{device}.png");
            let more = ["-o", &file, "--device", device, "--preview", "1"];
            ends_with(0, &run(folder.path(), &[&words[..], &more].concat()));
            read(&folder.path().join(file))
        };
        let (here, there) = (paint("cpu"), paint("mock"));
        assert!(here == there, "{name}");
        assert!(psnr(here.rgb(), golden(name).rgb()) >= 50.0, "{name}");
        let found = json(folder.path(), &["info", "cpu.png", "--json"], 0);
        let hash = blake3::hash(&fs::read(folder.path().join("picture.png")).unwrap());
        assert_eq!(found["record"]["image"]["path"], "picture.png");
        assert_eq!(found["record"]["image"]["hash"], hash.to_hex().as_str());
        assert_eq!(found["record"]["model"]["encoder_hash"].as_str().unwrap().len(), 64);
        let (answer, _) = ends_with(0, &run(folder.path(), &["verify", "-q", "cpu.png"]));
        assert_eq!(answer, "cpu.png: bit-exact\n", "{name}");
        ends_with(0, &run(folder.path(), &["--from", "cpu.png", "-o", "again.png"]));
        assert!(read(&folder.path().join("again.png")) == here, "{name}");
    }
    // The size is the picture's own, and a copy with other bytes and the same pixels is named.
    ends_with(
        0,
        &run(folder.path(), &["x", "-i", "picture.png", "--steps", "2", "-o", "own.webp"]),
    );
    let own = ImageSize { height: 56, width: 80 };
    assert_eq!(read(&folder.path().join("own.webp")).size(), own);
    let same = read(&folder.path().join("picture.png")).to_plain_png().unwrap();
    fs::write(folder.path().join("picture.png"), same).unwrap();
    let (answer, _) = ends_with(0, &run(folder.path(), &["verify", "-q", "own.webp"]));
    assert!(answer.starts_with("own.webp: bit-exact; image: "), "{answer}");
    let words = ["--from", "own.webp", "-o", "again.png"];
    let (_, stderr) = ends_with(0, &run(folder.path(), &words));
    assert!(stderr.contains("--image picture.png: it is not what it was then"), "{stderr}");
    fs::remove_file(folder.path().join("picture.png")).unwrap();
    let (_, stderr) = ends_with(2, &run(folder.path(), &["verify", "own.webp"]));
    assert!(stderr.contains("--image picture.png: there is no such file"), "{stderr}");
}

#[test]
fn a_batch_has_images_in_its_lines_and_goes_on_where_it_was() {
    let folder = folder();
    let jobs = "{\"prompt\":\"a\",\"seed\":1}\n\
                {\"prompt\":\"b\",\"seed\":1,\"image\":\"picture.png\",\"strength\":0.9}\n\
                {\"prompt\":\"b\",\"seed\":2,\"image\":\"picture.png\",\"strength\":0.9}\n\
                {\"prompt\":\"b\",\"seed\":1,\"image\":\"picture.png\",\"mask\":\"mask.png\"}\n";
    fs::write(folder.path().join("jobs.jsonl"), jobs).unwrap();
    let words = ["batch", "jobs.jsonl", "--out-dir", "out", "--steps", "2", "-q"];
    ends_with(0, &run(folder.path(), &words));
    let single = ["b", "-s", "2", "-i", "picture.png", "--strength", "0.9", "--steps", "2"];
    ends_with(0, &run(folder.path(), &[&single[..], &["-o", "x.png"]].concat()));
    let at = |name: &str| read(&folder.path().join(name));
    assert!(at("out/00003-2.png") == at("x.png"));
    // A job without an image is what it is in a batch without any.
    let found = json(folder.path(), &["info", "out/00001-1.png", "--json"], 0);
    assert!(found["record"]["model"].get("encoder_hash").is_none(), "{found}");
    // Another picture at the same place is another picture to make.
    let edited = at("picture.png").resized(ImageSize { height: 60, width: 80 }).unwrap();
    fs::write(folder.path().join("picture.png"), edited.to_plain_png().unwrap()).unwrap();
    let (stdout, _) = ends_with(0, &run(folder.path(), &words));
    assert_eq!(stdout.matches("\"skipped\":true").count(), 1, "{stdout}");
}

#[test]
fn what_a_model_cannot_do_is_said_before_its_weights_are_read() {
    let (folder, nine) = (folder(), nine_channels());
    let weights = nine.path().join("unet/diffusion_pytorch_model.safetensors");
    fs::write(&weights, "").unwrap();
    let nine = nine.path().to_str().unwrap();
    fs::write(
        folder.path().join("cut.png"),
        &fs::read(goldens().join("picture.png")).unwrap()[..900],
    )
    .unwrap();
    for (words, expected) in [
        (&["x", "-m", nine][..], "this model paints into pictures: it needs --image and --mask"),
        (&["x", "-m", nine, "-i", "picture.png"], "it needs --image and --mask"),
        (&["x", "-m", nine, "-i", "cut.png", "--mask", "mask.png"], "--image cut.png: the PNG"),
    ] {
        let output = run(folder.path(), words);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && stderr.contains(expected), "{words:?}: {stderr}");
        assert!(!stderr.contains("safetensors"), "{stderr}");
    }
}

#[test]
fn what_is_no_picture_to_begin_with_is_a_wrong_command_line_however_late_it_shows() {
    let folder = folder();
    let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap();
    let whole = fs::read(goldens().join("picture.png")).unwrap();
    write("empty.png", b"");
    write("text.png", b"no picture");
    write("header.png", &whole[..20]);
    // What it says of itself is whole.
    write("cut.png", &whole[..900]);
    for (file, expected) in [
        ("none.png", "there is no such file"),
        (".", "it is a folder, not a picture"),
        ("empty.png", "it is no PNG, JPEG or WebP"),
        ("text.png", "it is no PNG, JPEG or WebP"),
        ("header.png", "the PNG cannot be read: "),
        ("cut.png", "the PNG cannot be read: "),
    ] {
        for (flag, words) in [
            ("--image", &["x", "--image", file][..]),
            ("--mask", &["x", "--image", "picture.png", "--mask", file]),
        ] {
            let (stdout, stderr) = ends_with(2, &run(folder.path(), words));
            let expected = format!("error: {flag} {file}: {expected}");
            assert!(stderr.starts_with(&expected), "{words:?}: {stderr}");
            assert_eq!((stdout.as_str(), stderr.lines().count()), ("", 1), "{words:?}: {stderr}");
        }
    }
    // In a batch it is one picture's error, by the same code.
    write("jobs.jsonl", b"{\"prompt\":\"a\",\"seed\":1,\"image\":\"cut.png\"}");
    let words = ["batch", "jobs.jsonl", "--out-dir", "out", "--steps", "2", "-q"];
    let (stdout, _) = ends_with(6, &run(folder.path(), &words));
    assert!(stdout.contains("\"event\":\"error\"") && stdout.contains("\"code\":2,"), "{stdout}");
}

#[test]
fn a_remote_device_replays_an_inpainting_unet() -> Result<()> {
    use super::protocol::Worker;
    use tiny_sd::remote::storage::Storage;
    let (nine, cases) = (nine_channels(), cases());
    let case = cases.iter().find(|case| case.name == "nine-channels-inpaint-weak").unwrap();
    let worker = Worker::new()?;
    let folder = Model::open(nine.path(), None)?;
    for component in Component::ALL {
        for (_, tensor) in folder.checkpoint(component, None)?.iter() {
            worker.insert(tensor)?;
        }
    }
    let session = worker.connect("worker")?;
    session.session().check_programs();
    let there = load::<Storage>(nine.path(), &session.device())?.paint(&case.request(), &Silent)?;
    let here = load::<cpu::Storage>(nine.path(), &worker.device)?;
    assert!(here.paint(&case.request(), &Silent)? == there);
    // Another seed of the same image is encoded, and sent, no second time; another image is.
    let session = worker.connect("worker")?;
    let pipeline = load::<Storage>(nine.path(), &session.device())?;
    let large = case.image.resized(ImageSize { height: 64, width: 64 })?;
    let mask = Mask::of_picture(&large, large.size())?;
    let other = ImageMode::new(&large, Some(&mask), case.strength)?;
    let request = |seed, image| PictureRequest { seed, image, ..case.request() };
    let mut sent = Vec::new();
    for request in [
        request(1, case.request().image),
        request(2, case.request().image),
        PictureRequest { size: large.size(), ..request(2, Some(other)) },
        request(3, case.request().image),
    ] {
        let before = session.session().statistics().bulk_bytes_up;
        let there = pipeline.paint(&request, &Silent)?;
        sent.push(session.session().statistics().bulk_bytes_up - before);
        assert!(
            load::<cpu::Storage>(nine.path(), &worker.device)?.paint(&request, &Silent)? == there
        );
    }
    let [one, other] = [64 * 48, 64 * 64].map(|pixels| 2 * 3 * 4 * pixels);
    assert_eq!(sent, [one, 0, other, one]);
    Ok(())
}
