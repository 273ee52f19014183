//! The remote device end to end: the real program as worker and as client, over the loopback
//! network.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::time::Duration;

use tiny_sd::remote::client::Session;
use tiny_sd::remote::hello::Hello;
use tiny_sd::remote::quic::client::connect;
use tiny_sd::remote::url::PairingUrl;
use tiny_sd::remote::{PROTOCOL_VERSION, schema};

use crate::processes::{Worker, client, fails, paint, picture, succeeds};

#[test]
fn a_worker_makes_the_very_pixels_that_the_cpu_makes() {
    let folder = tempfile::tempdir().unwrap();
    let worker = Worker::start();
    for model in ["tiny", "sd1", "sd2"] {
        for scheduler in ["dpm++2m", "euler-a"] {
            let more = ["--scheduler", scheduler];
            let (here, there) = (folder.path().join("here.png"), folder.path().join("there.png"));
            succeeds(&paint(model, "cpu", &here, &more));
            let stderr = succeeds(&paint(model, &worker.url, &there, &more));
            assert_eq!(picture(&here), picture(&there), "{model}");
            assert!(stderr.contains(" 2 programs replayed"), "{stderr}");
        }
    }
}

#[test]
fn a_worker_inside_of_the_process_does_too_and_several_pictures_share_one_recording() {
    let folder = tempfile::tempdir().unwrap();
    let (here, there) = (folder.path().join("here.png"), folder.path().join("there.png"));
    let one_by_one = ["--count", "2", "--batch-size", "1"];
    succeeds(&paint("tiny", "cpu", &here, &one_by_one));
    let stderr = succeeds(&paint("tiny", "mock", &there, &one_by_one));
    for n in [1, 2] {
        let file = |name: &str| picture(&folder.path().join(format!("{name}-{n}.png")));
        assert_eq!(file("here"), file("there"));
    }
    assert!(stderr.contains(" 5 programs replayed"), "{stderr}");
}

#[test]
fn stages_on_devices_of_their_own_make_the_same_picture() {
    let folder = tempfile::tempdir().unwrap();
    let worker = Worker::start();
    let url = &worker.url;
    let (here, there) = (folder.path().join("here.png"), folder.path().join("there.png"));
    succeeds(&paint("tiny", "cpu", &here, &[]));
    for (device, links) in [
        (format!("text=cpu,unet={url},vae={url}"), 1),
        (format!("text={url},unet=cpu,vae=mock"), 2),
        (format!("unet={url},vae=mock"), 2),
    ] {
        let stderr = succeeds(&paint("tiny", &device, &there, &[]));
        assert_eq!(picture(&here), picture(&there), "{stderr}");
        assert_eq!(stderr.matches("worker 127.0.0.1:").count(), links, "{stderr}");
    }
}

#[test]
fn each_stage_says_what_it_took() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("x.png");
    let stderr = succeeds(&paint("tiny", "text=cpu,unet=mock,vae=mock", &output, &[]));
    let row = |stage: &str| -> Vec<u64> {
        // The CPU's stages are said too, in seconds.
        let rows = stderr.lines().filter_map(|line| line.trim_start().strip_prefix(stage));
        let mut rows = rows.filter_map(|row| {
            row.split_whitespace().map(|number| number.parse().ok()).collect::<Option<Vec<u64>>>()
        });
        rows.next().unwrap_or_else(|| panic!("no {stage} in {stderr}"))
    };
    let [load, text, unet, vae] = ["load", "text", "unet", "vae"].map(row);
    let columns = |row: &[u64]| [row[0] > 0, row[1] > 0, row[2] > 0, row[4] > 0];
    assert_eq!(columns(&load), [true, false, true, true], "{stderr}");
    // The text encoder is here: its embeddings go over.
    assert_eq!(columns(&text), [true, false, false, true], "{stderr}");
    assert_eq!(columns(&unet), [true, true, false, false], "{stderr}");
    assert_eq!(columns(&vae), [true, false, true, false], "{stderr}");
    assert!(unet[6] > 0, "{stderr}");
}

#[test]
fn the_second_run_sends_no_weights_even_after_the_worker_was_killed() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("x.png");
    let worker = Worker::start();
    let first = succeeds(&paint("tiny", &worker.url, &output, &[]));
    assert!(!first.contains(" 0 bytes of weights up"), "{first}");
    let second = succeeds(&paint("tiny", &worker.url, &output, &[]));
    assert!(second.contains(" 0 bytes of weights up"), "{second}");
    let worker = Worker::start_in(worker.kill(), &[]);
    let third = succeeds(&paint("tiny", &worker.url, &output, &[]));
    assert!(third.contains(" 0 bytes of weights up"), "{third}");
}

#[test]
fn several_clients_at_once_get_their_own_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let worker = Worker::start();
    let seeds = ["1", "2", "3"];
    std::thread::scope(|scope| {
        for seed in seeds {
            let (folder, url) = (folder.path(), &worker.url);
            scope.spawn(move || {
                let there = folder.join(format!("there-{seed}.png"));
                succeeds(&paint("tiny", url, &there, &["-s", seed]));
            });
        }
    });
    for seed in seeds {
        let here = folder.path().join("here.png");
        succeeds(&paint("tiny", "cpu", &here, &["-s", seed]));
        let there = folder.path().join(format!("there-{seed}.png"));
        assert_eq!(picture(&here), picture(&there), "{seed}");
    }
}

#[test]
fn what_goes_wrong_on_the_way_is_one_line_and_exit_code_4() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("x.png");
    let worker = Worker::start();
    let url = worker.url.clone();
    let (before_token, rest) = url.split_at("quic://".len());
    let (token, rest) = rest.split_once('@').unwrap();
    let wrong_token = format!("{before_token}{}@{rest}", "0".repeat(token.len()));
    let (start, fingerprint) = url.split_once("?cert=").unwrap();
    let wrong_certificate = format!("{start}?cert={}", "0".repeat(fingerprint.len()));
    let check = |device: &str, expected: &str| {
        let stderr = fails(&paint("tiny", device, &output, &[]));
        assert!(stderr.contains(expected), "{stderr}");
        assert!(!stderr.contains(token), "{stderr}");
        assert!(!output.exists());
    };
    check(&wrong_token, "token");
    check(&wrong_certificate, "certificate");
    drop(worker.kill());
    check(&url, "127.0.0.1");
}

#[test]
fn a_run_that_holds_a_worker_does_not_wait_for_another() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("x.png");
    let [free, taken] = [(); 2].map(|()| Worker::start_with(&["--max-sessions", "1"]));
    let url = taken.url.parse::<PairingUrl>().unwrap();
    let hello = Hello { version: PROTOCOL_VERSION, schema: schema() };
    let limit = Duration::from_secs(10);
    let held = connect(&url, Session::new("holds the place"), hello, limit, &mut |_| Ok(()));
    let device = format!("text={},unet={},vae=cpu", free.url, taken.url);
    let line = fails(&paint("tiny", &device, &output, &[]));
    assert!(line.contains("waits for no other") && line.contains("--max-sessions"), "{line}");
    drop(held);
}

#[test]
fn a_client_whose_turn_it_is_not_says_so_and_waits() {
    let folder = tempfile::tempdir().unwrap();
    let worker = Worker::start_with(&["--max-sessions", "1"]);
    let url = worker.url.parse::<PairingUrl>().unwrap();
    let hello = Hello { version: PROTOCOL_VERSION, schema: schema() };
    let session = Session::new("holds the place");
    let limit = Duration::from_secs(10);
    let held = connect(&url, session, hello, limit, &mut |_| Ok(())).unwrap();
    let output = folder.path().join("x.png");
    let mut waiting = client("tiny", &worker.url, &output, &[]).stderr(Stdio::piped()).spawn();
    let mut stderr = BufReader::new(waiting.as_mut().unwrap().stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    assert!(line.starts_with("waiting for quic://127.0.0.1:"), "{line}");
    assert!(line.contains("0 clients before this client"), "{line}");
    drop(held);
    stderr.read_to_string(&mut line).unwrap();
    assert!(waiting.unwrap().wait().unwrap().success(), "{line}");
    assert!(output.exists());
}

#[cfg(unix)]
#[test]
fn a_url_file_that_others_can_read_is_a_warning() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let worker = Worker::start();
    let file = folder.path().join("url");
    std::fs::write(&file, &worker.url).unwrap();
    for (mode, is_warned) in [(0o644, true), (0o600, false)] {
        std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).unwrap();
        let device = format!("@{}", file.display());
        let stderr = succeeds(&paint("tiny", &device, &folder.path().join("x.png"), &[]));
        let expected = format!("warning: {} holds a worker's secret", file.display());
        assert_eq!(stderr.contains(&expected), is_warned, "{stderr}");
        assert_eq!(stderr.matches("warning").count(), usize::from(is_warned), "{stderr}");
    }
}
