//! From a job to a loaded model: the files, the device, the pipeline. Separate because this is the
//! one place that sees the hub, the devices and the pipeline together.

use std::path::{Path, PathBuf};

use candle_core::DType;

use super::additions::AdditionRecords;
use super::device::DevicePlan;
use super::identity::Pending;
use super::interrupt;
use super::job::Job;
use super::model::{HubName, ModelSource};
use super::places::{OnBackend, PaintOnDevice, Place, PlacedPainter, Places};
use super::run::Painter;
use crate::backend::{Backend, Device as _};
use crate::error::{Kind, Result};
use crate::image::{ImageSize, Picture};
use crate::pipeline::{self, LoadOptions, PictureRequest, Pipeline, Placement};
use crate::progress::{Event, Progress};
use crate::schedule::SchedulerChoice;
use crate::weights::hub::{self, Hub, HubOptions, Repository, Revision};
use crate::weights::{Component, LoneVae, Model, Variant, choose, config_files, json};

/// Loads the job's model onto its devices.
///
/// # Errors
/// If the model cannot be had or is not covered, or the device is not there.
pub fn open(job: &Job, progress: &dyn Progress) -> Result<Box<dyn Painter>> {
    // First: they are here, and the model may have to be downloaded.
    let additions = AdditionRecords::of(&job.additions)?;
    let (model, variant) = model(&Wanted::of(job), progress)?;
    check_mode(pipeline::inpaints(&model)?, job)?;
    let plan = job.device.resolve()?;
    let identify = || {
        let identity = Pending::begin(model.clone(), variant.clone(), job.image.is_some())?;
        Ok((identity, additions.clone()))
    };
    open_on(job, &model, variant.as_ref(), &plan, &identify, progress)
}

/// Loads the job's model, which is on this machine's disk, onto devices that are resolved, and then
/// begins to identify it.
///
/// # Errors
/// As [`open`].
pub(super) fn open_on(
    job: &Job,
    model: &Model,
    variant: Option<&Variant>,
    device: &DevicePlan,
    identify: &dyn Fn() -> Result<(Pending, AdditionRecords)>,
    progress: &dyn Progress,
) -> Result<Box<dyn Painter>> {
    let places = Places::open(device, job.cpu(), false, progress)?;
    let [text, unet, vae] = places.stages.clone();
    let watch = places.watch(progress, job.stats);
    watch.begin(Some("load"));
    let load = Load { model, variant, job, progress: &watch };
    let painter = text.on(WithText { unet, vae, load })?;
    watch.begin(None);
    let ((identity, additions), device) = (identify()?, device.to_string());
    let keeps_books = job.stats;
    Ok(Box::new(PlacedPainter { painter, places, identity, additions, device, keeps_books }))
}

/// Whether a model, of which it is known whether it `inpaints`, makes what the job asks for.
///
/// # Errors
/// If it paints into pictures, and the job has none.
pub(super) fn check_mode(inpaints: bool, job: &Job) -> Result<()> {
    let has_mask = job.image.as_ref().is_some_and(|image| image.mask.is_some());
    match !has_mask && inpaints {
        true => Err(pipeline::needs_mask()),
        false => Ok(()),
    }
}

/// Which model is asked for.
pub(super) struct Wanted<'a> {
    /// Where it comes from.
    pub model: &'a ModelSource,
    /// What a model in one file does not say.
    pub configs: Option<&'a Path>,
    /// The VAE, if not the model's own.
    pub vae: Option<&'a ModelSource>,
    /// Branch, tag or commit.
    pub revision: Option<&'a HubName>,
    /// Which of its weights to prefer.
    pub variant: Option<&'a HubName>,
    /// Whether only what was downloaded before is used.
    pub offline: bool,
}

impl<'a> Wanted<'a> {
    /// A job's.
    pub fn of(job: &'a Job) -> Self {
        let Job { model, offline, .. } = job;
        let (revision, variant) = (job.revision.as_ref(), job.variant.as_ref());
        let (configs, vae) = (job.configs.as_deref(), job.vae.as_ref());
        Self { model, configs, vae, revision, variant, offline: *offline }
    }
}

/// A model on this machine's disk, and which of its weights to prefer.
///
/// # Errors
/// If the model cannot be had.
pub(super) fn model(
    wanted: &Wanted<'_>,
    progress: &dyn Progress,
) -> Result<(Model, Option<Variant>)> {
    let variant = wanted.variant.map(|name| Variant::parse(name.as_str())).transpose()?;
    let at = |source: &ModelSource, part| match source {
        ModelSource::Folder(path) | ModelSource::File(path) => Ok(path.clone()),
        ModelSource::Hub(name) => download(wanted, name, part, variant.as_ref(), progress),
    };
    let part = if wanted.vae.is_some() { Part::WithoutVae } else { Part::Whole };
    let model = Model::open(at(wanted.model, part)?, wanted.configs)?;
    let vae = wanted.vae.map(|source| LoneVae::open(at(source, Part::Vae)?));
    Ok((model.with_vae(vae.transpose()?), variant))
}

/// What is wanted of a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// A whole model.
    Whole,
    /// All but the weights of its VAE.
    WithoutVae,
    /// A VAE: its files are at the top, or where a model has them.
    Vae,
}

/// What is the same wherever the stages are.
struct Load<'a> {
    model: &'a Model,
    variant: Option<&'a Variant>,
    job: &'a Job,
    progress: &'a dyn Progress,
}

/// The text encoder's place is to be found.
struct WithText<'a> {
    unet: Place,
    vae: Place,
    load: Load<'a>,
}

impl OnBackend for WithText<'_> {
    type Output = Result<Box<dyn PaintOnDevice>>;

    fn run<T: Backend>(self, text: T::Device) -> Self::Output {
        let Self { unet, vae, load } = self;
        unet.on(WithUnet::<T> { text, vae, load })
    }
}

/// The text encoder is placed.
struct WithUnet<'a, T: Backend> {
    text: T::Device,
    vae: Place,
    load: Load<'a>,
}

impl<T: Backend> OnBackend for WithUnet<'_, T> {
    type Output = Result<Box<dyn PaintOnDevice>>;

    fn run<U: Backend>(self, unet: U::Device) -> Self::Output {
        let Self { text, vae, load } = self;
        vae.on(WithVae::<T, U> { text, unet, load })
    }
}

/// The text encoder and the UNet are placed.
struct WithVae<'a, T: Backend, U: Backend> {
    text: T::Device,
    unet: U::Device,
    load: Load<'a>,
}

impl<T: Backend, U: Backend> OnBackend for WithVae<'_, T, U> {
    type Output = Result<Box<dyn PaintOnDevice>>;

    fn run<V: Backend>(self, vae: V::Device) -> Self::Output {
        let Self { text, unet, load: Load { model, variant, job, progress } } = self;
        let dtype = job.dtype.or(unet.default_dtype());
        let options = LoadOptions {
            dtype,
            variant: variant.cloned(),
            scheduler: job.scheduler,
            encodes: job.image.is_some(),
            additions: job.additions.clone(),
        };
        let kernel_paths = [text.kernel_path(), unet.kernel_path(), vae.kernel_path()];
        let devices = Placement::<T, U, V> { text, unet, vae };
        let mut pipeline = Pipeline::load(model, &options, devices, progress)?;
        pipeline.vae_tiling = job.vae_tiling;
        Ok(Box::new(LoadedPainter { pipeline, dtype, kernel_paths }))
    }
}

/// A pipeline, and what of it pictures record.
struct LoadedPainter<T: Backend, U: Backend, V: Backend> {
    pipeline: Pipeline<T, U, V>,
    dtype: DType,
    /// Of the devices of the text encoder, the UNet and the VAE.
    kernel_paths: [Option<String>; 3],
}

impl<T: Backend, U: Backend, V: Backend> PaintOnDevice for LoadedPainter<T, U, V> {
    fn default_size(&self) -> ImageSize {
        self.pipeline.default_size()
    }

    fn scheduler(&self) -> SchedulerChoice {
        self.pipeline.scheduler_choice()
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    /// One name if it is the same everywhere; none if a device does not say.
    fn kernel_path(&self) -> Option<String> {
        let [text, unet, vae] = self.kernel_paths.each_ref().map(Option::as_deref);
        let (text, unet, vae) = (text?, unet?, vae?);
        match text == unet && unet == vae {
            true => Some(text.into()),
            false => Some(format!("text={text},unet={unet},vae={vae}")),
        }
    }

    fn paint(
        &mut self,
        requests: &[PictureRequest<'_>],
        progress: &dyn Progress,
    ) -> Result<Vec<Picture>> {
        self.pipeline.paint_together(requests, progress)
    }
}

/// The repository's files in the hub's cache: the configurations first, because indices of sharded
/// weights name further files.
fn download(
    wanted: &Wanted<'_>,
    name: &str,
    part: Part,
    variant: Option<&Variant>,
    progress: &dyn Progress,
) -> Result<PathBuf> {
    let mut options = HubOptions::from_environment(&|name| std::env::var_os(name))?;
    options.offline |= wanted.offline;
    if let Some(revision) = wanted.revision.filter(|_| part != Part::Vae) {
        options.revision = Revision::parse(revision.as_str())?;
    }
    let hub = Hub::new(options, interrupt::flag());
    let repository = hub.repository(name)?;
    if let Some(warning) = repository.warning() {
        progress.report(Event::Warning(warning));
    }
    fetch(&repository, part, variant, progress).map_err(|error| match error.kind() {
        Kind::Model => error.context(name),
        Kind::Usage | Kind::Remote | Kind::Other | Kind::Interrupted => error,
    })
}

fn fetch(
    repository: &Repository<'_>,
    part: Part,
    variant: Option<&Variant>,
    progress: &dyn Progress,
) -> Result<PathBuf> {
    let names = repository.file_names();
    let vae_config = Component::Vae.config_file();
    let is_at_top = part == Part::Vae && !names.contains(&vae_config);
    let place = |name: &str| match name.strip_prefix("vae/") {
        Some(name) if is_at_top => name.to_owned(),
        Some(_) | None => name.to_owned(),
    };
    let exists = |name: &str| names.contains(&&*place(name));
    let mut reporter = Reporter(progress);
    let (configs, components) = match part {
        Part::Whole => (config_files(&exists)?, &Component::ALL[..]),
        Part::WithoutVae => {
            (config_files(&exists)?, &[Component::TextEncoder, Component::Unet][..])
        }
        Part::Vae => (vec![vae_config], &[Component::Vae][..]),
    };
    let mut wanted: Vec<String> = configs.into_iter().map(place).collect();
    let chosen = |component: &Component| match (part, choose(*component, variant, &exists)) {
        // The variant is asked of the model.
        (Part::Vae, Err(_)) => choose(*component, None, &exists),
        (_, choice) => choice,
    };
    let choices = components.iter().map(chosen).collect::<Result<Vec<_>>>()?;
    let indices: Vec<_> = choices.iter().filter(|choice| choice.is_index).collect();
    if !indices.is_empty() {
        let files: Vec<_> = indices.iter().map(|choice| place(&choice.file)).collect();
        let snapshot = repository.fetch(&files, &mut reporter)?;
        for choice in indices {
            let index = json::read_text(&snapshot.join(place(&choice.file)))?;
            wanted.extend(choice.shards(&index)?.iter().map(|name| place(name)));
        }
    }
    wanted.extend(choices.into_iter().map(|choice| place(&choice.file)));
    repository.fetch(&wanted, &mut reporter)
}

/// The hub's events as the run's.
struct Reporter<'a>(&'a dyn Progress);

impl hub::Progress for Reporter<'_> {
    fn report(&mut self, event: &hub::Event<'_>) {
        match event {
            hub::Event::Advanced { name, file_bytes, size_bytes, .. } => {
                let (file, done, total) = (*name, *file_bytes, *size_bytes);
                self.0.report(Event::Downloading { file, done, total });
            }
            hub::Event::Waiting { name } => {
                let text = format!("{name}: waiting for another process that downloads it");
                self.0.report(Event::Warning(&text));
            }
            hub::Event::Retrying { name, reason } => {
                self.0.report(Event::Warning(&format!("{name}: {reason}; trying again")));
            }
            hub::Event::Started { .. }
            | hub::Event::FileStarted { .. }
            | hub::Event::FileFinished { .. } => {}
        }
    }
}
