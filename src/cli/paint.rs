//! Pictures that go together, from their jobs to the bytes of their files. Separate because the
//! single command and a batch make them in the same way, and a picture says how it was made.

use std::path::Path;

use super::events::Teller;
use super::inputs::{ImageRequest, LoadedImages};
use super::job::Job;
use super::output::Target;
use super::previews::Previews;
use super::run::Painter;
use super::settings::Settings;
use super::texts::Texts;
use crate::error::Result;
use crate::image::{FileFormat, ImageSize, Parameters, Picture};
use crate::pipeline::{PictureRequest, TextOptions};
use crate::progress::Progress;

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

impl Job {
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

/// Paints pictures that go together, and says in each how it was made.
///
/// # Errors
/// If one cannot be made, or the user interrupts.
pub(super) fn paint(
    orders: &[Order<'_>],
    painter: &mut dyn Painter,
    teller: &Teller<'_>,
) -> Result<Vec<Finished>> {
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
    let finish = |((order, request), picture): ((&Order<'_>, &PictureRequest<'_>), &Picture)| {
        let Order { job, seed, format, .. } = *order;
        let scheduler = job.scheduler.unwrap_or(painter.scheduler());
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
        let settings = Settings::new(job, seed, picture.size(), provenance.clone());
        let file = picture.to_file(format, &parameters, &settings.to_json())?;
        Ok(Finished { size: picture.size(), file, settings })
    };
    orders.iter().zip(&requests).zip(&painted).map(finish).collect()
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
