//! A batch on workers, of which some are killed.

use std::io::{BufRead, BufReader, Read};

use serde_json::Value;

use super::{Batch, results};
use crate::faults::Dice;
use crate::processes::{Worker, signal};

const LINES: usize = 8;
const STEPS: u64 = 12;

fn batch() -> Batch {
    let line = |line| format!("--prompt \"a fox {line}\" --seed {line}\n");
    Batch::new(&(0..LINES).map(line).collect::<String>())
}

const FLAGS: [&str; 4] = ["--steps", "12", "--batch-size", "1"];

fn flags<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&FLAGS[..], more].concat()
}

/// What a batch told, and how it ended.
struct Told {
    events: Vec<Value>,
    stderr: String,
    code: Option<i32>,
}

impl Told {
    fn count(&self, name: &str) -> usize {
        self.events.iter().filter(|event| event["event"] == name).count()
    }
}

/// Runs a batch, and kills the worker at the `at`-th event that counts.
fn run(
    batch: &Batch,
    more: &[&str],
    worker: &Worker,
    at: u64,
    counts: &dyn Fn(&Value) -> bool,
) -> Told {
    let mut child = batch.command(&flags(more)).spawn().unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let mut seen = 0;
    let mut events = Vec::new();
    for line in stdout.lines() {
        let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
        if counts(&event) {
            seen += 1;
            if seen == at {
                signal("KILL", worker.id());
            }
        }
        events.push(event);
    }
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert!(seen >= at, "only {seen} events: {stderr}");
    Told { events, stderr, code: child.wait().unwrap().code() }
}

#[test]
fn devices_share_the_pictures_and_one_that_is_killed_gives_its_own_back() {
    for mut dice in Dice::some(1) {
        let local = batch();
        local.run(&FLAGS, 0);
        let [first, second] = [Worker::start(), Worker::start()];
        let name = format!("quic://{}", first.address());
        let at = dice.between(1, STEPS);
        println!("a worker is killed at the {at}. step of its first picture");
        let counts = |event: &Value| event["event"] == "step" && event["device"] == *name;
        let batch = batch();
        let devices = ["--device", &first.url, "--device", &second.url, "--json"];
        let told = run(&batch, &devices, &first, at, &counts);
        assert_eq!(told.code, Some(0), "{}", told.stderr);
        assert_eq!(["device_lost", "done", "error"].map(|name| told.count(name)), [1, LINES, 0]);
        let lost = told.events.iter().find(|event| event["event"] == "device_lost").unwrap();
        assert_eq!(lost["device"], *name);
        assert!(batch.pictures() == local.pictures(), "pictures of workers are those of the CPU");
    }
}

#[test]
fn a_batch_whose_only_worker_is_killed_completes_once_it_is_there_again() {
    for mut dice in Dice::some(1) {
        let local = batch();
        local.run(&FLAGS, 0);
        let worker = Worker::start();
        // Loading counts as well.
        let at = dice.between(1, LINES as u64 * STEPS * 5 / 8);
        println!("the worker is killed at event {at}");
        let batch = batch();
        let told = run(&batch, &["--device", &worker.url, "--json"], &worker, at, &|_| true);
        let done = told.count("done");
        assert_eq!(told.code, Some(4), "{}", told.stderr);
        // The batch has one, whatever many pictures wait.
        assert_eq!(told.count("error"), 1, "{:?}", results(&told.events));
        let worker = Worker::start_in(worker.kill(), &[]);
        let events = batch.run(&flags(&["--device", &worker.url]), 0);
        let skipped = events.iter().filter(|event| event["skipped"] == true).count();
        assert_eq!(skipped, done);
        assert!(batch.pictures() == local.pictures(), "another picture");
    }
}

#[test]
fn without_any_device_the_batch_is_one_line_and_makes_nothing() {
    let worker = Worker::start();
    let url = worker.url.clone();
    drop(worker.kill());
    let batch = batch();
    let output = batch.command(&["--device", &url]).output().unwrap();
    let text = super::stderr(&output);
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(output.stdout.is_empty());
    assert!(text.lines().last().unwrap().starts_with("error: "), "{text}");
    // One that is there is enough.
    let events = batch.run(&flags(&["--device", &url, "--device", "cpu"]), 0);
    assert_eq!(events.len(), LINES);
}
