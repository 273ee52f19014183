//! 3 × 3 convolutions that move by one, by Winograd's F(4×4, 3×3): a quarter of the products.
//! Separate from other convolutions because it works on tiles of pixels instead of pixels.
//!
//! All threads work on the same block of tiles, in three phases: the transform V of what the tiles
//! see, the 36 products M of V and the kernel's transform, and the pixels of the result. A block
//! is as large as the shared cache allows, because each passes over the whole weight. How tiles are
//! split changes no bit: each product is summed over channels in order, whatever is beside it.

mod kernel;
mod transform;

use std::array::from_fn;
use std::ops::Range;

use candle_core::{CpuStorage, Layout};
use rayon::prelude::*;

use super::super::Storage;
use super::element::{Element, with_number};
use super::matrix::{Onto, add_to};
use super::memory::{Shared, check, in_order, row_major};
use super::micro::{self, DEPTH, ROW, WIDTH};
use super::simd::{Isa, prefetch};
use super::spare;
use crate::backend::weighted::Weighted;
use crate::backend::{Conv2d, Meta, Size2d, View};
use crate::error::{Error, Result};
pub use kernel::Kernel;
use transform::{LANES, MADE, Made, PLACES_DOUBLED, SEEN, SEEN_DOUBLED, Target};

/// Bytes of V and M that a block may have: well within the shared cache, beside the weights that
/// pass.
const BLOCK_BYTES: usize = 16 << 20;
/// Products are split into so many tasks, if there are panels enough.
const TASKS: usize = 72;
/// Tiles whose products are started together: whole groups of each micro-kernel.
const GROUP: usize = 42;
/// Channels that are widened at once where they are not read in place.
const WIDENED: usize = 64;

/// See [`Conv2d`]; `(batch, height, width, out)` in memory. The stride is 1.
pub fn conv2d(
    op: &Conv2d,
    operands: &Weighted<'_, View<'_, Storage>>,
    kernel: &Kernel,
    meta: &Meta,
) -> Result<CpuStorage> {
    let &Weighted { x, bias, residual, .. } = operands;
    check(*x)?;
    let work = Work::new(op, x.layout, kernel, meta)?;
    let bias = bias.map(|bias| row_major(*bias)).transpose()?;
    let mut filled = vec![0.0; kernel.columns().next_multiple_of(WIDTH)];
    if let Some(bias) = bias {
        filled[..bias.len()].copy_from_slice(&bias);
    }
    with_number!(meta.dtype, T => {
        let residual = residual.map(|view| in_order::<T>(*view, &[0, 2, 3, 1])).transpose()?;
        let onto = Onto { bias: Some(&filled), residual: residual.as_deref() };
        finish::<T>(&work, *x, &onto, meta)
    })
}

fn finish<T: Element>(
    work: &Work<'_>,
    x: View<'_, Storage>,
    onto: &Onto<'_, T>,
    meta: &Meta,
) -> Result<CpuStorage> {
    let mut made = spare::take::<T>(meta.layout.shape().elem_count())?;
    match T::of(x.storage.elements()?) {
        Some(values) if x.layout.stride()[1] == 1 => {
            work.run(&Image::new(values, x.layout), onto, &mut made)?;
        }
        _ => {
            let dense = in_order::<T>(x, &[0, 2, 3, 1])?;
            let order = crate::backend::order::channels_last(x.layout.shape().dims4()?.into());
            work.run(&Image::new(&dense, &order), onto, &mut made)?;
        }
    }
    Ok(T::store(made))
}

/// An image in memory whose channels lie side by side.
struct Image<'a, T> {
    values: &'a [T],
    offset: usize,
    /// Distances of pictures, rows and pixels.
    strides: [usize; 3],
}

impl<'a, T: Element> Image<'a, T> {
    /// A view that lies within `values`.
    fn new(values: &'a [T], layout: &Layout) -> Self {
        let stride = layout.stride();
        let strides = [stride[0], stride[2], stride[3]];
        Self { values, offset: layout.start_offset(), strides }
    }

    /// Where the channels of a pixel begin.
    fn pixel(&self, picture: usize, row: usize, column: usize) -> usize {
        let [of_picture, of_row, of_column] = self.strides;
        self.offset + picture * of_picture + row * of_row + column * of_column
    }
}

/// One convolution: its shape, and how it is split.
struct Work<'a> {
    kernel: &'a Kernel,
    padding: usize,
    /// Of the image in memory.
    source: Size2d,
    /// Of the image that the window moves over.
    size: Size2d,
    /// Of the result.
    made: Size2d,
    /// Tiles of one picture, down and across.
    tiles: Size2d,
    /// Tiles of all pictures.
    total: usize,
    /// The window moves over pixels that are all doubled.
    doubled: bool,
    /// Most channels of V in one row of [`ROW`] elements.
    chunk: usize,
    /// Tiles of a block.
    block: usize,
    /// Parts of the kernel's panels.
    parts: usize,
}

/// Some panels, whose products of a place follow each other in M.
struct Part {
    panels: Range<usize>,
    /// Where they begin in a place of M.
    start: usize,
    /// Distance of tiles: all columns, and an odd number of cache lines.
    row: usize,
}

impl<'a> Work<'a> {
    fn new(op: &Conv2d, x: &Layout, kernel: &'a Kernel, meta: &Meta) -> Result<Self> {
        let (&[batch, channels, height, width], &[_, _, made_h, made_w]) =
            (x.dims(), meta.layout.dims())
        else {
            return Err(Error::other("conv2d of operands without 4 dimensions"));
        };
        if channels != kernel.channels() || op.stride != 1 {
            return Err(Error::other("a transformed weight is used for another convolution"));
        }
        let (source, size) = (Size2d { height, width }, op.input_size(height, width));
        let twice = (height.checked_mul(2), width.checked_mul(2));
        let doubled = op.padding == 1 && twice == (Some(size.height), Some(size.width));
        let tiles = Size2d { height: made_h.div_ceil(MADE), width: made_w.div_ceil(MADE) };
        let total = batch * tiles.height * tiles.width;
        let places = if doubled { PLACES_DOUBLED.len() } else { SEEN }.pow(2);
        let tile_bytes = size_of::<f32>() * places * (channels + kernel.columns());
        let most = (BLOCK_BYTES / tile_bytes).max(GROUP);
        let blocks = total.div_ceil(most);
        Ok(Self {
            kernel,
            padding: op.padding,
            source,
            size,
            made: Size2d { height: made_h, width: made_w },
            tiles,
            total,
            doubled,
            chunk: channels.div_ceil(channels.div_ceil(DEPTH)).next_multiple_of(LANES),
            block: total.div_ceil(blocks.max(1)),
            parts: TASKS.div_ceil(places).min(kernel.panels()),
        })
    }

    /// Places of V that do not vanish, along a side.
    fn side(&self) -> usize {
        if self.doubled { PLACES_DOUBLED.len() } else { SEEN }
    }

    /// Pixels that a tile sees, along a side.
    fn seen(&self) -> usize {
        if self.doubled { SEEN_DOUBLED } else { SEEN }
    }

    /// Which place of the kernel's transform goes with the `i`-th of V.
    fn place(&self, i: usize) -> usize {
        match self.doubled {
            true => PLACES_DOUBLED[i / self.side()] * SEEN + PLACES_DOUBLED[i % self.side()],
            false => i,
        }
    }

    /// Distance of V's places: an odd number of cache lines, so that they do not fight for the
    /// same places of the cache.
    fn plane(&self) -> usize {
        let lines = self.kernel.channels().div_ceil(self.chunk) * self.block * ROW / LANES;
        (lines | 1) * LANES
    }

    /// Where the row of V for some channels of a tile begins.
    fn row(&self, chunk: usize, tile: usize) -> usize {
        (chunk * self.block + tile) * ROW
    }

    /// Distance of M's places; see [`plane`](Self::plane).
    fn products_plane(&self) -> usize {
        let lines = self.block * (self.kernel.panels() * WIDTH / LANES + self.parts);
        (lines | 1) * LANES
    }

    /// The `i`-th of [`parts`](Self::parts).
    fn part(&self, i: usize) -> Part {
        let panels = self.kernel.panels();
        let panels = i * panels / self.parts..(i + 1) * panels / self.parts;
        let start = self.block * (panels.start * WIDTH + i * LANES);
        Part { row: panels.len() * WIDTH + LANES, panels, start }
    }

    fn run<X: Element, Y: Element>(
        &self,
        image: &Image<'_, X>,
        onto: &Onto<'_, Y>,
        made: &mut [Y],
    ) -> Result<()> {
        assert!(onto.residual.is_none_or(|residual| residual.len() == made.len()));
        let places = self.side().pow(2);
        let mut v = spare::take(places * self.plane())?;
        let mut m = spare::take(places * self.products_plane())?;
        let made = Shared::new(made);
        for first in (0..self.total).step_by(self.block) {
            let count = self.block.min(self.total - first);
            let target = Shared::new(&mut v);
            let tiles = (0..count).into_par_iter();
            tiles.for_each(|tile| self.transform(image, first + tile, tile, &target));
            let target = Shared::new(&mut m);
            (0..places * self.parts).into_par_iter().for_each(|task| {
                let (place, part) = (task / self.parts, self.part(task % self.parts));
                let start = place * self.products_plane() + part.start;
                // SAFETY: tasks differ in their place, or in their part of it.
                let products = unsafe { target.piece(start, count * part.row) };
                self.multiply(place, &part, &v, products);
            });
            let tiles = (0..count).into_par_iter();
            tiles.for_each(|tile| self.finish(first + tile, tile, &m, onto, &made));
        }
        spare::keep(v);
        spare::keep(m);
        Ok(())
    }

    /// Row and column of a tile in its picture, and the number of that.
    fn locate(&self, tile: usize) -> (usize, usize, usize) {
        let (row, column) = (tile / self.tiles.width, tile % self.tiles.width);
        (row % self.tiles.height, column, row / self.tiles.height)
    }

    /// The pixel that a tile sees in one direction, or `None` in the padding.
    fn sees(&self, tile: usize, tap: usize, size: usize, source: usize) -> Option<usize> {
        if self.doubled {
            return (2 * tile + tap).checked_sub(1).filter(|&pixel| pixel < source);
        }
        let pixel = (MADE * tile + tap).checked_sub(self.padding);
        let pixel = pixel.filter(|&pixel| pixel < size)?;
        // ⌊pixel · source / size⌋, which is the pixel itself where nothing is enlarged.
        Some(if size == source {
            pixel
        } else {
            (pixel as u128 * source as u128 / size as u128) as usize
        })
    }

    /// Makes V of one tile, the `at`-th of the block.
    fn transform<X: Element>(
        &self,
        image: &Image<'_, X>,
        tile: usize,
        at: usize,
        v: &Shared<'_, f32>,
    ) {
        let (row, column, picture) = self.locate(tile);
        let (seen, channels) = (self.seen(), self.kernel.channels());
        let mut starts = [None; SEEN * SEEN];
        for (i, start) in starts[..seen * seen].iter_mut().enumerate() {
            let y = self.sees(row, i / seen, self.size.height, self.source.height);
            let x = self.sees(column, i % seen, self.size.width, self.source.width);
            *start = y.zip(x).map(|(y, x)| image.pixel(picture, y, x));
        }
        let starts = &starts[..seen * seen];
        // How far the next tile's pixels are, if it is beside this one.
        let pixels = if self.doubled { MADE / 2 } else { MADE };
        let next = image.strides[2].wrapping_mul(pixels);
        for (chunk, first) in (0..channels).step_by(self.chunk).enumerate() {
            let count = self.chunk.min(channels - first);
            let row = self.row(chunk, at);
            match X::as_f32(image.values).filter(|_| count.is_multiple_of(LANES)) {
                Some(values) => {
                    let pixels: [&[f32]; SEEN * SEEN] = from_fn(|i| match starts.get(i) {
                        Some(&Some(start)) => &values[start + first..][..count],
                        Some(None) | None => &ZEROS[..count],
                    });
                    self.transform_pixels(&pixels[..starts.len()], next, row, v);
                }
                None => self.transform_widened(image, starts, first..first + count, next, row, v),
            }
        }
    }

    /// Makes V of some channels of a tile that must be converted, or are not whole vectors.
    fn transform_widened<X: Element>(
        &self,
        image: &Image<'_, X>,
        starts: &[Option<usize>],
        channels: Range<usize>,
        next: usize,
        row: usize,
        v: &Shared<'_, f32>,
    ) {
        let mut widened = [[0f32; WIDENED]; SEEN * SEEN];
        for from in channels.clone().step_by(WIDENED) {
            let len = WIDENED.min(channels.end - from);
            let filled = len.next_multiple_of(LANES);
            for (wide, start) in widened.iter_mut().zip(starts) {
                wide[..filled].fill(0.0);
                if let Some(start) = *start {
                    let pixel = &image.values[start + from..][..len];
                    X::widen(pixel, &mut wide[..len]);
                    prefetch::<false, X>(pixel.as_ptr().wrapping_add(next));
                }
            }
            let pixels: [&[f32]; SEEN * SEEN] = from_fn(|i| &widened[i][..filled]);
            self.transform_pixels(&pixels[..starts.len()], 0, row + from - channels.start, v);
        }
    }

    /// Makes V of some channels of a tile, from `row` on.
    fn transform_pixels(&self, pixels: &[&[f32]], next: usize, row: usize, v: &Shared<'_, f32>) {
        // SAFETY: only one task writes the rows of a tile, each once, and nobody reads them yet.
        let mut target = unsafe { Target::new(v, row, self.plane(), pixels[0].len()) };
        match self.doubled {
            true => transform::input_doubled(pixels, next, &mut target),
            false => transform::input(pixels, next, &mut target),
        }
    }

    /// Makes M of all tiles of the block, for one place and one part.
    fn multiply(&self, i: usize, part: &Part, v: &[f32], products: &mut [f32]) {
        let (isa, channels, place) = (Isa::detect(), self.kernel.channels(), self.place(i));
        let v = &v[i * self.plane()..];
        for (at, panel) in part.panels.clone().enumerate() {
            for (group, c) in products.chunks_mut(GROUP * part.row).enumerate() {
                let (rows, width) = (c.len() / part.row, self.kernel.width(panel));
                for (chunk, from) in (0..channels).step_by(self.chunk).enumerate() {
                    let depth = self.chunk.min(channels - from);
                    let a = &v[self.row(chunk, group * GROUP)..];
                    let b = self.kernel.piece(panel, place, from, depth);
                    let c = &mut c[at * WIDTH..];
                    micro::multiply(isa, (rows, depth, width), a, b, c, part.row, chunk == 0);
                }
            }
        }
    }

    /// Makes the pixels of one tile, the `at`-th of the block.
    fn finish<Y: Element>(
        &self,
        tile: usize,
        at: usize,
        m: &[f32],
        onto: &Onto<'_, Y>,
        made: &Shared<'_, Y>,
    ) {
        let bias = onto.bias.unwrap_or_default();
        let places = self.places(tile);
        self.foresee(&places, 0, onto.residual);
        let mut pixels: Made = [[0.0; WIDTH]; MADE * MADE];
        for part in (0..self.parts).map(|i| self.part(i)) {
            for (i, panel) in part.panels.clone().enumerate() {
                self.foresee(&places, (panel + 1) * WIDTH, onto.residual);
                let bias = &bias[panel * WIDTH..][..self.kernel.width(panel)];
                let m = &m[part.start + at * part.row + i * WIDTH..];
                let (plane, next) = (self.products_plane(), part.row);
                match self.doubled {
                    true => transform::output_doubled(m, plane, next, bias, &mut pixels),
                    false => transform::output(m, plane, next, bias, &mut pixels),
                }
                self.write(&places, panel * WIDTH, &mut pixels, onto.residual, made);
            }
        }
    }

    /// Where those pixels of a tile begin that the result has.
    fn places(&self, tile: usize) -> Places {
        let (row, column, picture) = self.locate(tile);
        from_fn(|i| {
            let (y, x) = (row * MADE + i / MADE, column * MADE + i % MADE);
            let place = (picture * self.made.height + y) * self.made.width + x;
            let is_there = y < self.made.height && x < self.made.width;
            is_there.then_some(place * self.kernel.columns())
        })
    }

    /// Asks for what will be added to some columns of a tile's pixels.
    fn foresee<Y: Element>(&self, places: &Places, first: usize, residual: Option<&[Y]>) {
        const LINE_BYTES: usize = 64;
        let Some(residual) = residual.filter(|_| first < self.kernel.columns()) else { return };
        for place in places.iter().flatten() {
            for at in (0..WIDTH).step_by(LINE_BYTES / size_of::<Y>()) {
                prefetch::<true, Y>(residual.as_ptr().wrapping_add(place + first + at));
            }
        }
    }

    /// Writes those pixels of a tile that the result has, from one column on.
    fn write<Y: Element>(
        &self,
        places: &Places,
        first: usize,
        pixels: &mut Made,
        residual: Option<&[Y]>,
        made: &Shared<'_, Y>,
    ) {
        let count = WIDTH.min(self.kernel.columns() - first);
        for (pixel, place) in pixels.iter_mut().zip(places) {
            let Some(place) = *place else { continue };
            let (start, pixel) = (place + first, &mut pixel[..count]);
            if let Some(residual) = residual {
                add_to(&residual[start..][..count], pixel);
            }
            // SAFETY: tasks differ in their tiles or in their columns, and neither overlap.
            Y::narrow(pixel, unsafe { made.piece(start, count) });
        }
    }
}

/// Where the pixels of a tile begin in the result, if they are there.
type Places = [Option<usize>; MADE * MADE];

/// What a tile sees beside the image.
static ZEROS: [f32; DEPTH] = [0.0; DEPTH];
