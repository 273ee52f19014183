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

pub(super) fn say(job: &Job, here: Option<&Here>, said: &mut Said) -> Result<()> {
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
    let json = prompt.say(&tokenizer, said)?;
    said.field("prompt", json);
    let json = negative_prompt.say(&tokenizer, said)?;
    said.field("negative_prompt", json);
    Ok(())
}

impl Prompt<'_> {
    fn say(&self, tokenizer: &Tokenizer, said: &mut Said) -> Result<Value> {
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
        Ok(json!({
            "given": given,
            "resolved": resolved,
            "is_used": is_used,
            "chunks": chunks,
            "cut_off": cut.truncated,
            "clip_skip": clip_skip,
        }))
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
