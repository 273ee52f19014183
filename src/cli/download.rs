//! A repository's files, as far as they are needed, in the hub's cache. Separate because a run
//! needs them, and who downloads beforehand must get the very same.

use std::path::PathBuf;

use super::interrupt;
use super::model::HubName;
use crate::error::{Kind, Result};
use crate::progress::{Event, Progress};
use crate::weights::hub::{self, Hub, HubOptions, Purpose, Repository, Revision};
use crate::weights::{Component, Variant, choose, config_files, json};

/// Which files of which repository.
#[derive(Debug, Clone, Copy)]
pub(super) struct Download<'a> {
    /// Its name.
    pub name: &'a str,
    /// Branch, tag or commit.
    pub revision: Option<&'a HubName>,
    /// What of it.
    pub part: Part,
    /// Whether only what was downloaded before is used.
    pub offline: bool,
}

/// What is wanted of a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// A whole model.
    Whole,
    /// All but the weights of its VAE.
    WithoutVae,
    /// A VAE: its files are at the top, or where a model has them.
    Vae,
}

/// The hub, as this process's environment has it.
///
/// # Errors
/// If a variable makes no sense.
pub(super) fn options() -> Result<HubOptions> {
    HubOptions::from_environment(&|name| std::env::var_os(name))
}

/// The repository's files in the hub's cache: the configurations first, because indices of sharded
/// weights name further files.
///
/// # Errors
/// If they cannot be had.
pub(super) fn download(
    wanted: &Download<'_>,
    variant: Option<&Variant>,
    progress: &dyn Progress,
) -> Result<PathBuf> {
    let Download { name, revision, part, offline } = *wanted;
    let mut options = options()?;
    options.offline |= offline;
    options.purpose = match part {
        Part::Whole | Part::WithoutVae => Purpose::Model,
        Part::Vae => Purpose::Vae,
    };
    if let Some(revision) = revision {
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
