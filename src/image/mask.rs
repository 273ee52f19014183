//! What of a picture is painted anew. Separate because a mask is made from a picture in one
//! certain way, diffusers', and then has two values.

use super::{ImageSize, Picture};
use crate::error::{Error, Result};

/// For each pixel whether it is painted anew.
#[derive(Clone, PartialEq, Eq)]
pub struct Mask {
    size: ImageSize,
    is_painted: Vec<bool>,
}

impl Mask {
    /// What is white, or nearer to it than to black, of a picture made as large as `size`: first
    /// resized, then grey, then split in the middle, as `StableDiffusionInpaintPipeline` does it.
    ///
    /// # Errors
    /// If `size` has no pixels.
    pub fn of_picture(picture: &Picture, size: ImageSize) -> Result<Self> {
        let picture = picture.resized(size)?;
        let (pixels, _) = picture.rgb().as_chunks::<3>();
        // Pillow's convert("L").
        let grey = |&[red, green, blue]: &[u8; 3]| {
            let [red, green, blue] = [red, green, blue].map(u32::from);
            (red * 19_595 + green * 38_470 + blue * 7_471 + 0x8000) >> 16
        };
        Ok(Self { size, is_painted: pixels.iter().map(|pixel| grey(pixel) >= 128).collect() })
    }

    /// Height and width in pixels.
    pub fn size(&self) -> ImageSize {
        self.size
    }

    /// Row by row.
    pub fn pixels(&self) -> &[bool] {
        &self.is_painted
    }

    /// Every `factor`-th pixel of every `factor`-th row: torch's nearest, of latents.
    ///
    /// # Errors
    /// If the sides are no multiples of `factor`.
    pub fn of_latents(&self, factor: usize) -> Result<Self> {
        let ImageSize { height, width } = self.size;
        if factor == 0 || height % factor != 0 || width % factor != 0 {
            return Err(Error::other(format!("a mask of {} for blocks of {factor}", self.size)));
        }
        let rows = self.is_painted.chunks_exact(width).step_by(factor);
        let is_painted = rows.flat_map(|row| row.iter().copied().step_by(factor)).collect();
        Ok(Self { size: ImageSize { height: height / factor, width: width / factor }, is_painted })
    }
}

impl std::fmt::Debug for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mask({})", self.size)
    }
}
