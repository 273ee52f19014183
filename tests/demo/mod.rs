//! The built-in model, `--model demo`: it obeys the prompt, by what its pictures show; it needs
//! nothing but the program; and it draws what diffusers draws with it.

mod measure;

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Output;

use candle_core::Device;
use serde_json::{Value, json};
use tempfile::TempDir;
use tiny_sd::image::{ImageSize, Picture};
use tiny_sd::schedule::SchedulerKind;

use crate::golden::{fixtures, psnr};
use crate::metadata::{command, ends_with, json, run};
use measure::{BACKGROUNDS, GLASSES, HAIR, HATS, Measure, PEOPLE, SHIRTS, SKINS, Shown};

/// Pairs of hair and background that training never sees: `held_out` in
/// `scripts/demo-model/portraits.py`.
const HELD_OUT: [(&str, &str); 8] = [
    ("blonde", "red"),
    ("blue", "orange"),
    ("red", "yellow"),
    ("black", "green"),
    ("gray", "blue"),
    ("brown", "purple"),
    ("pink", "pink"),
    ("blonde", "gray"),
];

/// How many prompts, each with a seed of its own.
const PROMPTS: usize = 72;

/// How often a training picture shows a value, and so a picture of an empty prompt.
fn share(attribute: &str, value: &str) -> f64 {
    match (attribute, value) {
        ("glasses", "none") => 0.5,
        ("glasses", "glasses") => 0.28,
        ("glasses", _) => 0.22,
        ("hat", "none") => 0.48,
        ("hat", _) => 0.13,
        ("hair", _) => 1.0 / HAIR.len() as f64,
        ("skin", _) => 1.0 / SKINS.len() as f64,
        ("shirt", _) => 1.0 / SHIRTS.len() as f64,
        ("background", _) => 1.0 / BACKGROUNDS.len() as f64,
        ("person", _) => 0.5,
        _ => panic!("{attribute} is not promised"),
    }
}

/// What a prompt asks for; hair only where no hat covers what is measured.
fn asked(i: usize) -> Shown {
    let (hair, background) = HELD_OUT[i % HELD_OUT.len()];
    let hat = if (i / 8).is_multiple_of(2) { "none" } else { HATS[1 + i % 4] };
    let mut asked = Shown::from([
        ("background", background),
        ("shirt", SHIRTS[i % SHIRTS.len()].0),
        ("skin", SKINS[(i / 3) % SKINS.len()].0),
        ("glasses", GLASSES[i % GLASSES.len()]),
        ("hat", hat),
        ("person", PEOPLE[(i / 4) % PEOPLE.len()]),
    ]);
    if hat == "none" {
        asked.insert("hair", hair);
    }
    asked
}

/// The same in the words of four people.
fn prompt(i: usize) -> String {
    let asked = asked(i);
    let get = |name: &str| asked[name];
    let hair = HELD_OUT[i % HELD_OUT.len()].0;
    let style = match get("person") {
        "girl" => ["long", "short", "curly"][i % 3],
        _ => ["short", "spiky", "curly"][i % 3],
    };
    let glasses =
        if get("glasses") == "none" { String::new() } else { format!(", {}", get("glasses")) };
    let hat =
        if get("hat") == "none" { String::new() } else { format!(", wearing a {}", get("hat")) };
    let (person, skin, shirt) = (get("person"), get("skin"), get("shirt"));
    let background = get("background");
    match i % 4 {
        0 => format!(
            "portrait of a {person} with {style} {hair} hair{glasses}{hat}, {skin} skin, \
             {shirt} shirt, {background} background"
        ),
        1 => format!(
            "Portrait of a {} {person} with {skin} skin and {style} {hair} hair{hat}{glasses}, \
             wearing a {shirt} t-shirt, on a {background} background, smiling",
            if person == "girl" { "pretty" } else { "handsome" }
        ),
        2 => format!(
            "cartoon of a {person}, {background} background, {shirt} sweater{glasses}, \
             {style} {hair} hair, {skin} skin{hat}, highly detailed"
        ),
        _ => format!(
            "a {person}{hat}{glasses}, {style} {hair} hair, {skin} skin, {shirt} shirt, \
             in front of a {background} wall"
        ),
    }
}

/// The pictures of prompts, each of the seed of its number, at default settings.
fn pictures(prompts: impl Iterator<Item = String>, device: &str) -> Vec<Picture> {
    let folder = TempDir::new().unwrap();
    let line = |(i, prompt)| json!({"prompt": prompt, "seed": i, "output": format!("{i}.png")});
    let jobs: Vec<String> = prompts.enumerate().map(|job| line(job).to_string()).collect();
    fs::write(folder.path().join("jobs"), jobs.join("\n")).unwrap();
    let words = ["batch", "jobs", "--out-dir", "out", "-m", "demo", "--device", device];
    ends_with(0, &run(folder.path(), &words));
    (0..jobs.len()).map(|i| open(&folder.path().join(format!("out/{i}.png")))).collect()
}

fn open(path: &Path) -> Picture {
    Picture::from_file(&fs::read(path).unwrap()).unwrap()
}

/// By attribute: how many pictures show what was asked, and how many were asked.
fn obeyed(pictures: &[Picture]) -> HashMap<&'static str, (usize, usize)> {
    let measure = Measure::open();
    let mut counts = HashMap::new();
    for (i, picture) in pictures.iter().enumerate() {
        let shown = measure.of(picture);
        for (attribute, value) in asked(i) {
            let (right, all) = counts.entry(attribute).or_insert((0, 0));
            *right += usize::from(shown[attribute] == value);
            *all += 1;
        }
    }
    counts
}

#[test]
fn the_measure_is_right_about_drawn_portraits() {
    let sheet = open(&fixtures().join("demo/portraits.png"));
    let labels = fs::read_to_string(fixtures().join("demo/portraits.json")).unwrap();
    let labels: Vec<Value> = serde_json::from_str(&labels).unwrap();
    let (measure, mut wrong, mut all) = (Measure::open(), Vec::new(), 0);
    for (i, label) in labels.iter().enumerate() {
        let (row, column) = (i / 8 * 128, i % 8 * 128);
        let line = |y: usize| 3 * (y * sheet.size().width + column);
        let rgb = (row..row + 128).flat_map(|y| &sheet.rgb()[line(y)..line(y) + 3 * 128]);
        let size = ImageSize { height: 128, width: 128 };
        let shown = measure.of(&Picture::new(size, rgb.copied().collect()).unwrap());
        for (attribute, value) in shown {
            let is_covered = attribute == "hair" && label["hat"] != "none";
            let is_beard = attribute == "skin" && label["beard"] != "none";
            if !is_covered && !is_beard {
                all += 1;
                if label[attribute] != value {
                    wrong.push(format!("{i} {attribute}: {value}, not {}", label[attribute]));
                }
            }
        }
    }
    assert!(wrong.len() * 50 <= all, "of {all}: {wrong:?}");
}

#[test]
fn pictures_show_what_their_prompts_ask_for() {
    let pictures = pictures((0..PROMPTS).map(prompt), "cpu");
    let counts = obeyed(&pictures);
    let (right, all) = counts.values().fold((0, 0), |sum, c| (sum.0 + c.0, sum.1 + c.1));
    println!("{right} of {all} attributes are right: {counts:?}");
    assert!(right * 10 >= all * 9, "{right} of {all}: {counts:?}");
}

#[test]
fn pictures_of_an_empty_prompt_show_what_was_not_asked_for_by_chance_only() {
    let pictures = pictures((0..PROMPTS).map(|_| String::new()), "cpu");
    for (attribute, (right, all)) in obeyed(&pictures) {
        let of_prompts = (0..PROMPTS).filter_map(|i| asked(i).get(attribute).copied());
        let chance = of_prompts.map(|value| share(attribute, value)).sum::<f64>() / all as f64;
        let found = right as f64 / all as f64;
        println!("{attribute}: {found:.2} are right, {chance:.2} by chance");
        assert!(found <= chance + 0.1, "{attribute}: {found:.2}, by chance {chance:.2}");
    }
}

#[test]
fn every_scheduler_draws_what_is_asked_for() {
    let (folder, measure) = (TempDir::new().unwrap(), Measure::open());
    for scheduler in SchedulerKind::ALL {
        let name = scheduler.name();
        let words = ["portrait of a girl, red shirt, green background", "-m", "demo", "-s", "3"];
        let file = format!("{name}.png");
        let more = ["--scheduler", name, "-o", &file];
        ends_with(0, &run(folder.path(), &[&words[..], &more].concat()));
        let shown = measure.of(&open(&folder.path().join(file)));
        assert_eq!((shown["shirt"], shown["background"]), ("red", "green"), "{name}");
    }
}

#[test]
fn a_worker_draws_the_same_portraits() {
    let [here, there] = ["cpu", "mock"].map(|device| pictures((0..3).map(prompt), device));
    for (here, there) in here.iter().zip(&there) {
        assert_eq!(here.rgb(), there.rgb());
    }
}

#[test]
fn the_built_in_model_is_there_without_files_and_network() {
    let folder = TempDir::new().unwrap();
    let draw = |words: &[&str]| -> Output { run(folder.path(), words) };
    let words = ["Portrait of a pretty girl with red hair", "-m", "demo", "-s", "1", "--offline"];
    ends_with(0, &draw(&[&words[..], &["-o", "a.png"]].concat()));
    assert_eq!(open(&folder.path().join("a.png")).size(), ImageSize { height: 128, width: 128 });
    let found = json(folder.path(), &["info", "a.png", "--json"], 0);
    for (name, expected) in [
        ("steps", json!(20)),
        ("guidance_scale", json!(3.0)),
        ("resolved_scheduler", json!("dpm++2m")),
        ("scheduler", Value::Null),
    ] {
        assert_eq!(found["record"][name], expected, "{name}");
    }
    assert_eq!(found["record"]["model"]["source"], "demo");
    ends_with(0, &draw(&["verify", "a.png"]));
    ends_with(0, &draw(&[&words[..], &["-W", "192", "-H", "96", "-o", "b.png"]].concat()));
    assert_eq!(open(&folder.path().join("b.png")).size(), ImageSize { height: 96, width: 192 });
    let found = json(folder.path(), &["info", "demo", "--json"], 0);
    assert_eq!(found["folder"], Value::Null);
    assert_eq!(found["prediction_type"], "v_prediction");
    let (text, _) = ends_with(0, &draw(&["explain", "a boy", "-m", "demo"]));
    assert!(text.contains("demo, the program itself"), "{text}");
}

/// What would be drawn, with the file of defaults in the folder.
fn with_config(folder: &Path, words: &[&str]) -> Value {
    let mut command = command(folder, env!("CARGO_BIN_EXE_tiny-sd"));
    command.env("TINY_SD_CONFIG", folder.join("config.toml"));
    let output = command.args(["explain", "a boy", "-m", "demo", "--json"]).args(words).output();
    serde_json::from_str(&ends_with(0, &output.unwrap()).0).unwrap()
}

#[test]
fn its_steps_are_defaults_that_flags_and_the_file_of_defaults_change() {
    let folder = TempDir::new().unwrap();
    let steps = |words: &[&str]| {
        let words = [&["explain", "a boy", "-m", "demo", "--json"], words].concat();
        json(folder.path(), &words, 0)["steps"].clone()
    };
    assert_eq!(steps(&[]), 20);
    assert_eq!(steps(&["--steps", "7"]), 7);
    // Whatever the file of defaults says, and if it says nothing.
    for (file, words, expected) in [
        ("", &["-W", "64", "--scheduler", "euler"][..], 20),
        ("", &["-g", "4", "--steps", "3", "--offline"], 3),
        ("scheduler = \"ddim\"", &[], 20),
        ("steps = 30", &["-W", "64"], 30),
        ("steps = 30", &["--steps", "3"], 3),
        ("steps = 30\nguidance-scale = 5", &[], 30),
    ] {
        fs::write(folder.path().join("config.toml"), file).unwrap();
        let found = with_config(folder.path(), words);
        assert_eq!(found["steps"], expected, "{file:?} {words:?}");
        assert_eq!(found["model"]["source"], "demo", "{file:?} {words:?}");
    }
    let (_, stderr) =
        ends_with(2, &run(folder.path(), &["a boy", "-m", "demo", "--variant", "fp16"]));
    assert!(stderr.contains("the built-in model"), "{stderr}");
    let (_, stderr) = ends_with(2, &run(folder.path(), &["a boy", "--vae", "demo"]));
    assert!(stderr.contains("fits no other model"), "{stderr}");
}

#[test]
fn its_defaults_are_those_of_its_folder_too_and_info_says_them() {
    let folder = TempDir::new().unwrap();
    let on_disk = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    for model in ["demo", on_disk.to_str().unwrap()] {
        let (text, _) = ends_with(0, &run(folder.path(), &["info", model]));
        let line = "\ndefaults         --guidance-scale 3.0, --steps 20\n";
        assert!(text.contains(line), "{text}");
        let found = json(folder.path(), &["info", model, "--json"], 0);
        assert_eq!(found["defaults"], json!({"guidance-scale": 3.0, "steps": 20}), "{model}");
        let words = ["explain", "a boy", "-m", model, "--json"];
        assert_eq!(json(folder.path(), &words, 0)["steps"], 20, "{model}");
    }
    let tiny = fixtures().join("models/tiny");
    let (text, _) = ends_with(0, &run(folder.path(), &["info", tiny.to_str().unwrap()]));
    assert!(!text.contains("defaults"), "{text}");
}

#[test]
fn who_cannot_have_a_model_is_told_of_the_built_in_one_on_the_same_line() {
    let folder = TempDir::new().unwrap();
    let (_, stderr) = ends_with(3, &run(folder.path(), &["a boy", "-m", "org/name"]));
    assert!(stderr.contains("the small built-in model: -m demo"), "{stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
}

#[test]
fn diffusers_draws_the_same_portraits_with_it() {
    let path = fixtures().join("demo/golden.safetensors");
    let goldens = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let prompts = fs::read_to_string(fixtures().join("demo/golden.json")).unwrap();
    let prompts: Vec<String> = serde_json::from_str(&prompts).unwrap();
    for (i, picture) in pictures(prompts.into_iter(), "cpu").iter().enumerate() {
        let golden = goldens[&i.to_string()].flatten_all().unwrap().to_vec1::<u8>().unwrap();
        let found = psnr(picture.rgb(), &golden);
        assert!(found >= 50.0, "{i}: {found:.1} dB");
    }
}
