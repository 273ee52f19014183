//! Embeddings and LoRAs against diffusers (`scripts/golden/additions.py`), and how they are
//! recorded.

use std::fs;
use std::path::PathBuf;

use candle_core::DType;
use tempfile::TempDir;
use tiny_sd::backend::cpu;
use tiny_sd::image::ImageSize;
use tiny_sd::pipeline::{
    Additions, LoadOptions, PictureRequest, Pipeline, Placement, PromptSyntax, TextOptions,
};
use tiny_sd::progress::Silent;
use tiny_sd::weights::Model;

use super::end_to_end::{check_failure, model, read_png, run};
use super::golden::{fixtures, golden_picture, psnr};

fn file(name: &str) -> PathBuf {
    fixtures().join("golden/additions").join(name)
}

fn load(name: &str, additions: Additions, dtype: DType) -> Pipeline<cpu::Storage> {
    let device = cpu::Device::with_threads(2).unwrap();
    let options = LoadOptions { dtype, variant: None, scheduler: None, encodes: false, additions };
    let folder = Model::open(model(name), None).unwrap();
    Pipeline::load(&folder, &options, Placement::whole(&device), &Silent).unwrap()
}

fn request(prompt: &str, text: TextOptions) -> PictureRequest<'_> {
    PictureRequest {
        prompt,
        negative_prompt: "ugly",
        text,
        seed: 42,
        steps: 3,
        guidance_scale: 7.5,
        size: ImageSize { height: 64, width: 64 },
        image: None,
        scheduler: None,
        preview_every: None,
    }
}

/// A case of the generator: its name, model, prompt and files.
type Case = (String, String, String, Additions);

fn cases() -> Vec<Case> {
    let cases = fs::read_to_string(file("cases.json")).unwrap();
    let cases: Vec<serde_json::Value> = serde_json::from_str(&cases).unwrap();
    let case = |case: &serde_json::Value| {
        let text = |name: &str| case[name].as_str().unwrap().to_owned();
        // FILE stands behind NAME= or before :SCALE.
        let files = |kind: &str| -> Vec<String> {
            let files = case[kind].as_array().into_iter().flatten();
            let here = |text: &str| {
                let (name, file_name) = text.split_once('=').unwrap_or(("", text));
                let equals = if name.is_empty() { "" } else { "=" };
                format!("{name}{equals}{}", file(file_name).display())
            };
            files.map(|file| here(file.as_str().unwrap())).collect()
        };
        let embeddings = files("embeddings").iter().map(|text| text.parse().unwrap()).collect();
        let loras = files("loras").iter().map(|text| text.parse().unwrap()).collect();
        let additions = Additions { embeddings, loras, skips_unmatched: false };
        (text("name"), text("model"), text("prompt"), additions)
    };
    cases.iter().map(case).collect()
}

#[test]
fn pictures_with_embeddings_and_loras_are_those_of_diffusers() {
    let cases = cases();
    assert_eq!(cases.len(), 11);
    for (name, model, prompt, additions) in cases {
        let request = request(&prompt, TextOptions::default());
        let golden = golden_picture("additions", &name);
        let picture = load(&model, additions, DType::F32).paint(&request, &Silent).unwrap();
        let found = psnr(picture.rgb(), &golden);
        assert!(found >= 50.0, "{name}: {found:.1} dB");
        let without = load(&model, Additions::default(), DType::F32);
        let without = psnr(without.paint(&request, &Silent).unwrap().rgb(), &golden);
        assert!(without < 40.0, "{name}: {without:.1} dB without it");
    }
}

#[test]
fn an_embedding_stays_in_one_chunk_and_half_precision_keeps_the_picture() {
    let wash = file("Wash-Style.safetensors").display().to_string();
    let additions = |kind: &str| {
        let mut additions = Additions::default();
        additions.embeddings.push(wash.parse().unwrap());
        additions.loras.extend(
            (kind == "lora")
                .then(|| file("conv.safetensors").display().to_string().parse().unwrap()),
        );
        additions
    };
    let pipeline = load("tiny", additions(""), DType::F32);
    let vocabulary = pipeline.text_encoder.config.vocab_size as u32;
    assert_eq!(pipeline.text_encoder.tokens() as u32, vocabulary + 3);
    let words = format!("{}WASH-style, wash-style_2", "x ".repeat(74));
    let chunks = pipeline.tokenizer.chunks(&words, PromptSyntax::A1111).unwrap().chunks;
    assert_eq!(chunks.len(), 2);
    assert_eq!(chunks[1].ids[1..4], [vocabulary, vocabulary + 1, vocabulary + 2]);
    assert_eq!(chunks[1].ids[5], vocabulary + 2);
    // The plain syntax cuts it where the text encoder ends, and says what is lost.
    let plain = pipeline.tokenizer.encode(&words).unwrap();
    assert_eq!(plain.ids[75], vocabulary);
    assert_eq!(plain.truncated.as_deref(), Some("WASH-style, wash-style_2"));
    let request = request("wash-style", TextOptions::default());
    let [whole, half] = [DType::F32, DType::F16]
        .map(|dtype| load("tiny", additions("lora"), dtype).paint(&request, &Silent).unwrap());
    let found = psnr(whole.rgb(), half.rgb());
    assert!(found >= 35.0, "{found:.1} dB");
}

#[test]
fn pictures_record_their_files_and_are_verified_with_them() {
    let folder = TempDir::new().unwrap();
    let lora = folder.path().join("l.safetensors");
    fs::copy(file("conv.safetensors"), &lora).unwrap();
    fs::copy(file("inked.pt"), folder.path().join("e.pt")).unwrap();
    let model = model("tiny");
    let paint = |device: &str| {
        let words = ["an inked fox", "-s", "3", "--steps", "2", "-m", model.to_str().unwrap()];
        let files = ["--lora", "l.safetensors:0.4", "--embedding", "inked=e.pt"];
        let output = format!("{device}.png");
        let more = ["--device", device, "-o", &output];
        let output = run(folder.path(), &[&words[..], &files, &more].concat(), &[]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        read_png(&folder.path().join(format!("{device}.png"))).0
    };
    assert!(paint("cpu") == paint("mock"));
    let say = |words: &[&str]| {
        let output = run(folder.path(), words, &[]);
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    };
    let (code, text) = say(&["verify", "-q", "cpu.png"]);
    assert_eq!((code, text.as_str()), (Some(0), "cpu.png: bit-exact\n"));
    let (_, text) = say(&["info", "cpu.png"]);
    assert!(
        text.contains("inked, e.pt, ") && text.contains("l.safetensors, scale 0.4, "),
        "{text}"
    );
    let (code, text) = say(&["--from", "cpu.png", "-q", "-o", "again.png"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(read_png(&folder.path().join("again.png")) == read_png(&folder.path().join("cpu.png")));
    fs::copy(file("tucker.safetensors"), &lora).unwrap();
    let (code, text) = say(&["verify", "-q", "cpu.png"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("; additions: inked ") && text.contains(" 0.4*"), "{text}");
    fs::remove_file(&lora).unwrap();
    let (code, text) = say(&["verify", "-q", "cpu.png"]);
    assert!(code == Some(3) && text.contains("l.safetensors"), "{text}");
}

#[test]
fn what_is_for_another_model_says_so() {
    let tiny = model("tiny");
    let kohya = file("kohya.safetensors").display().to_string();
    let narrow = file("narrow.safetensors").display().to_string();
    let check = |what: &str, words: &[&str], parts: &[&str]| {
        let model = ["a fox", "-o", "out.png", "-m", tiny.to_str().unwrap()];
        check_failure(what, &[&model[..], words].concat(), 3, parts, &[]);
    };
    let parts = ["kohya.safetensors: ", " of its ", " changes are of weights that this model does"];
    check("a LoRA", &["--lora", &kohya], &[&parts[..], &["--lora-skip-unmatched"]].concat());
    let parts = ["narrow.safetensors", "24 features", "takes 32"];
    check("an embedding", &["--embedding", &narrow], &parts);
    check("no file", &["--lora", "none.safetensors:0.5"], &["none.safetensors"]);
    check("a model's file", &["--embedding", &kohya], &["an embedding is one tensor"]);
    let taken = format!("a={}", file("Wash-Style.safetensors").display());
    let words = ["a fox", "-m", tiny.to_str().unwrap(), "--embedding", &taken];
    check_failure("a name", &words, 2, &["has a token \"a\" already", "NAME=FILE"], &[]);
}

#[test]
fn a_picture_of_what_are_no_numbers_is_an_error_and_no_black_picture() {
    let folder = TempDir::new().unwrap();
    let header = r#"{"a":{"dtype":"F32","shape":[1,32],"data_offsets":[0,128]}}"#;
    let length = (header.len() as u64).to_le_bytes();
    let bytes = [&length[..], header.as_bytes(), &f32::NAN.to_le_bytes().repeat(32)].concat();
    let path = folder.path().join("nan.safetensors");
    fs::write(&path, bytes).unwrap();
    let (tiny, embedding) = (model("tiny"), format!("wash={}", path.display()));
    let words = ["a wash", "-q", "-m", tiny.to_str().unwrap(), "--embedding", &embedding];
    let words = [&words[..], &["--steps", "1", "-W", "64", "-H", "64", "-o", "out.png"]].concat();
    check_failure("NaN", &words, 1, &["not finite", "--embedding"], &[]);
}
