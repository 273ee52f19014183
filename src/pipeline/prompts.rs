//! Prompts to embeddings. Separate because each text goes through the encoder once, however many
//! pictures ask for it: those that are made together, and those of a batch one after another.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::DType;
use candle_core::op::{Div, Mul};

use super::{Guidance, PictureRequest, Pipeline};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::model::TextEncoder;
use crate::progress::{Event, Progress};
use crate::tensor::Tensor;
use crate::tokenizer::{Chunk, Chunks, Syntax, Tokenizer};

/// Texts whose embeddings are kept; each chunk of one takes a few hundred kilobytes.
const KEPT: usize = 32;

/// How a text is read, beside what it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TextOptions {
    /// What brackets in it mean, and what becomes of what is too long.
    pub syntax: Syntax,
    /// So many of the text encoder's last layers are left out.
    pub clip_skip: usize,
}

impl TextOptions {
    /// How the negative prompt is read. diffusers leaves no layer out for it, AUTOMATIC1111 does.
    #[must_use]
    pub fn of_negative(self) -> Self {
        match self.syntax {
            Syntax::Plain => Self { clip_skip: 0, ..self },
            Syntax::A1111 => self,
        }
    }
}

/// What makes embeddings of texts.
struct Encoder<'a, B: Backend> {
    tokenizer: &'a Tokenizer,
    text_encoder: &'a TextEncoder<B>,
    /// Where the text encoder is.
    device: &'a B::Device,
}

/// Texts that were encoded, the latest last.
pub(super) struct Embeddings<B>(Mutex<VecDeque<Arc<Known<B>>>>);

impl<B> Default for Embeddings<B> {
    fn default() -> Self {
        Self(Mutex::new(VecDeque::new()))
    }
}

struct Known<B> {
    text: String,
    options: TextOptions,
    /// (1, chunks · tokens, hidden)
    embedding: Tensor<B>,
    chunks: usize,
    /// What the model does not see of the text.
    truncated: Option<String>,
}

impl<B> Known<B> {
    fn is(&self, text: &str, options: TextOptions) -> bool {
        self.text == text && self.options == options
    }
}

impl<B: Backend> Embeddings<B> {
    /// Keeps nothing of what there was so far.
    pub fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The embeddings (texts, tokens, hidden) of texts, each with its name for people; those with
    /// fewer chunks than another are filled up with chunks of nothing.
    ///
    /// # Errors
    /// If the tokenizer is not of this encoder, a text cannot be read, or the device fails.
    fn of(
        &self,
        texts: &[(&'static str, &str)],
        options: TextOptions,
        encoder: &Encoder<'_, B>,
        progress: &dyn Progress,
    ) -> Result<Tensor<B>> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found: Vec<Arc<Known<B>>> = Vec::new();
        let mut missing: Vec<(&str, Chunks)> = Vec::new();
        for &(which, text) in texts {
            let is_twice = found.iter().any(|known| known.text == text)
                || missing.iter().any(|(missing, _)| *missing == text);
            if is_twice {
                continue;
            }
            let truncated = match known.iter().find(|known| known.is(text, options)) {
                Some(known) => {
                    found.push(Arc::clone(known));
                    known.truncated.clone()
                }
                None => {
                    let chunks = encoder.chunks(text, options).map_err(|e| e.context(which))?;
                    let truncated = chunks.truncated.clone();
                    missing.push((text, chunks));
                    truncated
                }
            };
            if let Some(text) = &truncated {
                progress.report(Event::Truncated { which, text });
            }
        }
        let lengths = missing.iter().map(|(_, chunks)| chunks.chunks.len());
        let mut lengths: Vec<usize> =
            lengths.chain(found.iter().map(|known| known.chunks)).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let is_known = found.iter().any(|known| known.text.is_empty())
            || missing.iter().any(|(text, _)| text.is_empty());
        if lengths.len() > 1 && !is_known {
            match known.iter().find(|known| known.is("", options)) {
                Some(nothing) => found.push(Arc::clone(nothing)),
                None => missing.push(("", encoder.chunks("", options)?)),
            }
        }
        found.extend(encoder.encode(missing, options)?);
        let longest = lengths.last().copied().unwrap_or(1);
        let rows = texts.iter().map(|(_, text)| padded(&found, text, longest));
        let rows = rows.collect::<Result<Vec<_>>>()?;
        let embeddings = Tensor::cat(&rows.iter().collect::<Vec<_>>(), 0)?;
        known.retain(|known| !found.iter().any(|found| known.is(&found.text, options)));
        known.extend(found);
        let surplus = known.len().saturating_sub(KEPT);
        known.drain(..surplus);
        Ok(embeddings)
    }
}

impl<T: Backend, U: Backend, V: Backend> Pipeline<T, U, V> {
    /// The embeddings (texts, tokens, hidden) of prompts: the text encoder's last hidden state,
    /// or an earlier one, weighted.
    ///
    /// # Errors
    /// If a prompt cannot be read, no layer is left, or the device fails.
    pub fn embed(
        &self,
        prompts: &[&str],
        options: TextOptions,
        progress: &dyn Progress,
    ) -> Result<Tensor<T>> {
        let texts: Vec<_> = prompts.iter().map(|prompt| ("prompt", *prompt)).collect();
        self.embed_named(&texts, options, progress)
    }

    /// The embeddings (passes, tokens, hidden) of all prompts, with guidance after those of all
    /// negative prompts.
    pub(super) fn encode(
        &self,
        requests: &[PictureRequest<'_>],
        guidance: Guidance,
        progress: &dyn Progress,
    ) -> Result<Tensor<T>> {
        let options = requests.first().map(|request| request.text).unwrap_or_default();
        let prompts = requests.iter().map(|request| ("prompt", request.prompt));
        let negative = requests.iter().map(|request| ("negative prompt", request.negative_prompt));
        let (prompts, negative): (Vec<_>, Vec<_>) = (prompts.collect(), negative.collect());
        match guidance {
            Guidance::None => self.embed_named(&prompts, options, progress),
            Guidance::Scale(_) if options.of_negative() == options => {
                self.embed_named(&[negative, prompts].concat(), options, progress)
            }
            Guidance::Scale(_) => {
                let negative = self.embed_named(&negative, options.of_negative(), progress)?;
                Tensor::cat(&[&negative, &self.embed_named(&prompts, options, progress)?], 0)
            }
        }
    }

    /// As [`embed`](Self::embed), each text with its name for people.
    fn embed_named(
        &self,
        texts: &[(&'static str, &str)],
        options: TextOptions,
        progress: &dyn Progress,
    ) -> Result<Tensor<T>> {
        let (tokenizer, text_encoder) = (&self.tokenizer, &self.text_encoder);
        let encoder = Encoder { tokenizer, text_encoder, device: &self.devices.text };
        self.embeddings.of(texts, options, &encoder, progress)
    }
}

/// The embedding of a text that was found, and of nothing behind it up to so many chunks.
fn padded<B: Backend>(found: &[Arc<Known<B>>], text: &str, chunks: usize) -> Result<Tensor<B>> {
    let get = |text: &str| {
        let known = found.iter().find(|known| known.text == text);
        known.ok_or_else(|| Error::other("a prompt was not encoded"))
    };
    let known = get(text)?;
    match chunks.saturating_sub(known.chunks) {
        0 => Ok(known.embedding.clone()),
        more => {
            let mut parts = vec![&known.embedding];
            parts.extend(vec![&get("")?.embedding; more]);
            Tensor::cat(&parts, 1)
        }
    }
}

impl<B: Backend> Encoder<'_, B> {
    fn chunks(&self, text: &str, options: TextOptions) -> Result<Chunks> {
        let chunks = self.tokenizer.chunks(text, options.syntax)?;
        chunks.chunks.iter().try_for_each(|chunk| check_ids(&chunk.ids, self.text_encoder))?;
        Ok(chunks)
    }

    /// Texts through the encoder, all their chunks at once.
    fn encode(
        &self,
        texts: Vec<(&str, Chunks)>,
        options: TextOptions,
    ) -> Result<Vec<Arc<Known<B>>>> {
        let all: Vec<&Chunk> = texts.iter().flat_map(|(_, chunks)| &chunks.chunks).collect();
        if all.is_empty() {
            return Ok(Vec::new());
        }
        let ids: Vec<u32> = all.iter().flat_map(|chunk| &chunk.ids).copied().collect();
        let weights: Vec<f32> = all.iter().flat_map(|chunk| &chunk.weights).copied().collect();
        let [rows, tokens] = [all.len(), self.tokenizer.length()];
        let ids = Tensor::from_slice(&ids, (rows, tokens), self.device)?;
        let encoded = self.text_encoder.forward_skipping(&ids, options.clip_skip)?;
        let encoded = match weights.iter().all(|weight| *weight == 1.0) {
            true => encoded,
            false => emphasized(
                &encoded,
                &Tensor::from_slice(&weights, (rows, tokens, 1), self.device)?,
            )?,
        };
        let [_, _, hidden] = encoded.dims_exact()?;
        let mut first = 0;
        let known = texts.into_iter().map(|(text, Chunks { chunks, truncated })| {
            let chunks = chunks.len();
            let embedding = encoded.narrow(0, first, chunks)?;
            let embedding = embedding.reshape(vec![1, chunks.saturating_mul(tokens), hidden])?;
            first = first.saturating_add(chunks);
            Ok(Arc::new(Known { text: text.to_owned(), options, embedding, chunks, truncated }))
        });
        known.collect()
    }
}

/// Embeddings (chunks, tokens, hidden) times the weights (chunks, tokens, 1) of their tokens, and
/// each chunk with the mean that it had, as AUTOMATIC1111's default does it.
fn emphasized<B: Backend>(embeddings: &Tensor<B>, weights: &Tensor<B>) -> Result<Tensor<B>> {
    let before = embeddings.to_dtype(DType::F32)?;
    let after = before.binary::<Mul>(weights)?;
    let sum = |tensor: &Tensor<B>| tensor.sum_keepdim(&[1, 2]); // (chunks, 1, 1)
    let ratio = sum(&before)?.binary::<Div>(&sum(&after)?)?;
    after.binary::<Mul>(&ratio)?.to_dtype(embeddings.dtype())
}

fn check_ids<B: Backend>(ids: &[u32], text_encoder: &TextEncoder<B>) -> Result<()> {
    let vocab_size = text_encoder.tokens();
    match ids.iter().find(|id| **id as usize >= vocab_size) {
        Some(id) => Err(Error::model(format!(
            "the parts of this model do not fit: the tokenizer's id {id} is beyond \
             text_encoder's vocab_size {vocab_size}"
        ))),
        None => Ok(()),
    }
}
