//! The words that are commands, and what is wrong with a command line in one. Separate because a
//! prompt may be any word: this is the one place that decides which lone words are asked about
//! instead of being painted.

use clap::error::ContextKind;

use crate::error::{Error, Result};

/// The commands, but for `man`: honest prompts are near that.
const COMMANDS: [&str; 12] = [
    "help",
    "worker",
    "compare",
    "info",
    "verify",
    "batch",
    "models",
    "devices",
    "schedulers",
    "completions",
    "config",
    "explain",
];

/// What a lone word on the command line is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// A prompt.
    Prompt,
    /// `help`.
    Help,
}

/// Tells a prompt from a command; `word` is the only positional argument.
///
/// # Errors
/// If it looks like a command but is none: a picture of a typing error helps nobody, and loading
/// a model for it even less.
pub(super) fn classify(word: &str) -> Result<Word> {
    if word == "help" {
        return Ok(Word::Help);
    }
    let as_prompt = format!("if it is a prompt, write --prompt {word}");
    let lower = word.to_lowercase();
    let near = |command: &&&str| is_near(&lower, command);
    if let Some(command) = COMMANDS.iter().find(near) {
        return Err(Error::usage(format!(
            "{word:?}: did you mean \"tiny-sd {command}\"? {as_prompt}"
        )));
    }
    Ok(Word::Prompt)
}

/// One letter too many, too few, wrong, or two swapped: more would ask about honest prompts
/// ("walker", "flower"), and so would a wrong first letter ("match", "patch").
fn is_near(word: &str, command: &str) -> bool {
    let (a, b): (Vec<char>, Vec<char>) = (word.chars().collect(), command.chars().collect());
    let same_start = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
    let (a, b) = (a.split_at(same_start).1, b.split_at(same_start).1);
    match (a, b) {
        ([], []) => true,
        ([_, rest_a @ ..], [_, rest_b @ ..]) if rest_a == rest_b => same_start > 0,
        ([_, rest @ ..], other) | (other, [_, rest @ ..]) if rest == other => true,
        ([a0, a1, rest_a @ ..], [b0, b1, rest_b @ ..]) => a0 == b1 && a1 == b0 && rest_a == rest_b,
        _ => false,
    }
}

/// clap's message without the usage that follows it, on one line.
pub(super) fn usage(error: &clap::Error) -> Error {
    let text = error.to_string();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines =
        lines.take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let mut message = String::new();
    for line in lines {
        let line = line.strip_prefix("error: ").unwrap_or(line);
        let separator = match line.strip_prefix("tip: ") {
            _ if message.is_empty() => "",
            Some(_) => "; ",
            None => " ",
        };
        message.push_str(separator);
        message.push_str(line.strip_prefix("tip: ").unwrap_or(line));
    }
    let value = error.get(ContextKind::InvalidValue).map(ToString::to_string);
    let source = match std::env::var("TINY_SD_MODEL").ok() {
        Some(model) if Some(&model) == value.as_ref() => " (which TINY_SD_MODEL says)",
        Some(_) | None => "",
    };
    Error::usage(format!("{message}{source}; see tiny-sd --help"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lone_word_near_a_command_is_asked_about_and_any_other_is_a_prompt() {
        for word in [
            "wroker", "worke", "workers", "Worker", "wrker", "compere", "comapre", "compare",
            "hlep", "infos", "inf", "verfiy", "batch", "btach", "bach", "Batchs",
        ] {
            let message = classify(word).unwrap_err().to_string();
            assert!(message.contains("did you mean"), "{message}");
            assert!(message.contains(&format!("--prompt {word}")), "{message}");
        }
        for word in ["fox", "flower", "walker", "helper", "", "é", "w", "re", "compass", "match"] {
            assert_eq!(classify(word).unwrap(), Word::Prompt, "{word}");
        }
        assert_eq!(classify("help").unwrap(), Word::Help);
    }
}
