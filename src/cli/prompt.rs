//! Where the prompt is: on the command line in one of three ways, or on standard input. Separate
//! because a prompt may be any text, and which text it is depends on nothing else.

use super::args::Args;
use super::surroundings::Surroundings;
use crate::error::{Error, Result};
use crate::pipeline::PromptSyntax;

/// The longest prompt; whatever a model reads of it, the whole of it is recorded.
pub const MAX_PROMPT_BYTES: usize = 64 << 10;

/// The prompt on the command line, `None` if it is to be read from standard input.
///
/// `-` is standard input only as a plain argument: `--prompt -` and `-- -` are any text.
pub(super) fn given_prompt(args: &mut Args) -> Result<Option<String>> {
    let words = std::mem::take(&mut args.words);
    let after_dashes = std::mem::take(&mut args.after_dashes);
    match (args.picture.prompt.take(), &*words, &*after_dashes) {
        (None, [], []) => Ok(None),
        (None, [word], []) if word == "-" => Ok(None),
        (Some(prompt), [], []) => Ok(Some(prompt)),
        (None, [prompt], []) | (None, [], [prompt]) => Ok(Some(prompt.clone())),
        (None, words, []) | (None, [], words) => {
            let shown: String = words.join(" ").chars().take(60).collect();
            Err(Error::usage(format!(
                "{} arguments where one prompt is expected; quote it: tiny-sd {shown:?}",
                words.len()
            )))
        }
        _ => Err(Error::usage("the prompt is given twice; give PROMPT, --prompt or -- PROMPT")),
    }
}

pub(super) fn prompt_of_stdin(surroundings: &mut dyn Surroundings) -> Result<String> {
    let dash_or_pipe = "the prompt on standard input";
    if surroundings.stdin_is_terminal() {
        return Err(Error::usage("no prompt; try: tiny-sd \"Portrait of a pretty girl\""));
    }
    let bytes = surroundings
        .read_stdin(MAX_PROMPT_BYTES)
        .map_err(|error| Error::other(format!("{dash_or_pipe}: {error}")))?;
    check_length(dash_or_pipe, bytes.len())?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::usage(format!("{dash_or_pipe} is not UTF-8: byte {at} does not belong there"))
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text).trim_end_matches(['\r', '\n']);
    if text.is_empty() {
        return Err(Error::usage(format!(
            "{dash_or_pipe} is empty; if it is meant: --prompt \"\""
        )));
    }
    Ok(text.to_owned())
}

/// Whether a text can be a prompt.
pub(super) fn check(what: &str, text: &str, syntax: PromptSyntax) -> Result<()> {
    check_length(what, text.len())?;
    syntax.check(text).map_err(|error| error.context(what))
}

fn check_length(what: &str, bytes: usize) -> Result<()> {
    if bytes > MAX_PROMPT_BYTES {
        return Err(Error::usage(format!("{what} is longer than {MAX_PROMPT_BYTES} bytes")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Request;
    use crate::cli::job::tests::{Fake, parse_words};

    #[test]
    fn standard_input_is_the_prompt_only_where_it_is_asked_for_or_nothing_else_is() {
        let too_long = vec![b'a'; MAX_PROMPT_BYTES + 1];
        for (words, stdin, expected) in [
            ("-", &b"a fox\n"[..], Ok("a fox")),
            ("", b"\xef\xbb\xbfa\r\nfox\r\n", Ok("a\r\nfox")),
            ("x", b"not read", Ok("x")),
            ("--prompt|-", b"not read", Ok("-")),
            ("--|-", b"not read", Ok("-")),
            ("", b"", Err("is empty")),
            ("-", b"\n", Err("is empty")),
            ("-", b"ab\xff", Err("not UTF-8: byte 2")),
            ("-", &too_long, Err("longer than 65536 bytes")),
        ] {
            let mut fake = Fake { stdin: Some(stdin.to_vec()), ..Fake::default() };
            match (parse_words(words, &mut fake), expected) {
                (Ok(Request::Paint(job)), Ok(prompt)) => assert_eq!(job.prompt, prompt),
                (Err(error), Err(expected)) => assert!(error.to_string().contains(expected)),
                (parsed, _) => panic!("{words:?} with {stdin:?} gave {parsed:?}"),
            }
            assert_eq!(fake.stdin.is_some(), stdin == b"not read");
        }
    }
}
