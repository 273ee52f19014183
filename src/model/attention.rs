//! diffusers' `Attention`, `BasicTransformerBlock` and `Transformer2DModel`. Separate because this
//! is where the text meets the image.

use crate::backend::{Attention as AttentionOp, Backend};
use crate::error::{Error, Result};
use crate::model::resnet::Norm;
use crate::nn::{Bias, GroupNorm, LayerNorm, Linear, Names};
use crate::tensor::Tensor;

/// Queries of one sequence look at keys and values of another, or of the same.
pub struct Attention<B> {
    to_q: Linear<B>,
    to_k: Linear<B>,
    to_v: Linear<B>,
    to_out: Linear<B>,
    op: AttentionOp,
}

/// What one cross-attention makes of the text: it depends on the prompt alone, so it is computed
/// once for a picture.
pub struct KeyValue<B> {
    key: Tensor<B>,
    value: Tensor<B>,
}

impl<B> KeyValue<B> {
    /// Key and value, (batch, tokens, query) each.
    pub fn tensors(&self) -> [&Tensor<B>; 2] {
        [&self.key, &self.value]
    }
}

/// The widths of an attention.
#[derive(Debug, Clone, Copy)]
pub struct Widths {
    /// Features of the queries' sequence.
    pub query: usize,
    /// Features of the sequence that is looked at.
    pub context: usize,
    /// How many heads share `query`.
    pub heads: usize,
}

impl<B: Backend> Attention<B> {
    /// `to_q`, `to_k`, `to_v` (with or without bias) and `to_out.0`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn load(names: &Names<'_, '_, B>, widths: Widths, qkv_bias: Bias) -> Result<Self> {
        let Widths { query, context, heads } = widths;
        let scale = 1.0 / ((query / heads) as f64).sqrt();
        Ok(Self {
            to_q: Linear::load(&names.at("to_q"), query, query, qkv_bias)?,
            to_k: Linear::load(&names.at("to_k"), context, query, qkv_bias)?,
            to_v: Linear::load(&names.at("to_v"), context, query, qkv_bias)?,
            to_out: Linear::load(&names.at("to_out.0"), query, query, Bias::Yes)?,
            op: AttentionOp { heads, scale, causal: false },
        })
    }

    /// Keys and values of a sequence (batch, sequence, context).
    ///
    /// # Errors
    /// If the device fails.
    pub fn key_value(&self, context: &Tensor<B>) -> Result<KeyValue<B>> {
        Ok(KeyValue { key: self.to_k.forward(context)?, value: self.to_v.forward(context)? })
    }

    /// (batch, sequence, query), the same shape, added to a `residual` of it.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward_onto(
        &self,
        x: &Tensor<B>,
        context: &KeyValue<B>,
        residual: &Tensor<B>,
    ) -> Result<Tensor<B>> {
        let query = self.to_q.forward(x)?;
        let seen = query.attention(&context.key, &context.value, self.op)?;
        self.to_out.forward_onto(&seen, residual)
    }

    /// Of a sequence with itself, added to a `residual`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward_self_onto(&self, x: &Tensor<B>, residual: &Tensor<B>) -> Result<Tensor<B>> {
        self.forward_onto(x, &self.key_value(x)?, residual)
    }
}

/// Self-attention, cross-attention and a gated feed-forward layer, each around a shortcut.
struct BasicTransformerBlock<B> {
    norm1: LayerNorm<B>,
    attn1: Attention<B>,
    norm2: LayerNorm<B>,
    attn2: Attention<B>,
    norm3: LayerNorm<B>,
    ff_proj: Linear<B>,
    ff_out: Linear<B>,
}

impl<B: Backend> BasicTransformerBlock<B> {
    fn load(names: &Names<'_, '_, B>, widths: Widths) -> Result<Self> {
        const EPS: f64 = 1e-5;
        let width = widths.query;
        let itself = Widths { context: width, ..widths };
        Ok(Self {
            norm1: LayerNorm::load(&names.at("norm1"), width, EPS)?,
            attn1: Attention::load(&names.at("attn1"), itself, Bias::No)?,
            norm2: LayerNorm::load(&names.at("norm2"), width, EPS)?,
            attn2: Attention::load(&names.at("attn2"), widths, Bias::No)?,
            norm3: LayerNorm::load(&names.at("norm3"), width, EPS)?,
            ff_proj: Linear::load(&names.at("ff.net.0.proj"), width, 8 * width, Bias::Yes)?,
            ff_out: Linear::load(&names.at("ff.net.2"), 4 * width, width, Bias::Yes)?,
        })
    }

    fn forward(&self, x: &Tensor<B>, text: &KeyValue<B>) -> Result<Tensor<B>> {
        let x = &self.attn1.forward_self_onto(&self.norm1.forward(x)?, x)?;
        let x = &self.attn2.forward_onto(&self.norm2.forward(x)?, text, x)?;
        let hidden = self.ff_proj.forward(&self.norm3.forward(x)?)?; // (batch, sequence, 8·width)
        self.ff_out.forward_onto(&hidden.geglu()?, x) // (batch, sequence, width)
    }
}

/// An image as a sequence of pixels, through transformer blocks, and back.
pub struct Transformer2D<B> {
    norm: GroupNorm<B>,
    proj_in: Linear<B>,
    transformer_blocks: Vec<BasicTransformerBlock<B>>,
    proj_out: Linear<B>,
}

impl<B: Backend> Transformer2D<B> {
    /// `depth` transformer blocks. Projections by 1×1 convolution (`use_linear_projection: false`)
    /// and by a linear layer are the same arithmetic on channels-last images.
    ///
    /// # Errors
    /// If the device fails.
    pub fn load(
        names: &Names<'_, '_, B>,
        widths: Widths,
        depth: usize,
        groups: usize,
    ) -> Result<Self> {
        let width = widths.query;
        let norm = Norm { groups, eps: 1e-6 };
        let block = |i| BasicTransformerBlock::load(&names.at("transformer_blocks").at(i), widths);
        Ok(Self {
            norm: GroupNorm::load(&names.at("norm"), width, norm.alone())?,
            proj_in: Linear::load(&names.at("proj_in"), width, width, Bias::Yes)?,
            transformer_blocks: (0..depth).map(block).collect::<Result<_>>()?,
            proj_out: Linear::load(&names.at("proj_out"), width, width, Bias::Yes)?,
        })
    }

    /// The text (batch, tokens, context) for each block, in order.
    ///
    /// # Errors
    /// If the device fails.
    pub fn text_key_values(
        &self,
        text: &Tensor<B>,
        key_values: &mut Vec<KeyValue<B>>,
    ) -> Result<()> {
        for block in &self.transformer_blocks {
            key_values.push(block.attn2.key_value(text)?);
        }
        Ok(())
    }

    /// (batch, channels, height, width), the same shape; takes its blocks' entries of `text`.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward<'t>(
        &self,
        x: &Tensor<B>,
        text: &mut impl Iterator<Item = &'t KeyValue<B>>,
    ) -> Result<Tensor<B>>
    where
        B: 't,
    {
        let [batch, channels, height, width] = x.dims_exact()?;
        // Channels-last, so a sequence of pixels is a view: (batch, height·width, channels)
        let sequence = |image: &Tensor<B>| {
            image.permute(&[0, 2, 3, 1])?.reshape(vec![batch, height * width, channels])
        };
        let mut hidden = self.proj_in.forward(&sequence(&self.norm.forward(x)?)?)?;
        for block in &self.transformer_blocks {
            let text = text.next().ok_or_else(|| Error::other("the text has too few keys"))?;
            hidden = block.forward(&hidden, text)?;
        }
        let pixels = self.proj_out.forward_onto(&hidden, &sequence(x)?)?;
        pixels.reshape(vec![batch, height, width, channels])?.permute(&[0, 3, 1, 2])
    }
}
