//! A batch that ends in the middle, by `kill -9` or Ctrl-C, and is started again.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Child;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::{Batch, MANIFEST, results};
use crate::faults::Dice;
use crate::processes::signal;

const LINES: usize = 8;

fn jobs() -> String {
    (0..LINES).map(|line| format!("--prompt \"a fox {line}\" --seed {line} --count 2\n")).collect()
}

/// A child that a failing test does not leave behind.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a batch for so long at most, then kills it.
fn run_for(batch: &Batch, flags: &[&str], time: Duration) {
    let mut child = Killed(batch.command(flags).spawn().unwrap());
    let stdout = BufReader::new(child.0.stdout.take().unwrap());
    let (ends, ended) = channel::<()>();
    std::thread::spawn(move || {
        // Until it is closed.
        stdout.lines().map_while(Result::ok).for_each(drop);
        drop(ends);
    });
    let waited = ended.recv_timeout(time);
    assert!(matches!(waited, Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected)));
}

fn check_books(batch: &Batch) {
    let books = fs::read_to_string(batch.out().join(MANIFEST)).unwrap();
    assert!(books.ends_with('\n'));
    let lines = books.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let mut outputs: Vec<_> =
        lines.map(|line| line["output"].as_str().unwrap().to_owned()).collect();
    outputs.sort();
    let all = outputs.len();
    outputs.dedup();
    assert_eq!(outputs.len(), all, "a picture that was there was made again");
    assert_eq!(outputs, batch.files());
}

#[test]
fn a_batch_that_is_killed_anywhere_completes_with_every_picture_once_and_none_damaged() {
    let flags = ["--steps", "2", "--batch-size", "3"];
    let whole = Batch::new(&jobs());
    let start = Instant::now();
    whole.run(&flags, 0);
    let whole_ms = start.elapsed().as_millis() as u64;
    for mut dice in Dice::some(1) {
        let batch = Batch::new(&jobs());
        for round in 0..5 {
            let time = Duration::from_millis(dice.between(whole_ms / 10, whole_ms * 9 / 10));
            println!("round {round}: killed after {time:?} of {whole_ms} ms");
            run_for(&batch, &flags, time);
        }
        let events = batch.run(&flags, 0);
        assert_eq!(events.len(), 2 * LINES);
        assert!(batch.pictures() == whole.pictures(), "{:?}", results(&events));
        check_books(&batch);
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_a_batch_with_130_and_what_is_finished_stays() {
    let batch = Batch::new("--prompt a --steps 1\n--prompt b --steps 900");
    let mut child = Killed(batch.command(&["-s", "1", "--json"]).spawn().unwrap());
    let mut lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
    let is_second = |line: &String| line.contains("\"event\":\"step\",\"line\":2");
    let second = lines.by_ref().map(Result::unwrap).find(is_second);
    assert!(second.is_some());
    signal("INT", child.0.id());
    let last = lines.map(Result::unwrap).last().unwrap();
    assert_eq!(last, "{\"v\":1,\"event\":\"error\",\"code\":130,\"message\":\"interrupted\"}");
    assert_eq!(child.0.wait().unwrap().code(), Some(130));
    assert_eq!(batch.files(), ["00001-1.png"]);
    check_books(&batch);
}
