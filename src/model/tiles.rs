//! Windows of an image that are computed one after another, and the image that they make together.
//! Separate because both VAEs cut their work into such.

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// A part of one dimension: what is wanted, and what has to be seen for that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    /// Where the seen part begins.
    start: usize,
    /// How long it is.
    len: usize,
    /// Of the seen part, what comes before the wanted.
    before: usize,
    /// How much is wanted.
    wanted: usize,
}

impl Span {
    /// Parts of `len`, each of at most `tile` with `halo` around it where there is more.
    pub fn cover(len: usize, tile: usize, halo: usize) -> Vec<Self> {
        let count = len.div_ceil(tile).max(1);
        // Of nearly one length, so that a device sees few shapes.
        let tile = len.div_ceil(count);
        let span = |start: usize| {
            let (before, wanted) = (halo.min(start), tile.min(len - start));
            let after = halo.min(len - start - wanted);
            Self { start: start - before, len: before + wanted + after, before, wanted }
        };
        (0..len).step_by(tile.max(1)).map(span).collect()
    }
}

/// A part of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    rows: Span,
    columns: Span,
}

impl Window {
    /// Of an image (batch, channels, height, width), what is seen.
    pub fn seen<B: Backend>(&self, image: &Tensor<B>) -> Result<Tensor<B>> {
        let rows = image.narrow(2, self.rows.start, self.rows.len)?;
        rows.narrow(3, self.columns.start, self.columns.len)
    }

    /// Of what was made of the seen, perhaps enlarged, what is wanted.
    pub fn wanted<B: Backend>(&self, image: &Tensor<B>) -> Result<Tensor<B>> {
        let [_, _, height, width] = image.dims_exact()?;
        let (by, bx) = (height / self.rows.len, width / self.columns.len);
        let rows = image.narrow(2, self.rows.before * by, self.rows.wanted * by)?;
        rows.narrow(3, self.columns.before * bx, self.columns.wanted * bx)
    }
}

/// The windows of an image, row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Windows {
    rows: Vec<Span>,
    columns: Vec<Span>,
}

impl Windows {
    /// Windows of at most `tile` × `tile` with `halo` around them.
    pub fn cover(height: usize, width: usize, tile: usize, halo: usize) -> Self {
        Self { rows: Span::cover(height, tile, halo), columns: Span::cover(width, tile, halo) }
    }

    /// Whether there is but one.
    pub fn is_one(&self) -> bool {
        self.rows.len() * self.columns.len() == 1
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = Window> {
        self.rows
            .iter()
            .flat_map(|&rows| self.columns.iter().map(move |&columns| Window { rows, columns }))
    }

    /// The image of what `make` makes of each window's seen part; of that only the wanted is kept.
    ///
    /// # Errors
    /// As `make`, or if the device fails.
    pub fn assemble<B: Backend>(
        &self,
        image: &Tensor<B>,
        make: &mut dyn FnMut(&Tensor<B>) -> Result<Tensor<B>>,
    ) -> Result<Tensor<B>> {
        let mut strips = Vec::new();
        for &rows in &self.rows {
            let mut parts = Vec::new();
            for &columns in &self.columns {
                let window = Window { rows, columns };
                let made = make(&window.seen(image)?)?;
                // Of its own, so that what was seen around it is free.
                parts.push(window.wanted(&made)?.contiguous()?);
            }
            strips.push(side_by_side(&parts, 3)?);
        }
        side_by_side(&strips, 2)
    }
}

fn side_by_side<B: Backend>(parts: &[Tensor<B>], dim: usize) -> Result<Tensor<B>> {
    match parts {
        [] => Err(Error::other("an image without pixels")),
        [one] => Ok(one.clone()),
        several => Tensor::cat(&several.iter().collect::<Vec<_>>(), dim),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu;

    #[test]
    fn windows_cover_every_pixel_once_and_see_a_halo_where_there_is_more() {
        let span = |start, len, before, wanted| Span { start, len, before, wanted };
        assert_eq!(Span::cover(5, 8, 2), [span(0, 5, 0, 5)]);
        assert_eq!(Span::cover(16, 8, 2), [span(0, 10, 0, 8), span(6, 10, 2, 8)]);
        let uneven = [span(0, 9, 0, 7), span(5, 11, 2, 7), span(12, 7, 2, 5)];
        assert_eq!(Span::cover(19, 8, 2), uneven);
        for len in 1..60 {
            let spans = Span::cover(len, 8, 3);
            assert_eq!(spans.iter().map(|span| span.wanted).sum::<usize>(), len);
            assert!(spans.iter().all(|span| span.wanted <= 8 && span.start + span.len <= len));
        }
    }

    #[test]
    fn an_image_is_put_together_as_it_was_taken_apart() {
        let device = cpu::Device::with_threads(1).unwrap();
        let values: Vec<f32> = (0..2 * 11 * 7).map(|n| n as f32).collect();
        let image = Tensor::<cpu::Storage>::from_slice(&values, (1, 2, 11, 7), &device).unwrap();
        let windows = Windows::cover(11, 7, 4, 2);
        assert_eq!(windows.iter().count(), 6);
        let same = windows.assemble(&image, &mut |seen| seen.affine(1.0, 1.0)).unwrap();
        let found = same.to_vec::<f32>().unwrap();
        assert_eq!(found, values.iter().map(|value| value + 1.0).collect::<Vec<_>>());
    }
}
