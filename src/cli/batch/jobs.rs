//! What lines of named values ask for: one task for each picture, checked as far as it can be
//! without a model. Separate because here a line becomes a [`Job`], by the flags and the types of
//! the single command.

use std::collections::HashMap;
use std::path::{Component, Path};
use std::sync::Arc;

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args as _, Command, FromArgMatches};

use super::lines::Line;
use crate::cli::alternatives::Wildcards;
use crate::cli::args::{ModelArgs, PictureArgs, RunArgs};
use crate::cli::command::usage;
use crate::cli::device::DevicePlan;
use crate::cli::inputs::Inputs;
use crate::cli::job::{Choice, Job};
use crate::cli::output::{OutputPlan, Target, before_suffix};
use crate::cli::surroundings::Surroundings;
use crate::cli::texts::check_folder;
use crate::error::{Error, Result};

/// Pictures of one batch at most.
const MAX_PICTURES: usize = 100_000;
/// The name of a picture that nobody named, so that they sort as the jobs do.
const DEFAULT_NAME: &str = "{line}-{seed}.png";

/// One picture to make.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    /// The line of the job, from 1.
    pub line: usize,
    /// Which of the job's pictures, from 1.
    pub index: usize,
    /// What it shows, and how.
    pub job: Arc<Job>,
    /// The seed of this one.
    pub seed: u64,
    /// Where it goes, below the batch's folder, with `/` between folders.
    pub output: String,
}

/// What the flags of a batch say about all of its jobs.
pub(super) struct Defaults<'a> {
    /// What a job has that has nothing of its own.
    pub picture: &'a PictureArgs,
    pub model: &'a ModelArgs,
    pub run: &'a RunArgs,
    /// Any of the batch's devices.
    pub device: &'a DevicePlan,
    /// The pictures that jobs begin with.
    pub inputs: &'a Inputs<'a>,
    /// Where files of alternatives are.
    pub surroundings: &'a dyn Surroundings,
}

/// The pictures of all lines, in their order.
///
/// # Errors
/// If a line asks for what cannot be, names its line and field; if two pictures have one place.
pub(super) fn tasks(lines: &[Line], defaults: &Defaults<'_>) -> Result<Vec<Task>> {
    let mut fields = Fields::new();
    let mut seeds = Seeds::default();
    let mut wildcards = Wildcards::new(defaults.surroundings);
    let mut tasks: Vec<Task> = Vec::new();
    for line in lines {
        let at_line = |error: Error| error.context(format!("line {}", line.number));
        let picture = fields.over(defaults.picture, &line.fields).map_err(at_line)?;
        let (folder, chosen) = (picture.wildcards.clone(), picture.chosen);
        check_folder(folder.as_deref(), defaults.surroundings).map_err(at_line)?;
        let mut job = job(picture, defaults, &mut seeds, line.number).map_err(at_line)?;
        job.read_alternatives(folder.as_deref(), chosen, &mut wildcards).map_err(at_line)?;
        let job = Arc::new(job);
        for (index, seed) in (1..=job.count.get()).zip(job.seed..=u64::MAX) {
            if tasks.len() >= MAX_PICTURES {
                return Err(at_line(Error::usage(format!("more than {MAX_PICTURES} pictures"))));
            }
            let output = output(&job, seed, index).map_err(at_line)?;
            tasks.push(Task { line: line.number, index, job: job.clone(), seed, output });
        }
    }
    check_places(&tasks, defaults.run.preview.is_some())?;
    Ok(tasks)
}

fn job(
    mut picture: PictureArgs,
    defaults: &Defaults<'_>,
    seeds: &mut Seeds,
    line: usize,
) -> Result<Job> {
    let Some(prompt) = &picture.prompt else {
        return Err(Error::usage("there is no prompt, and no --prompt for jobs without one"));
    };
    let seed = picture.seed.unwrap_or_else(|| seeds.next(prompt));
    let name = picture.output.take().unwrap_or_else(|| DEFAULT_NAME.into());
    let name = inside(&name)?.replace("{line}", &format!("{line:05}"));
    let output = OutputPlan::of_file(Path::new(&name), picture.count)?;
    let image = defaults.inputs.request(&picture)?;
    let choice = Choice { seed, output, device: defaults.device.clone(), image };
    Job::new(picture, defaults.model, defaults.run, choice)
}

/// A name that cannot leave the folder that it is in.
fn inside(name: &Path) -> Result<&str> {
    let shown = name.display();
    let Some(text) = name.to_str() else {
        return Err(Error::usage(format!("output {shown}: the name is not UTF-8")));
    };
    let stays = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    if !name.components().all(stays) || text.contains('\0') {
        return Err(Error::usage(format!(
            "output {shown}: a name in --out-dir, without .. and not from the root"
        )));
    }
    Ok(text)
}

fn output(job: &Job, seed: u64, index: usize) -> Result<String> {
    let (Target::Replace(path) | Target::Fresh(path)) = job.output.target(seed, index) else {
        return Err(Error::usage("output -: a batch has many pictures"));
    };
    let part = |part: Component<'_>| match part {
        Component::Normal(name) => Some(name.to_string_lossy().into_owned()),
        Component::CurDir | Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
            None
        }
    };
    Ok(path.components().filter_map(part).collect::<Vec<_>>().join("/"))
}

/// Two pictures in one file would be one.
fn check_places(tasks: &[Task], has_previews: bool) -> Result<()> {
    // Where file names have no case, these are one file.
    let place = |name: &str| match cfg!(any(windows, target_os = "macos")) {
        true => name.to_lowercase(),
        false => name.to_owned(),
    };
    let mut taken: HashMap<String, usize> = HashMap::new();
    for Task { line, output, .. } in tasks {
        if let Some(other) = taken.insert(place(output), *line) {
            let lines = match other == *line {
                true => format!("line {line} writes"),
                false => format!("lines {other} and {line} both write"),
            };
            return Err(Error::usage(format!(
                "{lines} {output}; {{line}}, {{seed}} or {{index}} in --output tells pictures apart"
            )));
        }
    }
    for Task { line, output, .. } in tasks {
        let folders = output.match_indices('/').filter_map(|(at, _)| output.get(..at));
        if let Some((folder, other)) =
            folders.filter_map(|folder| Some((folder, taken.get(&place(folder))?))).next()
        {
            return Err(Error::usage(format!(
                "line {other} writes {folder}, which is a folder for line {line}"
            )));
        }
    }
    for Task { line, output, .. } in tasks.iter().filter(|_| has_previews) {
        let preview = preview_name(output);
        if let Some(other) = taken.get(&place(&preview)) {
            return Err(Error::usage(format!(
                "line {other} writes {preview}, the --preview of line {line}"
            )));
        }
    }
    Ok(())
}

fn preview_name(output: &str) -> String {
    before_suffix(Path::new(output), "-preview").to_string_lossy().into_owned()
}

/// The seeds of jobs that have none: each by its prompt, so that it is the same whenever the batch
/// runs, and by how many of that prompt came before, so that they are not all alike.
#[derive(Default)]
struct Seeds(HashMap<String, u64>);

impl Seeds {
    /// 32 bits, as other tools have them.
    fn next(&mut self, prompt: &str) -> u64 {
        let before = self.0.entry(prompt.to_owned()).or_default();
        let hash = blake3::Hasher::new()
            .update(&before.to_le_bytes())
            .update(prompt.as_bytes())
            .finalize();
        *before += 1;
        let [a, b, c, d, ..] = *hash.as_bytes();
        u32::from_le_bytes([a, b, c, d]).into()
    }
}

/// The fields that a line may have: the flags of a picture, without their defaults.
struct Fields {
    command: Command,
}

impl Fields {
    fn new() -> Self {
        let command = Command::new("job").no_binary_name(true).disable_help_flag(true);
        let command = PictureArgs::augment_args_for_update(command);
        Self { command: command.mut_args(|flag| flag.default_value(Resettable::Reset)) }
    }

    /// `defaults`, and the fields of a line instead of them.
    fn over(&mut self, defaults: &PictureArgs, fields: &[(String, String)]) -> Result<PictureArgs> {
        let mut words = Vec::new();
        for (name, value) in fields {
            let flag = name.replace('_', "-");
            if !self.is_known(&flag) {
                return Err(self.unknown(name, &flag));
            }
            words.push(format!("--{flag}={value}"));
        }
        let found = self.command.try_get_matches_from_mut(words);
        let mut picture = defaults.clone();
        found
            .and_then(|matches| picture.update_from_arg_matches(&matches))
            .map_err(|error| wrong(&error))?;
        Ok(picture)
    }

    fn is_known(&self, flag: &str) -> bool {
        self.command.get_arguments().any(|argument| {
            let aliases = argument.get_all_aliases().unwrap_or_default();
            argument.get_long() == Some(flag) || aliases.contains(&flag)
        })
    }

    fn unknown(&self, name: &str, flag: &str) -> Error {
        let of_batch = ModelArgs::augment_args(RunArgs::augment_args(Command::new("batch")));
        if of_batch.get_arguments().any(|argument| argument.get_long() == Some(flag)) {
            return Error::usage(format!(
                "field {name:?}: it is the same for all jobs; give --{flag} to tiny-sd batch"
            ));
        }
        let known = self.command.get_arguments().filter_map(|argument| argument.get_long());
        let known = known.map(|flag| flag.replace('-', "_")).collect::<Vec<_>>().join(", ");
        Error::usage(format!("field {name:?} is unknown (known: {known})"))
    }
}

/// clap's words about flags as words about fields.
fn wrong(error: &clap::Error) -> Error {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let flag = text(ContextKind::InvalidArg).and_then(|flag| flag.split_whitespace().next());
    let field = flag.map(|flag| flag.trim_start_matches('-').replace('-', "_"));
    let source = std::error::Error::source(error).map(ToString::to_string);
    match (field, error.kind(), source) {
        (Some(field), ErrorKind::ArgumentConflict, _) => {
            Error::usage(format!("field {field:?} is there twice"))
        }
        (Some(field), _, Some(rule)) => {
            let value = text(ContextKind::InvalidValue).unwrap_or_default();
            Error::usage(format!("field {field:?}: {value:?} is wrong: {rule}"))
        }
        (Some(field), ErrorKind::InvalidValue, None) => {
            Error::usage(format!("field {field:?} is empty"))
        }
        _ => usage(error),
    }
}

#[cfg(test)]
mod tests {
    use super::super::args::{BatchArgs, Format, parse};
    use super::super::lines;
    use super::*;
    use crate::cli::job::tests::{Fake, job_of};

    /// The tasks of jobs with the batch's flags, separated by `|`, or the error's text.
    fn found(flags: &str, jobs: &str) -> std::result::Result<Vec<Task>, String> {
        let words = ["jobs", "--out-dir", "out"].into_iter().chain(flags.split('|'));
        let words = words.filter(|word| !word.is_empty());
        let args = parse(words.map(Into::into), &Fake::default()).map_err(|e| e.to_string())?;
        let args: BatchArgs = args.map_err(|error| error.to_string())?;
        let lines = lines::read(jobs.as_bytes(), Format::Auto).map_err(|e| e.to_string())?;
        let [device] = &*args.model.device else { panic!("one device") };
        let (fake, again) = (Fake::default(), Fake::default());
        let inputs = &Inputs::new(&fake);
        let (picture, model, run) = (&args.picture, &args.model, &args.run);
        let defaults = Defaults { picture, model, run, device, inputs, surroundings: &again };
        tasks(&lines, &defaults).map_err(|error| error.to_string())
    }

    fn outputs(flags: &str, jobs: &str) -> Vec<String> {
        found(flags, jobs).unwrap().into_iter().map(|task| task.output).collect()
    }

    #[test]
    fn a_job_is_the_single_command_of_its_fields_over_the_flags_of_the_batch() {
        for (flags, job, single) in [
            ("", "{\"prompt\": \"a\", \"seed\": 5}", "a|-s|5"),
            ("-s|5|--steps|9|-n|b", "a", "a|-s|5|--steps|9|-n|b"),
            (
                "--steps|9|-W|64",
                "{\"prompt\":\"a\",\"seed\":5,\"steps\":3}",
                "a|-s|5|--steps|3|-W|64",
            ),
            ("-n|b|--prompt|a", "{\"negative_prompt\":\"\",\"seed\":5}", "a|-s|5"),
            (
                "-g|3",
                "--prompt \"a\" --seed 5 --cfg_scale 8.5 --sampler_name \"Euler a\" --n_iter 2",
                "a|-s|5|-g|8.5|--scheduler|euler-a|--count|2",
            ),
            (
                "-m|./m|--dtype|bf16",
                "{\"prompt\":\"--\",\"seed\":0,\"height\":72,\"scheduler\":\"ddim\",\
                 \"guidance_scale\":1}",
                "--prompt|--|-s|0|-H|72|--scheduler|ddim|-g|1|-m|./m|--dtype|bf16",
            ),
        ] {
            let tasks = found(flags, job).unwrap();
            let expected = job_of(single);
            assert_eq!(tasks.len(), expected.count.get(), "{job}");
            for (index, task) in (1..).zip(&tasks) {
                let found = Job { output: expected.output.clone(), ..(*task.job).clone() };
                assert_eq!(found, expected, "{job}");
                assert_eq!((task.line, task.index), (1, index));
                assert_eq!(task.seed, expected.seed + index as u64 - 1);
            }
        }
    }

    #[test]
    fn names_are_inside_the_folder_and_tell_line_and_seed() {
        for (flags, jobs, expected) in [
            ("-s|7", "a\n\nb", &["00001-7.png", "00003-7.png"][..]),
            ("-s|7|--count|2", "a", &["00001-7.png", "00001-8.png"]),
            ("-o|{line}.png", "a\nb", &["00001.png", "00002.png"]),
            ("-o|{seed}/./x.png|-s|1", "a", &["1/x.png"]),
            (
                "-s|7",
                "{\"prompt\":\"a\",\"output\":\"x//y.png\",\"count\":2}",
                &["x/y-1.png", "x/y-2.png"],
            ),
        ] {
            assert_eq!(outputs(flags, jobs), expected, "{flags} {jobs}");
        }
    }

    #[test]
    fn a_seed_that_nobody_gave_stays_with_its_prompt_and_its_turn() {
        let seeds = |jobs: &str| -> Vec<u64> {
            found("", jobs).unwrap().into_iter().map(|task| task.seed).collect()
        };
        let [fox, other, cat] = seeds("a fox\na fox\na cat")[..] else { panic!("three") };
        assert!(fox != other && fox != cat && other != cat);
        assert_eq!(seeds("a cat\n# new\na dog\na fox\na fox")[2..], [fox, other]);
        // Pinned: another way to derive them makes every picture of every batch again.
        assert_eq!(fox, 360_580_364);
    }

    #[test]
    fn what_cannot_be_is_an_error_that_names_line_and_field() {
        for (flags, jobs, expected) in [
            (
                "",
                "{\"prompt\":\"a\"}\n{\"prompt\":\"a\",\"steps\":0}",
                "line 2: field \"steps\": \"0\" is wrong: a whole number, 1 to 1000",
            ),
            (
                "",
                "{\"prompt\":\"a\",\"width\":100}",
                "field \"width\": \"100\" is wrong: a multiple of 8",
            ),
            (
                "",
                "{\"prompt\":\"a\",\"image\":\"b.png\"}",
                "line 1: --image b.png: there is no such file",
            ),
            ("", "{\"prompt\":\"a\",\"mask\":\"b.png\"}", "line 1: --mask says what"),
            ("", "{\"prompt\":\"a\",\"strength\":2}", "field \"strength\": \"2\" is wrong: a num"),
            ("", "{\"prompt\":\"a\",\"seed\":-1}", "field \"seed\": \"-1\" is wrong: a seed is"),
            ("", "{\"prompt\":\"a\",\"steps\":2.5}", "\"2.5\" is wrong"),
            ("", "{\"prompt\":\"a\",\"scheduler\":\"eular\"}", "did you mean euler?"),
            ("", "{\"prompt\":\"a\",\"output\":\"\"}", "field \"output\" is empty"),
            (
                "",
                "{\"prompt\":\"a\",\"stesp\":3}",
                "line 1: field \"stesp\" is unknown (known: prompt, negative_prompt",
            ),
            ("", "{\"prompt\":\"a\",\"\":3}", "field \"\" is unknown"),
            ("", "{\"prompt\":\"a\",\"device\":\"cpu\"}", "give --device to tiny-sd batch"),
            (
                "",
                "{\"prompt\":\"a\",\"cfg_scale\":1,\"guidance_scale\":1}",
                "\"guidance_scale\" is there twice",
            ),
            ("", "{\"seed\":1}", "line 1: there is no prompt"),
            (
                "-s|18446744073709551615",
                "--prompt a --count 2",
                "line 1: --seed 18446744073709551615",
            ),
            ("", "{\"prompt\":\"a\",\"output\":\"../x.png\"}", "without .."),
            ("", "{\"prompt\":\"a\",\"output\":\"/x.png\"}", "not from the root"),
            ("", "{\"prompt\":\"a\",\"output\":\"-\"}", "must end in .png"),
            ("", "{\"prompt\":\"a\",\"output\":\"x.gif\"}", "must end in .png"),
            ("-o|x.png", "a\n#\nb", "lines 1 and 3 both write x.png"),
            ("-o|a/x.png", "a\n--prompt b --output ./a//x.png", "lines 1 and 2 both write a/x.png"),
            (
                "-s|1",
                "--prompt a --output x/y.png/z.png\n--prompt b --output x/y.png",
                "line 2 writes x/y.png, which is a folder for line 1",
            ),
            (
                "--preview|5|-s|1",
                "--prompt a --output x.png\n--prompt b --output x-preview.png",
                "line 2 writes x-preview.png, the --preview of line 1",
            ),
            ("--count|10000", &"a\n".repeat(11), "line 11: more than 100000 pictures"),
        ] {
            let error = found(flags, jobs).unwrap_err();
            assert!(error.contains(expected), "{jobs}: {error}");
        }
    }
}
