//! How users name schedulers: ours, diffusers' classes, AUTOMATIC1111's and stable-diffusion.cpp's
//! samplers. Separate because all of them come from the one table, and whatever reads or writes a
//! name (flags, batches, pictures' metadata) asks here.

use std::fmt;

use super::{SchedulerKind, SigmaSchedule};
use crate::{Error, Result};

/// What the table says of a scheduler.
#[derive(Debug)]
pub struct SchedulerInfo {
    /// The name on the command line, such as `dpm++2m`.
    pub name: &'static str,
    /// diffusers' class, as `_class_name` in a configuration names it.
    pub class_name: &'static str,
    /// AUTOMATIC1111's name, for the "Sampler" of a picture's metadata; ours where it has none.
    pub label: &'static str,
    /// More names that other programs have for it.
    pub other_names: &'static [&'static str],
    /// What of its class's configuration it is, where the class is more than one scheduler.
    pub(super) algorithm_type: Option<&'static str>,
    /// Whether its class takes the sigma schedules.
    pub takes_sigma_schedules: bool,
    /// What a user should know who chooses it.
    pub note: &'static str,
}

/// A scheduler as users name it: the algorithm, and how its sigmas are spaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerChoice {
    kind: SchedulerKind,
    sigmas: Option<SigmaSchedule>,
}

/// As the model's configuration spaces the sigmas.
impl From<SchedulerKind> for SchedulerChoice {
    fn from(kind: SchedulerKind) -> Self {
        Self { kind, sigmas: None }
    }
}

/// The name on the command line, such as `dpm++2m-karras`.
impl fmt::Display for SchedulerChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.name())?;
        self.sigmas.map_or(Ok(()), |sigmas| write!(f, "-{}", sigmas.name()))
    }
}

impl SchedulerChoice {
    /// A choice, none if the scheduler does not take the sigma schedule.
    pub fn new(kind: SchedulerKind, sigmas: Option<SigmaSchedule>) -> Option<Self> {
        let is_taken = sigmas.is_none() || kind.info().takes_sigma_schedules;
        is_taken.then_some(Self { kind, sigmas })
    }

    /// The algorithm.
    pub fn kind(self) -> SchedulerKind {
        self.kind
    }

    /// How the sigmas are spaced, if not as the model's configuration says.
    pub fn sigmas(self) -> Option<SigmaSchedule> {
        self.sigmas
    }

    /// AUTOMATIC1111's name of the algorithm, for the "Sampler" of a picture's metadata.
    pub fn label(self) -> &'static str {
        self.kind.info().label
    }

    /// The scheduler of any of the names, with or without a sigma schedule at the end.
    ///
    /// # Errors
    /// An unknown name: the nearest one, and all of ours.
    pub fn parse(name: &str) -> Result<Self> {
        if let Some(choice) = Self::find(name) {
            return Ok(choice);
        }
        let known = || SchedulerKind::ALL.iter().map(|kind| kind.name());
        let near = known().map(|known| (edit_distance(&name.to_lowercase(), known), known)).min();
        let hint = match (split(name), near) {
            (Some((kind, sigmas)), _) => {
                format!("{} has no {} sigmas ", kind.name(), sigmas.name())
            }
            (None, Some((distance, near))) if distance <= 2 => format!("did you mean {near}? "),
            (None, _) => String::new(),
        };
        let shown: String = name.chars().take(100).collect();
        Err(Error::usage(format!(
            "--scheduler {shown:?} is unknown: {hint}(known: {}; `tiny-sd schedulers` says more)",
            known().collect::<Vec<_>>().join(", ")
        )))
    }

    /// The scheduler of a name, if there is one.
    pub fn find(name: &str) -> Option<Self> {
        if let Some(kind) = kind_of(&plain(name)) {
            return Some(kind.into());
        }
        let (kind, sigmas) = split(name)?;
        Self::new(kind, Some(sigmas))
    }
}

/// A name that ends in a sigma schedule, taken apart.
fn split(name: &str) -> Option<(SchedulerKind, SigmaSchedule)> {
    let name = plain(name);
    SigmaSchedule::ALL.into_iter().find_map(|sigmas| {
        let kind = kind_of(name.strip_suffix(sigmas.name())?)?;
        Some((kind, sigmas))
    })
}

fn kind_of(plain_name: &str) -> Option<SchedulerKind> {
    let is_named = |kind: &&SchedulerKind| {
        let info = kind.info();
        // The class of two schedulers is the first one's.
        let class = plain(info.class_name);
        let names = [info.name, info.label, info.class_name].into_iter();
        let mut names = names.chain(info.other_names.iter().copied());
        names.any(|known| plain(known) == plain_name)
            || class.strip_suffix("scheduler") == Some(plain_name)
    };
    SchedulerKind::ALL.iter().find(is_named).copied()
}

/// A name without what programs write in several ways: `DPM++ 2M`, `dpm++2m` and `dpmpp_2m`.
fn plain(name: &str) -> String {
    let name = name.chars().take(100).filter(|c| !matches!(c, ' ' | '-' | '_'));
    name.flat_map(char::to_lowercase).map(|c| if c == '+' { 'p' } else { c }).collect()
}

/// Levenshtein's distance.
fn edit_distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    // Names are short; what a user types may not be.
    for (index, a) in left.chars().take(64).enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], index + 1);
        for (column, b) in right.iter().enumerate() {
            let cost = diagonal + usize::from(a != *b);
            diagonal = row[column + 1];
            row[column + 1] = cost.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_has_its_own_names() {
        for (typed, expected) in [
            ("DPMSolverMultistepScheduler", "dpm++2m"),
            ("DPMSolverMultistep", "dpm++2m"),
            ("DPM++ 2M Karras", "dpm++2m-karras"),
            ("DPM++ 2M SDE Exponential", "dpm++2m-sde-exponential"),
            ("dpmpp2m", "dpm++2m"),
            ("dpmpp_2m_sde", "dpm++2m-sde"),
            ("Euler a", "euler-a"),
            ("euler_a", "euler-a"),
            ("euler_ancestral", "euler-a"),
            ("EulerAncestralDiscreteScheduler", "euler-a"),
            ("DPM2 a Karras", "kdpm2-a-karras"),
            ("dpm2", "kdpm2"),
            ("PLMS", "pndm"),
            ("UniPC", "unipc"),
            ("LMS Karras", "lms-karras"),
            ("unipc-beta", "unipc-beta"),
        ] {
            let found = SchedulerChoice::parse(typed).expect(typed);
            assert_eq!(found.to_string(), expected, "{typed}");
        }
    }

    #[test]
    fn every_name_that_is_shown_is_parsed_and_no_two_schedulers_share_one() {
        let mut seen: Vec<(String, SchedulerKind)> = Vec::new();
        for kind in SchedulerKind::ALL.iter().copied() {
            let sigmas = SigmaSchedule::ALL.map(Some).into_iter().chain([None]);
            for choice in sigmas.filter_map(|sigmas| SchedulerChoice::new(kind, sigmas)) {
                assert_eq!(SchedulerChoice::parse(&choice.to_string()).ok(), Some(choice));
            }
            let info = kind.info();
            for name in [info.name, info.label].iter().chain(info.other_names) {
                assert_eq!(SchedulerChoice::find(name), Some(kind.into()), "{name}");
                let name = plain(name);
                assert!(seen.iter().all(|(other, k)| *other != name || *k == kind), "{name}");
                seen.push((name, kind));
            }
        }
    }

    #[test]
    fn a_misspelt_name_is_answered() {
        for (typed, answer) in [
            ("eluer", "did you mean euler?"),
            ("dpm++2n", "did you mean dpm++2m?"),
            ("something", "(known: dpm++2m, "),
            ("euler-a-karras", "euler-a has no karras sigmas"),
            ("", "--scheduler \"\" is unknown"),
        ] {
            let error = SchedulerChoice::parse(typed).expect_err(typed);
            assert!(error.to_string().contains(answer), "{error}");
            assert_eq!(error.kind(), crate::error::Kind::Usage);
        }
    }
}
