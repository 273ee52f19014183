//! What is in the cache of models, and whether it can be used. Separate because it judges files by
//! what a run would need of them.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::SystemTime;

use serde_json::{Value, json};

use super::{Display, options};
use crate::cli::info::megabytes;
use crate::cli::print;
use crate::cli::values::Verbosity;
use crate::error::Result;
use crate::pipeline;
use crate::weights::hub::{CachedRepository, CachedRevision, Inventory};
use crate::weights::{Component, Model, ModelFolder, Variant, config_files, json};

/// What a revision is to this program.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// A model, all of it.
    Complete,
    /// A VAE, for `--vae`.
    Vae,
    /// A model or VAE that lacks something.
    Incomplete(String),
    /// A model whose configuration says what is not covered.
    NotCovered(String),
    /// None of its files are there.
    Empty,
    /// Something else.
    Foreign,
}

impl State {
    fn of(revision: &CachedRevision) -> Self {
        let has = |name: &str| revision.files.iter().any(|file| file == name);
        let folder = |component: Component| format!("{}/", component.folder());
        let parts = Component::ALL.map(folder).into_iter();
        let parts = parts.chain(["scheduler/".to_owned(), "tokenizer/".to_owned()]);
        let parts: Vec<_> = parts.collect();
        let is_of_part = |file: &String| parts.iter().any(|part| file.starts_with(part));
        let index = json::read(&revision.snapshot.join("model_index.json")).ok();
        let config = || json::read(&revision.snapshot.join("config.json")).ok();
        if revision.files.is_empty() {
            Self::Empty
        } else if index.is_some_and(|index| index.get("unet").is_none()) {
            Self::Foreign
        } else if has("model_index.json") || revision.files.iter().any(is_of_part) {
            Self::of_model(revision, &has)
        } else if config().as_ref().is_some_and(is_vae) {
            Self::of_vae(revision)
        } else {
            Self::Foreign
        }
    }

    fn of_model(revision: &CachedRevision, has: &dyn Fn(&str) -> bool) -> Self {
        if let Err(error) = config_files(has) {
            return Self::Incomplete(error.to_string().replace("the model lacks ", "lacks "));
        }
        let folder = match ModelFolder::open(&revision.snapshot) {
            Ok(folder) => folder,
            Err(error) => return Self::Incomplete(error.to_string()),
        };
        let lacks = |component: &Component| !has_weights(&folder, *component);
        let lacking: Vec<_> = Component::ALL.into_iter().filter(lacks).collect();
        if !lacking.is_empty() {
            let named = |component: Component| (component, component.folder());
            let lacking: Vec<_> = lacking.into_iter().map(named).collect();
            return Self::Incomplete(why_lacking(&folder, &lacking, &revision.files));
        }
        match pipeline::default_size(&Model::from(folder)) {
            Ok(_) => Self::Complete,
            Err(error) => Self::NotCovered(error.to_string()),
        }
    }

    fn of_vae(revision: &CachedRevision) -> Self {
        match ModelFolder::vae(&revision.snapshot) {
            Ok(folder) if has_weights(&folder, Component::Vae) => Self::Vae,
            Ok(folder) => {
                let lacking = [(Component::Vae, "the VAE")];
                Self::Incomplete(why_lacking(&folder, &lacking, &revision.files))
            }
            Err(error) => Self::Incomplete(error.to_string()),
        }
    }

    /// For programs.
    fn name(&self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Vae => "vae",
            Self::Incomplete(_) => "incomplete",
            Self::NotCovered(_) => "not covered",
            Self::Empty => "empty",
            Self::Foreign => "foreign",
        }
    }

    fn reason(&self) -> Option<&str> {
        match self {
            Self::Incomplete(reason) | Self::NotCovered(reason) => Some(reason),
            Self::Complete | Self::Vae | Self::Empty | Self::Foreign => None,
        }
    }

    /// For people.
    fn shown(&self) -> String {
        match self {
            Self::Complete => "complete".into(),
            Self::Vae => "complete, a VAE".into(),
            Self::Incomplete(reason) => reason.clone(),
            Self::NotCovered(reason) => format!("not covered: {reason}"),
            Self::Empty => "nothing of it is there".into(),
            Self::Foreign => "not of Stable Diffusion".into(),
        }
    }
}

fn is_vae(config: &Value) -> bool {
    let class = config.get("_class_name").and_then(Value::as_str);
    class.is_some_and(|class| class.starts_with("Autoencoder"))
}

/// Whether a run would find them, as they are or in one of the known variants.
fn has_weights(folder: &ModelFolder, component: Component) -> bool {
    let known = ["fp16", "bf16"].map(|name| Variant::parse(name).ok());
    let mut variants = std::iter::once(None).chain(known);
    variants.any(|variant| folder.weight_files(component, variant.as_ref()).is_ok())
}

/// Why a run would not find the weights of components, each with its name: there are none, or only
/// such as it has to be told of.
fn why_lacking(folder: &ModelFolder, components: &[(Component, &str)], files: &[String]) -> String {
    let (mut missing, mut others) = (Vec::new(), Vec::new());
    for (component, name) in components {
        let found = variants(folder, *component, files);
        match found.is_empty() {
            true => missing.push((*name).to_owned()),
            false => others.push(format!("{name} as {}", found.join(", "))),
        }
    }
    let mut reasons = Vec::new();
    if !missing.is_empty() {
        reasons.push(format!("lacks the weights of {}", missing.join(", ")));
    }
    if !others.is_empty() {
        let flag = common_variant(folder, files);
        let flag = flag.map_or(String::new(), |name| format!(" (--variant {name})"));
        reasons.push(format!("has the weights of {} only{flag}", others.join(", of ")));
    }
    reasons.join(", and ")
}

/// A variant that a run finds all components in, as it asks each of them for it.
fn common_variant(folder: &ModelFolder, files: &[String]) -> Option<String> {
    let [first, rest @ ..] = Component::ALL.map(|component| variants(folder, component, files));
    first.into_iter().find(|name| rest.iter().all(|names| names.contains(name)))
}

/// The variants of a component's weights: words in the names of files by which a run finds some.
fn variants(folder: &ModelFolder, component: Component, files: &[String]) -> Vec<String> {
    // `int8-00001-of-00002` is a part of one.
    let is_whole = |word: &&str| !word.contains("-of-");
    let words = files.iter().flat_map(|file| file.split(['/', '.'])).filter(is_whole);
    let words: BTreeSet<&str> = words.collect();
    let is_one = |word: &&str| {
        let variant = Variant::parse(word).ok();
        variant.is_some_and(|variant| folder.weight_files(component, Some(&variant)).is_ok())
    };
    words.into_iter().filter(is_one).map(str::to_owned).collect()
}

/// Whether a revision is another program's.
pub(super) fn is_foreign(revision: &CachedRevision) -> bool {
    State::of(revision) == State::Foreign
}

/// `main, v1.0 (0123abcd)`
pub(super) fn name_of(revision: &CachedRevision) -> String {
    let commit: String = revision.commit.as_str().chars().take(8).collect();
    let names: Vec<_> = revision.names.iter().map(|name| name.as_str()).collect();
    if names.is_empty() { commit } else { format!("{} ({commit})", names.join(", ")) }
}

/// A repository and what its revisions are.
struct Row {
    repository: CachedRepository,
    states: Vec<State>,
}

impl Row {
    /// `None` for what is another program's.
    fn of(repository: CachedRepository) -> Option<Self> {
        let states: Vec<_> = repository.revisions.iter().map(State::of).collect();
        let is_foreign = states.contains(&State::Foreign)
            && states.iter().all(|state| matches!(state, State::Foreign | State::Empty));
        (!is_foreign).then_some(Self { repository, states })
    }

    /// What is to be said of its revisions, or why there are none.
    fn shown(&self) -> String {
        let CachedRepository { revisions, problem, .. } = &self.repository;
        if let Some(problem) = problem {
            return format!("broken: {problem}");
        }
        let each = revisions.iter().zip(&self.states);
        let each: Vec<_> =
            each.map(|(found, state)| format!("{}: {}", name_of(found), state.shown())).collect();
        match each.is_empty() {
            true => "no revision, only parts of a download".into(),
            false => each.join("; "),
        }
    }

    fn json(&self) -> Value {
        let CachedRepository { id, folder, revisions, size_bytes, used, problem } =
            &self.repository;
        let revision = |(found, state): (&CachedRevision, &State)| {
            json!({
                "commit": found.commit.as_str(),
                "names": found.names.iter().map(|name| name.as_str()).collect::<Vec<_>>(),
                "folder": found.snapshot.display().to_string(),
                "files": found.files.len(),
                "state": state.name(),
                "reason": state.reason(),
            })
        };
        let seconds = used.and_then(|used| used.duration_since(SystemTime::UNIX_EPOCH).ok());
        json!({
            "kind": "model",
            "repository": id.as_str(),
            "folder": folder.display().to_string(),
            "bytes": size_bytes,
            "used_unix_s": seconds.map(|seconds| seconds.as_secs()),
            "revisions": revisions.iter().zip(&self.states).map(revision).collect::<Vec<_>>(),
            "problem": problem,
        })
    }
}

/// Lists what is there on standard output; the sum goes to standard error.
///
/// # Errors
/// If the cache cannot be read.
pub(super) fn list(is_json: bool) -> Result<()> {
    let options = options()?;
    let Inventory { repositories, mut others } = Inventory::of(&options)?;
    let all = repositories.len();
    let rows: Vec<_> = repositories.into_iter().filter_map(Row::of).collect();
    others += all - rows.len();
    print(&match is_json {
        true => rows.iter().map(|row| format!("{}\n", row.json())).collect(),
        false => table(&rows, SystemTime::now()),
    })?;
    let bytes = rows.iter().fold(0u64, |sum, row| sum.saturating_add(row.repository.size_bytes));
    let more = match others {
        0 => String::new(),
        others => format!("; {others} of other programs are left out"),
    };
    let models = if rows.len() == 1 { "model" } else { "models" };
    Display::new(Verbosity::Normal).line(format!(
        "{} {models}, {} in {}{more}",
        rows.len(),
        megabytes(bytes),
        options.cache_dir.display()
    ));
    Ok(())
}

fn table(rows: &[Row], now: SystemTime) -> String {
    let cells = |row: &Row| {
        let CachedRepository { id, size_bytes, used, .. } = &row.repository;
        let used = used.map_or_else(|| "?".into(), |used| ago(used, now));
        [id.to_string(), megabytes(*size_bytes), used]
    };
    let cells: Vec<_> = rows.iter().map(cells).collect();
    let width = |column: usize| cells.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let [first, second, third] = [0, 1, 2].map(width);
    let mut text = String::new();
    for (row, [id, size, used]) in rows.iter().zip(&cells) {
        let shown = row.shown().replace(char::is_control, " ");
        let _ = writeln!(text, "{id:first$}  {size:>second$}  {used:>third$}  {shown}");
    }
    text
}

/// `3 days ago`
fn ago(then: SystemTime, now: SystemTime) -> String {
    let seconds = now.duration_since(then).map_or(0, |passed| passed.as_secs());
    let (count, unit) = match seconds {
        0..60 => return "just now".into(),
        60..3600 => (seconds / 60, "minute"),
        3600..86_400 => (seconds / 3600, "hour"),
        _ => (seconds / 86_400, "day"),
    };
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::weights::hub::{HubOptions, RepositoryId};

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    /// The row of a repository whose only revision has these files, each with this text.
    fn row(files: &[(&str, &str)]) -> Option<Row> {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("models--a--b");
        std::fs::create_dir_all(folder.join("refs")).unwrap();
        std::fs::write(folder.join("refs/main"), COMMIT).unwrap();
        for (name, text) in files {
            let path = folder.join("snapshots").join(COMMIT).join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let set = |name: &str| (name == "HF_HUB_CACHE").then(|| cache.path().into());
        let options = HubOptions::from_environment(&set).unwrap();
        Row::of(CachedRepository::look(&options, RepositoryId::parse("a/b").unwrap()))
    }

    fn shown(files: &[(&str, &str)]) -> Option<String> {
        Some(table(&[row(files)?], SystemTime::now()))
    }

    /// The configurations of a fixture.
    fn configs(without: &str) -> Vec<(&'static str, String)> {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/tiny");
        let names = config_files(&|name| fixture.join(name).is_file()).unwrap();
        let names = names.into_iter().filter(|name| *name != without);
        names.map(|name| (name, std::fs::read_to_string(fixture.join(name)).unwrap())).collect()
    }

    fn with<'a>(
        configs: &'a [(&'static str, String)],
        more: &[(&'a str, &'a str)],
    ) -> Vec<(&'a str, &'a str)> {
        let configs = configs.iter().map(|(name, text)| (*name, text.as_str()));
        configs.chain(more.iter().copied()).collect()
    }

    #[test]
    fn a_model_is_complete_where_a_run_would_find_all_of_it() {
        let weights = [
            ("text_encoder/model.fp16.safetensors", "x"),
            ("unet/diffusion_pytorch_model.bin", "x"),
            ("vae/diffusion_pytorch_model.safetensors", "x"),
        ];
        let whole = configs("");
        for (files, expected) in [
            (with(&whole, &weights), "main (01234567): complete\n"),
            (with(&whole, &weights[..1]), "lacks the weights of unet, vae\n"),
            (with(&configs("unet/config.json"), &weights), "lacks unet/config.json\n"),
            (vec![], "nothing of it is there\n"),
            (vec![("text_encoder/config.json", "{}")], "lacks unet/config.json, vae/config"),
        ] {
            let shown = shown(&files).unwrap();
            assert!(shown.starts_with("a/b ") && shown.contains(expected), "{shown}");
            assert_eq!(shown.lines().count(), 1, "{shown}");
        }
        let mut strange = whole.clone();
        let unet = strange.iter_mut().find(|(name, _)| *name == "unet/config.json").unwrap();
        let mut config: Value = serde_json::from_str(&unet.1).unwrap();
        config["class_embed_type"] = "timestep".into();
        unet.1 = config.to_string();
        let row = row(&with(&strange, &weights)).unwrap();
        assert_eq!(row.json()["revisions"][0]["state"], "not covered", "{}", row.json());
        assert!(row.shown().contains("class_embed_type"), "{}", row.shown());
    }

    #[test]
    fn weights_that_a_run_takes_only_when_told_are_named_by_their_variants() {
        const INT8: &str = "unet/diffusion_pytorch_model.int8.safetensors";
        const EMA: &str = "unet/diffusion_pytorch_model.non_ema.bin";
        const SHARD: &str = "unet/diffusion_pytorch_model.int8-00001-of-00002.safetensors";
        const VAE: &str = "vae/diffusion_pytorch_model.safetensors";
        const INT8_VAE: &str = "vae/diffusion_pytorch_model.int8.bin";
        let whole = configs("");
        for (names, expected) in [
            (&[INT8, VAE][..], "has the weights of unet as int8 only"),
            (&[INT8, EMA, VAE], "has the weights of unet as int8, non_ema only"),
            (&[INT8], "lacks the weights of vae, and has the weights of unet as int8 only"),
            (&[INT8, INT8_VAE], "has the weights of unet as int8, of vae as int8 only"),
            (
                &[INT8, INT8_VAE, "text_encoder/model.int8.safetensors"],
                "has the weights of unet as int8, of vae as int8 only (--variant int8)",
            ),
            (&[SHARD, VAE], "lacks the weights of unet"),
        ] {
            let mut files = vec![("text_encoder/model.safetensors", "x")];
            files.extend(names.iter().map(|name| (*name, "x")));
            let row = row(&with(&whole, &files)).unwrap();
            assert_eq!(row.shown(), format!("main (01234567): {expected}"), "{names:?}");
            assert_eq!(row.json()["revisions"][0]["state"], "incomplete", "{names:?}");
        }
        let config = ("config.json", r#"{"_class_name": "AutoencoderTiny"}"#);
        let weights = ("diffusion_pytorch_model.int8.safetensors", "x");
        let shown = shown(&[config, weights]).unwrap();
        assert!(shown.ends_with("has the weights of the VAE as int8 only\n"), "{shown}");
    }

    #[test]
    fn what_is_another_programs_is_left_out_and_a_vae_is_not() {
        for files in [
            &[("config.json", r#"{"model_type": "bert"}"#), ("model.safetensors", "x")][..],
            &[("model_index.json", r#"{"_class_name": "FluxPipeline", "vae": []}"#)],
            &[("v1-5.ckpt", "x")],
        ] {
            assert!(row(files).is_none(), "{files:?}");
        }
        let config = ("config.json", r#"{"_class_name": "AutoencoderTiny"}"#);
        let weights = ("diffusion_pytorch_model.safetensors", "x");
        assert!(shown(&[config, weights]).unwrap().ends_with(": complete, a VAE\n"));
        assert!(shown(&[config]).unwrap().ends_with("lacks the weights of the VAE\n"));
    }

    #[test]
    fn times_are_told_as_people_tell_them() {
        let now = SystemTime::now();
        for (seconds, expected) in [
            (5, "just now"),
            (60, "1 minute ago"),
            (7300, "2 hours ago"),
            (86_400, "1 day ago"),
            (900_000, "10 days ago"),
        ] {
            assert_eq!(ago(now - Duration::from_secs(seconds), now), expected);
        }
        assert_eq!(ago(now + Duration::from_secs(5), now), "just now");
    }
}
