//! What the user asked for, checked: everything that can be known to be wrong without loading a
//! model is wrong here. Separate from running it, and free of effects: what a command line means
//! beside its own text comes in through [`Surroundings`].

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{CommandFactory, FromArgMatches};

use super::additions;
use super::alternatives::Wildcards;
use super::args::{Args, ModelArgs, PictureArgs, RunArgs};
use super::batch::{self, BatchJob};
use super::command::{self, Word, usage};
use super::compare::{self, CompareJob};
use super::completions;
use super::config::{self, Scope};
use super::device::DevicePlan;
use super::devices::{self, DevicesJob};
use super::explain::{self, ExplainJob};
use super::from;
use super::graphics::PreviewPlace;
use super::grid::{self, GridJob};
use super::info::{self, InfoJob};
use super::inputs::{ImageRequest, Inputs};
use super::model::{HubName, ModelSource};
use super::models::{self, ModelsJob};
use super::output::OutputPlan;
use super::prompt::{check, given_prompt, prompt_of_stdin};
use super::schedulers::{self, SchedulersJob};
use super::surroundings::Surroundings;
use super::texts::{self, Alternatives};
use super::values::{
    BatchSize, ClipSkip, Count, DtypeChoice, GuidanceScale, SizeRequest, Steps, Verbosity,
};
use super::verify::{self, VerifyJob};
use super::worker::{self, WorkerJob};
use crate::backend::cpu;
use crate::error::{Error, Result};
use crate::pipeline::{Additions, PromptSyntax};
use crate::schedule::SchedulerChoice;

/// Pictures to make, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// What the pictures show.
    pub prompt: String,
    /// What they should not show; empty for nothing.
    pub negative_prompt: String,
    /// What of both each seed chooses; none where there is nothing to choose.
    pub alternatives: Alternatives,
    /// How both are read.
    pub prompt_syntax: PromptSyntax,
    /// Layers of the text encoder that are left out.
    pub clip_skip: ClipSkip,
    /// The model.
    pub model: ModelSource,
    /// What a model in one file does not say, in a folder.
    pub configs: Option<PathBuf>,
    /// The VAE, if not the model's own.
    pub vae: Option<ModelSource>,
    /// Branch, tag or commit, only with a repository; `None` is `main`.
    pub revision: Option<HubName>,
    /// The weights to prefer, such as `fp16`.
    pub variant: Option<HubName>,
    /// Embeddings and LoRAs.
    pub additions: Additions,
    /// `--offline`; the environment may say so too.
    pub offline: bool,
    /// The first picture's seed; the others follow without overflow.
    pub seed: u64,
    /// Denoising steps.
    pub steps: Steps,
    /// The weight of classifier-free guidance.
    pub guidance_scale: GuidanceScale,
    /// Height and width as far as the user chose them.
    pub size: SizeRequest,
    /// A picture to begin with.
    pub image: Option<ImageRequest>,
    /// The scheduler, if not the model's own.
    pub scheduler: Option<SchedulerChoice>,
    /// Number type of the computation.
    pub dtype: DtypeChoice,
    /// Where it is computed.
    pub device: DevicePlan,
    /// Whether latents are decoded in tiles.
    pub vae_tiling: bool,
    /// Threads of the CPU; `None` is one per physical core.
    pub threads: Option<u16>,
    /// Whether the CPU keeps weights small where speed would take more memory.
    pub low_memory: bool,
    /// Number of pictures.
    pub count: Count,
    /// How many of them go through the UNet together.
    pub batch_size: BatchSize,
    /// Where they go.
    pub output: OutputPlan,
    /// After every so many steps there is a preview, if at all.
    pub preview: Option<NonZeroUsize>,
    /// Where it is to be seen.
    pub preview_in: PreviewPlace,
    /// How much is said on the way.
    pub verbosity: Verbosity,
    /// Whether the device says at the end what it did.
    pub stats: bool,
    /// What the user should know of what the flags came to mean.
    pub notes: Vec<String>,
    /// Whether events go to standard output.
    pub json: bool,
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Request {
    /// Make pictures.
    Paint(Box<Job>),
    /// Make a sheet of pictures.
    Grid(Box<GridJob>),
    /// Find the first op that differs between two devices.
    Compare(Box<CompareJob>),
    /// Say what a picture would be made of.
    Explain(Box<ExplainJob>),
    /// Say what a picture or a model is.
    Tell(Box<InfoJob>),
    /// List, download or remove models.
    Models(Box<ModelsJob>),
    /// List the devices of this machine.
    Devices(DevicesJob),
    /// List the schedulers.
    Schedulers(SchedulersJob),
    /// Make a picture again and compare.
    Verify(Box<VerifyJob>),
    /// Make the pictures of a file of jobs.
    Batch(Box<BatchJob>),
    /// Run a worker.
    Work(Box<WorkerJob>),
    /// Print a text that is ready.
    Print(String),
    /// Help or the version, ready to be printed.
    Show(clap::Error),
}

/// Parses a command line, the program's name included.
///
/// # Errors
/// One line that names what is wrong: a usage error, or standard input that cannot be read.
pub fn parse(
    command_line: impl IntoIterator<Item = OsString>,
    surroundings: &mut dyn Surroundings,
) -> Result<Request> {
    let command_line: Vec<OsString> = command_line.into_iter().collect();
    let flags = command_line.iter().skip(2).cloned();
    match command_line.get(1).and_then(|word| word.to_str()) {
        Some("worker") => return worker::parse(flags),
        Some("compare") => return compare::parse(flags, surroundings),
        Some("batch") => return batch::parse(flags, surroundings),
        Some("explain") => return explain::parse(flags, surroundings),
        Some("info") => return info::parse(flags, surroundings),
        Some("models") => return models::parse(flags, surroundings),
        Some("devices") => return devices::parse(flags),
        Some("schedulers") => return schedulers::parse(flags),
        Some("verify") => return verify::parse(flags, surroundings),
        Some("completions") => return completions::parse_completions(flags),
        Some("config") => return config::parse(flags, surroundings),
        Some("man") => return completions::parse_man(flags),
        // Alone it needs nothing that may be broken, such as a file of defaults.
        Some("help") if command_line.len() == 2 => {
            return parse(["tiny-sd", "--help"].map(OsString::from), surroundings);
        }
        Some(_) | None => {}
    }
    let command_line = command_line.into_iter();
    let matches = config::matches(&Args::command(), command_line, Scope::Shown, surroundings)?;
    let args = matches.and_then(|matches| Ok((Args::from_arg_matches(&matches)?, matches)));
    let (mut args, matches) = match args {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => return Ok(Request::Show(error)),
        Err(error) => return Err(usage(&error)),
    };
    if let (None, [], [word]) = (&args.picture.prompt, &*args.after_dashes, &*args.words)
        && command::classify(word)? == Word::Help
    {
        return parse(["tiny-sd", "--help"].map(OsString::from), surroundings);
    }
    let notes = from::fill_in(&mut args, &matches, surroundings)?;
    if !args.grid.is_empty() {
        return grid::request(args, &notes, surroundings);
    }
    Ok(Request::Paint(Box::new(Job { notes, ..job(args, surroundings)? })))
}

/// What the flags of a picture mean.
///
/// # Errors
/// As [`parse`].
pub(super) fn job(mut args: Args, surroundings: &mut dyn Surroundings) -> Result<Job> {
    let prompt = given_prompt(&mut args)?;
    let Args { picture, model, run, .. } = args;
    let device = match &*model.device {
        [device] => device.clone(),
        several => {
            return Err(Error::usage(format!(
                "--device is given {} times; several devices are for tiny-sd batch",
                several.len()
            )));
        }
    };
    let output = OutputPlan::new(picture.output.as_deref(), picture.count, surroundings)?;
    texts::check_folder(picture.wildcards.as_deref(), surroundings)?;
    let variable = |name: &str| surroundings.variable(name);
    // Programs are told of files, and on a quiet terminal nothing is drawn.
    let may_draw = surroundings.stderr_is_terminal() && !run.json && !run.quiet;
    let preview_in = args.preview_in.decided(may_draw, &variable);
    if run.quiet && preview_in.graphics().is_some() {
        return Err(Error::usage("--preview-in draws, and --quiet keeps standard error empty"));
    }
    if let (Some(_), OutputPlan::Stdout, None) = (run.preview, &output, preview_in.graphics()) {
        return Err(Error::usage("--preview writes files beside the picture: give --output FILE"));
    }
    if run.json && output == OutputPlan::Stdout {
        return Err(Error::usage(
            "--json prints events on standard output, where --output - puts the picture",
        ));
    }
    let seed = picture.seed.unwrap_or_else(|| surroundings.random_seed());
    let image = Inputs::new(surroundings).request(&picture)?;
    let choice = Choice { seed, output, device, image };
    let (folder, chosen) = (picture.wildcards.clone(), picture.chosen);
    let mut job = Job { preview_in, ..Job::new(picture, &model, &run, choice)? };
    // Last, so that nothing is waited for before an error that was there all along.
    job.prompt = match prompt {
        Some(prompt) => prompt,
        None => prompt_of_stdin(surroundings)?,
    };
    check("the prompt", &job.prompt, job.prompt_syntax)?;
    job.read_alternatives(folder.as_deref(), chosen, &mut Wildcards::new(surroundings))?;
    Ok(job)
}

/// What a job's flags leave open.
pub(super) struct Choice {
    /// The first picture's seed.
    pub seed: u64,
    /// Where the pictures go.
    pub output: OutputPlan,
    /// Where they are computed.
    pub device: DevicePlan,
    /// What they begin with, other than noise.
    pub image: Option<ImageRequest>,
}

impl Job {
    /// How this machine's processor is used.
    pub(super) fn cpu(&self) -> cpu::Settings {
        let threads = self.threads.map_or(0, usize::from);
        cpu::Settings { threads, low_memory: self.low_memory }
    }

    /// A job of flags; a prompt that is not among them is empty.
    ///
    /// # Errors
    /// If the flags do not go together.
    pub(super) fn new(
        picture: PictureArgs,
        model: &ModelArgs,
        run: &RunArgs,
        Choice { seed, output, device, image }: Choice,
    ) -> Result<Self> {
        let prompt = picture.prompt.unwrap_or_default();
        check("the prompt", &prompt, picture.prompt_syntax)?;
        check("the negative prompt", &picture.negative_prompt, picture.prompt_syntax)?;
        let configs = model.configs.as_deref();
        model.model.check(model.revision.as_ref(), model.variant.as_ref(), configs)?;
        let count = picture.count.get();
        if seed.checked_add(count.saturating_sub(1) as u64).is_none() {
            return Err(Error::usage(format!(
                "--seed {seed} and --count {count} go beyond the last seed, {}",
                u64::MAX
            )));
        }
        Ok(Self {
            prompt,
            negative_prompt: picture.negative_prompt,
            alternatives: Alternatives::default(),
            prompt_syntax: picture.prompt_syntax,
            clip_skip: picture.clip_skip,
            model: model.model.clone(),
            configs: model.configs.clone(),
            vae: model.vae.clone(),
            revision: model.revision.clone(),
            variant: model.variant.clone(),
            additions: additions::of_flags(model)?,
            offline: model.offline,
            seed,
            steps: picture.steps,
            guidance_scale: picture.guidance_scale,
            size: SizeRequest { height: picture.height, width: picture.width },
            image,
            scheduler: picture.scheduler,
            dtype: model.dtype,
            device,
            vae_tiling: model.vae_tiling,
            threads: model.threads,
            low_memory: model.low_memory,
            count: picture.count,
            batch_size: run.batch_size,
            output,
            preview: run.preview,
            preview_in: PreviewPlace::File,
            verbosity: run.verbosity(),
            stats: run.stats,
            notes: Vec::new(),
            json: run.json,
        })
    }
}

#[cfg(test)]
pub(super) mod tests;
