//! The record of a picture: everything that determined it, without loss, and the key that says
//! whether two records make the same picture. Separate because pictures carry it, batches keep
//! their books by it, and `--from` and `verify` read it again, perhaps from a newer tiny-sd.

use serde::{Deserialize, Serialize};

use super::additions::AdditionRecords;
use super::grid::GridRecord;
use super::inputs::InputFile;
use super::job::Job;
use super::model::ModelSource;
use crate::error::{Error, Result};
use crate::image::ImageSize;
use crate::pipeline::{PIPELINE_VERSION, PromptSyntax};

/// Version of the record's fields. Fields are added without another version, since readers skip
/// those that they do not know; one that changes its meaning gives another version.
pub const SCHEMA_VERSION: u32 = 1;

/// What is to be said of a record of a later version than this program's: its fields are read as
/// if they meant what they mean here. Nothing of others.
pub(super) fn newer_schema(schema: u32) -> Option<String> {
    (schema > SCHEMA_VERSION).then(|| {
        format!(
            "its record is of schema {schema}, and this tiny-sd reads {SCHEMA_VERSION}: what it \
             says may mean something else"
        )
    })
}

/// Longest record that is read, in bytes: two prompts, escaped, fit.
pub const MAX_RECORD_BYTES: usize = 1 << 20;

/// How a picture was made. Every number comes back as it was: seeds have 64 bits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Version of the fields of who wrote it.
    pub schema: u32,
    /// Who wrote it, such as `0.1.0`.
    pub version: String,
    /// [`PIPELINE_VERSION`] of who wrote it.
    pub pipeline: u32,
    /// The prompt as the user gave it, whole, also where the model did not see its end.
    pub prompt: String,
    /// The prompt as the text encoder got it: of alternatives those that the seed chose.
    pub resolved_prompt: String,
    /// What the picture should not show; empty for nothing.
    pub negative_prompt: String,
    /// The negative prompt as the text encoder got it, if that is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolved_negative_prompt: Option<String>,
    /// How both prompts were read: `plain` or `a1111`.
    #[serde(default = "plain")]
    pub prompt_syntax: String,
    /// Layers of the text encoder that were left out.
    #[serde(default)]
    pub clip_skip: u64,
    /// Seed of the noise.
    pub seed: u64,
    /// Steps of the scheduler.
    pub steps: u64,
    /// The weight of classifier-free guidance.
    pub guidance_scale: f64,
    /// Columns of pixels.
    pub width: u64,
    /// Rows of pixels.
    pub height: u64,
    /// The picture that it began with, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<FileRecord>,
    /// What of that was painted, if not all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask_image: Option<FileRecord>,
    /// How far from it, 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strength: Option<f64>,
    /// The scheduler that was asked for by its name for `--scheduler`; none is the model's own.
    pub scheduler: Option<String>,
    /// The scheduler that was used, with the sigmas that the model has where the name is without.
    pub resolved_scheduler: String,
    /// Number type of the computation: `f32`, `f16` or `bf16`.
    pub dtype: String,
    /// Whether its latents were to be decoded in tiles.
    #[serde(default, skip_serializing_if = "is_false")]
    pub vae_tiling: bool,
    /// Whether `--low-memory` was given: CPUs of this machine then have other kernels.
    #[serde(default, skip_serializing_if = "is_false")]
    pub low_memory: bool,
    /// The model.
    pub model: ModelRecord,
    /// Embeddings and LoRAs.
    #[serde(default, skip_serializing_if = "AdditionRecords::is_empty")]
    pub additions: AdditionRecords,
    /// Where it was computed, without tokens, such as `cpu` or `quic://host:4433`.
    pub device: String,
    /// Which kernels the device has, such as `avx512`; none where it does not say.
    pub kernel_path: Option<String>,
}

/// A file that a picture was made of, by name and by content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// As the user wrote it.
    pub path: String,
    /// BLAKE3-256 of its bytes, in hexadecimal digits.
    pub hash: String,
}

impl FileRecord {
    fn of(file: &InputFile) -> Self {
        Self { path: file.path.to_string_lossy().into_owned(), hash: file.hash.clone() }
    }
}

/// The model of a picture, by name and by content.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelRecord {
    /// A repository of the hub, or a folder or file as the user wrote it.
    pub source: String,
    /// Branch, tag or commit that was asked for.
    pub revision: Option<String>,
    /// Which of several forms of the weights was asked for, such as `fp16`.
    pub variant: Option<String>,
    /// The folder with what a model in one file does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<String>,
    /// The VAE that was asked for instead of the model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vae: Option<String>,
    /// Of that one's weights, which are in the weights' hash too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vae_hash: Option<String>,
    /// Of the weights: [`UsedTensors::hash`](crate::weights::UsedTensors::hash).
    pub weights_hash: String,
    /// Of the weights that only pictures made of others need: the VAE's encoder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoder_hash: Option<String>,
    /// Of what says how they are used: [`config_hash`](crate::weights::config_hash).
    pub config_hash: String,
}

/// What of a record the loaded model and its devices decide.
#[derive(Debug, Clone, PartialEq)]
pub struct Provenance {
    /// See [`Settings::dtype`].
    pub dtype: String,
    /// See [`ModelRecord::weights_hash`].
    pub weights_hash: String,
    /// See [`ModelRecord::encoder_hash`]; known where the encoder is loaded.
    pub encoder_hash: Option<String>,
    /// See [`ModelRecord::vae_hash`].
    pub vae_hash: Option<String>,
    /// See [`ModelRecord::config_hash`].
    pub config_hash: String,
    /// See [`Settings::additions`].
    pub additions: AdditionRecords,
    /// See [`Settings::device`].
    pub device: String,
    /// See [`Settings::kernel_path`].
    pub kernel_path: Option<String>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
fn is_false(value: &bool) -> bool {
    !value
}

impl Settings {
    /// The record of one of a job's pictures, made with a scheduler.
    pub fn new(
        job: &Job,
        seed: u64,
        size: ImageSize,
        scheduler: impl std::fmt::Display,
        provenance: Provenance,
    ) -> Self {
        let image = job.image.as_ref();
        let texts = job.texts(seed);
        let negative_prompt = texts.negative_prompt.into_owned();
        Self {
            schema: SCHEMA_VERSION,
            version: env!("CARGO_PKG_VERSION").into(),
            pipeline: PIPELINE_VERSION,
            prompt: job.prompt.clone(),
            resolved_prompt: texts.prompt.into_owned(),
            resolved_negative_prompt: Some(negative_prompt)
                .filter(|text| *text != job.negative_prompt),
            negative_prompt: job.negative_prompt.clone(),
            prompt_syntax: job.prompt_syntax.name().into(),
            clip_skip: job.clip_skip.get() as u64,
            seed,
            steps: job.steps.get() as u64,
            guidance_scale: job.guidance_scale.get(),
            width: size.width as u64,
            height: size.height as u64,
            image: image.map(|image| FileRecord::of(&image.image)),
            mask_image: image.and_then(|image| image.mask.as_ref()).map(FileRecord::of),
            strength: image.map(|image| image.strength),
            scheduler: job.scheduler.map(|choice| choice.to_string()),
            resolved_scheduler: scheduler.to_string(),
            dtype: provenance.dtype,
            vae_tiling: job.vae_tiling,
            low_memory: job.low_memory,
            model: ModelRecord {
                source: job.model.recorded(),
                revision: job.revision.as_ref().map(|name| name.as_str().into()),
                variant: job.variant.as_ref().map(|name| name.as_str().into()),
                config: job.configs.as_ref().map(|path| path.to_string_lossy().into_owned()),
                vae: job.vae.as_ref().map(ModelSource::recorded),
                vae_hash: provenance.vae_hash,
                weights_hash: provenance.weights_hash,
                encoder_hash: image.and(provenance.encoder_hash),
                config_hash: provenance.config_hash,
            },
            additions: provenance.additions,
            device: provenance.device,
            kernel_path: provenance.kernel_path,
        }
    }

    /// BLAKE3-256, in hexadecimal digits, of what determines the picture: `pipeline`,
    /// `resolved_prompt`, the resolved `negative_prompt`, `seed`, `steps`, `guidance_scale`,
    /// `width`, `height`, `resolved_scheduler`, `dtype`, `weights_hash` and `config_hash`, and of
    /// what came later (`prompt_syntax`, `clip_skip`, `additions`, `vae_tiling`; with an image
    /// `image` and `mask_image` by their content, `strength`, and `encoder_hash`) whatever is not
    /// as it was before: the keys of older records stay as they are.
    ///
    /// Not in it: what only names these things (`prompt`, `scheduler`, the model's `source`,
    /// `revision`, `variant`, `config` and `vae`, where images were), who wrote it (`schema`,
    /// `version`), and where it was made (`device`, `kernel_path`, `low_memory`): where the kernels
    /// are the same, so are the pictures, and else they differ by rounding.
    pub fn key(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut add = |name: &str, value: &[u8]| {
            hasher.update(format!("{name} {}\n", value.len()).as_bytes()).update(value);
        };
        add("pipeline", &self.pipeline.to_le_bytes());
        add("resolved_prompt", self.resolved_prompt.as_bytes());
        add("negative_prompt", self.given_negative_prompt().as_bytes());
        add("seed", &self.seed.to_le_bytes());
        add("steps", &self.steps.to_le_bytes());
        add("guidance_scale", &self.guidance_scale.to_bits().to_le_bytes());
        add("width", &self.width.to_le_bytes());
        add("height", &self.height.to_le_bytes());
        add("resolved_scheduler", self.resolved_scheduler.as_bytes());
        add("dtype", self.dtype.as_bytes());
        add("weights_hash", self.model.weights_hash.as_bytes());
        add("config_hash", self.model.config_hash.as_bytes());
        if self.prompt_syntax != plain() {
            add("prompt_syntax", self.prompt_syntax.as_bytes());
        }
        if self.clip_skip != 0 {
            add("clip_skip", &self.clip_skip.to_le_bytes());
        }
        for (name, file) in [("image", &self.image), ("mask_image", &self.mask_image)] {
            file.iter().for_each(|file| add(name, file.hash.as_bytes()));
        }
        if let Some(strength) = self.strength {
            add("strength", &strength.to_bits().to_le_bytes());
        }
        if let Some(hash) = &self.model.encoder_hash {
            add("encoder_hash", hash.as_bytes());
        }
        self.additions.key_parts().iter().for_each(|(name, value)| add(name, value));
        // So that it changes no key of before it could be.
        if self.vae_tiling {
            add("vae_tiling", &[1]);
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The negative prompt that the text encoder got.
    pub fn given_negative_prompt(&self) -> &str {
        self.resolved_negative_prompt.as_deref().unwrap_or(&self.negative_prompt)
    }

    /// The record as one line of JSON.
    pub fn to_json(&self) -> String {
        // Of strings and finite numbers; there is nothing that could fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads a record, which anybody may have written.
    ///
    /// # Errors
    /// If it is too long or no record: says which field.
    pub fn from_json(text: &str) -> Result<Self> {
        if text.len() > MAX_RECORD_BYTES {
            return Err(Error::other(format!(
                "its record has {} bytes, more than {MAX_RECORD_BYTES}",
                text.len()
            )));
        }
        serde_json::from_str(text).map_err(|error| match GridRecord::read(text) {
            Some(grid) => grid.refusal(),
            None => Error::other(format!("its record cannot be read: {error}")),
        })
    }
}

/// How prompts were read before there was a choice.
fn plain() -> String {
    PromptSyntax::Plain.name().into()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cli::additions::{EmbeddingRecord, LoraRecord};
    use crate::cli::job::tests::job_of;

    pub fn settings() -> Settings {
        let job = job_of("a fox|-s|18446744073709551615|-g|7.1|-n|blurry|--steps|3|-m|org/name");
        let provenance = Provenance {
            dtype: "f32".into(),
            weights_hash: "ab".repeat(32),
            encoder_hash: Some("ef".repeat(32)),
            vae_hash: None,
            config_hash: "cd".repeat(32),
            additions: AdditionRecords::default(),
            device: "cpu".into(),
            kernel_path: Some("avx512".into()),
        };
        let size = ImageSize { height: 64, width: 128 };
        Settings::new(&job, job.seed, size, "ddim", provenance)
    }

    #[test]
    fn a_record_comes_back_as_it_was_with_every_bit_of_its_numbers() {
        for guidance_scale in [0.0, 7.5, 0.1 + 0.2, f64::MIN_POSITIVE, 999.999_999_999_999_9] {
            for prompt in ["", "a\n\"b\"\\ \0 \u{7f} é 東京 👩‍🎨", "Negative prompt: x\nSteps: 1"]
            {
                let before = Settings { guidance_scale, prompt: prompt.into(), ..settings() };
                let after = Settings::from_json(&before.to_json()).unwrap();
                assert_eq!(after, before);
                assert_eq!(after.seed, u64::MAX);
                assert_eq!(after.guidance_scale.to_bits(), guidance_scale.to_bits());
                assert_eq!(after.key(), before.key());
            }
        }
    }

    #[test]
    fn a_newer_record_is_read_and_what_is_none_is_named() {
        let json = settings().to_json();
        let newer = json.replacen('{', "{\"from_the_future\":[1,{}],", 1);
        assert_eq!(Settings::from_json(&newer).unwrap(), settings());
        let long = format!("{json}{}", " ".repeat(MAX_RECORD_BYTES));
        for (text, expected) in [
            ("", "cannot be read"),
            ("[]", "cannot be read"),
            (&*json.replacen("\"seed\"", "\"sead\"", 1), "missing field `seed`"),
            (&*json.replacen("18446744073709551615", "-1", 1), "-1"),
            (&*"[".repeat(1 << 19), "cannot be read"),
            (&*long, "more than 1048576"),
        ] {
            let error = Settings::from_json(text).unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains('\n'), "{error}");
        }
    }

    fn file(path: &str, hash: &str) -> FileRecord {
        FileRecord { path: path.into(), hash: hash.into() }
    }

    #[test]
    fn of_an_image_the_content_counts_and_nothing_is_said_where_there_is_none() {
        let with = |path: &str, hash: &str| {
            let image = Some(file(path, hash));
            Settings { image, strength: Some(0.5), ..settings() }
        };
        let before = with("a.png", "1");
        assert_eq!(Settings::from_json(&before.to_json()).unwrap(), before);
        assert_eq!(before.key(), with("b.png", "1").key());
        assert_ne!(before.key(), with("a.png", "2").key());
        let json = settings().to_json();
        assert!(!json.contains("image") && !json.contains("strength"), "{json}");
        assert!(!json.contains("encoder_hash"), "{json}");
        // Pinned: another key makes every picture of every batch again.
        let key = "c9271d0d26521766fa86883fc825789740522aadabc737077f4695fb2014362b";
        assert_eq!(settings().key(), key);
    }

    pub fn lora(file: &str, scale: f64, hash: &str) -> LoraRecord {
        LoraRecord { file: file.into(), scale, hash: hash.into() }
    }

    pub fn embedding(name: &str, file: &str, hash: &str) -> EmbeddingRecord {
        EmbeddingRecord { name: name.into(), file: file.into(), hash: hash.into() }
    }

    #[test]
    fn the_key_of_additions_is_of_what_they_do_and_not_of_where_they_are() {
        let with = |embeddings: &[EmbeddingRecord], loras: &[LoraRecord]| {
            let (embeddings, loras) = (embeddings.to_vec(), loras.to_vec());
            let additions = AdditionRecords { embeddings, loras, skips_unmatched: false };
            let before = Settings { additions, ..settings() };
            let after = Settings::from_json(&before.to_json()).unwrap();
            assert_eq!(after, before);
            after.key()
        };
        let base = with(&[embedding("a", "f", "1")], &[lora("f", 0.5, "2")]);
        assert_eq!(with(&[embedding("a", "g", "1")], &[lora("g", 0.5, "2")]), base);
        for other in [
            with(&[embedding("b", "f", "1")], &[lora("f", 0.5, "2")]),
            with(&[embedding("a", "f", "2")], &[lora("f", 0.5, "2")]),
            with(&[embedding("a", "f", "1")], &[lora("f", 0.6, "2")]),
            with(&[embedding("a", "f", "1")], &[lora("f", 0.5, "1")]),
            with(&[embedding("a", "f", "1")], &[]),
            with(&[], &[lora("f", 0.5, "2")]),
        ] {
            assert_ne!(other, base);
        }
    }

    #[test]
    fn the_key_changes_with_what_determines_the_picture_and_with_nothing_else() {
        type Change = fn(&mut Settings);
        let key = settings().key();
        let check = |changes: &[Change], is_other: bool| {
            for (index, change) in changes.iter().enumerate() {
                let mut changed = settings();
                change(&mut changed);
                assert_ne!(changed, settings(), "{index}");
                assert_eq!(changed.key() != key, is_other, "{index}");
            }
        };
        check(
            &[
                |s| s.pipeline += 1,
                |s| s.resolved_prompt.push(' '),
                |s| s.resolved_negative_prompt = Some("fog".into()),
                |s| s.clip_skip += 1,
                |s| s.additions.loras.push(lora("a", 1.0, "12")),
                |s| s.additions.embeddings.push(embedding("a", "b", "12")),
                |s| s.prompt_syntax = "a1111".into(),
                |s| s.negative_prompt.clear(),
                |s| s.seed -= 1,
                |s| s.steps += 1,
                |s| s.guidance_scale = s.guidance_scale.next_up(),
                |s| (s.width, s.height) = (s.height, s.width),
                |s| s.resolved_scheduler = "euler".into(),
                |s| s.dtype = "f16".into(),
                |s| s.vae_tiling = true,
                |s| s.model.weights_hash = s.model.config_hash.clone(),
                |s| s.model.config_hash.clear(),
                |s| s.image = Some(file("a", "1")),
                |s| s.mask_image = Some(file("a", "1")),
                |s| s.strength = Some(0.5),
                |s| s.model.encoder_hash = Some("ef".into()),
                // The border between two texts is part of them.
                |s| (s.resolved_prompt, s.negative_prompt) = ("a foxb".into(), "lurry".into()),
            ],
            true,
        );
        check(
            &[
                |s| s.schema += 1,
                |s| s.version.push('1'),
                |s| s.prompt.push(' '),
                |s| s.scheduler = Some("ddim".into()),
                |s| s.model.source.clear(),
                |s| s.model.revision = Some("v1".into()),
                |s| s.model.variant = Some("fp16".into()),
                |s| s.model.config = Some("dir".into()),
                |s| s.model.vae = Some("a/b".into()),
                |s| s.model.vae_hash = Some("ef".into()),
                |s| s.device = "mock".into(),
                |s| s.kernel_path = None,
                |s| s.low_memory = true,
            ],
            false,
        );
    }
}
