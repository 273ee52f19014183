//! `tiny-sd verify`: makes a picture again from its record and says whether it came out the same.
//! Separate from painting because its product is the answer, on standard output, and no picture.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches, Parser};
use serde_json::json;

use super::args::{Args, ModelArgs};
use super::command::usage;
use super::config::{self, Scope};
use super::display::Display;
use super::from::Filling;
use super::inputs::read_picture;
use super::interrupt;
use super::job::{self, Job, Request};
use super::paint::picture_request;
use super::run::OpenPainter;
use super::settings::{FileRecord, Settings, newer_schema};
use super::surroundings::Surroundings;
use super::values::Verbosity;
use crate::backend::cpu;
use crate::error::{Error, Result};
use crate::image::{FileFormat, ImageSize, JPEG_QUALITY, Picture, PictureTexts};
use crate::progress::{Event, Progress};

/// What is compared by hashes of which people see the beginning.
const HASHES: [&str; 5] = ["image", "mask", "encoder", "weights", "configuration"];

/// Version of what `--json` prints.
const SCHEMA_VERSION: u32 = 1;

/// The picture, and what may differ from its record.
#[derive(Debug, Parser)]
#[command(
    name = "tiny-sd verify",
    about = "Makes a picture again from its record and says whether it is the same.",
    override_usage = "tiny-sd verify [OPTIONS] <PICTURE>",
    after_help = AFTER_HELP
)]
struct VerifyArgs {
    /// A picture that tiny-sd has written
    #[arg(value_name = "PICTURE")]
    picture: PathBuf,

    /// One line of JSON instead of text
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    model: ModelArgs,

    /// Print nothing but errors and the answer
    #[arg(short, long, conflicts_with = "verbose")]
    quiet: bool,

    /// Print the settings and how long each stage took
    #[arg(short, long)]
    verbose: bool,
}

const AFTER_HELP: &str = "\
Model, revision, variant and dtype are the record's unless they are given. The answer is one line on
standard output: bit-exact, or how near the pixels are (PSNR in dB, more is nearer), and then what
is not as recorded: image, mask, weights, configuration, version, pipeline, scheduler, dtype,
device, kernels, low memory. Other kernels or another kind of device round in other ways, which
leaves 50 dB or more. A picture that was made of others needs those where its record says. A JPEG is
compared with the JPEG that the picture made here becomes, so it can be bit-exact as well.

Examples:
  tiny-sd verify out.png
  tiny-sd verify out.png --device @url.txt
  tiny-sd verify out.png -m ./my-model --json | jq .psnr_db

Exit codes:
  0    bit-exact: every pixel is the same
  1    it differs, and standard output says how; or anything that is not below
  2    a wrong command line, or a record that cannot be
  3    a model or its weights
  4    a remote device or the way to it
  130  interrupted";

/// A picture, and what its record asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct VerifyJob {
    path: PathBuf,
    pixels: Picture,
    format: FileFormat,
    recorded: Settings,
    job: Job,
    is_json: bool,
}

/// Its flags.
pub(super) fn command() -> clap::Command {
    VerifyArgs::command()
}

/// Parses what follows `tiny-sd verify`, and reads the picture.
///
/// # Errors
/// One line that names what is wrong.
pub(super) fn parse(
    flags: impl Iterator<Item = OsString>,
    surroundings: &mut dyn Surroundings,
) -> Result<Request> {
    let words = std::iter::once("tiny-sd verify".into()).chain(flags);
    let args = config::matches(&command(), words, Scope::Recorded, surroundings)?
        .and_then(|matches| Ok((VerifyArgs::from_arg_matches(&matches)?, matches)));
    let (args, matches) = match args {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => return Ok(Request::Show(error)),
        Err(error) => return Err(usage(&error)),
    };
    let is_given = |id: &str| {
        // Of the flags of a picture there are none.
        matches.try_contains_id(id).is_ok()
            && matches.value_source(id) == Some(ValueSource::CommandLine)
    };
    let VerifyArgs { picture: path, json: is_json, model, quiet, verbose } = args;
    let read = |path: &Path| {
        let file = read_picture(path, surroundings)?;
        let texts = PictureTexts::read(&file)?;
        let record = texts.record.ok_or_else(|| {
            Error::usage(
                "it has no record of tiny-sd's to make it again from; --from takes what other \
                 programs write",
            )
        })?;
        Ok((Picture::from_opaque_file(&file)?, texts.format, Settings::from_json(&record)?))
    };
    let (pixels, format, recorded) =
        read(&path).map_err(|error: Error| error.context(path.display()))?;
    // A picture's command line without a flag.
    let bare = Args::try_parse_from(["tiny-sd"]).map_err(|error| usage(&error))?;
    let mut args = Args { model, ..bare };
    Filling { args: &mut args, is_given: &is_given }
        .take_record(&recorded)
        .map_err(|error| error.context(path.display()))?;
    let job = job::job(args, surroundings)?;
    let verbosity = match (quiet, verbose) {
        (true, _) => Verbosity::Quiet,
        (false, true) => Verbosity::Verbose,
        (false, false) => Verbosity::Normal,
    };
    let notes = newer_schema(recorded.schema).map(|note| format!("{}: {note}", path.display()));
    let job = Job { verbosity, notes: notes.into_iter().collect(), ..job };
    Ok(Request::Verify(Box::new(VerifyJob { path, pixels, format, recorded, job, is_json })))
}

/// Makes the picture again and prints the answer; the exit code says it too.
///
/// # Errors
/// If the model cannot be loaded, a device fails, or the user interrupts.
pub fn verify(verify: &VerifyJob, open: &mut OpenPainter<'_>) -> Result<ExitCode> {
    let VerifyJob { path, pixels, format, recorded, job, is_json } = verify;
    interrupt::install(job.verbosity == Verbosity::Quiet)?;
    cpu::check_kernel_path()?;
    let display = Display::new(job.verbosity);
    job.notes.iter().for_each(|note| display.report(Event::Warning(note)));
    let mut painter = open(job, &display)?;
    display.begin(format!("seed {}", job.seed));
    let size = job.picture_size(painter.default_size());
    let images = job.image.as_ref().map(|image| image.load(size)).transpose()?;
    let texts = job.texts(job.seed);
    let request = picture_request(job, &texts, job.seed, size, images.as_ref())?;
    let made = match request.size == pixels.size() {
        true => painter.paint(&[request], &display)?.into_iter().next(),
        // Whatever it shows, it was cut or scaled.
        false => None,
    };
    let (scheduler, provenance) = (painter.scheduler(job.scheduler), painter.provenance()?);
    let here = Settings::new(job, job.seed, request.size, scheduler, provenance);
    drop((painter, display));
    // With the loss that the file has, so that nothing else is left to differ.
    let made = made.map(|made| made.as_kept_by(*format)).transpose()?;
    let psnr = made.map(|made| psnr(&made, pixels));
    let answer = Answer { psnr, format: *format, recorded, here };
    let name = path.display().to_string();
    super::print(&match is_json {
        true => format!("{}\n", answer.json(&name, pixels.size())),
        false => format!("{}\n", answer.line(&name, pixels.size())),
    })?;
    Ok(if answer.is_exact() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What came out.
struct Answer<'a> {
    /// In dB, infinite for the same pixels; none if the sizes differ.
    psnr: Option<f64>,
    format: FileFormat,
    recorded: &'a Settings,
    here: Settings,
}

impl Answer<'_> {
    fn is_exact(&self) -> bool {
        self.psnr == Some(f64::INFINITY)
    }

    /// What is not as it is recorded: its name, and the value there and here. Kernels that one of
    /// them does not name are not told apart.
    fn differences(&self) -> Vec<(&'static str, String, String)> {
        let number = |number: u32| number.to_string();
        let fields = |settings: &Settings| {
            let Settings { version, pipeline, resolved_scheduler, dtype, device, .. } = settings;
            let hash = |file: &Option<FileRecord>| {
                file.as_ref().map(|file| file.hash.clone()).unwrap_or_default()
            };
            [
                ("image", hash(&settings.image)),
                ("mask", hash(&settings.mask_image)),
                ("encoder", settings.model.encoder_hash.clone().unwrap_or_default()),
                ("weights", settings.model.weights_hash.clone()),
                ("configuration", settings.model.config_hash.clone()),
                ("additions", settings.additions.summary()),
                ("version", version.clone()),
                ("pipeline", number(*pipeline)),
                ("scheduler", resolved_scheduler.clone()),
                ("dtype", dtype.clone()),
                ("device", device.clone()),
                ("kernels", settings.kernel_path.clone().unwrap_or_default()),
                ("low memory", if settings.low_memory { "yes" } else { "no" }.into()),
            ]
        };
        let pairs = fields(self.recorded).into_iter().zip(fields(&self.here));
        pairs
            .filter(|((name, there), (_, here))| {
                there != here && (*name != "kernels" || !there.is_empty() && !here.is_empty())
            })
            .map(|((name, there), (_, here))| (name, there, here))
            .collect()
    }

    fn line(&self, name: &str, size: ImageSize) -> String {
        /// So many digits of a hash tell it from another.
        const SHOWN: usize = 24;
        let mut line = match self.psnr {
            Some(f64::INFINITY) => match self.format {
                FileFormat::Png | FileFormat::WebP => format!("{name}: bit-exact"),
                FileFormat::Jpeg => {
                    format!("{name}: bit-exact, as a JPEG of quality {JPEG_QUALITY}")
                }
            },
            Some(psnr) => format!("{name}: differs, {psnr:.2} dB"),
            None => {
                let Settings { width, height, .. } = self.recorded;
                format!("{name}: differs, it has {size} pixels, and its record {width}x{height}")
            }
        };
        for (name, there, here) in self.differences() {
            let is_hash = HASHES.contains(&name);
            let shown = if is_hash { SHOWN } else { usize::MAX };
            let [there, here] = [there, here].map(|value| {
                let value: String = value.chars().take(shown).collect();
                value.replace(char::is_control, " ")
            });
            line.push_str(&format!("; {name}: {there} is recorded, {here} is here"));
        }
        line
    }

    fn json(&self, name: &str, size: ImageSize) -> String {
        let differences: Vec<_> = self
            .differences()
            .into_iter()
            .map(|(name, there, here)| json!({"setting": name, "recorded": there, "here": here}))
            .collect();
        json!({
            "schema": SCHEMA_VERSION,
            "picture": name,
            "width": size.width,
            "height": size.height,
            "format": self.format.name(),
            "is_exact": self.is_exact(),
            // An infinite one is no number of JSON.
            "psnr_db": self.psnr.filter(|psnr| psnr.is_finite()),
            "differences": differences,
        })
        .to_string()
    }
}

/// Peak signal-to-noise ratio in dB; infinite for the same pixels.
fn psnr(a: &Picture, b: &Picture) -> f64 {
    let squares = a.rgb().iter().zip(b.rgb()).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
    let mean = squares.sum::<f64>() / a.rgb().len() as f64;
    10.0 * (255.0 * 255.0 / mean).log10()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::job::tests::{Fake, parse_words};
    use crate::cli::settings::tests::settings;
    use crate::cli::surroundings::At;

    fn answer(psnr: Option<f64>, change: impl Fn(&mut Settings)) -> (Settings, Option<f64>) {
        let mut here = settings();
        change(&mut here);
        (here, psnr)
    }

    #[test]
    fn the_answer_says_how_near_it_is_and_what_is_not_as_recorded() {
        let recorded = settings();
        let size = ImageSize { height: 64, width: 128 };
        let check = |(here, psnr): (Settings, Option<f64>), expected: &str, is_exact: bool| {
            let format = FileFormat::Png;
            let answer = Answer { psnr, format, recorded: &recorded, here };
            assert_eq!(answer.line("a.png", size), expected);
            assert_eq!(answer.is_exact(), is_exact);
        };
        let exact = Some(f64::INFINITY);
        check(answer(exact, |_| ()), "a.png: bit-exact", true);
        check(
            answer(exact, |here| here.device = "mock".into()),
            "a.png: bit-exact; device: cpu is recorded, mock is here",
            true,
        );
        // A worker that does not name its kernels may have the same.
        check(answer(exact, |here| here.kernel_path = None), "a.png: bit-exact", true);
        check(
            answer(Some(61.0), |here| here.low_memory = true),
            "a.png: differs, 61.00 dB; low memory: no is recorded, yes is here",
            false,
        );
        check(
            answer(Some(61.256), |here| {
                here.kernel_path = Some("avx2".into());
                here.dtype = "f16".into();
                here.model.weights_hash = "00".repeat(32);
            }),
            "a.png: differs, 61.26 dB; weights: abababababababababababab is recorded, \
             000000000000000000000000 is here; dtype: f32 is recorded, f16 is here; \
             kernels: avx512 is recorded, avx2 is here",
            false,
        );
        let format = FileFormat::Jpeg;
        let exact = Answer { psnr: exact, format, recorded: &recorded, here: settings() };
        assert_eq!(exact.line("a.jpg", size), "a.jpg: bit-exact, as a JPEG of quality 95");
        let small = Answer { psnr: None, format, recorded: &recorded, here: settings() };
        let expected = "a.png: differs, it has 8x8 pixels, and its record 128x64";
        assert_eq!(small.line("a.png", ImageSize { height: 8, width: 8 }), expected);
        let json: serde_json::Value = serde_json::from_str(&small.json("a.png", size)).unwrap();
        assert_eq!((&json["is_exact"], &json["psnr_db"]), (&false.into(), &().into()));
    }

    #[test]
    fn psnr_is_in_decibels_of_the_largest_value() {
        let picture =
            |value| Picture::new(ImageSize { height: 1, width: 1 }, vec![value, 5, 5]).unwrap();
        assert_eq!(psnr(&picture(5), &picture(5)), f64::INFINITY);
        let found = psnr(&picture(5), &picture(8));
        assert!((found - 10.0 * (255.0f64 * 255.0 / 3.0).log10()).abs() < 1e-9, "{found}");
    }

    #[test]
    fn a_picture_without_a_record_or_an_answer_that_cannot_be_is_one_line() {
        let plain = Picture::new(ImageSize { height: 1, width: 1 }, vec![1, 2, 3]).unwrap();
        let file = plain.to_plain_png().unwrap();
        let there = vec![("x.png", At::File)];
        let mut fake = Fake { there, files: vec![("x.png", file)], ..Fake::default() };
        for (words, expected) in [
            ("verify|x.png", "x.png: it has no record of tiny-sd's"),
            ("verify|y.png", "y.png: there is no such file"),
            ("verify", "<PICTURE>"),
            ("verify|x.png|--steps|3", "unexpected argument '--steps'"),
            ("verfy", "did you mean \"tiny-sd verify\"?"),
        ] {
            let error = parse_words(words, &mut fake).unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains('\n'), "{words}: {error}");
        }
    }
}
