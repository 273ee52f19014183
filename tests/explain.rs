//! `tiny-sd explain` as a user calls it: what it says of prompts, schedules and files is what the
//! goldens have, and no weight is read for it.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::golden::fixtures;
use super::metadata::{ends_with, json, run};

/// What is said of a command line, in a folder that must stay empty.
fn explained(words: &[&str]) -> Value {
    let folder = TempDir::new().unwrap();
    let found = json(folder.path(), &[&["explain", "--json"], words].concat(), 0);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{words:?}");
    found
}

fn model(name: &str) -> String {
    fixtures().join("models").join(name).to_str().unwrap().to_owned()
}

#[test]
fn the_tokens_of_a_prompt_are_named_with_their_weights() {
    let words = ["a (red:1.4) boat", "--prompt-syntax", "a1111", "-n", "{x|x}", "-s", "7"];
    let found = explained(&words);
    let tokens = json!([[
        {"id": 320, "text": "a</w>", "weight": 1.0},
        {"id": 736, "text": "red</w>", "weight": 1.4},
        {"id": 647, "text": "bo", "weight": 1.0},
        {"id": 536, "text": "at</w>", "weight": 1.0},
    ]]);
    assert_eq!(found["prompt"]["chunks"], tokens);
    assert_eq!(found["negative_prompt"]["given"], "{x|x}");
    assert_eq!(found["negative_prompt"]["resolved"], "x");
    assert_eq!(found["seed"], 7);
    let long = "fox ".repeat(100);
    let cut = explained(&[&long]);
    assert_eq!(cut["prompt"]["chunks"].as_array().unwrap().len(), 1);
    assert!(cut["prompt"]["cut_off"].as_str().unwrap().starts_with("x fox fox"), "{cut}");
    let whole = explained(&[&long, "--prompt-syntax", "a1111"]);
    assert!(whole["prompt"]["chunks"].as_array().unwrap().len() > 1);
    assert_eq!(whole["prompt"]["cut_off"], Value::Null);
}

#[test]
fn the_timesteps_are_those_of_diffusers() {
    let goldens = fs::read_to_string(fixtures().join("schedules.json")).unwrap();
    let goldens: Value = serde_json::from_str(&goldens).unwrap();
    let cases = goldens["cases"].as_array().unwrap();
    for name in ["dpm++2m", "euler", "pndm"] {
        let is_it = |case: &&Value| {
            case["config"] == "tiny-sd" && case["scheduler"] == name && case["steps"] == 4
        };
        let case = cases.iter().find(is_it).unwrap();
        let found = explained(&["x", "--steps", "4", "--scheduler", name]);
        let numbers = |value: &Value| -> Vec<f64> {
            value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
        };
        assert_eq!(numbers(&found["timesteps"]), numbers(&case["timesteps"]), "{name}");
        assert_eq!(found["unet_evaluations"], case["evaluations"], "{name}");
        assert_eq!(found["sigmas"].as_array().unwrap().last(), Some(&json!(0.0)), "{name}");
        let flops = |part: &str| found["flops"][part].as_f64().unwrap();
        let evaluations = case["evaluations"].as_f64().unwrap();
        let sum = flops("text") + evaluations * flops("evaluation") + flops("decoding");
        assert_eq!(flops("picture"), sum, "{name}");
        if name == "euler" {
            let first = found["sigmas"][0].as_f64().unwrap();
            let golden = case["init_noise_sigma"].as_f64().unwrap();
            assert!((first - golden).abs() < 1e-4, "{first} {golden}");
        }
    }
    let picture = fixtures().join("golden/images/picture.png");
    let words = ["x", "--steps", "4", "--scheduler", "euler", "--strength", "0.5", "-i"];
    let found = explained(&[&words[..], &[picture.to_str().unwrap()]].concat());
    assert_eq!(found["timesteps"], json!([333.0, 0.0]));
    assert_eq!(found["begins"], json!({"timestep": 333.0, "strength": 0.5}));
    assert_eq!(found["size"]["width"], 80);
}

#[test]
fn the_files_are_named_with_the_reason() {
    let unet = |words: &[&str]| explained(words)["components"][1].clone();
    let sharded = unet(&["x", "-m", &model("sd2")]);
    assert_eq!(sharded["files"].as_array().unwrap().len(), 2);
    assert_eq!(sharded["why"], "no plain names, but fp16");
    assert_eq!(unet(&["x"])["why"], "the only one");
    let asked = unet(&["x", "-m", &model("sd2"), "--variant", "fp16"]);
    assert_eq!(asked["why"], "--variant fp16");
    let vae = fixtures().join("vaes/tiny");
    let found = explained(&["x", "--vae", vae.to_str().unwrap()]);
    assert_eq!(found["components"][2]["why"], "--vae");
}

#[test]
fn files_that_are_passed_over_are_named_with_the_rule() {
    let folder = TempDir::new().unwrap();
    copy_all(Path::new(&model("sd1")), &folder.path().join("both"));
    for name in ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"] {
        fs::write(folder.path().join("both/unet").join(name), "").unwrap();
    }
    let found = json(folder.path(), &["explain", "x", "--json", "-m", "both"], 0);
    let unet = &found["components"][1];
    assert_eq!(unet["files"], json!(["unet/diffusion_pytorch_model.safetensors"]));
    let expected = "plain names first, safetensors before pickle; also there: \
                    unet/diffusion_pytorch_model.bin, \
                    unet/diffusion_pytorch_model.fp16.safetensors";
    assert_eq!(unet["why"], expected);
}

#[test]
fn kernels_that_are_transformed_are_counted_unless_memory_is_to_be_low() {
    let bytes = |words: &[&str], field: &str| -> u64 {
        explained(words)["components"][1][field].as_u64().unwrap()
    };
    assert!(bytes(&["x"], "winograd_bytes") > 0);
    assert_eq!(bytes(&["x", "--low-memory"], "winograd_bytes"), 0);
    assert!(bytes(&["x"], "memory_bytes") > bytes(&["x", "--low-memory"], "memory_bytes"));
}

/// The miniature model with a UNet whose payload is 256 GB of nothing: more than could be read.
#[cfg(target_os = "linux")]
#[test]
fn no_weights_are_read() {
    const ELEMENTS: u64 = 1 << 36;
    let folder = TempDir::new().unwrap();
    let copy = folder.path().join("vast");
    copy_all(Path::new(&model("sd1")), &copy);
    let header = format!(
        r#"{{"x.weight":{{"dtype":"F32","shape":[{ELEMENTS}],"data_offsets":[0,{}]}}}}"#,
        4 * ELEMENTS
    );
    let file = copy.join("unet/diffusion_pytorch_model.safetensors");
    fs::write(&file, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat())
        .unwrap();
    let file = fs::OpenOptions::new().write(true).open(file).unwrap();
    file.set_len(8 + header.len() as u64 + 4 * ELEMENTS).unwrap();
    let found = json(folder.path(), &["explain", "x", "--json", "-m", "vast"], 0);
    assert_eq!(found["components"][1]["memory_bytes"], 4 * ELEMENTS);
}

fn copy_all(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).unwrap();
        match path.is_dir() {
            true => copy_all(&path, &to.join(name)),
            false => drop(fs::copy(&path, to.join(name)).unwrap()),
        }
    }
}

#[test]
fn of_a_model_that_is_not_here_the_rest_is_said() {
    let found = explained(&["a fox", "-m", "org/none", "--scheduler", "euler-a"]);
    assert!(found["model"]["missing"].as_str().unwrap().contains("is not in the cache"));
    assert_eq!(found["prompt"]["chunks"][0][1]["id"], 3240);
    assert_eq!(found["scheduler"], "euler-a");
    assert_eq!(found["timesteps"], Value::Null);
    assert_eq!(found["components"], Value::Null);
}

#[test]
fn only_what_is_explained_goes_to_stdout_and_what_is_wrong_is_one_line() {
    let folder = TempDir::new().unwrap();
    let (text, stderr) = ends_with(0, &run(folder.path(), &["explain", "a fox", "--steps", "4"]));
    assert_eq!(stderr, "");
    assert!(text.starts_with("model  ") && text.contains("\ntimesteps        999 749 500 250\n"));
    for (words, code, expected) in [
        (&["x", "--strength", "0.5"][..], 2, "give --image"),
        (&["x", "--steps", "1000"], 2, "--steps 1000 are too many"),
        (&["x", "-m", "./nothing"], 3, "there is no folder"),
        (&["x", "--lora"], 2, "--lora"),
    ] {
        let output = run(folder.path(), &[&["explain"], words].concat());
        let (text, stderr) = ends_with(code, &output);
        assert_eq!(text, "", "{words:?}");
        assert!(stderr.contains(expected) && stderr.lines().count() == 1, "{words:?}: {stderr}");
    }
}
