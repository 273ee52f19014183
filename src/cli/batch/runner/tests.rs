//! Devices that share pictures, with painters that fail or vanish on purpose: what the real ones do
//! only now and then.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;

use super::*;
use crate::cli::Request;
use crate::cli::additions::AdditionRecords;
use crate::cli::events::{Stream, Told};
use crate::cli::job::tests::{Fake, parse_words};
use crate::cli::settings::Provenance;
use crate::cli::values::Verbosity;
use crate::image::Picture;
use crate::pipeline::PictureRequest;
use crate::schedule::{SchedulerChoice, SchedulerKind};

const SIZE: ImageSize = ImageSize { height: 8, width: 8 };

/// A device that is gone after so many pictures, if at all. No picture is made whose prompt is
/// `bad`; one whose prompt is `deadly` takes the device with it.
struct Mortal {
    left: Option<usize>,
    is_there: bool,
    /// The most pictures that were made together.
    together: Arc<AtomicUsize>,
}

impl Painter for Mortal {
    fn default_size(&self) -> ImageSize {
        SIZE
    }

    fn scheduler(&self, named: Option<SchedulerChoice>) -> SchedulerChoice {
        named.unwrap_or(SchedulerKind::Euler.into())
    }

    fn provenance(&mut self) -> Result<Provenance> {
        let text = String::new;
        Ok(Provenance {
            dtype: text(),
            encoder_hash: None,
            weights_hash: text(),
            vae_hash: None,
            config_hash: text(),
            additions: AdditionRecords::default(),
            device: text(),
            kernel_path: None,
        })
    }

    fn is_there(&self) -> bool {
        self.is_there
    }

    fn paint(&mut self, requests: &[PictureRequest<'_>], _: &dyn Progress) -> Result<Vec<Picture>> {
        let has = |prompt: &str| requests.iter().any(|request| request.prompt == prompt);
        self.together.fetch_max(requests.len(), Ordering::Relaxed);
        if self.left.is_some_and(|left| left < requests.len()) || has("deadly") {
            self.is_there = false;
            return Err(Error::remote("gone"));
        }
        if has("bad") {
            return Err(Error::other("it is bad"));
        }
        self.left = self.left.map(|left| left - requests.len());
        requests.iter().map(|_| Picture::new(SIZE, vec![0; 192])).collect()
    }
}

/// What came of a batch.
#[derive(Debug, PartialEq)]
struct Found {
    /// Pictures that are there, and those that could not be made.
    counts: (usize, usize),
    /// Why it could not go on.
    error: Option<String>,
    together: usize,
}

/// Runs jobs on devices with so many pictures left each; one without any cannot be opened.
fn run(jobs: &'static str, flags: &str, lives: &[Option<usize>]) -> Found {
    let folder = TempDir::new().unwrap();
    let out = folder.path().display();
    let mut fake = Fake { files: vec![("jobs", jobs.into())], ..Fake::default() };
    let words = format!("batch|jobs|--out-dir|{out}|-s|1|--steps|1{flags}");
    let Ok(Request::Batch(batch)) = parse_words(&words, &mut fake) else { panic!("{words}") };
    let plans = ["cpu", "mock", "unet=cpu,text=mock,vae=mock", "unet=mock,text=cpu,vae=cpu"];
    let devices: Vec<DevicePlan> = plans.iter().map(|plan| plan.parse().unwrap()).collect();
    let devices = &devices[..lives.len()];
    let display = Display::new(Verbosity::Quiet);
    let stream = Stream::stdout(Told::Nothing);
    let together = Arc::new(AtomicUsize::new(0));
    let open = |device: &DevicePlan, _: &dyn Progress| -> Result<Box<dyn Painter>> {
        let at = devices.iter().position(|known| known == device).unwrap();
        match lives[at] {
            Some(0) => Err(Error::remote("it does not answer")),
            left => Ok(Box::new(Mortal { left, is_there: true, together: together.clone() })),
        }
    };
    let report = Report::new(&batch, &display, &stream, SIZE);
    let waiting = batch.tasks.iter().map(|task| Work::new(task, task.output.clone())).collect();
    let manifest = Manifest::open(folder.path()).unwrap();
    let runner = Runner {
        batch: &batch,
        open: &open,
        report: &report,
        manifest: Mutex::new(manifest),
        queue: Queue::new(waiting),
    };
    let error = runner.run(devices).err().map(|error| error.to_string());
    let counts = report.end();
    let pictures = batch.tasks.iter().filter(|task| folder.path().join(&task.output).exists());
    assert_eq!(pictures.count(), counts.0);
    Found { counts, error, together: together.load(Ordering::Relaxed) }
}

const SIX: &str = "a\nb\nc\nd\ne\nf";

#[test]
fn a_device_that_is_gone_gives_its_pictures_back_to_the_others() {
    for lives in [&[Some(1), None][..], &[None, Some(2), Some(0)], &[Some(0), Some(0), None]] {
        let found = run(SIX, "", lives);
        assert_eq!((found.counts, found.error), ((6, 0), None), "{lives:?}");
    }
}

#[test]
fn without_devices_the_batch_ends_and_says_how_many_pictures_are_left() {
    let found = run(SIX, "|--batch-size|1", &[Some(2), Some(1)]);
    assert_eq!(found.counts, (3, 0));
    let error = found.error.unwrap();
    assert!(error.starts_with("no device is left, and 3 of the pictures are not made"), "{error}");
    // Where none was there at all, that is what is wrong.
    let found = run(SIX, "", &[Some(0), Some(0)]);
    assert_eq!((found.counts, found.error.as_deref()), ((0, 0), Some("it does not answer")));
}

#[test]
fn one_bad_picture_costs_those_that_it_is_made_with_nothing() {
    let found = run("a\nb\nbad\nc", "|--batch-size|4", &[None]);
    assert_eq!(found, Found { counts: (3, 1), error: None, together: 4 });
    let found = run("a\nb\nbad\nc", "|--batch-size|1|--fail-fast", &[None]);
    assert_eq!(found, Found { counts: (2, 1), error: None, together: 1 });
}

#[test]
fn a_picture_that_takes_devices_with_it_does_not_take_all() {
    let found = run("deadly\na\nb\nc", "|--batch-size|1", &[None; 4]);
    assert_eq!((found.counts, found.error), ((3, 1), None));
}

#[test]
fn devices_share_what_could_be_made_together() {
    assert_eq!(run(SIX, "|--batch-size|64", &[None]).together, 6);
    assert!(run(SIX, "|--batch-size|64", &[None, None]).together <= 3);
}
