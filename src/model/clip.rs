//! transformers' `CLIPTextModel`: token ids to text embeddings. Separate because it is a
//! checkpoint of its own.

use serde_json::{Value, json};

use crate::backend::{Activation, Attention as AttentionOp, Backend};
use crate::error::{Error, Result};
use crate::model::config::Fields;
use crate::nn::{Bias, LayerNorm, Linear, Loader, Names};
use crate::tensor::Tensor;

/// `text_encoder/config.json`, checked.
#[derive(Debug, Clone)]
pub struct TextConfig {
    /// Features of a token.
    pub hidden_size: usize,
    /// Tokens in a prompt, padding included.
    pub max_position_embeddings: usize,
    /// Number of different tokens.
    pub vocab_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    hidden_act: Activation,
    layer_norm_eps: f64,
}

/// The text encoder.
pub struct TextEncoder<B> {
    /// What it was built from.
    pub config: TextConfig,
    token_embedding: Tensor<B>,
    position_embedding: Tensor<B>,
    layers: Vec<EncoderLayer<B>>,
    final_layer_norm: LayerNorm<B>,
}

struct EncoderLayer<B> {
    layer_norm1: LayerNorm<B>,
    q_proj: Linear<B>,
    k_proj: Linear<B>,
    v_proj: Linear<B>,
    out_proj: Linear<B>,
    layer_norm2: LayerNorm<B>,
    fc1: Linear<B>,
    fc2: Linear<B>,
    attention: AttentionOp,
    hidden_act: Activation,
}

impl TextConfig {
    /// Reads the config. transformers saves much that has no effect on the embeddings, so unlike
    /// in the other models fields that nobody asks for are allowed.
    ///
    /// # Errors
    /// Names the first field that holds what this code does not cover.
    pub fn parse(value: &Value) -> Result<Self> {
        let fields = Fields::new("text_encoder/config.json", value)?;
        fields.only("use_attention_mask", json!(false))?;
        fields.only("model_type", json!("clip_text_model"))?;
        let hidden_act = match fields.name("hidden_act", "quick_gelu")? {
            "quick_gelu" => Activation::QuickGelu,
            "gelu" => Activation::Gelu,
            other => return Err(fields.unsupported("hidden_act", &json!(other))),
        };
        let config = Self {
            hidden_size: fields.count("hidden_size", Some(512))?,
            max_position_embeddings: fields.count("max_position_embeddings", Some(77))?,
            vocab_size: fields.count("vocab_size", Some(49408))?,
            intermediate_size: fields.count("intermediate_size", Some(2048))?,
            num_hidden_layers: fields.count("num_hidden_layers", Some(12))?,
            num_attention_heads: fields.count("num_attention_heads", Some(8))?,
            layer_norm_eps: fields.number("layer_norm_eps", 1e-5)?,
            hidden_act,
        };
        let (width, heads) = (config.hidden_size, config.num_attention_heads);
        if width % heads != 0 {
            let message = format!("{width} features do not make {heads} heads");
            return Err(fields.error("num_attention_heads", &message));
        }
        if config.num_hidden_layers > 1024 {
            return Err(fields.error("num_hidden_layers", "more than 1024 are not supported"));
        }
        Ok(config)
    }
}

impl<B: Backend> TextEncoder<B> {
    /// The encoder of `config` with the loader's weights.
    ///
    /// # Errors
    /// Names every tensor that does not fit.
    pub fn load(config: TextConfig, loader: Loader<'_, B>) -> Result<Self> {
        let encoder = Self::load_from(config, &loader.root().at("text_model"))?;
        loader.finish(&[])?;
        Ok(encoder)
    }

    fn load_from(config: TextConfig, names: &Names<'_, '_, B>) -> Result<Self> {
        let width = config.hidden_size;
        let embeddings = names.at("embeddings");
        let table =
            |name: &str, rows: usize| embeddings.at(name).tensor("weight", &[&[rows, width]]);
        let layer = |i| EncoderLayer::load(&names.at("encoder.layers").at(i), &config);
        Ok(Self {
            token_embedding: table("token_embedding", config.vocab_size)?,
            position_embedding: table("position_embedding", config.max_position_embeddings)?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            final_layer_norm: LayerNorm::load(
                &names.at("final_layer_norm"),
                width,
                config.layer_norm_eps,
            )?,
            config,
        })
    }

    /// Adds embeddings (tokens, hidden_size) behind those of the vocabulary.
    ///
    /// # Errors
    /// If they have another width, or the device fails.
    pub fn add_tokens(&mut self, embeddings: &Tensor<B>) -> Result<()> {
        let embeddings = embeddings.to_dtype(self.token_embedding.dtype())?;
        self.token_embedding = Tensor::cat(&[&self.token_embedding, &embeddings], 0)?;
        Ok(())
    }

    /// How many different tokens there are, with those that were added.
    pub fn tokens(&self) -> usize {
        self.token_embedding.dims().first().copied().unwrap_or(0)
    }

    /// Token ids (batch, tokens), u32, to text embeddings (batch, tokens, hidden_size): what
    /// transformers calls `last_hidden_state`.
    ///
    /// # Errors
    /// If there are more tokens than positions, or the device fails.
    pub fn forward(&self, ids: &Tensor<B>) -> Result<Tensor<B>> {
        self.forward_skipping(ids, 0)
    }

    /// As [`forward`](Self::forward) without the last `clip_skip` layers, but with the last norm:
    /// diffusers' `hidden_states[-(clip_skip + 1)]`, then `final_layer_norm`.
    ///
    /// # Errors
    /// If no layer would be left, there are more tokens than positions, or the device fails.
    pub fn forward_skipping(&self, ids: &Tensor<B>, clip_skip: usize) -> Result<Tensor<B>> {
        let used = self.layers.len().saturating_sub(clip_skip);
        let Some(layers) = self.layers.get(..used).filter(|layers| !layers.is_empty()) else {
            let layers = self.layers.len();
            return Err(Error::usage(format!(
                "--clip-skip {clip_skip}: this model's text encoder has {layers} layers, of which \
                 one must be left"
            )));
        };
        let [_, tokens] = ids.dims_exact()?;
        let positions = self.position_embedding.narrow(0, 0, tokens)?;
        let mut x = self.token_embedding.embedding(ids)?.add(&positions)?;
        for layer in layers {
            x = layer.forward(&x)?;
        }
        self.final_layer_norm.forward(&x)
    }
}

impl<B: Backend> EncoderLayer<B> {
    fn load(names: &Names<'_, '_, B>, config: &TextConfig) -> Result<Self> {
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let projection =
            |name: &str| Linear::load(&names.at("self_attn").at(name), width, width, Bias::Yes);
        let norm = |name: &str| LayerNorm::load(&names.at(name), width, config.layer_norm_eps);
        let heads = config.num_attention_heads;
        let scale = 1.0 / ((width / heads) as f64).sqrt();
        Ok(Self {
            layer_norm1: norm("layer_norm1")?,
            q_proj: projection("q_proj")?,
            k_proj: projection("k_proj")?,
            v_proj: projection("v_proj")?,
            out_proj: projection("out_proj")?,
            layer_norm2: norm("layer_norm2")?,
            fc1: Linear::load(&names.at("mlp.fc1"), width, inner, Bias::Yes)?,
            fc2: Linear::load(&names.at("mlp.fc2"), inner, width, Bias::Yes)?,
            attention: AttentionOp { heads, scale, causal: true },
            hidden_act: config.hidden_act,
        })
    }

    /// (batch, tokens, hidden_size), the same shape.
    fn forward(&self, x: &Tensor<B>) -> Result<Tensor<B>> {
        let hidden = self.layer_norm1.forward(x)?;
        let query = self.q_proj.forward(&hidden)?;
        let (key, value) = (self.k_proj.forward(&hidden)?, self.v_proj.forward(&hidden)?);
        let seen = query.attention(&key, &value, self.attention)?;
        let x = self.out_proj.forward_onto(&seen, x)?;
        let hidden = self.layer_norm2.forward(&x)?;
        let hidden = self.fc1.forward_then(&hidden, self.hidden_act)?; // (…, intermediate_size)
        self.fc2.forward_onto(&hidden, &x)
    }
}
