//! What becomes of the prompts. Separate because it needs the tokenizer and nothing else.

use serde_json::{Value, json};

use super::{Here, Said};
use crate::cli::job::Job;
use crate::error::Result;
use crate::pipeline::{self, PromptSyntax, TextOptions, Token, Tokenizer};

/// A prompt as it is given and as it is read.
struct Prompt<'a> {
    name: &'static str,
    given: &'a str,
    resolved: &'a str,
    options: TextOptions,
    is_used: bool,
}

/// What of prompts a pass sees.
#[derive(Debug, Clone, Copy)]
pub(super) struct Context {
    /// Texts that the text encoder reads one by one; a shorter prompt is padded to as many.
    pub chunks: usize,
    /// Tokens of each, padding included.
    pub length: usize,
}

pub(super) fn say(job: &Job, here: Option<&Here>, said: &mut Said) -> Result<Context> {
    let tokenizer = match here {
        Some(here) => pipeline::tokenizer(&here.model, &job.additions)?,
        None => {
            said.line("tokenizer", "CLIP's, as the model's own is not here");
            Tokenizer::clip("<|endoftext|>")?
        }
    };
    let texts = job.texts(job.seed);
    let options = TextOptions { syntax: job.prompt_syntax, clip_skip: job.clip_skip.get() };
    let prompt = Prompt {
        name: "prompt",
        given: &job.prompt,
        resolved: &texts.prompt,
        options,
        is_used: true,
    };
    let negative_prompt = Prompt {
        name: "negative prompt",
        given: &job.negative_prompt,
        resolved: &texts.negative_prompt,
        options: options.of_negative(),
        is_used: job.guidance_scale.needs_unconditional(),
    };
    said.line("prompt syntax", job.prompt_syntax.name());
    said.field("prompt_syntax", job.prompt_syntax.name());
    let mut context = Context { chunks: 1, length: tokenizer.length() };
    for (prompt, field) in [(prompt, "prompt"), (negative_prompt, "negative_prompt")] {
        let (json, chunks) = prompt.say(&tokenizer, said)?;
        said.field(field, json);
        if prompt.is_used {
            context.chunks = context.chunks.max(chunks);
        }
    }
    Ok(context)
}

impl Prompt<'_> {
    /// What is said of it, and its chunks.
    fn say(&self, tokenizer: &Tokenizer, said: &mut Said) -> Result<(Value, usize)> {
        let Self { name, given, resolved, options, is_used } = *self;
        let TextOptions { syntax, clip_skip } = options;
        said.line(name, given);
        if resolved != given {
            said.line("  resolved", resolved);
        }
        if !is_used {
            said.line("  unused", "--guidance-scale is 1 or less");
        }
        let cut = tokenizer.chunks(resolved, syntax).map_err(|error| error.context(name))?;
        let room = tokenizer.length().saturating_sub(2);
        let (mut chunks, of) = (Vec::new(), cut.chunks.len());
        for (number, chunk) in (1..).zip(&cut.chunks) {
            let tokens = tokenizer.tokens_of(chunk);
            let (count, words) = (tokens.len(), words(&tokens, syntax));
            said.line(&format!("  chunk {number} of {of}"), format!("{count} of {room}: {words}"));
            let token = |Token { id, text, weight }: &Token| {
                // As the user wrote it, not as the nearest f64.
                let weight: f64 = weight.to_string().parse().unwrap_or(f64::from(*weight));
                json!({"id": id, "text": text, "weight": weight})
            };
            chunks.push(Value::Array(tokens.iter().map(token).collect()));
        }
        if let Some(cut_off) = &cut.truncated {
            said.line("  cut off", cut_off);
        }
        if clip_skip > 0 {
            said.line("  clip skip", clip_skip);
        }
        let json = json!({
            "given": given,
            "resolved": resolved,
            "is_used": is_used,
            "chunks": chunks,
            "cut_off": cut.truncated,
            "clip_skip": clip_skip,
        });
        Ok((json, of))
    }
}

/// The tokens, each with its weight where that is not 1.
fn words(tokens: &[Token], syntax: PromptSyntax) -> String {
    let word = |Token { text, weight, .. }: &Token| match syntax {
        PromptSyntax::A1111 if *weight != 1.0 => format!("{text}:{weight}"),
        PromptSyntax::Plain | PromptSyntax::A1111 => text.clone(),
    };
    tokens.iter().map(word).collect::<Vec<_>>().join(" ")
}
