//! `--grid` as a user calls it, on a miniature model: each cell is the very picture of the single
//! command, on every device, and there is a whole sheet or none.

use std::fs;
use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;

use super::end_to_end::{model, read_png};
use super::golden::fixtures;
use super::metadata::{ends_with, json, run};

/// Width, height and pixels of a PNG.
fn pixels(path: &Path) -> (usize, usize, Vec<u8>) {
    let file = std::io::BufReader::new(fs::File::open(path).unwrap());
    let reader = png::Decoder::new(file).read_info().unwrap();
    let (width, height) = reader.info().size();
    (width as usize, height as usize, read_png(path).0)
}

/// A part of a sheet, as large as a picture, where its record says that the cell is.
fn cut(
    (sheet_width, _, sheet): &(usize, usize, Vec<u8>),
    cell: &Value,
    size: [usize; 2],
) -> Vec<u8> {
    let at = |name: &str| cell[name].as_u64().unwrap() as usize;
    let [width, height] = size;
    let row = |y: usize| {
        let from = (y * sheet_width + at("x")) * 3;
        sheet[from..from + width * 3].to_vec()
    };
    (at("y")..at("y") + height).flat_map(row).collect()
}

/// Makes a sheet in a folder; gives what `info` says of it and its pixels.
fn sheet(folder: &Path, words: &[&str]) -> (Value, (usize, usize, Vec<u8>)) {
    let tiny = model("tiny").to_str().unwrap().to_owned();
    let output = run(folder, &[&["a fox", "-m", &tiny, "-o", "sheet.png"], words].concat());
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let left: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()).collect();
    let left: Vec<_> = left.iter().map(|entry| entry.file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains("preview")), "{left:?}");
    (json(folder, &["info", "sheet.png", "--json"], 0), pixels(&folder.join("sheet.png")))
}

/// The picture of the single command.
fn single(folder: &Path, words: &[&str]) -> (Value, (usize, usize, Vec<u8>)) {
    let tiny = model("tiny").to_str().unwrap().to_owned();
    let output = run(folder, &[&["-m", &tiny, "-o", "one.png"], words].concat());
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    (json(folder, &["info", "one.png", "--json"], 0), pixels(&folder.join("one.png")))
}

#[test]
fn each_cell_is_the_picture_of_the_single_command_bit_for_bit_on_every_device() {
    let image = fixtures().join("golden/images/picture.png");
    let image = image.to_str().unwrap();
    let rows: [(&[&str], [&[&str]; 4]); 3] = [
        (
            &["-s", "5", "--preview", "1", "--grid", "steps=2,3", "guidance=1,7"],
            [
                &["a fox", "-s", "5", "--steps", "2", "-g", "1"],
                &["a fox", "-s", "5", "--steps", "3", "-g", "1"],
                &["a fox", "-s", "5", "--steps", "2", "-g", "7"],
                &["a fox", "-s", "5", "--steps", "3", "-g", "7"],
            ],
        ),
        (
            // Seeds go through the UNet together, and schedulers do not.
            &["--device", "mock", "--steps", "2", "--grid", "seed=8-9", "sampler=euler-a,ddim"],
            [
                &["a fox", "-s", "8", "--steps", "2", "--scheduler", "euler-a"],
                &["a fox", "-s", "9", "--steps", "2", "--scheduler", "euler-a"],
                &["a fox", "-s", "8", "--steps", "2", "--scheduler", "ddim"],
                &["a fox", "-s", "9", "--steps", "2", "--scheduler", "ddim"],
            ],
        ),
        (
            &["-i", image, "-s", "3", "--steps", "4", "--grid", "strength=0.5,1"],
            [
                &["a fox", "-i", image, "-s", "3", "--steps", "4", "--strength", "0.5"],
                &["a fox", "-i", image, "-s", "3", "--steps", "4", "--strength", "1"],
                &[],
                &[],
            ],
        ),
    ];
    for (words, cells) in rows {
        let folder = TempDir::new().unwrap();
        let (info, drawn) = sheet(folder.path(), words);
        assert_eq!(info["kind"], "grid");
        let recorded = info["record"]["cells"].as_array().unwrap();
        let cells: Vec<_> = cells.iter().filter(|words| !words.is_empty()).collect();
        assert_eq!(recorded.len(), cells.len());
        for (cell, words) in recorded.iter().zip(cells) {
            let (of_one, (width, height, expected)) = single(folder.path(), words);
            assert!(cut(&drawn, cell, [width, height]) == expected, "{words:?}");
            assert_eq!(cell["key"], of_one["key"], "{words:?}");
            // The first cell's settings, and what differs, are the whole record.
            let mut settings = info["record"]["settings"].clone();
            for (name, value) in cell["differs"].as_object().unwrap() {
                settings[name] = value.clone();
            }
            let mut one = of_one["record"].clone();
            for only_here in ["device", "kernel_path"] {
                settings[only_here] = Value::Null;
                one[only_here] = Value::Null;
            }
            assert_eq!(settings, one, "{words:?}");
        }
    }
}

#[test]
fn a_sheet_is_told_as_one_picture_and_the_text_encoder_runs_once() {
    let folder = TempDir::new().unwrap();
    let tiny = model("tiny").to_str().unwrap().to_owned();
    let calls = |words: &[&str]| -> usize {
        let all = ["a fox", "-m", &tiny, "-o", "x.png", "--device", "mock", "--stats"];
        let output = run(folder.path(), &[&all[..], words].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        let line = stderr.lines().find(|line| line.trim_start().starts_with("text ")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let one = calls(&["-s", "1", "--steps", "2"]);
    let four = calls(&["-s", "1", "--grid", "steps=1,2", "guidance=3,4"]);
    // Keys and values of the text are made for each picture, which is the lesser part.
    assert!(four < 3 * one, "{four} ops for four pictures, {one} for one");
    let words = ["a fox", "-m", &tiny, "-q", "--json", "-o", "y.jpg", "--grid", "steps=1,2"];
    let output = run(folder.path(), &words);
    let lines = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let done: Vec<_> = lines.iter().filter(|line| line["event"] == "done").collect();
    let [done] = &*done else { panic!("{done:?}") };
    assert_eq!((&done["output"], &done["steps"]), (&"y.jpg".into(), &3.into()));
    let cells: Vec<_> = lines.iter().filter(|line| line["event"] == "step").collect();
    assert!(cells.iter().any(|line| line["index"] == 2), "{cells:?}");
    let info = json(folder.path(), &["info", "y.jpg", "--json"], 0);
    assert_eq!((&info["kind"], &info["width"]), (&"grid".into(), &done["width"]));
}

#[test]
fn there_is_a_whole_sheet_or_none_and_none_is_a_picture_to_go_on_from() {
    let folder = TempDir::new().unwrap();
    let tiny = model("tiny").to_str().unwrap().to_owned();
    let (_, _) = sheet(folder.path(), &["-s", "1", "--grid", "steps=1,2"]);
    let before = fs::read(folder.path().join("sheet.png")).unwrap();
    for (words, code, expected) in [
        (&["x", "--from", "sheet.png"][..], 2, "--from sheet.png: it is a grid of 2 pictures"),
        (&["verify", "sheet.png"], 2, "sheet.png: it is a grid of 2 pictures, whose settings"),
        // Refused by what the model's files say, before its weights are there.
        (
            &[
                "x",
                "-m",
                &tiny,
                "-o",
                "sheet.png",
                "--grid",
                "seed=1-16",
                "steps=1-16",
                "-H",
                "4096",
            ],
            2,
            "pixels, more than 67108864: fewer values",
        ),
        // Found in the second cell: the file is what it was.
        (
            &["x", "-m", &tiny, "-o", "sheet.png", "--steps", "1", "--grid", "clip-skip=0,99"],
            2,
            "--clip-skip 99",
        ),
    ] {
        let output = run(folder.path(), words);
        let (_, stderr) = ends_with(code, &output);
        assert!(stderr.contains(expected), "{words:?}: {stderr}");
    }
    assert!(fs::read(folder.path().join("sheet.png")).unwrap() == before);
    let names = fs::read_dir(folder.path()).unwrap();
    let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| name == "sheet.png" || name == "home"), "{names:?}");
}
