//! Carrying out a job: every picture painted, named, described and written. Separate from the
//! pipeline, which it reaches only through [`Painter`].

use std::collections::HashSet;
use std::time::Instant;

use super::books;
use super::display::{Display, Times, seconds};
use super::events::{Made, PictureName, Stream, Teller, Told};
use super::files;
use super::interrupt;
use super::job::Job;
use super::output::Target;
use super::paint::{AUTO_PIXELS, Finished, Order, paint};
use super::settings::Provenance;
use super::values::Verbosity;
use crate::backend::cpu;
use crate::error::Result;
use crate::image::{ImageSize, Picture};
use crate::pipeline::PictureRequest;
use crate::progress::{Event, Progress};
use crate::schedule::SchedulerChoice;

/// A loaded model on its device.
pub trait Painter {
    /// The size that the model was trained for.
    fn default_size(&self) -> ImageSize;

    /// The scheduler that pictures are made with whose job names this one, or none, and how its
    /// sigmas are spaced: where the name does not say, the model does.
    fn scheduler(&self, named: Option<SchedulerChoice>) -> SchedulerChoice;

    /// What of a picture's record the model and its devices decide; waits for the model's hash if
    /// that is not computed yet.
    ///
    /// # Errors
    /// If the model's files cannot be read any more.
    fn provenance(&mut self) -> Result<Provenance>;

    /// Whether its devices can still be used, after an error.
    fn is_there(&self) -> bool {
        true
    }

    /// What the devices that keep books did so far, as lines.
    fn statistics(&self) -> Vec<String> {
        Vec::new()
    }

    /// Makes pictures that go together, reports each stage and stops when `progress` says so.
    ///
    /// # Errors
    /// If anything fails, or the user interrupts.
    fn paint(
        &mut self,
        requests: &[PictureRequest<'_>],
        progress: &dyn Progress,
    ) -> Result<Vec<Picture>>;
}

/// Loads the job's model onto its device.
pub type OpenPainter<'a> = dyn FnMut(&Job, &dyn Progress) -> Result<Box<dyn Painter>> + 'a;

/// Makes all pictures of a job.
///
/// # Errors
/// If an output cannot be written (found out before loading), the model cannot be loaded, or a
/// picture cannot be made. Pictures written before stay.
pub fn run(job: &Job, open: &mut OpenPainter<'_>) -> Result<()> {
    run_with(
        job,
        |teller| open(job, teller),
        |painter, display, teller| {
            let together = job.batch_size.or(AUTO_PIXELS, job.picture_size(painter.default_size()));
            let pictures: Vec<_> = pictures(job).collect();
            for pictures in pictures.chunks(together) {
                display.check()?;
                display.begin(title(pictures, job.count.get()));
                paint_together(job, painter, pictures, display, teller)?;
                teller.stream.check()?;
            }
            Ok(())
        },
    )
}

/// What is around pictures, whatever becomes of them: what can be found out before a model is
/// loaded is, the model is loaded by `open`, `make` makes them, and how it ended is told.
///
/// # Errors
/// As [`run`].
pub(super) fn run_with(
    job: &Job,
    open: impl FnOnce(&Teller<'_>) -> Result<Box<dyn Painter>>,
    make: impl FnOnce(&mut dyn Painter, &Display, &Teller<'_>) -> Result<()>,
) -> Result<()> {
    cpu::check_kernel_path()?;
    interrupt::install(job.verbosity == Verbosity::Quiet)?;
    let stream = Stream::stdout(if job.json { Told::Everything } else { Told::Nothing });
    let outcome = run_told(job, &stream, open, make);
    if let Err(error) = &outcome {
        stream.tell_error(None, error);
    }
    outcome
}

fn run_told(
    job: &Job,
    stream: &Stream,
    open: impl FnOnce(&Teller<'_>) -> Result<Box<dyn Painter>>,
    make: impl FnOnce(&mut dyn Painter, &Display, &Teller<'_>) -> Result<()>,
) -> Result<()> {
    check_outputs(job)?;
    let display = Display::new(job.verbosity).drawing(job.preview_in.graphics());
    describe(job, &display);
    let device = job.device.resolve()?.to_string();
    let teller = Teller { stream, device: &device, pictures: &[], progress: &display };
    job.notes.iter().for_each(|note| teller.report(Event::Warning(note)));
    if let Some(images) = &job.image {
        // Its size is known without a model, and damage is to be found before one is loaded.
        images.load(job.picture_size(images.size()))?;
    }
    let mut painter = open(&teller)?;
    make(&mut *painter, &display, &teller)?;
    if job.stats {
        let lines = painter.statistics().into_iter().chain(books::peak_memory());
        lines.for_each(|line| display.line(line));
    }
    Ok(())
}

/// What the display calls pictures that are made together.
fn title(pictures: &[(usize, u64)], count: usize) -> String {
    match (pictures, count) {
        ([(_, seed)], 1) => format!("seed {seed}"),
        ([(index, seed)], _) => format!("{index}/{count}, seed {seed}"),
        ([(first, first_seed), .., (last, last_seed)], _) => {
            format!("{first}-{last}/{count}, seeds {first_seed}-{last_seed}")
        }
        ([], _) => String::new(),
    }
}

/// The pictures of a job: index from 1, and seed.
fn pictures(job: &Job) -> impl Iterator<Item = (usize, u64)> {
    (1..=job.count.get()).zip(job.seed..=u64::MAX)
}

fn check_outputs(job: &Job) -> Result<()> {
    let mut checked = HashSet::new();
    for (index, seed) in pictures(job) {
        let target = job.output.target(seed, index);
        let folder = match &target {
            Target::Stdout => None,
            Target::Replace(path) | Target::Fresh(path) => path.parent().map(ToOwned::to_owned),
        };
        if checked.insert(folder) {
            files::check_writable(&target)?;
        }
    }
    Ok(())
}

fn describe(job: &Job, display: &Display) {
    let own = || "the model's".to_owned();
    let scheduler = job.scheduler.map_or_else(own, |choice| choice.to_string());
    display.detail(format!(
        "model {}, device {}, dtype {}, scheduler {scheduler}, {} steps, guidance scale {}, \
         seed {}",
        job.model,
        job.device,
        job.dtype.as_str(),
        job.steps.get(),
        job.guidance_scale.get(),
        job.seed,
    ));
}

fn paint_together(
    job: &Job,
    painter: &mut dyn Painter,
    pictures: &[(usize, u64)],
    display: &Display,
    teller: &Teller<'_>,
) -> Result<()> {
    let start = Instant::now();
    let targets: Vec<_> =
        pictures.iter().map(|&(index, seed)| job.output.target(seed, index)).collect();
    let order = |(&(_, seed), target): (&(usize, u64), &Target)| Order {
        job,
        seed,
        format: target.format(),
        preview: job.preview_target(target),
    };
    let orders: Vec<_> = pictures.iter().zip(&targets).map(order).collect();
    let name = |&(index, seed)| PictureName { line: None, index, seed, output: None };
    let names: Vec<_> = pictures.iter().map(name).collect();
    let teller = Teller { pictures: &names, ..*teller };
    let finished = paint(&orders, painter, &teller)?;
    let pace = pace(pictures.len(), display.times(), start);
    let steps = job.steps.get();
    for ((picture, target), finished) in names.iter().zip(&targets).zip(finished) {
        let Finished { size, file, settings } = finished;
        let path = files::write(target, &file)?;
        let name = path.map_or("standard output".to_owned(), |path| path.display().to_string());
        display.line(format!(
            "{}: seed {}, {size}, {steps} step{} in {pace}",
            name.replace(char::is_control, " "),
            picture.seed,
            if steps == 1 { "" } else { "s" },
        ));
        let (picture, output, settings) = (*picture, name.as_str(), &*settings.key());
        teller.done(&Made { picture, output, size, steps, settings }, start);
    }
    Ok(())
}

/// How long pictures took together.
fn pace(pictures: usize, Times { denoising, steps }: Times, start: Instant) -> String {
    let together = match pictures {
        1 => String::new(),
        _ => format!(", {pictures} together"),
    };
    let pace = match u32::try_from(steps) {
        Ok(steps @ 1..) => format!(" ({}/step{together})", seconds(denoising / steps)),
        Ok(0) | Err(_) => String::new(),
    };
    format!("{}{pace}", seconds(start.elapsed()))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read};
    use std::path::Path;
    use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
    use std::time::Duration;

    use tempfile::TempDir;

    use super::*;
    use crate::cli::additions::AdditionRecords;
    use crate::cli::{Process, Request, job::tests::job_of, parse, report};
    use crate::error::Error;
    use crate::progress::Event;
    use crate::schedule::SchedulerKind;

    /// Paints a pattern; for the prompt `endless` it stops only when asked to, for `deaf` not
    /// even then.
    struct Pattern;

    impl Painter for Pattern {
        fn default_size(&self) -> ImageSize {
            ImageSize { height: 16, width: 24 }
        }

        fn scheduler(&self, named: Option<SchedulerChoice>) -> SchedulerChoice {
            named.unwrap_or(SchedulerKind::DpmSolverMultistep.into())
        }

        fn provenance(&mut self) -> Result<Provenance> {
            Ok(Provenance {
                dtype: "f32".into(),
                weights_hash: "00".repeat(32),
                encoder_hash: None,
                vae_hash: None,
                config_hash: "11".repeat(32),
                additions: AdditionRecords::default(),
                device: "cpu".into(),
                kernel_path: None,
            })
        }

        fn paint(
            &mut self,
            requests: &[PictureRequest<'_>],
            progress: &dyn Progress,
        ) -> Result<Vec<Picture>> {
            let [request, ..] = requests else { return Ok(vec![]) };
            progress.report(Event::Truncated { which: "prompt", text: "the end" });
            for done in 0..=request.steps {
                progress.report(Event::Step { done, total: request.steps });
            }
            println!("painting");
            match request.prompt {
                "endless" => loop {
                    progress.check()?;
                    std::thread::park_timeout(Duration::from_millis(1));
                },
                "deaf" => loop {
                    std::thread::park();
                },
                _ => {}
            }
            progress.report(Event::Decoding);
            let pictures = requests.iter().map(|request| {
                let bytes = request.size.height * request.size.width * 3;
                // Rough enough that a large picture does not fit the buffer of a pipe.
                let value =
                    |at: usize| ((at as u64 + request.seed).wrapping_mul(0x9e37_79b9) >> 24) as u8;
                Picture::new(request.size, (0..bytes).map(value).collect())
            });
            let pictures = pictures.collect::<Result<_>>()?;
            progress.report(Event::Done);
            Ok(pictures)
        }
    }

    fn open(_: &Job, _: &dyn Progress) -> Result<Box<dyn Painter>> {
        Ok(Box::new(Pattern))
    }

    fn parameters_of(path: &Path) -> String {
        let file = BufReader::new(std::fs::File::open(path).unwrap());
        let reader = png::Decoder::new(file).read_info().unwrap();
        reader.info().uncompressed_latin1_text[0].text.clone()
    }

    fn names(folder: &TempDir) -> Vec<String> {
        let entries = std::fs::read_dir(folder.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn each_picture_is_written_with_its_own_seed_and_name() {
        let folder = TempDir::new().unwrap();
        let output = folder.path().join("p.png");
        let words = format!("a fox|-q|-s|41|-H|8|-n|blurry|--count|3|-o|{}", output.display());
        run(&job_of(&words), &mut open).unwrap();
        assert_eq!(names(&folder), ["p-1.png", "p-2.png", "p-3.png"]);
        for (name, seed) in [("p-1.png", 41), ("p-2.png", 42), ("p-3.png", 43)] {
            let version = env!("CARGO_PKG_VERSION");
            let expected = format!(
                "a fox\nNegative prompt: blurry\nSteps: 25, Sampler: DPM++ 2M, CFG scale: 7.5, \
                 Seed: {seed}, Size: 24x8, Model: tiny-sd, Version: tiny-sd {version}"
            );
            assert_eq!(parameters_of(&folder.path().join(name)), expected);
        }
    }

    #[test]
    fn an_output_that_cannot_be_written_is_told_before_anything_is_loaded() {
        let folder = TempDir::new().unwrap();
        std::fs::create_dir(folder.path().join("1")).unwrap();
        for name in ["no/x.png", "{seed}/x.png"] {
            let output = folder.path().join(name);
            let words = format!("x|-q|-s|1|--count|2|-o|{}", output.display());
            let mut loaded = false;
            let error = run(&job_of(&words), &mut |job, progress| {
                loaded = true;
                open(job, progress)
            });
            assert!(error.unwrap_err().to_string().contains("there is no folder"));
            assert!(!loaded);
        }
        assert_eq!(names(&folder), ["1"]);
    }

    #[test]
    fn a_model_that_cannot_be_loaded_leaves_no_file() {
        let folder = TempDir::new().unwrap();
        let words = format!("x|-q|-o|{}/x.png", folder.path().display());
        let error = run(&job_of(&words), &mut |_, _| Err(Error::model("no weights"))).unwrap_err();
        assert_eq!(error.to_string(), "no weights");
        assert!(names(&folder).is_empty());
    }

    /// The program with the pattern in the pipeline's place, run by the tests below.
    #[test]
    #[ignore = "the child process of other tests"]
    fn child() {
        let Ok(words) = std::env::var("TINY_SD_TEST_CHILD") else { return };
        let command_line = std::iter::once("tiny-sd").chain(words.split('|'));
        let outcome = parse(command_line.map(Into::into), &mut Process).and_then(|request| {
            let Request::Paint(job) = request else { return Err(Error::other("no picture")) };
            run(&job, &mut open)
        });
        std::process::exit(outcome.map_or_else(|error| report(&error).into(), |()| 0));
    }

    /// A child that a failing test does not leave behind.
    struct Running(Child);

    impl Drop for Running {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn spawn(folder: &TempDir, words: &str) -> Running {
        let name = format!("{}::child", module_path!().split_once("::").unwrap().1);
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", &name])
            .env("TINY_SD_TEST_CHILD", words)
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Running(child.unwrap())
    }

    fn end(mut child: Running, mut stderr: BufReader<ChildStderr>) -> (ExitStatus, String) {
        let mut text = String::new();
        stderr.read_to_string(&mut text).unwrap();
        (child.0.wait().unwrap(), text)
    }

    #[test]
    fn without_a_terminal_there_is_one_line_for_the_picture_and_none_with_q() {
        for (quiet, lines) in [("", 2), ("|-q", 0)] {
            let folder = TempDir::new().unwrap();
            let mut child = spawn(&folder, &format!("x|-s|5{quiet}"));
            let stderr = BufReader::new(child.0.stderr.take().unwrap());
            let (status, stderr) = end(child, stderr);
            assert!(status.success(), "{stderr}");
            assert_eq!(names(&folder), ["tiny-sd-5.png"]);
            assert_eq!(stderr.lines().count(), lines, "{stderr}");
            if quiet.is_empty() {
                let lines: Vec<_> = stderr.lines().collect();
                assert!(lines[0].starts_with("warning: ") && lines[0].ends_with("\"the end\""));
                assert!(lines[1].starts_with("tiny-sd-5.png: seed 5, 24x16, 25 steps in 0."));
            }
        }
    }

    #[test]
    fn a_picture_on_standard_output_is_a_whole_png() {
        let folder = TempDir::new().unwrap();
        let mut child = spawn(&folder, "x|-q|-o|-");
        let mut stdout = Vec::new();
        child.0.stdout.take().unwrap().read_to_end(&mut stdout).unwrap();
        assert!(child.0.wait().unwrap().success());
        // libtest has written its own lines before.
        let start = stdout.windows(8).position(|bytes| bytes == b"\x89PNG\r\n\x1a\n");
        let png = &stdout[start.unwrap()..];
        let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        assert!(png.ends_with(b"IEND\xaeB`\x82"));
        assert!(names(&folder).is_empty());
    }

    #[test]
    fn a_reader_that_goes_away_is_an_error_and_no_panic() {
        let folder = TempDir::new().unwrap();
        let mut child = spawn(&folder, "x|-q|-W|4096|-H|512|-o|-");
        let stdout = BufReader::new(child.0.stdout.take().unwrap());
        assert!(stdout.lines().any(|line| line.unwrap().ends_with("painting")));
        let stderr = BufReader::new(child.0.stderr.take().unwrap());
        let (status, stderr) = end(child, stderr);
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert_eq!(
            stderr.trim(),
            "error: standard output was closed before the picture was written"
        );
    }

    #[cfg(unix)]
    #[test]
    fn ctrl_c_stops_the_run_and_a_second_one_does_not_wait_for_it() {
        for (prompt, signals) in [("endless", 1), ("deaf", 2)] {
            let folder = TempDir::new().unwrap();
            let mut child = spawn(&folder, &format!("{prompt}|-o|x.png"));
            let stdout = BufReader::new(child.0.stdout.take().unwrap());
            let mut stderr = BufReader::new(child.0.stderr.take().unwrap());
            let mut lines = stdout.lines().map(|line| line.unwrap());
            assert!(lines.any(|line| line.ends_with("painting")), "{prompt}");
            for signal in 0..signals {
                let id = child.0.id().to_string();
                assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
                // The first signal has arrived when the child says so.
                let mut line = String::new();
                while signal == 0 && !line.contains("stopping") {
                    line.clear();
                    assert_ne!(stderr.read_line(&mut line).unwrap(), 0, "{prompt}");
                }
            }
            let (status, rest) = end(child, stderr);
            assert_eq!(status.code(), Some(130), "{prompt}: {rest}");
            let expected = if signals == 1 { "error: interrupted" } else { "" };
            assert_eq!(rest.trim(), expected, "{prompt}");
            assert!(names(&folder).is_empty(), "{prompt}");
        }
    }
}
