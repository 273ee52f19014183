//! Reader for the configuration files of models: JSON as Python writes it, in which `-Infinity`,
//! `Infinity` and `NaN` are numbers (segmind/tiny-sd's `scheduler_config.json` has the first).
//! Separate because strict JSON has no such numbers, and neither has `serde_json`.
//!
//! Such a number becomes the *string* of the same letters, outside of strings only; [`as_f64`]
//! reads it as the number. Everything else is as in the file.

use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

/// Largest configuration or index file, in bytes. The index of SDXL's UNet has 200,000.
const MAX_LEN: u64 = 16 << 20;

/// The numbers that JSON lacks, as Python writes them. None begins with another.
const NON_FINITE: [(&str, f64); 3] =
    [("-Infinity", f64::NEG_INFINITY), ("Infinity", f64::INFINITY), ("NaN", f64::NAN)];

/// Reads a JSON file.
///
/// # Errors
/// If it cannot be read, is larger than 16 MiB, or is not JSON: the message names file and line.
pub fn read(path: &Path) -> Result<Value> {
    parse(&read_text(path)?).map_err(|error| error.context(path.display()))
}

/// The text of a small file.
///
/// # Errors
/// If it cannot be read or is larger than 16 MiB.
pub fn read_text(path: &Path) -> Result<String> {
    let failed = |error: std::io::Error| Error::model(format!("{}: {error}", path.display()));
    // Before opening, because opening a named pipe waits.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(Error::model(format!("{} is not a file", path.display())));
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_LEN + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_LEN {
        return Err(Error::model(format!("{} is larger than {MAX_LEN} bytes", path.display())));
    }
    String::from_utf8(bytes)
        .map_err(|_| Error::model(format!("{} is not text in UTF-8", path.display())))
}

/// Parses JSON.
///
/// # Errors
/// If it is not JSON: the message names the line, and the caller the file.
pub fn parse(text: &str) -> Result<Value> {
    serde_json::from_str(&quote_non_finite(text)).map_err(|error| {
        // Without the column, which quoting may have moved.
        let message = error.to_string();
        let message = message.rsplit_once(" at line ").map_or(&*message, |(before, _)| before);
        Error::model(format!("line {}: {message}", error.line()))
    })
}

/// The number that a value is; also the ones that JSON lacks, as [`parse`] gives them.
pub fn as_f64(value: &Value) -> Option<f64> {
    match value {
        Value::String(text) => NON_FINITE.iter().find(|row| row.0 == text).map(|row| row.1),
        Value::Number(number) => number.as_f64(),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    }
}

/// Puts the numbers that JSON lacks into quotes where they are words of their own.
fn quote_non_finite(text: &str) -> Cow<'_, str> {
    let mut quoted = String::new();
    // What is before it is in `quoted`.
    let mut copied = 0;
    let mut in_string = false;
    let mut at = 0;
    let bytes = text.as_bytes();
    while let Some(&byte) = bytes.get(at) {
        let rest = text.get(at..).unwrap_or_default();
        let word = NON_FINITE.iter().map(|row| row.0).find(|&word| rest.starts_with(word));
        at += match (in_string, byte, word) {
            (true, b'\\', _) => 2,
            (_, b'"', _) => {
                in_string = !in_string;
                1
            }
            (false, _, Some(word)) if is_word(bytes, at, word.len()) => {
                quoted.extend([text.get(copied..at).unwrap_or_default(), "\"", word, "\""]);
                copied = at + word.len();
                word.len()
            }
            _ => 1,
        };
    }
    match copied {
        0 => Cow::Borrowed(text),
        _ => Cow::Owned(quoted + text.get(copied..).unwrap_or_default()),
    }
}

/// Whether neither side of the word goes on with letters, digits or a sign.
fn is_word(bytes: &[u8], start: usize, len: usize) -> bool {
    let joins = |byte: Option<&u8>| {
        byte.is_some_and(|&byte| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte))
    };
    !joins(start.checked_sub(1).and_then(|before| bytes.get(before)))
        && !joins(bytes.get(start.saturating_add(len)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_that_json_lacks_are_read_and_strings_stay_as_they_are() {
        let check = |text: &str, expected: Value| assert_eq!(parse(text).unwrap(), expected);
        check("-Infinity", json!("-Infinity"));
        check(
            r#"{"lambda_min_clipped": -Infinity, "a": [NaN,Infinity], "b": 1.5}"#,
            json!({"lambda_min_clipped": "-Infinity", "a": ["NaN", "Infinity"], "b": 1.5}),
        );
        check(
            r#"{"NaN": "no \" NaN, -Infinity", "\\": NaN, "é": "Infinity"}"#,
            json!({"NaN": "no \" NaN, -Infinity", "\\": "NaN", "é": "Infinity"}),
        );
        check(r#"{"mid_block_type": null}"#, json!({"mid_block_type": null}));
    }

    #[test]
    fn the_numbers_come_back_as_numbers() {
        let value = parse(r#"[-Infinity, Infinity, 2, "x", null, NaN]"#).unwrap();
        let numbers: Vec<_> = value.as_array().unwrap().iter().map(as_f64).collect();
        assert_eq!(
            numbers[..5],
            [Some(f64::NEG_INFINITY), Some(f64::INFINITY), Some(2.0), None, None]
        );
        assert!(numbers[5].unwrap().is_nan());
    }

    #[test]
    fn what_is_not_json_is_an_error_with_its_line() {
        let check = |text: &str, line: &str| {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with(line) && !error.contains("column"), "{error}");
        };
        check("{\n\"a\": -Infinity,\n\"b\": oops}", "line 3: expected value");
        check("[NaNny]", "line 1:");
        check("[--Infinity]", "line 1:");
        check("[\"open\\", "line 1:");
        check("", "line 1:");
        check(&"[".repeat(100_000), "line 1: recursion limit");
    }

    #[test]
    fn a_file_that_is_not_json_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, "{\n\"a\" 1}").unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("config.json: line 2: expected `:`"), "{error}");
        std::fs::write(&path, b"\"\xff\"").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("config.json is not text"));
    }
}
