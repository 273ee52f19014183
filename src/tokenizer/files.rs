//! A tokenizer's files: the vocabulary and the merges in either of their two forms. Separate
//! because they are read and checked here, and what is made of them is not.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Merges, Vocab};
use crate::error::{Error, Result};

/// The largest file of a tokenizer that is read; the published ones have 1 to 4 MB.
const MAX_FILE_BYTES: u64 = 64 << 20;

pub(super) fn vocabulary_of_tokenizer_json(fast: &Map<String, Value>) -> Result<(Vocab, Merges)> {
    let broken = |what: &str| Error::model(format!("tokenizer.json: {what}"));
    let model = fast.get("model").and_then(Value::as_object);
    let model = model.ok_or_else(|| broken("no \"model\""))?;
    let vocab = model.get("vocab").and_then(Value::as_object);
    let vocab =
        vocab.ok_or_else(|| broken("\"model\" has no \"vocab\" of a byte-pair encoding"))?;
    let merges = model.get("merges").and_then(Value::as_array);
    let merges = merges.ok_or_else(|| broken("\"model\" has no \"merges\""))?;
    let pair = |merge: &Value| match merge {
        Value::String(text) => text.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())),
        Value::Array(pair) => match pair.as_slice() {
            [Value::String(a), Value::String(b)] => Some((a.clone(), b.clone())),
            _ => None,
        },
        _ => None,
    };
    let merges = merges.iter().enumerate().map(|(at, merge)| {
        pair(merge).ok_or_else(|| broken(&format!("merge {at} is no pair of tokens")))
    });
    Ok((vocab_ids(vocab, "tokenizer.json")?, merges.collect::<Result<_>>()?))
}

pub(super) fn vocabulary_of_files(folder: &Path) -> Result<(Vocab, Merges)> {
    let vocab = read_object(folder, "vocab.json")?;
    let merges = read_text(folder, "merges.txt")?;
    let (Some(vocab), Some(merges)) = (vocab, merges) else {
        return Err(Error::model(
            "no tokenizer here: neither tokenizer.json nor vocab.json with merges.txt",
        ));
    };
    vocabulary_of_texts(&vocab, &merges)
}

pub(super) fn vocabulary_of_texts(
    vocab: &Map<String, Value>,
    merges: &str,
) -> Result<(Vocab, Merges)> {
    let mut pairs = Merges::new();
    for (at, line) in merges.lines().enumerate() {
        if line.is_empty() || line.starts_with("#version") {
            continue;
        }
        match line.split(' ').collect::<Vec<_>>().as_slice() {
            [a, b] => pairs.push(((*a).to_owned(), (*b).to_owned())),
            _ => {
                let line_number = at.saturating_add(1);
                return Err(Error::model(format!("merges.txt: line {line_number} is no pair")));
            }
        }
    }
    Ok((vocab_ids(vocab, "vocab.json")?, pairs))
}

fn vocab_ids(vocab: &Map<String, Value>, file: &str) -> Result<Vocab> {
    let id = |(token, id): (&String, &Value)| match id.as_u64().and_then(|id| id.try_into().ok()) {
        Some(id) => Ok((token.clone(), id)),
        None => Err(Error::model(format!("{file}: the id of {token:?} is {id}"))),
    };
    vocab.iter().map(id).collect()
}

pub(super) fn read_object(folder: &Path, file: &str) -> Result<Option<Map<String, Value>>> {
    read_text(folder, file)?.map(|text| object(file, &text)).transpose()
}

pub(super) fn object(file: &str, text: &str) -> Result<Map<String, Value>> {
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(Error::model(format!("{file}: not a JSON object"))),
        Err(error) => Err(Error::model(format!("{file}: {error}"))),
    }
}

/// A file's text, `None` if there is no such file.
fn read_text(folder: &Path, file: &str) -> Result<Option<String>> {
    let broken = |what: &dyn std::fmt::Display| Error::model(format!("{file}: {what}"));
    let path = folder.join(file);
    match std::fs::metadata(&path) {
        Ok(metadata) if metadata.len() > MAX_FILE_BYTES => {
            Err(broken(&format!("{} bytes, more than {MAX_FILE_BYTES}", metadata.len())))
        }
        Ok(_) => std::fs::read_to_string(&path).map(Some).map_err(|error| broken(&error)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(broken(&error)),
    }
}
