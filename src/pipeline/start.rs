//! What the first step begins with: noise, or a picture under noise, and what a mask keeps of it.
//! Separate from the pipeline because most pictures begin with noise alone.
//!
//! diffusers' `StableDiffusionImg2ImgPipeline` and `StableDiffusionInpaintPipeline`.

use candle_core::op::Mul;

use super::{NoiseStreams, PictureRequest, Pipeline};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::image::{ImageSize, Mask, Picture};
use crate::model::vae_encoder::{Encoder, Posterior};
use crate::schedule::{Blend, Plan, Scheduler};
use crate::tensor::Tensor;

/// A picture to begin with, of the size of the one that is asked for.
#[derive(Debug, Clone, Copy)]
pub struct ImageMode<'a> {
    image: &'a Picture,
    mask: Option<&'a Mask>,
    strength: f64,
}

impl<'a> ImageMode<'a> {
    /// `strength`, from 0 to 1, is how far from the image it may go; of a `mask` only what is
    /// painted is changed.
    ///
    /// # Errors
    /// If strength or mask do not fit.
    pub fn new(image: &'a Picture, mask: Option<&'a Mask>, strength: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&strength) {
            return Err(Error::usage(format!("--strength {strength}: it goes from 0 to 1")));
        }
        if let Some(mask) = mask.filter(|mask| mask.size() != image.size()) {
            let (mask, image) = (mask.size(), image.size());
            return Err(Error::other(format!("a mask of {mask} for an image of {image}")));
        }
        Ok(Self { image, mask, strength })
    }

    /// Height and width of image and mask.
    pub fn size(&self) -> ImageSize {
        self.image.size()
    }

    /// The steps that are left.
    fn plan(&self, scheduler: &Scheduler, steps: usize) -> Result<Plan> {
        plan_of_image(scheduler, steps, self.strength, self.mask.is_some())
    }
}

/// Of the same pixels; looked at only where they are not in the same place.
impl PartialEq for ImageMode<'_> {
    fn eq(&self, other: &Self) -> bool {
        let is_same_mask = match (self.mask, other.mask) {
            (Some(one), Some(other)) => std::ptr::eq(one, other) || one == other,
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        let is_same_image = std::ptr::eq(self.image, other.image) || self.image == other.image;
        self.strength == other.strength && is_same_mask && is_same_image
    }
}

/// What the steps begin with.
pub(super) struct Start<B> {
    /// The first sample (pictures, channels, height, width), f32.
    pub sample: Tensor<B>,
    /// What is put back after every step.
    pub kept: Option<Kept<B>>,
    /// What an inpainting UNet sees beside the sample (pictures, 1 + channels, height, width): the
    /// mask, and the latents of what it leaves.
    pub condition: Option<Tensor<B>>,
}

/// What a mask keeps.
pub(super) struct Kept<B> {
    /// 1 where it is painted, else 0: (1, 1, height, width).
    painted: Tensor<B>,
    /// The image's latents and the first noise where nothing is painted, else 0.
    image: Tensor<B>,
    noise: Tensor<B>,
}

impl<B: Backend> Kept<B> {
    /// The sample with the image, under so much noise, where nothing is painted.
    ///
    /// # Errors
    /// If the device fails.
    pub fn put_back(&self, sample: &Tensor<B>, noised: Blend) -> Result<Tensor<B>> {
        let painted = sample.binary::<Mul>(&self.painted)?;
        let Blend { original, noise } = noised;
        let terms = [(1.0, &painted), (original, &self.image), (noise, &self.noise)];
        let used: Vec<_> = terms.into_iter().filter(|(weight, _)| *weight != 0.0).collect();
        Tensor::linear_combination(&used)
    }
}

/// A model for inpainting is asked for something else.
pub fn needs_mask() -> Error {
    Error::usage("this model paints into pictures: it needs --image and --mask")
}

/// The steps that are left of a run from an image, of which a mask may keep a part; where nothing
/// of it is to be seen under the noise, all.
///
/// # Errors
/// If no step is left, or the scheduler cannot do it.
pub fn plan_of_image(
    scheduler: &Scheduler,
    steps: usize,
    strength: f64,
    is_masked: bool,
) -> Result<Plan> {
    match is_masked && strength == 1.0 {
        true => scheduler.plan(steps),
        false => scheduler.plan_from(steps, strength),
    }
}

/// The plan of a request.
///
/// # Errors
/// If the scheduler cannot do it.
pub(super) fn plan(scheduler: &Scheduler, request: &PictureRequest<'_>) -> Result<Plan> {
    match &request.image {
        Some(mode) => mode.plan(scheduler, request.steps),
        None => scheduler.plan(request.steps),
    }
}

impl<T: Backend, U: Backend, V: Backend> Pipeline<T, U, V> {
    /// Whether the request is one for this UNet, and for what is loaded.
    ///
    /// # Errors
    /// Says what it lacks.
    pub(super) fn check_mode(&self, request: &PictureRequest<'_>) -> Result<()> {
        let mask = request.image.and_then(|mode| mode.mask);
        if self.unet.config.inpaints() && mask.is_none() {
            return Err(needs_mask());
        }
        let Some(mode) = request.image else { return Ok(()) };
        if self.encoder.is_none() {
            return Err(Error::other("the VAE's encoder is not loaded"));
        }
        match mode.size() == request.size {
            true => Ok(()),
            false => Err(Error::other(format!(
                "an image of {} for a picture of {}",
                mode.size(),
                request.size
            ))),
        }
    }

    /// The first sample and what goes with it. The order of draws is diffusers': the image's
    /// posterior, the noise, the posterior of what the mask leaves.
    pub(super) fn begin(
        &self,
        plan: &Plan,
        mode: Option<ImageMode<'_>>,
        shape: [usize; 4],
        noise: &mut NoiseStreams<'_>,
    ) -> Result<Start<U>> {
        let device = &self.devices.unet;
        let Some((mode, encoder)) = mode.zip(self.encoder.as_ref()) else {
            let noise = noise.draw(shape, device)?;
            let sample = blend(plan.start, None, noise)?;
            return Ok(Start { sample, kept: None, condition: None });
        };
        let pixels = pixels(mode.image);
        let inpaints = self.unet.config.inpaints();
        // Of an inpainting UNet the image is seen where the noise does not hide all of it.
        let image = (!inpaints || mode.strength < 1.0)
            .then(|| self.encode_image(encoder, mode.size(), pixels.clone(), shape, noise))
            .transpose()?;
        let first_noise = noise.draw::<U>(shape, device)?;
        let sample = blend(plan.start, image.as_ref(), first_noise.clone())?;
        let Some(mask) = mode.mask else {
            return Ok(Start { sample, kept: None, condition: None });
        };
        let [_, _, height, width] = shape;
        let of_latents = mask.of_latents(self.vae.scale_factor())?;
        let painted: Vec<f32> = of_latents.pixels().iter().map(|&p| f32::from(p)).collect();
        let painted = Tensor::from_slice(&painted, (1, 1, height, width), device)?;
        if let Some(image) = image.filter(|_| !inpaints) {
            // diffusers draws for it, and does not use it.
            noise.skip(shape);
            let left = painted.affine(-1.0, 1.0)?;
            let [image, noise] = [image.binary::<Mul>(&left)?, first_noise.binary::<Mul>(&left)?];
            let kept = Kept { painted, image, noise };
            return Ok(Start { sample, kept: Some(kept), condition: None });
        }
        let left = hidden(pixels, mask);
        let left = self.encode_image(encoder, mode.size(), left, shape, noise)?;
        let pictures = sample.dims_exact::<4>()?[0];
        let painted = painted.broadcast_as((pictures, 1, height, width))?.contiguous()?;
        let condition = Tensor::cat(&[&painted, &left], 1)?;
        Ok(Start { sample, kept: None, condition: Some(condition) })
    }

    /// Latents (pictures, channels, height, width) of one image, f32: of each picture a draw of its
    /// own of what they may be.
    fn encode_image(
        &self,
        encoder: &Encoder<V>,
        size: ImageSize,
        pixels: Vec<f32>,
        shape: [usize; 4],
        noise: &mut NoiseStreams<'_>,
    ) -> Result<Tensor<U>> {
        let known = self.posteriors.of(size, pixels, |pixels| {
            let shape = (1, 3, size.height, size.width);
            let image = Tensor::from_slice(pixels, shape, &self.devices.vae)?;
            let Posterior { mean, deviation } = encoder.posterior(&image)?;
            Ok(Posterior {
                mean: mean.to_device::<U>(&self.devices.unet)?,
                deviation: deviation.to_device::<U>(&self.devices.unet)?,
            })
        })?;
        let Posterior { mean, deviation } = &known.posterior;
        let noise = noise.draw::<U>(shape, &self.devices.unet)?;
        let latents = noise.binary::<Mul>(deviation)?.add(mean)?;
        latents.affine(encoder.scaling_factor, 0.0)
    }
}

/// The weighted sum of an image's latents and noise.
fn blend<B: Backend>(
    Blend { original, noise: weight }: Blend,
    image: Option<&Tensor<B>>,
    noise: Tensor<B>,
) -> Result<Tensor<B>> {
    match image.filter(|_| original != 0.0) {
        Some(image) => Tensor::linear_combination(&[(original, image), (weight, &noise)]),
        None if weight == 1.0 => Ok(noise),
        None => Tensor::linear_combination(&[(weight, &noise)]),
    }
}

/// A picture's (3, height, width) in −1..1, in f32 as diffusers computes it.
fn pixels(picture: &Picture) -> Vec<f32> {
    let (pixels, _) = picture.rgb().as_chunks::<3>();
    let channel = |channel: usize| {
        pixels.iter().map(move |pixel| 2.0 * (f32::from(pixel[channel]) / 255.0) - 1.0)
    };
    (0..3).flat_map(channel).collect()
}

/// The same with grey where it is painted.
fn hidden(mut pixels: Vec<f32>, mask: &Mask) -> Vec<f32> {
    for channel in pixels.chunks_exact_mut(mask.pixels().len()) {
        for (value, is_painted) in channel.iter_mut().zip(mask.pixels()) {
            if *is_painted {
                *value = 0.0;
            }
        }
    }
    pixels
}
