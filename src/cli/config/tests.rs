//! Tests of the file of defaults. Separate because they are longer than what they test.

use super::*;
use crate::cli::Job;
use crate::cli::job::tests::{Fake, job_of, parse_words};

const PATH: &str = "/c/tiny-sd/config.toml";

fn fake(text: &str, variables: &[(&'static str, &'static str)]) -> Fake {
    let variables = [&[("TINY_SD_CONFIG", PATH)], variables].concat();
    Fake { files: vec![(PATH, text.into())], variables, ..Fake::default() }
}

fn job_with(words: &str, fake: &mut Fake) -> Job {
    match parse_words(words, fake) {
        Ok(Request::Paint(job)) => *job,
        other => panic!("{words}: {other:?}"),
    }
}

#[test]
fn the_file_is_what_flags_are_that_are_not_given() {
    let text = "steps = 30\nguidance-scale = 5.5 # a comment\nscheduler = \"euler-a\"\n\
                model = \"org/name\"\nrevision = \"v1\"\ndevice = \"cpu\"\n\
                lora = [\"a.pt:0.5\", \"b.pt\"]\nlow-memory = true\noffline = false\nquiet = true";
    for (words, variables, flags) in [
        (
            "x",
            &[][..],
            "x|--steps|30|-g|5.5|--scheduler|euler-a|-m|org/name|--revision|v1|--device|cpu|\
             --lora|a.pt:0.5|--lora|b.pt|--low-memory|-q",
        ),
        (
            "x|--steps|9|-g|1|--scheduler|ddim|-m|./dir|--device|mock|--lora|c.pt|-v",
            &[],
            "x|--steps|9|-g|1|--scheduler|ddim|-m|./dir|--device|mock|--lora|c.pt|--low-memory|-v",
        ),
        (
            "x",
            &[("TINY_SD_DEVICE", "mock"), ("TINY_SD_MODEL", "org/other")],
            "x|--steps|30|-g|5.5|--scheduler|euler-a|--lora|a.pt:0.5|--lora|b.pt|--low-memory|-q",
        ),
        ("x", &[("TINY_SD_CONFIG", "")], "x"),
    ] {
        let mut fake = fake(text, &[]);
        fake.variables.splice(0..0, variables.iter().copied());
        assert_eq!(job_with(words, &mut fake), job_of(flags), "{words} {variables:?}");
    }
}

/// With a model in the folder `m` that has these defaults, and perhaps a file of the user's.
fn fake_model(defaults: &str, file: Option<&str>) -> Fake {
    const MODEL: &str = "./m/defaults.json";
    let mut fake = file.map_or_else(Fake::default, |text| fake(text, &[]));
    fake.there.push((MODEL, At::File));
    fake.files.push((MODEL, defaults.into()));
    fake
}

#[test]
fn a_model_says_what_flags_are_that_nobody_gives() {
    let defaults = r#"{"steps": 20, "guidance-scale": 3.0, "scheduler": "ddim", "seed": 5}"#;
    for (words, file, flags) in [
        ("x|-m|./m", None, "x|-m|./m|--steps|20|-g|3|--scheduler|ddim"),
        ("x|-m|./m|--steps|9|-g|1", None, "x|-m|./m|--steps|9|-g|1|--scheduler|ddim"),
        ("x|-m|./m", Some("steps = 30"), "x|-m|./m|--steps|30|-g|3|--scheduler|ddim"),
        ("x", Some("model = \"./m\""), "x|-m|./m|--steps|20|-g|3|--scheduler|ddim"),
        ("x|-m|./other", None, "x|-m|./other"),
        ("x|-m|org/name", None, "x|-m|org/name"),
    ] {
        let mut fake = fake_model(defaults, file);
        assert_eq!(job_with(words, &mut fake), job_of(flags), "{words} {file:?}");
    }
    for (defaults, expected) in [
        ("{\"steps\": 0}", "invalid value '0' for '--steps <N>': a whole number, 1 to 1000"),
        ("{\"steps\": {}}", "steps is neither a number nor a text"),
        ("[20]", "it is no JSON object"),
        ("{", "line 1: "),
    ] {
        let error = parse_words("x|-m|./m", &mut fake_model(defaults, None)).unwrap_err();
        let (kind, message) = (error.kind(), error.to_string());
        let expected = format!("./m/defaults.json: {expected}");
        assert!(message.starts_with(&expected) && !message.contains('\n'), "{message}");
        assert_eq!(kind, crate::error::Kind::Model, "{message}");
    }
}

#[test]
fn a_wrong_file_is_one_line_that_names_it_the_line_and_the_nearest_name() {
    for (text, expected) in [
        ("steps = 30\n\nstesp = 3", "line 3: \"stesp\" is no flag's name; did you mean steps?"),
        (
            "guidance_scale = 3",
            "line 1: \"guidance_scale\" is no flag's name; did you mean guidance",
        ),
        ("zzz = 3", "line 1: \"zzz\" is no flag's name; tiny-sd --help has them"),
        (
            "# no\nsteps = 0",
            "line 2: invalid value '0' for '--steps <N>': a whole number, 1 to 1000",
        ),
        ("steps = [3]", "line 1: steps takes one text or number"),
        ("lora = [[\"a\"]]", "line 1: lora takes a text, or a list of them"),
        ("offline = \"yes\"", "line 1: offline is true or false"),
        ("prompt = \"a\"", "line 1: prompt has no default: give --prompt where it is wanted"),
        ("[steps]\na = 1", "line 1: steps takes one text or number"),
        ("steps = 3\nsteps = 4", "line 2: duplicate key"),
        ("\n\nsteps =", "line 3: "),
    ] {
        for command in ["x", "compare|x|--against|mock", "config"] {
            let error = parse_words(command, &mut fake(text, &[])).unwrap_err().to_string();
            let expected = format!("{PATH}, {expected}");
            assert!(error.starts_with(&expected) && !error.contains('\n'), "{text}: {error}");
        }
    }
    let long = "#".repeat(MAX_BYTES + 1);
    let error = parse_words("x", &mut fake(&long, &[])).unwrap_err().to_string();
    assert_eq!(error, format!("{PATH} is longer than 65536 bytes"));
    let mut missing = Fake { variables: vec![("TINY_SD_CONFIG", "/no")], ..Fake::default() };
    let error = parse_words("x", &mut missing).unwrap_err().to_string();
    assert!(error.starts_with("TINY_SD_CONFIG: /no: "), "{error}");
    // What is asked first needs no file.
    for words in ["x|--help", "help"] {
        let help = parse_words(words, &mut fake("steps = 0", &[]));
        assert!(matches!(help, Ok(Request::Show(_))), "{words}: {help:?}");
    }
}

#[test]
fn each_command_takes_what_has_its_meaning_there() {
    let text = "output = \"o.png\"\ncount = 3\nsteps = 4\npreview = 2\nlow-memory = true";
    let mut fake = fake(text, &[]);
    let Ok(Request::Compare(compare)) = parse_words("compare|x|--against|mock", &mut fake) else {
        panic!("compare")
    };
    let base = job_of("x|--steps|4|--low-memory");
    assert_eq!(compare.job, base);
    fake.files.push(("jobs.txt", b"a fox".to_vec()));
    let batch = parse_words("batch|jobs.txt|--out-dir|o", &mut fake);
    let Ok(Request::Batch(batch)) = batch else { panic!("{batch:?}") };
    assert_eq!(batch.tasks.len(), 3);
    for (scope, expected) in [(Scope::Recorded, (25, true)), (Scope::Shown, (4, true))] {
        let words = ["tiny-sd", "x"].map(OsString::from);
        let matches = matches(&Args::command(), words.into_iter(), scope, &fake).unwrap().unwrap();
        let args = Args::from_arg_matches(&matches).unwrap();
        assert_eq!((args.picture.steps.get(), args.model.low_memory), expected, "{scope:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn it_is_in_the_folder_that_the_platform_has_for_it_and_config_says_so() {
    let said = |words: &str, fake: &mut Fake| match parse_words(words, fake) {
        Ok(Request::Print(text)) => text,
        other => panic!("{words}: {other:?}"),
    };
    for (variables, expected) in [
        (vec![("HOME", "/h")], "/h/.config/tiny-sd/config.toml (not there)\n"),
        (vec![("HOME", "/h"), ("XDG_CONFIG_HOME", "/c")], "/c/tiny-sd/config.toml\nsteps = 30\n"),
        (vec![("HOME", "/h"), ("XDG_CONFIG_HOME", "c")], "/h/.config/tiny-sd/config.toml (not "),
        (vec![("HOME", "/h"), ("TINY_SD_CONFIG", "")], "no file of defaults\n"),
        (vec![], "no file of defaults\n"),
    ] {
        let mut fake = Fake { variables, ..fake("steps = 30", &[]) };
        let text = said("config", &mut fake);
        assert!(text.starts_with(expected), "{:?}: {text}", fake.variables);
    }
    let text = said("config|--json", &mut fake("lora = [\"a\\\"b\"]\nsteps = 30", &[]));
    let line: serde_json::Value = serde_json::from_str(&text).unwrap();
    let settings = json!({ "lora": ["a\"b"], "steps": 30 });
    let expected = json!({ "kind": "config", "path": PATH, "exists": true, "settings": settings });
    assert_eq!((line, text.lines().count()), (expected, 1));
    let (mut fake, written) = (fake("lora = 'a\"b'", &[]), "lora = \"a\\\"b\"\n");
    assert_eq!(said("config", &mut fake), format!("{PATH}\n{written}"));
}
