//! Ctrl-C at a client and SIGTERM at a worker, while a picture is being made.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::{local, outputs};
use crate::processes::{Running, Worker, client, fails, paint, picture, signal, succeeds};
use crate::udp_proxy::{Faults, UdpProxy};

#[test]
fn ctrl_c_at_a_client_cancels_its_work_at_the_worker() {
    let folder = tempfile::tempdir().unwrap();
    let (output, other) = (folder.path().join("x.png"), folder.path().join("other.png"));
    let worker = Worker::start_with(&["--max-sessions", "1"]);
    // With the weights there, the packets after these come with the steps.
    let proxy = UdpProxy::start(worker.address(), Faults::default());
    let url = worker.url_at(proxy.address());
    succeeds(&paint("tiny", &url, &other, &["--steps", "1"]));
    let (tell, told) = channel();
    proxy.at_packet(proxy.packets() + 150, move || tell.send(()).unwrap());
    let more = ["--steps", "999", "-W", "128", "-H", "128"];
    let first = Running::start(client("tiny", &url, &output, &more));
    told.recv_timeout(crate::processes::PATIENCE).unwrap();
    signal("INT", first.id());
    let interrupted = Instant::now();
    let found = first.end();
    assert_eq!(found.status.code(), Some(130), "{}", String::from_utf8_lossy(&found.stderr));
    worker.logs("session{number=2}: the session's memory is free");
    let took = interrupted.elapsed();
    assert!(took < Duration::from_secs(2), "the worker went on for {took:?}");
    assert_eq!(outputs(folder.path()), ["other.png"]);
    // The one place is free, and nothing is in the way.
    succeeds(&paint("tiny", &worker.url, &other, &[]));
    assert!(picture(&other) == local(folder.path(), &[]), "another picture");
}

#[test]
fn a_worker_that_is_asked_to_end_finishes_what_runs_and_takes_nobody_new() {
    let folder = tempfile::tempdir().unwrap();
    let expected = local(folder.path(), &["--steps", "60"]);
    let (output, other) = (folder.path().join("x.png"), folder.path().join("other.png"));
    let worker = Worker::start();
    let running = Running::start(client("tiny", &worker.url, &output, &["--steps", "60"]));
    worker.logs("session begins number=1");
    signal("TERM", worker.id());
    worker.logs("ending when the running sessions have ended");
    let line = fails(&paint("tiny", &worker.url, &other, &[]));
    assert!(line.contains("shutting down"), "{line}");
    succeeds(&running.end());
    assert!(picture(&output) == expected, "another picture");
    assert_eq!(worker.end(), Some(0));
}

#[test]
fn a_worker_that_is_asked_twice_ends_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("x.png");
    let worker = Worker::start();
    let running = Running::start(client("tiny", &worker.url, &output, &["--steps", "999"]));
    worker.logs("session begins number=1");
    signal("TERM", worker.id());
    worker.logs("ending when the running sessions have ended");
    signal("TERM", worker.id());
    let asked = Instant::now();
    assert_eq!(worker.end(), Some(0));
    let took = asked.elapsed();
    assert!(took < Duration::from_secs(3), "it went on for {took:?}");
    let line = fails(&running.end());
    assert!(line.contains("stopped"), "{line}");
    assert_eq!(outputs(folder.path()), [""; 0]);
}
