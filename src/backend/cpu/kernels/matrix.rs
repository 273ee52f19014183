//! Matrix products with one packed operand: what convolutions, linear layers and attention are
//! made of. Separate because they differ only in where rows come from and what follows the sum.

use std::cell::RefCell;

use rayon::prelude::*;

use super::memory::{Element, Shared, zeroed};
use super::micro::{self, DEPTH, HALF, ROW, WIDTH};
use super::simd::Isa;
use crate::error::{Error, Result};

/// Rows of a tile: whole groups of each micro-kernel; with [`DEPTH`] they fit into the L2 cache.
const TILE: usize = 168;
/// Panels of a tile at most.
const PANELS: usize = 10;
/// Tiles are made narrower until there are so many of them.
const TASKS: usize = 16;

/// A matrix `(k, n)` in panels of [`WIDTH`] columns, each `(k, WIDTH)` and filled up with zeros;
/// the last panel is [`HALF`] as wide where that is enough.
pub struct Panels {
    k: usize,
    n: usize,
    values: Vec<f32>,
}

impl std::fmt::Debug for Panels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Panels({} x {})", self.k, self.n)
    }
}

/// Where the elements of a matrix `(taps · channels, columns)` lie: column `n` of row
/// `tap · channels + c` at `offset + n · column_stride + taps[tap] + c · channel_stride`.
pub struct Source<'a> {
    /// Of the first element.
    pub offset: usize,
    /// Number of columns.
    pub columns: usize,
    /// Distance of columns.
    pub column_stride: usize,
    /// Where each tap of a convolution's kernel begins; `[0]` for a matrix.
    pub taps: &'a [usize],
    /// Number of channels.
    pub channels: usize,
    /// Distance of channels.
    pub channel_stride: usize,
}

impl Panels {
    /// Packs a matrix.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn pack<T: Element>(values: &[T], source: &Source<'_>) -> Result<Self> {
        let too_large = || Error::other("a weight is too large to be packed");
        let (n, taps) = (source.columns, source.taps.len());
        let k = taps.checked_mul(source.channels).ok_or_else(too_large)?;
        let columns = n.checked_next_multiple_of(HALF).ok_or_else(too_large)?;
        let mut packed = zeroed(k.checked_mul(columns).ok_or_else(too_large)?)?;
        if k > 0 {
            let panels = packed.par_chunks_mut(k * WIDTH).enumerate();
            panels.for_each(|(j, panel)| pack_panel(values, source, j * WIDTH, panel));
        }
        Ok(Self { k, n, values: packed })
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.n
    }

    /// Bytes of memory.
    pub fn held_bytes(&self) -> u64 {
        size_of_val(self.values.as_slice()) as u64
    }

    /// Number of panels.
    pub fn count(&self) -> usize {
        self.n.div_ceil(WIDTH)
    }

    /// Rows `k0 .. k0 + depth` of the `j`-th panel, and its width.
    fn piece(&self, j: usize, k0: usize, depth: usize) -> (&[f32], usize) {
        let width = if self.n - j * WIDTH <= HALF { HALF } else { WIDTH };
        let start = j * WIDTH * self.k + k0 * width;
        (&self.values[start..start + depth * width], width)
    }

    /// `c += a · self[k0 .. k0 + depth, panels]`: see [`micro::multiply`]. Columns of `c` count
    /// from the first of `panels`.
    pub fn multiply(
        &self,
        isa: Isa,
        a: &[f32],
        (rows, k0, depth): (usize, usize, usize),
        panels: std::ops::Range<usize>,
        c: &mut [f32],
        c_row: usize,
    ) {
        for (i, j) in panels.enumerate() {
            let (panel, width) = self.piece(j, k0, depth);
            micro::multiply(isa, (rows, depth, width), a, panel, &mut c[i * WIDTH..], c_row, false);
        }
    }
}

/// Fills one panel, whose first column is `first`, in blocks that stay in the L1 cache.
pub fn pack_panel<T: Element>(values: &[T], source: &Source<'_>, first: usize, panel: &mut [f32]) {
    const BLOCK: usize = 16;
    let (taps, channels) = (source.taps, source.channels);
    let width = panel.len() / (taps.len() * channels);
    let columns = width.min(source.columns - first);
    let (mut narrow, mut wide) = ([T::default(); BLOCK], [0f32; BLOCK]);
    let contiguous = source.channel_stride == 1;
    for c0 in (0..channels).step_by(BLOCK) {
        let count = BLOCK.min(channels - c0);
        for column in 0..columns {
            let base = source.offset + (first + column) * source.column_stride;
            for (tap, &offset) in taps.iter().enumerate() {
                let start = base + offset + c0 * source.channel_stride;
                if contiguous {
                    T::widen(&values[start..start + count], &mut wide[..count]);
                } else {
                    for (i, value) in narrow[..count].iter_mut().enumerate() {
                        *value = values[start + i * source.channel_stride];
                    }
                    T::widen(&narrow[..count], &mut wide[..count]);
                }
                let to = &mut panel[(tap * channels + c0) * width..][..count * width];
                for (row, &value) in to.chunks_exact_mut(width).zip(&wide) {
                    row[column] = value;
                }
            }
        }
    }
}

/// `out = finish(rows · panels + bias)`, `(rows, n)` row-major.
///
/// `fill(row, k0, piece)` writes elements of a row from the `k0`-th on. How the work is split
/// follows from the shape alone.
pub fn product(
    rows: usize,
    panels: &Panels,
    bias: Option<&[f32]>,
    out: &mut [f32],
    fill: impl Fn(usize, usize, &mut [f32]) + Sync,
    finish: impl Fn(&mut [f32]) + Sync,
) {
    let n = panels.columns();
    assert!(out.len() == rows * n && bias.is_none_or(|bias| bias.len() == n));
    let (isa, out) = (Isa::detect(), Shared::new(out));
    let tiles = rows.div_ceil(TILE);
    let across = panels.count().div_ceil(PANELS).max(TASKS.div_ceil(tiles.max(1)));
    let across = across.min(panels.count());
    let part = |i: usize, parts: usize, whole: usize| i * whole / parts..(i + 1) * whole / parts;
    (0..tiles * across).into_par_iter().for_each(|task| {
        let part_rows = part(task / across, tiles, rows);
        let part_panels = part(task % across, across, panels.count());
        let (first, end) = (part_panels.start * WIDTH, n.min(part_panels.end * WIDTH));
        with_scratch(|[a, c]| {
            let c_row = part_panels.len() * WIDTH;
            let c = &mut c[..part_rows.len() * c_row];
            for row in c.chunks_exact_mut(c_row) {
                match bias {
                    Some(bias) => row[..end - first].copy_from_slice(&bias[first..end]),
                    None => row.fill(0.0),
                }
            }
            for k0 in (0..panels.k).step_by(DEPTH) {
                let depth = DEPTH.min(panels.k - k0);
                for (row, a) in part_rows.clone().zip(a.chunks_exact_mut(ROW)) {
                    fill(row, k0, &mut a[..depth]);
                }
                let shape = (part_rows.len(), k0, depth);
                panels.multiply(isa, a, shape, part_panels.clone(), c, c_row);
            }
            for (row, c) in part_rows.zip(c.chunks_exact_mut(c_row)) {
                let c = &mut c[..end - first];
                finish(c);
                // SAFETY: tasks differ in their rows or in their columns, and neither overlap.
                unsafe { out.piece(row * n + first, c.len()) }.copy_from_slice(c);
            }
        });
    });
}

thread_local! {
    /// Rows of one operand and the tile of the result, kept by each thread: 0.5 MB.
    static SCRATCH: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// Lends this thread's buffers for one tile. `work` must not start parallel work.
fn with_scratch(work: impl FnOnce(&mut [Vec<f32>; 2])) {
    SCRATCH.with_borrow_mut(|scratch| {
        scratch[0].resize(TILE * ROW, 0.0);
        scratch[1].resize(TILE * PANELS * WIDTH, 0.0);
        work(scratch);
    });
}
