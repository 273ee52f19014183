//! Matrix products with one packed operand: what convolutions, linear layers and attention are
//! made of. Separate because they differ only in where rows come from and what follows the sum.

use std::cell::RefCell;

use rayon::prelude::*;

use super::element::{As, Element};
use super::halves::Halves;
use super::memory::{Shared, zeroed};
use super::micro::{self, DEPTH, HALF, ROW, Unit, WIDTH};
use super::simd::{Isa, for_each_isa};
use super::spare;
use crate::error::{Error, Result};

/// Rows of a tile: whole groups of each micro-kernel; with [`DEPTH`] they fit into the L2 cache.
const TILE: usize = 168;
/// Panels of a tile at most.
const PANELS: usize = 10;
/// Tiles are made narrower until there are so many of them.
const TASKS: usize = 16;

/// A matrix `(k, n)` in panels of [`WIDTH`] columns, each `(depth, WIDTH)` units and filled up with
/// zeros; the last panel is [`HALF`] as wide where that is enough.
pub struct Panels<U = f32> {
    k: usize,
    /// `k` in units.
    depth: usize,
    n: usize,
    units: Vec<U>,
}

impl<U> std::fmt::Debug for Panels<U> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Panels({} x {})", self.k, self.n)
    }
}

/// A matrix of f32 in panels in half the memory.
pub struct HalvedPanels {
    k: usize,
    n: usize,
    values: Halves,
}

impl std::fmt::Debug for HalvedPanels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HalvedPanels({} x {})", self.k, self.n)
    }
}

impl HalvedPanels {
    /// The panels, which want to be [given back](Panels::give).
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn widen(&self) -> Result<Panels> {
        Ok(Panels { k: self.k, depth: self.k, n: self.n, units: self.values.widen()? })
    }

    /// Bytes of memory.
    pub fn held_bytes(&self) -> u64 {
        self.values.held_bytes()
    }
}

impl Panels {
    /// The same in half the memory, if no bit is lost by it.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn halved(&self) -> Result<Option<HalvedPanels>> {
        let halves = Halves::of(&self.units)?;
        Ok(halves.map(|values| HalvedPanels { k: self.k, n: self.n, values }))
    }

    /// Gives their buffer to the next result.
    pub fn give(&mut self) {
        spare::keep(std::mem::take(&mut self.units));
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

impl<U: Unit> Panels<U> {
    /// Packs a matrix.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn pack<T: As<U::Number> + Element>(values: &[T], source: &Source<'_>) -> Result<Self> {
        let too_large = || Error::other("a weight is too large to be packed");
        let (n, taps) = (source.columns, source.taps.len());
        let k = taps.checked_mul(source.channels).ok_or_else(too_large)?;
        let depth = k.div_ceil(U::NUMBERS);
        let columns = n.checked_next_multiple_of(HALF).ok_or_else(too_large)?;
        let mut units = zeroed(depth.checked_mul(columns).ok_or_else(too_large)?)?;
        if depth > 0 {
            let panels = units.par_chunks_mut(depth * WIDTH).enumerate();
            panels.for_each(|(j, panel): (usize, &mut [U])| {
                let width = panel.len() / depth;
                pack_panel(values, source, j * WIDTH, width, U::NUMBERS, U::numbers(panel));
            });
        }
        Ok(Self { k, depth, n, units })
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.n
    }

    /// Bytes of memory.
    pub fn held_bytes(&self) -> u64 {
        size_of_val(self.units.as_slice()) as u64
    }

    /// Number of panels.
    pub fn count(&self) -> usize {
        self.n.div_ceil(WIDTH)
    }

    /// `depth` rows of units of the `j`-th panel from the `k0`-th on, and its width.
    fn piece(&self, j: usize, k0: usize, depth: usize) -> (&[U], usize) {
        let width = if self.n - j * WIDTH <= HALF { HALF } else { WIDTH };
        let start = j * WIDTH * self.depth + k0 * width;
        (&self.units[start..start + depth * width], width)
    }

    /// `c += a · self[k0 .. k0 + depth, panels]`, `k0` and `depth` in units: see
    /// [`micro::multiply`]. Columns of `c` count from the first of `panels`.
    fn multiply(
        &self,
        isa: Isa,
        a: &[U],
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

/// Fills one panel, whose first column is `first`, in blocks that stay in the L1 cache. In the
/// panel, `together` numbers along k lie side by side.
pub fn pack_panel<T: As<N> + Element, N: Element>(
    values: &[T],
    source: &Source<'_>,
    first: usize,
    width: usize,
    together: usize,
    panel: &mut [N],
) {
    const BLOCK: usize = 16;
    let (taps, channels) = (source.taps, source.channels);
    let columns = width.min(source.columns - first);
    let (mut gathered, mut converted) = ([T::default(); BLOCK], [N::default(); BLOCK]);
    for c0 in (0..channels).step_by(BLOCK) {
        let count = BLOCK.min(channels - c0);
        for column in 0..columns {
            let base = source.offset + (first + column) * source.column_stride;
            for (tap, &offset) in taps.iter().enumerate() {
                let start = base + offset + c0 * source.channel_stride;
                let from = if source.channel_stride == 1 {
                    &values[start..start + count]
                } else {
                    for (i, value) in gathered[..count].iter_mut().enumerate() {
                        *value = values[start + i * source.channel_stride];
                    }
                    &gathered[..count]
                };
                let k0 = tap * channels + c0;
                for (i, &value) in T::read(from, &mut converted).iter().enumerate() {
                    let (unit, part) = ((k0 + i) / together, (k0 + i) % together);
                    panel[(unit * width + column) * together + part] = value;
                }
            }
        }
    }
}

/// What is added to a product.
pub struct Onto<'a, O> {
    /// To each row.
    pub bias: Option<&'a [f32]>,
    /// To the finished result, of whose shape it is.
    pub residual: Option<&'a [O]>,
}

/// `out = finish(rows · panels + bias) + residual`, `(rows, n)` row-major, rounded once.
///
/// `fill(row, k0, piece)` writes numbers of a row from the `k0`-th on. How the work is split
/// follows from the shape alone.
pub fn product<U: Unit, O: Element>(
    rows: usize,
    panels: &Panels<U>,
    onto: &Onto<'_, O>,
    out: &mut [O],
    fill: impl Fn(usize, usize, &mut [U::Number]) + Sync,
    finish: impl Fn(&mut [f32]) + Sync,
) {
    let n = panels.columns();
    let &Onto { bias, residual } = onto;
    assert!(out.len() == rows * n && bias.is_none_or(|bias| bias.len() == n));
    assert!(residual.is_none_or(|residual| residual.len() == out.len()));
    let (isa, out) = (Isa::detect(), Shared::new(out));
    let tiles = rows.div_ceil(TILE);
    let across = panels.count().div_ceil(PANELS).max(TASKS.div_ceil(tiles.max(1)));
    let across = across.min(panels.count());
    let part = |i: usize, parts: usize, whole: usize| i * whole / parts..(i + 1) * whole / parts;
    (0..tiles * across).into_par_iter().for_each(|task| {
        let part_rows = part(task / across, tiles, rows);
        let part_panels = part(task % across, across, panels.count());
        let (first, end) = (part_panels.start * WIDTH, n.min(part_panels.end * WIDTH));
        with_scratch::<U>(TILE * ROW, TILE * PANELS * WIDTH, |a, c| {
            let c_row = part_panels.len() * WIDTH;
            let c = &mut c[..part_rows.len() * c_row];
            for row in c.chunks_exact_mut(c_row) {
                match bias {
                    Some(bias) => row[..end - first].copy_from_slice(&bias[first..end]),
                    None => row.fill(0.0),
                }
            }
            for k0 in (0..panels.depth).step_by(DEPTH) {
                let depth = DEPTH.min(panels.depth - k0);
                let numbers = k0 * U::NUMBERS..panels.k.min((k0 + depth) * U::NUMBERS);
                for (row, a) in part_rows.clone().zip(a.chunks_exact_mut(ROW)) {
                    let (a, beyond) = U::numbers(&mut a[..depth]).split_at_mut(numbers.len());
                    fill(row, numbers.start, a);
                    beyond.fill(U::Number::default());
                }
                let shape = (part_rows.len(), k0, depth);
                panels.multiply(isa, a, shape, part_panels.clone(), c, c_row);
            }
            for (row, c) in part_rows.zip(c.chunks_exact_mut(c_row)) {
                let c = &mut c[..end - first];
                finish(c);
                if let Some(residual) = residual {
                    add_to(&residual[row * n + first..][..c.len()], c);
                }
                // SAFETY: tasks differ in their rows or in their columns, and neither overlap.
                O::narrow(c, unsafe { out.piece(row * n + first, c.len()) });
            }
        });
    });
}

/// `sums += values`, widened piece by piece.
pub fn add_to<O: Element>(values: &[O], sums: &mut [f32]) {
    const PIECE: usize = 64;
    if let Some(values) = O::as_f32(values) {
        return add_all(values, sums);
    }
    let mut wide = [0.0; PIECE];
    for (values, sums) in values.chunks(PIECE).zip(sums.chunks_mut(PIECE)) {
        let wide = &mut wide[..values.len()];
        O::widen(values, wide);
        add_all(wide, sums);
    }
}

for_each_isa! {
    pub fn add_all(values: &[f32], sums: &mut [f32]) {
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += value;
        }
    }
}

thread_local! {
    /// The tile of the result, kept by each thread.
    static SUMS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Lends this thread's buffers, with anything in them. `work` must not start parallel work.
pub fn with_scratch<U: Unit>(units: usize, sums: usize, work: impl FnOnce(&mut [U], &mut [f32])) {
    U::scratch().with_borrow_mut(|kept_units| {
        SUMS.with_borrow_mut(|kept_sums| {
            kept_units.resize(units.max(kept_units.len()), U::default());
            kept_sums.resize(sums.max(kept_sums.len()), 0.0);
            work(&mut kept_units[..units], &mut kept_sums[..sums]);
        });
    });
}
