//! The prompts of a job's pictures: the same for all of them, or what the seed of each chooses.
//! Separate from the job, which has the prompts as they were given.

use std::borrow::Cow;
use std::path::Path;

use super::alternatives::{Template, Wildcards};
use super::args::Chosen;
use super::job::Job;
use super::surroundings::{At, Surroundings};
use crate::error::{Error, Result};
use crate::pipeline::PromptSyntax;

/// The prompts of a job that have alternatives.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Alternatives {
    prompt: Option<Template>,
    negative_prompt: Option<Template>,
}

/// The prompts of one picture.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Texts<'a> {
    /// What it shows.
    pub prompt: Cow<'a, str>,
    /// What it does not.
    pub negative_prompt: Cow<'a, str>,
}

impl Job {
    /// The prompts of the picture of a seed.
    pub(super) fn texts<'s>(&'s self, seed: u64) -> Texts<'s> {
        let Alternatives { prompt, negative_prompt } = &self.alternatives;
        let text = |template: &Option<Template>, which, text: &'s str| match template {
            Some(template) => Cow::Owned(template.resolve(which, seed)),
            None => Cow::Borrowed(text),
        };
        Texts {
            prompt: text(prompt, "prompt", &self.prompt),
            negative_prompt: text(negative_prompt, "negative prompt", &self.negative_prompt),
        }
    }

    /// Finds what of the prompts each seed chooses.
    ///
    /// # Errors
    /// If a file of alternatives cannot be read, or there are too many.
    pub(super) fn read_alternatives(
        &mut self,
        folder: Option<&Path>,
        chosen: Chosen,
        wildcards: &mut Wildcards<'_>,
    ) -> Result<()> {
        let is_read = folder.is_some() || self.prompt_syntax == PromptSyntax::A1111;
        let mut read = |what: &str, text: &str, is_chosen: bool| match is_read && !is_chosen {
            true => wildcards.read(text, folder).map_err(|error| error.context(what)),
            false => Ok(None),
        };
        self.alternatives = Alternatives {
            prompt: read("the prompt", &self.prompt, chosen.prompt)?,
            negative_prompt: read(
                "the negative prompt",
                &self.negative_prompt,
                chosen.negative_prompt,
            )?,
        };
        Ok(())
    }
}

/// Whether `--wildcards` names a folder, also where no prompt names a file in it: a name that is
/// mistyped is to be heard of before it is needed.
///
/// # Errors
/// If it does not.
pub(super) fn check_folder(folder: Option<&Path>, surroundings: &dyn Surroundings) -> Result<()> {
    let Some(folder) = folder else { return Ok(()) };
    let problem = match surroundings.at(folder) {
        At::Folder => return Ok(()),
        At::Nothing => "there is no such folder",
        At::File | At::Device => "it is not a folder",
    };
    Err(Error::usage(format!("--wildcards {}: {problem}", folder.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::from::tests::{from, with_record};
    use crate::cli::job::tests::{Fake, job_of, parse_words};
    use crate::cli::settings::tests::settings;
    use crate::error::Kind;

    #[test]
    fn a_folder_of_alternatives_that_is_none_is_named_whatever_the_prompts_are() {
        let check = |words: &str, expected: Option<&str>| {
            let there = vec![("w", At::Folder), ("file.txt", At::File)];
            let files = vec![("jobs.txt", b"a fox".to_vec())];
            let stdin = Some(b"a fox".to_vec());
            let mut fake = Fake { there, files, stdin, ..Fake::default() };
            let error = parse_words(words, &mut fake).err();
            let found = error.as_ref().map(ToString::to_string);
            assert_eq!(found.as_deref(), expected, "{words}");
            assert!(error.is_none_or(|error| error.kind() == Kind::Usage), "{words}");
            // Nobody types a prompt first.
            assert!(expected.is_none() || fake.stdin.is_some(), "{words}");
        };
        let none = Some("--wildcards none: there is no such folder");
        check("a fox|--wildcards|w", None);
        check("-|--wildcards|w", None);
        check("a fox|--wildcards|none", none);
        check("-|--wildcards|none", none);
        check("a fox|--wildcards|file.txt", Some("--wildcards file.txt: it is not a folder"));
        check("batch|jobs.txt|--out-dir|o|--wildcards|w", None);
        let in_batch = Some("jobs.txt: line 1: --wildcards none: there is no such folder");
        check("batch|jobs.txt|--out-dir|o|--wildcards|none", in_batch);
    }

    #[test]
    fn plain_prompts_have_no_alternatives_unless_there_is_a_folder_of_them() {
        let check = |words: &str, folder: Option<&str>, chosen: Chosen, expected: [bool; 2]| {
            let (prompt, negative_prompt) = ("{a|b} (c)".into(), "{d|e}".into());
            let mut job = Job { prompt, negative_prompt, ..job_of(words) };
            let fake = Fake::default();
            job.read_alternatives(folder.map(Path::new), chosen, &mut Wildcards::new(&fake))
                .unwrap();
            let Texts { prompt, negative_prompt } = job.texts(5);
            let found = [prompt != job.prompt, negative_prompt != job.negative_prompt];
            assert_eq!(found, expected, "{words} {folder:?} {chosen:?}");
        };
        let all = Chosen { prompt: true, negative_prompt: true };
        let none = Chosen::default();
        check("x", None, none, [false, false]);
        check("x", Some("w"), none, [true, true]);
        check("x|--prompt-syntax|a1111", None, none, [true, true]);
        check("x|--prompt-syntax|a1111", Some("w"), all, [false, false]);
        check("x", Some("w"), Chosen { prompt: true, ..none }, [false, true]);
    }

    #[test]
    fn what_a_seed_chose_is_not_chosen_again() {
        let mut record = settings();
        record.prompt_syntax = "a1111".into();
        record.prompt = "{a|b} {c|d}".into();
        record.resolved_prompt = "{a|b} c".into();
        record.resolved_negative_prompt = Some("{x|y}".into());
        let file = with_record(&record.to_json());
        let texts = |words: &str| {
            let job = from(file.clone(), words).unwrap();
            let texts = job.texts(job.seed);
            (texts.prompt.into_owned(), texts.negative_prompt.into_owned())
        };
        assert_eq!(texts(""), ("{a|b} c".into(), "{x|y}".into()));
        assert_eq!(texts("|-n|fog"), ("{a|b} c".into(), "fog".into()));
    }
}
