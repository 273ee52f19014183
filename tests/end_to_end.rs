//! The program itself, from a command line to a PNG, on miniature models: the right picture, or one
//! line that says what is wrong.

use std::fs;
use std::io::BufReader;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use tiny_sd::cli::Settings;

use super::golden::{Case, cases, fixtures, golden_picture, psnr};
use super::hub::server::{Model, Request, Server};

/// The program in `folder`, whose environment is the test's alone.
fn tiny_sd(folder: &Path, words: &[&str], environment: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tiny-sd"));
    command.env_clear();
    for name in ["PATH", "SystemRoot"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    // With backtraces asked for there is still one line.
    command.env("RUST_BACKTRACE", "1").envs(environment.iter().copied());
    command.args(words).current_dir(folder).stdin(Stdio::null());
    command
}

/// As [`tiny_sd`], run to its end.
pub fn run(folder: &Path, words: &[&str], environment: &[(&str, &str)]) -> Output {
    tiny_sd(folder, words, environment).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

pub fn model(name: &str) -> PathBuf {
    fixtures().join("models").join(name)
}

/// Every file below a folder, by its path with `/`.
fn files(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_str().unwrap();
                found.push(name.replace('\\', "/"));
            }
        }
    }
    found.sort();
    found
}

/// Pixels and `parameters` of a PNG.
pub fn read_png(path: &Path) -> (Vec<u8>, String) {
    let file = BufReader::new(fs::File::open(path).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut rgb).unwrap();
    let info = reader.info();
    let latin = info.uncompressed_latin1_text.iter().filter(|chunk| chunk.keyword == "parameters");
    let international = info.utf8_text.iter().filter(|chunk| chunk.keyword == "parameters");
    let latin = latin.map(|chunk| chunk.text.clone());
    let mut texts: Vec<_> =
        latin.chain(international.map(|chunk| chunk.get_text().unwrap())).collect();
    assert_eq!(texts.len(), 1, "{texts:?}");
    (rgb, texts.remove(0))
}

/// The record that a picture carries.
pub fn record(path: &Path) -> Settings {
    let file = BufReader::new(fs::File::open(path).unwrap());
    let reader = png::Decoder::new(file).read_info().unwrap();
    let chunk = reader.info().utf8_text.iter().find(|chunk| chunk.keyword == "tiny-sd").unwrap();
    Settings::from_json(&chunk.get_text().unwrap()).unwrap()
}

#[test]
fn a_picture_carries_everything_that_determined_it() {
    let (folder, path) = (TempDir::new().unwrap(), model("tiny"));
    let seed = u64::MAX.to_string();
    let paint = |name: &str, device: &str| {
        let words = ["a\n\"fox\"", "-o", name, "-m", path.to_str().unwrap(), "-s", &seed];
        let more = ["-g", "0.30000000000000004", "--steps", "2", "--device", device];
        let output = run(folder.path(), &[&words[..], &more].concat(), &[("HOME", "home")]);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        record(&folder.path().join(name))
    };
    let here = paint("here.png", "cpu");
    assert_eq!(here.prompt, "a\n\"fox\"");
    assert_eq!((here.seed, here.guidance_scale), (u64::MAX, 0.1 + 0.2));
    assert_eq!((here.width, here.height, here.steps), (64, 64, 2));
    assert_eq!((&here.scheduler, &*here.resolved_scheduler), (&None, "dpm++2m"));
    assert_eq!((&*here.dtype, &*here.device), ("f32", "cpu"));
    assert!(here.kernel_path.is_some());
    assert_eq!(here.model.source, path.to_str().unwrap());
    assert_eq!(here.model.weights_hash.len(), 64);
    // The second run finds the digests in the cache.
    let again = paint("again.png", "cpu");
    assert_eq!(again, here);
    let there = paint("there.png", "mock");
    assert_eq!(there.key(), here.key());
    assert_eq!((&*there.device, &there.model), ("mock", &here.model));
    assert_eq!(there.kernel_path, here.kernel_path);
}

/// The flags that ask for a case.
fn flags(case: &Case) -> Vec<String> {
    let request = case.request();
    let mut flags = vec![
        "--prompt".to_owned(),
        request.prompt.to_owned(),
        format!("--seed={}", request.seed),
        format!("--steps={}", request.steps),
        format!("--guidance-scale={}", request.guidance_scale),
        format!("--height={}", request.size.height),
        format!("--width={}", request.size.width),
        "--threads=2".to_owned(),
    ];
    if !request.negative_prompt.is_empty() {
        flags.push(format!("--negative-prompt={}", request.negative_prompt));
    }
    if let Some(scheduler) = case.scheduler {
        flags.push(format!("--scheduler={scheduler}"));
    }
    flags
}

fn expected_parameters(case: &Case, sampler: &str, model: &str) -> String {
    let request = case.request();
    let negative = match request.negative_prompt {
        "" => String::new(),
        text => format!("Negative prompt: {text}\n"),
    };
    format!(
        "{}\n{negative}Steps: {}, Sampler: {sampler}, CFG scale: {}, Seed: {}, Size: {}x{}, \
         Model: {model}, Version: tiny-sd {}",
        request.prompt,
        request.steps,
        request.guidance_scale,
        request.seed,
        request.size.width,
        request.size.height,
        env!("CARGO_PKG_VERSION"),
    )
}

#[test]
fn a_model_folder_and_a_prompt_become_diffusers_picture_and_say_how() {
    for (name, case, sampler) in [
        ("tiny", "base", "DPM++ 2M"),
        ("tiny", "negative-prompt", "DPM++ 2M"),
        ("tiny", "non-latin-and-emoji", "DPM++ 2M"),
        ("tiny", "odd-latents-72x40", "DPM++ 2M"),
        ("tiny", "guidance-1", "DPM++ 2M"),
        ("tiny", "scheduler-euler-a", "Euler a"),
        ("sd1", "base", "PLMS"),
        ("sd2", "base", "DDIM"),
    ] {
        let golden = golden_picture(name, case);
        let (what, case) = (format!("{name} {case}"), cases(name).remove(case).unwrap());
        let folder = TempDir::new().unwrap();
        let (path, flags) = (model(name), flags(&case));
        let mut words = vec!["-o", "out.png", "-m", path.to_str().unwrap()];
        words.extend(flags.iter().map(String::as_str));
        let output = run(folder.path(), &words, &[]);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{what}: {stderr}");
        assert!(output.stdout.is_empty(), "{what}");
        assert_eq!(stderr.lines().count(), 1, "{what}: {stderr}");
        assert!(stderr.starts_with("out.png: seed "), "{what}: {stderr}");
        assert_eq!(files(folder.path()), ["out.png"], "{what}");
        let (rgb, parameters) = read_png(&folder.path().join("out.png"));
        let found = psnr(&rgb, &golden);
        assert!(found >= 50.0, "{what}: {found:.1} dB");
        assert_eq!(parameters, expected_parameters(&case, sampler, name), "{what}");
    }
}

#[test]
fn stats_say_what_each_stage_took_here_and_what_memory_it_needed() {
    let (folder, path) = (TempDir::new().unwrap(), model("tiny"));
    let words = ["a fox", "--stats", "--steps=3", "--count=2", "-m", path.to_str().unwrap()];
    let words = [&words[..], &["-o", "out.png", "--batch-size=1", "--threads=1"]].concat();
    let output = run(folder.path(), &words, &[("TINY_SD_ISA", "portable")]);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    let words: Vec<Vec<&str>> =
        stderr.lines().skip(2).map(|line| line.split_whitespace().collect()).collect();
    let [title, head, stages @ .., memory] = words.as_slice() else { panic!("{stderr}") };
    assert_eq!(title.join(" "), "cpu: 1 thread, kernels portable");
    assert_eq!(head.join(" "), "stage seconds steps s/step");
    let named: Vec<_> = stages.iter().map(|stage| (stage[0], stage.get(2).copied())).collect();
    // DPM++ 2M evaluates once a step.
    let expected = [("load", None), ("text", None), ("unet", Some("6")), ("vae", None)];
    assert_eq!(named, expected, "{stderr}");
    assert!(stages.iter().all(|stage| stage[1].parse::<f64>().unwrap() > 0.0), "{stderr}");
    if cfg!(target_os = "linux") {
        assert_eq!(memory[..2], ["this", "process:"]);
        assert!(memory[2].parse::<u64>().unwrap() > 5, "{stderr}");
    }
}

/// A hub that has the fixture `name` as `org/name`.
pub fn hub(name: &str) -> Server {
    hub_of(model(name))
}

/// A hub with the files of a folder as `org/name`.
pub fn hub_of(folder: PathBuf) -> Server {
    let file = |file: String| {
        let is_large = file.ends_with(".bin") || file.ends_with(".safetensors");
        (file.clone(), fs::read(folder.join(file)).unwrap(), is_large)
    };
    let mut model = Model { files: files(&folder).into_iter().map(file).collect(), ..Model::new() };
    // A repository has more than a picture needs.
    let decoy = ("unet/diffusion_pytorch_model.onnx".to_owned(), b"not asked for".to_vec(), true);
    model.files.push(decoy);
    Server::start(move |request: &Request| model.reply(request))
}

#[test]
fn a_repository_is_downloaded_once_and_then_needs_no_network() {
    for (name, sampler) in [("tiny", "DPM++ 2M"), ("sd2", "DDIM")] {
        let (server, folder) = (hub(name), TempDir::new().unwrap());
        let case = cases(name).remove("base").unwrap();
        let (url, flags) = (server.url(), flags(&case));
        let environment = [("HF_ENDPOINT", url.as_str()), ("HF_HOME", "cache")];
        let paint = |more: &[&str]| {
            let mut words = vec!["-m", "org/name"];
            words.extend(more);
            words.extend(flags.iter().map(String::as_str));
            let output = run(folder.path(), &words, &environment);
            assert_eq!(output.status.code(), Some(0), "{name}: {}", text(&output.stderr));
            assert!(output.stdout.is_empty(), "{name}");
        };
        paint(&["-o", "first.png"]);
        let mut asked: Vec<String> = server
            .take_log()
            .into_iter()
            .filter(|request| request.is_download())
            .map(|request| request.path)
            .collect();
        // Each file's own address leads to the storage at most once.
        let all = asked.len();
        asked.sort();
        asked.dedup();
        assert_eq!(asked.len(), all, "{name}: {asked:?}");
        assert!(!asked.iter().any(|path| path.ends_with(".onnx")), "{name}: {asked:?}");

        paint(&["-o", "second.png", "--offline"]);
        assert!(server.take_log().is_empty(), "{name}: offline means no request");
        let [first, second] = ["first.png", "second.png"].map(|png| folder.path().join(png));
        assert_eq!(fs::read(&first).unwrap(), fs::read(second).unwrap(), "{name}");
        let (rgb, parameters) = read_png(&first);
        let found = psnr(&rgb, &golden_picture(name, "base"));
        assert!(found >= 50.0, "{name}: {found:.1} dB");
        assert_eq!(parameters, expected_parameters(&case, sampler, "name"), "{name}");
    }
}

/// Runs a command line that must fail: one line with all of `parts`, no panic, no file left.
pub fn check_failure(
    what: &str,
    words: &[&str],
    code: i32,
    parts: &[&str],
    environment: &[(&str, &str)],
) {
    let folder = TempDir::new().unwrap();
    let output = run(folder.path(), words, environment);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{what}: {stderr}");
    assert!(output.stdout.is_empty(), "{what}");
    assert_eq!(stderr.lines().count(), 1, "{what}: {stderr}");
    assert!(stderr.starts_with("error: ") && !stderr.contains("panicked"), "{what}: {stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{what}: '{part}' is not in: {stderr}");
    }
    let left: Vec<_> =
        files(folder.path()).into_iter().filter(|name| !name.starts_with("cache/")).collect();
    assert!(left.is_empty(), "{what}: {left:?}");
}

#[test]
fn a_model_that_cannot_be_had_is_one_line() {
    let server = Server::start(|request| Model::new().reply(request));
    // Nobody listens on a port that was free a moment ago.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (served, closed) = (server.url(), format!("http://{closed}"));
    let online = [("HF_ENDPOINT", served.as_str()), ("HF_HOME", "cache")];
    let nobody = [("HF_ENDPOINT", closed.as_str()), ("HF_HOME", "cache")];
    for (what, words, code, parts, environment) in [
        (
            "a wrong name",
            ["-m", "org/nam"],
            3,
            ["there is no model org/nam", "check the name"],
            &online,
        ),
        ("a repository of something else", ["-m", "org/name"], 3, ["org/name", "unet"], &online),
        ("no network", ["-m", "org/name"], 3, ["org/name", "check the network"], &nobody),
        ("no folder", ["-m", "./none"], 3, ["there is no folder", "none"], &online),
    ] {
        let words = ["a fox", "-o", "out.png", words[0], words[1]];
        check_failure(what, &words, code, &parts, environment);
    }
    let offline = ["a fox", "-o", "out.png", "-m", "org/name", "--offline"];
    server.take_log();
    check_failure("not in the cache", &offline, 3, &["org/name", "cache"], &online);
    assert!(server.take_log().is_empty());
}

/// A copy of the model `name` that `break_it` has been at.
fn broken(name: &str, break_it: Break<'_>) -> TempDir {
    let copy = TempDir::new().unwrap();
    for file in files(&model(name)) {
        let to = copy.path().join(&file);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(model(name).join(&file), to).unwrap();
    }
    break_it(copy.path());
    copy
}

fn edit(path: &Path, name: &str, value: Value) {
    let mut config: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    config[name] = value;
    fs::write(path, config.to_string()).unwrap();
}

fn truncate(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

/// What is done to a copy of a model before it is used.
type Break<'a> = &'a dyn Fn(&Path);

fn check_broken(what: &str, name: &str, break_it: Break<'_>, parts: &[&str]) {
    let copy = broken(name, break_it);
    let words = ["a fox", "-o", "out.png", "-m", copy.path().to_str().unwrap()];
    let before = files(copy.path());
    check_failure(what, &words, 3, parts, &[]);
    assert_eq!(files(copy.path()), before, "{what}");
}

#[test]
fn a_broken_or_missing_file_is_one_line_that_names_it() {
    const UNET: &str = "unet/diffusion_pytorch_model.bin";
    const VAE: &str = "vae/diffusion_pytorch_model.bin";
    const SAFETENSORS: &str = "vae/diffusion_pytorch_model.safetensors";
    const SHARD: &str = "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors";
    let malicious = fixtures().join("weights/malicious.bin");
    let replace = |at: &Path| assert_ne!(fs::copy(&malicious, at.join(UNET)).unwrap(), 0);
    let remove = |at: &Path, name: &str| fs::remove_file(at.join(name)).unwrap();
    let empty = |at: &Path| fs::write(at.join(VAE), "").unwrap();
    let breaks: [(&str, &str, Break<'_>, &[&str]); 9] = [
        ("a truncated pickle", "tiny", &|at| truncate(&at.join(UNET)), &[UNET]),
        ("a malicious pickle", "tiny", &replace, &[UNET, "system"]),
        ("an empty file", "tiny", &empty, &[VAE, "is empty"]),
        ("truncated safetensors", "sd1", &|at| truncate(&at.join(SAFETENSORS)), &[SAFETENSORS]),
        ("no weights", "tiny", &|at| remove(at, VAE), &["vae has no weights", VAE, SAFETENSORS]),
        ("no configuration", "tiny", &|at| remove(at, "unet/config.json"), &["unet/config.json"]),
        ("half of one", "tiny", &|at| truncate(&at.join("vae/config.json")), &["vae/config.json"]),
        ("no vocabulary", "tiny", &|at| remove(at, "tokenizer/vocab.json"), &["vocab.json"]),
        ("a missing shard", "sd2", &|at| remove(at, SHARD), &["that are not there", SHARD]),
    ];
    for (what, name, break_it, parts) in breaks {
        check_broken(what, name, break_it, parts);
    }
}

#[test]
fn a_configuration_that_does_not_fit_is_one_line_that_names_the_field_or_the_tensors() {
    const TEXT: &str = "text_encoder/config.json";
    const UNET: &str = "unet/config.json";
    const SCHEDULER: &str = "scheduler/scheduler_config.json";
    let edits: [(&str, &str, &str, Value, &[&str]); 5] = [
        ("sd1", TEXT, "intermediate_size", json!(64), &["of another shape", "mlp.fc1.weight"]),
        ("tiny", TEXT, "num_hidden_layers", json!(2), &["text_encoder", "unexpected", "layers.2."]),
        ("tiny", UNET, "class_embed_type", json!("timestep"), &[UNET, "class_embed_type"]),
        ("tiny", UNET, "cross_attention_dim", json!(768), &["cross_attention_dim", "768", "32"]),
        ("sd1", SCHEDULER, "_class_name", json!("IPNDMScheduler"), &["IPNDM", "--scheduler"]),
    ];
    for (name, file, field, value, parts) in edits {
        check_broken(field, name, &|at| edit(&at.join(file), field, value.clone()), parts);
    }
}

#[test]
fn a_request_that_cannot_be_is_one_line_before_anything_is_loaded() {
    // Were the model loaded first, that would be what fails.
    let copy = broken("tiny", &|at| truncate(&at.join("unet/diffusion_pytorch_model.bin")));
    let (path, file) = (copy.path().to_str().unwrap(), copy.path().join("model_index.json"));
    let beneath_a_file = format!("{}/out.png", file.display());
    for (what, words, code, part) in [
        ("a width that is no multiple", ["-W", "100"], 2, "--width"),
        ("a height that is no multiple", ["-H", "63"], 2, "--height"),
        ("no such folder", ["-o", "none/out.png"], 1, "there is no folder none"),
        ("a folder that is a file", ["-o", &beneath_a_file], 1, "model_index.json"),
        ("too many steps to count", ["--steps", "0"], 2, "--steps"),
        ("an unknown scheduler", ["--scheduler", "eluer"], 2, "did you mean euler?"),
    ] {
        check_failure(what, &["a fox", "-m", path, words[0], words[1]], code, &[part], &[]);
    }
}

#[test]
fn a_scheduler_named_without_sigmas_is_recorded_with_those_of_the_model() {
    let copy = broken("tiny", &|at| {
        let path = at.join("scheduler/scheduler_config.json");
        let text = fs::read_to_string(&path).unwrap();
        let (plain, karras) = ("\"use_karras_sigmas\": false", "\"use_karras_sigmas\": true");
        assert!(text.contains(plain));
        fs::write(path, text.replace(plain, karras)).unwrap();
    });
    let (folder, model) = (TempDir::new().unwrap(), copy.path().to_str().unwrap());
    for (asked, used, part) in [
        (Some("euler"), "euler-karras", "Sampler: Euler, Schedule type: Karras, CFG scale:"),
        (Some("euler-beta"), "euler-beta", "Sampler: Euler, Schedule type: Beta, CFG scale:"),
        (Some("euler-a"), "euler-a", "Sampler: Euler a, CFG scale:"),
        (None, "dpm++2m-karras", "Sampler: DPM++ 2M, Schedule type: Karras, CFG scale:"),
    ] {
        let flags = ["-m", model, "-s", "1", "--steps=2", "--threads=1"];
        let scheduler = asked.into_iter().flat_map(|name| ["--scheduler", name]);
        let flags: Vec<&str> = flags.into_iter().chain(scheduler).collect();
        let done = |words: &[&str]| {
            let output = run(folder.path(), words, &[("HOME", "home")]);
            assert_eq!(output.status.code(), Some(0), "{words:?}: {}", text(&output.stderr));
            output
        };
        done(&[&["a fox", "-o", "x.png"][..], &flags].concat());
        let (path, verify) = (folder.path().join("x.png"), done(&["verify", "-q", "x.png"]));
        let (_, parameters) = read_png(&path);
        let found = record(&path);
        assert_eq!((found.scheduler.as_deref(), &*found.resolved_scheduler), (asked, used));
        assert!(parameters.contains(part), "{parameters}");
        assert_eq!(text(&verify.stdout), "x.png: bit-exact\n", "{used}");
        // A batch keeps its books by the same settings.
        fs::write(folder.path().join("jobs.txt"), "a fox").unwrap();
        let out = format!("out-{used}");
        let events = done(&[&["batch", "jobs.txt", "--out-dir", &out][..], &flags].concat());
        let key = format!("\"settings\":\"{}\"", found.key());
        assert!(text(&events.stdout).contains(&key), "{used}: {}", text(&events.stdout));
    }
}

/// A child that a failing test does not leave behind.
#[cfg(unix)]
struct Running(std::process::Child);

#[cfg(unix)]
impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_while_denoising_ends_with_130_and_leaves_no_file() {
    use std::io::{BufRead, Read};

    let folder = TempDir::new().unwrap();
    let path = model("tiny");
    let path = path.to_str().unwrap();
    let words = ["a fox", "-v", "--steps=999", "--scheduler=euler", "-o", "out.png", "-m", path];
    let mut command = tiny_sd(folder.path(), &words, &[]);
    let mut child = Running(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
    let mut stderr = BufReader::new(child.0.stderr.take().unwrap());
    // Said when the last part is loaded; what follows are a thousand steps.
    let mut line = String::new();
    while !line.starts_with("loading vae") {
        line.clear();
        assert_ne!(stderr.read_line(&mut line).unwrap(), 0, "it ended before it painted");
    }
    let id = child.0.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).unwrap();
    assert_eq!(child.0.wait().unwrap().code(), Some(130), "{rest}");
    assert!(rest.ends_with("error: interrupted\n"), "{rest}");
    assert!(files(folder.path()).is_empty());
}
