//! Where pictures go: the meaning of `--output`. Separate because names are decided before
//! anything is loaded and without touching the disk; `files.rs` writes.

use std::path::{Path, PathBuf};

use super::surroundings::{At, Surroundings};
use super::values::Count;
use crate::error::{Error, Result};
use crate::image::FileFormat;

/// The name of a picture that nobody named.
const DEFAULT_NAME: &str = "tiny-sd-{seed}.png";

/// Where a job's pictures go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputPlan {
    /// The one picture goes to standard output.
    Stdout,
    /// The one picture replaces what is at this path.
    Replace(PathBuf),
    /// Each picture gets a name of its own and replaces nothing; `{seed}` and `{index}` are
    /// filled in.
    Fresh(PathBuf),
}

/// Where one picture goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Standard output.
    Stdout,
    /// This path, whatever is there.
    Replace(PathBuf),
    /// This path, or the next free name after it.
    Fresh(PathBuf),
}

impl Target {
    /// The kind of file that goes there: what the name says, or PNG where it says nothing.
    pub(super) fn format(&self) -> FileFormat {
        match self {
            Target::Stdout => FileFormat::Png,
            Target::Replace(path) | Target::Fresh(path) => {
                FileFormat::of_name(path).unwrap_or(FileFormat::Png)
            }
        }
    }
}

impl OutputPlan {
    /// What `--output` means for `count` pictures.
    ///
    /// # Errors
    /// If the name is no name of a picture, or one place is asked to hold several pictures.
    pub(super) fn new(
        output: Option<&Path>,
        count: Count,
        surroundings: &dyn Surroundings,
    ) -> Result<Self> {
        let Some(path) = output else { return Ok(OutputPlan::Fresh(DEFAULT_NAME.into())) };
        let only_one = |plan| match count.get() {
            1 => Ok(plan),
            count => Err(Error::usage(format!(
                "--output {} takes one picture, --count {count} makes more",
                path.display()
            ))),
        };
        if path == Path::new("-") || (cfg!(unix) && path == Path::new("/dev/stdout")) {
            if surroundings.stdout_is_terminal() {
                return Err(Error::usage(
                    "standard output is a terminal; send the picture on: … --output - > out.png",
                ));
            }
            return only_one(OutputPlan::Stdout);
        }
        match surroundings.at(path) {
            At::Folder => return Ok(OutputPlan::Fresh(path.join(DEFAULT_NAME))),
            At::Device => return only_one(OutputPlan::Replace(path.to_owned())),
            At::Nothing | At::File => {}
        }
        let shown = path.display();
        if path.as_os_str().to_string_lossy().ends_with(std::path::is_separator) {
            return Err(Error::usage(format!("--output {shown}: there is no such folder")));
        }
        Self::of_file(path, count)
    }

    /// What the name of a file means for `count` pictures.
    ///
    /// # Errors
    /// If it is no name of a picture, or cannot be numbered.
    pub(super) fn of_file(path: &Path, count: Count) -> Result<Self> {
        let (shown, count) = (path.display(), count.get());
        if FileFormat::of_name(path).is_none() {
            let suffixes = FileFormat::SUFFIXES;
            return Err(Error::usage(format!("--output {shown}: the name must end in {suffixes}")));
        }
        match (path.to_str(), count) {
            (Some(name), _) if name.contains("{index}") => Ok(OutputPlan::Fresh(path.to_owned())),
            (Some(name), _) if name.contains("{seed}") => Ok(OutputPlan::Fresh(path.to_owned())),
            (_, 1) => Ok(OutputPlan::Replace(path.to_owned())),
            (Some(_), _) => Ok(OutputPlan::Fresh(before_suffix(path, "-{index}"))),
            (None, _) => Err(Error::usage(format!(
                "--output {shown}: with --count {count} the name must be UTF-8, to be numbered"
            ))),
        }
    }

    /// Where the picture of `seed` goes, the `index`-th of the job, counted from 1.
    pub fn target(&self, seed: u64, index: usize) -> Target {
        match self {
            OutputPlan::Stdout => Target::Stdout,
            OutputPlan::Replace(path) => Target::Replace(path.clone()),
            OutputPlan::Fresh(template) => Target::Fresh(match template.to_str() {
                Some(name) => fill_in(name, seed, index).into(),
                None => {
                    let folder = template.parent().unwrap_or(Path::new(""));
                    folder.join(fill_in(DEFAULT_NAME, seed, index))
                }
            }),
        }
    }
}

fn fill_in(name: &str, seed: u64, index: usize) -> String {
    name.replace("{seed}", &seed.to_string()).replace("{index}", &index.to_string())
}

/// `folder/stem.png` with something between stem and suffix.
pub(super) fn before_suffix(path: &Path, what: &str) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(what);
    if let Some(suffix) = path.extension() {
        name.push(".");
        name.push(suffix);
    }
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Request;
    use crate::cli::job::tests::{Fake, parse_words};

    /// The targets of a job with seed 42, or the error's text.
    fn targets(words: &str, surroundings: &mut Fake) -> std::result::Result<Vec<Target>, String> {
        match parse_words(&format!("x|-s|42|{words}"), surroundings) {
            Ok(Request::Paint(job)) => {
                let count = job.count.get();
                Ok((1..=count).zip(42..).map(|(at, seed)| job.output.target(seed, at)).collect())
            }
            Ok(other) => panic!("{words:?} gave {other:?}"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn names_are_filled_in_numbered_and_protected_as_the_help_says() {
        let replace = |name: &str| Target::Replace(name.into());
        let fresh = |name: &str| Target::Fresh(name.into());
        let there = vec![("dir", At::Folder), ("pipe", At::Device), ("a.png", At::File)];
        let mut fake = Fake { there, ..Fake::default() };
        for (words, expected) in [
            ("-q", vec![fresh("tiny-sd-42.png")]),
            ("--count|2", vec![fresh("tiny-sd-42.png"), fresh("tiny-sd-43.png")]),
            ("-o|a.png", vec![replace("a.png")]),
            ("-o|b/c.PNG", vec![replace("b/c.PNG")]),
            ("-o|b.jpeg", vec![replace("b.jpeg")]),
            ("-o|b.webp|--count|2", vec![fresh("b-1.webp"), fresh("b-2.webp")]),
            ("-o|a.png|--count|2", vec![fresh("a-1.png"), fresh("a-2.png")]),
            ("-o|d.e/x.y.png|--count|2", vec![fresh("d.e/x.y-1.png"), fresh("d.e/x.y-2.png")]),
            ("-o|{seed}/{index}.png|--count|2", vec![fresh("42/1.png"), fresh("43/2.png")]),
            ("-o|a{seed}.png|--count|2", vec![fresh("a42.png"), fresh("a43.png")]),
            ("-o|a{index}.png", vec![fresh("a1.png")]),
            ("-o|a{sed}.png", vec![replace("a{sed}.png")]),
            ("-o|dir", vec![fresh("dir/tiny-sd-42.png")]),
            ("-o|dir/|--count|1", vec![fresh("dir/tiny-sd-42.png")]),
            ("-o|-", vec![Target::Stdout]),
            ("-o|pipe", vec![replace("pipe")]),
        ] {
            assert_eq!(targets(words, &mut fake), Ok(expected), "{words}");
        }
    }

    #[test]
    fn a_place_that_cannot_hold_the_pictures_is_an_error() {
        let mut fake = Fake { there: vec![("pipe", At::Device)], ..Fake::default() };
        for (words, expected) in [
            ("-o|a.gif", "the name must end in .png, .jpg, .jpeg or .webp"),
            ("-o|a", "the name must end in .png"),
            ("-o|", "a value is required for '--output"),
            ("-o|.png", "the name must end in .png"),
            ("-o|no/", "there is no such folder"),
            ("-o|-|--count|2", "takes one picture, --count 2 makes more"),
            ("-o|pipe|--count|2", "takes one picture, --count 2 makes more"),
        ] {
            let error = targets(words, &mut fake).unwrap_err();
            assert!(error.contains(expected), "{words}: {error}");
        }
        fake.stdout_is_terminal = true;
        assert!(targets("-o|-", &mut fake).unwrap_err().contains("is a terminal"));
    }
}
