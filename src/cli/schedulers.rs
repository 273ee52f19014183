//! `tiny-sd schedulers`: what `--scheduler` takes. Separate because its product is text on standard
//! output, and nothing is loaded for it.

use std::ffi::OsString;
use std::fmt::Write as _;

use clap::{CommandFactory, FromArgMatches, Parser};
use serde_json::json;

use super::command::usage;
use super::job::Request;
use super::print;
use crate::error::Result;
use crate::schedule::{SchedulerInfo, SchedulerKind, SigmaSchedule};

/// How the list is printed.
#[derive(Debug, Parser)]
#[command(
    name = "tiny-sd schedulers",
    about = "Lists the schedulers that --scheduler takes.",
    after_help = AFTER_HELP
)]
struct SchedulersArgs {
    /// A line of JSON for each scheduler instead of text
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Each has its own name, the name of its class in diffusers, with or without Scheduler at its end, and
the one of its sampler in AUTOMATIC1111's web UI; --scheduler takes any of them, also as other
programs write them (dpmpp_2m, euler_a). Capital letters, spaces, - and _ make no difference.

Examples:
  tiny-sd schedulers
  tiny-sd schedulers --json | jq -r .name
  tiny-sd \"a fox\" --scheduler dpm++2m-karras
  tiny-sd \"a fox\" --scheduler \"DPM++ 2M Karras\"
  tiny-sd \"a fox\" --scheduler EulerAncestralDiscreteScheduler";

/// How the list is to be printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulersJob {
    is_json: bool,
}

/// Its flags.
pub(super) fn command() -> clap::Command {
    SchedulersArgs::command()
}

/// Parses what follows `tiny-sd schedulers`.
///
/// # Errors
/// One line that names what is wrong.
pub(super) fn parse(flags: impl Iterator<Item = OsString>) -> Result<Request> {
    let words = std::iter::once("tiny-sd schedulers".into()).chain(flags);
    let args = command()
        .try_get_matches_from(words)
        .and_then(|matches| SchedulersArgs::from_arg_matches(&matches));
    match args {
        Ok(SchedulersArgs { json }) => Ok(Request::Schedulers(SchedulersJob { is_json: json })),
        Err(error) if !error.use_stderr() => Ok(Request::Show(error)),
        Err(error) => Err(usage(&error)),
    }
}

/// Lists the schedulers on standard output.
///
/// # Errors
/// If it cannot be written.
pub fn list_schedulers(job: SchedulersJob) -> Result<()> {
    print(&if job.is_json { lines_of_json() } else { table() })
}

fn lines_of_json() -> String {
    let line = |kind: &SchedulerKind| {
        let info = kind.info();
        let sigmas = SigmaSchedule::ALL.into_iter().filter(|_| info.takes_sigma_schedules);
        let sigmas: Vec<_> = sigmas.map(SigmaSchedule::name).collect();
        let line = json!({
            "kind": "scheduler",
            "name": info.name,
            "diffusers_class": info.class_name,
            "sampler": info.label,
            "other_names": info.other_names,
            "sigma_schedules": sigmas,
            "note": info.note,
        });
        format!("{line}\n")
    };
    SchedulerKind::ALL.iter().map(line).collect()
}

fn table() -> String {
    let rows: Vec<[&str; 4]> = SchedulerKind::ALL
        .iter()
        .map(|kind| {
            let SchedulerInfo { name, class_name, label, note, .. } = kind.info();
            [*name, class_name, label, note]
        })
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths = [0, 1, 2].map(width);
    let mut text = String::new();
    for [name, class_name, label, note] in &rows {
        let [first, second, third] = widths;
        let row = format!("{name:first$}  {class_name:second$}  {label:third$}  {note}");
        let _ = writeln!(text, "{row}");
    }
    let spread = SchedulerKind::ALL.iter().filter(|kind| kind.info().takes_sigma_schedules);
    let spread: Vec<_> = spread.map(|kind| kind.name()).collect();
    let suffixes = SigmaSchedule::ALL.map(|sigmas| format!("-{}", sigmas.name()));
    let _ = writeln!(text, "\nWith {} at the end: {}.", suffixes.join(", "), spread.join(", "));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::job::tests::{Fake, parse_words};
    use crate::schedule::SchedulerChoice;

    #[test]
    fn every_name_in_the_list_is_taken_by_the_flag() {
        let text = lines_of_json();
        let mut count = 0;
        for line in text.lines() {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            for field in ["name", "sampler"] {
                let name = value[field].as_str().unwrap();
                let choice = SchedulerChoice::parse(name).unwrap();
                assert_eq!(choice.to_string(), value["name"], "{name}");
                assert!(table().contains(name));
            }
            for sigmas in value["sigma_schedules"].as_array().unwrap() {
                let name =
                    format!("{}-{}", value["name"].as_str().unwrap(), sigmas.as_str().unwrap());
                SchedulerChoice::parse(&name).unwrap();
                count += 1;
            }
        }
        assert_eq!((text.lines().count(), count), (SchedulerKind::ALL.len(), 30));
        assert!(table().lines().all(|line| line.len() <= 150), "{}", table());
    }

    #[test]
    fn the_command_takes_json_and_nothing_else() {
        let mut fake = Fake::default();
        for (words, is_json) in [("schedulers", false), ("schedulers|--json", true)] {
            match parse_words(words, &mut fake) {
                Ok(Request::Schedulers(job)) => assert_eq!(job.is_json, is_json),
                other => panic!("{words}: {other:?}"),
            }
        }
        for (words, expected) in [
            ("schedulers|euler", "unexpected argument 'euler'"),
            ("scheduler", "did you mean \"tiny-sd schedulers\"?"),
        ] {
            let error = parse_words(words, &mut fake).unwrap_err().to_string();
            assert!(error.contains(expected), "{words}: {error}");
        }
    }
}
