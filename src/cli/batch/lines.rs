//! A file of jobs as lines of named values: JSON objects, prompts, or flags as AUTOMATIC1111's
//! "Prompts from file" takes them. Separate because somebody else wrote it: here it is text, and
//! what the names mean is decided elsewhere.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

use super::args::Format;
use crate::error::{Error, Result};

/// Longest line, in bytes: two prompts of 64 KiB, every character escaped, fit.
const MAX_LINE_BYTES: usize = 1 << 20;

/// One job as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    /// Its number in the file, from 1.
    pub number: usize,
    /// Names as written, and values as text.
    pub fields: Vec<(String, String)>,
}

/// The lines of a file that are jobs.
///
/// # Errors
/// If a line is too long, not UTF-8, or not what its format asks for: names the line.
pub(super) fn read(bytes: &[u8], format: Format) -> Result<Vec<Line>> {
    let bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
    let mut lines = Vec::new();
    for (number, line) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
        let at_line = |error: Error| error.context(format!("line {number}"));
        let text = text(line).map_err(at_line)?;
        if !text.is_empty() {
            lines.push((number, text));
        }
    }
    let is_json = match (format, lines.first()) {
        (Format::Jsonl, _) => true,
        (Format::Text, _) => false,
        // A prompt may begin with a brace too.
        (Format::Auto, first) => {
            first.is_some_and(|(_, text)| serde_json::from_str::<Object>(text).is_ok())
        }
    };
    // In JSON nothing else than a job can be meant.
    lines.retain(|(_, text)| is_json || !text.starts_with('#'));
    let job = |(number, text): (usize, &str)| {
        let fields = match is_json {
            true => json(text),
            false if text.starts_with("--") => flags(text),
            false => Ok(vec![("prompt".to_owned(), text.to_owned())]),
        };
        let fields = fields.map_err(|error| error.context(format!("line {number}")))?;
        Ok(Line { number, fields })
    };
    lines.into_iter().map(job).collect()
}

fn text(line: &[u8]) -> Result<&str> {
    if line.len() > MAX_LINE_BYTES {
        return Err(Error::usage(format!("longer than {MAX_LINE_BYTES} bytes")));
    }
    let text = std::str::from_utf8(line).map_err(|error| {
        let at = error.valid_up_to();
        Error::usage(format!("not UTF-8: byte {at} does not belong there"))
    })?;
    Ok(text.trim())
}

fn json(text: &str) -> Result<Vec<(String, String)>> {
    let object: Object = serde_json::from_str(text).map_err(|error| {
        let message = error.to_string();
        let message = message.rsplit_once(" at line ").map_or(&*message, |(before, _)| before);
        let column = error.column();
        Error::usage(format!("not a JSON object of settings: {message} at column {column}"))
    })?;
    let mut fields = Vec::new();
    for (name, value) in object.0 {
        let text = match value {
            // As if it were not there.
            Value::Null => continue,
            Value::String(text) => text,
            Value::Number(number) => number.to_string(),
            Value::Bool(_) | Value::Array(_) | Value::Object(_) => {
                return Err(Error::usage(format!(
                    "field {name:?}: a text or a number, not {value}"
                )));
            }
        };
        fields.push((name, text));
    }
    Ok(fields)
}

/// An object whose names are in order and each there once, unlike a map's, where the last wins.
struct Object(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_map(Pairs)
    }
}

struct Pairs;

impl<'de> Visitor<'de> for Pairs {
    type Value = Object;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Object, A::Error> {
        let mut pairs: Vec<(String, Value)> = Vec::new();
        while let Some((name, value)) = map.next_entry::<String, Value>()? {
            if pairs.iter().any(|(known, _)| *known == name) {
                return Err(serde::de::Error::custom(format!("field {name:?} is there twice")));
            }
            pairs.push((name, value));
        }
        Ok(Object(pairs))
    }
}

/// `--name value --name value`, where a value of several words need not be quoted.
fn flags(text: &str) -> Result<Vec<(String, String)>> {
    let mut fields: Vec<(String, Option<String>)> = Vec::new();
    for Word { text, is_quoted } in words(text)? {
        let flag = text.strip_prefix("--").filter(|_| !is_quoted);
        match (flag, fields.last_mut()) {
            (Some(flag), _) => fields.push(match flag.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (flag.to_owned(), None),
            }),
            (None, Some((_, value))) => match value {
                Some(value) => value.extend([" ", &text]),
                None => *value = Some(text),
            },
            (None, None) => return Err(Error::usage(format!("{text:?} belongs to no flag"))),
        }
    }
    let with_value = |(name, value): (String, Option<String>)| match value {
        Some(value) => Ok((name, value)),
        None => Err(Error::usage(format!("field {name:?} has no value"))),
    };
    fields.into_iter().map(with_value).collect()
}

struct Word {
    text: String,
    /// Whether it begins in quotes, and so is no flag.
    is_quoted: bool,
}

/// The words of a POSIX shell, without what a shell would replace.
fn words(text: &str) -> Result<Vec<Word>> {
    let mut words = Vec::new();
    let mut word: Option<Word> = None;
    let mut chars = text.chars();
    let unclosed = |quote: char| Error::usage(format!("a {quote} is not closed"));
    while let Some(c) = chars.next() {
        if c.is_whitespace() {
            words.extend(word.take());
            continue;
        }
        let is_quote = matches!(c, '"' | '\'');
        let word = word.get_or_insert(Word { text: String::new(), is_quoted: is_quote });
        match c {
            '\'' => loop {
                match chars.next().ok_or_else(|| unclosed(c))? {
                    '\'' => break,
                    c => word.text.push(c),
                }
            },
            '"' => loop {
                match chars.next().ok_or_else(|| unclosed(c))? {
                    '"' => break,
                    '\\' => match chars.next().ok_or_else(|| unclosed(c))? {
                        escaped @ ('"' | '\\' | '$' | '`') => word.text.push(escaped),
                        other => word.text.extend(['\\', other]),
                    },
                    c => word.text.push(c),
                }
            },
            '\\' => word.text.extend(chars.next()),
            c => word.text.push(c),
        }
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    /// `number: name=value|…` of each job.
    fn found(text: &str, format: Format) -> Vec<String> {
        let show = |Line { number, fields }: Line| {
            let fields = fields.iter().map(|(name, value)| format!("{name}={value}"));
            format!("{number}: {}", fields.collect::<Vec<_>>().join("|"))
        };
        read(text.as_bytes(), format).unwrap().into_iter().map(show).collect()
    }

    #[test]
    fn json_objects_prompts_and_flags_become_named_values() {
        let check = |text: &str, expected: &[&str]| {
            assert_eq!(found(text, Format::Auto), expected, "{text:?}");
        };
        check("", &[]);
        check(
            "\u{feff}{\"prompt\": \"a\\nb\", \"seed\": 18446744073709551615}\r\n\n\
             {\"guidance_scale\": 7.50, \"steps\": null}\n",
            &["1: prompt=a\nb|seed=18446744073709551615", "3: guidance_scale=7.5"],
        );
        check(
            "# mine\n\n  a fox, #1  \n{red|blue} fox\n",
            &["3: prompt=a fox, #1", "4: prompt={red|blue} fox"],
        );
        check("{red} fox\n{}", &["1: prompt={red} fox", "2: prompt={}"]);
        check(
            r#"--prompt "a \"red\" fox" --seed 5 --negative_prompt 'no $x' --cfg_scale=7"#,
            &[r#"1: prompt=a "red" fox|seed=5|negative_prompt=no $x|cfg_scale=7"#],
        );
        check("--prompt a red fox --steps 3", &["1: prompt=a red fox|steps=3"]);
        check(r#"--prompt "--dashes" and\ "" --seed 1"#, &["1: prompt=--dashes and |seed=1"]);
        check("--negative_prompt '' --prompt x", &["1: negative_prompt=|prompt=x"]);
        check("a -- b", &["1: prompt=a -- b"]);
        assert_eq!(found("{}", Format::Text), ["1: prompt={}"]);
        assert_eq!(found("\n{}", Format::Jsonl), ["2: "]);
    }

    #[test]
    fn any_bytes_are_jobs_or_an_error() {
        const SIGNS: &[u8] = b"\"'\\{}[]:,-= \n\0\xff\xc3a1#";
        let texts = [
            "{\"prompt\": \"a\\u00e9\", \"seed\": 5}\n{\"steps\": null}\n",
            "--prompt \"a \\\"b\\\"\" --seed=5 'c'\n# d\n\u{feff}e\n",
        ];
        let mut random = 7_u64;
        let mut draw = |below: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) as usize % below
        };
        for round in 0..2_000 {
            let mut bytes = texts[round % texts.len()].as_bytes().to_vec();
            for _ in 0..1 + draw(4) {
                let at = draw(bytes.len());
                bytes[at] = SIGNS[draw(SIGNS.len())];
            }
            bytes.truncate(1 + draw(bytes.len()));
            for format in [Format::Auto, Format::Jsonl, Format::Text] {
                // Whatever it is, it is not a panic.
                let _ = read(&bytes, format);
            }
        }
    }

    #[test]
    fn what_is_no_job_is_named_with_its_line() {
        let long = format!("x\n{}", "a".repeat(MAX_LINE_BYTES + 1));
        let deep = format!("{{\"prompt\": {}", "[".repeat(1 << 18));
        for (text, format, expected) in [
            (&b"{}\nx"[..], Format::Auto, "line 2: not a JSON object of settings: expected value"),
            (b"{}\n# x", Format::Auto, "line 2: not a JSON object"),
            (b"[1]", Format::Jsonl, "line 1: not a JSON object of settings: invalid type"),
            (b"{\"a\": 1, \"a\": 1}", Format::Jsonl, "field \"a\" is there twice"),
            (b"{\"a\": [1]}", Format::Jsonl, "line 1: field \"a\": a text or a number, not [1]"),
            (b"{\"a\": true}", Format::Jsonl, "a text or a number, not true"),
            (deep.as_bytes(), Format::Jsonl, "recursion limit"),
            (b"a\nb\xff", Format::Auto, "line 2: not UTF-8: byte 1"),
            (long.as_bytes(), Format::Auto, "line 2: longer than 1048576 bytes"),
            (b"--prompt \"a", Format::Text, "line 1: a \" is not closed"),
            (b"--prompt it's", Format::Text, "line 1: a ' is not closed"),
            (b"--prompt --seed 5", Format::Text, "line 1: field \"prompt\" has no value"),
        ] {
            let error = read(text, format).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage);
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
