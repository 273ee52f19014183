//! `tiny-sd batch`: a picture for every line of a file of jobs, on one device or several, and only
//! those that are not there yet. Separate from the single command because its product are the
//! results on standard output, and because it keeps books.

mod args;
mod jobs;
mod lines;
mod manifest;
mod report;
mod runner;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;

use args::Format;
pub(super) use args::command;
pub use jobs::Task;
use jobs::{Defaults, tasks};
use manifest::Manifest;
use report::Report;
use runner::{Queue, Runner, Work};

use super::additions::AdditionRecords;
use super::books;
use super::command::usage;
use super::device::DevicePlan;
use super::display::Display;
use super::events::{Event, Stream, Teller, Told};
use super::files;
use super::identity::{Identity, Pending};
use super::inputs::Inputs;
use super::interrupt;
use super::job::{Job, Request};
use super::painter::{self, Wanted};
use super::settings::{Provenance, Settings};
use super::surroundings::Surroundings;
use super::values::{DtypeChoice, Verbosity};
use crate::backend::cpu;
use crate::error::{Error, Result};
use crate::image::ImageSize;
use crate::pipeline::{self, Outline};
use crate::progress::Progress;
use crate::schedule::{SchedulerChoice, SchedulerConfig};

/// Largest file of jobs, in bytes.
const MAX_JOBS_BYTES: usize = 256 << 20;
/// Exit code where some pictures could not be made.
const SOME_FAILED: u8 = 5;
/// Exit code where no picture could be made.
const ALL_FAILED: u8 = 6;

/// Pictures to make, and where.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchJob {
    /// The folder that they go to.
    pub folder: PathBuf,
    /// The pictures, at least one, in the order of their jobs.
    pub tasks: Vec<Task>,
    /// The devices that share them, at least one.
    pub devices: Vec<DevicePlan>,
    /// Whether the first failure is the last.
    pub fail_fast: bool,
    /// How much is said on the way.
    pub verbosity: Verbosity,
    /// Whether all events go to standard output, or only results.
    pub json: bool,
}

/// Parses what follows `tiny-sd batch`, and the jobs.
///
/// # Errors
/// One line that names what is wrong, and in the jobs the line and the field.
pub(super) fn parse(
    words: impl Iterator<Item = OsString>,
    surroundings: &mut dyn Surroundings,
) -> Result<Request> {
    let args = match args::parse(words, surroundings)? {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => return Ok(Request::Show(error)),
        Err(error) => return Err(usage(&error)),
    };
    let Some(device) = args.model.device.first() else {
        return Err(Error::usage("--device: a batch needs one"));
    };
    let (name, bytes) = read(&args.jobs, surroundings)?;
    let format = match (args.format, args.jobs.extension().and_then(|suffix| suffix.to_str())) {
        (Format::Auto, Some("jsonl" | "ndjson" | "json")) => Format::Jsonl,
        (Format::Auto, Some("txt")) => Format::Text,
        (format, _) => format,
    };
    let inputs = &Inputs::new(surroundings);
    let (picture, model, run) = (&args.picture, &args.model, &args.run);
    let defaults = Defaults { picture, model, run, device, inputs, surroundings };
    let tasks = lines::read(&bytes, format)
        .and_then(|lines| tasks(&lines, &defaults))
        .map_err(|error| error.context(&name))?;
    if tasks.is_empty() {
        return Err(Error::usage(format!("{name}: there is no job in it")));
    }
    Ok(Request::Batch(Box::new(BatchJob {
        folder: args.out_dir,
        tasks,
        devices: args.model.device,
        fail_fast: args.fail_fast,
        verbosity: args.run.verbosity(),
        json: args.run.json,
    })))
}

/// The name of the jobs, for people, and their bytes.
fn read(path: &Path, surroundings: &mut dyn Surroundings) -> Result<(String, Vec<u8>)> {
    let is_stdin = path == Path::new("-");
    if is_stdin && surroundings.stdin_is_terminal() {
        return Err(Error::usage("JOBS is -, but standard input is a terminal"));
    }
    let (name, bytes) = match is_stdin {
        true => ("standard input".to_owned(), surroundings.read_stdin(MAX_JOBS_BYTES)),
        false => (path.display().to_string(), surroundings.read_file(path, MAX_JOBS_BYTES)),
    };
    let bytes = bytes.map_err(|error| Error::usage(format!("{name}: {error}")))?;
    if bytes.len() > MAX_JOBS_BYTES {
        return Err(Error::usage(format!("{name} is longer than {MAX_JOBS_BYTES} bytes")));
    }
    Ok((name, bytes))
}

/// Makes the pictures that are not there yet; the exit code says whether all are there then.
///
/// # Errors
/// If the batch cannot go on: the folder is in use or cannot be written, the model cannot be
/// loaded, no device can be used, or the user interrupts. Finished pictures stay.
pub fn batch(batch: &BatchJob) -> Result<ExitCode> {
    cpu::check_kernel_path()?;
    interrupt::install(batch.verbosity == Verbosity::Quiet)?;
    let told = if batch.json { Told::Everything } else { Told::Results };
    let stream = Stream::stdout(told);
    let outcome = run(batch, &stream);
    if let Err(error) = &outcome {
        stream.tell_error(None, error);
    }
    outcome
}

fn run(batch: &BatchJob, stream: &Stream) -> Result<ExitCode> {
    let devices = devices(&batch.devices)?;
    let names: Vec<String> = devices.iter().map(ToString::to_string).collect();
    let display = Display::new(batch.verbosity);
    let manifest = Manifest::open(&batch.folder)?;
    if manifest.unread > 0 {
        let (lines, file) = (manifest.unread, batch.folder.join(manifest::FILE_NAME));
        display.line(format!(
            "warning: {lines} lines of {} cannot be read, and count as not there",
            file.display()
        ));
    }
    remove_leftovers(batch);
    let Some(first) = batch.tasks.first() else { return Ok(ExitCode::SUCCESS) };
    let device = names.first().map_or("", String::as_str);
    let teller = Teller { stream, device, pictures: &[], progress: &display };
    // First: they are here, and the model may have to be downloaded.
    let additions = AdditionRecords::of(&first.job.additions)?;
    let (model, variant) = painter::model(&Wanted::of(&first.job), &teller)?;
    let outline = Outline::of(&model)?;
    let job = common(&batch.tasks, &first.job, outline.scheduler)?;
    let inpaints = pipeline::inpaints(&model)?;
    for Task { job, line, .. } in &batch.tasks {
        painter::check_mode(inpaints, job)
            .map_err(|error| error.context(format!("line {line}")))?;
    }
    let identity = Identity::of(&model, variant.as_ref(), job.image.is_some())?;
    let schedulers = SchedulerConfig::parse(&model.scheduler_config()?)?;
    let known = Known::new(&job, &outline, schedulers, &identity, &additions);
    let mut report = Report::new(batch, &display, stream, outline.size);
    let mut waiting = Vec::new();
    for task in &batch.tasks {
        display.check()?;
        let key = known.key(task);
        match manifest.is_done(&task.output, &key) {
            true => report.skip(task, &key),
            false => waiting.push(Work::new(task, key)),
        }
    }
    let (pictures, skipped) = (batch.tasks.len(), report.skipped());
    stream.tell(&Event::Batch { pictures, skipped, devices: &names });
    report.tell_skipped();
    let open = |device: &DevicePlan, progress: &dyn Progress| {
        let identify = || Ok((Pending::known(identity.clone()), additions.clone()));
        painter::open_on(&job, &model, variant.as_ref(), device, &identify, progress)
    };
    let runner = Runner {
        batch,
        open: &open,
        report: &report,
        manifest: Mutex::new(manifest),
        queue: Queue::new(waiting),
    };
    runner.run(&devices)?;
    books::peak_memory().into_iter().filter(|_| job.stats).for_each(|line| display.line(line));
    let code = match report.end() {
        (_, 0) => 0,
        (0, _) => ALL_FAILED,
        _ => SOME_FAILED,
    };
    stream.check()?;
    Ok(ExitCode::from(code))
}

/// What the jobs have in common, which decides how the model is loaded, whose own scheduler is
/// `own` if that is one of ours.
///
/// # Errors
/// If a job needs the model's own scheduler, and that is not covered.
fn common(tasks: &[Task], job: &Job, own: Option<SchedulerChoice>) -> Result<Job> {
    let without = tasks.iter().find(|task| own.is_none() && task.job.scheduler.is_none());
    if let Some(Task { line, .. }) = without {
        return Err(Error::model(format!(
            "line {line}: the model's own scheduler is not covered; give --scheduler"
        )));
    }
    let scheduler = own.or(job.scheduler);
    // What a device prefers would make pictures depend on who made them.
    let dtype = match job.dtype {
        DtypeChoice::Auto => DtypeChoice::F32,
        chosen @ (DtypeChoice::F32 | DtypeChoice::F16 | DtypeChoice::Bf16) => chosen,
    };
    // The encoder is loaded if any job needs it.
    let image = tasks.iter().find_map(|task| task.job.image.clone());
    Ok(Job { dtype, scheduler, image, ..job.clone() })
}

/// The devices, resolved, each once: a second session of one would only wait for the first.
fn devices(plans: &[DevicePlan]) -> Result<Vec<DevicePlan>> {
    let mut devices: Vec<DevicePlan> = Vec::new();
    for plan in plans {
        let plan = plan.resolve()?;
        if devices.contains(&plan) {
            return Err(Error::usage(format!("--device {plan} is given twice")));
        }
        devices.push(plan);
    }
    Ok(devices)
}

/// Temporary files of a batch that was killed in this folder.
fn remove_leftovers(batch: &BatchJob) {
    let paths = batch.tasks.iter().map(|task| batch.folder.join(&task.output));
    let folders = paths.filter_map(|path| path.parent().map(Path::to_owned));
    let folders: BTreeSet<PathBuf> = folders.chain([batch.folder.clone()]).collect();
    folders.iter().for_each(|folder| files::remove_leftovers(folder));
}

/// What is known of every picture of a batch before a device is open.
struct Known {
    /// The size that the model was trained for.
    size: ImageSize,
    /// The scheduler of jobs that name none.
    own: Option<SchedulerChoice>,
    /// What the names of others come to.
    schedulers: SchedulerConfig,
    provenance: Provenance,
}

impl Known {
    fn new(
        job: &Job,
        outline: &Outline,
        schedulers: SchedulerConfig,
        identity: &Identity,
        additions: &AdditionRecords,
    ) -> Self {
        let Identity { weights_hash, encoder_hash, vae_hash, config_hash } = identity.clone();
        let provenance = Provenance {
            dtype: job.dtype.as_str().into(),
            weights_hash,
            encoder_hash,
            vae_hash,
            config_hash,
            additions: additions.clone(),
            // No part of the hash.
            device: String::new(),
            kernel_path: None,
        };
        Self { size: outline.size, own: outline.scheduler, schedulers, provenance }
    }

    /// The hash of all that determines a picture.
    fn key(&self, Task { job, seed, .. }: &Task) -> String {
        let named = job.scheduler.map(|named| self.schedulers.in_force(named));
        // One of the two is there, or the batch would not run.
        let scheduler = named.or(self.own).map(|used| used.to_string()).unwrap_or_default();
        let size = job.picture_size(self.size);
        Settings::new(job, *seed, size, scheduler, self.provenance.clone()).key()
    }
}
