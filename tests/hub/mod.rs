//! A model from a hub, through the cache: against a server of the tests' own, as `HF_ENDPOINT`.

mod models;
pub mod server;
mod support;

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use server::{COMMIT, Model, Reply, Request, Server, large, ranged, sha256_of};
use support::*;
use tiny_sd::error::Kind;
use tiny_sd::weights::hub::{Event, Hub, HubOptions, Revision};

#[test]
fn a_model_comes_into_the_layout_of_python_and_only_once() {
    let (server, cache) = (model_server(), folder());
    for revision in ["main", "v1/a", COMMIT] {
        let mut options = options(&server.url(), cache.path());
        options.revision = Revision::parse(revision).expect("a revision");
        let hub = Hub::new(options, &RUNNING);
        let repository = hub.repository("org/name").expect("a listing");
        assert_eq!(repository.commit(), COMMIT);
        assert_eq!(repository.file_names(), NAMES);
        assert!(repository.warning().is_none() && !repository.is_cache_only());
        assert_whole(&repository.fetch(&NAMES, &mut ()).expect("the files"));
    }
    let log = server.take_log();
    // Later fetches ask for listings only.
    let kinds: Vec<&str> = log
        .iter()
        .map(|request| if request.is_listing() { "list" } else { &request.method })
        .collect();
    assert_eq!(kinds, ["list", "HEAD", "HEAD", "GET", "GET", "GET", "list", "list"]);

    let folder = model_folder(cache.path());
    for revision in ["main", "v1/a"] {
        let commit = fs::read_to_string(folder.join("refs").join(revision)).expect("a ref");
        assert_eq!(commit, COMMIT);
    }
    assert!(!folder.join("refs").join(COMMIT).exists());
    let snapshot = folder.join("snapshots").join(COMMIT);
    for (name, blob) in [
        (NAMES[0], format!("../../blobs/{}", &sha256_of(b"{}")[..40])),
        (NAMES[1], format!("../../../blobs/{}", sha256_of(&large()))),
    ] {
        assert_eq!(fs::read_link(snapshot.join(name)).expect("a link"), Path::new(&blob));
    }
    let blobs = fs::read_dir(folder.join("blobs")).expect("blobs").count();
    assert_eq!(blobs, 2, "nothing is left beside the blobs");
}

#[test]
fn without_links_the_snapshot_holds_the_files() {
    let (server, cache) = (model_server(), folder());
    let mut options = options(&server.url(), cache.path());
    options.symlinks = false;
    let snapshot = fetch(options.clone(), &NAMES).expect("the files");
    assert_whole(&snapshot);
    assert!(!snapshot.join(BIG).is_symlink());
    server.take_log();
    fetch(options, &NAMES).expect("the files");
    assert_eq!(server.downloads(), 0);
}

#[test]
fn the_token_goes_to_the_hub_and_not_to_its_storage() {
    let storage = Server::start(|request| Model::new().reply(request));
    let model = Model { storage: format!("{}/storage", storage.url()), ..Model::new() };
    // Within the hub a redirect is followed with the token: a model that was renamed.
    let server = Server::start(move |request| match request.path.strip_prefix("/old") {
        Some(path) => Reply::new(307).header("Location", path),
        None => model.reply(request),
    });
    let cache = folder();
    let old = format!("{}/old", server.url());
    assert_whole(&fetch(options(&old, cache.path()), &NAMES).expect("the files"));
    let log = server.take_log();
    assert!(log.iter().any(|request| request.path.starts_with("/org/")));
    for request in log {
        assert_eq!(request.header("authorization"), Some("Bearer hf_secret"), "{request:?}");
    }
    let log = storage.take_log();
    assert_eq!(log.len(), 1);
    assert_eq!(log[0].header("authorization"), None, "{log:?}");
}

#[test]
fn a_mirror_that_only_redirects_serves_as_a_hub() {
    let hub = model_server();
    let url = hub.url();
    let mirror = Server::start(move |request| {
        Reply::new(308).header("Location", format!("{url}{}", request.path))
    });
    let cache = folder();
    assert_whole(&fetch(options(&mirror.url(), cache.path()), &NAMES).expect("the files"));
    assert!(hub.take_log().iter().all(|request| request.header("authorization").is_none()));
}

#[test]
fn redirects_end() {
    let server = Server::start(|request| Reply::new(302).header("Location", &request.path));
    let cache = folder();
    let error = fetch(options(&server.url(), cache.path()), &NAMES).expect_err("a circle");
    assert_one_line(&error, Kind::Model, &["circle"]);
}

#[test]
fn a_download_that_is_cut_goes_on_where_it_stopped() {
    let server = server_with(|request, call| match call {
        0 => Some(ranged(request, &large()).cut(1000)),
        // A range may be shorter than what is left.
        1 => {
            let range = format!("bytes 1000-1499/{}", large().len());
            Some(Reply::new(206).header("Content-Range", range).body(&large()[1000..1500]))
        }
        _ => None,
    });
    let cache = folder();
    assert_whole(&fetch(options(&server.url(), cache.path()), &NAMES).expect("the files"));
    let ranges: Vec<Option<String>> = server
        .take_log()
        .iter()
        .filter(|request| request.path.starts_with("/storage"))
        .map(|request| request.header("range").map(str::to_owned))
        .collect();
    assert_eq!(ranges, [None, Some("bytes=1000-".into()), Some("bytes=1500-".into())]);
}

#[test]
fn the_next_run_goes_on_where_the_last_one_gave_up() {
    let server = server_with(|request, call| {
        (call < 3).then(|| ranged(request, &large()).cut(if call == 0 { 1000 } else { 0 }))
    });
    let cache = folder();
    let error = fetch(options(&server.url(), cache.path()), &NAMES).expect_err("cut each time");
    assert_one_line(&error, Kind::Model, &["big file.bin of org/name", "3 tries", "1000 bytes"]);
    assert_eq!(fs::read(incomplete(cache.path())).expect("the part"), large()[..1000]);
    assert_eq!(server.take_log().iter().filter(|r| r.path.starts_with("/storage")).count(), 3);

    assert_whole(&fetch(options(&server.url(), cache.path()), &NAMES).expect("the files"));
    let log = server.take_log();
    let get = log.iter().find(|request| request.path.starts_with("/storage")).expect("a download");
    assert_eq!(get.header("range"), Some("bytes=1000-"));
    assert!(!incomplete(cache.path()).exists());
}

#[test]
fn a_server_that_cannot_continue_starts_again() {
    let whole = |_: &Request| Reply::new(200).body(large());
    let elsewhere = |_: &Request| {
        Reply::new(206).header("Content-Range", "bytes 7-9/400000").body(&large()[7..10])
    };
    let unsatisfiable = |_: &Request| Reply::new(416);
    let replies: [fn(&Request) -> Reply; 3] = [whole, elsewhere, unsatisfiable];
    for reply in replies {
        let server = server_with(move |request, call| match call {
            0 => Some(ranged(request, &large()).cut(1000)),
            1 => Some(reply(request)),
            _ => None,
        });
        let cache = folder();
        assert_whole(&fetch(options(&server.url(), cache.path()), &NAMES).expect("the files"));
    }
}

#[test]
fn what_an_earlier_run_left_is_checked_too() {
    for left in [vec![7; 1000], vec![7; large().len()], vec![7; large().len() + 1]] {
        let (server, cache) = (model_server(), folder());
        fs::create_dir_all(model_folder(cache.path()).join("blobs")).expect("folders");
        fs::write(incomplete(cache.path()), &left).expect("a part");
        assert_whole(&fetch(options(&server.url(), cache.path()), &NAMES).expect("the files"));
    }
}

#[test]
fn each_refusal_says_what_to_do() {
    let on = |part: &'static str, reply: Reply| {
        Server::start(move |request| match request.path.contains(part) {
            true => reply.clone(),
            false => Model::new().reply(request),
        })
    };
    let coded = |status, code: &str| Reply::new(status).header("X-Error-Code", code);
    for (part, reply, expected) in [
        ("/api/", Reply::new(401), &["org/name", "private", "HF_TOKEN"][..]),
        ("/api/", coded(401, "RepoNotFound"), &["no model org/name", "HF_TOKEN"]),
        ("/api/", coded(404, "RepoNotFound"), &["no model org/name", "check the name"]),
        ("/api/", Reply::new(404), &["no model org/name", "check the name"]),
        ("/api/", coded(404, "RevisionNotFound"), &["'main'", "--revision"]),
        ("/api/", Reply::new(403), &["denies access", "HF_TOKEN"]),
        ("/api/", Reply::new(418), &["418"]),
        ("/api/", Reply::new(503), &["503", "-m DIR"]),
        ("/api/", Reply::new(429), &["429", "HF_TOKEN"]),
        ("/api/", Reply::new(200).body("<html>"), &["not that of a Hugging Face hub"]),
        ("/resolve/", coded(403, "GatedRepo"), &["gated", "accept", "HF_TOKEN"]),
        ("/resolve/", coded(404, "EntryNotFound"), &["no file model_index.json", "'main'"]),
        ("/resolve/", Reply::new(200), &["X-Repo-Commit", "HF_ENDPOINT"]),
        ("/storage/", Reply::new(403), &["denies access"]),
        ("/storage/", Reply::new(500), &["big file.bin", "500", "3 tries"]),
    ] {
        let (server, cache) = (on(part, reply), folder());
        let error = fetch(options(&server.url(), cache.path()), &NAMES).expect_err("a refusal");
        assert_one_line(&error, Kind::Model, expected);
    }
}

#[test]
fn a_server_in_trouble_is_asked_again() {
    let (seen, cache) = (Mutex::new(Vec::new()), folder());
    // The first answer to each kind of request is 503.
    let server = Server::start(move |request| {
        let key = format!("{} {}", request.method, request.path);
        let mut seen = seen.lock().expect("the list");
        if !seen.contains(&key) {
            seen.push(key);
            return Reply::new(503);
        }
        Model::new().reply(request)
    });
    let mut options = options(&server.url(), cache.path());
    // A large file fails once on the way and once at its end.
    options.tries = 3;
    assert_whole(&fetch(options, &NAMES).expect("the files"));
}

#[test]
fn without_network_the_cache_serves_or_says_what_is_missing() {
    let (server, cache) = (model_server(), folder());
    let online = options(&server.url(), cache.path());
    let offline = HubOptions { offline: true, ..online.clone() };
    let error = fetch(offline.clone(), &NAMES).expect_err("an empty cache");
    assert_one_line(&error, Kind::Model, &["org/name", "'main'", "--offline", "-m DIR"]);
    assert_eq!(server.take_log().len(), 0);

    fetch(online.clone(), &NAMES[..1]).expect("the small file");
    server.take_log();
    let error = fetch(offline.clone(), &NAMES).expect_err("half a model");
    assert_one_line(&error, Kind::Model, &[BIG, "--offline"]);

    fetch(online.clone(), &NAMES).expect("the files");
    server.take_log();
    assert_whole(&fetch(offline.clone(), &NAMES).expect("the files"));
    for revision in [COMMIT, "other"] {
        let revision = Revision::parse(revision).expect("a revision");
        let known = revision.as_str() == COMMIT;
        let offline = HubOptions { revision, ..offline.clone() };
        assert_eq!(fetch(offline, &NAMES).is_ok(), known);
    }
    assert_eq!(server.take_log().len(), 0);
}

#[test]
fn a_hub_out_of_reach_leaves_what_is_cached_with_a_warning() {
    let (server, cache) = (model_server(), folder());
    fetch(options(&server.url(), cache.path()), &NAMES).expect("the files");
    let port = TcpListener::bind("127.0.0.1:0").expect("a port");
    let nowhere = format!("http://{}", port.local_addr().expect("an address"));
    drop(port);
    let trouble = Server::start(|_| Reply::new(503));
    let denied = Server::start(|_| Reply::new(401));
    for (endpoint, reason) in
        [(&nowhere, "cannot reach"), (&trouble.url(), "503"), (&denied.url(), "private")]
    {
        let hub = Hub::new(options(endpoint, cache.path()), &RUNNING);
        let repository = hub.repository("org/name").expect("the cache");
        let warning = repository.warning().expect("a warning");
        assert!(warning.contains(reason) && warning.contains(COMMIT), "{warning}");
        assert!(repository.is_cache_only());
        assert_eq!(repository.file_names(), NAMES);
        assert_whole(&repository.fetch(&NAMES, &mut ()).expect("the files"));
    }
    assert_eq!(trouble.take_log().len(), 1, "who has a cache need not wait for more tries");

    let error = fetch(options(&nowhere, folder().path()), &NAMES).expect_err("no cache");
    assert_one_line(&error, Kind::Model, &["cannot reach", &nowhere, "--offline", "-m DIR"]);
}

#[test]
fn a_file_that_is_not_what_the_hub_names_is_thrown_away() {
    let mut other = large();
    other[5] ^= 1;
    for (content, expected) in [
        (other, "SHA-256"),
        (large()[1..].to_vec(), "399999 bytes, not 400000"),
        ([large(), vec![0]].concat(), "400001 bytes, not 400000"),
    ] {
        let server = server_with(move |request, call| {
            (call != usize::MAX).then(|| ranged(request, &content))
        });
        let cache = folder();
        let error = fetch(options(&server.url(), cache.path()), &NAMES).expect_err("a wrong file");
        assert_one_line(&error, Kind::Model, &[BIG, expected]);
        assert!(!model_folder(cache.path()).join("snapshots").join(COMMIT).join(BIG).exists());
        assert!(!model_folder(cache.path()).join("blobs").join(sha256_of(&large())).exists());
        assert_eq!(fs::metadata(incomplete(cache.path())).expect("a part").len(), 0);
    }
}

#[test]
fn names_that_leave_the_cache_are_refused() {
    for name in ["../evil", "/etc/evil", "a/../../evil", "a\\\\evil", "C:evil"] {
        let cache = folder();
        let server = Server::start(move |_| {
            let siblings = format!("[{{\"rfilename\": \"{name}\"}}]");
            Reply::new(200).body(format!("{{\"sha\": \"{COMMIT}\", \"siblings\": {siblings}}}"))
        });
        let error = fetch(options(&server.url(), cache.path()), &[]).expect_err(name);
        assert_one_line(&error, Kind::Model, &["not the name of a file"]);
        assert_eq!(fs::read_dir(cache.path()).expect("the cache").count(), 0);
    }
    for etag in ["\"../../evil\"", "\"\"", "\".\""] {
        let server = Server::start(move |request| match request.is_listing() {
            true => Model::new().reply(request),
            false => Reply::new(200).header("ETag", etag).header("X-Repo-Commit", COMMIT),
        });
        let cache = folder();
        let error = fetch(options(&server.url(), cache.path()), &NAMES).expect_err(etag);
        assert_one_line(&error, Kind::Model, &["no usable ETag"]);
    }
    let (server, cache) = (model_server(), folder());
    for name in ["../name", "org/..", "org", "org/name/more", "org/na me", "https://x/y"] {
        let hub = Hub::new(options(&server.url(), cache.path()), &RUNNING);
        assert_one_line(&hub.repository(name).err().expect(name), Kind::Usage, &[name]);
    }
    assert_eq!(server.take_log().len(), 0);
}

#[test]
fn two_at_once_download_a_file_once() {
    let (waiting, waits) = mpsc::channel();
    let waits = Mutex::new(waits);
    let cache = folder();
    let (started, starts) = mpsc::channel();
    // The first download is answered when the second user waits for it.
    let server = server_with(move |_, call| {
        if call == 0 {
            started.send(()).expect("the test is there");
            let limit = Duration::from_secs(20);
            waits.lock().expect("the channel").recv_timeout(limit).expect("nobody waits");
        }
        None
    });
    let options = options(&server.url(), cache.path());
    std::thread::scope(|scope| {
        let first = scope.spawn(|| fetch(options.clone(), &[BIG]));
        starts.recv_timeout(Duration::from_secs(20)).expect("the first has begun");
        let second = scope.spawn(|| {
            let mut progress = Recorder(Vec::new(), |event: &Event<'_>| {
                if matches!(event, Event::Waiting { .. }) {
                    waiting.send(()).expect("the server is there");
                }
            });
            let hub = Hub::new(options.clone(), &RUNNING);
            hub.repository("org/name")?.fetch(&[BIG], &mut progress)
        });
        for thread in [first, second] {
            let snapshot = thread.join().expect("no panic").expect("the file");
            assert_eq!(fs::read(snapshot.join(BIG)).expect("the file"), large());
        }
    });
    assert_eq!(server.take_log().iter().filter(|r| r.path.starts_with("/storage")).count(), 1);
}

#[test]
fn a_blob_that_another_commit_has_is_not_downloaded_again() {
    let cache = folder();
    fetch(options(&model_server().url(), cache.path()), &NAMES).expect("the files");
    let model = Model { commit: "f".repeat(40), ..Model::new() };
    let server = Server::start(move |request| model.reply(request));
    let snapshot = fetch(options(&server.url(), cache.path()), &NAMES).expect("the files");
    assert_whole(&snapshot);
    assert!(snapshot.ends_with("f".repeat(40)));
    assert_eq!(server.downloads(), 0);
}

#[test]
fn an_interrupted_download_ends_at_once_and_is_kept() {
    // The server stalls after the first part, so only the flag can end it.
    let server = server_with(|request, call| {
        (call == 0).then(|| Reply { stall: true, ..ranged(request, &large()).cut(1000) })
    });
    let (cache, cancelled) = (folder(), AtomicBool::new(false));
    let hub = Hub::new(options(&server.url(), cache.path()), &cancelled);
    let repository = hub.repository("org/name").expect("a listing");
    let mut progress = Recorder(Vec::new(), |event: &Event<'_>| {
        if let Event::Advanced { file_bytes: 1000, .. } = event {
            cancelled.store(true, Ordering::SeqCst);
        }
    });
    let error = repository.fetch(&[BIG], &mut progress).expect_err("interrupted");
    assert_eq!(error.kind(), Kind::Interrupted, "{error}");
    assert_eq!(fs::read(incomplete(cache.path())).expect("the part"), large()[..1000]);
    let error = hub.repository("org/name").err().expect("interrupted before it began");
    assert_eq!(error.kind(), Kind::Interrupted, "{error}");
}

#[test]
fn a_stalled_server_is_given_up_after_a_time() {
    let server = server_with(|request, call| {
        (call != usize::MAX).then(|| Reply { stall: true, ..ranged(request, &large()).cut(10) })
    });
    let cache = folder();
    let mut options = options(&server.url(), cache.path());
    options.tries = 1;
    options.read_timeout = Duration::from_millis(100);
    let error = fetch(options, &NAMES).expect_err("a stalled server");
    assert_one_line(&error, Kind::Model, &["no answer in time", "10 bytes"]);
}

#[test]
fn progress_tells_sizes_and_positions() {
    let server =
        server_with(|request, call| (call == 0).then(|| ranged(request, &large()).cut(1000)));
    let cache = folder();
    let positions = Arc::new(Mutex::new(Vec::new()));
    let record = Arc::clone(&positions);
    let mut progress = Recorder(Vec::new(), move |event: &Event<'_>| {
        if let Event::Advanced { total_bytes, .. } = event {
            record.lock().expect("the list").push(*total_bytes);
        }
    });
    let hub = Hub::new(options(&server.url(), cache.path()), &RUNNING);
    let repository = hub.repository("org/name").expect("a listing");
    repository.fetch(&NAMES, &mut progress).expect("the files");
    let Recorder(events, _) = &progress;
    assert_eq!(events[0], "Started { files: 2, size_bytes: Some(400002) }");
    let count = |part: &str| events.iter().filter(|event| event.starts_with(part)).count();
    assert_eq!((count("FileStarted"), count("FileFinished"), count("Retrying")), (2, 2, 1));
    let positions = positions.lock().expect("the list");
    assert!(positions.is_sorted() && positions.contains(&1002), "{positions:?}");
    assert_eq!(positions.last(), Some(&400_002));
}

#[cfg(unix)]
#[test]
fn a_cache_that_cannot_be_written_is_an_error_before_anything_is_downloaded() {
    let (server, cache) = (model_server(), folder());
    fs::write(model_folder(cache.path()), "a file in the way").expect("a file");
    let error = fetch(options(&server.url(), cache.path()), &NAMES).expect_err("no folder");
    assert_one_line(&error, Kind::Model, &["cannot write", "HF_HOME"]);
    assert_eq!(server.downloads(), 0);
}
