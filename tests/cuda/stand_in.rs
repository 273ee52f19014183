//! The unchanged program on a GPU that is none: NVIDIA's driver and compiler are stood in for by
//! libraries that run the same kernels on the processor (`stand_in/`). What only NVIDIA's own show
//! is in `scripts/gpu-check`.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use tempfile::TempDir;

use crate::golden::psnr;
use crate::processes::{Worker, client, program};

/// The folder with both libraries, made once for all tests.
fn libraries() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    FOLDER.get_or_init(build).path()
}

fn build() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda");
    let sources = std::fs::read_dir(root.join("stand_in")).unwrap();
    let sources = sources.map(|entry| entry.unwrap().path());
    let (compiler, driver): (Vec<_>, Vec<_>) = sources
        .filter(|path| path.extension().is_some_and(|suffix| suffix == "c"))
        .partition(|path| path.ends_with("compiler.c"));
    let make = |name: &str, sources: &[PathBuf]| {
        let status = Command::new("cc")
            .args(["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-I"])
            .arg(&root)
            .arg(format!("-DEMULATOR_FOLDER=\"{}\"", root.display()))
            .arg(format!("-Wl,-soname,{name},-Bsymbolic,-z,nodelete"))
            .arg("-o")
            .arg(folder.path().join(name))
            .args(sources)
            .args(["-ldl", "-lm", "-lpthread"])
            .status()
            .unwrap();
        assert!(status.success(), "{name}");
    };
    make("libcuda.so.1", &[driver, vec![root.join("emulator.c")]].concat());
    make("libnvrtc.so.13", &compiler);
    // The name that is asked for first.
    std::os::unix::fs::symlink("libcuda.so.1", folder.path().join("libcuda.so")).unwrap();
    folder
}

/// A place with the stand-in, a cache, and a log of what the GPU did.
struct Machine(TempDir);

impl Machine {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn with(&self, mut command: Command) -> Command {
        command
            .env("LD_LIBRARY_PATH", libraries())
            .env("TINY_SD_CUDA_LIBS", libraries())
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("TINY_SD_STAND_IN_LOG", self.path("log"));
        command
    }

    /// What the GPU did since it was asked last.
    fn log(&self) -> String {
        let log = std::fs::read_to_string(self.path("log")).unwrap_or_default();
        let _ = std::fs::remove_file(self.path("log"));
        log
    }

    fn paint(&self, device: &str, name: &str, more: &[&str]) -> (Output, PathBuf) {
        let output = self.path(name);
        let ran = self.with(client("tiny", device, &output, more)).output().unwrap();
        (ran, output)
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn rgb(path: &Path) -> Vec<u8> {
    image::open(path).unwrap().into_rgb8().into_raw()
}

/// How many lines of a log begin so.
fn count(log: &str, start: &str) -> usize {
    log.lines().filter(|line| line.starts_with(start)).count()
}

#[test]
fn devices_are_listed_with_their_driver_and_compiler() {
    let machine = Machine::new();
    let list = |more: &[&str]| {
        let mut command = program();
        command.arg("devices").args(more);
        let output = machine.with(command).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout).to_owned()
    };
    let listed = list(&[]);
    for part in ["cpu ", "cuda:0    Stand-in GPU, 8.0 GiB", "capability 8.0", "NVRTC 13.0"] {
        assert!(listed.contains(part), "{part}: {listed}");
    }
    let place = libraries().join("libnvrtc.so.13");
    let json = list(&["--json"]);
    let gpu: serde_json::Value = serde_json::from_str(json.lines().nth(1).unwrap()).unwrap();
    assert_eq!(gpu["compiler_path"], place.display().to_string());
    assert_eq!(gpu["usable"], true);
}

#[test]
fn a_picture_is_that_of_the_cpu_and_the_second_start_compiles_nothing() {
    let machine = Machine::new();
    let steps = ["--steps", "4", "--dtype", "f32"];
    let (ran, here) = machine.paint("cpu", "here.png", &steps);
    assert!(ran.status.success(), "{}", text(&ran.stderr));
    for round in 0..2 {
        let (ran, there) = machine.paint("cuda", &format!("{round}.png"), &steps);
        assert!(ran.status.success(), "{}", text(&ran.stderr));
        let said = text(&ran.stderr);
        assert!(said.contains(" 3 graph replays, 0 ops on the host"), "{said}");
        let found = psnr(&rgb(&there), &rgb(&here));
        assert!(found >= 50.0, "{found:.1} dB");
        let log = machine.log();
        assert_eq!(count(&log, "compile") > 0, round == 0, "{log}");
        assert_eq!(count(&log, "graph launch"), 3, "{log}");
        assert!(log.contains("live_allocations=0"), "{log}");
    }
    let kept: Vec<_> = std::fs::read_dir(machine.path("cache/tiny-sd/kernels")).unwrap().collect();
    assert!(kept.len() >= 4, "{} sources", kept.len());
}

#[test]
fn a_worker_on_a_gpu_says_the_dtype_and_gives_the_very_picture() {
    let machine = Machine::new();
    let steps = ["--steps", "4"];
    let (ran, here) = machine.paint("cuda", "here.png", &steps);
    assert!(ran.status.success(), "{}", text(&ran.stderr));
    let started = machine.with(program());
    let worker = Worker::start_by(started, tempfile::tempdir().unwrap(), &["--device", "cuda:0"]);
    // The client has no GPU.
    let output = machine.path("there.png");
    let ran = client("tiny", &worker.url, &output, &steps).output().unwrap();
    assert!(ran.status.success(), "{}", text(&ran.stderr));
    assert!(rgb(&output) == rgb(&here), "other pixels");
    worker.logs("graph replays");
    assert!(worker.log().contains(" 2 graph replays, 0 ops on the host"), "{}", worker.log());
    let info = program().arg("info").arg(&output).output().unwrap();
    let info = text(&info.stdout);
    assert!(info.contains("f16") && info.contains("cuda-sm80-Stand-in-GPU"), "{info}");
}

#[test]
fn what_is_missing_or_too_small_is_one_line() {
    let machine = Machine::new();
    let check = |device: &str, set: (&str, &str), expected: &str| {
        let output = machine.path("x.png");
        let mut command = machine.with(client("tiny", device, &output, &["--steps", "1"]));
        let ran = command.env(set.0, set.1).stderr(Stdio::piped()).output().unwrap();
        let said = text(&ran.stderr);
        let errors: Vec<_> = said.lines().filter(|line| line.starts_with("error: ")).collect();
        assert!(errors.len() == 1 && errors[0].contains(expected), "{expected}: {said}");
        assert!(!output.exists() && !ran.status.success());
    };
    check("cuda:1", ("X", ""), "there is no GPU 1: the driver has 1");
    check("cuda", ("TINY_SD_STAND_IN_MEMORY", "100000"), "out of memory: the GPU has no ");
    check(
        "cuda",
        ("TINY_SD_STAND_IN_CAPABILITY", "3.5"),
        "compute capability 3.5, and 7.5 is the least",
    );
    check("cuda", ("TINY_SD_STAND_IN_DRIVER", "11080"), "serves CUDA 11.8, and 12.0 is needed");
    check("cuda", ("LD_LIBRARY_PATH", "/nowhere"), "there is no NVIDIA driver here");
}

#[test]
fn a_worker_whose_gpu_fails_for_good_says_so_and_ends() {
    let machine = Machine::new();
    let mut started = machine.with(program());
    started.env("TINY_SD_STAND_IN_LAUNCHES", "500");
    let worker = Worker::start_by(started, tempfile::tempdir().unwrap(), &["--device", "cuda"]);
    let output = machine.path("x.png");
    for expected in ["unspecified launch failure", "has failed, and works again only"] {
        let ran = client("tiny", &worker.url, &output, &[]).output().unwrap();
        let said = text(&ran.stderr);
        assert!(!ran.status.success() && said.contains(expected), "{expected}: {said}");
    }
    assert_eq!(worker.end(), Some(1));
    assert!(!output.exists());
}

/// Those tests that need a GPU, on this one.
#[test]
fn the_tests_of_a_gpu_pass() {
    let machine = Machine::new();
    let mut tests = Command::new(std::env::current_exe().unwrap());
    tests.args(["--ignored", "gpu::", "--test-threads", "2"]);
    let output = machine.with(tests).output().unwrap();
    let said = text(&output.stdout);
    assert!(output.status.success(), "{said}{}", text(&output.stderr));
    assert!(said.contains("test result: ok. 9 passed"), "{said}");
}
