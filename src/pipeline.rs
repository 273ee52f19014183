//! Prompt → tokens → embeddings → latents → image: the whole of Stable Diffusion on one screen.
//! Separate from the models, which know nothing of each other, and generic over the device.
//!
//! diffusers' `StableDiffusionPipeline`: the same seed and settings give the same picture.

mod additions;
mod decoding;
mod loading;
mod posteriors;
mod preview;
mod prompts;
mod runs;
mod start;

use std::collections::VecDeque;
use std::num::NonZeroUsize;

use candle_core::DType;

use crate::backend::{Backend, Device, Noise, Size2d};
use crate::error::{Error, Result};
use crate::image::{ImageSize, Picture};
use crate::model::unet::TextKeyValues;
use crate::model::{AutoencoderDecoder, Encoder, TextEncoder, UNet};
use crate::progress::{Event, Progress};
use crate::rng;
use crate::schedule::{
    Combination, Plan, Scheduler, SchedulerChoice, SchedulerConfig, Source, Step,
};
use crate::tensor::{Tensor, program};
pub use crate::tokenizer::{Syntax as PromptSyntax, Token, Tokenizer};
pub use additions::Additions;
use decoding::Wide;
pub use loading::{LoadOptions, Outline, default_size, inpaints, tokenizer};
use posteriors::Posteriors;
use preview::Preview;
use prompts::Embeddings;
pub use prompts::TextOptions;
use start::Start;
pub use start::{ImageMode, needs_mask, plan_of_image};

/// Version of the way from settings to pixels. Whoever changes pictures beyond the rounding in
/// which kernels differ raises it: pictures of another version are not taken for those of this one.
pub const PIPELINE_VERSION: u32 = 1;

/// Steps that may be under way on a remote device while the next ones are sent: a far device does
/// that many in a round trip, so that its speed, not the way to it, is what a picture takes.
const RUN_AHEAD: usize = 32;

/// A model ready to make pictures, each stage on a device of its own backend, or all on one.
pub struct Pipeline<T: Backend, U: Backend = T, V: Backend = T> {
    /// Prompt to ids.
    pub tokenizer: Tokenizer,
    /// Ids to embeddings.
    pub text_encoder: TextEncoder<T>,
    /// Latents to a prediction.
    pub unet: UNet<U>,
    /// Latents to an image.
    pub vae: AutoencoderDecoder<V>,
    /// An image to latents, where pictures begin with images.
    pub encoder: Option<Encoder<V>>,
    /// Predictions to latents, where a request names no other scheduler.
    pub scheduler: Scheduler,
    /// Whether latents are decoded in windows: slower, and a fraction of the memory. It is done
    /// unasked where memory does not suffice.
    pub vae_tiling: bool,
    wide: Wide<V>,
    scheduler_config: SchedulerConfig,
    embeddings: Embeddings<T>,
    posteriors: Posteriors<U>,
    devices: Placement<T, U, V>,
}

/// Where each stage of a pipeline is.
pub struct Placement<T: Backend, U: Backend = T, V: Backend = T> {
    /// Of the text encoder.
    pub text: T::Device,
    /// Of the UNet, and of what the scheduler does with its predictions.
    pub unet: U::Device,
    /// Of the VAE.
    pub vae: V::Device,
}

impl<B: Backend> Placement<B> {
    /// All on one device.
    pub fn whole(device: &B::Device) -> Self {
        Self { text: device.clone(), unet: device.clone(), vae: device.clone() }
    }
}

/// One picture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PictureRequest<'a> {
    /// What it shows.
    pub prompt: &'a str,
    /// What it should not show; empty for nothing.
    pub negative_prompt: &'a str,
    /// What both become.
    pub text: TextOptions,
    /// Seed of the noise.
    pub seed: u64,
    /// Denoising steps.
    pub steps: usize,
    /// The weight of classifier-free guidance; at 1 or less there is no unconditional pass.
    pub guidance_scale: f64,
    /// Height and width in pixels, multiples of the VAE's scale factor.
    pub size: ImageSize,
    /// What it begins with, other than noise.
    pub image: Option<ImageMode<'a>>,
    /// Instead of the pipeline's scheduler.
    pub scheduler: Option<SchedulerChoice>,
    /// Every so many steps an approximate picture is shown, if at all.
    pub preview_every: Option<NonZeroUsize>,
}

impl PictureRequest<'_> {
    /// Whether both pictures can be made by the same evaluations of the UNet: they may differ in
    /// their prompts and their seeds.
    pub fn goes_with(&self, other: &PictureRequest<'_>) -> bool {
        let &PictureRequest { prompt, negative_prompt, seed, .. } = other;
        *other == PictureRequest { prompt, negative_prompt, seed, ..*self }
    }
}

impl<T: Backend, U: Backend, V: Backend> Pipeline<T, U, V> {
    /// The size the model was trained for.
    pub fn default_size(&self) -> ImageSize {
        loading::trained_size(&self.unet.config, self.vae.scale_factor())
    }

    /// The scheduler that pictures are made with whose request names this one, or none, and how
    /// its sigmas are spaced: where the name does not say, the model does.
    pub fn scheduler_choice(&self, named: Option<SchedulerChoice>) -> SchedulerChoice {
        named.map_or(self.scheduler.choice(), |named| self.scheduler_config.in_force(named))
    }

    /// Makes a picture.
    ///
    /// # Errors
    /// If the settings do not fit the model, the device fails, or the user interrupts.
    pub fn paint(&self, request: &PictureRequest<'_>, progress: &dyn Progress) -> Result<Picture> {
        let mut pictures = self.paint_together(std::slice::from_ref(request), progress)?;
        pictures.pop().ok_or_else(|| Error::other("there is no picture"))
    }

    /// Makes pictures by the same evaluations of the UNet: the very ones that each would be alone.
    ///
    /// # Errors
    /// As [`paint`](Self::paint), or if a picture does not [go with](PictureRequest::goes_with) the
    /// first one.
    pub fn paint_together(
        &self,
        requests: &[PictureRequest<'_>],
        progress: &dyn Progress,
    ) -> Result<Vec<Picture>> {
        let pictures = self.paint_runs(requests, progress);
        if pictures.is_err() {
            // What a device could not make would be the next picture's error too.
            self.embeddings.forget();
            self.posteriors.forget();
        }
        pictures
    }

    fn paint_once(
        &self,
        requests: &[PictureRequest<'_>],
        progress: &dyn Progress,
    ) -> Result<Vec<Picture>> {
        let latents = self.latents(requests, progress, &mut |_| Ok(()))?;
        progress.report(Event::Decoding);
        let latents = latents.to_device::<V>(&self.devices.vae)?;
        let pictures = self.decode(&latents, requests, progress)?;
        progress.report(Event::Done);
        Ok(pictures)
    }

    /// The latents (pictures, channels, height / f, width / f), f32, before they are decoded;
    /// `observe` sees the first noise and then what each evaluation of the UNet leaves.
    ///
    /// # Errors
    /// As [`paint_together`](Self::paint_together), or what `observe` says.
    pub fn latents(
        &self,
        requests: &[PictureRequest<'_>],
        progress: &dyn Progress,
        observe: &mut dyn FnMut(&Tensor<U>) -> Result<()>,
    ) -> Result<Tensor<U>> {
        let [first, rest @ ..] = requests else { return Err(Error::other("no picture")) };
        if !rest.iter().all(|request| request.goes_with(first)) {
            return Err(Error::other("pictures of different settings cannot be made together"));
        }
        let size = self.latent_size(first.size)?;
        if first.preview_every.is_some() {
            preview::check(self.unet.config.out_channels)?;
        }
        self.check_mode(first)?;
        let plan = match first.scheduler {
            Some(choice) => start::plan(&self.scheduler_config.for_scheduler(choice)?, first)?,
            None => start::plan(&self.scheduler, first)?,
        };
        let guidance = Guidance::new(first.guidance_scale);
        // (passes, tokens, hidden)
        let embeddings = self.encode(requests, guidance, progress)?;
        let embeddings = embeddings.to_device::<U>(&self.devices.unet)?;
        let text = self.unet.text_key_values(&embeddings)?;
        let seeds: Vec<_> = requests.iter().map(|request| request.seed).collect();
        let (image, preview_every) = (first.image, first.preview_every);
        let (text, seeds) = (&text, &*seeds);
        let denoising = Denoising { size, image, guidance, text, seeds, preview_every };
        self.denoise(&plan, &denoising, progress, observe)
    }

    /// Noise to latents (pictures, channels, height, width) in f32, by the plan's evaluations of
    /// the UNet.
    fn denoise(
        &self,
        plan: &Plan,
        denoising: &Denoising<'_, U>,
        progress: &dyn Progress,
        observe: &mut dyn FnMut(&Tensor<U>) -> Result<()>,
    ) -> Result<Tensor<U>> {
        let &Denoising { size, image, guidance, text, seeds, preview_every } = denoising;
        let shape = [1, self.unet.config.out_channels, size.height, size.width];
        let mut noise = NoiseStreams { seeds, drawn: 0 };
        if image.is_some() {
            progress.report(Event::Encoding);
        }
        let Start { mut sample, kept, condition } = self.begin(plan, image, shape, &mut noise)?;
        observe(&sample)?;
        let mut stored: Vec<Option<Tensor<U>>> = vec![None; plan.slots()];
        let mut marks = VecDeque::new();
        let total = plan.steps.len();
        progress.report(Event::Step { done: 0, total });
        for (index, step) in plan.steps.iter().enumerate() {
            progress.check()?;
            let output = self.predict(&sample, condition.as_ref(), step, guidance, text)?;
            let noise =
                step.draws_noise().then(|| noise.draw(shape, &self.devices.unet)).transpose()?;
            let sources = Sources { sample: &sample, output: &output, noise, stored: &stored };
            // All from what was there before the step; only then does anything change.
            let stores = step.stores.iter().map(|store| sources.combine(&store.value));
            let (stores, next) =
                (stores.collect::<Result<Vec<_>>>()?, sources.combine(&step.sample)?);
            // After the last step there is the picture itself.
            let is_shown =
                index + 1 < total && preview_every.is_some_and(|every| (index + 1) % every == 0);
            let original = is_shown.then(|| sources.combine(&step.original)).transpose()?;
            for (store, value) in step.stores.iter().zip(stores) {
                stored[store.slot] = Some(value);
            }
            sample = match &kept {
                Some(kept) => kept.put_back(&next, step.noised)?,
                None => next,
            };
            observe(&sample)?;
            let preview = original.as_ref().map(Preview::begin).transpose()?;
            marks.push_back((self.devices.unet.mark()?, preview));
            self.report_steps(&mut marks, index + 1, total, progress)?;
        }
        Ok(sample)
    }

    /// Tells of the steps that are done, of `sent`; waits for them only if too many are under way,
    /// or if all are.
    fn report_steps(
        &self,
        marks: &mut VecDeque<(<U::Device as Device>::Mark, Option<Preview>)>,
        sent: usize,
        total: usize,
        progress: &dyn Progress,
    ) -> Result<()> {
        while let Some((mark, _)) = marks.front() {
            let must_wait = sent == total || marks.len() > RUN_AHEAD;
            if !must_wait && !self.devices.unet.is_reached(mark) {
                break;
            }
            progress.check()?;
            let Some((mark, preview)) = marks.pop_front() else { break };
            self.devices.unet.wait(mark)?;
            let done = sent - marks.len();
            progress.report(Event::Step { done, total });
            let pictures = preview.map(Preview::finish).transpose()?.unwrap_or_default();
            for (index, picture) in pictures.iter().enumerate() {
                progress.report(Event::Preview { index, done, picture });
            }
        }
        Ok(())
    }

    /// The UNet's prediction (pictures, channels, height, width) in f32, guided.
    fn predict(
        &self,
        sample: &Tensor<U>,
        condition: Option<&Tensor<U>>,
        step: &Step,
        guidance: Guidance,
        text: &TextKeyValues<U>,
    ) -> Result<Tensor<U>> {
        let mut input = sample.clone();
        if step.input_scale != 1.0 {
            input = Tensor::linear_combination(&[(step.input_scale, sample)])?;
        }
        if let Some(condition) = condition {
            input = Tensor::cat(&[&input, condition], 1)?;
        }
        let timestep = Tensor::from_slice(&[step.timestep as f32], 1, &self.devices.unet)?;
        let [pictures, channels, height, width] = input.dims_exact()?;
        let evaluate = |input: &Tensor<U>| {
            let name = format!("unet {}", self.unet.identity());
            let inputs = [vec![input, &timestep], text.tensors()].concat();
            // A device may replay this, so whatever varies, from step to step or from picture to
            // picture, is an input.
            program(&name, &self.devices.unet, &inputs, || {
                self.unet.forward(input, &timestep, text)?.to_dtype(DType::F32)
            })
        };
        match guidance {
            Guidance::None => evaluate(&input),
            Guidance::Scale(scale) => {
                let input = match pictures {
                    1 => input.broadcast_as((2, channels, height, width))?,
                    _ => Tensor::cat(&[&input, &input], 0)?,
                };
                let output = evaluate(&input)?; // (2 · pictures, channels, height, width)
                let (without, with) =
                    (output.narrow(0, 0, pictures)?, output.narrow(0, pictures, pictures)?);
                Tensor::linear_combination(&[(1.0 - scale, &without), (scale, &with)])
            }
        }
    }

    fn latent_size(&self, size: ImageSize) -> Result<Size2d> {
        let factor = self.vae.scale_factor();
        let ImageSize { height, width } = size;
        if height == 0 || width == 0 || height % factor != 0 || width % factor != 0 {
            return Err(Error::usage(format!(
                "--width {width} --height {height}: this model needs multiples of {factor}"
            )));
        }
        Ok(Size2d { height: height / factor, width: width / factor })
    }
}

/// What the steps of the pictures have in common.
struct Denoising<'a, B> {
    /// Of the latents.
    size: Size2d,
    image: Option<ImageMode<'a>>,
    guidance: Guidance,
    text: &'a TextKeyValues<B>,
    /// Of each picture.
    seeds: &'a [u64],
    preview_every: Option<NonZeroUsize>,
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

/// torch's noise in the order in which diffusers draws it, from a generator for each picture.
struct NoiseStreams<'a> {
    seeds: &'a [u64],
    /// 32-bit outputs of each generator so far.
    drawn: u64,
}

impl NoiseStreams<'_> {
    /// Leaves a draw out.
    fn skip(&mut self, shape: [usize; 4]) {
        self.drawn += rng::outputs_consumed(shape.iter().product());
    }

    /// (pictures, channels, height, width); `shape` is that of one picture.
    fn draw<B: Backend>(&mut self, shape: [usize; 4], device: &B::Device) -> Result<Tensor<B>> {
        let skip = self.drawn;
        self.skip(shape);
        let draw = |&seed| Tensor::randn(Noise { seed, skip }, shape.to_vec(), DType::F32, device);
        let noise = self.seeds.iter().map(draw).collect::<Result<Vec<_>>>()?;
        match noise.as_slice() {
            [one] => Ok(one.clone()),
            several => Tensor::cat(&several.iter().collect::<Vec<_>>(), 0),
        }
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
