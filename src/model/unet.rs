//! diffusers' `UNet2DConditionModel`: latents, timestep and text to a prediction. Separate because
//! it is a checkpoint of its own.

use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::DType;
use candle_core::op::{Cos, Mul, Sin};
use serde_json::{Value, json};

use crate::backend::{Activation, Backend, Conv2d as Conv2dOp};
use crate::error::Result;
use crate::model::attention::KeyValue;
use crate::model::config::Fields;
use crate::model::resnet::Norm;
use crate::model::unet_blocks::{AttentionConfig, BlockConfig, DownBlock, MidBlock, UpBlock};
use crate::nn::{Bias, Conv2d, GroupNorm, Linear, Loader, Names};
use crate::tensor::Tensor;

/// `unet/config.json`, checked.
#[derive(Debug, Clone)]
pub struct UNetConfig {
    /// Height and width of the latents that the model was trained on.
    pub sample_size: usize,
    /// Channels of the latents, and of what else it sees.
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// Features of the text embeddings.
    pub cross_attention_dim: usize,
    block_out_channels: Vec<usize>,
    down_blocks: Vec<BlockConfig>,
    mid_block: Option<BlockConfig>,
    up_blocks: Vec<BlockConfig>,
    norm: Norm,
    flip_sin_to_cos: bool,
    freq_shift: f64,
}

/// The per-prompt part of cross-attention, in the order of the UNet's transformer blocks.
pub struct TextKeyValues<B>(Vec<KeyValue<B>>);

impl<B> TextKeyValues<B> {
    /// All of it, as inputs of a program.
    pub fn tensors(&self) -> Vec<&Tensor<B>> {
        self.0.iter().flat_map(KeyValue::tensors).collect()
    }
}

/// The network.
pub struct UNet<B> {
    /// What it was built from.
    pub config: UNetConfig,
    dtype: DType,
    identity: u64,
    frequencies: Tensor<B>,
    time_linear_1: Linear<B>,
    time_linear_2: Linear<B>,
    conv_in: Conv2d<B>,
    down_blocks: Vec<DownBlock<B>>,
    mid_block: Option<MidBlock<B>>,
    up_blocks: Vec<UpBlock<B>>,
    conv_norm_out: GroupNorm<B>,
    conv_out: Conv2d<B>,
}

impl UNetConfig {
    /// Reads the config, of which every field must be one that this code covers.
    ///
    /// # Errors
    /// Names the first field that it does not.
    pub fn parse(value: &Value) -> Result<Self> {
        let fields = Fields::new("unet/config.json", value)?;
        check_fixed(&fields)?;
        let block_out_channels = fields.count_list("block_out_channels")?;
        let levels = block_out_channels.len();
        let layers = fields.counts("layers_per_block", 2, levels)?;
        let norm = Norm {
            groups: fields.count("norm_num_groups", Some(32))?,
            eps: fields.number("norm_eps", 1e-5)?,
        };
        let shape = Shape {
            time: 4 * block_out_channels[0],
            heads: fields.counts("attention_head_dim", 8, levels)?,
            depths: fields.counts("transformer_layers_per_block", 1, levels)?,
            context: fields.count("cross_attention_dim", Some(1280))?,
            channels: block_out_channels.clone(),
            layers,
            norm,
        };
        shape.check(&fields)?;
        let config = Self {
            sample_size: fields.count("sample_size", Some(64))?,
            in_channels: fields.count("in_channels", Some(4))?,
            out_channels: fields.count("out_channels", Some(4))?,
            cross_attention_dim: shape.context,
            block_out_channels,
            down_blocks: shape.down_blocks(&fields)?,
            mid_block: shape.mid_block(&fields)?,
            up_blocks: shape.up_blocks(&fields)?,
            norm,
            flip_sin_to_cos: fields.flag("flip_sin_to_cos", true)?,
            freq_shift: fields.number("freq_shift", 0.0)?,
        };
        fields.finish()?;
        Ok(config)
    }
}

/// The fields of which this code does only what the usual value means.
fn check_fixed(fields: &Fields<'_>) -> Result<()> {
    for (name, value) in [
        ("act_fn", json!("silu")),
        ("addition_embed_type_num_heads", json!(64)),
        ("attention_type", json!("default")),
        ("conv_in_kernel", json!(3)),
        ("conv_out_kernel", json!(3)),
        ("downsample_padding", json!(1)),
        ("mid_block_scale_factor", json!(1)),
        ("only_cross_attention", json!(false)),
        ("resnet_out_scale_factor", json!(1)),
        ("resnet_time_scale_shift", json!("default")),
        ("time_embedding_type", json!("positional")),
    ] {
        fields.only(name, value)?;
    }
    // Both kinds of projection are read; attention always accumulates in f32.
    fields.ignore(&["use_linear_projection", "upcast_attention", "dropout"]);
    Ok(())
}

/// The numbers from which the blocks follow.
struct Shape {
    channels: Vec<usize>,
    layers: Vec<usize>,
    heads: Vec<usize>,
    depths: Vec<usize>,
    context: usize,
    time: usize,
    norm: Norm,
}

impl Shape {
    fn check(&self, fields: &Fields<'_>) -> Result<()> {
        for (&channels, &heads) in self.channels.iter().zip(&self.heads) {
            if channels % self.norm.groups != 0 {
                let groups = self.norm.groups;
                let message = format!("{channels} channels do not make {groups} groups");
                return Err(fields.error("norm_num_groups", &message));
            }
            if channels % heads != 0 {
                let message = format!("{channels} channels do not make {heads} heads");
                return Err(fields.error("attention_head_dim", &message));
            }
        }
        if self.layers.iter().chain(&self.depths).any(|&count| count > 64) {
            return Err(fields.error("layers_per_block", "more than 64 layers are not supported"));
        }
        Ok(())
    }

    fn block(
        &self,
        level: usize,
        resnets: Vec<(usize, usize)>,
        attends: bool,
        sampler: bool,
    ) -> BlockConfig {
        let attention = AttentionConfig {
            heads: self.heads[level],
            context: self.context,
            depth: self.depths[level],
        };
        BlockConfig {
            resnets,
            attention: attends.then_some(attention),
            sampler,
            time: self.time,
            norm: self.norm,
        }
    }

    /// Whether each block of `name` has cross-attention; `kind` is its class without and
    /// `attending` with.
    fn attends(
        &self,
        fields: &Fields<'_>,
        name: &str,
        kind: &str,
        attending: &str,
    ) -> Result<Vec<bool>> {
        let types = fields.names(name)?;
        if types.len() != self.channels.len() {
            let (have, want) = (types.len(), self.channels.len());
            return Err(fields.error(name, &format!("{have} blocks for {want} sizes")));
        }
        let attends = |&found: &&str| match found {
            found if found == kind => Ok(false),
            found if found == attending => Ok(true),
            found => Err(fields.unsupported(name, &json!(found))),
        };
        types.iter().map(attends).collect()
    }

    fn down_blocks(&self, fields: &Fields<'_>) -> Result<Vec<BlockConfig>> {
        let attends =
            self.attends(fields, "down_block_types", "DownBlock2D", "CrossAttnDownBlock2D")?;
        let last = self.channels.len() - 1;
        let block = |(level, attends): (usize, bool)| {
            let out = self.channels[level];
            let mut resnets = vec![(out, out); self.layers[level]];
            resnets[0].0 = self.channels[level.saturating_sub(1)];
            self.block(level, resnets, attends, level < last)
        };
        Ok(attends.into_iter().enumerate().map(block).collect())
    }

    /// An explicit null means none; a missing key means the standard block.
    fn mid_block(&self, fields: &Fields<'_>) -> Result<Option<BlockConfig>> {
        let level = self.channels.len() - 1;
        let out = self.channels[level];
        match fields.raw("mid_block_type") {
            Some(Value::Null) => Ok(None),
            None => Ok(Some(self.block(level, vec![(out, out); 2], true, false))),
            Some(Value::String(kind)) if kind == "UNetMidBlock2DCrossAttn" => {
                Ok(Some(self.block(level, vec![(out, out); 2], true, false)))
            }
            Some(other) => Err(fields.unsupported("mid_block_type", other)),
        }
    }

    /// From the smallest image to the largest. Each resnet takes what comes from below and the
    /// skip of the way down.
    fn up_blocks(&self, fields: &Fields<'_>) -> Result<Vec<BlockConfig>> {
        let attends = self.attends(fields, "up_block_types", "UpBlock2D", "CrossAttnUpBlock2D")?;
        let levels = self.channels.len();
        let block = |(i, attends): (usize, bool)| {
            let level = levels - 1 - i;
            let out = self.channels[level];
            let below = self.channels[(level + 1).min(levels - 1)];
            let count = self.layers[level] + 1;
            let resnet = |j: usize| {
                let inner = if j == 0 { below } else { out };
                // The last skip of a level was made before its first resnet.
                let skip =
                    if j + 1 == count { self.channels[level.saturating_sub(1)] } else { out };
                (inner + skip, out)
            };
            self.block(level, (0..count).map(resnet).collect(), attends, level > 0)
        };
        Ok(attends.into_iter().enumerate().map(block).collect())
    }
}

impl UNetConfig {
    /// Whether it sees a mask and what the mask leaves beside the latents.
    pub fn inpaints(&self) -> bool {
        self.in_channels == 2 * self.out_channels + 1
    }
}

impl<B: Backend> UNet<B> {
    /// The network of `config` with the loader's weights.
    ///
    /// # Errors
    /// Names every tensor that does not fit.
    pub fn load(config: UNetConfig, loader: Loader<'_, B>) -> Result<Self> {
        let unet = Self::load_from(config, &loader.root())?;
        loader.finish(&[])?;
        Ok(unet)
    }

    /// A number that no other UNet of this process has.
    pub fn identity(&self) -> u64 {
        self.identity
    }

    fn load_from(config: UNetConfig, names: &Names<'_, '_, B>) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let (first, time) = (config.block_out_channels[0], 4 * config.block_out_channels[0]);
        let same = Conv2dOp::same(3);
        let time_names = names.at("time_embedding");
        let down = |(i, block)| DownBlock::load(&names.at("down_blocks").at(i), block);
        let up = |(i, block)| UpBlock::load(&names.at("up_blocks").at(i), block);
        let mid = |block| MidBlock::load(&names.at("mid_block"), block);
        Ok(Self {
            dtype: names.dtype(),
            identity: COUNT.fetch_add(1, Ordering::Relaxed),
            frequencies: names.constant(&frequencies(first, config.freq_shift))?,
            time_linear_1: Linear::load(&time_names.at("linear_1"), first, time, Bias::Yes)?,
            time_linear_2: Linear::load(&time_names.at("linear_2"), time, time, Bias::Yes)?,
            conv_in: Conv2d::load(&names.at("conv_in"), config.in_channels, first, 3, same)?,
            down_blocks: config.down_blocks.iter().enumerate().map(down).collect::<Result<_>>()?,
            mid_block: config.mid_block.as_ref().map(mid).transpose()?,
            up_blocks: config.up_blocks.iter().enumerate().map(up).collect::<Result<_>>()?,
            conv_norm_out: GroupNorm::load(
                &names.at("conv_norm_out"),
                first,
                config.norm.then_silu(),
            )?,
            conv_out: Conv2d::load(&names.at("conv_out"), first, config.out_channels, 3, same)?,
            config,
        })
    }

    /// Keys and values of the text embeddings (batch, tokens, cross_attention_dim) for every
    /// cross-attention: once for a picture, not once for a step.
    ///
    /// # Errors
    /// If the device fails.
    pub fn text_key_values(&self, text: &Tensor<B>) -> Result<TextKeyValues<B>> {
        let text = text.to_dtype(self.dtype)?;
        let mut all = Vec::new();
        for block in &self.down_blocks {
            block.text_key_values(&text, &mut all)?;
        }
        if let Some(block) = &self.mid_block {
            block.text_key_values(&text, &mut all)?;
        }
        for block in &self.up_blocks {
            block.text_key_values(&text, &mut all)?;
        }
        Ok(TextKeyValues(all))
    }

    /// Latents (batch, in_channels, height, width) and a timestep (1), both f32, to the prediction
    /// (batch, out_channels, height, width) in the model's dtype. The timestep is a tensor because
    /// whatever varies from step to step must be an input.
    ///
    /// # Errors
    /// If the device fails.
    pub fn forward(
        &self,
        latents: &Tensor<B>,
        timestep: &Tensor<B>,
        text: &TextKeyValues<B>,
    ) -> Result<Tensor<B>> {
        let time = self.embed_time(timestep)?; // (1, time)
        let text = &mut text.0.iter();
        let mut x = self.conv_in.forward(&latents.to_dtype(self.dtype)?)?;
        let mut skips = vec![x.clone()];
        for block in &self.down_blocks {
            x = block.forward(x, &time, text, &mut skips)?;
        }
        if let Some(block) = &self.mid_block {
            x = block.forward(x, &time, text)?;
        }
        for block in &self.up_blocks {
            x = block.forward(x, &time, text, &mut skips)?;
        }
        self.conv_out.forward(&self.conv_norm_out.forward(&x)?)
    }

    /// `Timesteps` and `TimestepEmbedding`, and the SiLU with which every resnet begins.
    fn embed_time(&self, timestep: &Tensor<B>) -> Result<Tensor<B>> {
        let angles = timestep.unsqueeze(1)?.binary::<Mul>(&self.frequencies)?; // (1, channels / 2)
        let (sin, cos) = (angles.unary::<Sin>()?, angles.unary::<Cos>()?);
        let halves = if self.config.flip_sin_to_cos { [&cos, &sin] } else { [&sin, &cos] };
        let waves = Tensor::cat(&halves, 1)?.to_dtype(self.dtype)?; // (1, channels)
        let hidden = self.time_linear_1.forward_then(&waves, Activation::Silu)?; // (1, time)
        self.time_linear_2.forward_then(&hidden, Activation::Silu)
    }
}

/// diffusers' `get_timestep_embedding`, in f32 as there.
fn frequencies(channels: usize, freq_shift: f64) -> Vec<f32> {
    let half = channels / 2;
    let step = |i: usize| {
        let exponent = -(10000f64.ln() as f32) * i as f32 / (half as f64 - freq_shift) as f32;
        exponent.exp()
    };
    (0..half).map(step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> Value {
        json!({
            "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
            "block_out_channels": [320, 640, 1280], "cross_attention_dim": 768,
            "down_block_types": vec!["CrossAttnDownBlock2D"; 3],
            "up_block_types": vec!["CrossAttnUpBlock2D"; 3],
            "layers_per_block": 1, "mid_block_type": null, "sample_size": 64,
        })
    }

    #[test]
    fn an_explicit_null_means_no_mid_block_and_a_missing_key_the_standard_one() {
        let check = |mid: Option<Value>, expected: Option<bool>| {
            let mut value = tiny();
            let object = value.as_object_mut().unwrap();
            match mid.clone() {
                Some(mid) => object.insert("mid_block_type".into(), mid),
                None => object.remove("mid_block_type"),
            };
            let found = UNetConfig::parse(&value).ok().map(|config| config.mid_block.is_some());
            assert_eq!(found, expected, "{mid:?}");
        };
        check(Some(Value::Null), Some(false));
        check(None, Some(true));
        check(Some(json!("UNetMidBlock2DCrossAttn")), Some(true));
        check(Some(json!("UNetMidBlock2DSimpleCrossAttn")), None);
    }

    #[test]
    fn the_way_up_takes_the_skips_of_the_way_down() {
        let config = UNetConfig::parse(&tiny()).unwrap();
        let resnets: Vec<_> = config.up_blocks.iter().map(|block| block.resnets.clone()).collect();
        let expected =
            [[(2560, 1280), (1920, 1280)], [(1920, 640), (960, 640)], [(960, 320), (640, 320)]];
        assert_eq!(resnets, expected);
    }

    #[test]
    fn a_field_that_is_not_covered_is_named() {
        let check = |name: &str, value: Value| {
            let mut config = tiny();
            config[name] = value;
            let message = UNetConfig::parse(&config).unwrap_err().to_string();
            assert!(message.contains(&format!("`{name}`")), "{message}");
        };
        check("class_embed_type", json!("timestep"));
        check("resnet_time_scale_shift", json!("scale_shift"));
        check("down_block_types", json!(["DownBlock2D"]));
        check("up_block_types", json!(["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"]));
        check("attention_head_dim", json!([8, 8, 7]));
        check("norm_num_groups", json!(33));
        check("act_fn", json!("gelu"));
        check("num_attention_heads", json!(8));
    }
}
