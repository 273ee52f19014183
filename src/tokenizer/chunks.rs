//! A prompt as chunks of as many tokens as the text encoder takes at once: one for the plain
//! syntax, which cuts off what does not fit, as many as it needs for AUTOMATIC1111's. Separate
//! because how prompts are cut is neither how text becomes tokens nor what brackets mean.

use std::str::FromStr;

use super::emphasis::{self, Part};
use super::{Rows, Tokenizer};
use crate::error::{Error, Result};

/// Most chunks of a prompt: the attention of every step looks at all of them.
const MAX_CHUNKS: usize = 64;
/// So many tokens behind the last comma of a chunk go to the next one with the word that does not
/// fit any more: AUTOMATIC1111's default.
const COMMA_BACKTRACK: usize = 20;
/// The comma as a word of its own.
const COMMA: &str = ",</w>";

/// What AUTOMATIC1111 takes out of prompts: read as words it would be another picture.
const NETWORKS: [&str; 3] = ["<lora:", "<lyco:", "<hypernet:"];

/// How a prompt is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Syntax {
    /// As it is written, and cut off where the text encoder ends: diffusers.
    #[default]
    Plain,
    /// With weights in brackets, `BREAK`, and as many chunks as it needs: AUTOMATIC1111's web UI.
    A1111,
}

impl Syntax {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Syntax::Plain => "plain",
            Syntax::A1111 => "a1111",
        }
    }

    /// Whether a prompt can be read so, as far as that needs no vocabulary.
    ///
    /// # Errors
    /// If a weight in it is too large, or it names a LoRA.
    pub fn check(self, prompt: &str) -> Result<()> {
        match self {
            Syntax::Plain => Ok(()),
            Syntax::A1111 => {
                if let Some(found) = NETWORKS.iter().find(|name| prompt.contains(**name)) {
                    return Err(Error::usage(format!(
                        "{found}…> is not read in prompts; leave it out, and give --lora FILE:SCALE"
                    )));
                }
                emphasis::parts(prompt).map(drop)
            }
        }
    }
}

impl FromStr for Syntax {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let found = [Syntax::Plain, Syntax::A1111].into_iter().find(|known| known.name() == text);
        found.ok_or_else(|| "plain or a1111".into())
    }
}

/// What the text encoder takes at once.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// bos, tokens, eos, padding: as many as [`Tokenizer::length`].
    pub ids: Vec<u32>,
    /// Of each token.
    pub weights: Vec<f32>,
}

/// What the text encoder takes of a prompt, for people.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Its id; of an embedding, the row of the text encoder's table.
    pub id: u32,
    /// As the vocabulary writes it: `</w>` is the end of a word.
    pub text: String,
    /// How much it counts.
    pub weight: f32,
}

/// A prompt, ready for the text encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunks {
    /// At least one.
    pub chunks: Vec<Chunk>,
    /// The end of the prompt, as it was written, that the model will not see.
    pub truncated: Option<String>,
}

impl Tokenizer {
    /// A prompt in chunks.
    ///
    /// # Errors
    /// If the vocabulary has no token for a byte of it; in AUTOMATIC1111's syntax also if a weight
    /// is too large or it needs too many chunks.
    pub fn chunks(&self, prompt: &str, syntax: Syntax) -> Result<Chunks> {
        match syntax {
            Syntax::Plain => {
                let encoding = self.encode(prompt)?;
                let weights = vec![1.0; encoding.ids.len()];
                let chunks = vec![Chunk { ids: encoding.ids, weights }];
                Ok(Chunks { chunks, truncated: encoding.truncated })
            }
            Syntax::A1111 => {
                let chunks = self.weighted_chunks(prompt)?;
                Ok(Chunks { chunks, truncated: None })
            }
        }
    }

    /// The tokens of a chunk, without what is around them.
    pub fn tokens_of(&self, chunk: &Chunk) -> Vec<Token> {
        let last = chunk.ids.iter().rposition(|id| *id != self.pad).unwrap_or(0);
        // It is the eos, unless that is what chunks are padded with.
        let end = if self.pad == self.eos { last + 1 } else { last };
        let token = |(&id, &weight)| Token { id, text: self.text_of(id), weight };
        chunk.ids.iter().zip(&chunk.weights).take(end).skip(1).map(token).collect()
    }

    /// How the vocabulary writes an id, and an embedding's row the name of the embedding.
    fn text_of(&self, id: u32) -> String {
        let has = |rows: &Rows| rows.ids().any(|row| row == id);
        // A row behind the first has a name of its own, too.
        let named = self.embeddings.iter().filter(|(_, rows)| has(rows));
        let named = named.min_by_key(|(_, rows)| rows.count).map_or(id, |(name, _)| *name);
        self.bpe.id_to_token(named).unwrap_or_else(|| format!("?{id}"))
    }

    fn weighted_chunks(&self, prompt: &str) -> Result<Vec<Chunk>> {
        let mut filling = Filling::new(self);
        for part in emphasis::parts(prompt)? {
            match part {
                Part::Break => filling.next_chunk()?,
                Part::Text(text, weight) => {
                    for token in self.tokens(&text)? {
                        filling.push(token, weight as f32)?;
                    }
                }
            }
        }
        filling.finish()
    }
}

/// Chunks that are being filled.
struct Filling<'a> {
    tokenizer: &'a Tokenizer,
    comma: Option<u32>,
    /// Tokens of a chunk, bos and eos not counted.
    room: usize,
    done: Vec<Chunk>,
    /// Tokens and weights of the chunk that is being filled.
    tokens: Vec<(u32, f32)>,
    /// Where the last comma in it is.
    last_comma: Option<usize>,
}

impl<'a> Filling<'a> {
    fn new(tokenizer: &'a Tokenizer) -> Self {
        let (comma, room) = (tokenizer.bpe.token_to_id(COMMA), tokenizer.length.saturating_sub(2));
        Self { tokenizer, comma, room, done: vec![], tokens: vec![], last_comma: None }
    }

    fn push(&mut self, token: Rows, weight: f32) -> Result<()> {
        if Some(token.first) == self.comma {
            self.last_comma = Some(self.tokens.len());
        } else if self.tokens.len() == self.room
            && let Some(comma) = self.last_comma
            && self.tokens.len().saturating_sub(comma) <= COMMA_BACKTRACK
        {
            let behind = self.tokens.split_off(comma.saturating_add(1).min(self.tokens.len()));
            self.next_chunk()?;
            self.tokens = behind;
        }
        // An embedding stays in one piece.
        if self.tokens.len().saturating_add(token.count as usize) > self.room {
            self.next_chunk()?;
        }
        self.tokens.extend(token.ids().map(|id| (id, weight)));
        Ok(())
    }

    fn next_chunk(&mut self) -> Result<()> {
        if self.done.len() >= MAX_CHUNKS {
            return Err(Error::usage(format!(
                "the prompt needs more than {MAX_CHUNKS} chunks of {} tokens",
                self.room
            )));
        }
        let Tokenizer { bos, eos, pad, length, .. } = *self.tokenizer;
        let tokens = std::mem::take(&mut self.tokens);
        let whole = [(bos, 1.0)].into_iter().chain(tokens).chain([(eos, 1.0)]);
        let (mut ids, mut weights): (Vec<u32>, Vec<f32>) = whole.unzip();
        // The first eos ends the chunk, also where the prompt itself has one.
        let end = ids.iter().position(|id| *id == eos).map_or(ids.len(), |eos| eos + 1);
        if let Some(rest) = ids.get_mut(end..) {
            rest.fill(pad);
        }
        ids.resize(length, pad);
        weights.resize(length, 1.0);
        self.done.push(Chunk { ids, weights });
        self.last_comma = None;
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<Chunk>> {
        if !self.tokens.is_empty() || self.done.is_empty() {
            self.next_chunk()?;
        }
        Ok(self.done)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{id, slow};
    use super::*;
    use serde_json::json;

    /// Words of the chunks, each with how often it follows itself; others than these are numbers.
    fn check(pad: &str, prompt: &str, expected: &[&str]) {
        let folder = slow(json!({}), json!({ "pad_token": pad }));
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let chunks = tokenizer.chunks(prompt, Syntax::A1111).unwrap();
        assert_eq!(chunks.truncated, None);
        let shown: Vec<String> = chunks
            .chunks
            .iter()
            .map(|Chunk { ids, weights }| {
                assert_eq!((ids.len(), weights.len(), ids[0]), (77, 77, 600));
                let words = ids.iter().zip(weights).skip(1).map(|(token, weight)| {
                    let word = match *token {
                        600 => "bos".to_owned(),
                        601 => "eos".to_owned(),
                        token if token == id("x</w>") => "x".to_owned(),
                        token if token == id(",</w>") => ",".to_owned(),
                        token if token == id(":</w>") => ":".to_owned(),
                        token => token.to_string(),
                    };
                    if *weight == 1.0 { word } else { format!("{word}*{weight}") }
                });
                // Runs of a word as their number.
                let mut runs: Vec<(String, usize)> = vec![];
                for word in words {
                    match runs.last_mut() {
                        Some((last, count)) if *last == word => *count += 1,
                        _ => runs.push((word, 1)),
                    }
                }
                let runs = runs.into_iter().map(|(word, count)| format!("{count}{word}"));
                runs.collect::<Vec<_>>().join(" ")
            })
            .collect();
        assert_eq!(shown, expected, "{prompt:?}");
    }

    #[test]
    fn a_prompt_fills_as_many_chunks_as_it_needs() {
        let end = "<|endoftext|>";
        let xs = |count: usize| "x ".repeat(count);
        check(end, "", &["76eos"]);
        check(end, &xs(75), &["75x 1eos"]);
        check(end, &xs(76), &["75x 1eos", "1x 75eos"]);
        check(end, "x BREAK x", &["1x 75eos", "1x 75eos"]);
        check(end, "x BREAK", &["1x 75eos"]);
        check(end, "BREAK x", &["76eos", "1x 75eos"]);
        check(end, "(x:2) [x:]x", &["1x*2 1x*0.90909094 1:*0.90909094 1x 72eos"]);
        // As in SD 2, where the padding is another token than the end.
        check("!", "x", &["1x 1eos 740"]);
        check("!", "x<|endoftext|>x", &["1x 1eos 740"]);
    }

    #[test]
    fn what_stands_behind_a_comma_near_the_end_goes_to_the_next_chunk() {
        let end = "<|endoftext|>";
        let prompt = |before: usize, behind: usize| {
            format!("{}, {}", "x ".repeat(before), "x ".repeat(behind))
        };
        // Twenty tokens with the comma are near enough.
        check(end, &prompt(55, 20), &["55x 1, 20eos", "20x 56eos"]);
        check(end, &prompt(54, 21), &["54x 1, 20x 1eos", "1x 75eos"]);
        check(end, &prompt(74, 1), &["74x 1, 1eos", "1x 75eos"]);
        // A comma itself is nothing to take along.
        check(end, &prompt(75, 0), &["75x 1eos", "1, 75eos"]);
        check(end, &prompt(70, 4), &["70x 1, 4x 1eos"]);
    }

    #[test]
    fn a_prompt_without_an_end_is_refused() {
        let tokenizer = Tokenizer::open(slow(json!({}), json!({})).path()).unwrap();
        let error = tokenizer.chunks(&"x ".repeat(75 * 64 + 1), Syntax::A1111).unwrap_err();
        assert!(error.to_string().contains("more than 64 chunks of 75 tokens"), "{error}");
        assert_eq!(
            tokenizer.chunks(&"x ".repeat(75 * 64), Syntax::A1111).unwrap().chunks.len(),
            64
        );
    }
}
