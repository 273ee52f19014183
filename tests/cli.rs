//! The program as a user starts it: exit codes, what goes to which stream, and help.

use std::process::{Command, Output, Stdio};

/// Runs the program with words separated by `|`, nothing on standard input.
fn tiny_sd(words: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tiny-sd"))
        .args(words.split('|').filter(|_| !words.is_empty()))
        .env("HF_HUB_OFFLINE", "1")
        .env("TINY_SD_CONFIG", "")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn errors_are_one_line_on_stderr_with_the_documented_exit_code() {
    for (words, code, expected) in [
        ("", 2, "prompt on standard input is empty"),
        ("wroker", 2, "did you mean"),
        ("a|red|fox", 2, "quote it: tiny-sd \"a red fox\""),
        ("x|--stesp|3", 2, "'--steps'"),
        ("x|-W|100", 2, "96 and 104 are near"),
        ("x|-o|x.gif", 2, ".png, .jpg, .jpeg or .webp"),
        ("compare|x|--against|mock|-o|x.png", 2, "compare writes no picture"),
        ("x|-o|no/such/folder/x.png", 1, "there is no folder no/such/folder"),
    ] {
        let output = tiny_sd(words);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{words}: {stderr}");
        assert!(output.stdout.is_empty(), "{words}");
        assert!(stderr.starts_with("error: ") && stderr.contains(expected), "{words}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{words}: {stderr}");
    }
}

#[test]
fn help_and_version_go_to_stdout_and_succeed() {
    for words in
        ["--help", "-h", "help", "--version", "x|-V", "compare|-h", "worker|--help", "batch|-h"]
    {
        let output = tiny_sd(words);
        assert_eq!(output.status.code(), Some(0), "{words}");
        assert!(output.stderr.is_empty(), "{words}");
        assert!(text(&output.stdout).contains("tiny-sd"), "{words}");
    }
    assert_eq!(tiny_sd("help").stdout, tiny_sd("--help").stdout);
    let compare = tiny_sd("compare|--help").stdout;
    for part in ["--against <DEVICE>", "--steps <N>", "Exit codes:\n  0    no op differs\n  1 "] {
        assert!(text(&compare).contains(part), "{part:?} in {}", text(&compare));
    }
    let batch = tiny_sd("batch|--help").stdout;
    for code in ["0 ", "1 ", "2 ", "3 ", "4 ", "5    some", "6    no picture", "130 "] {
        let (_, codes) = text(&batch).split_once("Exit codes:").unwrap();
        assert!(codes.contains(&format!("\n  {code}")), "exit code {code}");
    }
    for part in ["JOBS", "--out-dir <DIR>", "--fail-fast", "--steps <N>", "{line}-{seed}.png"] {
        assert!(text(&batch).contains(part), "{part:?} in {}", text(&batch));
    }
    for flag in ["--output", "--count", "--preview", "--json"] {
        assert!(!text(&compare).contains(flag), "{flag}, which compare refuses");
    }
}

#[test]
fn help_explains_every_flag_by_example_every_exit_code_and_every_variable() {
    let output = tiny_sd("--help");
    let help = text(&output.stdout);
    let (flags, rest) = help.split_once("Examples:").unwrap();
    let is_flag = |word: &&str| word.starts_with("--") && word.len() > 2;
    let long = flags.lines().filter_map(|line| line.split_whitespace().find(is_flag));
    let long: Vec<_> = long.map(|flag| flag.trim_end_matches(',')).collect();
    assert!(long.len() >= 19, "{long:?}");
    for flag in long.iter().filter(|flag| !["--help", "--version"].contains(flag)) {
        assert!(rest.contains(flag), "no example of {flag}");
    }
    for code in ["  0 ", "  1 ", "  2 ", "  3 ", "  4 ", "  130 "] {
        assert!(rest.contains(code), "exit code {code}");
    }
    for variable in ["HF_HOME", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"] {
        assert!(rest.contains(variable), "{variable}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_picture_for_a_closed_standard_output_is_an_error() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/models/tiny");
    let check = |redirection: &str, code: i32, expected: &str| {
        let script = format!("\"$0\" x -q --steps 1 -o - -m {model} {redirection}");
        let program = env!("CARGO_BIN_EXE_tiny-sd");
        let output = Command::new("sh").args(["-c", &script, program]).output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{redirection}: {stderr}");
        assert!(stderr.contains(expected), "{redirection}: {stderr}");
    };
    check(">&-", 1, "standard output is closed");
    check("> /dev/null", 0, "");
}

#[cfg(unix)]
#[test]
fn a_token_file_that_is_a_link_to_nothing_is_one_clear_line() {
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("token");
    std::os::unix::fs::symlink("/nowhere/token", &link).unwrap();
    let output = tiny_sd(&format!("worker|--listen|127.0.0.1:0|--token-file|{}", link.display()));
    let expected = format!(
        "error: the worker's identity file {} is a link to nothing, or comes and goes\n",
        link.display()
    );
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(2), &*expected));
}

#[test]
fn more_steps_than_a_scheduler_can_take_say_which_and_why() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/models/tiny");
    let output = tiny_sd(&format!("x|-m|{model}|--steps|1000|--device|cpu|-o|-"));
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    let expected = "--steps 1000 are too many for 1000 timesteps with this spacing: timestep 500 ";
    assert!(stderr.contains(expected), "{stderr}");
}

#[cfg(target_os = "linux")]
#[test]
fn the_systemd_unit_of_the_readme_is_one() {
    let readme = include_str!("../README.md");
    let start = readme.find("[Unit]").unwrap();
    let end = start + readme[start..].find("```").unwrap();
    let installed = "/usr/local/bin/tiny-sd";
    let unit = readme[start..end].replace(installed, env!("CARGO_BIN_EXE_tiny-sd"));
    // The program knows its flags.
    let joined = unit.replace("\\\n", " ");
    let command = joined.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let words: Vec<_> = command.split_whitespace().skip(1).chain(["--help"]).collect();
    assert_eq!(tiny_sd(&words.join("|")).status.code(), Some(0), "{command}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny-sd-worker.service");
    std::fs::write(&path, unit).unwrap();
    match Command::new("systemd-analyze").arg("verify").arg(&path).output() {
        Ok(output) => assert!(output.status.success(), "{}", text(&output.stderr)),
        Err(error) => println!("systemd-analyze: {error}: its part was not tested"),
    }
}
