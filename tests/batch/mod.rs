//! `tiny-sd batch` with the real program and miniature models: what it makes, what it leaves alone,
//! and how it ends.

mod devices;
mod events;
mod killed;

use std::fs;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::processes::program;

/// The file in which a batch keeps its books.
const MANIFEST: &str = "tiny-sd-batch.jsonl";

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/tiny")
}

/// A folder with a file of jobs.
struct Batch {
    folder: TempDir,
}

impl Batch {
    fn new(jobs: &str) -> Self {
        let batch = Self { folder: tempfile::tempdir().unwrap() };
        batch.set_jobs(jobs);
        batch
    }

    fn set_jobs(&self, jobs: &str) {
        fs::write(self.folder.path().join("jobs"), jobs).unwrap();
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command = program();
        command
            .args(["batch", "jobs", "--out-dir", "out", "--threads", "2", "-m"])
            .arg(model())
            .args(more)
            .env("XDG_CACHE_HOME", self.folder.path().join("cache"))
            .current_dir(self.folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs it to its end, which must have this exit code; the events.
    fn run(&self, more: &[&str], code: i32) -> Vec<Value> {
        let output = self.command(more).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        events(&output.stdout)
    }

    /// The files in its folder, without its books.
    fn files(&self) -> Vec<String> {
        let mut files = Vec::new();
        let mut folders = vec![self.out()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => folders.push(path),
                    false => files.push(path.strip_prefix(self.out()).unwrap().to_owned()),
                }
            }
        }
        let mut names: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
        names.retain(|name| name != MANIFEST);
        names.sort();
        names
    }

    /// The files, and their pixels.
    fn pictures(&self) -> Vec<(String, Vec<u8>)> {
        let read = |name: String| (name.clone(), pixels(&self.out().join(name)));
        self.files().into_iter().map(read).collect()
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn events(stdout: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(stdout).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "{text}");
    text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

fn pixels(path: &Path) -> Vec<u8> {
    let file = BufReader::new(fs::File::open(path).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut rgb).unwrap();
    rgb
}

/// `line index event`, with `skipped` behind it where it says so; sorted, since their order means
/// nothing.
fn results(events: &[Value]) -> Vec<String> {
    let result = |event: &Value| {
        let text = format!("{} {} {}", event["line"], event["index"], event["event"]);
        let skipped = if event["skipped"] == true { " skipped" } else { "" };
        text.replace('"', "") + skipped
    };
    let mut results: Vec<_> = events.iter().map(result).collect();
    results.sort();
    results
}

/// The pixels that the single command makes.
fn single(words: &[&str]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.png");
    run_single(words, &path);
    pixels(&path)
}

/// The events that it tells.
fn single_events(words: &[&str]) -> Vec<Value> {
    let folder = tempfile::tempdir().unwrap();
    run_single(words, &folder.path().join("x.png"))
}

fn run_single(words: &[&str], path: &Path) -> Vec<Value> {
    let mut command = program();
    command.args(words).args(["-q", "--threads", "2", "-m"]).arg(model()).arg("-o").arg(path);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    events(&output.stdout)
}

#[test]
fn every_line_becomes_the_picture_that_the_single_command_makes_of_it() {
    let batch = Batch::new(
        "# a comment\n\
         a red fox\n\
         \n\
         --prompt \"a \\\"red\\\" cat\" --seed 5 --negative_prompt 'blurry, text' --cfg_scale 3 \
         --sampler_name \"Euler a\" --n_iter 2\n\
         --prompt a red fox --width 72 --output foxes/wide.png",
    );
    let events = batch.run(&["-s", "7", "--steps", "2"], 0);
    assert_eq!(results(&events), ["2 1 done", "4 1 done", "4 2 done", "5 1 done"]);
    let expected = ["00002-7.png", "00004-5.png", "00004-6.png", "foxes/wide.png"];
    assert_eq!(batch.files(), expected);
    let cat = ["a \"red\" cat", "-n", "blurry, text", "-g", "3", "--scheduler", "euler-a"];
    for (name, words, seed) in [
        ("00002-7.png", &["a red fox"][..], "7"),
        ("00004-5.png", &cat, "5"),
        ("00004-6.png", &cat, "6"),
        ("foxes/wide.png", &["a red fox", "-W", "72"], "7"),
    ] {
        let words = [words, &["--steps", "2", "-s", seed]].concat();
        assert!(pixels(&batch.out().join(name)) == single(&words), "{name}");
    }
    let wide = events.iter().find(|event| event["line"] == 5).unwrap();
    assert_eq!(wide["output"], "out/foxes/wide.png");
    assert_eq!((&wide["width"], &wide["height"]), (&json!(72), &json!(64)));
    let words = ["a red fox", "-W", "72", "-s", "7", "--steps", "2", "--json"];
    assert_eq!(wide["settings"], single_events(&words).last().unwrap()["settings"]);
}

#[test]
fn a_rerun_makes_what_is_missing_damaged_or_changed_and_nothing_else() {
    let lines = |fifth: &str| {
        let line = |(prompt, more): (&str, &str)| {
            format!("{{\"prompt\": \"{prompt}\", \"seed\": 1, \"steps\": 1{more}}}\n")
        };
        [("a", ""), ("b", ""), ("c", ""), ("d", ""), ("e", fifth)].map(line).concat()
    };
    let batch = Batch::new(&lines(""));
    let all = ["1 1 done", "2 1 done", "3 1 done", "4 1 done", "5 1 done"];
    assert_eq!(results(&batch.run(&[], 0)), all);
    let first = batch.pictures();
    assert_eq!(first.len(), 5);
    let skipped = all.map(|result| format!("{result} skipped"));
    assert_eq!(results(&batch.run(&[], 0)), skipped);

    fs::remove_file(batch.out().join("00001-1.png")).unwrap();
    let second = batch.out().join("00002-1.png");
    let mut bytes = fs::read(&second).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&second, bytes).unwrap();
    fs::write(batch.out().join("00003-1.png"), "").unwrap();
    batch.set_jobs(&lines(", \"guidance_scale\": 2"));
    let events = batch.run(&[], 0);
    let expected = ["1 1 done", "2 1 done", "3 1 done", "4 1 done skipped", "5 1 done"];
    assert_eq!(results(&events), expected);
    let second = batch.pictures();
    assert!(first[..4] == second[..4] && first[4] != second[4]);

    // A flag of the batch changes the jobs that have nothing of their own there.
    let events = batch.run(&["-n", "blurry"], 0);
    assert!(events.iter().all(|event| event["skipped"] == false));
}

#[test]
fn what_cannot_be_made_does_not_stop_the_others_and_the_exit_code_says_so() {
    // A name under a file, a folder's name, and more steps than the model's scheduler can take.
    let jobs = "--prompt a --output a.png\n\
                --prompt b --output file/b.png\n\
                --prompt c --output folder.png\n\
                --prompt d --steps 1000\n\
                --prompt e";
    let batch = Batch::new(jobs);
    fs::create_dir_all(batch.out().join("folder.png")).unwrap();
    fs::write(batch.out().join("file"), "").unwrap();
    let flags = ["-s", "1", "--steps", "1"];
    let events = batch.run(&flags, 5);
    let expected = ["1 1 done", "2 1 error", "3 1 error", "4 1 error", "5 1 done"];
    assert_eq!(results(&events), expected);
    let error = |line: u64| events.iter().find(|event| event["line"] == line).unwrap();
    assert_eq!((&error(2)["code"], &error(4)["code"]), (&json!(1), &json!(2)));
    assert!(error(4)["message"].as_str().unwrap().contains("--steps 1000"), "{}", error(4));

    // What failed is tried again, and made once it can be.
    fs::remove_dir(batch.out().join("folder.png")).unwrap();
    let expected = ["1 1 done skipped", "2 1 error", "3 1 done", "4 1 error", "5 1 done skipped"];
    assert_eq!(results(&batch.run(&flags, 5)), expected);

    batch.set_jobs("--prompt d --steps 1000\n--prompt e --steps 1000 --count 2");
    let events = batch.run(&["-s", "1"], 6);
    assert_eq!(results(&events), ["1 1 error", "2 1 error", "2 2 error"]);
}

#[test]
fn fail_fast_begins_no_other_picture() {
    let batch = Batch::new("--prompt a --steps 1\n--prompt b --steps 1000\n--prompt c --steps 1");
    let events = batch.run(&["-s", "1", "--fail-fast"], 5);
    assert_eq!(results(&events), ["1 1 done", "2 1 error"]);
    let events = batch.run(&["-s", "1"], 5);
    assert_eq!(results(&events), ["1 1 done skipped", "2 1 error", "3 1 done"]);
}

#[test]
fn what_is_wrong_with_the_command_line_or_the_jobs_is_one_line_before_anything_runs() {
    let check = |jobs: &str, more: &[&str], code: i32, expected: &str| {
        let batch = Batch::new(jobs);
        let output = batch.command(more).output().unwrap();
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(output.stdout.is_empty());
        assert!(text.starts_with("error: ") && text.contains(expected), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(code != 2 || !batch.out().exists(), "{expected}");
    };
    let wrong = "{\"prompt\": \"a\"}\n\n{\"prompt\": \"b\", \"steps\": \"many\"}";
    check(wrong, &[], 2, "jobs: line 3: field \"steps\": \"many\" is wrong: a whole number, 1 to");
    check("{\"prompt\": \"a\", \"sede\": 1}", &[], 2, "line 1: field \"sede\" is unknown");
    check("{\"prompt\": \"a\", \"model\": \"b/c\"}", &[], 2, "give --model to tiny-sd batch");
    check("a\nb", &["-o", "x.png"], 2, "lines 1 and 2 both write x.png");
    check("# nothing", &[], 2, "there is no job in it");
    check("a", &["--device", "cpu", "--device", "cpu"], 2, "--device cpu is given twice");
    check("a", &["--model", "./none"], 2, "the argument '--model <REPO|DIR|FILE|demo>'");
    check("a", &["--variant", "no"], 3, "no");
}

#[test]
fn two_batches_cannot_be_at_work_in_one_folder() {
    let batch = Batch::new("a");
    fs::create_dir(batch.out()).unwrap();
    let books = fs::File::create(batch.out().join(MANIFEST)).unwrap();
    books.lock().unwrap();
    let output = batch.command(&["--steps", "1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let expected = "error: another tiny-sd batch is at work in out; wait for it, or give another \
                    --out-dir\n";
    assert_eq!(stderr(&output), expected);
    // Closing it is not enough while a child of another test has it too.
    books.unlock().unwrap();
    batch.run(&["--steps", "1"], 0);
}

#[test]
fn standard_input_is_a_file_of_jobs_and_standard_error_says_how_far_it_is() {
    let batch = Batch::new("");
    let mut command = batch.command(&["--steps", "1", "-s", "3"]);
    // The name of the jobs is the first argument behind `batch`.
    let words: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
    let words =
        words.iter().map(|word| if word == "jobs" { "-".as_ref() } else { word.as_os_str() });
    let mut from_stdin = program();
    from_stdin.args(words).current_dir(batch.folder.path());
    fs::write(batch.folder.path().join("prompts"), "{red} fox\nblue fox\n").unwrap();
    let prompts = fs::File::open(batch.folder.path().join("prompts")).unwrap();
    let output = from_stdin.stdin(prompts).output().unwrap();
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    assert_eq!(batch.files(), ["00001-3.png", "00002-3.png"]);
    assert!(text.contains("out/00001-3.png: seed 3, 64x64, 1 step in "), "{text}");
    assert!(text.contains("; 1/2 pictures, ") && text.contains("; 2/2 pictures\n"), "{text}");
    assert!(text.contains("2 made, 0 there before, 0 failed, in "), "{text}");
    let quiet = command.arg("-q").stdin(Stdio::null()).output().unwrap();
    assert_eq!(stderr(&quiet).lines().count(), 1, "an empty file: {}", stderr(&quiet));
}

#[cfg(unix)]
#[test]
fn nothing_is_written_through_links_and_a_preview_takes_the_place_of_no_file() {
    use std::os::unix::fs::symlink;
    let flags = ["-W", "64", "-H", "64", "--steps", "3", "-s", "1", "--preview", "1"];
    let batch = Batch::new(
        "{\"prompt\":\"a\",\"output\":\"sub/p.png\"}\n{\"prompt\":\"b\",\"output\":\"c.png\"}\n",
    );
    let elsewhere = batch.folder.path().join("elsewhere");
    fs::create_dir_all(batch.out()).unwrap();
    fs::create_dir(&elsewhere).unwrap();
    symlink(&elsewhere, batch.out().join("sub")).unwrap();
    fs::write(batch.out().join("c-preview.png"), "mine").unwrap();
    let events = batch.run(&flags, 5);
    let error = events.iter().find(|event| event["event"] == "error").unwrap();
    assert!(error["message"].as_str().unwrap().contains("sub is a link"), "{error}");
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
    assert_eq!(fs::read(batch.out().join("c-preview.png")).unwrap(), b"mine");
    assert!(batch.out().join("c.png").is_file());
    assert!(!batch.out().join("c-preview-1.png").exists());
    // Nor is the manifest somebody else's file.
    let books = batch.out().join(MANIFEST);
    fs::rename(&books, elsewhere.join("books")).unwrap();
    symlink(elsewhere.join("books"), &books).unwrap();
    let output = batch.command(&flags).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("it is not a file"), "{}", stderr(&output));
}
