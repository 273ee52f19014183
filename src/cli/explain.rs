//! `tiny-sd explain`: what the single command would do with the same flags, without doing it.
//! Separate because its product is text on standard output, and no weight is read for it.

mod files;
mod prompts;
mod steps;
mod work;

use std::ffi::OsString;

use clap::{CommandFactory, FromArgMatches};
use serde_json::{Map, Value, json};

use super::args::Args;
use super::command::usage;
use super::config::{self, Scope};
use super::display::Display;
use super::from;
use super::info::line;
use super::inputs::ImageRequest;
use super::interrupt;
use super::job::{self, Job, Request};
use super::model::ModelSource;
use super::painter::{self, Wanted};
use super::surroundings::Surroundings;
use super::values::{DtypeChoice, Verbosity};
use crate::error::{Error, Kind, Result};
use crate::image::ImageSize;
use crate::pipeline;
use crate::progress::{Event, Progress};
use crate::weights::{Checkpoint, Component, Model, Variant};

const ABOUT: &str = "Says what a command would do, without doing it.";

const AFTER_HELP: &str = "\
It takes the flags of tiny-sd, and says the tokens of the prompts with their weights and chunks, and
what is cut off; the scheduler's timesteps; the files that are chosen, and why; memory and work. No
weights are read and nothing is downloaded: of a model that is not here it says so, and what it can
say without.

Sigmas are the levels of noise, as a part of the picture's, before each evaluation and at the end;
null where a scheduler has none.

Examples:
  tiny-sd explain \"a fox\"
  tiny-sd explain \"a (red:1.3) fox\" --prompt-syntax a1111 -n blurry
  tiny-sd explain \"a fox\" -i sketch.jpg --strength 0.5 --scheduler euler
  tiny-sd explain \"a cat\" --from fox.png
  tiny-sd explain \"a fox\" --json | jq .timesteps

Exit codes:
  0    it is said
  1    a file that cannot be read
  2    a wrong command line, or what it names for --image or --mask is no picture
  3    a model or its files";

/// What is to be explained.
#[derive(Debug, Clone, PartialEq)]
pub struct ExplainJob {
    job: Job,
    /// Whether its seed is the user's.
    has_seed: bool,
    is_json: bool,
}

/// Parses what follows `tiny-sd explain`.
///
/// # Errors
/// One line that names what is wrong.
pub(super) fn parse(
    flags: impl Iterator<Item = OsString>,
    surroundings: &mut dyn Surroundings,
) -> Result<Request> {
    let words = std::iter::once("tiny-sd explain".into()).chain(flags);
    let args = config::matches(&command(), words, Scope::Shown, surroundings)?
        .and_then(|matches| Ok((Args::from_arg_matches(&matches)?, matches)));
    let (mut args, matches) = match args {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => return Ok(Request::Show(error)),
        Err(error) => return Err(usage(&error)),
    };
    if !args.grid.is_empty() {
        return Err(Error::usage("--grid: explain is about one picture, not about a sheet"));
    }
    let is_json = std::mem::take(&mut args.run.json);
    let notes = from::fill_in(&mut args, &matches, surroundings)?;
    let has_seed = args.picture.seed.is_some();
    let job = Job { notes, ..job::job(args, surroundings)? };
    Ok(Request::Explain(Box::new(ExplainJob { job, has_seed, is_json })))
}

/// The flags as clap sees them.
pub(super) fn command() -> clap::Command {
    Args::command()
        .name("tiny-sd explain")
        .about(ABOUT)
        .override_usage("tiny-sd explain [OPTIONS] PROMPT")
        .after_help("tiny-sd explain --help says more.")
        .after_long_help(AFTER_HELP)
        .mut_arg("grid", |flag| flag.hide(true))
        .mut_arg("json", |flag| flag.help("One line of JSON instead of text").long_help(None))
}

/// Says it on standard output.
///
/// # Errors
/// If what the command would read before the weights cannot be read, or does not go together.
pub fn explain(explain: &ExplainJob) -> Result<()> {
    let ExplainJob { job, has_seed, is_json } = explain;
    interrupt::install(true)?;
    let display = Display::new(job.verbosity.min(Verbosity::Normal));
    job.notes.iter().for_each(|note| display.report(Event::Warning(note)));
    let mut said = Said::default();
    let found = find(job, &display)?;
    drop(display);
    said.model(job, &found);
    let here = found.as_ref().ok();
    if let Some(here) = here {
        painter::check_mode(pipeline::inpaints(&here.model)?, job)?;
    }
    let context = prompts::say(job, here, &mut said)?;
    said.seed(job.seed, *has_seed);
    let evaluations = steps::say(job, here, &mut said)?;
    said.size(job, here)?;
    let checkpoints = here.map(Here::checkpoints).transpose()?;
    if let (Some(here), Some(weights), Some(evaluations)) = (here, &checkpoints, evaluations) {
        let size = job.picture_size(pipeline::default_size(&here.model)?);
        work::say(job, weights, size, context, evaluations, &mut said);
    }
    files::say(job, here.zip(checkpoints.as_ref()), &mut said)?;
    said.device(job)?;
    match is_json {
        true => super::print(&format!("{}\n", Value::Object(said.json))),
        false => super::print(&said.text),
    }
}

/// A model on this machine's disk.
struct Here {
    model: Model,
    variant: Option<Variant>,
}

impl Here {
    /// The weights of all components, in their order: the headers are read.
    fn checkpoints(&self) -> Result<[Checkpoint; 3]> {
        let [text, unet, vae] =
            Component::ALL.map(|component| self.model.checkpoint(component, self.variant.as_ref()));
        Ok([text?, unet?, vae?])
    }
}

/// The job's model, or why it is not here.
fn find(job: &Job, progress: &dyn Progress) -> Result<std::result::Result<Here, String>> {
    let wanted = Wanted { offline: true, ..Wanted::of(job) };
    let is_of_hub = |source: &ModelSource| matches!(source, ModelSource::Hub(_));
    let may_come = is_of_hub(&job.model) || job.vae.as_ref().is_some_and(is_of_hub);
    match painter::model(&wanted, progress) {
        Ok((model, variant)) => Ok(Ok(Here { model, variant })),
        Err(error) if may_come && error.kind() == Kind::Model => Ok(Err(error.to_string())),
        Err(error) => Err(error),
    }
}

/// What is said, in both forms.
#[derive(Default)]
struct Said {
    text: String,
    json: Map<String, Value>,
}

impl Said {
    fn line(&mut self, name: &str, value: impl std::fmt::Display) {
        line(&mut self.text, name, value);
    }

    fn field(&mut self, name: &str, value: impl Into<Value>) {
        self.json.insert(name.into(), value.into());
    }

    fn model(&mut self, job: &Job, found: &std::result::Result<Here, String>) {
        let (path, missing) = match found {
            Ok(Here { model, .. }) => {
                let path = model.path().map(|path| path.display().to_string());
                let of = match (&job.model, &path) {
                    (ModelSource::Hub(_), Some(path)) => format!(", in the hub's cache: {path}"),
                    (ModelSource::Hub(_), None)
                    | (ModelSource::Folder(_) | ModelSource::File(_) | ModelSource::BuiltIn, _) => {
                        String::new()
                    }
                };
                self.line("model", format!("{}, {}{of}", job.model, model.layout()));
                (path, None)
            }
            Err(missing) => {
                self.line("model", &job.model);
                self.line("not here", format!("{missing} (nothing was downloaded)"));
                (None, Some(missing.clone()))
            }
        };
        let source = job.model.to_string();
        self.field("model", json!({"source": source, "path": path, "missing": missing}));
    }

    fn seed(&mut self, seed: u64, is_given: bool) {
        let whose = if is_given { "" } else { ", by chance: another time another" };
        self.line("seed", format!("{seed}{whose}"));
        self.field("seed", seed);
        self.field("seed_is_given", is_given);
    }

    fn size(&mut self, job: &Job, here: Option<&Here>) -> Result<()> {
        let default = here.map(|here| pipeline::default_size(&here.model)).transpose()?;
        let of_image = job.image.as_ref().map(ImageRequest::size);
        let none = ImageSize { height: 0, width: 0 };
        let size = job.picture_size(default.unwrap_or(none));
        let is_chosen = job.size.height.is_some() && job.size.width.is_some();
        let whose = match (is_chosen, of_image, default) {
            (true, _, _) => "as it is asked for",
            (false, Some(_), _) => "the image's, where none is asked for",
            (false, None, Some(_)) => "the model's own, where none is asked for",
            (false, None, None) => {
                self.line("size", "the model's own");
                self.field("size", Value::Null);
                return Ok(());
            }
        };
        self.line("size", format!("{size}, {whose}"));
        self.field("size", json!({"width": size.width, "height": size.height, "why": whose}));
        Ok(())
    }

    fn device(&mut self, job: &Job) -> Result<()> {
        let (asked, resolved) = (job.device.to_string(), job.device.resolve()?.to_string());
        let shown = match asked == resolved {
            true => asked.clone(),
            false => format!("{resolved}, which is {asked} here"),
        };
        self.line("device", shown);
        self.field("device", json!({"asked": asked, "resolved": resolved}));
        let auto = job.dtype == DtypeChoice::Auto;
        let dtype = files::dtype(job).as_str();
        self.line("dtype", format!("{dtype}{}", if auto { ", which is auto here" } else { "" }));
        self.field("dtype", json!({"asked": job.dtype.as_str(), "resolved": dtype}));
        Ok(())
    }
}
