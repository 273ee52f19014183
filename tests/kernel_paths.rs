//! Every way through the CPU's kernels that this machine can run: the one that is taken otherwise
//! is no different. Separate because a process takes one, so each needs a process of its own.

use std::process::Command;

use tempfile::TempDir;
use tiny_sd::backend::cpu::{kernel_path, kernel_paths};

use super::end_to_end::{check_failure, model, read_png, run};
use super::golden::psnr;

const VARIABLE: &str = "TINY_SD_ISA";

#[test]
fn every_path_keeps_what_the_tests_of_kernels_say() {
    assert!(kernel_paths().contains(&"portable"));
    let others = kernel_paths().into_iter().filter(|path| *path != kernel_path());
    let children = others.map(|path| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["kernels::", "winograd::the_error_is"]).env(VARIABLE, path);
        let child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
        (path, child)
    });
    for (path, child) in children.collect::<Vec<_>>() {
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{path}: {text}");
        assert!(text.contains("test kernels::every_op_matches"), "{path}: {text}");
        assert!(text.contains("test winograd::the_error_is"), "{path}: {text}");
    }
}

/// A picture of the miniature model with two steps.
fn picture(seed: &str, flags: &[&str], environment: &[(&str, &str)]) -> Vec<u8> {
    let (folder, model) = (TempDir::new().unwrap(), model("tiny"));
    let mut words = vec!["a fox", "-s", seed, "--steps", "2", "-W", "72", "-H", "64"];
    words.extend(["-o", "out.png", "-m", model.to_str().unwrap()]);
    words.extend(flags);
    let output = run(folder.path(), &words, environment);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    read_png(&folder.path().join("out.png")).0
}

#[test]
fn every_path_makes_the_same_picture() {
    let expected = picture("7", &["--threads", "2"], &[]);
    for path in kernel_paths() {
        let found = picture("7", &["--threads", "2"], &[(VARIABLE, path)]);
        let decibels = psnr(&found, &expected);
        assert!(decibels >= 60.0, "{path}: {decibels:.1} dB");
    }
    // An other picture is not that near.
    assert!(psnr(&expected, &picture("8", &[], &[])) < 40.0);
}

#[test]
fn a_picture_in_little_memory_is_the_same() {
    for dtype in ["f32", "bf16"] {
        let whole = picture("7", &["--dtype", dtype], &[]);
        let small = picture("7", &["--dtype", dtype, "--low-memory"], &[]);
        let (decibels, least) = (psnr(&small, &whole), if dtype == "f32" { 60.0 } else { 35.0 });
        assert!(decibels >= least, "{dtype}: {decibels:.1} dB");
    }
}

#[test]
fn the_number_of_threads_changes_no_bit_of_a_picture() {
    for dtype in ["f32", "bf16"] {
        let [one, more @ ..] = ["1", "2", "3"]
            .map(|threads| picture("7", &["--threads", threads, "--dtype", dtype], &[]));
        assert!(more.iter().all(|more| *more == one), "{dtype}");
    }
}

#[test]
fn a_path_that_is_not_there_is_one_line_before_anything_is_loaded() {
    let words = ["a fox", "-m", "./none"];
    let check = |value, parts: &[&str]| {
        check_failure(value, &words, 2, parts, &[(VARIABLE, value)]);
    };
    check("avx", &["TINY_SD_ISA", "\"avx\"", "portable"]);
    check("AVX2", &["TINY_SD_ISA", "portable"]);
    let compare = ["compare", "a fox", "--against", "mock", "-m", "./none"];
    check_failure("compare", &compare, 2, &["TINY_SD_ISA"], &[(VARIABLE, "x")]);
    check_failure("worker", &["worker"], 2, &["TINY_SD_ISA"], &[(VARIABLE, "x")]);
    // Empty is none.
    check_failure("empty", &words, 3, &["there is no folder"], &[(VARIABLE, "")]);
}
