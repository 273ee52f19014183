//! What `--model`, `--revision` and `--variant` name. Separate because these names become paths
//! and addresses: what passes here cannot leave the folder or the repository it is used in.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::weights::built_in;

/// Where a model comes from, by the look of its name alone: whether it is there, loading says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// A repository on the hub, `org/name`.
    Hub(String),
    /// A folder in diffusers layout.
    Folder(PathBuf),
    /// A model in one file.
    File(PathBuf),
    /// The model in the program.
    BuiltIn,
}

/// How the names of models in one file end.
const FILE_SUFFIXES: [&str; 6] = ["safetensors", "ckpt", "pt", "pth", "bin", "gguf"];

fn is_called_like_a_file(path: &Path) -> bool {
    let suffix = path.extension().and_then(|suffix| suffix.to_str()).unwrap_or_default();
    FILE_SUFFIXES.iter().any(|known| suffix.eq_ignore_ascii_case(known))
}

impl ModelSource {
    /// The name without organisation or parent folders, as it is recorded in pictures.
    pub fn short_name(&self) -> String {
        match self {
            ModelSource::Hub(repo) => repo.rsplit('/').next().unwrap_or(repo).to_owned(),
            ModelSource::BuiltIn => built_in::NAME.to_owned(),
            ModelSource::File(path) => {
                path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
            }
            ModelSource::Folder(path) => {
                // `.` has no name, what it stands for has.
                let path = path.canonicalize().unwrap_or_else(|_| path.clone());
                path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
            }
        }
    }
}

impl ModelSource {
    /// As it is recorded in pictures: a folder is written so that it is read as one again, also
    /// where there is none.
    pub fn recorded(&self) -> String {
        match self {
            ModelSource::Hub(repo) => repo.clone(),
            ModelSource::BuiltIn => built_in::NAME.to_owned(),
            // Its suffix says what it is.
            ModelSource::File(path) => path.to_string_lossy().into_owned(),
            ModelSource::Folder(path) => {
                let text = path.to_string_lossy();
                match is_written_like_a_path(&text) || path.is_absolute() {
                    true => text.into_owned(),
                    false => format!("./{text}"),
                }
            }
        }
    }
}

impl ModelSource {
    /// Whether what is said of the model is of its kind.
    ///
    /// # Errors
    /// A usage error that names what is not.
    pub fn check(
        &self,
        revision: Option<&HubName>,
        variant: Option<&HubName>,
        configs: Option<&Path>,
    ) -> Result<()> {
        let kind = match self {
            ModelSource::Hub(_) => "a repository",
            ModelSource::Folder(_) => "a folder",
            ModelSource::File(_) => "a file",
            ModelSource::BuiltIn => "the built-in model",
        };
        let is_file = matches!(self, ModelSource::File(_));
        let has_files = matches!(self, ModelSource::Hub(_) | ModelSource::Folder(_));
        if let (Some(revision), false) = (revision, matches!(self, ModelSource::Hub(_))) {
            return Err(Error::usage(format!(
                "--revision {} is for repositories of the hub; {self} is {kind}",
                revision.as_str()
            )));
        }
        if let (Some(variant), false) = (variant, has_files) {
            return Err(Error::usage(format!(
                "--variant {} chooses among several files; {self} is {kind}",
                variant.as_str()
            )));
        }
        if let (Some(configs), false) = (configs, is_file) {
            return Err(Error::usage(format!(
                "--config {} is for a model in one file; {self} is {kind} and has its own",
                configs.display()
            )));
        }
        Ok(())
    }
}

impl fmt::Display for ModelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModelSource::Hub(repo) => f.write_str(repo),
            ModelSource::BuiltIn => f.write_str(built_in::NAME),
            ModelSource::Folder(path) | ModelSource::File(path) => path.display().fmt(f),
        }
    }
}

/// The built-in model by its name, a folder if it exists, a file if it is called like one, a folder
/// if it is written like a path, else a repository if it can be one.
impl FromStr for ModelSource {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text == built_in::NAME {
            return Ok(ModelSource::BuiltIn);
        }
        let path = Path::new(text);
        if !path.is_dir() && is_called_like_a_file(path) {
            return Ok(ModelSource::File(path.to_owned()));
        }
        if path.is_file() {
            return Err("it is a file; a model is a .safetensors or .ckpt, a folder in diffusers \
                        layout, or org/name"
                .into());
        }
        if path.is_dir() || is_written_like_a_path(text) {
            return Ok(ModelSource::Folder(path.to_owned()));
        }
        match text.split_once('/') {
            Some((org, name)) if is_repository_part(org) && is_repository_part(name) => {
                Ok(ModelSource::Hub(text.to_owned()))
            }
            _ => Err("there is no such folder, and a repository is written org/name, such as \
                      segmind/tiny-sd; the built-in model is called demo"
                .into()),
        }
    }
}

fn is_written_like_a_path(text: &str) -> bool {
    let starts = ["./", "../", "/", "~"].iter().any(|start| text.starts_with(start));
    starts || text == "." || text == ".." || text.contains('\\')
}

/// The hub's rule (`validate_repo_id` of huggingface_hub).
fn is_repository_part(part: &str) -> bool {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !part.is_empty()
        && part.len() <= 96
        && part.chars().all(is_allowed)
        && !part.starts_with(['-', '.'])
        && !part.ends_with(['-', '.'])
        && !part.contains("..")
        && !part.contains("--")
}

/// A revision or a variant: text that is safe as part of a path and of an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName(String);

impl HubName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for HubName {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_./+@".contains(c);
        let parts_are_names =
            text.split('/').all(|part| !part.is_empty() && !part.starts_with('.'));
        if text.len() <= 255 && text.chars().all(is_allowed) && parts_are_names {
            Ok(HubName(text.to_owned()))
        } else {
            Err("letters, digits and - _ . / + @ only, such as main, v1.0 or fp16".into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_a_folder_by_its_look_or_a_repository_by_its_name() {
        let hub = |text: &str| Ok(ModelSource::Hub(text.into()));
        let folder = |text: &str| Ok(ModelSource::Folder(text.into()));
        let file = |text: &str| Ok(ModelSource::File(text.into()));
        let neither = Err("there is no such folder");
        for (text, expected) in [
            ("segmind/tiny-sd", hub("segmind/tiny-sd")),
            ("a/b.c_d-1", hub("a/b.c_d-1")),
            ("demo", Ok(ModelSource::BuiltIn)),
            ("./demo", folder("./demo")),
            ("src", folder("src")),
            ("src/cli", folder("src/cli")),
            ("./no/such", folder("./no/such")),
            ("../no", folder("../no")),
            ("/no/such/folder", folder("/no/such/folder")),
            ("~/models/x", folder("~/models/x")),
            (".", folder(".")),
            (r"C:\models", folder(r"C:\models")),
            ("Cargo.toml", Err("it is a file")),
            ("./Cargo.toml", Err("it is a file")),
            ("v1-5.safetensors", file("v1-5.safetensors")),
            ("no/such.CKPT", file("no/such.CKPT")),
            ("../x.ckpt", file("../x.ckpt")),
            ("tiny-sd", neither.clone()),
            ("a/b/c", neither.clone()),
            ("a/..", neither.clone()),
            ("a/b?x", neither.clone()),
            ("https://huggingface.co/a/b", neither.clone()),
            ("", neither),
        ] {
            match (text.parse::<ModelSource>(), expected) {
                (Ok(parsed), Ok(expected)) => assert_eq!(parsed, expected, "{text:?}"),
                (Err(message), Err(expected)) => assert!(message.contains(expected), "{message}"),
                (parsed, _) => panic!("{text:?} became {parsed:?}"),
            }
        }
    }

    #[test]
    fn the_short_name_is_what_people_call_the_model() {
        let here = env!("CARGO_MANIFEST_DIR");
        let last = Path::new(here).file_name().unwrap().to_str().unwrap();
        for (text, expected) in [
            ("segmind/tiny-sd", "tiny-sd"),
            ("demo", "demo"),
            ("./no/such/", "such"),
            ("a/v1-5-pruned.safetensors", "v1-5-pruned"),
            (here, last),
            (".", last),
        ] {
            assert_eq!(text.parse::<ModelSource>().unwrap().short_name(), expected);
        }
    }

    #[test]
    fn revisions_and_variants_cannot_leave_their_place() {
        for text in ["main", "v1.0", "refs/pr/3", "fp16", "ema-only"] {
            assert_eq!(text.parse::<HubName>().unwrap().as_str(), text);
        }
        for text in ["", "..", "../x", "a/../b", "/etc", "a//b", "a b", "a?b", "a#b", "a\\b", "é"]
        {
            assert!(text.parse::<HubName>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_folder_that_looks_like_a_repository_is_recorded_as_a_folder() {
        for (source, expected) in [
            (ModelSource::Hub("org/name".into()), "org/name"),
            (ModelSource::File("org/name.ckpt".into()), "org/name.ckpt"),
            (ModelSource::BuiltIn, "demo"),
            (ModelSource::Folder("demo".into()), "./demo"),
            (ModelSource::Folder("org/name".into()), "./org/name"),
            (ModelSource::Folder("../name".into()), "../name"),
            (ModelSource::Folder("/a/b".into()), "/a/b"),
        ] {
            assert_eq!(source.recorded(), expected);
            let again = expected.parse::<ModelSource>().unwrap();
            assert_eq!(std::mem::discriminant(&again), std::mem::discriminant(&source));
        }
    }
}
