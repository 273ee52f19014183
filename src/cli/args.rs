//! The flags as clap sees them, and the help. Separate from what they mean: adding a flag is one
//! field here and one line in `job.rs`.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::LazyLock;

use clap::{ArgAction, Parser};

use super::device::DevicePlan;
use super::graphics::PreviewPlace;
use super::grid::Axis;
use super::model::{HubName, ModelSource};
use super::values::{
    BatchSize, ClipSkip, Count, DtypeChoice, GuidanceScale, Side, Steps, Strength, Verbosity,
};
use crate::pipeline::PromptSyntax;
use crate::schedule::SchedulerChoice;
use crate::weights::{EmbeddingFile, LoraFile};

/// The command line, each value parsed on its own.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "tiny-sd",
    version,
    about = "Makes pictures from prompts with Stable Diffusion.",
    after_help = "tiny-sd --help says more, with an example for every flag.",
    after_long_help = AFTER_LONG_HELP,
    override_usage = "tiny-sd [OPTIONS] PROMPT\n       tiny-sd [OPTIONS] -- PROMPT",
    disable_help_subcommand = true
)]
pub(super) struct Args {
    /// What the picture shows; - reads it from standard input
    ///
    /// One argument: quote it if it has spaces. `--prompt TEXT` and `-- PROMPT` take any text,
    /// also one that looks like a flag or a command. Without a prompt, standard input is read
    /// unless it is a terminal.
    #[arg(value_name = "PROMPT")]
    pub words: Vec<String>,

    /// What stands after `--` is always a prompt.
    #[arg(last = true, hide = true)]
    pub after_dashes: Vec<String>,

    /// Take the settings of a picture; flags that are given win
    ///
    /// Reads what tiny-sd records, all of it, the model included, and what AUTOMATIC1111's web UI
    /// and stable-diffusion.cpp write in PNG, JPEG and WebP files.
    #[arg(long, value_name = "PICTURE")]
    pub from: Option<PathBuf>,

    /// A sheet of pictures that differ in one or two flags: the first across, the second down
    ///
    /// Axes are steps, guidance-scale, scheduler, seed, strength and clip-skip, each with what the
    /// flag takes, and prompt-sr: its first value is in the prompts, the others take its place.
    /// 1-5, 10-50(+10) and 1-10[4] are ranges; a value with a comma is in quotes. At most 256
    /// pictures, each as it would be alone; the sheet's record has the settings of all.
    #[arg(long, value_name = "NAME=V,V,…", num_args = 1..=2, action = ArgAction::Append)]
    pub grid: Vec<Axis>,

    /// Where --preview is seen: auto, file, or drawn as kitty, iterm2 or sixel terminals take it
    ///
    /// auto draws where standard error is a terminal that is known to take pictures (kitty,
    /// Ghostty, iTerm2, WezTerm, mintty, foot, mlterm; not within tmux or screen), without
    /// --json and --quiet, and else writes a file.
    #[arg(long, value_name = "PLACE", default_value = "auto", requires = "preview")]
    pub preview_in: PreviewPlace,

    #[command(flatten)]
    pub picture: PictureArgs,

    #[command(flatten)]
    pub model: ModelArgs,

    #[command(flatten)]
    pub run: RunArgs,
}

/// What makes a picture, and where it goes: the flags that each line of a batch may have too.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct PictureArgs {
    /// The prompt, as a flag: any text
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,

    /// What the picture should not show
    #[arg(short, long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    #[arg(allow_hyphen_values = true)]
    pub negative_prompt: String,

    /// How prompts are read: plain, or a1111 with weights such as (word:1.2)
    ///
    /// plain is diffusers: the text as it is, cut off after 75 tokens. a1111 is AUTOMATIC1111's web
    /// UI: (word) weighs 1.1 times as much, [word] 1/1.1 times, (word:1.3) 1.3 times; \( is a
    /// bracket; BREAK begins another chunk; and nothing is cut off: every 75 tokens are a chunk.
    #[arg(long, value_name = "SYNTAX", default_value = "plain")]
    pub prompt_syntax: PromptSyntax,

    /// Folder of files for __name__ in prompts: each picture's seed chooses a line
    ///
    /// __color__ is a line of color.txt, __a/b__ one of a/b.txt. Lines may have {red|blue},
    /// weights ({2::red|blue}) and other names. {red|blue} is also read with --prompt-syntax
    /// a1111; elsewhere braces are text. \{ is a brace.
    #[arg(long, value_name = "DIR")]
    pub wildcards: Option<PathBuf>,

    /// Which prompts were chosen already: those of a picture's record.
    #[arg(skip)]
    pub chosen: Chosen,

    /// Where the picture goes: a .png, .jpg or .webp file, a folder, or - for standard output
    ///
    /// The suffix is the format: PNG and WebP keep every bit, JPEG has quality 95 and full colour.
    /// Standard output and folders get PNG.
    /// {seed} and {index} (from 1) in the name are filled in; with --count above 1 and neither,
    /// -INDEX goes before the suffix. A plain name is overwritten; a default, numbered or
    /// filled-in name never is: -1, -2, … is appended instead. [default: tiny-sd-SEED.png]
    #[arg(short, long, value_name = "PATH")]
    pub output: Option<PathBuf>,

    /// Seed of the noise; the same seed gives the same picture [default: random, and printed]
    #[arg(short, long, value_name = "N", allow_negative_numbers = true)]
    #[arg(value_parser = parse_seed)]
    pub seed: Option<u64>,

    /// Denoising steps, 1 to 1000
    #[arg(long, value_name = "N", default_value = "25", allow_negative_numbers = true)]
    pub steps: Steps,

    /// How strongly the prompt rules, 0 to 1000; at 1 or less the negative prompt is unused
    #[arg(short, long, value_name = "X", default_value = "7.5", allow_negative_numbers = true)]
    #[arg(alias = "cfg-scale")]
    pub guidance_scale: GuidanceScale,

    /// A picture to begin with: a PNG, JPEG or WebP
    ///
    /// It is resized to --width and --height, which are its own, rounded down to multiples of 8,
    /// where they are not given.
    #[arg(short, long, value_name = "PICTURE")]
    pub image: Option<PathBuf>,

    /// What of --image is painted: white is, black stays
    ///
    /// Models with an inpainting UNet see it; with others the rest is put back after every step.
    #[arg(long, value_name = "PICTURE", alias = "mask-image")]
    pub mask: Option<PathBuf>,

    /// How far from --image, 0 to 1: so much of the steps [default: 0.8, with --mask 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    #[arg(alias = "denoising-strength")]
    pub strength: Option<Strength>,

    /// Width in pixels, a multiple of 8 up to 4096 [default: the model's own]
    #[arg(short = 'W', long, value_name = "PIXELS", allow_negative_numbers = true)]
    pub width: Option<Side>,

    /// Height in pixels, a multiple of 8 up to 4096 [default: the model's own]
    #[arg(short = 'H', long, value_name = "PIXELS", allow_negative_numbers = true)]
    pub height: Option<Side>,

    /// dpm++2m, dpm++2m-karras, euler-a, unipc, … [default: the model's own]
    ///
    /// `tiny-sd schedulers` lists them. It takes the names of diffusers' classes and of
    /// AUTOMATIC1111's samplers, too.
    #[arg(long, value_name = "NAME", value_parser = SchedulerChoice::parse)]
    #[arg(alias = "sampler-name")]
    pub scheduler: Option<SchedulerChoice>,

    /// Leave out the last N layers of the text encoder, as diffusers counts them
    ///
    /// AUTOMATIC1111, stable-diffusion.cpp and model pages count from 1: their "Clip skip: 2" is 1
    /// here, their 1 is 0. With --prompt-syntax plain the negative prompt keeps all layers, as in
    /// diffusers.
    #[arg(long, value_name = "N", default_value = "0", allow_negative_numbers = true)]
    pub clip_skip: ClipSkip,

    /// Number of pictures, 1 to 10000, with seeds N, N+1, …
    #[arg(long, value_name = "N", default_value = "1", allow_negative_numbers = true)]
    #[arg(alias = "n-iter")]
    pub count: Count,
}

/// Which prompts have no alternatives any more, whatever they look like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Chosen {
    /// The prompt.
    pub prompt: bool,
    /// The negative prompt.
    pub negative_prompt: bool,
}

/// The model, and where it is computed: the same for all pictures of a run.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct ModelArgs {
    /// A Hugging Face repository (org/name), a folder in diffusers layout, one file, or demo
    ///
    /// demo is a small model that is in the program, and needs neither network nor files: cartoon
    /// portraits of 128x128. Its own steps and guidance scale hold where none are given. A folder
    /// of that name is ./demo.
    ///
    /// One file is a .safetensors or .ckpt of Stable Diffusion 1.x or 2.x as the original code
    /// names its weights. CLIP's tokenizer is built in.
    #[arg(short, long, value_name = "REPO|DIR|FILE|demo", default_value = default_model())]
    pub model: ModelSource,

    /// A folder in diffusers layout with what a model in one file does not say
    ///
    /// Whatever is there of unet/, vae/ and text_encoder/config.json, scheduler/ and tokenizer/.
    /// The rest follows from the shapes of the weights. Of Stable Diffusion 2.x, models for 512x512
    /// need one whose scheduler predicts epsilon.
    #[arg(long = "config", value_name = "DIR")]
    pub configs: Option<PathBuf>,

    /// Another VAE than the model's: a repository, a folder or a file, also TAESD
    ///
    /// A folder or repository in diffusers layout with the VAE in it or in its vae/, or one file of
    /// AutoencoderKL, AutoencoderTiny or taesd_decoder.
    #[arg(long, value_name = "REPO|DIR|FILE")]
    pub vae: Option<ModelSource>,

    /// Branch, tag or commit of the repository [default: main]
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<HubName>,

    /// Weights to prefer where a model has several, such as fp16
    #[arg(long, value_name = "NAME")]
    pub variant: Option<HubName>,

    /// A LoRA, and how strongly it acts [default: 1]; given several times, they add up
    ///
    /// For the UNet and the text encoder, in the layouts of kohya's scripts, diffusers and PEFT:
    /// .safetensors or a pickle. Only its factors go to a remote device.
    #[arg(long, value_name = "FILE[:SCALE]", action = ArgAction::Append)]
    pub lora: Vec<LoraFile>,

    /// Leave out what a LoRA changes in weights that the model does not have
    ///
    /// A model such as segmind/tiny-sd lacks blocks of the one that it was made from, which the
    /// LoRAs for that one change too.
    #[arg(long)]
    pub lora_skip_unmatched: bool,

    /// A textual-inversion embedding, which prompts name [default: by its file]
    ///
    /// .safetensors, .pt or .bin of diffusers or AUTOMATIC1111. NAME is then a word for prompts.
    #[arg(long, value_name = "[NAME=]FILE", action = ArgAction::Append)]
    pub embedding: Vec<EmbeddingFile>,

    /// Use only what has been downloaded before
    #[arg(long)]
    pub offline: bool,

    /// Number type of the computation: auto, f32, f16 or bf16
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    pub dtype: DtypeChoice,

    /// Where it is computed: auto, cpu, cuda, cuda:N, quic://… of a worker, @FILE with such a URL,
    /// or mock
    ///
    /// auto is what TINY_SD_DEVICE says, else cpu; `tiny-sd devices` lists what this machine has.
    /// text=DEVICE,unet=DEVICE,vae=DEVICE places the stages; one that is not named is auto. mock
    /// is a worker inside of this process.
    #[arg(long, value_name = "DEVICE", default_value = "auto", action = ArgAction::Append)]
    pub device: Vec<DevicePlan>,

    /// Decode in tiles: less memory, two to three times the time of the decoder, no seams
    ///
    /// Done unasked where a worker's memory does not suffice.
    #[arg(long)]
    pub vae_tiling: bool,

    /// Threads of the CPU [default: one per physical core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,

    /// Keep weights on this CPU small: about half the memory, slower convolutions
    #[arg(long)]
    pub low_memory: bool,
}

/// What is told on the way.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct RunArgs {
    /// Pictures that go through the UNet together: auto, or 1 to 64
    ///
    /// The pictures are the same, bit for bit on the CPU. More at once take more memory, and are
    /// ready at the same time.
    #[arg(long, value_name = "N", default_value = "auto", allow_negative_numbers = true)]
    pub batch_size: BatchSize,

    /// Show an approximate picture after every N steps: OUTPUT-preview.png, gone at the end
    #[arg(long, value_name = "N")]
    pub preview: Option<NonZeroUsize>,

    /// Print nothing but errors
    #[arg(short, long, action = ArgAction::SetTrue, conflicts_with = "verbose")]
    pub quiet: bool,

    /// Print what each stage took, what workers did in it, and the peak of memory
    #[arg(long, conflicts_with = "quiet")]
    pub stats: bool,

    /// Print an event a line, as JSON, on standard output
    ///
    /// README.md has the events and their fields, which are the same for every device.
    #[arg(long)]
    pub json: bool,

    /// Print the settings and how long each stage took
    #[arg(short, long, action = ArgAction::SetTrue)]
    pub verbose: bool,
}

impl RunArgs {
    /// How much is said.
    pub fn verbosity(&self) -> Verbosity {
        match (self.quiet, self.verbose) {
            (true, _) => Verbosity::Quiet,
            (false, true) => Verbosity::Verbose,
            (false, false) => Verbosity::Normal,
        }
    }
}

/// The model of those who name none: `TINY_SD_MODEL`, or else the one that this program is for.
fn default_model() -> &'static str {
    static MODEL: LazyLock<String> = LazyLock::new(|| {
        let set = std::env::var("TINY_SD_MODEL").ok().filter(|model| !model.is_empty());
        set.unwrap_or_else(|| "segmind/tiny-sd".into())
    });
    &MODEL
}

fn parse_seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| {
        format!("a seed is a whole number from 0 to {}; for a random one leave it out", u64::MAX)
    })
}

const AFTER_LONG_HELP: &str = "\
Examples:
  tiny-sd \"Portrait of a pretty girl\" -o girl.png
  tiny-sd --prompt \"--- a dashed line\"           any text as a prompt
  tiny-sd -- help                                the prompt \"help\"
  echo \"a red fox\" | tiny-sd -                   the prompt from standard input
  tiny-sd \"a fox\" -n \"blurry, text\"              --negative-prompt
  tiny-sd \"a (red:1.3) fox\" --prompt-syntax a1111
  tiny-sd \"a {red|blue} __animal__\" --wildcards ./lists --count 4
  tiny-sd \"a fox\" -o - | display                 --output to a pipe
  tiny-sd \"a fox\" -o \"fox-{seed}.png\"            --output with the seed in its name
  tiny-sd \"a fox\" -o fox.jpg                    a JPEG; .webp is smaller than .png
  tiny-sd \"a fox\" -m ./my-model                  --model from a folder
  tiny-sd \"a fox\" -m v1-5.safetensors            --model in one file, also .ckpt
  tiny-sd \"a fox\" -m fox.ckpt --config ./sd-2    what it does not say, from a folder
  tiny-sd \"a fox\" --vae madebyollin/taesd        another VAE: this one is small and fast
  tiny-sd \"a fox\" -m org/name --revision v1.0    --model from the hub, a certain --revision
  tiny-sd \"a fox\" --variant fp16                 the files named .fp16.
  tiny-sd \"a fox\" --offline                      no network
  tiny-sd \"a fox\" --lora ink.safetensors:0.8 --lora film.safetensors
  tiny-sd \"a fox\" --lora sd15.safetensors --lora-skip-unmatched
  tiny-sd \"a fox in the style of wash\" --embedding wash=learned_embeds.bin
  tiny-sd \"a fox\" -s 42                          --seed
  tiny-sd \"a fox\" --steps 50
  tiny-sd \"a fox\" -g 5                           --guidance-scale
  tiny-sd \"a fox\" -W 768 -H 512                  --width, --height
  tiny-sd \"a fox\" --image sketch.jpg            begins with a picture
  tiny-sd \"a fox\" -i sketch.jpg --strength 0.5   nearer to it
  tiny-sd \"a hat\" -i fox.png --mask head.png     only where the mask is white
  tiny-sd \"a fox\" --scheduler euler-a
  tiny-sd \"a fox\" --scheduler \"DPM++ 2M Karras\"
  tiny-sd schedulers                             all of them (tiny-sd schedulers --help)
  tiny-sd devices                                what --device may be here
  tiny-sd \"a fox\" --clip-skip 1                  what others call \"Clip skip: 2\"
  tiny-sd \"a fox\" --dtype f32 --device cpu --threads 8
  tiny-sd \"a fox\" -W 1024 -H 1024 --vae-tiling  less memory at the end
  tiny-sd \"a fox\" --low-memory                  half the memory, slower convolutions
  tiny-sd \"a fox\" -s 7 --count 4 -o fox.png      fox-1.png … fox-4.png with seeds 7 to 10
  tiny-sd \"a fox\" --count 8 --batch-size 4       four at a time through the UNet
  tiny-sd \"a fox\" --grid steps=10,20 guidance=5,7 -o sheet.png
  tiny-sd \"a red fox\" --grid prompt-sr=red,blue seed=1-4
  tiny-sd \"a fox\" -o fox.png --preview 5          fox-preview.png while it is being made
  tiny-sd \"a fox\" --preview 1 --preview-in sixel  drawn in the terminal
  tiny-sd \"a fox\" -q                             --quiet; -v, --verbose says more
  tiny-sd \"a cat\" --from fox.png                 the settings of fox.png, another prompt
  tiny-sd explain \"a fox\" --steps 30             what that would do, without doing it
  tiny-sd info fox.png                           how it was made (tiny-sd info --help)
  tiny-sd verify fox.png                         whether it comes out the same here
  tiny-sd \"a fox\" -o fox.png --json              what happens, for programs
  tiny-sd batch jobs.jsonl --out-dir out         a picture a line (tiny-sd batch --help)
  tiny-sd worker --listen 0.0.0.0:4433           lend this machine (tiny-sd worker --help)
  tiny-sd models                                 what was downloaded (tiny-sd models --help)
  tiny-sd config                                 the file of defaults, and what it sets
  tiny-sd completions bash                       for the shell (tiny-sd completions --help)
  tiny-sd man                                    the manual page, as roff
  tiny-sd \"a fox\" --device @url.txt --stats      on that machine; --stats says what it did
  tiny-sd compare \"a fox\" --against @url.txt    the first op that differs there
                                                 (tiny-sd compare --help)
  tiny-sd \"a fox\" --device text=cpu,unet=@url.txt,vae=@url.txt

Environment:
  HF_HOME           where downloaded models are kept [default: ~/.cache/huggingface, or beside it
                    in XDG_CACHE_HOME]; HF_HUB_CACHE (or HUGGINGFACE_HUB_CACHE) names the folder
                    itself, HF_HUB_DISABLE_SYMLINKS=1 keeps links out of it
  HF_TOKEN          token for repositories that ask for one (or HUGGING_FACE_HUB_TOKEN, or in the
                    file HF_TOKEN_PATH); HF_HUB_DISABLE_IMPLICIT_TOKEN=1 sends none
  HF_ENDPOINT       another hub [default: https://huggingface.co]
  HF_HUB_OFFLINE    1 is --offline, and so is TRANSFORMERS_OFFLINE=1
  HF_HUB_DOWNLOAD_TIMEOUT, HF_HUB_ETAG_TIMEOUT
                    seconds without a byte, or without an answer, until it is tried again
  HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY
                    the way to the hub
  TINY_SD_MODEL     what --model is where it is not given
  TINY_SD_DEVICE    what --device auto means: whatever --device takes
  TINY_SD_CUDA_LIBS folders with NVIDIA's run-time compiler, before those that are looked into
  TINY_SD_ISA       kernels of the CPU: avx512bf16, avx512, avx2, neon or portable [default: the
                    best that the processor has]
  TINY_SD_CONFIG    the file of defaults [default: ~/.config/tiny-sd/config.toml, or beside it in
                    XDG_CONFIG_HOME]; empty for none
  XDG_CACHE_HOME    what workers and clients know of weights, and compiled kernels, are in its
                    tiny-sd [default: ~/.cache]
  XDG_STATE_HOME    a worker's certificate and token are in its tiny-sd [default: ~/.local/state]
  NO_COLOR          1 shows this help without colours; nothing else has any

Exit codes:
  0    the pictures are written
  1    anything that is not below, such as an output that cannot be written
  2    a wrong command line, or what it names for --image or --mask is no picture
  3    a model or its weights
  4    a remote device or the way to it
  130  interrupted; no partial file is left";
