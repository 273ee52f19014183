//! `tiny-sd completions` and `tiny-sd man`: what shells complete, and the manual. Separate because
//! this is the only place that sees all commands as one tree; each parses its own flags.

use std::ffi::OsString;

use clap::{Command, CommandFactory, FromArgMatches, Parser};
use clap_complete::Shell;
use clap_mangen::Man;

use super::args::Args;
use super::command::usage;
use super::job::Request;
use super::{batch, compare, config, devices, explain, info, models, schedulers, verify, worker};
use crate::error::{Error, Result};

/// Whose completions.
#[derive(Debug, Parser)]
#[command(
    name = "tiny-sd completions",
    about = "Prints what a shell needs to complete commands and flags.",
    after_help = COMPLETIONS_AFTER_HELP
)]
struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL", value_enum)]
    shell: Shell,
}

const COMPLETIONS_AFTER_HELP: &str = "\
Examples:
  tiny-sd completions bash > ~/.local/share/bash-completion/completions/tiny-sd
  tiny-sd completions zsh > \"${fpath[1]}/_tiny-sd\"
  tiny-sd completions fish > ~/.config/fish/completions/tiny-sd.fish
  tiny-sd completions powershell >> $PROFILE
  eval (tiny-sd completions elvish | slurp)       in ~/.config/elvish/rc.elv";

/// Whose page.
#[derive(Debug, Parser)]
#[command(
    name = "tiny-sd man",
    about = "Prints the manual page of tiny-sd, or of one of its commands, as roff.",
    after_help = MAN_AFTER_HELP
)]
struct ManArgs {
    /// The command, such as worker [default: the program itself]
    #[arg(value_name = "COMMAND")]
    command: Option<String>,
}

const MAN_AFTER_HELP: &str = "\
Examples:
  tiny-sd man > ~/.local/share/man/man1/tiny-sd.1
  tiny-sd man batch > ~/.local/share/man/man1/tiny-sd-batch.1
  tiny-sd man worker | man -l -
  tiny-sd --prompt man                           a picture of one";

/// Parses what follows `tiny-sd completions`; the answer is the script.
///
/// # Errors
/// One line that names what is wrong.
pub(super) fn parse_completions(flags: impl Iterator<Item = OsString>) -> Result<Request> {
    let CompletionsArgs { shell } = match parse(flags, "tiny-sd completions") {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => return Ok(Request::Show(error)),
        Err(error) => return Err(usage(&error)),
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut program(), "tiny-sd", &mut script);
    let script = text(script)?;
    Ok(Request::Print(match shell {
        // clap_complete 4.6 calls commands of a program with a hyphen one thing and looks for
        // another.
        Shell::Bash => script.replace("tiny__subcmd__sd__", "tiny__sd__"),
        _ => script,
    }))
}

/// Parses what follows `tiny-sd man`; the answer is the page.
///
/// # Errors
/// One line that names what is wrong.
pub(super) fn parse_man(flags: impl Iterator<Item = OsString>) -> Result<Request> {
    let ManArgs { command } = match parse(flags, "tiny-sd man") {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => return Ok(Request::Show(error)),
        Err(error) => return Err(usage(&error)),
    };
    let page = match command {
        None => program(),
        Some(name) => page_of(&name)?,
    };
    let mut roff = Vec::new();
    Man::new(page)
        .render(&mut roff)
        .map_err(|error| Error::other(format!("the manual page: {error}")))?;
    text(roff).map(Request::Print)
}

fn parse<T: CommandFactory + FromArgMatches>(
    flags: impl Iterator<Item = OsString>,
    name: &'static str,
) -> std::result::Result<T, clap::Error> {
    let words = std::iter::once(name.into()).chain(flags);
    T::command().try_get_matches_from(words).and_then(|matches| T::from_arg_matches(&matches))
}

fn text(bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|error| Error::other(format!("what is printed: {error}")))
}

/// All commands, each under its own name.
fn commands() -> [(&'static str, Command); 12] {
    [
        ("worker", worker::command()),
        ("compare", compare::command()),
        ("explain", explain::command()),
        ("info", info::command()),
        ("verify", verify::command()),
        ("batch", batch::command()),
        ("models", models::command()),
        ("devices", devices::command()),
        ("schedulers", schedulers::command()),
        ("config", config::command()),
        ("completions", CompletionsArgs::command()),
        ("man", ManArgs::command()),
    ]
}

/// The program with all its commands.
fn program() -> Command {
    let named = |(name, command): (&'static str, Command)| command.name(name);
    Args::command().subcommands(commands().map(named))
}

fn page_of(name: &str) -> Result<Command> {
    let mut program = program();
    // Names the commands after the program.
    program.build();
    program.find_subcommand(name).cloned().ok_or_else(|| {
        let names = commands().map(|(name, _)| name);
        Error::usage(format!("{name:?} is no command with a page: {} have one", names.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::job::tests::{Fake, parse_words};

    fn printed(words: &str) -> String {
        match parse_words(words, &mut Fake::default()) {
            Ok(Request::Print(text)) => text,
            other => panic!("{words}: {other:?}"),
        }
    }

    /// The long flags that help shows.
    fn flags(command: &Command) -> Vec<String> {
        let shown = command.get_arguments().filter(|flag| !flag.is_hide_set());
        shown.filter_map(|flag| Some(format!("--{}", flag.get_long()?))).collect()
    }

    #[test]
    fn every_shell_completes_every_command_and_long_flag() {
        for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
            let script = printed(&format!("completions|{shell}"));
            for (name, command) in commands() {
                assert!(script.contains(name), "{shell}: {name}");
                for flag in flags(&command).into_iter().chain(flags(&Args::command())) {
                    // fish has them without the dashes.
                    let shown = match shell {
                        "fish" => format!("-l {}", flag.trim_start_matches('-')),
                        _ => flag,
                    };
                    assert!(script.contains(&shown), "{shell}: {name} {shown}");
                }
            }
        }
    }

    #[test]
    fn the_manual_has_the_flags_the_examples_and_the_commands() {
        let escaped = |text: &str| text.replace('-', r"\-");
        let page = printed("man");
        for flag in flags(&Args::command()) {
            assert!(page.contains(&escaped(&flag)), "{flag}");
        }
        for part in ["Examples:", "Exit codes:", "TINY_SD_MODEL"] {
            assert!(page.contains(part), "{part}");
        }
        for (name, command) in commands() {
            assert!(page.contains(&escaped(&format!("tiny-sd-{name}(1)"))), "{name}: {page}");
            let page = printed(&format!("man|{name}"));
            assert!(page.starts_with(".ie") && page.contains("Examples:"), "{page}");
            for flag in flags(&command) {
                assert!(page.contains(&escaped(&flag)), "{name} {flag}");
            }
        }
    }

    #[test]
    fn the_tree_has_the_commands_that_command_lines_have() {
        program().debug_assert();
        for (name, command) in commands() {
            let request = parse_words(&format!("{name}|--help"), &mut Fake::default());
            let Ok(Request::Show(help)) = request else { panic!("{name}: {request:?}") };
            let help = help.to_string();
            for flag in flags(&command) {
                assert!(help.contains(&flag), "{name} {flag}: {help}");
            }
        }
    }

    #[test]
    fn what_is_none_is_one_line_that_says_what_there_is() {
        for (words, expected) in [
            ("completions", "<SHELL>"),
            ("completions|tcsh", "[possible values: bash, elvish, fish, powershell, zsh]"),
            ("man|nothing", "\"nothing\" is no command with a page: worker, compare,"),
            ("completion", "did you mean \"tiny-sd completions\"?"),
        ] {
            let error = parse_words(words, &mut Fake::default()).unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains('\n'), "{words}: {error}");
        }
    }
}
