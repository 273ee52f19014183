//! Worker or client killed, without a word, at random points of a picture.

use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::{Duration, Instant};

use super::{Dice, local, outputs};
use crate::processes::{
    Running, Worker, client, fails, paint, picture, signal, succeeds, weight_bytes,
};
use crate::udp_proxy::{Faults, UdpProxy};

/// How long a dead peer may go unnoticed.
const NOTICED_WITHIN: Duration = Duration::from_secs(5);
/// Bytes before a weight's elements in its file.
const HEADER_LEN: u64 = 128;

/// So many that most of a picture is steps.
const MANY_STEPS: [&str; 2] = ["--steps", "100"];

/// Whole pictures, for comparison.
struct Whole {
    picture: (Vec<u8>, String),
    /// Of all weights.
    weight_bytes: u64,
    /// Of a first picture, which mostly are weights.
    packets: u64,
    /// Of one with its weights there and many steps.
    packets_of_steps: u64,
}

static WHOLE: LazyLock<Whole> = LazyLock::new(Whole::new);

/// What the worker has when a picture begins.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Cache {
    Empty,
    Full,
}

impl Whole {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let picture = local(folder.path(), &[]);
        let worker = Worker::start();
        let proxy = UdpProxy::start(worker.address(), Faults::default());
        let output = folder.path().join("x.png");
        let url = worker.url_at(proxy.address());
        let weight_bytes = weight_bytes(&succeeds(&paint("tiny", &url, &output, &[])));
        assert_eq!(weight_bytes, delivered(&worker.cache()), "all weights are in the cache");
        let packets = proxy.packets();
        succeeds(&paint("tiny", &url, &output, &MANY_STEPS));
        Self { picture, weight_bytes, packets, packets_of_steps: proxy.packets() - packets }
    }

    fn packets(&self, cache: Cache) -> u64 {
        match cache {
            Cache::Empty => self.packets,
            Cache::Full => self.packets_of_steps,
        }
    }
}

/// A worker, and what it has.
fn worker(cache: Cache) -> Worker {
    let worker = Worker::start();
    if cache == Cache::Full {
        let folder = tempfile::tempdir().unwrap();
        succeeds(&paint("tiny", &worker.url, &folder.path().join("x.png"), &[]));
    }
    worker
}

/// Bytes of the weights that a cache has whole.
fn delivered(cache: &Path) -> u64 {
    let is_whole = |entry: &std::fs::DirEntry| !is_incoming(entry);
    let files = std::fs::read_dir(cache).unwrap().map(Result::unwrap).filter(is_whole);
    files.map(|file| file.metadata().unwrap().len() - HEADER_LEN).sum()
}

fn is_incoming(entry: &std::fs::DirEntry) -> bool {
    entry.file_name().to_string_lossy().starts_with(".incoming-")
}

fn check_worker_killed(dice: &mut Dice, cache: Cache) {
    let whole = &*WHOLE;
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("x.png");
    let worker = worker(cache);
    let proxy = UdpProxy::start(worker.address(), Faults::default());
    let packets = whole.packets(cache);
    let at = dice.between(1, packets * 7 / 10);
    println!("cache {cache:?}: the worker is killed at packet {at} of about {packets}");
    let (id, killed) = (worker.id(), Arc::new(OnceLock::new()));
    let when = killed.clone();
    proxy.at_packet(at, move || {
        signal("KILL", id);
        when.set(Instant::now()).unwrap();
    });
    let steps = if cache == Cache::Full { &MANY_STEPS[..] } else { &[] };
    let found = paint("tiny", &worker.url_at(proxy.address()), &output, steps);
    let noticed = killed.get().expect("the worker was not killed").elapsed();
    let line = fails(&found);
    assert!(line.contains(&proxy.address().to_string()), "{line}");
    println!("noticed after {noticed:?}: {}", line.trim());
    assert!(noticed < NOTICED_WITHIN, "noticed after {noticed:?}");
    assert_eq!(outputs(folder.path()), [""; 0], "a part of a picture");

    let was_there = delivered(&worker.cache());
    let worker = Worker::start_in(worker.kill(), &[]);
    let entries = std::fs::read_dir(worker.cache()).unwrap().map(Result::unwrap);
    assert_eq!(entries.filter(is_incoming).count(), 0, "parts of weights stay");
    let second = succeeds(&paint("tiny", &worker.url, &output, &[]));
    assert!(picture(&output) == whole.picture, "another picture");
    assert_eq!(weight_bytes(&second), whole.weight_bytes - was_there);
}

fn check_client_killed(dice: &mut Dice, cache: Cache) {
    let whole = &*WHOLE;
    let folder = tempfile::tempdir().unwrap();
    let worker = worker(cache);
    let begun = worker.log().matches("session begins").count();
    let bystander = folder.path().join("bystander.png");
    let bystander = Running::start(client("tiny", &worker.url, &bystander, &["--steps", "30"]));
    worker.logs(&format!("session begins number={}", begun + 1));

    let proxy = UdpProxy::start(worker.address(), Faults::default());
    // After the handshake, which the worker ends by itself.
    let at = dice.between(20, whole.packets(cache));
    println!("cache {cache:?}: the client is killed at packet {at}");
    let (tell, id) = channel();
    let (tell_when, when) = channel();
    proxy.at_packet(at, move || {
        signal("KILL", id.recv().unwrap());
        tell_when.send(Instant::now()).unwrap();
    });
    // Far more steps than it lives for: queued work.
    let (url, victim) = (worker.url_at(proxy.address()), folder.path().join("victim.png"));
    let victim = Running::start(client("tiny", &url, &victim, &["--steps", "900"]));
    tell.send(victim.id()).unwrap();
    victim.end();
    worker.logs(&format!("session{{number={}}}: the session's memory is free", begun + 2));
    let noticed = when.recv().unwrap().elapsed();
    assert!(noticed < NOTICED_WITHIN, "noticed after {noticed:?}");
    assert!(!outputs(folder.path()).iter().any(|name| name.contains("victim")));

    succeeds(&bystander.end());
    let steps = local(folder.path(), &["--steps", "30"]);
    assert!(picture(&folder.path().join("bystander.png")) == steps);
    let output = folder.path().join("after.png");
    succeeds(&paint("tiny", &worker.url, &output, &[]));
    assert!(picture(&output) == whole.picture, "another picture");
}

#[test]
fn a_worker_that_is_killed_is_one_line_and_nothing_delivered_is_sent_again() {
    for mut dice in Dice::some(1) {
        check_worker_killed(&mut dice, Cache::Empty);
        check_worker_killed(&mut dice, Cache::Full);
    }
}

#[test]
fn a_client_that_is_killed_leaves_nothing_behind_and_nobody_else_notices() {
    Dice::some(1).for_each(|mut dice| check_client_killed(&mut dice, Cache::Full));
}

#[test]
#[ignore = "minutes: scripts/faults"]
fn many_workers_and_clients_are_killed() {
    for mut dice in Dice::many() {
        for cache in [Cache::Empty, Cache::Full] {
            check_worker_killed(&mut dice, cache);
            check_client_killed(&mut dice, cache);
        }
    }
}
