//! `tiny-sd info`: how a picture was made, or what a model consists of. Separate because its
//! product is text on standard output, for people or, with `--json`, for programs.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::{CommandFactory, FromArgMatches, Parser};
use serde_json::{Map, Value, json};

use super::command::usage;
use super::display::Display;
use super::grid::GridRecord;
use super::identity::Identity;
use super::inputs::read_picture;
use super::interrupt;
use super::job::Request;
use super::model::{HubName, ModelSource};
use super::painter::{self, Wanted};
use super::settings::{FileRecord, Settings, newer_schema};
use super::surroundings::{At, Process, Surroundings};
use super::values::Verbosity;
use crate::error::{Error, Result};
use crate::image::{FileFormat, Infotext, PictureTexts};
use crate::pipeline;
use crate::progress::{Event, Progress};
use crate::schedule::SchedulerConfig;
use crate::weights::defaults::typed;
use crate::weights::{Checkpoint, Component, Format, Model, SingleFile, Variant, built_in};

/// What is asked about.
#[derive(Debug, Parser)]
#[command(
    name = "tiny-sd info",
    about = "Says how a picture was made, or what a model consists of.",
    override_usage = "tiny-sd info [OPTIONS] <PICTURE|MODEL>",
    after_help = AFTER_HELP
)]
struct InfoArgs {
    /// A picture, a model (a folder, a downloaded repository, one file, demo), or a weight file
    #[arg(value_name = "PICTURE|MODEL")]
    what: PathBuf,

    /// One line of JSON instead of text
    #[arg(long)]
    json: bool,

    /// Branch, tag or commit of the repository [default: main]
    #[arg(long, value_name = "REVISION")]
    revision: Option<HubName>,

    /// Weights to prefer where a model has several, such as fp16
    #[arg(long, value_name = "NAME")]
    variant: Option<HubName>,
}

const AFTER_HELP: &str = "\
Of a picture it reads what tiny-sd records, and what AUTOMATIC1111's web UI and stable-diffusion.cpp
write. Nothing is downloaded. The weights' hash is of their content: it is the same for the same
weights in another kind of file.

Examples:
  tiny-sd info out.png
  tiny-sd info segmind/tiny-sd
  tiny-sd info demo
  tiny-sd info v1-5.safetensors
  tiny-sd info ./my-model --json | jq .weights_hash

Exit codes:
  0    it is said
  1    a picture or a file that cannot be read
  2    a wrong command line
  3    a model or its weights";

/// What is to be said of what.
#[derive(Debug, Clone, PartialEq)]
pub struct InfoJob {
    what: Subject,
    revision: Option<HubName>,
    variant: Option<HubName>,
    is_json: bool,
}

/// What is asked about.
#[derive(Debug, Clone, PartialEq)]
enum Subject {
    /// A picture, or weights: its first bytes say which.
    File(PathBuf),
    /// A model.
    Model(ModelSource),
}

/// Its flags.
pub(super) fn command() -> clap::Command {
    InfoArgs::command()
}

/// Parses what follows `tiny-sd info`.
///
/// # Errors
/// One line that names what is wrong.
pub(super) fn parse(
    flags: impl Iterator<Item = OsString>,
    surroundings: &dyn Surroundings,
) -> Result<Request> {
    let words = std::iter::once("tiny-sd info".into()).chain(flags);
    let args = command()
        .try_get_matches_from(words)
        .and_then(|matches| InfoArgs::from_arg_matches(&matches));
    let InfoArgs { what, json, revision, variant } = match args {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => return Ok(Request::Show(error)),
        Err(error) => return Err(usage(&error)),
    };
    // A name of a model that needs no place, whatever lies there under it.
    let at = match what.to_str() == Some(built_in::NAME) {
        true => At::Nothing,
        false => surroundings.at(&what),
    };
    let what = match at {
        At::File | At::Device => Subject::File(what),
        At::Folder => Subject::Model(ModelSource::Folder(what)),
        At::Nothing => {
            let name = what.to_string_lossy();
            let source = name.parse::<ModelSource>().ok();
            // No repository is called as a picture is.
            let is_picture = FileFormat::of_name(&what).is_some();
            let is_elsewhere = |source: &ModelSource| match source {
                ModelSource::Hub(_) | ModelSource::BuiltIn => !is_picture,
                ModelSource::Folder(_) | ModelSource::File(_) => false,
            };
            let source = source.filter(is_elsewhere);
            Subject::Model(source.ok_or_else(|| {
                Error::usage(format!("{name}: there is no such file or folder, and no such model"))
            })?)
        }
    };
    Ok(Request::Tell(Box::new(InfoJob { what, revision, variant, is_json: json })))
}

/// Says it on standard output.
///
/// # Errors
/// If what is asked about cannot be read.
pub fn tell(job: &InfoJob) -> Result<()> {
    let found = match &job.what {
        // It may be a pipe that nobody writes to: a signal ends that at once.
        Subject::File(path) => file(job, path)?,
        Subject::Model(source) => {
            interrupt::install(true)?;
            model(job, source)?
        }
    };
    let text = match job.is_json {
        true => format!("{}\n", found.json),
        false => found.text,
    };
    super::print(&text)
}

/// What was found, in both forms.
struct Found {
    text: String,
    json: Value,
}

fn file(job: &InfoJob, path: &Path) -> Result<Found> {
    let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
    let format = match extension.to_str() {
        Some("safetensors") => Format::Safetensors,
        Some("bin" | "pt" | "pth" | "ckpt") => Format::Pickle,
        Some(_) | None => return picture(path).map_err(|error| error.context(path.display())),
    };
    let checkpoint = Checkpoint::read_some(path, Some(format))?;
    if SingleFile::is_one(&checkpoint) {
        return model(job, &ModelSource::File(path.to_owned()));
    }
    let weights = Weights::of(&checkpoint.all().map_err(|error| error.context(path.display()))?);
    let bytes = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    let format = match format {
        Format::Safetensors => "safetensors",
        Format::Pickle => "pickle",
    };
    let name = path.display().to_string();
    let text = format!("{name}: {weights}, {} as {format}\n", megabytes(bytes));
    let mut json = weights.json();
    let more = json!({"kind": "weights", "file": name, "format": format, "bytes": bytes});
    merge(&mut json, more);
    Ok(Found { text, json })
}

fn picture(path: &Path) -> Result<Found> {
    let texts = PictureTexts::read(&read_picture(path, &Process)?)?;
    let (name, size) = (path.display().to_string(), texts.size);
    if let Some(grid) = texts.record.as_deref().and_then(GridRecord::read) {
        warn_of_newer(&name, grid.schema());
        let mut text = format!("{name}: {size}, a grid\n");
        grid.say(&mut text);
        let (width, height) = (size.width, size.height);
        let json = json!({
            "kind": "grid", "file": name, "width": width, "height": height, "record": grid,
        });
        return Ok(Found { text, json });
    }
    let record = texts.record.as_deref().map(Settings::from_json).transpose()?;
    record.iter().for_each(|record| warn_of_newer(&name, record.schema));
    let infotext = texts.parameters.as_deref().map(Infotext::parse);
    let mut text = format!("{name}: {size}\n");
    match (&record, &infotext) {
        (Some(record), _) => record_lines(record, &mut text),
        (None, Some(found)) => infotext_lines(found, &mut text),
        (None, None) => text.push_str("it does not say how it was made\n"),
    }
    let settings = infotext.as_ref().map(|found| {
        let values: serde_json::Map<String, Value> =
            found.values.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
        json!({
            "prompt": found.prompt,
            "negative_prompt": found.negative_prompt,
            "values": values,
        })
    });
    let json = json!({
        "kind": "picture",
        "file": name,
        "width": size.width,
        "height": size.height,
        "key": record.as_ref().map(Settings::key),
        "record": record,
        "parameters": texts.parameters,
        "settings": settings,
    });
    Ok(Found { text, json })
}

/// Says on standard error, beside the product, that a record is of a later version.
fn warn_of_newer(name: &str, schema: u32) {
    if let Some(note) = newer_schema(schema) {
        let note = format!("{name}: {note}");
        Display::new(Verbosity::Normal).report(Event::Warning(&note));
    }
}

/// A name and a value; what steers a terminal is shown and not done.
pub(super) fn line(text: &mut String, name: &str, value: impl std::fmt::Display) {
    let mut shown = String::new();
    for c in value.to_string().chars() {
        match c.is_control() || reorders(c) {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
    }
    // Writing to a String cannot fail.
    let name = name.replace(|c: char| c.is_control() || reorders(c), " ");
    let _ = writeln!(text, "{name:<16} {shown}");
}

/// Whether a character has text shown in another order or on another line than it is written.
fn reorders(c: char) -> bool {
    let of_direction = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}');
    let of_line = matches!(c, '\u{2028}' | '\u{2029}');
    of_direction || of_line || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

pub(super) fn record_lines(record: &Settings, text: &mut String) {
    let Settings { model, .. } = record;
    line(text, "made by", format!("tiny-sd {}, pipeline {}", record.version, record.pipeline));
    line(text, "prompt", &record.prompt);
    if record.resolved_prompt != record.prompt {
        line(text, "resolved prompt", &record.resolved_prompt);
    }
    line(text, "negative prompt", &record.negative_prompt);
    if let Some(resolved) = &record.resolved_negative_prompt {
        line(text, "its resolved one", resolved);
    }
    line(text, "prompt syntax", &record.prompt_syntax);
    if record.clip_skip > 0 {
        line(text, "clip skip", record.clip_skip);
    }
    line(text, "seed", record.seed);
    line(text, "steps", record.steps);
    line(text, "guidance scale", record.guidance_scale);
    line(text, "size", format!("{}x{}", record.width, record.height));
    for (name, file) in [("image", &record.image), ("mask", &record.mask_image)] {
        let shown = |file: &FileRecord| format!("{} ({})", file.path, file.hash);
        file.iter().for_each(|file| line(text, name, shown(file)));
    }
    record.strength.iter().for_each(|strength| line(text, "strength", strength));
    let whose = if record.scheduler.is_none() { ", the model's own" } else { "" };
    line(text, "scheduler", format!("{}{whose}", record.resolved_scheduler));
    line(text, "dtype", &record.dtype);
    if record.vae_tiling {
        line(text, "vae tiling", "yes");
    }
    if record.low_memory {
        line(text, "low memory", "yes");
    }
    line(text, "model", &model.source);
    for (name, value) in [
        ("revision", &model.revision),
        ("variant", &model.variant),
        ("config", &model.config),
        ("vae", &model.vae),
        ("vae hash", &model.vae_hash),
    ] {
        value.iter().for_each(|value| line(text, name, value));
    }
    line(text, "weights hash", &model.weights_hash);
    model.encoder_hash.iter().for_each(|hash| line(text, "encoder hash", hash));
    line(text, "config hash", &model.config_hash);
    record.additions.lines().iter().for_each(|(name, value)| line(text, name, value));
    line(text, "device", &record.device);
    record.kernel_path.iter().for_each(|path| line(text, "kernels", path));
    line(text, "key", record.key());
}

fn infotext_lines(found: &Infotext, text: &mut String) {
    line(text, "prompt", &found.prompt);
    line(text, "negative prompt", &found.negative_prompt);
    found.values.iter().for_each(|(name, value)| line(text, name, value));
}

fn model(job: &InfoJob, source: &ModelSource) -> Result<Found> {
    let (revision, variant) = (job.revision.as_ref(), job.variant.as_ref());
    let wanted =
        Wanted { model: source, configs: None, vae: None, revision, variant, offline: true };
    let (folder, variant) = painter::model(&wanted, &Display::new(Verbosity::Quiet))?;
    let parts = Component::ALL.map(|component| Part::of(&folder, component, variant.as_ref()));
    let parts = parts.into_iter().collect::<Result<Vec<_>>>()?;
    let Identity { weights_hash, config_hash, .. } =
        Identity::of(&folder, variant.as_ref(), false)?;
    let scheduler_config = folder.scheduler_config()?;
    let scheduler = SchedulerConfig::parse(&scheduler_config).and_then(|config| config.scheduler());
    let scheduler = scheduler.map(|scheduler| scheduler.choice().to_string());
    let size = pipeline::default_size(&folder);
    let defaults = match source {
        ModelSource::Folder(_) | ModelSource::BuiltIn => folder.defaults()?,
        // A command line that names one of these is read without them.
        ModelSource::Hub(_) | ModelSource::File(_) => Map::new(),
    };
    let field = |name: &str| scheduler_config.get(name).and_then(Value::as_str);
    let (class, prediction) = (field("_class_name"), field("prediction_type"));
    let mut text = format!("{source}: a model in {}\n", folder.layout());
    for part in &parts {
        let files: Vec<_> = part.files.iter().map(|(name, _)| name.as_str()).collect();
        let class = part.class.as_deref().unwrap_or("?");
        let (weights, bytes) = (&part.weights, megabytes(part.bytes()));
        line(
            &mut text,
            part.component.folder(),
            format!("{class}, {weights}, {bytes}: {}", files.join(", ")),
        );
    }
    let parameters: u64 = parts.iter().map(|part| part.weights.parameters).sum();
    let bytes: u64 = parts.iter().map(Part::bytes).sum();
    line(&mut text, "in all", format!("{parameters} parameters, {}", megabytes(bytes)));
    let named = scheduler.as_ref().map_or("none of tiny-sd's", |name| name.as_str());
    let shown = format!("{named} ({}), {}", class.unwrap_or("?"), prediction.unwrap_or("epsilon"));
    line(&mut text, "scheduler", shown);
    if !defaults.is_empty() {
        let flag = |(name, value): (&String, &Value)| format!("--{name} {}", typed(value));
        line(&mut text, "defaults", defaults.iter().map(flag).collect::<Vec<_>>().join(", "));
    }
    match &size {
        Ok(size) => line(&mut text, "image size", size),
        Err(error) => line(&mut text, "not covered", error),
    }
    line(&mut text, "weights hash", &weights_hash);
    line(&mut text, "config hash", &config_hash);
    let json = json!({
        "kind": "model",
        "source": source.to_string(),
        "folder": folder.path().map(|path| path.display().to_string()),
        "components": parts.iter().map(Part::json).collect::<Vec<_>>(),
        "parameters": parameters,
        "bytes": bytes,
        "scheduler": scheduler.ok(),
        "scheduler_class": class,
        "prediction_type": prediction,
        "defaults": defaults,
        "width": size.as_ref().ok().map(|size| size.width),
        "height": size.as_ref().ok().map(|size| size.height),
        "not_covered": size.as_ref().err().map(ToString::to_string),
        "weights_hash": weights_hash,
        "config_hash": config_hash,
    });
    Ok(Found { text, json })
}

/// A component of a model.
struct Part {
    component: Component,
    class: Option<String>,
    weights: Weights,
    /// Names and bytes.
    files: Vec<(String, u64)>,
}

impl Part {
    fn of(model: &Model, component: Component, variant: Option<&Variant>) -> Result<Self> {
        let config = model.config(component)?;
        let class = config.get("_class_name").or_else(|| config.get("architectures")?.get(0));
        let checkpoint = model.checkpoint(component, variant)?;
        let own_bytes = checkpoint.iter().map(|(_, tensor)| tensor.byte_len()).sum();
        let files = model.weight_files(component, variant)?.into_iter().map(|file| {
            // Of a file that holds more, what is the component's.
            (file.name, if file.is_shared { own_bytes } else { file.bytes })
        });
        Ok(Self {
            component,
            class: class.and_then(Value::as_str).map(str::to_owned),
            weights: Weights::of(&checkpoint),
            files: files.collect(),
        })
    }

    fn bytes(&self) -> u64 {
        self.files.iter().map(|(_, bytes)| bytes).sum()
    }

    fn json(&self) -> Value {
        let file = |(name, bytes): &(String, u64)| json!({"name": name, "bytes": bytes});
        let mut json = self.weights.json();
        let more = json!({
            "name": self.component.folder(),
            "class": self.class,
            "bytes": self.bytes(),
            "files": self.files.iter().map(file).collect::<Vec<_>>(),
        });
        merge(&mut json, more);
        json
    }
}

/// The tensors of a component or a file, counted.
struct Weights {
    tensors: usize,
    parameters: u64,
    /// Elements by their type.
    dtypes: BTreeMap<&'static str, u64>,
}

impl Weights {
    fn of(checkpoint: &Checkpoint) -> Self {
        let mut dtypes = BTreeMap::<_, u64>::new();
        for (_, tensor) in checkpoint.iter() {
            let elements = dtypes.entry(tensor.dtype().as_str()).or_default();
            *elements = elements.saturating_add(tensor.layout().shape().elem_count() as u64);
        }
        let parameters = dtypes.values().fold(0, |sum: u64, count| sum.saturating_add(*count));
        Self { tensors: checkpoint.len(), parameters, dtypes }
    }

    fn json(&self) -> Value {
        let Self { tensors, parameters, dtypes } = self;
        json!({"tensors": tensors, "parameters": parameters, "dtypes": dtypes})
    }
}

/// `123 parameters in f16, 4 tensors`
impl std::fmt::Display for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dtypes: Vec<_> = self.dtypes.keys().copied().collect();
        let Self { parameters, tensors, .. } = self;
        write!(f, "{parameters} parameters in {}, {tensors} tensors", dtypes.join(" and "))
    }
}

pub(super) fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

fn merge(json: &mut Value, more: Value) {
    if let (Some(fields), Value::Object(more)) = (json.as_object_mut(), more) {
        fields.extend(more);
    }
}

#[cfg(test)]
mod tests;
