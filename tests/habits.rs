//! What users of command lines expect beside pictures: completions, colours, variables. Separate
//! because shells and the environment take part.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};

use super::processes::program;

fn stdout(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout).unwrap()
}

#[cfg(target_os = "linux")]
#[test]
fn bash_completes_flags_and_commands_with_the_script() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("tiny-sd.bash");
    std::fs::write(&script, stdout(program().args(["completions", "bash"]))).unwrap();
    let mut bash = Command::new("bash");
    match bash.arg("-n").arg(&script).stderr(Stdio::piped()).output() {
        Ok(output) => {
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success() && stderr.is_empty(), "{stderr}");
        }
        Err(error) => return println!("bash: {error}: nothing was tested"),
    }
    for (words, expected) in [
        ("--ste", "--steps"),
        ("a --low", "--low-memory"),
        ("comple", "completions"),
        ("compare --aga", "--against"),
        ("worker --max-w", "--max-waiting"),
        ("batch --out-d", "--out-dir"),
        ("completions fi", "fish"),
        ("mode", "models"),
        ("models pu", "pull"),
        ("models rm --y", "--yes"),
    ] {
        let call = "source \"$1\"; COMP_WORDS=(tiny-sd $2); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); \
                    complete=$(complete -p tiny-sd); complete=${complete#*-F }; \
                    ${complete%% *} tiny-sd \"${COMP_WORDS[COMP_CWORD]}\" \
                    \"${COMP_WORDS[COMP_CWORD - 1]}\"; echo \"${COMPREPLY[@]}\"";
        let mut bash = Command::new("bash");
        let completed = stdout(bash.args(["-c", call, "bash"]).arg(&script).arg(words));
        assert_eq!(completed.trim(), expected, "{words}");
    }
}

#[test]
fn colours_are_for_terminals_and_for_nobody_who_wants_none() {
    for (words, variables, is_coloured) in [
        ("--help", &[][..], false),
        ("--help", &[("CLICOLOR_FORCE", "1")], true),
        ("--help", &[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")], false),
        ("worker --help", &[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")], false),
        ("schedulers", &[("CLICOLOR_FORCE", "1")], false),
        ("x --stesp 3", &[("CLICOLOR_FORCE", "1")], false),
    ] {
        let mut command = program();
        command.env_remove("NO_COLOR").env_remove("CLICOLOR_FORCE");
        command.args(words.split(' ')).envs(variables.iter().copied());
        let output = command.output().unwrap();
        let has_colour = [&output.stdout, &output.stderr].iter().any(|text| text.contains(&0x1b));
        assert_eq!(has_colour, is_coloured, "{words} {variables:?}");
    }
}

#[test]
fn help_names_every_variable_that_the_source_reads() {
    let mut names = BTreeSet::new();
    collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut names);
    assert!(names.len() >= 15 && names.contains("TINY_SD_ISA"), "{names:?}");
    let help = stdout(program().arg("--help"));
    for name in names {
        assert!(help.contains(&name), "{name}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn the_file_of_defaults_is_read_where_config_says_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny-sd/config.toml");
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    let run = |text: &str, words: &[&str]| {
        std::fs::write(&path, text).unwrap();
        let mut command = program();
        command.env_remove("TINY_SD_CONFIG").env("XDG_CONFIG_HOME", folder.path()).args(words);
        command.output().unwrap()
    };
    let output = run("steps = 30", &["config"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(said, format!("{}\nsteps = 30\n", path.display()));
    let output = run("stesp = 30", &["x"]);
    let said = String::from_utf8_lossy(&output.stderr);
    let expected = format!(
        "error: {}, line 1: \"stesp\" is no flag's name; did you mean steps?\n",
        path.display()
    );
    assert_eq!((output.status.code(), &*said), (Some(2), &*expected));
    // It gets as far as the model, which is not there.
    let output = run("model = \"/nowhere.ckpt\"\noffline = true", &["x", "-o", "-"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("/nowhere.ckpt") && said.lines().count() == 1, "{said}");
}

/// String literals of Rust files that look like variables of the environment.
fn collect(folder: &Path, names: &mut BTreeSet<String>) {
    const PREFIXES: [&str; 5] = ["TINY_SD_", "HF_", "HUGGING", "TRANSFORMERS_", "XDG_"];
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, names);
        } else if path.extension().is_some_and(|suffix| suffix == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let is_name = |word: &&str| {
                let is_part = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
                PREFIXES.iter().any(|prefix| word.starts_with(prefix))
                    && word.chars().all(is_part)
                    && !word.starts_with("TINY_SD_TEST_")
            };
            names.extend(text.split('"').filter(is_name).map(str::to_owned));
        }
    }
}
