//! Tests of command lines. Separate because each flag has its row here.

use super::super::device::DeviceSpec;
use super::super::prompt::MAX_PROMPT_BYTES;
pub use super::super::surroundings::tests::Fake;
use super::*;
use crate::cli::graphics::Graphics;
use crate::cli::values::Side;
use crate::error::Kind;
use crate::weights::{EmbeddingFile, LoraFile};

/// Words are separated by `|`.
pub fn parse_words(words: &str, surroundings: &mut Fake) -> Result<Request> {
    let words = words.split('|').filter(|_| !words.is_empty());
    parse(std::iter::once("tiny-sd").chain(words).map(OsString::from), surroundings)
}

pub fn job_of(words: &str) -> Job {
    match parse_words(words, &mut Fake::default()) {
        Ok(Request::Paint(job)) => *job,
        other => panic!("{words:?} gave {other:?}"),
    }
}

#[test]
fn a_prompt_alone_is_a_job_with_the_defaults() {
    let job = job_of("a fox");
    let expected = Job {
        prompt: "a fox".into(),
        negative_prompt: String::new(),
        alternatives: Alternatives::default(),
        prompt_syntax: PromptSyntax::Plain,
        clip_skip: "0".parse().unwrap(),
        model: ModelSource::Hub("segmind/tiny-sd".into()),
        configs: None,
        vae: None,
        revision: None,
        variant: None,
        additions: Additions::default(),
        offline: false,
        seed: 7,
        steps: "25".parse().unwrap(),
        guidance_scale: "7.5".parse().unwrap(),
        size: SizeRequest::default(),
        image: None,
        scheduler: None,
        dtype: DtypeChoice::Auto,
        device: DevicePlan::whole(DeviceSpec::Auto),
        vae_tiling: false,
        threads: None,
        low_memory: false,
        count: "1".parse().unwrap(),
        batch_size: BatchSize::Auto,
        output: OutputPlan::Fresh("tiny-sd-{seed}.png".into()),
        preview: None,
        preview_in: PreviewPlace::File,
        verbosity: Verbosity::Normal,
        stats: false,
        notes: Vec::new(),
        json: false,
    };
    assert_eq!(job, expected);
}

#[test]
fn each_flag_changes_what_it_names_and_nothing_else() {
    type Change = fn(&mut Job);
    let base = job_of("x");
    let rows: [(&str, Change); 36] = [
        ("x|--preview|5|--preview-in|sixel", |job| {
            job.preview = NonZeroUsize::new(5);
            job.preview_in = PreviewPlace::Terminal(Graphics::Sixel);
        }),
        ("x|--preview|5|--preview-in|auto", |job| job.preview = NonZeroUsize::new(5)),
        ("x|-n|", |job| job.negative_prompt = String::new()),
        ("--prompt|-- a --flag", |job| job.prompt = "-- a --flag".into()),
        ("--prompt|", |job| job.prompt = String::new()),
        ("--|worker", |job| job.prompt = "worker".into()),
        ("x|-n|-text", |job| job.negative_prompt = "-text".into()),
        ("x|--negative-prompt|b", |job| job.negative_prompt = "b".into()),
        ("x|-m|./dir", |job| job.model = ModelSource::Folder("./dir".into())),
        ("x|--model|a/b", |job| job.model = ModelSource::Hub("a/b".into())),
        ("x|--revision|v1", |job| job.revision = Some("v1".parse().unwrap())),
        ("x|-m|a.ckpt|--config|b", |job| {
            job.model = ModelSource::File("a.ckpt".into());
            job.configs = Some("b".into());
        }),
        ("x|--vae|a.pt", |job| job.vae = Some(ModelSource::File("a.pt".into()))),
        ("x|--variant|fp16", |job| job.variant = Some("fp16".parse().unwrap())),
        ("x|--lora|a.safetensors:0.5|--lora|b:c|--lora-skip-unmatched", |job| {
            let lora = |path: &str, scale| LoraFile { path: path.into(), scale };
            job.additions.loras = vec![lora("a.safetensors", 0.5), lora("b:c", 1.0)];
            job.additions.skips_unmatched = true;
        }),
        ("x|--embedding|a.pt|--embedding|b=dir/c=.pt", |job| {
            let file = |name: Option<&str>, path: &str| EmbeddingFile {
                name: name.map(str::to_owned),
                path: path.into(),
            };
            job.additions.embeddings = vec![file(None, "a.pt"), file(Some("b"), "dir/c=.pt")];
        }),
        ("--offline|x", |job| job.offline = true),
        ("x|-s|42", |job| job.seed = 42),
        ("x|--seed|18446744073709551615", |job| job.seed = u64::MAX),
        ("x|--steps|1000", |job| job.steps = "1000".parse().unwrap()),
        ("x|-g|0", |job| job.guidance_scale = "0".parse().unwrap()),
        ("x|--prompt-syntax|a1111", |job| job.prompt_syntax = PromptSyntax::A1111),
        ("x|--clip-skip|1", |job| job.clip_skip = "1".parse().unwrap()),
        ("x|-W|8", |job| job.size.width = "8".parse().ok()),
        ("x|--height|4096", |job| job.size.height = "4096".parse().ok()),
        ("x|--scheduler|Heun", |job| job.scheduler = SchedulerChoice::find("heun")),
        ("x|--dtype|bf16", |job| job.dtype = DtypeChoice::Bf16),
        ("x|--device|cpu", |job| job.device = DevicePlan::whole(DeviceSpec::Cpu)),
        ("x|--count|2|-o|{seed}.png", |job| {
            job.count = "2".parse().unwrap();
            job.output = OutputPlan::Fresh("{seed}.png".into());
        }),
        ("x|--batch-size|4", |job| job.batch_size = BatchSize::Fixed(4)),
        ("x|--threads|3", |job| job.threads = Some(3)),
        ("x|--vae-tiling", |job| job.vae_tiling = true),
        ("x|--low-memory", |job| job.low_memory = true),
        ("x|--json", |job| job.json = true),
        ("x|-q", |job| job.verbosity = Verbosity::Quiet),
        ("x|--verbose", |job| job.verbosity = Verbosity::Verbose),
    ];
    for (words, change) in rows {
        let mut expected = base.clone();
        change(&mut expected);
        assert_eq!(job_of(words), expected, "{words}");
    }
    let size = job_of("x|-W|768").size.or(crate::image::ImageSize { height: 512, width: 512 });
    assert_eq!(size.to_string(), "768x512");
    assert_eq!(job_of("x|-H|8").size.height.map(Side::get), Some(8));
}

#[test]
fn what_cannot_be_is_a_usage_error_on_one_line_that_names_it() {
    let long = format!("x|-n|{}", "a".repeat(MAX_PROMPT_BYTES + 1));
    for (words, expected) in [
        ("", "no prompt; try: tiny-sd"),
        ("a|red|fox", "3 arguments where one prompt is expected; quote it: tiny-sd \"a red fox\""),
        ("--|a|fox", "2 arguments where one prompt"),
        ("a|--prompt|b", "the prompt is given twice"),
        ("a|--|b", "the prompt is given twice"),
        ("wroker", "did you mean"),
        ("x|--stesp|3", "similar argument exists: '--steps'"),
        ("x|--steps|0", "1 to 1000"),
        ("x|--steps|1001", "1 to 1000"),
        ("x|--count|0", "1 to 10000"),
        ("x|--clip-skip|-1", "0 to 100"),
        ("x|--prompt-syntax|comfy", "plain or a1111"),
        ("x <lora:a:1>|--prompt-syntax|a1111", "the prompt: <lora:…> is not read in prompts"),
        ("(x:2000)|--prompt-syntax|a1111", "the prompt: \"x\" has the weight 2000"),
        ("x|-n|(y:-1e9)(y:-2000)|--prompt-syntax|a1111", "the negative prompt: \"y\" has"),
        ("x|-W|500", "a multiple of 8 from 8 to 4096; 496 and 504 are near"),
        ("x|-W|0", "a multiple of 8"),
        ("x|-H|-8", "a multiple of 8"),
        ("x|-H|4104", "8 to 4096"),
        ("x|-g|nan", "a number from 0 to 1000"),
        ("x|-g|inf", "a number from 0 to 1000"),
        ("x|-g|-1", "a number from 0 to 1000"),
        ("x|-s|-1", "for a random one leave it out"),
        ("x|-s|18446744073709551615|--count|2", "beyond the last seed"),
        ("x|--threads|0", "1..=1024"),
        ("x|--lora|a:1e9", "from -100 to 100"),
        ("x|--lora|", "FILE:SCALE"),
        ("x|--lora-skip-unmatched", "--lora-skip-unmatched without --lora"),
        ("x|--embedding|=a", "NAME=FILE"),
        ("x|--scheduler|eular", "did you mean euler?"),
        ("x|--dtype|f64", "one of auto, f32, f16, bf16"),
        ("x|--device|gpu", "one of auto, cpu"),
        ("x|--device|cpu|--device|mock", "given 2 times; several devices are for tiny-sd bat"),
        ("x|--preview|0", "--preview"),
        ("x|-o|-|--json", "--json prints events on standard output"),
        ("x|--preview|5|--preview-in|vt100", "one of auto, file, kitty, iterm2, sixel"),
        ("x|--preview-in|kitty", "--preview"),
        ("x|--preview|5|--preview-in|kitty|-q", "--quiet keeps standard error empty"),
        ("x|-o|-|--preview|5|--preview-in|file", "--preview writes files beside the picture"),
        ("x|-o|-|--preview|5", "--preview writes files beside the picture"),
        ("x|-m|nope", "there is no such folder"),
        ("x|-m|./m|--revision|v1", "--revision v1 is for repositories of the hub"),
        ("x|-m|a.ckpt|--revision|v1", "; a.ckpt is a file"),
        ("x|-m|a.ckpt|--variant|fp16", "--variant fp16 chooses among several files"),
        ("x|-m|./m|--config|c", "--config c is for a model in one file; ./m is a folder"),
        ("x|--config|c", "segmind/tiny-sd is a repository and has its own"),
        ("x|--revision|../x", "letters, digits"),
        ("x|-q|-v", "cannot be used with"),
        ("x|-q|--stats", "cannot be used with"),
        (&long, "the negative prompt is longer than 65536 bytes"),
    ] {
        let error = parse_words(words, &mut Fake::default()).unwrap_err();
        let message = error.to_string();
        assert_eq!(error.kind(), Kind::Usage, "{message}");
        assert!(message.contains(expected) && !message.contains('\n'), "{words}: {message}");
    }
}

#[test]
fn help_and_version_are_shown_and_not_errors() {
    for words in ["-h", "--help", "help", "-V", "--version"] {
        let request = parse_words(words, &mut Fake::default()).unwrap();
        assert!(matches!(request, Request::Show(_)), "{words}");
    }
}

#[test]
fn previews_are_drawn_where_a_terminal_takes_pictures() {
    let check = |words: &str, is_terminal: bool, expected: Option<Graphics>| {
        let variables = vec![("TERM", "xterm-kitty")];
        let mut fake = Fake { stderr_is_terminal: is_terminal, variables, ..Fake::default() };
        match parse_words(words, &mut fake) {
            Ok(Request::Paint(job)) => assert_eq!(job.preview_in.graphics(), expected, "{words}"),
            other => panic!("{words:?} gave {other:?}"),
        }
    };
    check("x|--preview|5", true, Some(Graphics::Kitty));
    // No file is written, so the picture may go into a pipe.
    check("x|--preview|5|-o|-", true, Some(Graphics::Kitty));
    check("x|--preview|5", false, None);
    // Programs are told of files, and who wants silence sees the file.
    check("x|--preview|5|--json", true, None);
    check("x|--preview|5|-q", true, None);
    check("x|--preview|5|--preview-in|file", true, None);
    check("x|--preview|5|--preview-in|sixel", true, Some(Graphics::Sixel));
}
