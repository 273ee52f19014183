//! Weights of 3 × 3 convolutions, transformed and packed. Separate because it happens once, at
//! load, and decides which convolutions are done this way at all.

use rayon::prelude::*;

use super::super::element::Element;
use super::super::matrix::{Source, pack_panel};
use super::super::memory::zeroed;
use super::super::micro::{HALF, WIDTH};
use super::transform::{self, SEEN};
use crate::error::{Error, Result};

/// Places of a transformed kernel.
const PLACES: usize = SEEN * SEEN;
/// Channels that are transformed at once: their taps and columns stay in the L1 cache.
const BLOCK: usize = 16;
/// With fewer channels on either side the transforms cost more than they save.
const FEWEST: usize = 32;

/// A kernel's transform: for each panel of columns, as in [`super::super::matrix::Panels`], 36
/// matrices `(channels, width)`.
pub struct Kernel {
    channels: usize,
    columns: usize,
    values: Vec<f32>,
}

impl Kernel {
    /// Whether a weight is better transformed. This follows from its shape alone, so that results
    /// do not depend on the image or the batch.
    pub fn suits(dims: &[usize], stride: usize) -> bool {
        let enough = |count| count >= FEWEST;
        matches!(*dims, [out, channels, 3, 3] if enough(out) && enough(channels)) && stride == 1
    }

    /// Bytes of memory of such a weight once it is transformed; none if it is not.
    pub fn bytes_of(dims: &[usize], stride: usize) -> Option<u64> {
        let &[columns, channels, ..] = dims else { return None };
        let len = packed_len(columns, channels).filter(|_| Self::suits(dims, stride))?;
        (len as u64).checked_mul(size_of::<f32>() as u64)
    }

    /// Transforms a weight of nine taps.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn new<T: Element>(values: &[T], source: &Source<'_>) -> Result<Self> {
        let too_large = || Error::other("a weight is too large to be transformed");
        let (channels, columns) = (source.channels, source.columns);
        assert!(source.taps.len() == 9 && channels > 0, "a kernel of 3 x 3");
        let mut packed = zeroed(packed_len(columns, channels).ok_or_else(too_large)?)?;
        let panels = packed.par_chunks_mut(PLACES * channels * WIDTH).enumerate();
        panels.for_each(|(j, panel)| transform_panel(values, source, j * WIDTH, panel));
        Ok(Self { channels, columns, values: packed })
    }

    /// Of the input.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Channels of the result.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Number of panels.
    pub fn panels(&self) -> usize {
        self.columns.div_ceil(WIDTH)
    }

    /// Width of the `j`-th panel.
    pub fn width(&self, j: usize) -> usize {
        if self.columns - j * WIDTH <= HALF { HALF } else { WIDTH }
    }

    /// Channels `from .. from + count` of one place in the `j`-th panel.
    pub fn piece(&self, j: usize, place: usize, from: usize, count: usize) -> &[f32] {
        assert!(place < PLACES && from + count <= self.channels, "beyond the kernel");
        let width = self.width(j);
        let panel = j * WIDTH * self.channels * PLACES;
        let start = panel + (place * self.channels + from) * width;
        &self.values[start..start + count * width]
    }

    /// Bytes of memory.
    pub fn held_bytes(&self) -> u64 {
        size_of_val(self.values.as_slice()) as u64
    }
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kernel({} to {})", self.channels, self.columns)
    }
}

/// Numbers of a transformed kernel.
fn packed_len(columns: usize, channels: usize) -> Option<usize> {
    let filled = columns.checked_next_multiple_of(HALF)?;
    channels.checked_mul(filled)?.checked_mul(PLACES)
}

/// Fills one panel, whose first column is `first`.
fn transform_panel<T: Element>(values: &[T], source: &Source<'_>, first: usize, panel: &mut [f32]) {
    let (channels, stride) = (source.channels, source.channel_stride);
    let plane = panel.len() / PLACES;
    let width = plane / channels;
    let mut taps = [0f32; 9 * BLOCK * WIDTH];
    for c0 in (0..channels).step_by(BLOCK) {
        let count = BLOCK.min(channels - c0);
        let block = Source { offset: source.offset + c0 * stride, channels: count, ..*source };
        let taps = &mut taps[..9 * count * width];
        pack_panel(values, &block, first, width, 1, taps);
        transform::kernel(taps, &mut panel[c0 * width..], plane);
    }
}
