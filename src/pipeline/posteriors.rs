//! Where the latents of images may be, found once for all pictures of an image. Separate because
//! encoding takes as long as a step or two, and a run of many seeds asks for the same each time.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::Backend;
use crate::error::Result;
use crate::image::ImageSize;
use crate::model::vae_encoder::Posterior;

/// Images that are kept: one to begin with, and what a mask leaves of it.
const KEPT: usize = 2;

/// Images that were encoded, the latest last.
pub(super) struct Posteriors<B>(Mutex<VecDeque<Arc<Known<B>>>>);

impl<B> Default for Posteriors<B> {
    fn default() -> Self {
        Self(Mutex::new(VecDeque::new()))
    }
}

/// An image, and what it was encoded to.
pub(super) struct Known<B> {
    size: ImageSize,
    pixels: Vec<f32>,
    pub posterior: Posterior<B>,
}

impl<B: Backend> Posteriors<B> {
    /// Keeps nothing of what there was so far.
    pub fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// That of an image, which is `encode`d if it is not one of the last.
    ///
    /// # Errors
    /// If it cannot be encoded.
    pub fn of(
        &self,
        size: ImageSize,
        pixels: Vec<f32>,
        encode: impl FnOnce(&[f32]) -> Result<Posterior<B>>,
    ) -> Result<Arc<Known<B>>> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = known.iter().position(|known| known.size == size && known.pixels == pixels);
        let found = match found.and_then(|place| known.remove(place)) {
            Some(found) => found,
            None => {
                let posterior = encode(&pixels)?;
                Arc::new(Known { size, pixels, posterior })
            }
        };
        known.push_back(Arc::clone(&found));
        let surplus = known.len().saturating_sub(KEPT);
        known.drain(..surplus);
        Ok(found)
    }
}
