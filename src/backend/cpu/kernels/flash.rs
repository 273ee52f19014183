//! Softmax(q kᵀ) v of one head without the square of the sequence in memory: blocks of keys come
//! one after another, with a running maximum and sum (Milakov & Gimelshein 2018, Dao et al. 2022).
//! Separate from the op, which reads operands: here is the arithmetic on packed slices.
//!
//! Everything lies across: a lane is a query. So scores come out of the first product as the panel
//! that the second takes, and maxima and sums are taken without looking beside a lane. Blocks
//! follow from the shape alone.

use rayon::prelude::*;

use super::element::{As, Element};
use super::micro::{Unit, WIDTH, multiply_strip};
use super::simd::Isa;
use super::softmax::{Causal, Running, START, Weight, advance};

/// Panels of [`WIDTH`] queries that meet a block of keys while it is in the L2 cache.
const PANELS: usize = 4;

/// Queries of a tile at most.
pub const QUERIES: usize = PANELS * WIDTH;

/// The shape of what one head looks at.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// Length of the sequence.
    pub keys: usize,
    /// Numbers of each.
    pub head_dim: usize,
}

/// Keys and values of one head of one image, packed.
pub struct Head<'a, U> {
    isa: Isa,
    seen: Seen,
    /// Block after block: strips of keys, each `(units of head_dim, rows)`.
    key: &'a [U],
    /// Block after block: strips of dimensions, each `(units of the block's keys, rows)`.
    value: &'a [U],
}

/// What multiplies scores.
#[derive(Debug, Clone, Copy)]
pub struct Scale(f32);

impl Scale {
    /// For exponentials to base 2.
    pub fn new(scale: f64) -> Self {
        Self((scale * std::f64::consts::LOG2_E) as f32)
    }
}

/// The buffers of one tile.
pub struct Tile<'a, U> {
    /// For each panel `(units of head_dim, WIDTH)`.
    queries: &'a mut [U],
    /// `(units of a block, WIDTH)`, where weights are not f32.
    weights: &'a mut [U],
    /// `(block, WIDTH)`.
    scores: &'a mut [f32],
    /// For each panel `(head_dim, WIDTH)`: values weighted and summed so far.
    sums: &'a mut [f32],
    /// For each panel.
    running: &'a mut [Running],
}

impl Seen {
    /// Keys of a block, an even number: what it reads fits into half of an L2 cache, its scores
    /// into half of L1.
    fn block(self) -> usize {
        ((1 << 15) / self.head_dim / 28 * 28).clamp(28, 168)
    }

    /// Units of one key.
    fn depth<U: Unit>(self) -> usize {
        self.head_dim.div_ceil(U::NUMBERS)
    }

    /// Units of all keys, and of all values.
    pub fn units<U: Unit>(self) -> [usize; 2] {
        // Only the last block's keys may be odd.
        [self.keys * self.depth::<U>(), self.keys.div_ceil(U::NUMBERS) * self.head_dim]
    }
}

/// Strips of `rows`: first row and end of each.
fn strips(isa: Isa, rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = rows.div_ceil(isa.rows(WIDTH));
    (0..count).map(move |i| (i * rows / count, (i + 1) * rows / count))
}

impl<'a, U: Weight> Head<'a, U> {
    /// Packs rows of keys and values into buffers of the size that [`Seen::units`] says.
    pub fn pack<'r, T: As<U::Number> + Element>(
        isa: Isa,
        seen: Seen,
        key_row: impl Fn(usize) -> &'r [T] + Sync,
        value_row: impl Fn(usize) -> &'r [T] + Sync,
        (key, value): (&'a mut [U], &'a mut [U]),
    ) -> Self {
        let size = seen.block();
        let keys = key.par_chunks_mut(size * seen.depth::<U>());
        let values = value.par_chunks_mut(size / U::NUMBERS * seen.head_dim);
        keys.zip(values).enumerate().for_each(|(i, (key, value))| {
            // What fills up the last unit of an odd number of keys counts as 0.
            value.fill(U::default());
            let (k0, count) = (i * size, size.min(seen.keys - i * size));
            pack_keys(isa, seen, count, |k| key_row(k0 + k), key);
            pack_values(isa, seen, count, |k| value_row(k0 + k), value);
        });
        Self { isa, seen, key, value }
    }

    /// The keys and the values of the block that begins at `k0`.
    fn block(&self, k0: usize, count: usize) -> (&[U], &[U]) {
        let (depth, head_dim) = (self.seen.depth::<U>(), self.seen.head_dim);
        let first = k0 / U::NUMBERS;
        let value = first * head_dim..(first + count.div_ceil(U::NUMBERS)) * head_dim;
        (&self.key[k0 * depth..(k0 + count) * depth], &self.value[value])
    }

    /// Elements of the buffers that a tile needs: units, and numbers.
    pub fn scratch(&self) -> (usize, usize) {
        let (depth, block) = (self.seen.depth::<U>(), self.seen.block());
        let units = PANELS * depth * WIDTH + block.div_ceil(U::NUMBERS) * WIDTH;
        (units, block * WIDTH + PANELS * (self.seen.head_dim + 2) * WIDTH)
    }

    /// A tile of `queries` rows within buffers of the size that [`scratch`](Self::scratch) says.
    pub fn tile<'s, 'q, T: As<U::Number> + Element>(
        &self,
        queries: usize,
        query: impl Fn(usize) -> &'q [T],
        (units, numbers): (&'s mut [U], &'s mut [f32]),
        scale: Scale,
    ) -> Tile<'s, U> {
        let (depth, block) = (self.seen.depth::<U>(), self.seen.block());
        let (packed, weights) = units.split_at_mut(PANELS * depth * WIDTH);
        let (scores, numbers) = numbers.split_at_mut(block * WIDTH);
        let (sums, running) = numbers.split_at_mut(PANELS * self.seen.head_dim * WIDTH);
        let count = queries.div_ceil(WIDTH);
        let packed = &mut packed[..count * depth * WIDTH];
        // Lanes without a query compute with zeros.
        packed.fill(U::default());
        let mut row = vec![U::default(); depth];
        for (panel, first) in
            packed.chunks_exact_mut(depth * WIDTH).zip((0..queries).step_by(WIDTH))
        {
            for q in first..queries.min(first + WIDTH) {
                read(query(q), &mut row);
                if scale.0 < 0.0 {
                    // So that the largest score stays the largest.
                    U::numbers(&mut row).iter_mut().for_each(|number| *number = -*number);
                }
                spread(&row, panel, WIDTH, q - first);
            }
        }
        let sums = &mut sums[..count * self.seen.head_dim * WIDTH];
        let running = &mut running.as_chunks_mut().0.as_chunks_mut().0[..count];
        sums.fill(0.0);
        running.fill(START);
        Tile { queries: packed, weights, scores, sums, running }
    }

    /// The tile against all keys that it may see; if `causal`, its first query is the `first`-th,
    /// and none sees what comes after it.
    pub fn attend(&self, tile: &mut Tile<'_, U>, scale: Scale, causal: bool, first: usize) {
        let (isa, scale, head_dim) = (self.isa, scale.0.abs(), self.seen.head_dim);
        let depth = self.seen.depth::<U>();
        let Tile { queries, weights, scores, sums, running } = tile;
        for k0 in (0..self.seen.keys).step_by(self.seen.block()) {
            let count = self.seen.block().min(self.seen.keys - k0);
            let (key, value) = self.block(k0, count);
            let panels = queries.chunks_exact(depth * WIDTH);
            let panels = panels.zip(sums.chunks_exact_mut(head_dim * WIDTH));
            for (i, ((panel, sums), running)) in panels.zip(running.iter_mut()).enumerate() {
                let query = first + i * WIDTH;
                if causal && query + WIDTH <= k0 {
                    continue;
                }
                // Where all of the panel's queries see all keys, nobody needs to look.
                let blind = (causal && query < k0 + count).then_some(Causal { key: k0, query });
                let scores = &mut scores[..count * WIDTH];
                for (first, end) in strips(isa, count) {
                    let strip = &key[first * depth..end * depth];
                    let to = &mut scores[first * WIDTH..];
                    multiply_strip(isa, (end - first, depth), strip, panel, to, true);
                }
                let scores = scores.as_chunks_mut().0;
                advance(scores, sums.as_chunks_mut().0, running, scale, blind);
                let weights = U::soften(scores, running, scale, blind, weights);
                let depth = count.div_ceil(U::NUMBERS);
                for (first, end) in strips(isa, head_dim) {
                    let strip = &value[first * depth..end * depth];
                    let to = &mut sums[first * WIDTH..];
                    multiply_strip(isa, (end - first, depth), strip, weights, to, false);
                }
            }
        }
    }
}

/// One block: strips of keys.
fn pack_keys<'r, U: Unit, T: As<U::Number> + Element>(
    isa: Isa,
    seen: Seen,
    count: usize,
    row: impl Fn(usize) -> &'r [T],
    to: &mut [U],
) {
    let (depth, mut units) = (seen.depth::<U>(), vec![U::default(); seen.depth::<U>()]);
    for (first, end) in strips(isa, count) {
        let strip = &mut to[first * depth..end * depth];
        for k in first..end {
            read(row(k), &mut units);
            spread(&units, strip, end - first, k - first);
        }
    }
}

/// One block: strips of dimensions.
fn pack_values<'r, U: Unit, T: As<U::Number> + Element>(
    isa: Isa,
    seen: Seen,
    count: usize,
    row: impl Fn(usize) -> &'r [T],
    to: &mut [U],
) {
    let (depth, mut buffer) =
        (count.div_ceil(U::NUMBERS), vec![U::Number::default(); seen.head_dim]);
    for k in 0..count {
        let (unit, part) = (k / U::NUMBERS, k % U::NUMBERS);
        let numbers = T::read(row(k), &mut buffer);
        for (first, end) in strips(isa, seen.head_dim) {
            let strip = &mut to[first * depth..end * depth];
            let strip = U::numbers(&mut strip[unit * (end - first)..(unit + 1) * (end - first)]);
            let places = strip[part..].iter_mut().step_by(U::NUMBERS);
            places.zip(&numbers[first..end]).for_each(|(to, from)| *to = *from);
        }
    }
}

/// A row as units, the last filled up with 0.
fn read<U: Unit, T: As<U::Number>>(from: &[T], to: &mut [U]) {
    let (numbers, beyond) = U::numbers(to).split_at_mut(from.len());
    T::copy(from, numbers);
    beyond.fill(U::Number::default());
}

/// Spreads a row: its units come to lie `rows` apart, from the `at`-th on.
fn spread<U: Copy>(row: &[U], to: &mut [U], rows: usize, at: usize) {
    for (to, from) in to[at..].iter_mut().step_by(rows).zip(row) {
        *to = *from;
    }
}

impl<U> Tile<'_, U> {
    /// The result of the `q`-th query, written to `row`.
    pub fn read(&self, q: usize, row: &mut [f32]) {
        let (panel, lane) = (q / WIDTH, q % WIDTH);
        let sums = &self.sums[panel * row.len() * WIDTH..][..row.len() * WIDTH];
        let factor = 1.0 / self.running[panel][1][lane];
        for (to, sums) in row.iter_mut().zip(sums.as_chunks::<WIDTH>().0) {
            *to = sums[lane] * factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::kernels::pair::Pair;

    fn value(i: usize) -> f32 {
        ((i * 37 + 11) % 101) as f32 / 64.0 - 0.75
    }

    /// Softmax of one query in f64.
    fn expected(query: &[f32], key: &[f32], value: &[f32], scale: f64, seen: usize) -> Vec<f64> {
        let head_dim = query.len();
        let dot = |k: usize| {
            let key = &key[k * head_dim..][..head_dim];
            query.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
        };
        let weights: Vec<f64> = (0..seen).map(|k| (dot(k) * scale).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let weighted = |d: usize| {
            let terms = weights.iter().enumerate();
            terms.map(|(k, weight)| weight * f64::from(value[k * head_dim + d])).sum::<f64>() / sum
        };
        (0..head_dim).map(weighted).collect()
    }

    fn check<U: Weight>(isa: Isa, queries: usize, seen: Seen, scale: f64, causal: bool, most: f64) {
        let Seen { keys, head_dim } = seen;
        let numbers = |count: usize, shift: usize| -> Vec<U::Number> {
            let wide: Vec<f32> = (0..count).map(|i| value(i * 7 + shift)).collect();
            let mut numbers = vec![U::Number::default(); count];
            U::Number::narrow(&wide, &mut numbers);
            numbers
        };
        let wide = |numbers: &[U::Number]| -> Vec<f32> {
            let mut wide = vec![0.0; numbers.len()];
            U::Number::widen(numbers, &mut wide);
            wide
        };
        let (query, key) = (numbers(queries * head_dim, 3), numbers(keys * head_dim, 5));
        let values = numbers(keys * head_dim, 9);
        let [key_units, value_units] = seen.units::<U>();
        let (mut packed_key, mut packed_value) =
            (vec![U::default(); key_units], vec![U::default(); value_units]);
        let head = Head::<U>::pack(
            isa,
            seen,
            |k| &key[k * head_dim..][..head_dim],
            |k| &values[k * head_dim..][..head_dim],
            (&mut packed_key, &mut packed_value),
        );
        let (units, floats) = head.scratch();
        let (mut units, mut floats) = (vec![U::default(); units], vec![f32::NAN; floats]);
        let rows = |q: usize| &query[q * head_dim..][..head_dim];
        let size = Scale::new(scale);
        let mut tile = head.tile(queries, rows, (&mut units, &mut floats), size);
        head.attend(&mut tile, size, causal, 0);
        let (query, key, values) = (wide(&query), wide(&key), wide(&values));
        let mut found = vec![0.0; head_dim];
        for q in 0..queries {
            tile.read(q, &mut found);
            let seen = if causal { q + 1 } else { keys };
            let query = &query[q * head_dim..][..head_dim];
            let expected = expected(query, &key, &values, scale, seen);
            for (found, expected) in found.iter().zip(expected) {
                let error = (f64::from(*found) - expected).abs();
                assert!(error < most, "{isa:?} {queries} x {keys} of {head_dim}: {error}");
            }
        }
    }

    #[test]
    fn every_instruction_set_attends_to_any_shape() {
        for (queries, keys, head_dim, scale, causal) in [
            (1, 1, 1, 1.0, false),
            (5, 3, 7, -0.5, false),
            (33, 200, 40, 0.2, false),
            (77, 77, 64, 0.125, true),
            (128, 337, 5, 0.4, false),
            (100, 100, 33, -0.3, true),
            (64, 64, 3, 0.0, true),
            (9, 61, 512, 0.05, false),
        ] {
            let seen = Seen { keys, head_dim };
            for &isa in Isa::available() {
                check::<f32>(isa, queries, seen, scale, causal, 5e-6);
                if Pair::runs_on(isa) {
                    check::<Pair>(isa, queries, seen, scale, causal, 6e-3);
                }
            }
        }
    }
}
