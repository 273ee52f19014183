//! Prompt → tokens → embeddings → latents → image: the whole of Stable Diffusion on one screen.
//! Separate from the models, which know nothing of each other, and generic over the device.
//!
//! diffusers' `StableDiffusionPipeline`: the same seed and settings give the same picture.

use std::collections::VecDeque;

use candle_core::DType;

use crate::backend::{Backend, Device, Noise, Size2d};
use crate::error::{Error, Result};
use crate::image::{ImageSize, Picture};
use crate::model::clip::TextConfig;
use crate::model::unet::{TextKeyValues, UNetConfig};
use crate::model::vae::VaeConfig;
use crate::model::{Decoder, TextEncoder, UNet};
use crate::nn::Loader;
use crate::progress::{Event, Progress};
use crate::rng;
use crate::schedule::{Combination, Plan, Scheduler, SchedulerConfig, SchedulerKind, Source, Step};
use crate::tensor::{Tensor, program};
use crate::tokenizer::Tokenizer;
use crate::weights::{Checkpoint, Component, ModelFolder, Variant};

/// Steps that may be under way on a remote device while the next ones are sent.
const RUN_AHEAD: usize = 4;
/// How the names of weights begin that no picture needs: the way from pixels to latents.
const UNUSED: [&str; 2] = ["encoder.", "quant_conv."];

/// A model on a device, ready to make pictures.
pub struct Pipeline<B: Backend> {
    /// Prompt to ids.
    pub tokenizer: Tokenizer,
    /// Ids to embeddings.
    pub text_encoder: TextEncoder<B>,
    /// Latents to a prediction.
    pub unet: UNet<B>,
    /// Latents to an image.
    pub vae: Decoder<B>,
    /// Predictions to latents.
    pub scheduler: Scheduler,
    device: B::Device,
}

/// How a model is loaded.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// What it computes in.
    pub dtype: DType,
    /// Which of several forms of the weights.
    pub variant: Option<Variant>,
    /// Instead of the model's own scheduler.
    pub scheduler: Option<SchedulerKind>,
}

/// One picture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PictureRequest<'a> {
    /// What it shows.
    pub prompt: &'a str,
    /// What it should not show; empty for nothing.
    pub negative_prompt: &'a str,
    /// Seed of the noise.
    pub seed: u64,
    /// Denoising steps.
    pub steps: usize,
    /// The weight of classifier-free guidance; at 1 or less there is no unconditional pass.
    pub guidance_scale: f64,
    /// Height and width in pixels, multiples of the VAE's scale factor.
    pub size: ImageSize,
}

impl<B: Backend> Pipeline<B> {
    /// Loads a model in diffusers layout onto a device.
    ///
    /// # Errors
    /// Names the file, the field or the tensors that are missing or not covered.
    pub fn load(
        folder: &ModelFolder,
        options: &LoadOptions,
        device: &B::Device,
        progress: &dyn Progress,
    ) -> Result<Self> {
        // Configurations first: what is not covered is found before any weight is read.
        let scheduler = SchedulerConfig::parse(&folder.scheduler_config()?)?;
        let scheduler = match options.scheduler {
            Some(kind) => scheduler.for_scheduler(kind)?,
            None => scheduler.scheduler()?,
        };
        let tokenizer = Tokenizer::open(&folder.tokenizer_dir())?;
        let text = TextConfig::parse(&folder.config(Component::TextEncoder)?)?;
        let unet = UNetConfig::parse(&folder.config(Component::Unet)?)?;
        let vae = VaeConfig::parse(&folder.config(Component::Vae)?)?;
        check_fit(&tokenizer, &text, &unet, &vae)?;
        let loading = Loading::new(folder, options, device, progress)?;
        loading.announce::<B>()?;
        Ok(Self {
            text_encoder: loading
                .component(Component::TextEncoder, |loader| TextEncoder::load(text, loader))?,
            unet: loading.component(Component::Unet, |loader| UNet::load(unet, loader))?,
            vae: loading.component(Component::Vae, |loader| Decoder::load(vae, loader))?,
            tokenizer,
            scheduler,
            device: device.clone(),
        })
    }

    /// The size the model was trained for.
    pub fn default_size(&self) -> ImageSize {
        let side = self.unet.config.sample_size * self.vae.config.scale_factor();
        ImageSize { height: side, width: side }
    }

    /// The scheduler that pictures are made with.
    pub fn scheduler_kind(&self) -> SchedulerKind {
        self.scheduler.kind()
    }

    /// Makes a picture.
    ///
    /// # Errors
    /// If the settings do not fit the model, the device fails, or the user interrupts.
    pub fn paint(&self, request: &PictureRequest<'_>, progress: &dyn Progress) -> Result<Picture> {
        let latents = self.latents(request, progress, &mut |_| Ok(()))?;
        progress.report(Event::Decoding);
        let image = self.vae.forward(&latents)?; // (1, 3, height, width)
        let rgb = image.pixels()?.to_vec::<u8>()?; // (1, height, width, 3)
        progress.report(Event::Done);
        Picture::new(request.size, rgb)
    }

    /// The latents (1, channels, height / f, width / f), f32, before they are decoded; `observe`
    /// sees the first noise and then what each evaluation of the UNet leaves.
    ///
    /// # Errors
    /// As [`paint`](Self::paint), or what `observe` says.
    pub fn latents(
        &self,
        request: &PictureRequest<'_>,
        progress: &dyn Progress,
        observe: &mut dyn FnMut(&Tensor<B>) -> Result<()>,
    ) -> Result<Tensor<B>> {
        let size = self.latent_size(request.size)?;
        let plan = self.scheduler.plan(request.steps)?;
        let guidance = Guidance::new(request.guidance_scale);
        let embeddings = self.encode(request, guidance, progress)?; // (1 or 2, 77, hidden)
        let text = self.unet.text_key_values(&embeddings)?;
        let denoising = Denoising { size, guidance, text: &text, seed: request.seed };
        self.denoise(&plan, &denoising, progress, observe)
    }

    /// The text embeddings of the prompt, with guidance after those of the negative prompt.
    fn encode(
        &self,
        request: &PictureRequest<'_>,
        guidance: Guidance,
        progress: &dyn Progress,
    ) -> Result<Tensor<B>> {
        let prompt = ("prompt", request.prompt);
        let prompts = match guidance {
            Guidance::None => vec![prompt],
            Guidance::Scale(_) => vec![("negative prompt", request.negative_prompt), prompt],
        };
        let mut ids = Vec::new();
        for (which, text) in &prompts {
            let encoding = self.tokenizer.encode(text)?;
            if let Some(text) = &encoding.truncated {
                progress.report(Event::Truncated { which, text });
            }
            let vocab_size = self.text_encoder.config.vocab_size;
            if let Some(id) = encoding.ids.iter().find(|id| **id as usize >= vocab_size) {
                return Err(Error::model(format!(
                    "the parts of this model do not fit: the tokenizer's id {id} is beyond \
                     text_encoder's vocab_size {vocab_size}"
                )));
            }
            ids.extend(encoding.ids);
        }
        let tokens = ids.len() / prompts.len();
        self.text_encoder.forward(&Tensor::from_slice(&ids, (prompts.len(), tokens), &self.device)?)
    }

    /// Noise to latents (1, channels, height, width) in f32, by the plan's evaluations of the UNet.
    fn denoise(
        &self,
        plan: &Plan,
        denoising: &Denoising<'_, B>,
        progress: &dyn Progress,
        observe: &mut dyn FnMut(&Tensor<B>) -> Result<()>,
    ) -> Result<Tensor<B>> {
        let &Denoising { size, guidance, text, seed } = denoising;
        let shape = [1, self.unet.config.in_channels, size.height, size.width];
        let mut noise = NoiseStream { seed, drawn: 0 };
        let mut sample = noise.draw::<B>(shape, &self.device)?;
        if plan.init_noise_sigma != 1.0 {
            sample = Tensor::linear_combination(&[(plan.init_noise_sigma, &sample)])?;
        }
        observe(&sample)?;
        let mut stored: Vec<Option<Tensor<B>>> = vec![None; plan.slots()];
        let mut marks = VecDeque::new();
        let total = plan.steps.len();
        progress.report(Event::Step { done: 0, total });
        for (index, step) in plan.steps.iter().enumerate() {
            progress.check()?;
            let output = self.predict(&sample, step, guidance, text)?;
            let noise = step.draws_noise().then(|| noise.draw(shape, &self.device)).transpose()?;
            let sources = Sources { sample: &sample, output: &output, noise, stored: &stored };
            // All from what was there before the step; only then does anything change.
            let stores = step.stores.iter().map(|store| sources.combine(&store.value));
            let (stores, next) =
                (stores.collect::<Result<Vec<_>>>()?, sources.combine(&step.sample)?);
            for (store, value) in step.stores.iter().zip(stores) {
                stored[store.slot] = Some(value);
            }
            sample = next;
            observe(&sample)?;
            marks.push_back(self.device.mark()?);
            while marks.len() > RUN_AHEAD || (index + 1 == total && !marks.is_empty()) {
                if let Some(mark) = marks.pop_front() {
                    self.device.wait(mark)?;
                    progress.report(Event::Step { done: index + 1 - marks.len(), total });
                }
            }
        }
        Ok(sample)
    }

    /// The UNet's prediction (1, channels, height, width) in f32, guided.
    fn predict(
        &self,
        sample: &Tensor<B>,
        step: &Step,
        guidance: Guidance,
        text: &TextKeyValues<B>,
    ) -> Result<Tensor<B>> {
        let mut input = sample.clone();
        if step.input_scale != 1.0 {
            input = Tensor::linear_combination(&[(step.input_scale, sample)])?;
        }
        let timestep = Tensor::from_slice(&[step.timestep as f32], 1, &self.device)?;
        let [_, channels, height, width] = sample.dims_exact()?;
        let evaluate = |input: &Tensor<B>| {
            let name = format!("unet {}", self.unet.identity());
            let inputs = [vec![input, &timestep], text.tensors()].concat();
            // A device may replay this, so whatever varies, from step to step or from picture to
            // picture, is an input.
            program(&name, &self.device, &inputs, || {
                self.unet.forward(input, &timestep, text)?.to_dtype(DType::F32)
            })
        };
        match guidance {
            Guidance::None => evaluate(&input),
            Guidance::Scale(scale) => {
                let output = evaluate(&input.broadcast_as((2, channels, height, width))?)?;
                let (without, with) = (output.narrow(0, 0, 1)?, output.narrow(0, 1, 1)?);
                Tensor::linear_combination(&[(1.0 - scale, &without), (scale, &with)])
            }
        }
    }

    fn latent_size(&self, size: ImageSize) -> Result<Size2d> {
        let factor = self.vae.config.scale_factor();
        let ImageSize { height, width } = size;
        if height == 0 || width == 0 || height % factor != 0 || width % factor != 0 {
            return Err(Error::usage(format!(
                "--width {width} --height {height}: this model needs multiples of {factor}"
            )));
        }
        Ok(Size2d { height: height / factor, width: width / factor })
    }
}

/// What the steps of one picture have in common.
struct Denoising<'a, B> {
    /// Of the latents.
    size: Size2d,
    guidance: Guidance,
    text: &'a TextKeyValues<B>,
    seed: u64,
}

/// Classifier-free guidance.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Guidance {
    /// One pass, with the prompt alone.
    None,
    /// Away from the negative prompt by this much.
    Scale(f64),
}

impl Guidance {
    fn new(scale: f64) -> Self {
        if scale > 1.0 { Guidance::Scale(scale) } else { Guidance::None }
    }
}

/// torch's noise in the order in which diffusers draws it.
struct NoiseStream {
    seed: u64,
    /// 32-bit outputs of the generator so far.
    drawn: u64,
}

impl NoiseStream {
    fn draw<B: Backend>(&mut self, shape: [usize; 4], device: &B::Device) -> Result<Tensor<B>> {
        let noise = Noise { seed: self.seed, skip: self.drawn };
        self.drawn += rng::outputs_consumed(shape.iter().product());
        Tensor::randn(noise, shape.to_vec(), DType::F32, device)
    }
}

/// What a step's combinations can name.
struct Sources<'a, B> {
    sample: &'a Tensor<B>,
    output: &'a Tensor<B>,
    noise: Option<Tensor<B>>,
    stored: &'a [Option<Tensor<B>>],
}

impl<B: Backend> Sources<'_, B> {
    fn get(&self, source: Source) -> Result<&Tensor<B>> {
        let found = match source {
            Source::Sample => Some(self.sample),
            Source::Output => Some(self.output),
            Source::Noise => self.noise.as_ref(),
            Source::Stored(slot) => self.stored.get(slot).and_then(Option::as_ref),
        };
        found.ok_or_else(|| Error::other(format!("the plan reads {source:?} before it is there")))
    }

    fn combine(&self, combination: &Combination) -> Result<Tensor<B>> {
        if let Some(source) = combination.as_source() {
            return self.get(source).cloned();
        }
        let term = |&(source, weight): &(Source, f64)| Ok((weight, self.get(source)?));
        let terms = combination.terms().iter().map(term).collect::<Result<Vec<_>>>()?;
        Tensor::linear_combination(&terms)
    }
}

/// The parts of a model must be of one model: else a kernel would find out, in other words.
fn check_fit(
    tokenizer: &Tokenizer,
    text: &TextConfig,
    unet: &UNetConfig,
    vae: &VaeConfig,
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
    if unet.in_channels != vae.latent_channels || unet.out_channels != vae.latent_channels {
        let (unet, vae) = (unet.in_channels, vae.latent_channels);
        return differ("in_channels or out_channels of unet and latent_channels of vae", unet, vae);
    }
    Ok(())
}

/// Where weights come from and go to.
struct Loading<'a, D> {
    /// In the order of use.
    checkpoints: [(Component, Checkpoint); 3],
    dtype: DType,
    device: &'a D,
    progress: &'a dyn Progress,
}

impl<'a, D> Loading<'a, D> {
    fn new(
        folder: &ModelFolder,
        options: &LoadOptions,
        device: &'a D,
        progress: &'a dyn Progress,
    ) -> Result<Self> {
        let open = |component| -> Result<_> {
            Ok((component, folder.checkpoint(component, options.variant.as_ref())?))
        };
        let [text, unet, vae] = Component::ALL.map(open);
        Ok(Self { checkpoints: [text?, unet?, vae?], dtype: options.dtype, device, progress })
    }

    /// Names all weights at once, so that a remote device asks once for all of them.
    fn announce<B: Backend<Device = D>>(&self) -> Result<()>
    where
        D: Device<Storage = B>,
    {
        let is_used = |name: &str| !UNUSED.iter().any(|start| name.starts_with(start));
        let all = self.checkpoints.iter().flat_map(|(_, checkpoint)| checkpoint.iter());
        let tensors: Vec<_> =
            all.filter(|(name, _)| is_used(name)).map(|(_, tensor)| tensor).collect();
        self.device.announce(&tensors, &mut |done, total| {
            if total > 0 {
                self.progress.report(Event::Sending { done, total });
            }
            self.progress.check()
        })
    }

    fn component<B: Backend<Device = D>, M>(
        &self,
        component: Component,
        load: impl FnOnce(Loader<'_, B>) -> Result<M>,
    ) -> Result<M>
    where
        D: Device<Storage = B>,
    {
        let name = component.folder();
        let found = self.checkpoints.iter().find(|(of, _)| *of == component);
        let (_, checkpoint) =
            found.ok_or_else(|| Error::other(format!("{name} was not opened")))?;
        let total = checkpoint.iter().map(|(_, tensor)| tensor.byte_len()).sum();
        let mut done = 0;
        let mut loaded = |bytes: u64| {
            done += bytes;
            self.progress.report(Event::Loading { component: name, done, total });
            self.progress.check()
        };
        loaded(0)?;
        load(Loader::new(checkpoint, self.device, self.dtype, &mut loaded))
            .map_err(|error| error.context(name))
    }
}
