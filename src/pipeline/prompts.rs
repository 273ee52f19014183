//! Prompts to embeddings. Separate because each text goes through the encoder once, however many
//! pictures ask for it: those that are made together, and those of a batch one after another.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::model::TextEncoder;
use crate::progress::{Event, Progress};
use crate::tensor::Tensor;
use crate::tokenizer::Tokenizer;

/// Texts whose embeddings are kept; each takes a few hundred kilobytes.
const KEPT: usize = 32;

/// Texts that were encoded, the latest last.
pub(super) struct Embeddings<B>(Mutex<VecDeque<Arc<Known<B>>>>);

impl<B> Default for Embeddings<B> {
    fn default() -> Self {
        Self(Mutex::new(VecDeque::new()))
    }
}

struct Known<B> {
    text: String,
    /// (1, tokens, hidden)
    embedding: Tensor<B>,
    /// What the model does not see of the text.
    truncated: Option<String>,
}

impl<B: Backend> Embeddings<B> {
    /// Keeps nothing of what there was so far.
    pub fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The embeddings (texts, tokens, hidden) of texts, each with its name for people.
    ///
    /// # Errors
    /// If the tokenizer is not of this encoder, or the device fails.
    pub fn of(
        &self,
        texts: &[(&'static str, &str)],
        tokenizer: &Tokenizer,
        text_encoder: &TextEncoder<B>,
        device: &B::Device,
        progress: &dyn Progress,
    ) -> Result<Tensor<B>> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found: Vec<Arc<Known<B>>> = Vec::new();
        let mut missing: Vec<(&str, Option<String>)> = Vec::new();
        let mut ids = Vec::new();
        for &(which, text) in texts {
            let is_twice = found.iter().any(|known| known.text == text)
                || missing.iter().any(|(missing, _)| *missing == text);
            if is_twice {
                continue;
            }
            let truncated = match known.iter().find(|known| known.text == text) {
                Some(known) => {
                    found.push(Arc::clone(known));
                    known.truncated.clone()
                }
                None => {
                    let encoding = tokenizer.encode(text)?;
                    check_ids(&encoding.ids, text_encoder)?;
                    ids.extend(encoding.ids);
                    missing.push((text, encoding.truncated.clone()));
                    encoding.truncated
                }
            };
            if let Some(text) = &truncated {
                progress.report(Event::Truncated { which, text });
            }
        }
        if !missing.is_empty() {
            let shape = (missing.len(), ids.len() / missing.len());
            let encoded = text_encoder.forward(&Tensor::from_slice(&ids, shape, device)?)?;
            for (index, (text, truncated)) in missing.into_iter().enumerate() {
                let embedding = encoded.narrow(0, index, 1)?;
                found.push(Arc::new(Known { text: text.to_owned(), embedding, truncated }));
            }
        }
        let get = |text: &str| found.iter().find(|known| known.text == text);
        let rows = texts.iter().filter_map(|(_, text)| get(text)).map(|known| &known.embedding);
        let embeddings = Tensor::cat(&rows.collect::<Vec<_>>(), 0)?;
        known.retain(|known| found.iter().all(|found| found.text != known.text));
        known.extend(found);
        let surplus = known.len().saturating_sub(KEPT);
        known.drain(..surplus);
        Ok(embeddings)
    }
}

fn check_ids<B: Backend>(ids: &[u32], text_encoder: &TextEncoder<B>) -> Result<()> {
    let vocab_size = text_encoder.config.vocab_size;
    match ids.iter().find(|id| **id as usize >= vocab_size) {
        Some(id) => Err(Error::model(format!(
            "the parts of this model do not fit: the tokenizer's id {id} is beyond \
             text_encoder's vocab_size {vocab_size}"
        ))),
        None => Ok(()),
    }
}
