//! The flags of `tiny-sd batch`, and its help. Separate from what jobs mean: the flags of a picture
//! are those of the single command.

use std::path::PathBuf;

use clap::{CommandFactory, FromArgMatches, Parser, ValueEnum};

use crate::cli::args::{ModelArgs, PictureArgs, RunArgs};
use crate::cli::config::{self, Scope};
use crate::cli::surroundings::Surroundings;

/// The command line of a batch, each value parsed on its own.
#[derive(Debug, Parser)]
pub(super) struct BatchArgs {
    /// The jobs: a file with one a line, or - for standard input
    #[arg(value_name = "JOBS")]
    pub jobs: PathBuf,

    /// The folder of the pictures; made if it is not there
    #[arg(long, value_name = "DIR")]
    pub out_dir: PathBuf,

    /// What a line is: auto, jsonl or text
    ///
    /// jsonl is a JSON object, text is a prompt or flags. auto goes by the suffix (.jsonl, .ndjson,
    /// .json, .txt), else it is jsonl if the first line is a JSON object.
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "auto")]
    #[arg(hide_possible_values = true)]
    pub format: Format,

    /// Begin no other picture once one has failed
    #[arg(long)]
    pub fail_fast: bool,

    #[command(flatten)]
    pub picture: PictureArgs,

    #[command(flatten)]
    pub model: ModelArgs,

    #[command(flatten)]
    pub run: RunArgs,
}

/// What a line of jobs is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// The suffix or the first line says it.
    Auto,
    /// A JSON object.
    Jsonl,
    /// A prompt, or flags.
    Text,
}

/// The flags as clap sees them.
pub(in crate::cli) fn command() -> clap::Command {
    BatchArgs::command()
        .name("tiny-sd batch")
        .about(ABOUT)
        .override_usage("tiny-sd batch [OPTIONS] --out-dir <DIR> JOBS")
        .after_help("tiny-sd batch --help says more, with the exit codes.")
        .after_long_help(AFTER_HELP)
        .mut_arg("prompt", |flag| flag.help("The prompt of jobs that have none of their own"))
        .mut_arg("seed", |flag| flag.help(SEED).long_help(None))
        .mut_arg("output", |flag| flag.help(OUTPUT).long_help(OUTPUT_LONG))
        .mut_arg("count", |flag| flag.help("Pictures of each job, 1 to 10000, seeds N, N+1, …"))
        .mut_arg("device", |flag| flag.help(DEVICE).long_help(DEVICE_LONG))
}

/// Parses what follows `tiny-sd batch`.
pub(super) fn parse(
    words: impl Iterator<Item = std::ffi::OsString>,
    surroundings: &dyn Surroundings,
) -> crate::error::Result<Result<BatchArgs, clap::Error>> {
    let words = std::iter::once("tiny-sd batch".into()).chain(words);
    let matches = config::matches(&command(), words, Scope::Batch, surroundings)?;
    Ok(matches.and_then(|matches| BatchArgs::from_arg_matches(&matches)))
}

const ABOUT: &str = "Makes a picture of every line of a file, and goes on where it was stopped.";

const SEED: &str = "Seed of jobs that have none of their own [default: of each, by its prompt]";

const OUTPUT: &str = "Names of the pictures in DIR [default: {line}-{seed}.png]";

const OUTPUT_LONG: &str = "Names of the pictures in DIR [default: {line}-{seed}.png]

{line} (five digits), {seed} and {index} (from 1, of a job's pictures) are filled in; with a \
count above 1 and neither {seed} nor {index}, -INDEX goes before the suffix. Folders in DIR are \
made. What is there is replaced.";

const DEVICE: &str = "Where it is computed; several devices share the jobs";

const DEVICE_LONG: &str = "Where it is computed: auto, cpu, quic://… of a worker, @FILE, or mock

@FILE has the URL of a worker; text=DEVICE,unet=DEVICE,vae=DEVICE places the stages. Given several \
times, each device takes the next pictures when it is free, and one that is gone gives its \
pictures back to the others.";

const AFTER_HELP: &str = "\
JOBS has one job a line; empty lines are none. A line is one of
  {\"prompt\": \"a fox\", \"seed\": 5, \"width\": 768}    a JSON object (then all lines are)
  a fox                                           a prompt
  --prompt \"a fox\" --seed 5 --cfg_scale 7         flags, as AUTOMATIC1111 takes them
  # nothing                                       a comment, not in JSON
The fields are prompt, negative_prompt, prompt_syntax, wildcards, clip_skip, image, strength, mask,
output, seed, steps, guidance_scale (or cfg_scale), width, height, scheduler (or sampler_name) and
count (or n_iter), each as the flag of that name; the flags of the batch are what a job without the
field has.
All lines are checked before anything runs.

A job without a seed gets one by its prompt, and by how many jobs with that prompt came before it:
the same one whenever the batch runs, whatever other lines are added.

The model is loaded once for each device, and --dtype auto is f32 on all of them: pictures do not
depend on who made them. Each finished picture is a line of JSON on standard output (README.md has
the fields), one that cannot be made too, and the others are made all the same. What is done is
written down in DIR/tiny-sd-batch.jsonl: the same command again makes what is missing, damaged or
changed, and nothing else. While a batch runs in DIR, no other can.

Examples:
  tiny-sd batch prompts.txt --out-dir out --steps 30 -s 7
  tiny-sd batch jobs.jsonl --out-dir out --device cpu --device @url.txt
  generate-jobs | tiny-sd batch - --out-dir out --fail-fast
  tiny-sd batch jobs.jsonl --out-dir out -o \"{seed}/{line}.png\" --json

Exit codes:
  0    every picture is there
  1    the batch could not go on, such as a full disk or a folder in use
  2    a wrong command line, or a line of JOBS that is no job
  3    the model or its weights
  4    no device could be used, or none is left
  5    some pictures could not be made
  6    no picture could be made
  130  interrupted; finished pictures stay";
