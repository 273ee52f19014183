//! What a picture records of the embeddings and LoRAs that it was made with, and the way back.
//! Separate because they are files of their own: the model's hashes say nothing of them.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::args::ModelArgs;
use crate::error::{Error, Result};
use crate::pipeline::Additions;
use crate::weights::{Embedding, EmbeddingFile, LoraFile, file_hash};

/// Most files of each kind.
const MAX_FILES: usize = 64;

/// The files beside a model, by name and by content.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AdditionRecords {
    /// In the order of their flags.
    #[serde(default)]
    pub embeddings: Vec<EmbeddingRecord>,
    /// In the order of their flags, which is that of the sum.
    #[serde(default)]
    pub loras: Vec<LoraRecord>,
    /// Whether changes of weights that the model does not have were left out.
    #[serde(default)]
    pub skips_unmatched: bool,
}

/// An embedding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EmbeddingRecord {
    /// What prompts call it.
    pub name: String,
    /// The file as the user wrote it.
    pub file: String,
    /// BLAKE3-256 of the file, in hexadecimal digits.
    pub hash: String,
}

/// A LoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraRecord {
    /// The file as the user wrote it.
    pub file: String,
    /// How strongly it acts.
    pub scale: f64,
    /// BLAKE3-256 of the file, in hexadecimal digits.
    pub hash: String,
}

/// What the flags ask for.
///
/// # Errors
/// If there are too many, or a flag has nothing to act on.
pub(super) fn of_flags(model: &ModelArgs) -> Result<Additions> {
    let ModelArgs { embedding, lora, lora_skip_unmatched, .. } = model;
    for (flag, count) in [("--embedding", embedding.len()), ("--lora", lora.len())] {
        if count > MAX_FILES {
            return Err(Error::usage(format!(
                "{flag} is given {count} times, at most {MAX_FILES}"
            )));
        }
    }
    if *lora_skip_unmatched && lora.is_empty() {
        return Err(Error::usage("--lora-skip-unmatched without --lora FILE"));
    }
    Ok(Additions {
        embeddings: embedding.clone(),
        loras: lora.clone(),
        skips_unmatched: *lora_skip_unmatched,
    })
}

impl AdditionRecords {
    /// Of files, which are read.
    ///
    /// # Errors
    /// If one cannot be.
    pub(super) fn of(additions: &Additions) -> Result<Self> {
        let named = |path: &Path| path.to_string_lossy().into_owned();
        let embedding = |file: &EmbeddingFile| {
            let Embedding { name, .. } = Embedding::read(file)?;
            Ok(EmbeddingRecord { name, file: named(&file.path), hash: file_hash(&file.path)? })
        };
        let lora = |file: &LoraFile| {
            let (hash, scale) = (file_hash(&file.path)?, file.scale);
            Ok(LoraRecord { file: named(&file.path), scale, hash })
        };
        Ok(Self {
            embeddings: additions.embeddings.iter().map(embedding).collect::<Result<_>>()?,
            loras: additions.loras.iter().map(lora).collect::<Result<_>>()?,
            skips_unmatched: additions.skips_unmatched,
        })
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What of them determines a picture, by name.
    pub(super) fn key_parts(&self) -> Vec<(&'static str, Vec<u8>)> {
        let embeddings =
            self.embeddings.iter().flat_map(|EmbeddingRecord { name, hash, .. }| {
                [
                    ("embedding", name.clone().into_bytes()),
                    ("embedding_hash", hash.clone().into_bytes()),
                ]
            });
        let loras = self.loras.iter().flat_map(|LoraRecord { scale, hash, .. }| {
            let scale = scale.to_bits().to_le_bytes().to_vec();
            [("lora_scale", scale), ("lora_hash", hash.clone().into_bytes())]
        });
        embeddings.chain(loras).collect()
    }

    /// A line for each, for people.
    pub(super) fn lines(&self) -> Vec<(&'static str, String)> {
        let short = |hash: &str| hash.chars().take(24).collect::<String>();
        let embedding = |record: &EmbeddingRecord| {
            let EmbeddingRecord { name, file, hash } = record;
            ("embedding", format!("{name}, {file}, {}", short(hash)))
        };
        let lora = |LoraRecord { file, scale, hash }: &LoraRecord| {
            ("lora", format!("{file}, scale {scale}, {}", short(hash)))
        };
        self.embeddings.iter().map(embedding).chain(self.loras.iter().map(lora)).collect()
    }

    /// What determines a picture, in short: to be compared.
    pub(super) fn summary(&self) -> String {
        let short = |hash: &str| hash.chars().take(12).collect::<String>();
        let embedding =
            |record: &EmbeddingRecord| format!("{} {}", record.name, short(&record.hash));
        let lora = |LoraRecord { scale, hash, .. }: &LoraRecord| format!("{scale}*{}", short(hash));
        let parts: Vec<_> =
            self.embeddings.iter().map(embedding).chain(self.loras.iter().map(lora)).collect();
        match parts.as_slice() {
            [] => "none".to_owned(),
            parts => parts.join(" "),
        }
    }

    /// The record's files as flags, where the user gave none.
    ///
    /// # Errors
    /// If a value cannot be one of a flag.
    pub(super) fn fill_in(
        &self,
        model: &mut ModelArgs,
        is_given: &dyn Fn(&str) -> bool,
    ) -> Result<()> {
        if !is_given("embedding") {
            let embedding = |EmbeddingRecord { name, file, .. }: &EmbeddingRecord| {
                let path = here("embedding", file)?;
                Ok(EmbeddingFile { path: path.into(), name: Some(name.clone()) })
            };
            model.embedding = self.embeddings.iter().map(embedding).collect::<Result<_>>()?;
        }
        if !is_given("lora") {
            let lora = |LoraRecord { file, scale, .. }: &LoraRecord| {
                let text = format!("{}:{scale}", here("lora", file)?);
                text.parse::<LoraFile>().map_err(|error| {
                    Error::usage(format!("its LoRA {text:?}: {error}; give --lora"))
                })
            };
            model.lora = self.loras.iter().map(lora).collect::<Result<_>>()?;
            model.lora_skip_unmatched |= self.skips_unmatched && !model.lora.is_empty();
        }
        Ok(())
    }
}

/// A name that Windows would send credentials to is no file of anybody's.
fn here<'a>(flag: &str, file: &'a str) -> Result<&'a str> {
    if file.starts_with(r"\\") || file.starts_with("//") {
        let text = format!("its {flag} is on another machine; --{flag} says where it is here");
        return Err(Error::usage(text));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::job::tests::{Fake, job_of, parse_words};
    use crate::error::Kind;

    #[test]
    fn flags_name_files_and_how_they_are_used() {
        let lora = |path: &str, scale| LoraFile { path: path.into(), scale };
        let job = job_of("x|--lora|a.safetensors:0.5|--lora|b:c|--lora-skip-unmatched");
        assert_eq!(job.additions.loras, [lora("a.safetensors", 0.5), lora("b:c", 1.0)]);
        assert!(job.additions.skips_unmatched);
        let file = |name: Option<&str>, path: &str| {
            let name = name.map(str::to_owned);
            EmbeddingFile { path: path.into(), name }
        };
        let job = job_of("x|--embedding|a.pt|--embedding|b=dir/c=.pt|--embedding|./d=e");
        let files = [file(None, "a.pt"), file(Some("b"), "dir/c=.pt"), file(None, "./d=e")];
        assert_eq!(job.additions.embeddings, files);
        let many = format!("x{}", "|--lora|a".repeat(MAX_FILES + 1));
        for (words, expected) in [
            ("x|--lora|a:1e9", "from -100 to 100"),
            ("x|--lora|", "FILE:SCALE"),
            ("x|--lora-skip-unmatched", "--lora-skip-unmatched without --lora"),
            ("x|--embedding|=a", "NAME=FILE"),
            (&many, "--lora is given 65 times, at most 64"),
        ] {
            let error = parse_words(words, &mut Fake::default()).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage);
            let message = error.to_string();
            assert!(message.contains(expected) && !message.contains('\n'), "{words}: {message}");
        }
    }

    #[test]
    fn a_record_becomes_flags_unless_they_are_given() {
        let json = r#"{"embeddings": [{"name": "a/b", "file": "e.pt", "hash": "1"}],
                       "loras": [{"file": "c:\\l", "scale": -0.25, "hash": "2"}],
                       "skips_unmatched": true, "newer": 1}"#;
        let record: AdditionRecords = serde_json::from_str(json).unwrap();
        let job = job_of("x|--lora|m");
        let fill = |given: &[&str]| {
            let mut model = model_of("x|--lora|m|--embedding|f");
            record.fill_in(&mut model, &|id| given.contains(&id)).unwrap();
            of_flags(&model).unwrap()
        };
        let filled = fill(&[]);
        assert_eq!(filled.loras, [LoraFile { path: r"c:\l".into(), scale: -0.25 }]);
        assert_eq!(filled.embeddings[0].name.as_deref(), Some("a/b"));
        assert!(filled.skips_unmatched);
        let given = fill(&["lora", "embedding"]);
        assert_eq!(given.loras, job.additions.loras);
        assert!(!given.skips_unmatched && given.embeddings[0].name.is_none());
        for file in [r"\\\\evil\\share", "//evil/share"] {
            let json = json.replace("e.pt", file);
            let record: AdditionRecords = serde_json::from_str(&json).unwrap();
            let error = record.fill_in(&mut model_of("x"), &|_| false).unwrap_err();
            assert!(error.to_string().contains("on another machine; --embedding says"), "{error}");
        }
    }

    fn model_of(words: &str) -> ModelArgs {
        use clap::Parser;
        let words = std::iter::once("tiny-sd").chain(words.split('|'));
        super::super::args::Args::try_parse_from(words).unwrap().model
    }
}
