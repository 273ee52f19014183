//! `tiny-sd models`: what is in the cache of downloaded models, more into it, and out of it again.
//! Separate because it is about files of models and makes no picture.

mod list;

use std::ffi::OsString;
use std::fmt;
use std::str::FromStr;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use super::command::usage;
use super::config::{self, Scope};
use super::display::Display;
use super::download::{Download, Part, download, options};
use super::info::megabytes;
use super::interrupt;
use super::job::Request;
use super::model::{HubName, ModelSource};
use super::surroundings::Surroundings;
use super::values::Verbosity;
use crate::error::{Error, Result};
use crate::weights::hub::{CachedRepository, Commit, Removal, RepositoryId};
use crate::weights::{Variant, built_in};

/// What is to be done about downloaded models.
#[derive(Debug, Parser)]
#[command(
    name = "tiny-sd models",
    about = "Lists, downloads and removes models of the Hugging Face hub.",
    disable_help_subcommand = true,
    args_conflicts_with_subcommands = true,
    after_help = AFTER_HELP
)]
struct ModelsArgs {
    #[command(subcommand)]
    what: Option<What>,

    #[command(flatten)]
    list: ListArgs,
}

#[derive(Debug, Subcommand)]
enum What {
    /// List what is there, a line a model: name, size, last use, revisions, what is missing
    #[command(after_help = LIST_AFTER_HELP)]
    List(ListArgs),
    /// Download what --model REPO would, and print the folder
    #[command(after_help = PULL_AFTER_HELP)]
    Pull(PullArgs),
    /// Remove a model, or one revision of it
    #[command(visible_alias = "remove", after_help = RM_AFTER_HELP)]
    Rm(RmArgs),
}

#[derive(Debug, Default, clap::Args)]
struct ListArgs {
    /// A line of JSON for each model instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct PullArgs {
    /// The repository, org/name, and a branch, tag or commit of it
    // Named as --model is, so that what the file of defaults says of its own model is not taken.
    #[arg(id = "model", value_name = "REPO[@REVISION]")]
    what: Pulled,

    /// Weights to prefer where a model has several, such as fp16
    #[arg(long, value_name = "NAME")]
    variant: Option<HubName>,

    /// Download what --vae REPO would: the files of a VAE, such as TAESD
    #[arg(long = "as-vae")]
    as_vae: bool,

    /// Ask no network: say whether all of it is there
    #[arg(long)]
    offline: bool,

    /// Print nothing but the folder and errors
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Debug, clap::Args)]
struct RmArgs {
    /// The repository, org/name, and a branch, tag or commit (7 digits or more) of it
    #[arg(value_name = "REPO[@REVISION]")]
    repository: RepositoryAt,

    /// Remove it; without this, only say what would go
    #[arg(short, long)]
    yes: bool,
}

const AFTER_HELP: &str = "\
The cache is the one of Python's huggingface_hub: HF_HOME or HF_HUB_CACHE says where. Without a
command, tiny-sd models lists. Data sets and models of other programs in it are not listed, and
never removed.

Weights that a worker keeps are elsewhere, by their content and not by a model's name: see
--cache-dir and --cache-size in tiny-sd worker --help. Removing a model here takes none there.

Examples:
  tiny-sd models list
  tiny-sd models list --json | jq -r .repository
  tiny-sd models pull segmind/tiny-sd
  tiny-sd models pull org/name@v1.0 --variant fp16
  tiny-sd models pull madebyollin/taesd --as-vae
  tiny-sd models rm org/name
  tiny-sd models rm org/name@v1.0 --yes

Exit codes:
  0    it is done
  1    anything that is not below
  2    a wrong command line, or rm without --yes
  3    a model that cannot be had, is not there, or cannot be removed
  130  interrupted; what was downloaded is kept";

const LIST_AFTER_HELP: &str = "\
Sizes are those on the disk, what revisions share counted once. The sum goes to standard error.

Examples:
  tiny-sd models list
  tiny-sd models list --json | jq -r 'select(.bytes > 1e9).repository'";

const PULL_AFTER_HELP: &str = "\
Files that are there are not downloaded again, and a download that was cut goes on where it stopped.
demo is in the program: there is nothing to download.

Examples:
  tiny-sd models pull segmind/tiny-sd
  tiny-sd models pull org/name@v1.0 --variant fp16
  tiny-sd models pull madebyollin/taesd --as-vae
  tiny-sd models pull org/name --offline         whether it is there: exit code 3 if not
  tiny-sd info \"$(tiny-sd models pull -q org/name)\"";

const RM_AFTER_HELP: &str = "\
Only the model's own folder in the cache is touched, and no link is followed. Files that another
revision needs stay; parts of unfinished downloads go.

Examples:
  tiny-sd models rm org/name                     says what would go: exit code 2
  tiny-sd models rm org/name --yes
  tiny-sd models rm org/name@v1.0 --yes          a revision, as tiny-sd models list has it";

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelsJob {
    /// Say what is there.
    List {
        /// For programs.
        is_json: bool,
    },
    /// Say that the built-in model needs no download.
    BuiltIn {
        /// How much is said.
        verbosity: Verbosity,
    },
    /// Download.
    Pull {
        /// What.
        repository: RepositoryAt,
        /// Which of its weights.
        variant: Option<HubName>,
        /// Whether it is wanted for its VAE.
        is_vae: bool,
        /// Whether no network is asked.
        offline: bool,
        /// How much is said.
        verbosity: Verbosity,
    },
    /// Remove.
    Remove {
        /// What.
        repository: RepositoryAt,
        /// Whether it is meant.
        is_sure: bool,
    },
}

/// `org/name` or `org/name@revision`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepositoryAt {
    id: RepositoryId,
    revision: Option<HubName>,
}

impl FromStr for RepositoryAt {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (name, revision) = match text.split_once('@') {
            Some((name, revision)) => (name, Some(revision.parse::<HubName>()?)),
            None => (text, None),
        };
        let id = RepositoryId::parse(name).map_err(
            |_| "a repository is written org/name or org/name@revision, such as segmind/tiny-sd",
        )?;
        Ok(Self { id, revision })
    }
}

impl fmt::Display for RepositoryAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.id)?;
        self.revision.iter().try_for_each(|revision| write!(f, "@{}", revision.as_str()))
    }
}

/// What is to be downloaded.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Pulled {
    /// Nothing: it is in the program.
    BuiltIn,
    /// A repository.
    Repository(RepositoryAt),
}

impl FromStr for Pulled {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            built_in::NAME => Ok(Self::BuiltIn),
            _ => text.parse().map(Self::Repository),
        }
    }
}

/// Its flags.
pub(super) fn command() -> clap::Command {
    ModelsArgs::command()
}

/// Parses what follows `tiny-sd models`.
///
/// # Errors
/// One line that names what is wrong.
pub(super) fn parse(
    flags: impl Iterator<Item = OsString>,
    surroundings: &dyn Surroundings,
) -> Result<Request> {
    let flags: Vec<_> = flags.collect();
    let words = std::iter::once("tiny-sd models".into()).chain(flags.iter().cloned());
    let args = command()
        .try_get_matches_from(words)
        .and_then(|matches| ModelsArgs::from_arg_matches(&matches));
    let what = match args {
        Ok(ModelsArgs { what, list }) => what.unwrap_or(What::List(list)),
        Err(error) if !error.use_stderr() => return Ok(Request::Show(error)),
        Err(error) => return Err(usage(&error)),
    };
    let job = match what {
        What::List(ListArgs { json }) => ModelsJob::List { is_json: json },
        // Again, with the defaults of the file, which are for a command and not for one below it.
        What::Pull(_) => pull(flags.into_iter().skip(1), surroundings)?,
        What::Rm(RmArgs { repository, yes }) => ModelsJob::Remove { repository, is_sure: yes },
    };
    Ok(Request::Models(Box::new(job)))
}

fn pull(
    flags: impl Iterator<Item = OsString>,
    surroundings: &dyn Surroundings,
) -> Result<ModelsJob> {
    let command = PullArgs::augment_args(clap::Command::new("tiny-sd models pull"));
    let words = std::iter::once("tiny-sd models pull".into()).chain(flags);
    let args = config::matches(&command, words, Scope::Shown, surroundings)?
        .and_then(|matches| PullArgs::from_arg_matches(&matches));
    let PullArgs { what, variant, as_vae, offline, quiet } = args.map_err(|error| usage(&error))?;
    let verbosity = if quiet { Verbosity::Quiet } else { Verbosity::Normal };
    let repository = match what {
        Pulled::Repository(repository) => repository,
        Pulled::BuiltIn if as_vae => {
            let name = built_in::NAME;
            return Err(Error::usage(format!("--as-vae {name}: its VAE fits no other model")));
        }
        Pulled::BuiltIn => {
            ModelSource::BuiltIn.check(None, variant.as_ref(), None)?;
            return Ok(ModelsJob::BuiltIn { verbosity });
        }
    };
    Ok(ModelsJob::Pull { repository, variant, is_vae: as_vae, offline, verbosity })
}

/// Does it.
///
/// # Errors
/// If the cache cannot be read or written, or the model cannot be had.
pub fn models(job: &ModelsJob) -> Result<()> {
    match job {
        ModelsJob::List { is_json } => list::list(*is_json),
        ModelsJob::BuiltIn { verbosity } => {
            let name = built_in::NAME;
            Display::new(*verbosity).line(format!(
                "{name} is built in: there is nothing to download; -m {name} uses it"
            ));
            Ok(())
        }
        ModelsJob::Pull { repository, variant, is_vae, offline, verbosity } => {
            interrupt::install(*verbosity == Verbosity::Quiet)?;
            let wanted = Download {
                name: repository.id.as_str(),
                revision: repository.revision.as_ref(),
                part: if *is_vae { Part::Vae } else { Part::Whole },
                offline: *offline,
            };
            let variant = variant.as_ref().map(|name| Variant::parse(name.as_str())).transpose()?;
            let display = Display::new(*verbosity);
            let folder = download(&wanted, variant.as_ref(), &display)?;
            drop(display);
            super::print(&format!("{}\n", folder.display()))
        }
        ModelsJob::Remove { repository, is_sure } => remove(repository, *is_sure),
    }
}

fn remove(repository: &RepositoryAt, is_sure: bool) -> Result<()> {
    let options = options()?;
    let RepositoryAt { id, revision } = repository;
    let removal = Removal::plan(&options, id, revision.as_ref().map(HubName::as_str))?;
    let found = CachedRepository::look(&options, id.clone());
    let goes = |commit: &Commit| removal.commits().contains(commit);
    if found.revisions.iter().any(|revision| goes(&revision.commit) && list::is_foreign(revision)) {
        return Err(Error::model(format!(
            "{repository} is no Stable Diffusion model, so it is another program's to remove; its \
             folder is {}",
            found.folder.display()
        )));
    }
    let (bytes, files) = (removal.size_bytes(), removal.files());
    if is_sure {
        removal.run()?;
        return super::print(&format!("{repository}: {bytes} bytes freed\n"));
    }
    let revisions: Vec<_> = found.revisions.iter().filter(|found| goes(&found.commit)).collect();
    let named: Vec<_> = revisions.into_iter().map(list::name_of).collect();
    super::print(&format!(
        "{repository}: {bytes} bytes ({}) in {files} files of {}{}\n",
        megabytes(bytes),
        found.folder.display(),
        if named.is_empty() { String::new() } else { format!(": {}", named.join(", ")) },
    ))?;
    Err(Error::usage(format!("nothing is removed: --yes removes {repository}")))
}
