//! Pictures that go together, from their jobs to the bytes of their files. Separate because the
//! single command and a batch make them in the same way, and a picture says how it was made.

use std::path::Path;

use super::events::Teller;
use super::inputs::{ImageRequest, LoadedImages};
use super::job::Job;
use super::output::Target;
use super::previews::{Previews, beside};
use super::run::Painter;
use super::settings::Settings;
use super::texts::Texts;
use crate::error::Result;
use crate::image::{FileFormat, ImageSize, Parameters, Picture};
use crate::pipeline::{self, PictureRequest, TextOptions};
use crate::progress::Progress;
use crate::schedule::{Plan, Scheduler, SchedulerConfig};

/// Pixels that go through the UNet together unless the user says how many pictures. Beyond one
/// 512×512 more are slower on the CPU, and take more memory; below, the weights pass once for all.
pub(super) const AUTO_PIXELS: usize = 1 << 18;

/// One of the pictures that are made together.
pub(super) struct Order<'a> {
    /// What it shows, and how.
    pub job: &'a Job,
    /// Of its noise.
    pub seed: u64,
    /// The kind of file that it becomes.
    pub format: FileFormat,
    /// Where its previews go, if it has any.
    pub preview: Option<Target>,
}

/// A picture in the form of its file.
pub(super) struct Finished {
    /// Of the picture.
    pub size: ImageSize,
    /// The file.
    pub file: Vec<u8>,
    /// How it was made.
    pub settings: Settings,
}

/// A picture, and how it was made.
pub(super) struct Painted {
    /// Its pixels.
    pub picture: Picture,
    /// What other programs read.
    pub parameters: Parameters,
    /// What tiny-sd records.
    pub settings: Settings,
}

impl Job {
    /// Its height and width where they depend on no model.
    pub(super) fn own_size(&self) -> Option<ImageSize> {
        let nothing = ImageSize { height: 0, width: 0 };
        let ImageSize { height, width } = self.picture_size(nothing);
        (height > 0 && width > 0).then_some(ImageSize { height, width })
    }

    /// Its scheduler, on a model with this configuration.
    ///
    /// # Errors
    /// If it does not go with the model.
    pub(super) fn schedule(&self, config: &SchedulerConfig) -> Result<Scheduler> {
        match self.scheduler {
            Some(choice) => config.for_scheduler(choice),
            None => config.scheduler(),
        }
    }

    /// The steps of its pictures.
    ///
    /// # Errors
    /// If the scheduler cannot make so many.
    pub(super) fn plan(&self, scheduler: &Scheduler) -> Result<Plan> {
        let steps = self.steps.get();
        match &self.image {
            Some(ImageRequest { strength, mask, .. }) => {
                pipeline::plan_of_image(scheduler, steps, *strength, mask.is_some())
            }
            None => scheduler.plan(steps),
        }
    }

    /// Where the files of its previews go, of a picture that goes to `target`.
    pub(super) fn preview_target(&self, target: &Target) -> Option<Target> {
        match self.preview_in.graphics() {
            None => beside(target),
            Some(_) => None,
        }
    }

    /// Height and width of its pictures, on a model that was trained for `default`.
    pub(super) fn picture_size(&self, default: ImageSize) -> ImageSize {
        self.size.or(self.image.as_ref().map_or(default, ImageRequest::size))
    }

    /// Whether its pictures can be made together with another job's, on a model that was trained
    /// for `default`: what it is of pictures, with the images that nobody has read yet.
    pub(super) fn goes_with(&self, other: &Self, default: ImageSize) -> bool {
        let (texts, size) = (Texts::default(), self.picture_size(default));
        let request = |job| picture_request(job, &texts, 0, size, None);
        let are_alike = match (request(self), request(other)) {
            (Ok(one), Ok(other)) => one.goes_with(&other),
            (Err(_), _) | (_, Err(_)) => false,
        };
        let is_same_size = self.picture_size(default) == other.picture_size(default);
        is_same_size && self.image == other.image && are_alike
    }
}

/// Paints pictures that go together, and says in the file of each how it was made.
///
/// # Errors
/// If one cannot be made, or the user interrupts.
pub(super) fn paint(
    orders: &[Order<'_>],
    painter: &mut dyn Painter,
    teller: &Teller<'_>,
) -> Result<Vec<Finished>> {
    let painted = paint_pictures(orders, painter, teller)?;
    let finish = |(Order { format, .. }, painted): (&Order<'_>, Painted)| {
        let Painted { picture, parameters, settings } = painted;
        let file = picture.to_file(*format, &parameters, &settings.to_json())?;
        Ok(Finished { size: picture.size(), file, settings })
    };
    orders.iter().zip(painted).map(finish).collect()
}

/// Paints pictures that go together.
///
/// # Errors
/// If one cannot be made, or the user interrupts.
pub(super) fn paint_pictures(
    orders: &[Order<'_>],
    painter: &mut dyn Painter,
    teller: &Teller<'_>,
) -> Result<Vec<Painted>> {
    let default = painter.default_size();
    // What goes together has the same size and images.
    let size = orders.first().map_or(default, |first| first.job.picture_size(default));
    let images = orders.first().and_then(|first| first.job.image.as_ref());
    let images = images.map(|images| images.load(size)).transpose()?;
    let texts: Vec<_> = orders.iter().map(|order| order.job.texts(order.seed)).collect();
    let requests = orders
        .iter()
        .zip(&texts)
        .map(|(order, texts)| picture_request(order.job, texts, order.seed, size, images.as_ref()))
        .collect::<Result<Vec<_>>>()?;
    let tell = |index, step, file: &Path| teller.preview(index, step, &file.to_string_lossy());
    let targets = orders.iter().map(|order| order.preview.clone());
    let previews = Previews::new(teller, size, targets, &tell);
    let painted = painter.paint(&requests, &previews)?;
    drop(previews);
    // Whoever interrupts does not want the pictures that were nearly done.
    teller.check()?;
    let provenance = painter.provenance()?;
    let finish = |((order, request), picture): ((&Order<'_>, &PictureRequest<'_>), Picture)| {
        let Order { job, seed, .. } = *order;
        let scheduler = painter.scheduler(job.scheduler);
        let parameters = Parameters {
            prompt: request.prompt.to_owned(),
            negative_prompt: request.negative_prompt.to_owned(),
            steps: request.steps,
            sampler: scheduler.label().to_owned(),
            schedule_type: scheduler.sigmas().map(|sigmas| sigmas.label().to_owned()),
            guidance_scale: request.guidance_scale,
            seed,
            size: picture.size(),
            model: job.model.short_name(),
            clip_skip: job.clip_skip.get(),
            denoising_strength: job.image.as_ref().map(|image| image.strength),
        };
        let settings = Settings::new(job, seed, picture.size(), scheduler, provenance.clone());
        Painted { picture, parameters, settings }
    };
    Ok(orders.iter().zip(&requests).zip(painted).map(finish).collect())
}

/// One of the job's pictures, with the prompts of its seed, of `size`, and what it begins with.
///
/// # Errors
/// If the images do not fit each other.
pub(super) fn picture_request<'a>(
    job: &'a Job,
    texts: &'a Texts<'_>,
    seed: u64,
    size: ImageSize,
    images: Option<&'a LoadedImages>,
) -> Result<PictureRequest<'a>> {
    Ok(PictureRequest {
        prompt: &texts.prompt,
        negative_prompt: &texts.negative_prompt,
        text: TextOptions { syntax: job.prompt_syntax, clip_skip: job.clip_skip.get() },
        seed,
        steps: job.steps.get(),
        guidance_scale: job.guidance_scale.get(),
        size,
        image: images.map(LoadedImages::mode).transpose()?,
        scheduler: job.scheduler,
        preview_every: job.preview,
    })
}
