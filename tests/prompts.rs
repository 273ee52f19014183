//! Prompts beyond diffusers' plain way: layers left out, weights, chunks. `clip_skip` is held
//! against diffusers, AUTOMATIC1111's syntax against a reference of its algorithm
//! (`scripts/golden/prompting.py`).

use std::sync::Mutex;

use candle_core::Device;
use tiny_sd::backend::cpu;
use tiny_sd::image::ImageSize;
use tiny_sd::pipeline::{PictureRequest, PromptSyntax, TextOptions};
use tiny_sd::progress::{Event, Progress, Silent};
use tiny_sd::tensor::Tensor;

use super::golden::{check_close, fixtures, golden_picture, load, psnr};

const MODELS: [&str; 3] = ["tiny", "sd1", "sd2"];

fn device() -> cpu::Device {
    cpu::Device::with_threads(2).unwrap()
}

/// What the generator reads; its long ones are repeated here as there.
fn prompts() -> [(&'static str, String); 8] {
    let long =
        "a portrait of a pretty girl with red hair, standing in a garden full of white roses ";
    let tail = ", with a very long tail of words that does not fit into the first chunk";
    [
        ("plain words", "Portrait of a pretty girl".into()),
        ("weights", "a (red:1.4) boat, [stormy] sea, ((sunset)), (calm:0.3)".into()),
        ("negative weight", r"(a girl:-0.5) and \(a\) boat".into()),
        ("unbalanced", "(a red boat [on a sea".into()),
        ("break", "a red boat BREAK a (stormy:1.2) sea".into()),
        ("long", long.repeat(3)),
        ("after a comma", format!("{}{tail}", "x ".repeat(60))),
        ("nothing", String::new()),
    ]
}

#[test]
fn weighted_prompts_are_the_chunks_and_the_embeddings_of_the_reference() {
    let path = fixtures().join("golden/prompts/a1111.safetensors");
    let goldens = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let device = device();
    let mut compared = 0;
    for model in MODELS {
        let pipeline = load(model, None, &device);
        for (name, prompt) in prompts() {
            let what = format!("{model} {name}");
            let golden = |kind: &str| goldens.get(&format!("{model}.{name}.{kind}"));
            let chunks = pipeline.tokenizer.chunks(&prompt, PromptSyntax::A1111).unwrap().chunks;
            let ids: Vec<Vec<i64>> = golden("ids").unwrap().to_vec2().unwrap();
            let found = chunks.iter().map(|chunk| chunk.ids.iter().map(|id| i64::from(*id)));
            let found: Vec<Vec<i64>> = found.map(Iterator::collect).collect();
            assert_eq!(found, ids, "{what}");
            let weights: Vec<Vec<f32>> = golden("weights").unwrap().to_vec2().unwrap();
            let pairs =
                chunks.iter().flat_map(|chunk| &chunk.weights).zip(weights.iter().flatten());
            assert!(pairs.clone().all(|(a, b)| (a - b).abs() <= 1e-6), "{what}");
            assert_eq!(pairs.count(), chunks.len() * 77, "{what}");
            let Some(golden) = golden("embeddings") else { continue };
            let options = TextOptions { syntax: PromptSyntax::A1111, clip_skip: 0 };
            let found = pipeline.embed(&[&prompt], options, &Silent).unwrap();
            assert_eq!(found.dims(), golden.dims(), "{what}");
            check_close(&what, &found.to_vec::<f32>().unwrap(), golden, 3e-5);
            compared += 1;
        }
    }
    assert_eq!(compared, 10);
}

/// A case of the generator, with what it is called.
struct Case {
    name: String,
    model: String,
    prompt: String,
    negative_prompt: String,
    text: TextOptions,
    steps: usize,
    seed: u64,
}

impl Case {
    fn request(&self) -> PictureRequest<'_> {
        PictureRequest {
            prompt: &self.prompt,
            negative_prompt: &self.negative_prompt,
            text: self.text,
            seed: self.seed,
            steps: self.steps,
            guidance_scale: 7.5,
            size: ImageSize { height: 64, width: 64 },
            image: None,
            scheduler: None,
            preview_every: None,
        }
    }
}

fn cases() -> Vec<Case> {
    let path = fixtures().join("golden/prompts/cases.json");
    let cases: Vec<serde_json::Value> =
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let case = |case: &serde_json::Value| {
        let text = |name: &str| case[name].as_str().unwrap().to_owned();
        let number = |name: &str| case[name].as_u64().unwrap();
        let syntax = text("prompt_syntax").parse().unwrap();
        Case {
            name: text("name"),
            model: text("model"),
            prompt: text("prompt"),
            negative_prompt: text("negative_prompt"),
            text: TextOptions { syntax, clip_skip: number("clip_skip") as usize },
            steps: number("steps") as usize,
            seed: number("seed"),
        }
    };
    cases.iter().map(case).collect()
}

#[test]
fn pictures_without_layers_or_with_weights_and_chunks_are_the_references() {
    let device = device();
    let cases = cases();
    assert_eq!(cases.len(), 9);
    for case in &cases {
        let pipeline = load(&case.model, None, &device);
        let picture = pipeline.paint(&case.request(), &Silent).unwrap();
        let golden = golden_picture("prompts", &case.name);
        let found = psnr(picture.rgb(), &golden);
        assert!(found >= 50.0, "{}: {found:.1} dB", case.name);
        let plain = PictureRequest { text: TextOptions::default(), ..case.request() };
        let other = psnr(pipeline.paint(&plain, &Silent).unwrap().rgb(), &golden);
        assert!(other < 40.0, "{}: {other:.1} dB without it", case.name);
    }
}

/// Notes the steps and the pictures of previews.
#[derive(Default)]
struct Told {
    steps: Mutex<Vec<(usize, usize)>>,
    previews: Mutex<Vec<usize>>,
}

impl Progress for Told {
    fn report(&self, event: Event<'_>) {
        match event {
            Event::Step { done, total } => self.steps.lock().unwrap().push((done, total)),
            Event::Preview { index, .. } => self.previews.lock().unwrap().push(index),
            _ => {}
        }
    }

    fn check(&self) -> tiny_sd::Result<()> {
        Ok(())
    }
}

#[test]
fn pictures_of_prompts_of_different_lengths_made_together_are_those_made_alone() {
    let pipeline = load("tiny", None, &device());
    let prompts = prompts();
    let long = prompts.iter().find(|(name, _)| *name == "long").unwrap().1.as_str();
    let text = TextOptions { syntax: PromptSyntax::A1111, clip_skip: 1 };
    let request = |(prompt, negative_prompt)| PictureRequest {
        prompt,
        negative_prompt,
        text,
        seed: 3,
        steps: 2,
        guidance_scale: 7.5,
        size: ImageSize { height: 64, width: 64 },
        image: None,
        scheduler: None,
        preview_every: std::num::NonZeroUsize::new(1),
    };
    let requests = [("a", ""), ("(b)", ""), (long, "c"), ("d", long), ("e", "f")].map(request);
    let told = Told::default();
    let together = pipeline.paint_together(&requests, &told).unwrap();
    for (request, picture) in requests.iter().zip(&together) {
        let fresh = load("tiny", None, &device());
        assert!(picture == &fresh.paint(request, &Silent).unwrap(), "{request:?}");
    }
    let (steps, previews) = (told.steps.into_inner().unwrap(), told.previews.into_inner().unwrap());
    assert_eq!(steps, (0..=6).map(|done| (done, 6)).collect::<Vec<_>>());
    assert_eq!(previews, [0, 1, 2, 3, 4]);
    let other = PictureRequest { steps: 3, ..requests[2] };
    assert!(pipeline.paint_together(&[requests[0], other], &Silent).is_err());
}

#[test]
fn what_leaves_no_layer_says_how_many_there_are() {
    let pipeline = load("tiny", None, &device());
    let text = TextOptions { clip_skip: 3, ..TextOptions::default() };
    let error = pipeline.embed(&["a"], text, &Silent).unwrap_err().to_string();
    let expected =
        "--clip-skip 3: this model's text encoder has 3 layers, of which one must be left";
    assert_eq!(error, expected);
    let ids = Tensor::from_slice(&[0u32; 77], (1, 77), &device()).unwrap();
    assert!(pipeline.text_encoder.forward_skipping(&ids, 2).is_ok());
}

/// A prompt of several chunks is a program of its own on a worker, beside that of a single chunk.
#[test]
fn a_worker_makes_pictures_of_any_number_of_chunks_bit_for_bit() {
    use super::end_to_end::{model, run};
    let folder = tempfile::TempDir::new().unwrap();
    let lines = "{\"prompt\": \"a\"}\n{\"prompt\": \"a BREAK (b:1.3)\"}\n{\"prompt\": \"(c)\"}\n";
    std::fs::write(folder.path().join("jobs.jsonl"), lines).unwrap();
    let model = model("tiny");
    let paint = |device: &str| {
        let words = ["batch", "jobs.jsonl", "--out-dir", device, "--device", device, "-s", "4"];
        let more = ["--steps", "2", "--prompt-syntax", "a1111", "-m", model.to_str().unwrap()];
        let output = run(folder.path(), &[&words[..], &more].concat(), &[]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let names = ["00001-4.png", "00002-4.png", "00003-4.png"];
        names.map(|name| super::end_to_end::read_png(&folder.path().join(device).join(name)))
    };
    assert!(paint("cpu") == paint("mock"));
}

#[test]
fn each_picture_of_alternatives_records_what_its_seed_chose_and_is_made_again() {
    use super::end_to_end::{check_failure, model, read_png, record, run};
    let folder = tempfile::TempDir::new().unwrap();
    let lists = folder.path().join("lists");
    std::fs::create_dir(&lists).unwrap();
    std::fs::write(lists.join("animal.txt"), "fox\ncat\n{old|young} owl\n").unwrap();
    let model = model("tiny");
    let model = model.to_str().unwrap();
    let paint = |words: &[&str]| {
        let output = run(folder.path(), words, &[]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let prompt = "a {red|blue} __animal__";
    let words = [prompt, "-n", "{fog|rain}", "--wildcards", "lists", "--count", "6", "-s", "1"];
    paint(&[&words[..], &["--steps", "1", "-o", "x.png", "-m", model]].concat());
    let names: Vec<_> = (1..=6).map(|index| format!("x-{index}.png")).collect();
    let mut found = std::collections::BTreeSet::new();
    for name in &names {
        let record = record(&folder.path().join(name));
        assert_eq!((&*record.prompt, &*record.negative_prompt), (prompt, "{fog|rain}"));
        let resolved = record.resolved_prompt.strip_prefix("a ").unwrap();
        assert!(resolved.starts_with("red ") || resolved.starts_with("blue "), "{resolved}");
        let animal = resolved.split_once(' ').unwrap().1;
        assert!(["fox", "cat", "old owl", "young owl"].contains(&animal), "{resolved}");
        let negative = record.resolved_negative_prompt.unwrap();
        assert!(["fog", "rain"].contains(&&*negative), "{negative}");
        let (_, parameters) = read_png(&folder.path().join(name));
        assert!(parameters.starts_with(&format!("a {resolved}\nNegative prompt: {negative}\n")));
        found.insert(resolved.to_owned());
    }
    assert!(found.len() > 2, "{found:?}");
    // Nothing is chosen again: the files are not asked for.
    std::fs::remove_dir_all(&lists).unwrap();
    assert_eq!(paint(&["verify", "-q", "x-2.png"]), "x-2.png: bit-exact\n");
    paint(&["--from", "x-2.png", "-q", "-o", "again.png"]);
    let pixels = |name: &str| read_png(&folder.path().join(name)).0;
    assert!(pixels("again.png") == pixels("x-2.png") && pixels("x-2.png") != pixels("x-3.png"));
    let parts = ["--wildcards lists: there is no such folder"];
    check_failure("no folder", &["a fox", "--wildcards", "lists"], 2, &parts, &[]);
    std::fs::create_dir(&lists).unwrap();
    let words = ["__none__", "--wildcards", lists.to_str().unwrap()];
    let parts = ["the prompt: __none__ (", "there is no such file"];
    check_failure("no file", &words, 2, &parts, &[]);
}
