//! Tests of what is said of pictures and models. Separate because they are longer than their part.

use super::*;
use crate::cli::job::tests::{Fake, parse_words};
use crate::error::Kind;

#[test]
fn info_takes_a_file_a_folder_or_a_repository_and_nothing_else() {
    let there = vec![("a.png", At::File), ("dir", At::Folder), ("pipe", At::Device)];
    let mut fake = Fake { there, ..Fake::default() };
    for (words, expected) in [
        ("info|a.png", Ok(Subject::File("a.png".into()))),
        ("info|pipe|--json", Ok(Subject::File("pipe".into()))),
        ("info|dir", Ok(Subject::Model(ModelSource::Folder("dir".into())))),
        ("info|org/name", Ok(Subject::Model(ModelSource::Hub("org/name".into())))),
        ("info|b.png", Err("b.png: there is no such file or folder, and no such model")),
        ("info|./org/name", Err("there is no such file")),
        ("info", Err("<PICTURE|MODEL>")),
        ("info|a|b", Err("unexpected argument 'b'")),
        ("inof", Err("did you mean \"tiny-sd info\"?")),
    ] {
        match (parse_words(words, &mut fake), expected) {
            (Ok(Request::Tell(job)), Ok(expected)) => {
                assert_eq!(job.what, expected, "{words}");
                assert_eq!(job.is_json, words.contains("--json"), "{words}");
            }
            (Err(error), Err(expected)) => {
                assert_eq!(error.kind(), Kind::Usage, "{error}");
                assert!(error.to_string().contains(expected), "{words}: {error}");
            }
            (found, _) => panic!("{words}: {found:?}"),
        }
    }
}

#[test]
fn what_would_steer_a_terminal_is_shown_instead() {
    let mut text = String::new();
    line(&mut text, "prompt", "a\n\u{1b}[2J é");
    assert_eq!(text, "prompt           a\\n\\u{1b}[2J é\n");
    let mut text = String::new();
    line(&mut text, "a\u{202e}b", "x\u{202e}gnp\u{2066}\u{200f}\u{2028}y");
    assert_eq!(text, "a b              x\\u{202e}gnp\\u{2066}\\u{200f}\\u{2028}y\n");
}
