//! A whole picture on a worker: the bytes of the CPU's, for few bytes a step.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Mutex;

use candle_core::DType;
use tiny_sd::Result;
use tiny_sd::backend::{Backend, cpu};
use tiny_sd::image::{ImageSize, Picture};
use tiny_sd::pipeline::{LoadOptions, PictureRequest, Pipeline, Placement};
use tiny_sd::progress::{Event, Progress, Silent};
use tiny_sd::remote::client::Statistics;
use tiny_sd::remote::storage::Storage;
use tiny_sd::schedule::SchedulerKind;
use tiny_sd::weights::{Component, ModelFolder};

use super::Worker;

fn folder() -> Result<ModelFolder> {
    ModelFolder::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/tiny"))
}

/// The picture's bytes of a mini model.
fn paint<B: Backend>(
    device: &B::Device,
    scheduler: SchedulerKind,
    steps: usize,
    guidance_scale: f64,
) -> Result<Vec<u8>> {
    let options = LoadOptions { dtype: DType::F32, variant: None, scheduler: Some(scheduler) };
    let pipeline = Pipeline::<B>::load(&folder()?, &options, Placement::whole(device), &Silent)?;
    let (prompt, negative_prompt) = ("a red cube", "blue");
    let size = ImageSize { height: 64, width: 64 };
    let request = PictureRequest {
        prompt,
        negative_prompt,
        seed: 4,
        steps,
        guidance_scale,
        size,
        preview_every: None,
    };
    let picture = pipeline.paint(&request, &Silent)?;
    // The second picture of a model finds the program of the first.
    assert_eq!(pipeline.paint(&request, &Silent)?.rgb(), picture.rgb());
    Ok(picture.rgb().to_vec())
}

fn worker() -> Result<Worker> {
    let worker = Worker::new()?;
    for component in [Component::TextEncoder, Component::Unet, Component::Vae] {
        for (_, tensor) in folder()?.checkpoint(component, None)?.iter() {
            worker.insert(tensor)?;
        }
    }
    Ok(worker)
}

#[test]
fn a_picture_of_a_worker_is_that_of_the_cpu_for_few_bytes_a_step() -> Result<()> {
    let worker = worker()?;
    for (scheduler, guidance) in [
        (SchedulerKind::Pndm, 7.5),
        (SchedulerKind::EulerAncestral, 7.5),
        (SchedulerKind::DpmSolverMultistep, 1.0),
    ] {
        let run = |steps| -> Result<(Vec<u8>, Statistics)> {
            let session = worker.connect("worker")?;
            let picture = paint::<Storage>(&session.device(), scheduler, steps, guidance)?;
            Ok((picture, session.session().statistics()))
        };
        let ((_, few), (there, many)) = (run(4)?, run(12)?);
        let here = paint::<cpu::Storage>(&worker.device, scheduler, 12, guidance)?;
        assert!(here == there, "{scheduler:?}: another picture");
        // Two pictures each.
        let bytes = (many.bytes_up - few.bytes_up) as f64 / 16.0;
        assert!(bytes < 300.0, "{scheduler:?}: {bytes} bytes a step");
        assert_eq!(few.round_trips, many.round_trips, "steps wait for nothing");
        assert!(many.replays >= 2 * 12 - 1, "{} replays", many.replays);
    }
    Ok(())
}

#[test]
fn previews_are_those_of_the_cpu_and_hold_nothing_up() -> Result<()> {
    let worker = worker()?;
    let session = worker.connect("worker")?;
    let there = previews::<Storage>(&session.device())?;
    let here = previews::<cpu::Storage>(&worker.device)?;
    assert_eq!(here.iter().map(|(done, _)| *done).collect::<Vec<_>>(), [3, 6, 9]);
    assert!(here == there, "other previews");
    assert!(here[0].1 != here[2].1, "the same preview twice");
    Ok(())
}

/// The previews of a picture of ten steps, by the steps done.
fn previews<B: Backend>(device: &B::Device) -> Result<Vec<(usize, Picture)>> {
    #[derive(Default)]
    struct Seen(Mutex<Vec<(usize, Picture)>>);
    impl Progress for Seen {
        fn report(&self, event: Event<'_>) {
            if let Event::Preview { done, picture } = event {
                self.0.lock().unwrap().push((done, picture.clone()));
            }
        }
        fn check(&self) -> Result<()> {
            Ok(())
        }
    }
    let options = LoadOptions { dtype: DType::F32, variant: None, scheduler: None };
    let pipeline = Pipeline::load(&folder()?, &options, Placement::<B>::whole(device), &Silent)?;
    let request = PictureRequest {
        prompt: "a red cube",
        negative_prompt: "",
        seed: 4,
        steps: 10,
        guidance_scale: 7.5,
        size: ImageSize { height: 64, width: 64 },
        preview_every: NonZeroUsize::new(3),
    };
    let seen = Seen::default();
    pipeline.paint(&request, &seen)?;
    Ok(seen.0.into_inner().unwrap())
}

#[test]
fn nothing_but_inputs_varies_between_the_steps_of_a_unet() -> Result<()> {
    let worker = worker()?;
    let session = worker.connect("worker")?;
    session.session().check_programs();
    let there = paint::<Storage>(&session.device(), SchedulerKind::Pndm, 4, 7.5)?;
    let here = paint::<cpu::Storage>(&worker.device, SchedulerKind::Pndm, 4, 7.5)?;
    assert!(here == there);
    assert_eq!(session.session().statistics().replays, 0);
    Ok(())
}
