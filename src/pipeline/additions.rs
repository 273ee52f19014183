//! What is loaded beside a model: embeddings, which are words that it did not know, and LoRAs,
//! which change its weights. Separate from loading the model, whose files know nothing of them.

use candle_core::DType;

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::model::TextEncoder;
use crate::model::clip::TextConfig;
use crate::progress::{Event, Progress};
use crate::tensor::Tensor;
use crate::tokenizer::Tokenizer;
use crate::weights::{Checkpoint, Component, ComponentChanges};
use crate::weights::{Embedding, EmbeddingFile, LoraFile};

/// Files that are used with a model.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Additions {
    /// Words for prompts.
    pub embeddings: Vec<EmbeddingFile>,
    /// Changes of weights, which add up.
    pub loras: Vec<LoraFile>,
    /// Whether changes of weights that the model does not have are left out.
    pub skips_unmatched: bool,
}

/// Embeddings on their way to the text encoder.
pub(super) struct Words(Vec<Embedding>);

impl Additions {
    /// The embeddings, each known to the tokenizer by its name.
    ///
    /// # Errors
    /// If one cannot be read, is of another model, or has a name that is taken.
    pub(super) fn words(&self, tokenizer: &mut Tokenizer, text: &TextConfig) -> Result<Words> {
        let mut embeddings = Vec::new();
        let mut first = text.vocab_size;
        for file in &self.embeddings {
            let at_file = |error: Error| error.context(file.path.display());
            let embedding = Embedding::read(file)?;
            let (vectors, width) = embedding.size();
            if width != text.hidden_size {
                let wanted = text.hidden_size;
                return Err(at_file(Error::model(format!(
                    "its vectors have {width} features, but the text encoder of this model takes \
                     {wanted}: it is for another kind of model"
                ))));
            }
            let row = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            tokenizer.add_embedding(&embedding.name, row(first), row(vectors)).map_err(at_file)?;
            first = first.saturating_add(vectors);
            embeddings.push(embedding);
        }
        Ok(Words(embeddings))
    }

    /// What the LoRAs change in a model of these weights.
    ///
    /// # Errors
    /// If one cannot be read, does not fit, or changes what is not there and may not be left out.
    pub(super) fn changes(
        &self,
        checkpoints: &[(Component, Checkpoint)],
        progress: &dyn Progress,
    ) -> Result<ComponentChanges> {
        let mut changes = ComponentChanges::default();
        for file in &self.loras {
            let unmatched = changes.add(file, checkpoints)?;
            let Some(key) = &unmatched.first else { continue };
            let shown: String =
                key.chars().take(300).map(|c| if c.is_control() { ' ' } else { c }).collect();
            let (path, count, of) = (file.path.display(), unmatched.count, unmatched.of);
            let message = format!(
                "{path}: {count} of its {of} changes are of weights that this model does not have, \
                 or not in that size, such as {shown}"
            );
            if !self.skips_unmatched {
                return Err(Error::model(format!(
                    "{message}; it was made for another model: --lora-skip-unmatched takes the rest"
                )));
            }
            if count == of {
                return Err(Error::model(format!("{message}; nothing is left of it")));
            }
            progress.report(Event::Warning(&format!("{message}; they are left out")));
        }
        Ok(changes)
    }
}

impl Words {
    /// Adds the vectors behind the text encoder's own, in the order that the tokenizer knows.
    pub(super) fn add_to<B: Backend>(
        &self,
        mut text_encoder: TextEncoder<B>,
        dtype: DType,
        device: &B::Device,
    ) -> Result<TextEncoder<B>> {
        for embedding in &self.0 {
            let (vectors, width) = embedding.size();
            let rows = Tensor::upload(&embedding.vectors, dtype, device)?;
            text_encoder.add_tokens(&rows.reshape(vec![vectors, width])?)?;
        }
        Ok(text_encoder)
    }
}
