//! The shape of the source: which module may name which, where `unsafe` and the network live, and
//! how large things may grow. Separate because no compiler checks it.

use std::fmt::Write as _;
use std::path::Path;

/// The arrows: a module of `src/`, and what it may name besides itself and `error`.
const ARROWS: &[(&str, &[&str])] = &[
    ("main", &["cli"]),
    ("lib", &[]),
    ("cli", &["pipeline", "schedule", "image", "weights", "progress", "backend", "remote"]),
    (
        "pipeline",
        &[
            "tokenizer",
            "schedule",
            "model",
            "image",
            "weights",
            "progress",
            "rng",
            // What it hands to the models.
            "nn",
            "tensor",
            "backend",
        ],
    ),
    ("model", &["nn", "tensor", "backend"]),
    ("nn", &["tensor", "backend", "weights"]),
    ("tensor", &["backend"]),
    ("backend", &["rng"]),
    ("weights", &["backend::host"]),
    ("remote", &["backend"]),
    // Tests draw noise.
    ("schedule", &["rng"]),
    ("tokenizer", &[]),
    ("image", &[]),
    ("progress", &["image"]),
    ("rng", &[]),
    ("error", &[]),
];

/// Words of the code (not of comments or strings), and the beginnings of the paths that may have
/// them.
const ONLY_IN: &[(&str, &[&str])] = &[
    ("quinn", &["src/remote/quic/"]),
    ("tokio", &["src/remote/quic/"]),
    ("rustls", &["src/remote/"]),
    ("rcgen", &["src/remote/"]),
    ("subtle", &["src/remote/"]),
    // What goes over the wire; what pictures carry.
    ("Serialize", &["src/remote/", "src/cli/"]),
    // Reading JSON files as well.
    ("Deserialize", &["src/weights/", "src/remote/", "src/cli/"]),
    ("ureq", &["src/weights/hub/"]),
    // One of the two maps files.
    ("memmap2", &["src/weights/bytes.rs", "src/backend/mapped.rs"]),
    (
        "unsafe",
        &[
            "src/backend/cpu/kernels/",
            "src/backend/cuda/nvidia",
            "src/backend/cuda/compiler.rs",
            "src/weights/bytes.rs",
            "src/backend/mapped.rs",
        ],
    ),
    ("cudarc", &["src/backend/cuda/nvidia"]),
    ("libloading", &["src/backend/cuda/compiler.rs", "tests/cuda/"]),
    ("clap", &["src/cli/"]),
    ("indicatif", &["src/cli/"]),
    ("ctrlc", &["src/cli/"]),
    ("tokenizers", &["src/tokenizer"]),
];

/// candle's trait has it so: `unsafe fn`, whatever the body does.
const UNSAFE_SIGNATURE: &str = "unsafe fn alloc_uninit";

const FILE_LINES_MAX: usize = 500;
const FUNCTION_LINES_MAX: usize = 70;
const COLUMNS_MAX: usize = 100;

#[test]
fn the_source_keeps_its_shape() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["src", "tests", "benches"] {
        collect(&root.join(folder), &mut files);
    }
    assert!(files.len() > 80, "{} files are not the whole source", files.len());
    let mut report = String::new();
    for file in files {
        let name = file.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
        let text = std::fs::read_to_string(&file).unwrap();
        for (line, rule) in violations(&name, &text) {
            writeln!(report, "{name}:{line}: {rule}").unwrap();
        }
    }
    assert!(report.is_empty(), "\n{report}");
}

#[test]
fn what_breaks_a_rule_is_found_where_it_is() {
    let long_function = format!("//!\nfn f() {{\n{}}}\n", "a;\n".repeat(69));
    let long_line = format!("//!\n{}\n", "é".repeat(101));
    for (name, text, expected) in [
        ("src/model/x.rs", "//!\nuse crate::remote::Op;", Some((2, "model names remote"))),
        ("src/model/x.rs", "//!\nuse crate::{nn, weights};", Some((2, "model names weights"))),
        ("src/model/x.rs", "//!\nuse super::super::cli::X;", Some((2, "model names cli"))),
        ("src/model/x.rs", "//!\n// crate::remote\nuse super::y;", None),
        ("src/model/x.rs", "//!\nconst X: &str = r#\"\"crate::remote\"#;", None),
        ("src/remote/x.rs", "//!\n/*\n*/ fn f(x: crate::model::X);", Some((3, "names model"))),
        ("src/weights/x.rs", "//!\nuse crate::backend::host::A;", None),
        ("src/weights/x.rs", "//!\nuse crate::backend::{host::{A, B}, cpu};", Some((2, "::cpu"))),
        ("src/weights/x.rs", "//!\nuse crate::{Error,\nbackend::Op};", Some((3, "::Op"))),
        ("src/nn.rs", "//!\nuse super::tensor;\nuse super::pipeline;", Some((3, "pipeline"))),
        ("src/nn.rs", "//!\nmod tests { use super::*; }", None),
        ("src/main.rs", "//!\nuse tiny_sd::pipeline;", Some((2, "main names pipeline"))),
        ("src/other.rs", "//!\n", Some((1, "has no row in ARROWS"))),
        ("src/cli/x.rs", "//!\nuse tokio::net;", Some((2, "only in src/remote/quic/"))),
        ("src/remote/quic/x.rs", "//!\nuse tokio::net;", None),
        ("src/cli/x.rs", "//!\nlet x = 'u'; unsafe { f() }", Some((2, "`unsafe`"))),
        ("src/cli/x.rs", "//!\nfn f<'a>(x: &'a str) { \"unsafe\" }", None),
        ("src/remote/x.rs", "//!\nunsafe fn alloc_uninit(&self);", None),
        ("tests/x.rs", "use x;", Some((1, "//!"))),
        ("tests/x.rs", &long_function, Some((2, "71 lines"))),
        ("tests/x.rs", &long_line, Some((2, "101 columns"))),
        ("tests/x.rs", &"//!\n".repeat(501), Some((501, "501 lines"))),
        ("tests/x.rs", &format!("//!\n{}", "fn f();\n".repeat(99)), None),
    ] {
        let found = violations(name, text);
        let is_it = |(line, rule): &(usize, String)| {
            expected.is_some_and(|(at, part)| *line == at && rule.contains(part))
        };
        assert_eq!(found.iter().any(is_it), expected.is_some(), "{name} {text}: {found:?}");
        assert_eq!(found.len(), usize::from(expected.is_some()), "{name} {text}: {found:?}");
    }
}

fn collect(folder: &Path, files: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|suffix| suffix == "rs") {
            files.push(path);
        }
    }
}

/// Line and rule of everything that `text` breaks as the file `name`.
fn violations(name: &str, text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let lines = text.lines().count();
    if lines > FILE_LINES_MAX {
        found.push((lines, format!("a file of {lines} lines; at most {FILE_LINES_MAX}")));
    }
    if !text.starts_with("//!") {
        found.push((1, "a file opens with `//!`: what it is and why it is separate".into()));
    }
    for (index, line) in text.lines().enumerate() {
        let columns = line.chars().count();
        if columns > COLUMNS_MAX {
            found.push((index + 1, format!("{columns} columns; at most {COLUMNS_MAX}")));
        }
    }
    let code = code(text);
    let words = words(&code);
    check_functions(&words, &mut found);
    if let Some(path) = name.strip_prefix("src/") {
        check_arrows(path, &words, &mut found);
        check_places(name, text, &words, &mut found);
    }
    found
}

fn check_functions(words: &[(usize, &str)], found: &mut Vec<(usize, String)>) {
    for (at, (first, word)) in words.iter().enumerate() {
        let is_named = words.get(at + 1).is_some_and(|(_, name)| name.starts_with(is_letter));
        if *word != "fn" || !is_named {
            continue;
        }
        // Array types have semicolons, in brackets.
        let (mut brackets, mut braces) = (0, 0);
        for (line, word) in &words[at..] {
            match *word {
                "(" | "[" => brackets += 1,
                ")" | "]" => brackets -= 1,
                "{" => braces += 1,
                "}" => braces -= 1,
                _ => {}
            }
            if braces == 0 && (*word == "}" || (*word == ";" && brackets == 0)) {
                let lines = line - first + 1;
                if lines > FUNCTION_LINES_MAX {
                    let rule = format!("a function of {lines} lines; at most {FUNCTION_LINES_MAX}");
                    found.push((*first, rule));
                }
                break;
            }
        }
    }
}

fn check_arrows(path: &str, words: &[(usize, &str)], found: &mut Vec<(usize, String)>) {
    let parts: Vec<&str> = path.trim_end_matches(".rs").split('/').collect();
    let own = parts[0];
    let Some((_, allowed)) = ARROWS.iter().find(|row| row.0 == own) else {
        found.push((1, format!("{own} has no row in ARROWS of tests/structure.rs")));
        return;
    };
    let depth = parts.len() - usize::from(parts.last() == Some(&"mod"));
    for (line, target) in paths_from_root(words, depth) {
        let mut parts = target.split("::");
        let first = parts.next().unwrap_or_default();
        // The crate's own re-exports of `error`.
        let is_known = |name: &str| name == own || name == "error" || name.starts_with(is_capital);
        // `backend` allows `backend::host` too, and not the other way round.
        let is_below = |allowed: &str| format!("{target}::").starts_with(&format!("{allowed}::"));
        if !is_known(first) && !allowed.iter().any(|allowed| is_below(allowed)) {
            let mut names = vec!["error"];
            names.extend(*allowed);
            let names = names.join(", ");
            found.push((line, format!("{own} names {target}; it may name {names}")));
        }
    }
}

fn check_places(name: &str, text: &str, words: &[(usize, &str)], found: &mut Vec<(usize, String)>) {
    let lines: Vec<&str> = text.lines().collect();
    for (line, word) in words {
        let Some((_, places)) = ONLY_IN.iter().find(|row| row.0 == *word) else { continue };
        let is_signature = *word == "unsafe" && lines[line - 1].contains(UNSAFE_SIGNATURE);
        if !is_signature && !places.iter().any(|place| name.starts_with(place)) {
            found.push((*line, format!("`{word}` only in {}", places.join(", "))));
        }
    }
}

/// Line and path, as `backend::host`, of everything that is named from the root of the crate in a
/// file whose module is `depth` below it.
fn paths_from_root(words: &[(usize, &str)], depth: usize) -> Vec<(usize, String)> {
    let mut paths = Vec::new();
    let mut in_inline_module = false;
    let mut at = 0;
    while at < words.len() {
        let here = &words[at..];
        let word = |place: usize| here.get(place).map_or("", |word| word.1);
        in_inline_module |= word(0) == "mod" && word(2) == "{";
        let supers = (0..).step_by(2).take_while(|place| word(*place) == "super").count();
        let reaches_root = supers >= depth + usize::from(in_inline_module) && supers > 0;
        let start = match word(0) {
            "crate" | "tiny_sd" if word(1) == "::" => Some(2),
            "super" if reaches_root => Some(2 * supers),
            _ => None,
        };
        if let Some(start) = start {
            tree(&here[start..], "", &mut paths);
        }
        at += start.unwrap_or(0).max(2 * supers).max(1);
    }
    paths
}

/// The paths of a use tree, `a::{b, c::d}`; returns how many words it has.
fn tree(words: &[(usize, &str)], prefix: &str, paths: &mut Vec<(usize, String)>) -> usize {
    let word = |place: usize| words.get(place).map_or("", |word| word.1);
    if word(0) == "{" {
        let mut at = 1;
        while !matches!(word(at), "}" | "") {
            at += match word(at) {
                "," => 1,
                _ => tree(&words[at..], prefix, paths).max(1),
            };
        }
        return at + 1;
    }
    let path = format!("{prefix}{}", word(0));
    if word(1) == "::" && (word(2) == "{" || word(2).starts_with(is_letter)) {
        return 2 + tree(&words[2..], &format!("{path}::"), paths);
    }
    if let Some((line, _)) = words.first() {
        paths.push((*line, path));
    }
    // `as _` and `as Name` are behind it.
    if word(1) == "as" { 3 } else { 1 }
}

fn is_letter(c: char) -> bool {
    c.is_alphabetic() || c == '_'
}

fn is_capital(c: char) -> bool {
    c.is_uppercase()
}

/// Names, `::` and single signs, each with its line.
fn words(code: &str) -> Vec<(usize, &str)> {
    let mut words = Vec::new();
    for (index, line) in code.lines().enumerate() {
        let mut rest = line.trim_start();
        while let Some(first) = rest.chars().next() {
            let is_inside = |c: char| is_letter(c) || c.is_ascii_digit();
            let len = if is_inside(first) {
                rest.find(|c| !is_inside(c)).unwrap_or(rest.len())
            } else if rest.starts_with("::") {
                2
            } else {
                first.len_utf8()
            };
            let (word, after) = rest.split_at(len);
            words.push((index + 1, word));
            rest = after.trim_start();
        }
    }
    words
}

/// The text without comments and without what is in quotes; lines stay where they are.
fn code(text: &str) -> String {
    let mut code = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let before = code.chars().next_back().unwrap_or(' ');
        let len = quoted_len(rest, before);
        if len > 0 {
            code.extend(rest[..len].chars().filter(|c| *c == '\n'));
            // A word ends here.
            code.push(' ');
        } else {
            code.push(first);
        }
        rest = &rest[len.max(first.len_utf8())..];
    }
    code
}

/// How many bytes the comment or literal at the start of `rest` has, 0 if there is none.
fn quoted_len(rest: &str, before: char) -> usize {
    let until = |end: &str, from: usize| {
        rest[from..].find(end).map_or(rest.len(), |at| from + at + end.len())
    };
    if rest.starts_with("//") {
        return rest.find('\n').unwrap_or(rest.len());
    }
    if rest.starts_with("/*") {
        return until("*/", 2);
    }
    if let Some(raw) = rest.strip_prefix('r').or_else(|| rest.strip_prefix("br"))
        && !is_letter(before)
    {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            let start = rest.len() - raw.len() + hashes + 1;
            return until(&format!("\"{}", "#".repeat(hashes)), start);
        }
    }
    if rest.starts_with('"') {
        return escaped_len(rest, '"');
    }
    let mut chars = rest.chars();
    match (chars.next(), chars.next(), chars.next()) {
        (Some('\''), Some('\\'), _) => escaped_len(rest, '\''),
        (Some('\''), Some(inner), Some('\'')) => 2 + inner.len_utf8(),
        _ => 0,
    }
}

/// The length of a literal that begins and ends with `quote` and may have escapes.
fn escaped_len(rest: &str, quote: char) -> usize {
    let mut is_escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            c if c == quote => return at + c.len_utf8(),
            _ => {}
        }
    }
    rest.len()
}
