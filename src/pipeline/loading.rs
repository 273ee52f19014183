//! Loading a model: configurations first, then every weight from its file to its stage's device.
//! Separate from the pipeline so that the way of a prompt stays on one screen.

use std::any::Any;
use std::cell::OnceCell;

use candle_core::DType;
use candle_core::backend::BackendDevice;

use super::decoding::Wide;
use super::posteriors::Posteriors;
use super::prompts::Embeddings;
use super::{Additions, Pipeline, Placement};
use crate::backend::{Backend, Device};
use crate::error::{Error, Result};
use crate::image::ImageSize;
use crate::model::clip::TextConfig;
use crate::model::unet::UNetConfig;
use crate::model::{AutoencoderConfig, AutoencoderDecoder, TextEncoder, UNet};
use crate::nn::Loader;
use crate::progress::{Event, Progress};
use crate::schedule::{SchedulerChoice, SchedulerConfig};
use crate::tokenizer::Tokenizer;
use crate::weights::{
    Checkpoint, Component, ComponentChanges, Model, TokenizerFiles, Variant, built_in, names,
};

/// How a model is loaded.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// What it computes in.
    pub dtype: DType,
    /// Which of several forms of the weights.
    pub variant: Option<Variant>,
    /// Instead of the model's own scheduler.
    pub scheduler: Option<SchedulerChoice>,
    /// Whether pictures begin with images, which the VAE must encode.
    pub encodes: bool,
    /// What is not the model's.
    pub additions: Additions,
}

impl<T: Backend, U: Backend, V: Backend> Pipeline<T, U, V> {
    /// Loads a model onto its devices.
    ///
    /// # Errors
    /// Names the file, the field or the tensors that are missing or not covered.
    pub fn load(
        model: &Model,
        options: &LoadOptions,
        devices: Placement<T, U, V>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        // Configurations first: what is not covered is found before any weight is read.
        let scheduler_config = SchedulerConfig::parse(&model.scheduler_config()?)?;
        let scheduler = match options.scheduler {
            Some(choice) => scheduler_config.for_scheduler(choice)?,
            None => scheduler_config.scheduler()?,
        };
        let mut tokenizer = own_tokenizer(model)?;
        let text = TextConfig::parse(&model.config(Component::TextEncoder)?)?;
        let unet = UNetConfig::parse(&model.config(Component::Unet)?)?;
        let vae = AutoencoderConfig::parse(&model.config(Component::Vae)?)?;
        check_fit(&tokenizer, &text, &unet, &vae)?;
        if options.encodes {
            vae.check_encodes()?;
        }
        let words = options.additions.words(&mut tokenizer, &text)?;
        let mut loading = Loading::new(model, options, progress)?;
        loading.announce(&devices)?;
        let load_text = |loader: Loader<'_, T>| {
            words.add_to(TextEncoder::load(text, loader)?, options.dtype, &devices.text)
        };
        let text_encoder = loading.component(Component::TextEncoder, &devices.text, load_text)?;
        let unet =
            loading.component(Component::Unet, &devices.unet, |loader| UNet::load(unet, loader))?;
        let load_vae = |loader: Loader<'_, V>| match options.encodes {
            true => AutoencoderDecoder::load_with_encoder(vae, loader)
                .map(|(decoder, encoder)| (decoder, Some(encoder))),
            false => Ok((AutoencoderDecoder::load(vae, loader)?, None)),
        };
        let (vae, encoder) = loading.component(Component::Vae, &devices.vae, load_vae)?;
        Ok(Self {
            text_encoder,
            unet,
            vae,
            encoder,
            tokenizer,
            scheduler,
            scheduler_config,
            vae_tiling: false,
            wide: Wide {
                source: Source { model: model.clone(), variant: options.variant.clone() },
                decoder: OnceCell::new(),
            },
            embeddings: Embeddings::default(),
            posteriors: Posteriors::default(),
            devices,
        })
    }
}

/// Where a model's weights can be had again.
pub(super) struct Source {
    model: Model,
    variant: Option<Variant>,
}

/// The VAE's decoder in f32.
///
/// # Errors
/// If its files are not what they were, or the device fails.
pub(super) fn wide_decoder<B: Backend>(
    Source { model, variant }: &Source,
    device: &B::Device,
    progress: &dyn Progress,
) -> Result<AutoencoderDecoder<B>> {
    let config = AutoencoderConfig::parse(&model.config(Component::Vae)?)?;
    let checkpoint = model.checkpoint(Component::Vae, variant.as_ref())?;
    let checkpoints = vec![(Component::Vae, checkpoint)];
    let changes = ComponentChanges::default();
    let mut loading = Loading { checkpoints, changes, dtype: DType::F32, encodes: false, progress };
    loading.announce_on::<B>(device, [true; 3])?;
    loading.component(Component::Vae, device, |loader| AutoencoderDecoder::load(config, loader))
}

/// What a model's configurations say without its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outline {
    /// The size that it was trained for.
    pub size: ImageSize,
    /// Its own scheduler, if that is one of ours.
    pub scheduler: Option<SchedulerChoice>,
}

impl Outline {
    /// Of a model.
    ///
    /// # Errors
    /// Names the file or the field that is missing or not covered.
    pub fn of(model: &Model) -> Result<Self> {
        let scheduler = SchedulerConfig::parse(&model.scheduler_config()?)?.choice();
        Ok(Self { size: default_size(model)?, scheduler })
    }
}

/// The size that a model was trained for; no weights are read.
///
/// # Errors
/// If its configuration is not covered.
pub fn default_size(model: &Model) -> Result<ImageSize> {
    let unet = UNetConfig::parse(&model.config(Component::Unet)?)?;
    let vae = AutoencoderConfig::parse(&model.config(Component::Vae)?)?;
    Ok(trained_size(&unet, vae.scale_factor()))
}

/// A model's tokenizer, which knows the names of embeddings; none of the model's weights are read.
///
/// # Errors
/// If it cannot be read, or an embedding is none of this model.
pub fn tokenizer(model: &Model, additions: &Additions) -> Result<Tokenizer> {
    let mut tokenizer = own_tokenizer(model)?;
    let text = TextConfig::parse(&model.config(Component::TextEncoder)?)?;
    additions.words(&mut tokenizer, &text)?;
    Ok(tokenizer)
}

fn own_tokenizer(model: &Model) -> Result<Tokenizer> {
    match model.tokenizer() {
        TokenizerFiles::Folder(folder) => Tokenizer::open(&folder),
        TokenizerFiles::Clip { pad_token } => Tokenizer::clip(pad_token),
        TokenizerFiles::BuiltIn => {
            let [config, vocabulary, merges] = built_in::tokenizer()?;
            Tokenizer::of_texts(config, vocabulary, merges)
        }
    }
}

/// Whether a model's UNet sees a mask: then it makes no picture without one. No weights are read.
///
/// # Errors
/// If its configuration is not covered.
pub fn inpaints(model: &Model) -> Result<bool> {
    Ok(UNetConfig::parse(&model.config(Component::Unet)?)?.inpaints())
}

/// The size in pixels that a UNet and a VAE of this scale factor were trained for.
pub(super) fn trained_size(unet: &UNetConfig, scale_factor: usize) -> ImageSize {
    let side = unet.sample_size.saturating_mul(scale_factor);
    ImageSize { height: side, width: side }
}

/// The parts of a model must be of one model: else a kernel would find out, in other words.
fn check_fit(
    tokenizer: &Tokenizer,
    text: &TextConfig,
    unet: &UNetConfig,
    vae: &AutoencoderConfig,
) -> Result<()> {
    let differ = |what: &str, a: usize, b: usize| {
        Err(Error::model(format!("the parts of this model do not fit: {what}, {a} and {b}")))
    };
    if tokenizer.length() > text.max_position_embeddings {
        let (tokens, positions) = (tokenizer.length(), text.max_position_embeddings);
        return differ("tokens of the tokenizer and positions of text_encoder", tokens, positions);
    }
    if unet.cross_attention_dim != text.hidden_size {
        let (unet, text) = (unet.cross_attention_dim, text.hidden_size);
        return differ("cross_attention_dim of unet and hidden_size of text_encoder", unet, text);
    }
    let takes = if unet.inpaints() { unet.out_channels } else { unet.in_channels };
    let latents = vae.latent_channels();
    if takes != latents || unet.out_channels != latents {
        let (unet, vae) = (unet.in_channels, latents);
        return differ("in_channels or out_channels of unet and latent_channels of vae", unet, vae);
    }
    Ok(())
}

/// Where weights come from.
struct Loading<'a> {
    /// Those that are not loaded yet, in the order of use.
    checkpoints: Vec<(Component, Checkpoint)>,
    changes: ComponentChanges,
    dtype: DType,
    encodes: bool,
    progress: &'a dyn Progress,
}

impl<'a> Loading<'a> {
    fn new(model: &Model, options: &LoadOptions, progress: &'a dyn Progress) -> Result<Self> {
        let open = |component| -> Result<_> {
            Ok((component, model.checkpoint(component, options.variant.as_ref())?))
        };
        let [text, unet, vae] = Component::ALL.map(open);
        let checkpoints = vec![text?, unet?, vae?];
        let changes = options.additions.changes(&checkpoints, progress)?;
        let &LoadOptions { dtype, encodes, .. } = options;
        Ok(Self { checkpoints, changes, dtype, encodes, progress })
    }

    /// Names all weights of a device at once, so that a remote one asks once for all of them.
    fn announce<T: Backend, U: Backend, V: Backend>(
        &self,
        devices: &Placement<T, U, V>,
    ) -> Result<()> {
        let Placement { text, unet, vae } = devices;
        let with_text = [true, is_same::<T, U>(text, unet), is_same::<T, V>(text, vae)];
        let with_unet = [false, !with_text[1], !with_text[2] && is_same::<U, V>(unet, vae)];
        let alone = [false, false, !with_text[2] && !with_unet[2]];
        self.announce_on::<T>(text, with_text)?;
        self.announce_on::<U>(unet, with_unet)?;
        self.announce_on::<V>(vae, alone)
    }

    /// The weights of the components that are `chosen`.
    fn announce_on<B: Backend>(&self, device: &B::Device, chosen: [bool; 3]) -> Result<()> {
        let chosen = self.checkpoints.iter().zip(chosen).filter(|(_, is_chosen)| *is_chosen);
        let chosen: Vec<_> = chosen.map(|(checkpoint, _)| checkpoint).collect();
        let used = chosen.iter().flat_map(|(component, checkpoint)| {
            let is_used = |name: &str| self.encodes || names::is_used(*component, name);
            checkpoint.iter().filter(move |(name, _)| is_used(name))
        });
        let tensors: Vec<_> = used.map(|(_, tensor)| tensor).collect();
        let factors = chosen.iter().flat_map(|(component, _)| self.changes.factors(*component));
        let factors: Vec<_> = factors.collect();
        for (tensors, dtype) in [(tensors, self.dtype), (factors, DType::F32)] {
            if tensors.is_empty() {
                continue;
            }
            device.announce(&tensors, dtype, &mut |done, total| {
                if total > 0 {
                    self.progress.report(Event::Sending { done, total });
                }
                self.progress.check()
            })?;
        }
        Ok(())
    }

    /// Loads a component, and lets go of its file: what was read of that is memory, too.
    fn component<B: Backend, M>(
        &mut self,
        component: Component,
        device: &B::Device,
        load: impl FnOnce(Loader<'_, B>) -> Result<M>,
    ) -> Result<M> {
        let name = component.folder();
        let place = self.checkpoints.iter().position(|(of, _)| *of == component);
        let place = place.ok_or_else(|| Error::other(format!("{name} was not opened")))?;
        let (_, checkpoint) = self.checkpoints.remove(place);
        let total = checkpoint.iter().map(|(_, tensor)| tensor.byte_len()).sum();
        let mut done = 0;
        let mut loaded = |bytes: u64| {
            done += bytes;
            self.progress.report(Event::Loading { component: name, done, total });
            self.progress.check()
        };
        loaded(0)?;
        let loader = Loader::new(&checkpoint, device, self.dtype, &mut loaded);
        let model = load(loader.with_changes(self.changes.of(component)))
            .map_err(|error| error.context(name))?;
        // What no picture needs was not taken.
        self.progress.report(Event::Loading { component: name, done: total, total });
        Ok(model)
    }
}

/// Whether the two are one device.
fn is_same<A: Backend, B: Backend>(one: &A::Device, other: &B::Device) -> bool {
    let other = (other as &dyn Any).downcast_ref::<A::Device>();
    other.is_some_and(|other| one.same_device(other))
}
