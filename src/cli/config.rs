//! The file of defaults, and `tiny-sd config`, which says what it sets. Separate because it only
//! changes what flags are that are not given: to clap its values are defaults, so flags and
//! `--from` win as they do over the built-in ones.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::error::ContextKind;
use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, Command, CommandFactory, FromArgMatches, Parser};
use serde_json::{Map, json};
use toml::{Spanned, Value};

use super::args::Args;
use super::command::usage;
use super::job::Request;
use super::model::ModelSource;
use super::surroundings::{At, Surroundings};
use crate::error::{Error, Result};
use crate::weights::{built_in, defaults};

/// Largest file that is read, in bytes.
const MAX_BYTES: usize = 64 << 10;
/// Names another file, or none where it is empty.
const VARIABLE: &str = "TINY_SD_CONFIG";
/// Flags that are about one picture or one run.
const NEVER: [&str; 8] = ["from", "grid", "prompt", "image", "mask", "json", "help", "version"];
/// What belongs to the model of the file, and not to another one.
const OF_MODEL: [&str; 4] = ["config", "vae", "revision", "variant"];
/// What a command takes that makes a picture as it was recorded: nothing that determines it.
const NOT_RECORDED: [&str; 6] = ["device", "threads", "low-memory", "offline", "quiet", "verbose"];

/// What does not go with `--quiet`.
const LOUD: [&str; 2] = ["verbose", "stats"];

/// Which flags of a command the file is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// Those that it shows.
    Shown,
    /// Those that it shows, but for `--output`, which has another meaning there.
    Batch,
    /// Those that say where and how loudly, but not what.
    Recorded,
}

/// Parses words with the file's defaults.
///
/// # Errors
/// The outer one if the file cannot be used; the inner one is clap's, help included, and comes
/// first.
pub(super) fn matches(
    command: &Command,
    words: impl Iterator<Item = OsString>,
    scope: Scope,
    surroundings: &dyn Surroundings,
) -> Result<std::result::Result<ArgMatches, clap::Error>> {
    let words: Vec<OsString> = words.collect();
    let plain = match command.clone().try_get_matches_from(words.iter()) {
        Ok(plain) => plain,
        Err(error) => return Ok(Err(error)),
    };
    let Some(file) = File::read(surroundings)? else {
        return with_model(command.clone(), plain, words, &BTreeSet::new(), surroundings);
    };
    let mut set = BTreeSet::new();
    let is_set = |name| surroundings.variable(name).is_some_and(|value| !value.is_empty());
    let is_given = |id: &&str| {
        plain.try_contains_id(id).is_ok()
            && plain.value_source(id) == Some(ValueSource::CommandLine)
    };
    let has_model = is_set("TINY_SD_MODEL") || is_given(&"model");
    let mut command = command.clone();
    for (name, setting) in file.settings {
        let is_shadowed = (has_model && (name == "model" || OF_MODEL.contains(&&*name)))
            || (name == "device" && is_set("TINY_SD_DEVICE"))
            || (LOUD.contains(&&*name) && is_given(&"quiet"))
            || (name == "quiet" && LOUD.iter().any(&is_given));
        let is_in_scope = match scope {
            Scope::Shown => true,
            Scope::Batch => name != "output",
            Scope::Recorded => NOT_RECORDED.contains(&&*name),
        };
        let flag = command.get_arguments().find(|flag| flag.get_long() == Some(&name));
        let flag = flag.filter(|flag| !flag.is_hide_set() && is_in_scope && !is_shadowed);
        let Some(id) = flag.map(|flag| flag.get_id().clone()) else { continue };
        // clap keeps defaults as long as the program runs; the file is small and read once.
        let values: Vec<&'static str> =
            setting.values.into_iter().map(|value| &*value.leak()).collect();
        command = command.mut_arg(id, |flag| flag.default_values(values));
        set.insert(name);
    }
    // Of a copy: clap loses track of the flags of a command that has parsed and is then changed.
    match command.clone().try_get_matches_from(words.iter()) {
        Ok(matches) => with_model(command, matches, words, &set, surroundings),
        Err(error) => Ok(Err(error)),
    }
}

/// What is found with the defaults that the model has, if it has any: before clap's, and after
/// those that the file has set.
fn with_model(
    mut command: Command,
    found: ArgMatches,
    words: Vec<OsString>,
    set: &BTreeSet<String>,
    surroundings: &dyn Surroundings,
) -> Result<std::result::Result<ArgMatches, clap::Error>> {
    let defaults = match found.try_get_one::<ModelSource>("model") {
        Ok(Some(source)) => of_model(source, surroundings)?,
        Ok(None) | Err(_) => Map::new(),
    };
    if defaults.is_empty() {
        return Ok(Ok(found));
    }
    for (name, value) in &defaults {
        let flag = command.get_arguments().find(|flag| flag.get_long() == Some(name.as_str()));
        let id = flag.filter(|_| !set.contains(name)).map(|flag| flag.get_id().clone());
        if let Some(id) = id {
            let value: &'static str = defaults::typed(value).leak();
            command = command.mut_arg(id, |flag| flag.default_value(value));
        }
    }
    Ok(command.try_get_matches_from(words))
}

/// What a model says of flags that are not given, each as its flag takes it.
///
/// # Errors
/// If its file cannot be read, or has what a flag does not take.
fn of_model(
    source: &ModelSource,
    surroundings: &dyn Surroundings,
) -> Result<Map<String, serde_json::Value>> {
    let path = match source {
        ModelSource::BuiltIn => return built_in::defaults(),
        ModelSource::Folder(folder) => folder.join(defaults::FILE),
        ModelSource::Hub(_) | ModelSource::File(_) => return Ok(Map::new()),
    };
    match surroundings.at(&path) {
        At::File => {}
        // What else may be wrong with the folder, loading the model says.
        At::Nothing | At::Folder | At::Device => return Ok(Map::new()),
    }
    let wrong = |problem: String| Error::model(problem).context(path.display());
    let bytes = surroundings.read_file(&path, MAX_BYTES);
    let bytes = bytes.map_err(|error| wrong(error.to_string()))?;
    if bytes.len() > MAX_BYTES {
        return Err(wrong(format!("it is longer than {MAX_BYTES} bytes")));
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| wrong("it is not UTF-8".to_owned()))?;
    let found = defaults::parse(text).map_err(|error| error.context(path.display()))?;
    let command = Args::command();
    for (name, value) in &found {
        check(&command, name, &defaults::typed(value)).map_err(wrong)?;
    }
    Ok(found)
}

/// What the file says.
#[derive(Debug)]
struct File {
    settings: BTreeMap<String, Setting>,
}

/// A flag's values, as a command line would have them, and as the file has them.
#[derive(Debug)]
struct Setting {
    values: Vec<String>,
    written: Value,
}

impl File {
    /// `None` if there is none.
    fn read(surroundings: &dyn Surroundings) -> Result<Option<Self>> {
        let Some((path, is_named)) = place(surroundings) else { return Ok(None) };
        let bytes = match surroundings.read_file(&path, MAX_BYTES) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !is_named => {
                return Ok(None);
            }
            Err(error) if is_named => {
                return Err(Error::usage(format!("{VARIABLE}: {}: {error}", path.display())));
            }
            Err(error) => return Err(Error::usage(format!("{}: {error}", path.display()))),
        };
        if bytes.len() > MAX_BYTES {
            let problem = format!("{} is longer than {MAX_BYTES} bytes", path.display());
            return Err(Error::usage(problem));
        }
        let text = std::str::from_utf8(&bytes)
            .map_err(|_| Error::usage(format!("{} is not UTF-8", path.display())))?;
        Self::parse(&path, text).map(Some)
    }

    fn parse(path: &Path, text: &str) -> Result<Self> {
        let wrong = |at: usize, problem: String| {
            let before = text.get(..at).unwrap_or(text);
            let line = before.matches('\n').count().saturating_add(1);
            Error::usage(format!("{}, line {line}: {problem}", path.display()))
        };
        let found: BTreeMap<Spanned<String>, Spanned<Value>> =
            toml::from_str(text).map_err(|error| {
                let at = error.span().map_or(0, |span| span.start);
                wrong(at, error.message().trim().replace('\n', ", "))
            })?;
        let command = Args::command();
        let mut settings = BTreeMap::new();
        for (name, value) in found {
            let at = name.span().start;
            let (name, written) = (name.into_inner(), value.into_inner());
            let values = values(&command, &name, &written).map_err(|problem| wrong(at, problem))?;
            settings.insert(name, Setting { values, written });
        }
        Ok(Self { settings })
    }
}

/// A flag's values, each as the flag takes it.
fn values(
    command: &Command,
    name: &str,
    value: &Value,
) -> std::result::Result<Vec<String>, String> {
    let shown: String = name.chars().take(100).collect();
    let flag = command.get_arguments().find(|flag| flag.get_long() == Some(name));
    let Some(flag) = flag.filter(|flag| !flag.is_hide_set()) else {
        let error = command.clone().try_get_matches_from(["tiny-sd", &format!("--{name}")]);
        let near =
            error.err().and_then(|error| Some(error.get(ContextKind::SuggestedArg)?.to_string()));
        let near = near.map(|near| near.trim_start_matches('-').to_owned());
        let near = near.filter(|near| !NEVER.contains(&&**near));
        return Err(match near {
            Some(near) => format!("{shown:?} is no flag's name; did you mean {near}?"),
            None => format!("{shown:?} is no flag's name; tiny-sd --help has them"),
        });
    };
    if NEVER.contains(&name) {
        return Err(format!("{name} has no default: give --{name} where it is wanted"));
    }
    let texts = match (flag.get_action(), value) {
        (ArgAction::SetTrue, Value::Boolean(is_set)) => return Ok(vec![is_set.to_string()]),
        (ArgAction::SetTrue, _) => return Err(format!("{name} is true or false")),
        (ArgAction::Append, Value::Array(items)) => items.iter().map(text).collect(),
        (_, value) => text(value).map(|text| vec![text]),
    };
    let texts: Vec<String> = texts.ok_or_else(|| match flag.get_action() {
        ArgAction::Append => format!("{name} takes a text, or a list of them"),
        _ => format!("{name} takes one text or number"),
    })?;
    texts.iter().try_for_each(|text| check(command, name, text))?;
    Ok(texts)
}

/// Whether a flag takes a text; what it says if not.
fn check(command: &Command, name: &str, text: &str) -> std::result::Result<(), String> {
    let words = ["tiny-sd".to_owned(), format!("--{name}={text}")];
    match command.clone().try_get_matches_from(words) {
        Ok(_) => Ok(()),
        Err(error) => {
            let problem = usage(&error).to_string();
            Err(problem.trim_end_matches("; see tiny-sd --help").to_owned())
        }
    }
}

/// A value as it would be typed.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Boolean(_) | Value::Datetime(_) | Value::Array(_) | Value::Table(_) => None,
    }
}

/// Where the file is looked for, and whether the user named it.
fn place(surroundings: &dyn Surroundings) -> Option<(PathBuf, bool)> {
    if let Some(named) = surroundings.variable(VARIABLE) {
        return (!named.is_empty()).then(|| (named.into(), true));
    }
    let folder = |name| {
        let folder = surroundings.variable(name).map(PathBuf::from);
        folder.filter(|folder| folder.is_absolute())
    };
    let folder = if cfg!(windows) {
        folder("APPDATA")
    } else if cfg!(target_os = "macos") {
        folder("HOME").map(|home| home.join("Library/Application Support"))
    } else {
        folder("XDG_CONFIG_HOME").or_else(|| Some(folder("HOME")?.join(".config")))
    };
    Some((folder?.join("tiny-sd").join("config.toml"), false))
}

/// How it is said.
#[derive(Debug, Parser)]
#[command(
    name = "tiny-sd config",
    about = "Says where the file of defaults is, and what it sets.",
    after_help = AFTER_HELP
)]
struct ConfigArgs {
    /// One line of JSON instead of text
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
The file is TOML: a flag's long name, =, its value. It holds for tiny-sd, tiny-sd batch and tiny-sd
compare; tiny-sd verify takes from it only what leaves the picture as it was recorded. Flags win
over TINY_SD_MODEL and TINY_SD_DEVICE, --from over the file. A --model that is given leaves out the
file's config, vae, revision and variant; a --lora that is given, all of its LoRAs. Paths are
relative to where tiny-sd runs.

  steps = 30
  scheduler = \"euler-a\"
  model = \"org/name\"
  device = \"@/home/me/worker.url\"
  lora = [\"/home/me/ink.safetensors:0.8\"]
  low-memory = true

It is ~/.config/tiny-sd/config.toml (or in XDG_CONFIG_HOME); on macOS in ~/Library/Application
Support, on Windows in %APPDATA%. TINY_SD_CONFIG names another, or none where it is empty.

Examples:
  tiny-sd config
  tiny-sd config --json | jq .settings
  TINY_SD_CONFIG= tiny-sd \"a fox\"                 without it";

/// Its flags.
pub(super) fn command() -> Command {
    ConfigArgs::command()
}

/// Parses what follows `tiny-sd config`, and reads the file.
///
/// # Errors
/// One line that names what is wrong, in the file too.
pub(super) fn parse(
    flags: impl Iterator<Item = OsString>,
    surroundings: &dyn Surroundings,
) -> Result<Request> {
    let words = std::iter::once("tiny-sd config".into()).chain(flags);
    let args = command()
        .try_get_matches_from(words)
        .and_then(|matches| ConfigArgs::from_arg_matches(&matches));
    let ConfigArgs { json } = match args {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => return Ok(Request::Show(error)),
        Err(error) => return Err(usage(&error)),
    };
    let file = File::read(surroundings)?;
    let place = place(surroundings).map(|(path, _)| path);
    let is_there = file.is_some();
    let settings = file.map(|file| file.settings).unwrap_or_default();
    Ok(Request::Print(match json {
        true => line_of_json(place.as_deref(), is_there, &settings),
        false => lines(place.as_deref(), is_there, &settings),
    }))
}

fn lines(place: Option<&Path>, is_there: bool, settings: &BTreeMap<String, Setting>) -> String {
    let mut text = match place {
        Some(path) if is_there => format!("{}\n", path.display()),
        Some(path) => format!("{} (not there)\n", path.display()),
        None => "no file of defaults\n".to_owned(),
    };
    for (name, Setting { written, .. }) in settings {
        // A string of JSON is one of TOML.
        let _ = writeln!(text, "{name} = {}", json!(written));
    }
    text
}

fn line_of_json(
    place: Option<&Path>,
    is_there: bool,
    settings: &BTreeMap<String, Setting>,
) -> String {
    let settings: BTreeMap<_, _> =
        settings.iter().map(|(name, setting)| (name, &setting.written)).collect();
    let line = json!({
        "kind": "config",
        "path": place.map(|path| path.to_string_lossy()),
        "exists": is_there,
        "settings": settings,
    });
    format!("{line}\n")
}

#[cfg(test)]
mod tests;
