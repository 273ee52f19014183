//! What the picture looks like so far, without the VAE: each pixel of the latents as a colour.
//! Separate because it is a rule of thumb, and nothing of the picture depends on it.

use candle_core::DType;

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::image::{ImageSize, Picture};
use crate::tensor::{Reading, Tensor};

/// Red, green and blue of each of the four channels of Stable Diffusion's latents, times their
/// scaling factor: a least-squares fit that ComfyUI publishes as `latent_rgb_factors` of SD15.
const CHANNEL_COLOURS: [[f64; 3]; 4] = [
    [0.3512, 0.2297, 0.3227],
    [0.3250, 0.4974, 0.2350],
    [-0.2829, 0.1762, 0.2721],
    [-0.2120, -0.2616, -0.7177],
];

/// Whether latents of so many channels have colours.
///
/// # Errors
/// If not.
pub(super) fn check(channels: usize) -> Result<()> {
    match channels == CHANNEL_COLOURS.len() {
        true => Ok(()),
        false => Err(Error::usage(format!(
            "--preview: latents of {channels} channels have no known colours; leave it out"
        ))),
    }
}

/// Previews of pictures that are made together, on their way from the device.
pub(super) struct Preview {
    reading: Reading<u8>,
    size: ImageSize,
}

impl Preview {
    /// Of latents `(pictures, 4, height, width)`; asks for its bytes, does not wait.
    ///
    /// # Errors
    /// If the latents have another number of channels, or the device is gone.
    pub fn begin<B: Backend>(latents: &Tensor<B>) -> Result<Self> {
        let [_, channels, height, width] = latents.dims_exact()?;
        check(channels)?;
        let latents = latents.to_dtype(DType::F32)?;
        let channels = latents.chunk(channels, 1)?; // (pictures, 1, height, width) each
        let colour = |colour: usize| {
            let weights = CHANNEL_COLOURS.iter().map(|colours| colours[colour]);
            let terms: Vec<_> = weights.zip(&channels).collect();
            Tensor::linear_combination(&terms)
        };
        let (red, green, blue) = (colour(0)?, colour(1)?, colour(2)?);
        let image = Tensor::cat(&[&red, &green, &blue], 1)?; // (pictures, 3, height, width)
        let reading = image.pixels()?.begin_read()?; // (pictures, height, width, 3)
        Ok(Self { reading, size: ImageSize { height, width } })
    }

    /// Waits for the bytes: a preview of each picture.
    ///
    /// # Errors
    /// Whatever went wrong on the way to the latents.
    pub fn finish(self) -> Result<Vec<Picture>> {
        let rgb: Vec<u8> = self.reading.finish()?;
        let bytes = 3 * self.size.height * self.size.width;
        rgb.chunks(bytes).map(|rgb| Picture::new(self.size, rgb.to_vec())).collect()
    }
}
