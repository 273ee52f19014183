//! Pillow's resizing with the Lanczos filter, byte for byte: what diffusers does with a picture
//! that has another size. Separate because it is a filter of its own: what makes it Pillow's are
//! weights of 22 bits, and bytes between the two passes, whose order it chooses.

use std::f64::consts::PI;

use super::{ImageSize, Picture};
use crate::error::{Error, Result};

/// Bits behind the point in weights: a byte times a weight, and a sum of some, fit 32 bits.
const PRECISION_BITS: u32 = 32 - 8 - 2;
/// Lanczos' filter reaches so many pixels of the smaller picture to each side.
const SUPPORT: f64 = 3.0;

impl Picture {
    /// The picture in another size, as Pillow's `resize(…, LANCZOS)` gives it.
    ///
    /// # Errors
    /// If `size` has no pixels.
    pub fn resized(&self, size: ImageSize) -> Result<Self> {
        if size.height == 0 || size.width == 0 {
            return Err(Error::other(format!("no picture has {size} pixels")));
        }
        // Pillow 13 shortens columns first where that leaves much less to do; before, never.
        let lost = |from: usize, to: usize| from as i64 - to as i64;
        let lost_rows = lost(self.size.height, size.height);
        let is_vertical_first = lost_rows > 0 && lost_rows > 2 * lost(self.size.width, size.width);
        Ok(match is_vertical_first {
            true => self.with_height(size.height).with_width(size.width),
            false => self.with_width(size.width).with_height(size.height),
        })
    }

    fn with_width(&self, width: usize) -> Self {
        if width == self.size.width {
            return self.clone();
        }
        let weights = Weights::new(self.size.width, width);
        let mut rgb = Vec::with_capacity(self.size.height * width * 3);
        for row in self.rgb.chunks_exact(3 * self.size.width) {
            for (start, weights) in weights.iter() {
                let (pixels, _) = row[3 * start..].as_chunks::<3>();
                let mut sums = [HALF; 3];
                for (pixel, weight) in pixels.iter().zip(weights) {
                    for (sum, byte) in sums.iter_mut().zip(pixel) {
                        *sum += i32::from(*byte) * weight;
                    }
                }
                rgb.extend(sums.map(rounded));
            }
        }
        Self { size: ImageSize { width, ..self.size }, rgb }
    }

    fn with_height(&self, height: usize) -> Self {
        if height == self.size.height {
            return self.clone();
        }
        let weights = Weights::new(self.size.height, height);
        let stride = 3 * self.size.width;
        let mut rgb = Vec::with_capacity(stride * height);
        let mut sums = vec![HALF; stride];
        for (start, weights) in weights.iter() {
            sums.fill(HALF);
            for (row, weight) in self.rgb[start * stride..].chunks_exact(stride).zip(weights) {
                for (sum, byte) in sums.iter_mut().zip(row) {
                    *sum += i32::from(*byte) * weight;
                }
            }
            rgb.extend(sums.iter().copied().map(rounded));
        }
        Self { size: ImageSize { height, ..self.size }, rgb }
    }
}

const HALF: i32 = 1 << (PRECISION_BITS - 1);

fn rounded(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// For each pixel along a side: the first that it is made of, and the weights from there.
struct Weights(Vec<(usize, Vec<i32>)>);

impl Weights {
    /// Pillow's `precompute_coeffs` and `normalize_coeffs_8bpc`.
    fn new(from: usize, to: usize) -> Self {
        let scale = from as f64 / to as f64;
        let filter_scale = scale.max(1.0);
        let support = SUPPORT * filter_scale;
        let pixel = |place: usize| {
            let center = (place as f64 + 0.5) * scale;
            // Casts end at 0, and cut off what follows the point.
            let start = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(from);
            let weight = |at: usize| lanczos((at as f64 - center + 0.5) * (1.0 / filter_scale));
            let weights: Vec<f64> = (start..end).map(weight).collect();
            let sum: f64 = weights.iter().sum();
            let fixed = |weight: f64| {
                let weight = if sum == 0.0 { weight } else { weight / sum };
                let away_from_zero = if weight < 0.0 { -0.5 } else { 0.5 };
                (away_from_zero + weight * f64::from(1 << PRECISION_BITS)) as i32
            };
            (start, weights.into_iter().map(fixed).collect())
        };
        Self((0..to).map(pixel).collect())
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        self.0.iter().map(|(start, weights)| (*start, weights.as_slice()))
    }
}

fn lanczos(x: f64) -> f64 {
    match (-SUPPORT..SUPPORT).contains(&x) {
        true => sinc(x) * sinc(x / SUPPORT),
        false => 0.0,
    }
}

fn sinc(x: f64) -> f64 {
    let x = x * PI;
    if x == 0.0 { 1.0 } else { x.sin() / x }
}
