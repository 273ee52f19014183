//! From a job to a loaded model: the files, the device, the pipeline. Separate because this is the
//! one place that sees files, devices and the pipeline together.

use std::path::Path;

use candle_core::DType;

use super::additions::AdditionRecords;
use super::device::DevicePlan;
use super::download::{Download, Part, download};
use super::identity::Pending;
use super::job::Job;
use super::model::{HubName, ModelSource};
use super::places::{OnBackend, PaintOnDevice, Place, PlacedPainter, Places};
use super::run::Painter;
use crate::backend::{Backend, Device as _};
use crate::error::{Error, Result};
use crate::image::{ImageSize, Picture};
use crate::pipeline::{self, LoadOptions, PictureRequest, Pipeline, Placement};
use crate::progress::Progress;
use crate::schedule::SchedulerChoice;
use crate::weights::{LoneVae, Model, Variant};

/// Loads the job's model onto its devices.
///
/// # Errors
/// If the model cannot be had or is not covered, or the device is not there.
pub fn open(job: &Job, progress: &dyn Progress) -> Result<Box<dyn Painter>> {
    open_if(job, &|_| Ok(()), progress)
}

/// Loads the job's model, of which there are only files when it is checked, onto its devices.
///
/// # Errors
/// As [`open`], or what `check` says.
pub(super) fn open_if(
    job: &Job,
    check: &dyn Fn(&Model) -> Result<()>,
    progress: &dyn Progress,
) -> Result<Box<dyn Painter>> {
    // First: they are here, and the model may have to be downloaded.
    let additions = AdditionRecords::of(&job.additions)?;
    let (model, variant) = model(&Wanted::of(job), progress)?;
    check_mode(pipeline::inpaints(&model)?, job)?;
    check(&model)?;
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

/// A model that is on this machine, and which of its weights to prefer.
///
/// # Errors
/// If the model cannot be had.
pub(super) fn model(
    wanted: &Wanted<'_>,
    progress: &dyn Progress,
) -> Result<(Model, Option<Variant>)> {
    let variant = wanted.variant.map(|name| Variant::parse(name.as_str())).transpose()?;
    // Nowhere, if it is in the program.
    let place = |source: &ModelSource, part| match source {
        ModelSource::BuiltIn => Ok(None),
        ModelSource::Folder(path) | ModelSource::File(path) => Ok(Some(path.clone())),
        ModelSource::Hub(name) => {
            // The revision is the model's.
            let revision = wanted.revision.filter(|_| part != Part::Vae);
            let wanted = Download { name, revision, part, offline: wanted.offline };
            download(&wanted, variant.as_ref(), progress).map(Some)
        }
    };
    let part = if wanted.vae.is_some() { Part::WithoutVae } else { Part::Whole };
    let model = match place(wanted.model, part)? {
        Some(path) => Model::open(path, wanted.configs)?,
        None => Model::built_in(),
    };
    let open = |source| match place(source, Part::Vae)? {
        Some(path) => LoneVae::open(path),
        None => Err(Error::usage(format!("--vae {source}: its VAE fits no other model"))),
    };
    Ok((model.with_vae(wanted.vae.map(open).transpose()?), variant))
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

    fn scheduler(&self, named: Option<SchedulerChoice>) -> SchedulerChoice {
        self.pipeline.scheduler_choice(named)
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
