//! What a long run tells about itself, and how it is asked to stop. Separate, and free of any
//! terminal, because weights and pipeline report and only the command line shows.

use crate::error::Result;
use crate::image::Picture;

/// Something that happened, or how far something got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// A file comes over the network; repeated as bytes arrive.
    Downloading {
        /// The file's name in the repository.
        file: &'a str,
        /// Bytes present, those of an earlier, interrupted download included.
        done: u64,
        /// The file's size in bytes, if the server says it.
        total: Option<u64>,
    },
    /// A remote worker serves others first; repeated when that changes.
    Queued {
        /// Where, for people.
        worker: &'a str,
        /// How many come first, for people.
        position: &'a str,
    },
    /// Weights that a remote worker lacks go to it; repeated as they do.
    Sending {
        /// Bytes handed to the network.
        done: u64,
        /// Bytes that the worker lacks.
        total: u64,
    },
    /// A component's weights go from their file to the device; repeated as they do.
    Loading {
        /// `text_encoder`, `unet` or `vae`, as the model's folder calls it.
        component: &'a str,
        /// Bytes taken from the file.
        done: u64,
        /// Bytes in the file.
        total: u64,
    },
    /// Something the user should know and need not act on, as one line.
    Warning(&'a str),
    /// The end of a prompt that the model does not see, once per prompt.
    Truncated {
        /// `prompt` or `negative prompt`.
        which: &'a str,
        /// What was cut off, as the user wrote it.
        text: &'a str,
    },
    /// Denoising; `done` is 0 before the first step and `total` after the last.
    Step {
        /// Steps finished.
        done: usize,
        /// Steps of the pictures that are made together.
        total: usize,
    },
    /// An approximate picture, small.
    Preview {
        /// Which of the pictures that are made together, from 0.
        index: usize,
        /// Steps finished.
        done: usize,
        /// One pixel for each of the latents.
        picture: &'a Picture,
    },
    /// A picture to begin with becomes latents.
    Encoding,
    /// The last step is done; latents become pixels.
    Decoding,
    /// The pictures are in this process's memory.
    Done,
}

/// Takes the events of a run, from whatever thread they happen on.
pub trait Progress: Send + Sync {
    /// Something happened. Cheap enough to be called for every buffer read.
    fn report(&self, event: Event<'_>);

    /// To be called between pieces of work, at the latest after a second or so.
    ///
    /// # Errors
    /// [`Error::interrupted`](crate::Error::interrupted) once the user has asked to stop.
    fn check(&self) -> Result<()>;
}

/// Nobody watches and nobody interrupts: for a library's callers and for tests.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn report(&self, _event: Event<'_>) {}

    fn check(&self) -> Result<()> {
        Ok(())
    }
}
