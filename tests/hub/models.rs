//! `tiny-sd models` with the real program and a hub of the tests' own: what it lists, downloads and
//! removes. Separate because the library's own behaviour is tested beside it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use super::server::{COMMIT, Model, Reply, Server};
use crate::end_to_end;

/// A folder to run in, with a cache below it, and a hub.
struct Place {
    folder: TempDir,
    url: String,
}

/// What a run has said.
struct Said {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Place {
    fn new(url: String) -> Self {
        Self { folder: TempDir::new().unwrap(), url }
    }

    fn run(&self, words: &[&str]) -> Said {
        let environment = [("HF_ENDPOINT", self.url.as_str()), ("HF_HOME", "cache")];
        let words: Vec<_> = ["models"].iter().chain(words).copied().collect();
        let output = end_to_end::run(self.folder.path(), &words, &environment);
        let [stdout, stderr] =
            [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        assert!(!stderr.contains("panicked"), "{stderr}");
        Said { code: output.status.code(), stdout, stderr }
    }

    fn done(&self, words: &[&str]) -> String {
        let Said { code, stdout, stderr } = self.run(words);
        assert_eq!(code, Some(0), "{words:?}: {stderr}");
        stdout
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.done(&["list", "--json"])).unwrap()
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("cache/hub")
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.cache().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

/// Bytes of the files below a folder, without those that are links.
fn size(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| match entry.metadata().unwrap() {
            found if found.is_dir() => size(&entry.path()),
            found if found.is_file() => found.len(),
            _ => 0,
        })
        .sum()
}

#[test]
fn a_model_that_is_pulled_is_what_a_run_needs_and_goes_again() {
    let server = end_to_end::hub("tiny");
    let place = Place::new(server.url());
    let folder = place.done(&["pull", "org/name"]);
    let snapshot = place.cache().join("models--org--name/snapshots").join(COMMIT);
    let snapshot = snapshot.canonicalize().unwrap();
    assert_eq!(Path::new(folder.trim_end_matches('\n')).canonicalize().unwrap(), snapshot);
    let asked = server.take_log();
    assert!(!asked.iter().any(|request| request.path.ends_with(".onnx")), "{asked:?}");
    // No request is left to make, and with --offline none is made.
    assert_eq!(place.done(&["pull", &format!("org/name@{COMMIT}")]), folder);
    assert_eq!(server.downloads(), 0);
    server.take_log();
    assert_eq!(place.done(&["pull", "org/name", "--offline", "-q"]), folder);
    assert_eq!(server.take_log().len(), 0);
    let environment = [("HF_ENDPOINT", server.url()), ("HF_HOME", "cache".into())];
    let environment = environment.each_ref().map(|(name, value)| (*name, value.as_str()));
    let words = ["x", "-m", "org/name", "-W", "64", "-H", "64", "--steps", "1", "--offline"];
    let output = end_to_end::run(place.folder.path(), &words, &environment);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(server.take_log().len(), 0);

    let bytes = size(&place.cache().join("models--org--name"));
    let found = place.json();
    assert_eq!((&found["repository"], &found["bytes"]), (&"org/name".into(), &bytes.into()));
    let revision = &found["revisions"][0];
    assert_eq!((&revision["commit"], &revision["names"][0]), (&COMMIT.into(), &"main".into()));
    assert_eq!(revision["state"], "complete", "{found}");

    // Without --yes nothing goes.
    let Said { code, stdout, stderr } = place.run(&["rm", "org/name"]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stdout.starts_with(&format!("org/name: {bytes} bytes (")), "{stdout}");
    assert!(stdout.contains("main (01234567)") && stderr.contains("--yes"), "{stdout}{stderr}");
    assert_eq!(place.json(), found);
    place.write("models--org--other/blobs/x", "left alone");
    let said = place.done(&["rm", "org/name", "--yes"]);
    assert_eq!(said, format!("org/name: {bytes} bytes freed\n"));
    assert!(!place.cache().join("models--org--name").exists());
    assert!(place.cache().join("models--org--other/blobs/x").is_file());
    let Said { code, stderr, .. } = place.run(&["rm", "org/name", "--yes"]);
    assert_eq!(code, Some(3));
    assert!(stderr.contains("org/name is not in the cache"), "{stderr}");
}

#[test]
fn the_list_has_a_line_a_model_whatever_else_lies_in_the_cache() {
    let place = Place::new("http://127.0.0.1:9".into());
    let Said { code, stdout, stderr } = place.run(&["list"]);
    assert_eq!((code, &*stdout), (Some(0), ""));
    assert!(stderr.starts_with("0 models, 0.0 MB in "), "{stderr}");

    place.write("models--a--part/blobs/x.incomplete", "12345");
    place.write("models--a--half/refs/main", COMMIT);
    place.write(&format!("models--a--half/snapshots/{COMMIT}/unet/config.json"), "{}");
    place.write("models--a--file", "");
    place.write("models--a--lost/refs/main", "not a commit");
    place.write(&format!("models--a--bert/snapshots/{COMMIT}/config.json"), "{}");
    place.write("datasets--a--pictures/blobs/x", "data");
    place.write(".locks/models--a--part/x.lock", "");
    let Said { code, stdout, stderr } = place.run(&[]);
    assert_eq!(code, Some(0), "{stderr}");
    let lines: Vec<_> = stdout.lines().collect();
    for (line, parts) in lines.iter().zip([
        ["a/file ", "broken: it is no folder"],
        ["a/half ", "main (01234567): lacks text_encoder/config.json, "],
        ["a/lost ", "no revision"],
        ["a/part ", "no revision, only parts of a download"],
    ]) {
        assert!(line.starts_with(parts[0]) && line.contains(parts[1]), "{stdout}");
    }
    assert_eq!(lines.len(), 4, "{stdout}");
    assert!(stderr.starts_with("4 models, "), "{stderr}");
    assert!(stderr.contains("2 of other programs are left out"), "{stderr}");

    // What is not ours stays, and what is left of a download goes.
    for (words, code, expected) in [
        (["rm", "a/bert", "--yes"], 3, "another program's"),
        (["rm", "a/file", "--yes"], 3, "is no folder of the cache"),
        (["rm", "a/none", "--yes"], 3, "is not in the cache"),
        (["rm", "a/half@v2", "--yes"], 3, "it has main"),
        (["rm", "../part", "--yes"], 2, "org/name"),
        (["rm", "a", "--yes"], 2, "org/name"),
    ] {
        let Said { code: found, stdout, stderr } = place.run(&words);
        assert_eq!(found, Some(code), "{words:?}: {stderr}");
        assert!(stdout.is_empty() && stderr.contains(expected), "{words:?}: {stdout}{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
    assert_eq!(place.done(&["rm", "a/part", "--yes"]), "a/part: 5 bytes freed\n");
    for left in ["models--a--bert", "models--a--file", "datasets--a--pictures"] {
        assert!(place.cache().join(left).exists(), "{left}");
    }
}

#[test]
fn a_pull_ends_as_a_run_would_that_cannot_have_the_model() {
    let server = Server::start(|request| match request.is_listing() {
        true => Model::new().reply(request),
        false => Reply::new(403).header("X-Error-Code", "GatedRepo"),
    });
    for (words, code, parts) in [
        (&["pull", "org/name"][..], 3, &["not a model in diffusers layout"][..]),
        (&["pull", "org/name@v9"], 3, &["'v9'", "--revision"]),
        (&["pull", "org/name", "--offline"], 3, &["is not in the cache", "--offline"]),
        (&["pull", "./folder"], 2, &["org/name@revision"]),
        (&["pull", "org/name@../x"], 2, &["letters, digits"]),
        (&["pull"], 2, &["REPO[@REVISION]"]),
        (&["push", "org/name"], 2, &["push"]),
        (&["--json", "pull", "org/name"], 2, &["pull"]),
    ] {
        let place = Place::new(server.url());
        let Said { code: found, stdout, stderr } = place.run(words);
        assert_eq!(found, Some(code), "{words:?}: {stderr}");
        assert!(stdout.is_empty(), "{words:?}: {stdout}");
        assert_eq!(stderr.lines().count(), 1, "{words:?}: {stderr}");
        parts.iter().for_each(|part| assert!(stderr.contains(part), "{words:?}: {stderr}"));
    }
}

#[test]
fn the_built_in_model_needs_no_download_and_a_pull_of_it_says_so() {
    let server = end_to_end::hub("tiny");
    let place = Place::new(server.url());
    let built_in = "demo is built in: there is nothing to download; -m demo uses it\n";
    for (words, code, expected) in [
        (&["pull", "demo"][..], 0, built_in),
        (&["pull", "demo", "--offline"], 0, built_in),
        (&["pull", "demo", "-q"], 0, ""),
        (
            &["pull", "demo", "--variant", "fp16"],
            2,
            "error: --variant fp16 chooses among several files; demo is the built-in model\n",
        ),
        (&["pull", "demo", "--as-vae"], 2, "error: --as-vae demo: its VAE fits no other model\n"),
    ] {
        let Said { code: found, stdout, stderr } = place.run(words);
        assert_eq!((found, &*stdout, &*stderr), (Some(code), "", expected), "{words:?}");
    }
    assert_eq!(server.take_log().len(), 0);
    assert!(!place.cache().exists());
}

#[test]
fn a_vae_is_pulled_as_one_and_a_variant_as_it_is_asked_for() {
    let model = Model {
        files: vec![
            ("config.json".into(), br#"{"_class_name": "AutoencoderTiny"}"#.to_vec(), false),
            ("diffusion_pytorch_model.safetensors".into(), b"weights".to_vec(), true),
            ("README.md".into(), b"not asked for".to_vec(), false),
        ],
        ..Model::new()
    };
    let server = Server::start(move |request| model.reply(request));
    let place = Place::new(server.url());
    place.done(&["pull", "org/name", "--as-vae"]);
    let found = place.json();
    let revision = &found["revisions"][0];
    assert_eq!((&revision["state"], &revision["files"]), (&"vae".into(), &2.into()), "{found}");

    let server = end_to_end::hub("tiny");
    let place = Place::new(server.url());
    let Said { code, stderr, .. } = place.run(&["pull", "org/name", "--variant", "fp16"]);
    assert_eq!(code, Some(3));
    assert!(stderr.contains("has no fp16 weights"), "{stderr}");
}
