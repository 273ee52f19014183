//! What pictures say of themselves, read again by the program: `info`, `--from`, `verify`, and the
//! README's shell recipes as they stand there. Separate because every test starts from a picture.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;
use tiny_sd::image::{ImageSize, Parameters, Picture, PictureTexts};

use super::golden::fixtures;
use super::processes::{Worker, picture, signal};

fn model(name: &str) -> String {
    fixtures().join("models").join(name).to_str().unwrap().to_owned()
}

/// A command in a folder, whose caches are there as well, with the miniature model as the default.
pub fn command(folder: &Path, program: &str) -> Command {
    let mut command = Command::new(program);
    command
        .current_dir(folder)
        .env("HOME", folder.join("home"))
        .env("XDG_CACHE_HOME", folder.join("home"))
        .env("TINY_SD_MODEL", model("tiny"))
        .env("HF_HUB_OFFLINE", "1")
        .env_remove("TINY_SD_DEVICE")
        .env("TINY_SD_CONFIG", "")
        .stdin(std::process::Stdio::null());
    command
}

pub fn run(folder: &Path, words: &[&str]) -> Output {
    command(folder, env!("CARGO_BIN_EXE_tiny-sd")).args(words).output().unwrap()
}

/// What a run that must end with `code` prints: the product, and what is said beside it.
pub fn ends_with(code: i32, output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{stdout}{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    (stdout, stderr)
}

/// A folder with `fox.png`.
fn fox() -> TempDir {
    let folder = TempDir::new().unwrap();
    let words = ["a \"red\" fox\nin snow", "-n", "blurry", "-s", "18446744073709551615"];
    let more = ["--steps", "3", "-g", "5.5", "-W", "72", "-o", "fox.png"];
    ends_with(0, &run(folder.path(), &[&words[..], &more].concat()));
    folder
}

pub fn json(folder: &Path, words: &[&str], code: i32) -> Value {
    let (stdout, _) = ends_with(code, &run(folder, words));
    assert_eq!(stdout.lines().count(), 1, "{stdout}");
    serde_json::from_str(&stdout).unwrap()
}

#[test]
fn info_says_how_a_picture_was_made() {
    let folder = fox();
    let (text, stderr) = ends_with(0, &run(folder.path(), &["info", "fox.png"]));
    assert_eq!(stderr, "");
    for line in [
        "fox.png: 72x64",
        "prompt           a \"red\" fox\\nin snow",
        "negative prompt  blurry",
        "seed             18446744073709551615",
        "guidance scale   5.5",
        "scheduler        dpm++2m, the model's own",
        "device           cpu",
    ] {
        assert!(text.lines().any(|found| found == line), "{line:?} is not in {text}");
    }
    let found = json(folder.path(), &["info", "fox.png", "--json"], 0);
    assert_eq!(found["record"]["prompt"], "a \"red\" fox\nin snow");
    assert_eq!(found["record"]["seed"], u64::MAX);
    assert_eq!(found["record"]["model"]["source"], *model("tiny"));
    assert_eq!(found["settings"]["prompt"], "a \"red\" fox\nin snow");
    assert_eq!(found["settings"]["values"]["Sampler"], "DPM++ 2M");
    assert_eq!((&found["width"], &found["height"]), (&72.into(), &64.into()));
}

#[test]
fn info_says_what_a_model_consists_of() {
    let folder = fox();
    let recorded = json(folder.path(), &["info", "fox.png", "--json"], 0);
    let (text, _) = ends_with(0, &run(folder.path(), &["info", &model("tiny")]));
    let found = json(folder.path(), &["info", &model("tiny"), "--json"], 0);
    assert_eq!(found["weights_hash"], recorded["record"]["model"]["weights_hash"]);
    assert_eq!(found["config_hash"], recorded["record"]["model"]["config_hash"]);
    assert!(text.contains(found["weights_hash"].as_str().unwrap()), "{text}");
    let parameters: u64 = found["components"]
        .as_array()
        .unwrap()
        .iter()
        .map(|part| part["parameters"].as_u64().unwrap())
        .sum();
    assert_eq!(found["parameters"], parameters);
    assert_eq!(found["components"][1]["name"], "unet");
    assert_eq!(found["components"][1]["class"], "UNet2DConditionModel");
    let file = &found["components"][1]["files"][0];
    assert_eq!(file["name"], "unet/diffusion_pytorch_model.bin");
    let on_disk = fs::metadata(Path::new(&model("tiny")).join("unet/diffusion_pytorch_model.bin"));
    assert_eq!(file["bytes"], on_disk.unwrap().len());
    assert_eq!((&found["scheduler"], &found["width"]), (&"dpm++2m".into(), &64.into()));
    // Shards, and one file alone.
    let sharded = json(folder.path(), &["info", &model("sd2"), "--json"], 0);
    assert_eq!(sharded["components"][1]["files"].as_array().unwrap().len(), 2);
    assert_ne!(sharded["weights_hash"], found["weights_hash"]);
    let alone = format!("{}/vae/diffusion_pytorch_model.safetensors", model("sd1"));
    let alone = json(folder.path(), &["info", &alone, "--json"], 0);
    let sd1 = json(folder.path(), &["info", &model("sd1"), "--json"], 0);
    assert_eq!(alone["parameters"], sd1["components"][2]["parameters"]);
}

#[test]
fn what_is_no_picture_and_no_model_is_one_line() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("a.png"), b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR").unwrap();
    fs::write(folder.path().join("a.safetensors"), b"x").unwrap();
    for (words, code, expected) in [
        (&["info", "a.png"][..], 1, "a.png: the PNG cannot be read"),
        (&["verify", "a.png"], 1, "a.png: the PNG cannot be read"),
        (&["--from", "a.png"], 1, "--from a.png: the PNG cannot be read"),
        (&["info", "a.safetensors"], 3, "a.safetensors: "),
        (&["info", "org/name"], 3, "org/name"),
        (&["info", "b.png"], 2, "there is no such file"),
        (&["verify", "."], 1, "it is a folder"),
    ] {
        let (stdout, stderr) = ends_with(code, &run(folder.path(), words));
        assert_eq!((stdout.as_str(), stderr.lines().count()), ("", 1), "{words:?}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(expected), "{stderr}");
    }
    let mut command = command(folder.path(), env!("CARGO_BIN_EXE_tiny-sd"));
    let output = command.env("TINY_SD_MODEL", "nope").arg("a fox").output().unwrap();
    let (_, stderr) = ends_with(2, &output);
    assert!(stderr.contains("(which TINY_SD_MODEL says)"), "{stderr}");
}

#[test]
fn from_makes_the_same_picture_and_flags_that_are_given_win() {
    let folder = fox();
    let same =
        |name: &str| picture(&folder.path().join(name)) == picture(&folder.path().join("fox.png"));
    // The model is the record's, not the default.
    let mut command = command(folder.path(), env!("CARGO_BIN_EXE_tiny-sd"));
    command.env_remove("TINY_SD_MODEL").args(["--from", "fox.png", "-o", "again.png"]);
    ends_with(0, &command.output().unwrap());
    assert!(same("again.png"));
    let other = ["a cat", "--from", "fox.png", "--scheduler", "DPM++ 2M Karras", "-o", "cat.png"];
    ends_with(0, &run(folder.path(), &other));
    let cat = json(folder.path(), &["info", "cat.png", "--json"], 0);
    let fox = json(folder.path(), &["info", "fox.png", "--json"], 0);
    assert_eq!(cat["record"]["prompt"], "a cat");
    assert_eq!(cat["record"]["scheduler"], "dpm++2m-karras");
    assert_eq!(cat["record"]["seed"], fox["record"]["seed"]);
    // Without the record what AUTOMATIC1111 reads is left, which is enough.
    for name in ["fox.png", "cat.png"] {
        let file = fs::read(folder.path().join(name)).unwrap();
        let chunk = file.windows(8).position(|bytes| bytes == b"iTXttiny").unwrap() - 4;
        let len = u32::from_be_bytes(file[chunk..chunk + 4].try_into().unwrap()) as usize;
        let without = [&file[..chunk], &file[chunk + 12 + len..]].concat();
        fs::write(folder.path().join("without.png"), without).unwrap();
        let words = ["--from", "without.png", "-o", "third.png"];
        let (_, stderr) = ends_with(0, &run(folder.path(), &words));
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        let [found, expected] = ["third.png", name].map(|name| picture(&folder.path().join(name)));
        assert!(found == expected, "{name}");
    }
}

/// The picture with other pixels and the same texts.
fn edited(path: &Path, edit: impl FnOnce(Picture) -> Picture) -> Vec<u8> {
    rewritten(path, edit, |record| record)
}

/// The picture with other pixels and another record.
fn rewritten(
    path: &Path,
    edit: impl FnOnce(Picture) -> Picture,
    record_anew: impl FnOnce(String) -> String,
) -> Vec<u8> {
    let file = fs::read(path).unwrap();
    let record = PictureTexts::read(&file).unwrap().record.unwrap();
    let parameters = Parameters {
        prompt: String::new(),
        negative_prompt: String::new(),
        steps: 1,
        sampler: String::new(),
        schedule_type: None,
        guidance_scale: 1.0,
        seed: 1,
        size: ImageSize { height: 1, width: 1 },
        model: String::new(),
        clip_skip: 0,
        denoising_strength: None,
    };
    let picture = edit(Picture::from_opaque_file(&file).unwrap());
    picture.to_png(&parameters, &record_anew(record)).unwrap()
}

#[test]
fn a_picture_made_in_little_memory_says_so_and_is_made_again_so() {
    let folder = fox();
    let words = ["a fox", "-s", "1", "--steps", "2", "--low-memory", "-o", "small.png"];
    ends_with(0, &run(folder.path(), &words));
    let (text, _) = ends_with(0, &run(folder.path(), &["info", "small.png"]));
    assert!(text.contains("\nlow memory       yes\n"), "{text}");
    let (answer, _) = ends_with(0, &run(folder.path(), &["verify", "-q", "small.png"]));
    assert_eq!(answer, "small.png: bit-exact\n");
    ends_with(0, &run(folder.path(), &["--from", "small.png", "-o", "again.png"]));
    let again = json(folder.path(), &["info", "again.png", "--json"], 0);
    assert_eq!(again["record"]["low_memory"], true);
    let fox = json(folder.path(), &["info", "fox.png", "--json"], 0);
    assert_eq!(fox["record"].get("low_memory"), None);
    // Whether or not it rounds so that a pixel differs.
    let output = run(folder.path(), &["verify", "-q", "fox.png", "--low-memory"]);
    let answer = String::from_utf8(output.stdout).unwrap();
    assert!(answer.ends_with("; low memory: no is recorded, yes is here\n"), "{answer}");
}

#[test]
fn a_newer_record_is_read_and_both_numbers_are_named_on_one_line() {
    let folder = fox();
    let newer = |record: String| record.replacen("\"schema\":1,", "\"schema\":9,", 1);
    let file = rewritten(&folder.path().join("fox.png"), |picture| picture, newer);
    fs::write(folder.path().join("newer.png"), file).unwrap();
    for words in [
        &["info", "newer.png"][..],
        &["verify", "newer.png"],
        &["explain", "--from", "newer.png"],
        &["--from", "newer.png", "-o", "again.png"],
    ] {
        let (_, stderr) = ends_with(0, &run(folder.path(), words));
        let is_warning = |line: &&str| line.starts_with("warning: ");
        let warnings: Vec<_> = stderr.lines().filter(is_warning).collect();
        let expected = "warning: newer.png: its record is of schema 9, and this tiny-sd reads 1: \
                        what it says may mean something else";
        assert_eq!(warnings, [expected], "{words:?}: {stderr}");
    }
}

#[test]
fn verify_says_whether_a_picture_comes_out_the_same_and_what_is_not_as_recorded() {
    let folder = fox();
    let write = |name: &str, bytes: Vec<u8>| fs::write(folder.path().join(name), bytes).unwrap();
    let original = folder.path().join("fox.png");
    let dot = |picture: Picture| {
        let mut rgb = picture.rgb().to_vec();
        rgb[100] ^= 0x40;
        Picture::new(picture.size(), rgb).unwrap()
    };
    let cut = |picture: Picture| {
        let size = ImageSize { height: picture.size().height - 1, ..picture.size() };
        let len = size.height * size.width * 3;
        Picture::new(size, picture.rgb()[..len].to_vec()).unwrap()
    };
    write("edited.png", edited(&original, dot));
    write("cut.png", edited(&original, cut));
    let (worker, other_model) = (Worker::start(), model("sd1"));
    let url = folder.path().join("url");
    fs::write(&url, &worker.url).unwrap();
    let device = format!("@{}", url.display());
    let squares = 64.0f64.powi(2) / (72.0 * 64.0 * 3.0);
    let one_dot =
        format!("edited.png: differs, {:.2} dB", 10.0 * (255.0f64.powi(2) / squares).log10());
    for (words, code, expected) in [
        (&["fox.png"][..], 0, "fox.png: bit-exact"),
        (&["fox.png", "--device", "mock"], 0, "fox.png: bit-exact; device: cpu is recorded, mock"),
        (&["fox.png", "--device", &device], 0, "fox.png: bit-exact; device: cpu is recorded, quic"),
        (&["edited.png"], 1, &one_dot),
        (&["cut.png"], 1, "cut.png: differs, it has 72x63 pixels, and its record 72x64"),
        (&["fox.png", "--dtype", "f16"], 1, "dtype: f32 is recorded, f16 is here"),
        (&["fox.png", "-m", &other_model], 1, "; weights: "),
    ] {
        let output = run(folder.path(), &[&["verify", "-q"], words].concat());
        let (stdout, stderr) = ends_with(code, &output);
        assert_eq!((stdout.lines().count(), &*stderr), (1, ""), "{words:?}: {stdout}");
        assert!(stdout.contains(expected), "{words:?}: {stdout}");
        assert!(!stdout.contains(&worker.url), "{stdout}");
    }
    // Other kernels are named, whatever the picture came to.
    let recorded = json(folder.path(), &["info", "fox.png", "--json"], 0);
    let kernels = recorded["record"]["kernel_path"].as_str().unwrap();
    let mut slow = command(folder.path(), env!("CARGO_BIN_EXE_tiny-sd"));
    slow.env("TINY_SD_ISA", "portable").args(["verify", "fox.png"]);
    let said = String::from_utf8(slow.output().unwrap().stdout).unwrap();
    let difference = format!("kernels: {kernels} is recorded, portable is here");
    assert_eq!(said.contains(&difference), kernels != "portable", "{said}");

    let found = json(folder.path(), &["verify", "edited.png", "--json"], 1);
    assert_eq!((&found["is_exact"], &found["differences"]), (&false.into(), &Value::Array(vec![])));
    assert!(found["psnr_db"].as_f64().unwrap() > 50.0);
    let found = json(folder.path(), &["verify", "fox.png", "--json"], 0);
    assert_eq!((&found["is_exact"], &found["psnr_db"]), (&true.into(), &Value::Null));
}

/// The fenced block of this language in the README's section on scripts, the `number`-th from 0.
#[cfg(unix)]
fn recipe(language: &str, number: usize) -> String {
    let readme = include_str!("../README.md");
    let (_, section) = readme.split_once("\n## In scripts\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let fence = format!("\n```{language}\n");
    let mut blocks = section.split(&fence).skip(1);
    blocks.nth(number).unwrap().split_once("\n```").unwrap().0.to_owned() + "\n"
}

/// Prompts that shells like to break, each with whatever it holds.
#[cfg(unix)]
const PROMPTS: [&str; 5] = [
    "a red fox",
    "it's \"raining\" \\ $HOME `date`",
    "  two  spaces * ?",
    "--count 3",
    "東京の少女",
];

/// Runs a script of the README in a folder where the program is found as `tiny-sd`.
#[cfg(unix)]
fn shell(folder: &Path, script: &str) -> Output {
    let mut paths = vec![PathBuf::from(env!("CARGO_BIN_EXE_tiny-sd")).parent().unwrap().to_owned()];
    paths.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap()));
    let mut command = command(folder, "sh");
    command.env("PATH", std::env::join_paths(paths).unwrap());
    command.args(["-euc", script]).output().unwrap()
}

/// The prompts of all pictures in a folder, in the order of the pictures' names.
#[cfg(unix)]
fn prompts(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut names: Vec<_> = names.collect();
    names.sort();
    let record =
        |path: &PathBuf| PictureTexts::read(&fs::read(path).unwrap()).unwrap().record.unwrap();
    let prompt = |path| {
        let record: Value = serde_json::from_str(&record(path)).unwrap();
        record["prompt"].as_str().unwrap().to_owned()
    };
    names.iter().map(prompt).collect()
}

#[cfg(unix)]
#[test]
fn the_recipes_with_xargs_and_a_loop_make_every_prompt_as_it_is_and_lose_none() {
    let folder = TempDir::new().unwrap();
    // The last line may lack its end.
    fs::write(folder.path().join("prompts.txt"), PROMPTS.join("\n")).unwrap();
    let pictures = folder.path().join("pictures");
    ends_with(0, &shell(folder.path(), &recipe("sh", 0)));
    let mut found = prompts(&pictures);
    found.sort();
    let mut expected = PROMPTS.map(str::to_owned).to_vec();
    expected.sort();
    assert_eq!(found, expected);
    fs::remove_dir_all(&pictures).unwrap();
    ends_with(0, &shell(folder.path(), &recipe("sh", 1)));
    assert_eq!(prompts(&pictures), PROMPTS);
}

#[cfg(unix)]
#[test]
fn the_recipe_with_make_makes_what_has_changed_and_nothing_else() {
    if Command::new("make").arg("--version").output().is_err() {
        println!("there is no make: not tested");
        return;
    }
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("Makefile"), recipe("make", 0)).unwrap();
    fs::create_dir(at("prompts")).unwrap();
    fs::write(at("prompts/cat.txt"), "a cat\n").unwrap();
    fs::write(at("prompts/fox.txt"), PROMPTS[1]).unwrap();
    ends_with(0, &shell(folder.path(), "make -j2"));
    assert_eq!(prompts(&at("pictures")), ["a cat", PROMPTS[1]]);
    let modified = |name: &str| fs::metadata(at(name)).unwrap().modified().unwrap();
    let (cat, fox) = (modified("pictures/cat.png"), modified("pictures/fox.png"));
    // Later than the picture, whatever the clock of the file system can tell apart.
    fs::write(at("prompts/fox.txt"), "a fox").unwrap();
    let file = fs::File::options().write(true).open(at("prompts/fox.txt")).unwrap();
    file.set_modified(fox + std::time::Duration::from_millis(1)).unwrap();
    ends_with(0, &shell(folder.path(), "make"));
    assert_eq!(prompts(&at("pictures")), ["a cat", "a fox"]);
    assert_eq!(modified("pictures/cat.png"), cat);
}

#[cfg(unix)]
#[test]
fn info_of_a_pipe_that_stays_silent_ends_at_the_first_signal() {
    use std::os::unix::process::ExitStatusExt;

    let folder = TempDir::new().unwrap();
    let pipe = folder.path().join("picture.png");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let mut info =
        Command::new(env!("CARGO_BIN_EXE_tiny-sd")).arg("info").arg(&pipe).spawn().unwrap();
    // There when it reads.
    let silent = fs::OpenOptions::new().write(true).open(&pipe).unwrap();
    signal("TERM", info.id());
    drop(silent);
    assert_eq!(info.wait().unwrap().signal(), Some(15));
}
