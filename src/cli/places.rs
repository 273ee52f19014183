//! The devices of a run, opened: each worker is connected to once, whatever stages it has. Separate
//! because this is the one match over backends.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use candle_core::DType;

use super::additions::AdditionRecords;
use super::books::Books;
use super::device::{DevicePlan, DeviceSpec};
use super::identity::{Identity, Pending};
use super::remote::Link;
use super::run::Painter;
use super::settings::Provenance;
use crate::backend::{Backend, Device as _, cpu, cuda};
use crate::error::Result;
use crate::image::{ImageSize, Picture};
use crate::pipeline::PictureRequest;
use crate::progress::{Event, Progress};
use crate::remote;
use crate::schedule::SchedulerChoice;

/// An open device.
#[derive(Clone)]
pub(super) enum Place {
    /// This machine's processor.
    Cpu(cpu::Device),
    /// A GPU of this machine.
    Cuda(cuda::Device),
    /// A worker.
    Remote(remote::device::Device),
}

/// Work that is the same on every backend.
pub(super) trait OnBackend {
    /// What comes of it.
    type Output;

    /// Does it.
    fn run<B: Backend>(self, device: B::Device) -> Self::Output;
}

impl Place {
    /// Does the work on this device's backend.
    pub fn on<W: OnBackend>(self, work: W) -> W::Output {
        match self {
            Place::Cpu(device) => work.run::<cpu::Storage>(device),
            Place::Cuda(device) => work.run::<cuda::Storage>(device),
            Place::Remote(device) => work.run::<remote::storage::Storage>(device),
        }
    }
}

/// Where the stages are, and what must last as long as they do.
pub(super) struct Places {
    /// Of the text encoder, the UNet and the VAE, in this order.
    pub stages: [Place; 3],
    links: Vec<Link>,
    /// Of what is done here.
    books: Mutex<Books>,
}

impl Places {
    /// Opens the devices of a plan that is resolved; `settings` are the processor's. A run that
    /// `holds_another` worker's session already does not wait for one here.
    ///
    /// # Errors
    /// If a device is not there.
    pub fn open<'a>(
        plan: &'a DevicePlan,
        settings: cpu::Settings,
        holds_another: bool,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let mut opened: Vec<(&'a DeviceSpec, Place)> = Vec::new();
        let mut links = Vec::new();
        let mut open = |spec: &'a DeviceSpec| -> Result<Place> {
            if let Some((_, place)) = opened.iter().find(|(known, _)| *known == spec) {
                return Ok(place.clone());
            }
            let holds_another = holds_another || !links.is_empty();
            let mut linked = |link: Link| {
                let place = Place::Remote(link.device());
                links.push(link);
                place
            };
            let place = match spec {
                DeviceSpec::Remote(url) => linked(Link::open(url, holds_another, progress)?),
                DeviceSpec::Mock => linked(Link::mock(settings, progress)?),
                DeviceSpec::Cuda(ordinal) => Place::Cuda(cuda::Device::open(*ordinal)?),
                DeviceSpec::Auto | DeviceSpec::Cpu => Place::Cpu(cpu::Device::open(settings)?),
            };
            opened.push((spec, place.clone()));
            Ok(place)
        };
        let [text, unet, vae] = &plan.stages;
        let stages = [open(text)?, open(unet)?, open(vae)?];
        Ok(Self { stages, links, books: Mutex::default() })
    }
}

impl Places {
    /// Whether there is a worker among them.
    pub fn hold_a_worker(&self) -> bool {
        !self.links.is_empty()
    }

    /// Whether all workers are still there.
    pub fn are_there(&self) -> bool {
        self.links.iter().all(Link::is_there)
    }

    /// What the devices of this machine and the sessions with workers did so far, as lines.
    pub fn statistics(&self) -> Vec<String> {
        let mut here: Vec<String> = Vec::new();
        let mut elsewhere = Vec::new();
        for (place, name) in self.stages.iter().zip(["text", "unet", "vae"]) {
            let did = match place {
                Place::Cpu(device) => device.statistics(),
                Place::Cuda(device) => device.statistics(),
                Place::Remote(_) => {
                    elsewhere.push(name);
                    None
                }
            };
            here.extend(did.filter(|line| !here.contains(line)));
        }
        let books = self.books.lock().unwrap_or_else(PoisonError::into_inner);
        let here = books.lines(here, &elsewhere);
        here.into_iter().chain(self.links.iter().flat_map(Link::statistics)).collect()
    }

    /// Passes the events of a run on, and tells the workers of the stages as they come, if they are
    /// to keep books.
    pub fn watch<'a>(&'a self, progress: &'a dyn Progress, keeps_books: bool) -> Watch<'a> {
        let links = if keeps_books { self.links.as_slice() } else { &[] };
        Watch { links, books: keeps_books.then_some(&self.books), progress }
    }
}

/// See [`Places::watch`].
pub(super) struct Watch<'a> {
    links: &'a [Link],
    books: Option<&'a Mutex<Books>>,
    progress: &'a dyn Progress,
}

impl Watch<'_> {
    /// A stage begins, or none.
    pub fn begin(&self, stage: Option<&'static str>) {
        self.links.iter().for_each(|link| link.begin_stage(stage));
        self.note(|books| books.begin(stage, Instant::now()));
    }

    fn note(&self, entry: impl FnOnce(&mut Books)) {
        if let Some(books) = self.books {
            entry(&mut books.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

impl Progress for Watch<'_> {
    fn report(&self, event: Event<'_>) {
        match event {
            Event::Step { done: 0, total } => {
                self.begin(Some("unet"));
                self.note(|books| books.add_steps(total));
            }
            Event::Encoding | Event::Decoding => self.begin(Some("vae")),
            Event::Done => self.begin(None),
            Event::Downloading { .. }
            | Event::Queued { .. }
            | Event::Sending { .. }
            | Event::Loading { .. }
            | Event::Warning(_)
            | Event::Truncated { .. }
            | Event::Step { .. }
            | Event::Preview { .. } => {}
        }
        self.progress.report(event);
    }

    fn check(&self) -> Result<()> {
        self.progress.check()
    }
}

/// A loaded model on whatever devices.
pub(super) trait PaintOnDevice {
    /// The size that the model was trained for.
    fn default_size(&self) -> ImageSize;

    /// As [`Painter::scheduler`].
    fn scheduler(&self, named: Option<SchedulerChoice>) -> SchedulerChoice;

    /// Number type of the computation.
    fn dtype(&self) -> DType;

    /// Which kernels the devices have, where they say.
    fn kernel_path(&self) -> Option<String>;

    /// As [`Painter::paint`].
    ///
    /// # Errors
    /// As [`Painter::paint`].
    fn paint(
        &mut self,
        requests: &[PictureRequest<'_>],
        progress: &dyn Progress,
    ) -> Result<Vec<Picture>>;
}

/// A painter, and the devices that it needs.
pub(super) struct PlacedPainter {
    // Dropped before the links: its buffers are freed over there.
    pub painter: Box<dyn PaintOnDevice>,
    pub places: Places,
    /// The model by its content.
    pub identity: Pending,
    /// What is beside the model.
    pub additions: AdditionRecords,
    /// The devices, without tokens.
    pub device: String,
    /// Whether each stage's figures are asked for.
    pub keeps_books: bool,
}

impl Painter for PlacedPainter {
    fn default_size(&self) -> ImageSize {
        self.painter.default_size()
    }

    fn scheduler(&self, named: Option<SchedulerChoice>) -> SchedulerChoice {
        self.painter.scheduler(named)
    }

    fn paint(
        &mut self,
        requests: &[PictureRequest<'_>],
        progress: &dyn Progress,
    ) -> Result<Vec<Picture>> {
        let watch = self.places.watch(progress, self.keeps_books);
        watch.begin(Some("text"));
        self.painter.paint(requests, &watch)
    }

    fn provenance(&mut self) -> Result<Provenance> {
        let Identity { weights_hash, encoder_hash, vae_hash, config_hash } =
            self.identity.wait()?;
        Ok(Provenance {
            dtype: self.painter.dtype().as_str().into(),
            weights_hash,
            encoder_hash,
            vae_hash,
            config_hash,
            additions: self.additions.clone(),
            device: self.device.clone(),
            kernel_path: self.painter.kernel_path(),
        })
    }

    fn is_there(&self) -> bool {
        self.places.are_there()
    }

    fn statistics(&self) -> Vec<String> {
        self.places.statistics()
    }
}
