//! `--json`: every line that is printed has the fields that README.md documents.

use std::collections::BTreeMap;
use std::process::Stdio;

use serde_json::Value;

use super::{Batch, events, model};
use crate::processes::{Worker, program};

/// The fields of each event as README.md has them; with `?` behind those that may be left out.
fn documented() -> BTreeMap<String, Vec<String>> {
    let readme = include_str!("../../README.md");
    let (_, table) = readme.split_once("| event | fields | |\n|---|---|---|\n").unwrap();
    let rows = table.lines().take_while(|line| line.starts_with('|'));
    let row = |line: &str| {
        let mut cells = line.split('|').skip(1).map(str::trim);
        let name = cells.next().unwrap().trim_matches('`').to_owned();
        let fields = cells.next().unwrap().split_whitespace();
        (name, fields.map(|field| field.trim_matches('`').to_owned()).collect())
    };
    rows.map(row).collect()
}

/// Each line has the documented fields, and no others; the events that were seen.
fn check(lines: &[Value]) -> Vec<String> {
    let documented = documented();
    assert_eq!(documented.len(), 10, "{documented:?}");
    let mut seen = Vec::new();
    for line in lines {
        let object = line.as_object().unwrap();
        assert_eq!(object["v"], 1, "{line}");
        let name = object["event"].as_str().unwrap();
        let fields = &documented[name];
        for field in fields.iter().filter(|field| !field.ends_with('?')) {
            assert!(object.contains_key(field), "{field} is not in {line}");
        }
        for field in object.keys().filter(|field| !["v", "event"].contains(&field.as_str())) {
            let is_known = fields.iter().any(|known| known.trim_end_matches('?') == field);
            assert!(is_known, "{field} of {line} is not in README.md");
        }
        if !seen.contains(&name.to_owned()) {
            seen.push(name.to_owned());
        }
    }
    seen
}

fn count(lines: &[Value], name: &str) -> usize {
    lines.iter().filter(|line| line["event"] == name).count()
}

#[test]
fn the_single_command_tells_all_that_happens_on_every_device_in_the_documented_fields() {
    let worker = Worker::start();
    let folder = tempfile::tempdir().unwrap();
    let run = |device: &str, steps: &str| {
        let mut command = program();
        command
            .args(["a fox", "-s", "7", "-q", "-o", "x.png", "--json", "--preview", "1"])
            .args(["--count", "2", "--steps", steps, "--device", device, "-m"])
            .arg(model())
            .env("XDG_CACHE_HOME", folder.path().join("cache"))
            .current_dir(folder.path())
            .stdout(Stdio::piped());
        let output = command.output().unwrap();
        (output.status.code(), events(&output.stdout))
    };
    for (device, name) in
        [("cpu", "cpu".to_owned()), (&worker.url, format!("quic://{}", worker.address()))]
    {
        let (code, lines) = run(device, "3");
        assert_eq!(code, Some(0));
        assert_eq!(check(&lines), ["load", "step", "preview", "done"]);
        // Of two pictures, 0 to 3 steps each, and 1 and 2 have a preview.
        let counts = ["step", "preview", "done"].map(|event| count(&lines, event));
        assert_eq!(counts, [8, 4, 2]);
        let told = lines.iter().filter(|line| line["event"] != "load");
        assert!(told.clone().all(|line| line["device"] == *name), "{name}");
        assert!(told.clone().all(|line| line.get("line").is_none()));
        let done: Vec<_> = lines.iter().filter(|line| line["event"] == "done").collect();
        let outputs = done.iter().map(|line| line["output"].as_str().unwrap());
        assert!(outputs.clone().all(|output| folder.path().join(output).exists()));
        assert!(lines.iter().all(|line| {
            line["event"] != "preview"
                || !folder.path().join(line["file"].as_str().unwrap()).exists()
        }));
    }
    let (code, lines) = run("cpu", "1000");
    assert_eq!(code, Some(2));
    assert_eq!(check(&lines), ["load", "error"]);
    assert_eq!(lines.last().unwrap()["code"], 2);
}

#[test]
fn a_batch_tells_all_that_happens_in_the_documented_fields() {
    let batch = Batch::new("--prompt a\n--prompt b --steps 1000\n--prompt c");
    let first = batch.run(&["-s", "1", "--steps", "1", "--json"], 5);
    assert_eq!(check(&first), ["batch", "load", "step", "done", "error", "end"]);
    let end = first.last().unwrap();
    assert_eq!(
        [&end["made"], &end["skipped"], &end["failed"]].map(Value::as_u64),
        [2, 0, 1].map(Some)
    );
    let second = batch.run(&["-s", "1", "--steps", "1", "--json"], 5);
    assert_eq!(check(&second), ["batch", "done", "load", "error", "end"]);
    assert_eq!(second[0]["skipped"], 2);
    assert_eq!(second[0]["devices"], serde_json::json!(["cpu"]));
    // Without --json there are results alone.
    let third = batch.run(&["-s", "1", "--steps", "1"], 5);
    assert_eq!(check(&third), ["done", "error"]);
    assert_eq!(third.len(), 3);
}
