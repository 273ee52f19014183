//! `tiny-sd compare`: one picture on two devices at once, op by op, up to the first op whose
//! results differ. Separate from painting because its product is what was found, on standard
//! output, and no picture.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};

use clap::{CommandFactory, FromArgMatches, Parser};

use super::args::Args;
use super::books;
use super::command::usage;
use super::config::{self, Scope};
use super::device::DevicePlan;
use super::display::Display;
use super::from;
use super::interrupt;
use super::job::{self, Job, Request};
use super::paint::picture_request;
use super::painter::{self, Wanted};
use super::places::{OnBackend, Place, Places};
use super::surroundings::Surroundings;
use super::values::Verbosity;
use crate::backend::twin::{DIFFERS, Divergence, Findings, Mismatch};
use crate::backend::{Backend, Device, cpu, twin};
use crate::error::{Error, Result};
use crate::pipeline::{LoadOptions, Pipeline, Placement};
use crate::progress::{Event, Progress};
use crate::weights::{Model, Variant};

/// The flags of a picture, and the other device.
#[derive(Debug, Parser)]
struct CompareArgs {
    #[command(flatten)]
    single: Args,

    /// The device that --device is compared with: whatever --device takes
    #[arg(long, value_name = "DEVICE")]
    against: DevicePlan,
}

const ABOUT: &str = "Makes a picture on two devices at once, op by op, and names the first op \
                     whose results differ.";

const AFTER_HELP: &str = "\
Every op, upload of a weight and draw of noise runs on both devices, and both results are read and
compared as they lie in memory. Differences that rounding explains are allowed: of the largest
magnitude in a result 256 units in the last place in f32, 4 in f16 and bf16. Then --against goes
on with the result of --device, so that each op is judged alone. What was found goes to standard
output; there is no picture.

Examples:
  tiny-sd compare \"a fox\" --device cpu --against mock
  tiny-sd compare \"a fox\" --steps 2 -W 64 -H 64 -s 7 --device cpu --against @url.txt

Exit codes:
  0    no op differs
  1    an op differs, and standard output names it; or anything that is not below
  2    a wrong command line, or what it names for --image or --mask is no picture
  3    a model or its weights
  4    a remote device or the way to it
  130  interrupted";

/// What is compared.
#[derive(Debug, Clone, PartialEq)]
pub struct CompareJob {
    /// The picture, and the device that sets the example.
    pub job: Job,
    /// The other device.
    pub against: DevicePlan,
}

/// Its flags.
pub(super) fn command() -> clap::Command {
    CompareArgs::command()
        .name("tiny-sd compare")
        .about(ABOUT)
        .override_usage("tiny-sd compare [OPTIONS] --against <DEVICE> PROMPT")
        .after_help("tiny-sd compare --help says more.")
        .after_long_help(AFTER_HELP)
        .mut_arg("output", |flag| flag.hide(true))
        .mut_arg("count", |flag| flag.hide(true))
        .mut_arg("grid", |flag| flag.hide(true))
        .mut_arg("preview", |flag| flag.hide(true))
        .mut_arg("preview_in", |flag| flag.hide(true))
        .mut_arg("json", |flag| flag.hide(true))
}

/// Parses what follows `tiny-sd compare`.
///
/// # Errors
/// One line that names what is wrong.
pub(super) fn parse(
    flags: impl Iterator<Item = OsString>,
    surroundings: &mut dyn Surroundings,
) -> Result<Request> {
    let words = std::iter::once("tiny-sd compare".into()).chain(flags);
    let args = config::matches(&command(), words, Scope::Shown, surroundings)?
        .and_then(|matches| Ok((CompareArgs::from_arg_matches(&matches)?, matches)));
    let (CompareArgs { mut single, against }, matches) = match args {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => return Ok(Request::Show(error)),
        Err(error) => return Err(usage(&error)),
    };
    if single.run.preview.is_some() {
        return Err(Error::usage("--preview: compare writes no picture, but what it found"));
    }
    if !single.grid.is_empty() {
        return Err(Error::usage("--grid: compare looks at one picture, not at a sheet"));
    }
    if single.run.json {
        return Err(Error::usage("--json: compare prints what it found, not events"));
    }
    if single.picture.output.is_some() {
        return Err(Error::usage("--output: compare writes no picture, but what it found"));
    }
    if single.picture.count.get() != 1 {
        return Err(Error::usage("--count: compare looks at one picture; its --seed says which"));
    }
    let notes = from::fill_in(&mut single, &matches, surroundings)?;
    let job = Job { notes, ..job::job(single, surroundings)? };
    Ok(Request::Compare(Box::new(CompareJob { job, against })))
}

/// Runs the picture on both devices and prints what was found; the exit code says it too.
///
/// # Errors
/// If the model cannot be loaded, a device fails, or the user interrupts.
pub fn compare(compare: &CompareJob) -> Result<ExitCode> {
    let CompareJob { job, against } = compare;
    cpu::check_kernel_path()?;
    interrupt::install(job.verbosity == Verbosity::Quiet)?;
    let display = Display::new(job.verbosity);
    job.notes.iter().for_each(|note| display.report(Event::Warning(note)));
    let (model, variant) = painter::model(&Wanted::of(job), &display)?;
    let devices = [whole("--device", &job.device)?, whole("--against", against)?];
    let first = Places::open(&devices[0], job.cpu(), false, &display)?;
    let second = Places::open(&devices[1], job.cpu(), first.hold_a_worker(), &display)?;
    let watch = Watch { display: &display, stage: Mutex::new(Stage::Loading) };
    let run = Run { job, devices: &devices, model, variant, watch };
    let ([a, _, _], [b, _, _]) = (first.stages.clone(), second.stages.clone());
    let outcome = a.on(WithFirst { second: b, run: &run })?;
    if job.stats {
        let lines = [first.statistics(), second.statistics()].concat();
        let lines = lines.into_iter().chain(books::peak_memory());
        lines.for_each(|line| display.line(line));
    }
    let (text, code) = match outcome {
        Outcome::Same(text) => (text, ExitCode::SUCCESS),
        Outcome::Differs(text) => (text, ExitCode::FAILURE),
    };
    drop(display);
    super::print(&text)?;
    Ok(code)
}

/// The one device of a plan, resolved.
///
/// # Errors
/// If its stages are on several, or the environment names no device.
fn whole(flag: &str, plan: &DevicePlan) -> Result<DevicePlan> {
    let plan = plan.resolve()?;
    let [text, unet, vae] = &plan.stages;
    if text != unet || unet != vae {
        return Err(Error::usage(format!("{flag} {plan}: compare takes one device on each side")));
    }
    Ok(plan)
}

/// The first device is to be found.
struct WithFirst<'a> {
    second: Place,
    run: &'a Run<'a>,
}

impl OnBackend for WithFirst<'_> {
    type Output = Result<Outcome>;

    fn run<A: Backend>(self, first: A::Device) -> Self::Output {
        self.second.on(WithSecond::<A> { first, run: self.run })
    }
}

/// The first device is found.
struct WithSecond<'a, A: Backend> {
    first: A::Device,
    run: &'a Run<'a>,
}

impl<A: Backend> OnBackend for WithSecond<'_, A> {
    type Output = Result<Outcome>;

    fn run<B: Backend>(self, second: B::Device) -> Self::Output {
        self.run.on_both::<A, B>(self.first, second)
    }
}

/// What is the same on every pair of devices.
struct Run<'a> {
    job: &'a Job,
    /// Resolved, each of one device.
    devices: &'a [DevicePlan; 2],
    model: Model,
    variant: Option<Variant>,
    watch: Watch<'a>,
}

/// What was found, ready to be printed.
enum Outcome {
    Same(String),
    Differs(String),
}

impl Run<'_> {
    fn on_both<A: Backend, B: Backend>(&self, a: A::Device, b: B::Device) -> Result<Outcome> {
        let device = twin::Device::<A, B>::new(a, b);
        let painted = self.paint(&device);
        let found = device.findings();
        match (painted, &found.divergence) {
            (Ok(()), None) => {
                Ok(Outcome::Same(format!("{}: no op differs\n{}\n", self.title(), counts(&found))))
            }
            (Err(error), None) => Err(error),
            (painted, Some(divergence)) => {
                // A difference is told, whatever became of the picture.
                let place = self.watch.place(painted.err().as_ref(), found.marks);
                Ok(Outcome::Differs(differs(&self.title(), &place, divergence, &found)))
            }
        }
    }

    fn title(&self) -> String {
        let ([a, b], seed) = (self.devices, self.job.seed);
        format!("{a} and {b}, seed {seed}")
    }

    fn paint<A: Backend, B: Backend>(&self, device: &twin::Device<A, B>) -> Result<()> {
        let (job, watch) = (self.job, &self.watch);
        let dtype = job.dtype.or(device.default_dtype());
        let options = LoadOptions {
            dtype,
            variant: self.variant.clone(),
            scheduler: job.scheduler,
            encodes: job.image.is_some(),
            additions: job.additions.clone(),
        };
        let devices = Placement::<twin::Storage<A, B>>::whole(device);
        let mut pipeline = Pipeline::load(&self.model, &options, devices, watch)?;
        pipeline.vae_tiling = job.vae_tiling;
        watch.display.begin(format!("seed {}", job.seed));
        *watch.stage() = Stage::Text;
        let size = job.picture_size(pipeline.default_size());
        let images = job.image.as_ref().map(|image| image.load(size)).transpose()?;
        let texts = job.texts(job.seed);
        let request = picture_request(job, &texts, job.seed, size, images.as_ref())?;
        pipeline.paint(&request, watch).map(drop)
    }
}

/// Shows the events of the run, and remembers where it is.
struct Watch<'a> {
    display: &'a Display,
    stage: Mutex<Stage>,
}

/// Where a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Weights go to the devices.
    Loading,
    /// The prompt is read.
    Text,
    /// A picture to begin with becomes latents.
    Encoding,
    /// The latents are denoised, in so many steps.
    Denoising { steps: usize },
    /// The latents become pixels.
    Decoding,
}

impl Watch<'_> {
    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the op was that ended the run, by `error` if it did, after so many marks: the pipeline
    /// sets one behind each step.
    fn place(&self, error: Option<&Error>, marks: u64) -> String {
        let stage = match *self.stage() {
            Stage::Loading => "loading".into(),
            Stage::Text => "the text encoder, or the UNet's keys and values of the text".into(),
            Stage::Denoising { steps } => {
                format!("step {} of {steps}, the UNet or the scheduler", marks.saturating_add(1))
            }
            Stage::Encoding => "the VAE's encoder, or the first sample".into(),
            Stage::Decoding => "the VAE's decoder".into(),
        };
        let text = error.map(Error::to_string).unwrap_or_default();
        match text.strip_suffix(DIFFERS).and_then(|before| before.strip_suffix(": ")) {
            Some(context) => format!("{stage}: {context}"),
            None => stage,
        }
    }
}

impl Progress for Watch<'_> {
    fn report(&self, event: Event<'_>) {
        match event {
            Event::Step { done: 0, total } => *self.stage() = Stage::Denoising { steps: total },
            Event::Encoding => *self.stage() = Stage::Encoding,
            Event::Decoding => *self.stage() = Stage::Decoding,
            Event::Downloading { .. }
            | Event::Queued { .. }
            | Event::Sending { .. }
            | Event::Loading { .. }
            | Event::Warning(_)
            | Event::Truncated { .. }
            | Event::Step { .. }
            | Event::Preview { .. }
            | Event::Done => {}
        }
        self.display.report(event);
    }

    fn check(&self) -> Result<()> {
        self.display.check()
    }
}

/// One op differs.
fn differs(title: &str, place: &str, divergence: &Divergence, found: &Findings) -> String {
    let Divergence { call, mismatch } = divergence;
    let mut text = format!("{title}: op {} differs: {call}\n", call.number);
    // Writing to a String cannot fail.
    let _ = writeln!(text, "  in         {place}");
    for (index, operand) in (1..).zip(&call.operands) {
        let _ = writeln!(text, "  operand {index}  {operand}");
    }
    let _ = match mismatch {
        Mismatch::Dtype { a, b } => {
            writeln!(text, "  result     {} and {}", a.as_str(), b.as_str())
        }
        Mismatch::Len { a, b } => writeln!(text, "  result     {a} and {b} elements"),
        Mismatch::Values(gap) => writeln!(text, "  result     {gap}"),
    };
    let _ = writeln!(text, "{}", counts(found));
    text
}

/// How much was compared, and how near the rest came.
fn counts(found: &Findings) -> String {
    let Findings { ops, compared, identical, closest, .. } = found;
    let opaque = ops.saturating_sub(*compared);
    let mut text = format!("{ops} ops: {compared} compared, {identical} equal bit for bit");
    if opaque > 0 {
        let _ = write!(text, "; {opaque} prepared weights, which only the ops that use them read");
    }
    if let Some((call, gap)) = closest {
        let _ = write!(text, "\nlargest that is allowed: op {}, {call}: {gap}", call.number);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::device::DeviceSpec;
    use crate::cli::job::tests::{Fake, job_of, parse_words};
    use crate::error::Kind;

    #[test]
    fn compare_takes_the_flags_of_a_picture_and_another_device() {
        let words = "compare|a fox|-s|7|--steps|3|--device|cpu|--against|mock";
        let request = parse_words(words, &mut Fake::default()).unwrap();
        let Request::Compare(found) = request else { panic!("{request:?}") };
        let job = job_of("a fox|-s|7|--steps|3|--device|cpu");
        assert_eq!(*found, CompareJob { job, against: DevicePlan::whole(DeviceSpec::Mock) });
    }

    #[test]
    fn what_cannot_be_compared_is_refused_and_says_why() {
        for (words, expected) in [
            ("compare|x", "--against"),
            ("compare|x|--against|gpu", "one of auto, cpu"),
            ("compare|x|--against|mock|-o|x.png", "--output: compare writes no picture"),
            ("compare|x|--against|mock|--preview|2", "--preview: compare writes no picture"),
            ("compare|x|--against|mock|--json", "--json: compare prints what it found"),
            ("compare|x|--against|mock|--count|2", "--count: compare looks at one picture"),
            ("compare|a|fox|--against|mock", "quote it"),
            ("-q|compare", "did you mean \"tiny-sd compare\"?"),
            ("comapre", "did you mean \"tiny-sd compare\"?"),
        ] {
            let error = parse_words(words, &mut Fake::default()).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage, "{words}");
            assert!(error.to_string().contains(expected), "{words}: {error}");
        }
    }

    #[test]
    fn the_place_of_an_op_is_told_by_the_events_before_it() {
        let display = Display::new(Verbosity::Quiet);
        let watch = Watch { display: &display, stage: Mutex::new(Stage::Loading) };
        let differs = || Error::other(DIFFERS);
        let check = |error: Error, marks: u64, expected: &str| {
            assert_eq!(watch.place(Some(&error), marks), expected);
        };
        let weight = differs().context("loading conv_in.weight").context("unet");
        check(weight, 0, "loading: unet: loading conv_in.weight");
        watch.report(Event::Step { done: 0, total: 3 });
        check(differs(), 0, "step 1 of 3, the UNet or the scheduler");
        // The pipeline is ahead of what it reports.
        watch.report(Event::Step { done: 1, total: 3 });
        check(differs(), 2, "step 3 of 3, the UNet or the scheduler");
        watch.report(Event::Decoding);
        check(differs(), 3, "the VAE's decoder");
    }
}
