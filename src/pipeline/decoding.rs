//! Latents to pictures, by another way where the first fails: in windows where a device's memory
//! does not suffice, in f32 where the numbers of a VAE are too large for f16. Separate because what
//! went wrong is known only when pixels are read.

use std::cell::OnceCell;

use candle_core::DType;

use super::loading::{self, Source};
use super::{PictureRequest, Pipeline};
use crate::backend::{Backend, Size2d};
use crate::error::{Error, Result};
use crate::image::Picture;
use crate::model::AutoencoderDecoder;
use crate::progress::{Event, Progress};
use crate::tensor::{Reading, Tensor};

/// How latents are decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Way {
    /// In windows.
    tiled: bool,
    /// In f32, whatever else the model computes in.
    wide: bool,
}

/// What decoding again in f32 takes.
pub(super) struct Wide<B> {
    pub source: Source,
    /// Loaded when it is needed.
    pub decoder: OnceCell<AutoencoderDecoder<B>>,
}

/// A picture that a device is at work on.
struct Begun {
    /// (1, height, width, 3)
    pixels: Reading<u8>,
    /// 0 if all numbers are finite, and else not.
    flaws: Reading<f32>,
    /// Whether they were f32.
    is_wide: bool,
}

impl Begun {
    fn new<B: Backend>(image: &Tensor<B>) -> Result<Self> {
        // 0 times a number that is not finite is not 0.
        let nothing = image.to_dtype(DType::F32)?.affine(0.0, 0.0)?;
        let flaws = nothing.sum_keepdim(&[0, 1, 2, 3])?.begin_read()?;
        let is_wide = image.dtype() == DType::F32;
        Ok(Self { pixels: image.pixels()?.begin_read()?, flaws, is_wide })
    }

    /// The pixels, or none if they come of numbers that are not finite and not f32.
    ///
    /// # Errors
    /// If numbers of f32 are not finite: a black picture is none. Or if the device fails.
    fn finish(self) -> Result<Option<Vec<u8>>> {
        let flaws = self.flaws.finish()?;
        let pixels = self.pixels.finish()?;
        match flaws.iter().all(|&flaw| flaw == 0.0) {
            true => Ok(Some(pixels)),
            false if self.is_wide => Err(Error::other(
                "the picture's numbers are not finite: --dtype f32 has a wider range; if it is \
                 that already, look at the weights, and at --lora and --embedding",
            )),
            false => Ok(None),
        }
    }
}

impl<T: Backend, U: Backend, V: Backend> Pipeline<T, U, V> {
    /// The pictures of latents (pictures, channels, height / f, width / f).
    ///
    /// # Errors
    /// If the device fails in every way, or the user interrupts.
    pub(super) fn decode(
        &self,
        latents: &Tensor<V>,
        requests: &[PictureRequest<'_>],
        progress: &dyn Progress,
    ) -> Result<Vec<Picture>> {
        let first = Way { tiled: self.vae_tiling, wide: false };
        let part = |index| latents.narrow(0, index, 1);
        // One after another: nothing takes as much memory as a decoder at work.
        let begin = |index| {
            progress.check()?;
            Ok(self.begin_decoding(first, &part(index)?, progress))
        };
        let begun = (0..requests.len()).map(begin).collect::<Result<Vec<_>>>()?;
        let finish = |(index, begun): (usize, Result<Begun>)| {
            let pixels = self.finish_decoding(first, begun, &part(index)?, progress)?;
            Picture::new(requests[index].size, pixels)
        };
        begun.into_iter().enumerate().map(finish).collect()
    }

    fn begin_decoding(
        &self,
        way: Way,
        latents: &Tensor<V>,
        progress: &dyn Progress,
    ) -> Result<Begun> {
        let decoder = if way.wide { self.wide_decoder(progress)? } else { &self.vae };
        let image = match way.tiled {
            true => decoder.forward_tiled(latents)?,
            false => decoder.forward(latents)?,
        };
        Begun::new(&image)
    }

    /// The pixels of latents, by one way after the other.
    fn finish_decoding(
        &self,
        mut way: Way,
        mut begun: Result<Begun>,
        latents: &Tensor<V>,
        progress: &dyn Progress,
    ) -> Result<Vec<u8>> {
        loop {
            match begun.and_then(Begun::finish) {
                Ok(Some(pixels)) => return Ok(pixels),
                Ok(None) => {
                    progress.report(Event::Warning(
                        "the VAE's numbers are too large for this dtype: decoding again in f32",
                    ));
                    way.wide = true;
                }
                Err(error) if error.is_out_of_memory() && !way.tiled && self.can_tile(latents) => {
                    let text = format!("{error}: decoding again in tiles (--vae-tiling)");
                    progress.report(Event::Warning(&text));
                    way.tiled = true;
                }
                Err(error) => return Err(error),
            }
            progress.check()?;
            begun = self.begin_decoding(way, latents, progress);
        }
    }

    /// Whether there is something to be won: the latents are there, and more than one window is.
    fn can_tile(&self, latents: &Tensor<V>) -> bool {
        let read = || -> Result<bool> {
            latents.narrow(1, 0, 1)?.narrow(2, 0, 1)?.narrow(3, 0, 1)?.to_vec::<f32>()?;
            let [_, _, height, width] = latents.dims_exact()?;
            Ok(self.vae.cuts(Size2d { height, width }))
        };
        read().unwrap_or(false)
    }

    fn wide_decoder(&self, progress: &dyn Progress) -> Result<&AutoencoderDecoder<V>> {
        let Wide { source, decoder } = &self.wide;
        if let Some(decoder) = decoder.get() {
            return Ok(decoder);
        }
        let loaded = loading::wide_decoder(source, &self.devices.vae, progress)?;
        Ok(decoder.get_or_init(|| loaded))
    }
}
