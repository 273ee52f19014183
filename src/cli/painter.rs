//! From a job to a loaded model: the files, the device, the pipeline. Separate because this is the
//! one place that sees the hub, the devices and the pipeline together.

use std::path::PathBuf;

use candle_core::DType;

use super::device::DeviceSpec;
use super::interrupt;
use super::job::Job;
use super::model::ModelSource;
use super::remote::{Link, RemotePainter};
use super::run::Painter;
use super::values::DtypeChoice;
use crate::backend::{Backend, Device as _, cpu};
use crate::error::{Kind, Result};
use crate::image::{ImageSize, Picture};
use crate::pipeline::{LoadOptions, PictureRequest, Pipeline};
use crate::progress::{Event, Progress};
use crate::remote;
use crate::weights::hub::{self, Hub, HubOptions, Repository, Revision};
use crate::weights::{Component, ModelFolder, Variant, choose, config_files, json};

/// Loads the job's model onto its device.
///
/// # Errors
/// If the model cannot be had or is not covered, or the device is not there.
pub fn open(job: &Job, progress: &dyn Progress) -> Result<Box<dyn Painter>> {
    let variant = job.variant.as_ref().map(|name| Variant::parse(name.as_str())).transpose()?;
    let path = match &job.model {
        ModelSource::Folder(path) => path.clone(),
        ModelSource::Hub(name) => download(job, name, variant.as_ref(), progress)?,
    };
    let folder = ModelFolder::open(path)?;
    let threads = job.threads.map_or(0, usize::from);
    let open_linked = |link: Link| -> Result<Box<dyn Painter>> {
        let device = link.device();
        let variant = variant.clone();
        let painter =
            open_on::<remote::storage::Storage>(&device, &folder, variant, job, progress)?;
        Ok(Box::new(RemotePainter { painter, link }))
    };
    match job.device.resolve()? {
        DeviceSpec::Remote(url) => open_linked(Link::open(&url)?),
        DeviceSpec::Mock => open_linked(Link::mock(threads)?),
        DeviceSpec::Auto | DeviceSpec::Cpu => open_on::<cpu::Storage>(
            &cpu::Device::with_threads(threads)?,
            &folder,
            variant,
            job,
            progress,
        ),
    }
}

fn open_on<B: Backend>(
    device: &B::Device,
    folder: &ModelFolder,
    variant: Option<Variant>,
    job: &Job,
    progress: &dyn Progress,
) -> Result<Box<dyn Painter>> {
    let dtype = match job.dtype {
        DtypeChoice::Auto => device.default_dtype(),
        DtypeChoice::F32 => DType::F32,
        DtypeChoice::F16 => DType::F16,
        DtypeChoice::Bf16 => DType::BF16,
    };
    let scheduler = job.scheduler;
    let options = LoadOptions { dtype, variant, scheduler };
    Ok(Box::new(Pipeline::<B>::load(folder, &options, device, progress)?))
}

impl<B: Backend> Painter for Pipeline<B> {
    fn default_size(&self) -> ImageSize {
        Pipeline::default_size(self)
    }

    fn sampler(&self) -> &str {
        self.scheduler_kind().label()
    }

    fn paint(&mut self, request: &PictureRequest<'_>, progress: &dyn Progress) -> Result<Picture> {
        Pipeline::paint(self, request, progress)
    }
}

/// The repository's files in the hub's cache: the configurations first, because indices of sharded
/// weights name further files.
fn download(
    job: &Job,
    name: &str,
    variant: Option<&Variant>,
    progress: &dyn Progress,
) -> Result<PathBuf> {
    let mut options = HubOptions::from_environment(&|name| std::env::var_os(name))?;
    options.offline |= job.offline;
    if let Some(revision) = &job.revision {
        options.revision = Revision::parse(revision.as_str())?;
    }
    let hub = Hub::new(options, interrupt::flag());
    let repository = hub.repository(name)?;
    if let Some(warning) = repository.warning() {
        progress.report(Event::Warning(warning));
    }
    fetch(&repository, variant, progress).map_err(|error| match error.kind() {
        Kind::Model => error.context(name),
        Kind::Usage | Kind::Remote | Kind::Other | Kind::Interrupted => error,
    })
}

fn fetch(
    repository: &Repository<'_>,
    variant: Option<&Variant>,
    progress: &dyn Progress,
) -> Result<PathBuf> {
    let names = repository.file_names();
    let exists = |name: &str| names.contains(&name);
    let mut reporter = Reporter(progress);
    let mut wanted: Vec<String> = config_files(&exists)?.into_iter().map(str::to_owned).collect();
    let choices = Component::ALL.map(|component| choose(component, variant, &exists));
    let choices = choices.into_iter().collect::<Result<Vec<_>>>()?;
    let indices: Vec<_> = choices.iter().filter(|choice| choice.is_index).collect();
    if !indices.is_empty() {
        let files: Vec<_> = indices.iter().map(|choice| choice.file.clone()).collect();
        let snapshot = repository.fetch(&files, &mut reporter)?;
        for choice in indices {
            wanted.extend(choice.shards(&json::read_text(&snapshot.join(&choice.file))?)?);
        }
    }
    wanted.extend(choices.into_iter().map(|choice| choice.file));
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
