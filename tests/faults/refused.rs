//! Clients that a worker does not serve, or not to the end: one line, exit code 4, and nobody else
//! is the worse for it.

use tiny_sd::remote::hello::Hello;
use tiny_sd::remote::{PROTOCOL_VERSION, schema};

use super::{local, outputs};
use crate::processes::{Running, Worker, client, fails, paint, picture, succeeds};
use crate::quic::ends;
use crate::udp_proxy::{Faults, UdpProxy};

fn check(device: &str, expected: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let line = fails(&paint("tiny", device, &folder.path().join("x.png"), &[]));
    for expected in expected {
        assert!(line.contains(expected), "{expected:?} in {line}");
    }
    assert_eq!(outputs(folder.path()), [""; 0]);
}

#[test]
fn too_little_room_at_the_worker_is_one_line_that_names_the_flag() {
    for (flag, size) in
        [("--session-memory", "16K"), ("--weights-memory", "64K"), ("--cache-size", "64K")]
    {
        let worker = Worker::start_with(&[flag, size]);
        check(&worker.url, &[flag]);
        // And the next one hears the same.
        check(&worker.url, &[flag]);
    }
}

#[test]
fn a_worker_of_another_version_is_one_line() {
    let (version, schema) = (PROTOCOL_VERSION, schema());
    for (hello, expected) in [
        (Hello { version: version + 1, schema }, "protocol"),
        (Hello { version, schema: [7; 16] }, "tables of ops"),
    ] {
        let worker = ends::Worker::start_as(hello, ends::limits());
        check(&worker.url().to_secret_string(), &[expected, &worker.url().name()]);
    }
}

#[cfg(unix)]
#[test]
fn a_busy_worker_is_one_line_and_so_is_the_end_of_an_idle_session() {
    use crate::processes::signal;
    let folder = tempfile::tempdir().unwrap();
    let worker =
        Worker::start_with(&["--max-sessions", "1", "--max-waiting", "0", "--idle-timeout", "1"]);
    let output = folder.path().join("x.png");
    let proxy = UdpProxy::start(worker.address(), Faults::default());
    let url = worker.url_at(proxy.address());
    let first = Running::start(client("tiny", &url, &output, &["--steps", "999"]));
    worker.logs("session begins");
    check(&worker.url, &["busy", "1 of 1", "--max-sessions"]);
    // Silent, but not for so long that it seems dead.
    signal("STOP", first.id());
    worker.logs("session ends");
    signal("CONT", first.id());
    let line = fails(&first.end());
    assert!(line.contains("--idle-timeout"), "{line}");
    assert_eq!(outputs(folder.path()), [""; 0]);
}

#[cfg(target_os = "linux")]
#[test]
fn who_guesses_tokens_is_slowed_down_and_nobody_else() {
    let folder = tempfile::tempdir().unwrap();
    let expected = local(folder.path(), &["--steps", "30"]);
    let worker = Worker::start();
    let output = folder.path().join("x.png");
    let running = Running::start(client("tiny", &worker.url, &output, &["--steps", "30"]));
    worker.logs("session begins number=1");

    // Guessers have another address than those who know the token.
    let guessers = [127, 0, 0, 2].into();
    let proxy = UdpProxy::start_as(guessers, worker.address(), Faults::default());
    let url = worker.url_at(proxy.address());
    let (before_token, rest) = url.split_at("quic://".len());
    let (token, rest) = rest.split_once('@').unwrap();
    let guess = |n: usize| format!("{before_token}{n:0>width$}@{rest}", width = token.len());
    let guesses = (0..16).map(|n| {
        let output = folder.path().join(format!("guess-{n}.png"));
        Running::start(client("tiny", &guess(n), &output, &[]))
    });
    let guesses: Vec<_> = guesses.collect();
    worker.logs("refused address=127.0.0.2");
    let other = folder.path().join("other.png");
    succeeds(&paint("tiny", &worker.url, &other, &["--steps", "30"]));
    assert!(picture(&other) == expected, "another picture");
    succeeds(&running.end());
    assert!(picture(&output) == expected, "another picture");

    let lines: Vec<_> = guesses.into_iter().map(|guess| fails(&guess.end())).collect();
    let heard = lines.iter().filter(|line| line.contains("refused the token")).count();
    let turned_away =
        lines.iter().filter(|line| line.contains("takes no connections just now")).count();
    // So many may be without a token at a time; the others were not even heard.
    assert!(heard >= 1 && heard + turned_away == lines.len(), "{lines:#?}");
    assert!(turned_away >= 1, "{lines:#?}");
    assert!(!worker.log().contains(token) && !lines.concat().contains(token));
}
