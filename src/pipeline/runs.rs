//! Pictures that are made together although their prompts have different numbers of chunks: each
//! run of equal ones goes through the UNet by itself, since padding changes pictures, and none may
//! depend on what it is made with. Separate from the pipeline, which sees one run at a time.

use super::{Guidance, PictureRequest, Pipeline};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::image::Picture;
use crate::progress::{Event, Progress};
use crate::tokenizer::Syntax;

impl<T: Backend, U: Backend, V: Backend> Pipeline<T, U, V> {
    /// As `paint_once`, for prompts of any lengths.
    pub(super) fn paint_runs(
        &self,
        requests: &[PictureRequest<'_>],
        progress: &dyn Progress,
    ) -> Result<Vec<Picture>> {
        if let [first, rest @ ..] = requests
            && !rest.iter().all(|request| request.goes_with(first))
        {
            return Err(Error::other("pictures of different settings cannot be made together"));
        }
        let lengths = requests.iter().map(|request| self.chunks_of(request));
        let lengths = lengths.collect::<Result<Vec<_>>>()?;
        let ends = lengths.chunk_by(|a, b| a == b).scan(0, |end: &mut usize, run| {
            *end = end.saturating_add(run.len());
            Some(*end)
        });
        let ends: Vec<usize> = ends.collect();
        let [_, _, ..] = ends.as_slice() else { return self.paint_once(requests, progress) };
        let mut pictures: Vec<Picture> = Vec::new();
        for (index, end) in ends.iter().enumerate() {
            let first = pictures.len();
            let run = requests.get(first..*end).unwrap_or_default();
            let part = Part { index, of: ends.len(), first, progress };
            pictures.extend(self.paint_once(run, &part)?);
        }
        Ok(pictures)
    }

    /// Chunks of the longer one of a picture's prompts.
    fn chunks_of(&self, request: &PictureRequest<'_>) -> Result<usize> {
        let PictureRequest { prompt, negative_prompt, .. } = *request;
        let syntax = match request.text.syntax {
            Syntax::Plain => return Ok(1),
            other @ Syntax::A1111 => other,
        };
        let chunks = |prompt: &str| Ok(self.tokenizer.chunks(prompt, syntax)?.chunks.len());
        match Guidance::new(request.guidance_scale) {
            Guidance::None => chunks(prompt),
            Guidance::Scale(_) => Ok(chunks(prompt)?.max(chunks(negative_prompt)?)),
        }
    }
}

/// One run's events as those of all runs.
struct Part<'a> {
    index: usize,
    of: usize,
    /// Pictures of the runs before.
    first: usize,
    progress: &'a dyn Progress,
}

impl Progress for Part<'_> {
    fn report(&self, event: Event<'_>) {
        let before = |total: usize| total.saturating_mul(self.index);
        let event = match event {
            Event::Encoding | Event::Step { done: 0, .. } if self.index > 0 => return,
            Event::Step { done, total } => {
                let done = done.saturating_add(before(total));
                Event::Step { done, total: total.saturating_mul(self.of) }
            }
            Event::Preview { index, done, picture } => {
                let index = index.saturating_add(self.first);
                Event::Preview { index, done, picture }
            }
            Event::Decoding | Event::Done if self.index.saturating_add(1) < self.of => return,
            Event::Downloading { .. }
            | Event::Queued { .. }
            | Event::Sending { .. }
            | Event::Loading { .. }
            | Event::Warning(_)
            | Event::Truncated { .. }
            | Event::Encoding
            | Event::Decoding
            | Event::Done => event,
        };
        self.progress.report(event);
    }

    fn check(&self) -> Result<()> {
        self.progress.check()
    }
}
