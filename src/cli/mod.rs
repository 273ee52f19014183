//! The command line: arguments become a [`Job`] without effects, and [`run`] carries it out.
//!
//! This is the only module that sees the pipeline and the devices at once; it reaches both
//! through [`Painter`].

mod additions;
mod alternatives;
mod args;
mod batch;
mod books;
mod command;
mod compare;
mod completions;
mod config;
mod device;
mod devices;
mod display;
mod download;
mod events;
mod explain;
mod files;
mod from;
mod graphics;
mod grid;
mod identity;
mod info;
mod inputs;
mod interrupt;
mod job;
mod model;
mod models;
mod output;
mod paint;
mod painter;
mod places;
mod previews;
mod prompt;
mod remote;
mod run;
mod schedulers;
mod settings;
mod surroundings;
mod texts;
mod values;
mod verify;
mod worker;

use std::io::Write;

pub use batch::{BatchJob, Task, batch};
pub use compare::{CompareJob, compare};
pub use device::{DevicePlan, DeviceSpec};
pub use devices::{DevicesJob, list_devices};
pub use events::{Event, PictureName, SCHEMA_VERSION};
pub use explain::{ExplainJob, explain};
pub use graphics::{Graphics, PreviewPlace};
pub use grid::{GridJob, grid};
pub use info::{InfoJob, tell};
pub use inputs::{ImageRequest, InputFile};
pub use job::{Job, Request, parse};
pub use model::{HubName, ModelSource};
pub use models::{ModelsJob, RepositoryAt, models};
pub use output::{OutputPlan, Target};
pub use painter::open;
pub use prompt::MAX_PROMPT_BYTES;
pub use run::{OpenPainter, Painter, run};
pub use schedulers::{SchedulersJob, list_schedulers};
pub use settings::{FileRecord, ModelRecord, Provenance, Settings};
pub use surroundings::{At, Process, Surroundings};
pub use values::{
    Count, DtypeChoice, GuidanceScale, Side, SizeRequest, Steps, Strength, Verbosity,
};
pub use verify::{VerifyJob, verify};
pub use worker::{WorkerJob, work};

use crate::error::{Error, Result};

/// Prints what was asked for on standard output.
///
/// # Errors
/// If it cannot be written.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(|error| Error::other(format!("standard output: {error}")))
}

/// Prints help or the version on standard output, in colour where that can show it.
pub fn show(help: &clap::Error) {
    // Whoever closes the pipe has read enough.
    let _ = help.print();
}

/// Prints an error on standard error, on one line, and says the exit code.
pub fn report(error: &Error) -> u8 {
    let text = one_line(error);
    // Not eprintln: a closed standard error is no reason to panic.
    let _ = writeln!(std::io::stderr(), "error: {text}");
    error.kind().exit_code()
}

/// An error's text as it may be shown.
fn one_line(error: &Error) -> String {
    // Names in it come from files and servers: no line breaks, nothing that steers a terminal.
    without_secrets(&error.to_string().replace(char::is_control, " "))
}

/// A pairing URL's token must not reach a terminal or a log, whatever a message quotes: of each
/// `quic://TOKEN@` only the ends are kept, whatever the scheme was typed as. Where the `@` was cut
/// off, all up to the next space goes.
fn without_secrets(text: &str) -> String {
    const SCHEME: &str = "://";
    // So many hexadecimal digits are no host's name, but a cut token.
    const TOKEN_LIKE: usize = 12;
    let mut clean = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(SCHEME) {
        let word_len = after.find(char::is_whitespace).unwrap_or(after.len());
        let (word, behind) = after.split_at(word_len);
        let shown = word.rsplit_once('@').map_or("", |(_, host)| host);
        let is_pattern = word.starts_with("TOKEN@") || word.starts_with('…');
        clean.push_str(before);
        clean.push_str(SCHEME);
        let digits = word.chars().take_while(char::is_ascii_hexdigit).count();
        if is_pattern || !word.contains('@') && digits < TOKEN_LIKE {
            clean.push_str(word);
        } else {
            clean.push_str("***@");
            clean.push_str(shown);
        }
        rest = behind;
    }
    clean.push_str(rest);
    clean
}

#[cfg(test)]
mod tests {
    use super::without_secrets;

    #[test]
    fn a_token_never_shows_whatever_a_message_quotes() {
        let token = "0123456789abcdef".repeat(4);
        let check = |message: String, expected: &str| {
            assert_eq!(without_secrets(&message), expected);
        };
        check(
            format!("invalid value 'quic://{token}@h:1?cert=ab' for '--device'"),
            "invalid value 'quic://***@h:1?cert=ab' for '--device'",
        );
        check(
            format!("quote it: \"a fox quic://{token}@h:1\""),
            "quote it: \"a fox quic://***@h:1\"",
        );
        check(format!("got 'http://{token}@h:1'"), "got 'http://***@h:1'");
        check("see https://rustup.rs".into(), "see https://rustup.rs");
        check(format!("quic://{token} and quic://{token}@h"), "quic://***@ and quic://***@h");
        check(format!("quote it: quic://{}", &token[..20]), "quote it: quic://***@");
        check("one of cpu, quic://… or mock".into(), "one of cpu, quic://… or mock");
        check("quic://TOKEN@HOST:PORT is the form".into(), "quic://TOKEN@HOST:PORT is the form");
        check(
            "quic://127.0.0.1:4433 does not answer".into(),
            "quic://127.0.0.1:4433 does not answer",
        );
    }
}
