//! The settings of a picture as flags: what `--from` and `verify` make of what a file says of
//! itself. Separate because flags come from a command line, and these from strangers' files.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::ArgMatches;
use clap::parser::ValueSource;

use super::args::Args;
use super::inputs::{Inputs, read_picture};
use super::model::ModelSource;
use super::settings::{FileRecord, ModelRecord, Settings, newer_schema};
use super::surroundings::Surroundings;
use crate::error::{Error, Result};
use crate::image::{Infotext, PictureTexts};
use crate::pipeline::PromptSyntax;
use crate::schedule::{SchedulerChoice, SchedulerKind, SigmaSchedule};

/// Names of the schedule that models have by themselves.
const OWN_SCHEDULES: [&str; 6] = ["", "automatic", "default", "discrete", "normal", "uniform"];
/// Schedules that samplers once ended in, and that are not here or not every sampler's.
const OTHER_SCHEDULES: [&str; 9] = [
    "karras",
    "exponential",
    "beta",
    "polyexponential",
    "sgm_uniform",
    "simple",
    "smoothstep",
    "ays",
    "gits",
];
/// Values that are used, or that change no picture.
const KNOWN_VALUES: [&str; 13] = [
    "Steps",
    "Sampler",
    "Schedule type",
    "CFG scale",
    "Clip skip",
    "Seed",
    "Size",
    "Model hash",
    "VAE hash",
    "Version",
    "RNG",
    "Guidance",
    "Eta",
];

/// Fills in what `--from` says, if it is there, where the user gave no flag; returns what the user
/// should know.
///
/// # Errors
/// If the picture cannot be read, or says what cannot be.
pub(super) fn fill_in(
    args: &mut Args,
    matches: &ArgMatches,
    surroundings: &dyn Surroundings,
) -> Result<Vec<String>> {
    let Some(path) = args.from.clone() else { return Ok(Vec::new()) };
    let is_given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    fill_in_from(args, &is_given, &path, surroundings)
        .map_err(|error| error.context(format!("--from {}", path.display())))
}

fn fill_in_from(
    args: &mut Args,
    is_given: &dyn Fn(&str) -> bool,
    path: &Path,
    surroundings: &dyn Surroundings,
) -> Result<Vec<String>> {
    let file = read_picture(path, surroundings)?;
    let texts = PictureTexts::read(&file)?;
    let mut filling = Filling { args, is_given };
    match (&texts.record, &texts.parameters) {
        (Some(record), _) => {
            let settings = Settings::from_json(record)?;
            filling.take_record(&settings)?;
            let newer = newer_schema(settings.schema);
            let newer = newer.map(|note| format!("{}: {note}", path.display()));
            let changed = Inputs::new(surroundings).changed(&settings, is_given);
            Ok(newer.into_iter().chain(changed).collect())
        }
        (None, Some(text)) if !text.trim().is_empty() => {
            let found = Infotext::parse(text);
            filling.take_infotext(&found)?;
            let note = note(&found, filling.has_image());
            Ok(note.map(|note| format!("{}: {note}", path.display())).into_iter().collect())
        }
        (None, Some(_) | None) => Err(Error::usage("it says nothing about how it was made")),
    }
}

/// Flags that are filled in.
pub(super) struct Filling<'a> {
    /// All of them.
    pub args: &'a mut Args,
    /// Whether the user gave the flag of this name.
    pub is_given: &'a dyn Fn(&str) -> bool,
}

impl Filling<'_> {
    /// Takes everything that a record of tiny-sd says.
    ///
    /// # Errors
    /// If a value cannot be one of a flag.
    pub fn take_record(&mut self, settings: &Settings) -> Result<()> {
        let Settings { steps, guidance_scale, width, height, seed, dtype, .. } = settings;
        self.take_prompts(&settings.resolved_prompt, settings.given_negative_prompt());
        if !(self.is_given)("seed") {
            self.args.picture.seed = Some(*seed);
        }
        self.take("steps", steps, |args, steps| args.picture.steps = steps)?;
        self.take("guidance_scale", guidance_scale, |args, scale| {
            args.picture.guidance_scale = scale;
        })?;
        self.take("prompt_syntax", &settings.prompt_syntax, |args, syntax| {
            args.picture.prompt_syntax = syntax;
        })?;
        self.take("clip_skip", &settings.clip_skip, |args, skip| args.picture.clip_skip = skip)?;
        self.take("width", width, |args, side| args.picture.width = Some(side))?;
        self.take("height", height, |args, side| args.picture.height = Some(side))?;
        self.take("dtype", dtype, |args, dtype| args.model.dtype = dtype)?;
        self.take_images(settings)?;
        settings.additions.fill_in(&mut self.args.model, self.is_given)?;
        if !(self.is_given)("vae_tiling") {
            self.args.model.vae_tiling = settings.vae_tiling;
        }
        // Whoever has it as a default keeps it: memory is scarce here.
        self.args.model.low_memory |= settings.low_memory;
        let is_its_model = self.take_model(&settings.model)?;
        if !(self.is_given)("scheduler") {
            // The model's own stays the model's own.
            self.args.picture.scheduler = match (&settings.scheduler, is_its_model) {
                (None, true) => None,
                (Some(_), _) | (None, false) => {
                    Some(SchedulerChoice::parse(&settings.resolved_scheduler)?)
                }
            };
        }
        Ok(())
    }

    /// Takes what is known of what other programs say.
    fn take_infotext(&mut self, found: &Infotext) -> Result<()> {
        self.take_prompts(&found.prompt, &found.negative_prompt);
        if !(self.is_given)("prompt_syntax") && !is_ours(found) {
            // Both programs read prompts so.
            self.args.picture.prompt_syntax = PromptSyntax::A1111;
        }
        if let Some(steps) = found.get("Steps") {
            self.take("steps", steps, |args, steps| args.picture.steps = steps)?;
        }
        if let Some(scale) = found.get("CFG scale") {
            self.take("guidance_scale", scale, |args, scale| args.picture.guidance_scale = scale)?;
        }
        if let Some(seed) = found.get("Seed") {
            self.take("seed", seed, |args, seed| args.picture.seed = Some(seed))?;
        }
        if let Some(strength) = found.get("Denoising strength").filter(|_| self.has_image()) {
            self.take("strength", strength, |args, strength| {
                args.picture.strength = Some(strength);
            })?;
        }
        if let Some((width, height)) = found.get("Size").and_then(|size| size.split_once('x')) {
            self.take("width", width, |args, side| args.picture.width = Some(side))?;
            self.take("height", height, |args, side| args.picture.height = Some(side))?;
        }
        if let Some(used) = found.get("Clip skip") {
            // Which layer is used, from the end; some write -1 or 0 for the last one.
            let skipped = used.parse::<i64>().map_or(used.to_owned(), |used| match used {
                -1..=1 => "0".to_owned(),
                // Nobody's: named as it is written.
                ..=-2 => used.to_string(),
                _ => used.saturating_sub(1).to_string(),
            });
            self.take("clip_skip", &skipped, |args, skip| args.picture.clip_skip = skip)?;
        }
        if let Some(sampler) = found.get("Sampler").filter(|_| !(self.is_given)("scheduler")) {
            self.args.picture.scheduler = Some(scheduler(sampler, found.get("Schedule type"))?);
        }
        Ok(())
    }

    fn has_image(&self) -> bool {
        self.args.picture.image.is_some()
    }

    /// Takes the pictures of a record, unless the user gave one: then its mask says nothing.
    fn take_images(&mut self, settings: &Settings) -> Result<()> {
        let Settings { image, mask_image, strength, .. } = settings;
        if !(self.is_given)("image") {
            let path = |file: &Option<FileRecord>| -> Result<_> {
                let Some(file) = file else { return Ok(None) };
                check_local("image", &file.path)?;
                Ok(Some(PathBuf::from(&file.path)))
            };
            self.args.picture.image = path(image)?;
            if !(self.is_given)("mask") {
                self.args.picture.mask = path(mask_image)?;
            }
        }
        if let Some(strength) = strength {
            self.take("strength", strength, |args, strength| {
                args.picture.strength = Some(strength);
            })?;
        }
        Ok(())
    }

    fn take_prompts(&mut self, prompt: &str, negative_prompt: &str) {
        let Args { words, after_dashes, picture, .. } = &mut *self.args;
        if words.is_empty() && after_dashes.is_empty() && picture.prompt.is_none() {
            picture.prompt = Some(prompt.to_owned());
            picture.chosen.prompt = true;
        }
        if !(self.is_given)("negative_prompt") {
            negative_prompt.clone_into(&mut picture.negative_prompt);
            picture.chosen.negative_prompt = true;
        }
    }

    /// The model of a record, unless the user gave one: then its revision and variant say nothing.
    fn take_model(&mut self, model: &ModelRecord) -> Result<bool> {
        if (self.is_given)("model") {
            return Ok(false);
        }
        check_local("model", &model.source)?;
        for (flag, name) in [("config", &model.config), ("vae", &model.vae)] {
            name.as_ref().map_or(Ok(()), |name| check_local(flag, name))?;
        }
        let source: ModelSource = value("model", &model.source)?;
        let name = |id: &str, name: &Option<String>| {
            name.as_deref().map(|name| value(id, name)).transpose()
        };
        self.args.model.model = source;
        if !(self.is_given)("vae") {
            self.args.model.vae = model.vae.as_ref().map(|vae| value("vae", vae)).transpose()?;
        }
        if !(self.is_given)("configs") {
            self.args.model.configs = model.config.as_ref().map(PathBuf::from);
        }
        if !(self.is_given)("revision") {
            self.args.model.revision = name("revision", &model.revision)?;
        }
        if !(self.is_given)("variant") {
            self.args.model.variant = name("variant", &model.variant)?;
        }
        Ok(true)
    }

    fn take<T>(
        &mut self,
        id: &str,
        text: &(impl ToString + ?Sized),
        put: impl FnOnce(&mut Args, T),
    ) -> Result<()>
    where
        T: FromStr<Err: std::fmt::Display>,
    {
        if !(self.is_given)(id) {
            put(self.args, value(id, &text.to_string())?);
        }
        Ok(())
    }
}

/// Whether a name is one of this machine's: Windows would send credentials to others, and to name a
/// picture's file is no reason to.
fn check_local(flag: &str, name: &str) -> Result<()> {
    match name.starts_with(r"\\") || name.starts_with("//") {
        true => Err(Error::usage(format!(
            "its {flag} is on another machine; --{flag} says where it is here"
        ))),
        false => Ok(()),
    }
}

/// The value of a flag.
fn value<T: FromStr<Err: std::fmt::Display>>(id: &str, text: &str) -> Result<T> {
    text.trim().parse().map_err(|error| {
        let (name, flag) = (id.replace('_', " "), id.replace('_', "-"));
        let shown: String = text.chars().take(100).collect();
        Error::usage(format!("its {name} {shown:?}: {error}; give --{flag}"))
    })
}

/// The scheduler that another program's names mean; the schedule may be the sampler's last word.
fn scheduler(sampler: &str, schedule: Option<&str>) -> Result<SchedulerChoice> {
    let is_own = |name: &str| OWN_SCHEDULES.contains(&&*name.trim().to_lowercase());
    let is_other = |name: &str| OTHER_SCHEDULES.contains(&&*name.to_lowercase());
    let (words, last) = sampler.trim().rsplit_once(' ').unwrap_or((sampler, ""));
    let (named, schedule) = match (SchedulerChoice::find(sampler), SchedulerChoice::find(words)) {
        (Some(found), _) => (found, schedule.unwrap_or_default()),
        (None, Some(found)) if is_other(last) || is_own(last) => {
            (found, schedule.filter(|schedule| !is_own(schedule)).unwrap_or(last))
        }
        (None, Some(_) | None) => {
            let known: Vec<_> = SchedulerKind::ALL.iter().map(|kind| kind.name()).collect();
            let shown: String = sampler.chars().take(100).collect();
            return Err(Error::usage(format!(
                "its sampler {shown:?} is none of tiny-sd's; choose one with --scheduler ({})",
                known.join(", ")
            )));
        }
    };
    if is_own(schedule) {
        return Ok(named);
    }
    let sigmas = SigmaSchedule::ALL.into_iter();
    let sigmas = sigmas.clone().find(|sigmas| sigmas.name().eq_ignore_ascii_case(schedule.trim()));
    let chosen = sigmas.and_then(|sigmas| SchedulerChoice::new(named.kind(), Some(sigmas)));
    chosen.ok_or_else(|| {
        let shown: String = schedule.chars().take(100).collect();
        let kind = named.kind().name();
        Error::usage(format!(
            "its schedule {shown:?} is none that {kind} has here; --scheduler {kind} takes its \
             sampler with the model's own"
        ))
    })
}

/// What of another program's picture stays behind.
fn note(found: &Infotext, has_image: bool) -> Option<String> {
    const MOST_SHOWN: usize = 8;
    if is_ours(found) {
        return None;
    }
    let is_used =
        |name: &str| KNOWN_VALUES.contains(&name) || has_image && name == "Denoising strength";
    let unused = found.values.iter().filter(|(name, _)| !is_used(name));
    let unused: Vec<_> = unused.map(|(name, value)| format!("{name}: {value}")).collect();
    let mut notes = Vec::new();
    if found.get("RNG") != Some("CPU") {
        notes.push("another program drew other noise from its seed".to_owned());
    }
    if !unused.is_empty() {
        let more = if unused.len() > MOST_SHOWN { ", …" } else { "" };
        let shown: String = unused.iter().take(MOST_SHOWN).cloned().collect::<Vec<_>>().join(", ");
        let shown: String = shown.chars().take(400).collect();
        notes.push(format!("not used: {shown}{more}"));
    }
    (!notes.is_empty()).then(|| notes.join("; "))
}

fn is_ours(found: &Infotext) -> bool {
    found.get("Version").is_some_and(|version| version.starts_with("tiny-sd "))
}

#[cfg(test)]
pub(super) mod tests;
