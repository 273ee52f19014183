//! A whole picture on a worker: the bytes of the CPU's, for few bytes a step.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::DType;
use tiny_sd::Result;
use tiny_sd::backend::{Backend, HostTensor, cpu};
use tiny_sd::image::{ImageSize, Picture};
use tiny_sd::pipeline::{Additions, LoadOptions, PictureRequest, Pipeline, Placement, TextOptions};
use tiny_sd::progress::{Event, Progress, Silent};
use tiny_sd::remote::client::Statistics;
use tiny_sd::remote::library::Library;
use tiny_sd::remote::loopback::Loopback;
use tiny_sd::remote::op::Digest;
use tiny_sd::remote::storage::Storage;
use tiny_sd::remote::transport::BulkSink;
use tiny_sd::remote::worker;
use tiny_sd::schedule::SchedulerKind;
use tiny_sd::weights::{Checkpoint, Component, Format, LoraFile, Model};

use super::{LIMITS, Worker};

fn folder() -> Result<Model> {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
    Model::open(models.join("tiny"), None)
}

/// The picture's bytes of a mini model.
fn paint<B: Backend>(
    device: &B::Device,
    scheduler: SchedulerKind,
    steps: usize,
    guidance_scale: f64,
) -> Result<Vec<u8>> {
    let options = LoadOptions {
        dtype: DType::F32,
        variant: None,
        scheduler: Some(scheduler.into()),
        encodes: false,
        additions: Additions::default(),
    };
    let pipeline = Pipeline::<B>::load(&folder()?, &options, Placement::whole(device), &Silent)?;
    let request = PictureRequest { guidance_scale, ..request(steps, None) };
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
fn of_a_lora_only_its_factors_travel() -> Result<()> {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden/additions");
    let path = goldens.join("conv.safetensors");
    let mut additions = Additions::default();
    additions.loras.push(LoraFile { path: path.clone(), scale: 0.7 });
    let (dtype, scheduler) = (DType::F32, Some(SchedulerKind::Ddim.into()));
    let options = LoadOptions { dtype, variant: None, scheduler, encodes: false, additions };
    let worker = worker()?;
    let session = worker.connect("worker")?;
    let place = Placement::<Storage>::whole(&session.device());
    let there = Pipeline::load(&folder()?, &options, place, &Silent)?;
    let checkpoint = Checkpoint::read(&path, Format::Safetensors)?;
    let factors = checkpoint.iter().filter(|(name, _)| !name.ends_with(".alpha"));
    let bytes: u64 = factors.map(|(_, tensor)| tensor.byte_len()).sum();
    let there = there.paint(&request(2, None), &Silent)?;
    // As they are stored; the model's own weights are there already.
    assert_eq!(session.session().statistics().weight_bytes_up, bytes);
    let place = Placement::<cpu::Storage>::whole(&worker.device);
    let here = Pipeline::load(&folder()?, &options, place, &Silent)?;
    assert!(here.paint(&request(2, None), &Silent)? == there, "another picture");
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
            if let Event::Preview { index: 0, done, picture } = event {
                self.0.lock().unwrap().push((done, picture.clone()));
            }
        }
        fn check(&self) -> Result<()> {
            Ok(())
        }
    }
    let options = LoadOptions {
        dtype: DType::F32,
        variant: None,
        scheduler: None,
        encodes: false,
        additions: Additions::default(),
    };
    let pipeline = Pipeline::load(&folder()?, &options, Placement::<B>::whole(device), &Silent)?;
    let request = request(10, NonZeroUsize::new(3));
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

#[test]
fn a_step_that_is_done_is_told_before_the_next_is_computed() -> Result<()> {
    let device = cpu::Device::with_threads(1)?;
    let options = LoadOptions {
        dtype: DType::F32,
        variant: None,
        scheduler: None,
        encodes: false,
        additions: Additions::default(),
    };
    let place = Placement::<cpu::Storage>::whole(&device);
    let pipeline = Pipeline::load(&folder()?, &options, place, &Silent)?;
    let told = Told::default();
    let mut seen = 0usize;
    pipeline.latents(&[request(6, None)], &told, &mut |_| {
        // First the noise is seen, then each step, just before it is told of.
        let before = seen.saturating_sub(1);
        assert_eq!(told.0.lock().unwrap().len(), before, "steps that were told of");
        seen += 1;
        Ok(())
    })?;
    assert_eq!(*told.0.lock().unwrap(), [1, 2, 3, 4, 5, 6]);
    Ok(())
}

/// The steps that were told of.
#[derive(Default)]
struct Told(Mutex<Vec<usize>>);

impl Progress for Told {
    fn report(&self, event: Event<'_>) {
        if let Event::Step { done: done @ 1.., .. } = event {
            self.0.lock().unwrap().push(done);
        }
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }
}

fn request(steps: usize, preview_every: Option<NonZeroUsize>) -> PictureRequest<'static> {
    PictureRequest {
        prompt: "a red cube",
        negative_prompt: "blue",
        seed: 4,
        steps,
        guidance_scale: 7.5,
        text: TextOptions::default(),
        size: ImageSize { height: 64, width: 64 },
        image: None,
        scheduler: None,
        preview_every,
    }
}

/// A library that gives no weight before it may: until then the worker does nothing.
struct Held {
    library: Arc<dyn Library>,
    may: Mutex<mpsc::Receiver<()>>,
}

impl Library for Held {
    fn has(&self, digests: &[Digest]) -> Vec<bool> {
        self.library.has(digests)
    }

    fn get(&self, digest: &Digest) -> Result<HostTensor> {
        // It fails at once when the other end is gone, which is the permission.
        let _ = self.may.lock().unwrap().recv();
        self.library.get(digest)
    }

    fn receive(&self, digest: Digest, dtype: DType, dims: &[usize]) -> Result<Box<dyn BulkSink>> {
        self.library.receive(digest, dtype, dims)
    }

    fn end(&self) {
        self.library.end();
    }
}

#[test]
fn all_steps_are_on_their_way_before_the_first_is_done() -> Result<()> {
    let (worker, steps) = (worker()?, 25);
    let (hold, may) = mpsc::channel::<()>();
    let library = Arc::new(Held { library: worker.library.session(), may: Mutex::new(may) });
    let far = worker::Worker::<cpu::Storage>::new(worker.device.clone(), LIMITS, 64 << 20);
    let far = Loopback::connect("worker", &far, library)?;
    let (session, device) = (far.session().clone(), far.device());
    let painting =
        thread::spawn(move || paint::<Storage>(&device, SchedulerKind::EulerAncestral, steps, 7.5));
    // The first step is recorded, the others are replays.
    let deadline = Instant::now() + Duration::from_secs(60);
    while session.statistics().replays + 1 < steps as u64 && Instant::now() < deadline {
        thread::yield_now();
    }
    let sent = session.statistics().replays + 1;
    drop(hold);
    painting.join().unwrap()?;
    assert_eq!(sent, steps as u64, "steps that were sent without an answer");
    Ok(())
}
