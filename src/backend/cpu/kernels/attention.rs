//! Attention without the square of the sequence in memory: a tile of queries meets blocks of keys
//! one after another, with a running maximum and sum (Milakov & Gimelshein 2018, Dao et al. 2022).
//! Blocks follow from the shape alone.

use std::cell::RefCell;

use candle_core::CpuStorage;
use rayon::prelude::*;

use super::super::Storage;
use super::matrix::{Panels, Source};
use super::memory::{Rows, Shared, result};
use super::micro::{DEPTH, ROW, WIDTH};
use super::simd::{Isa, exp, for_each_isa};
use super::spare;
use crate::backend::{Attention, Meta, View};
use crate::error::{Error, Result};

/// Queries of a tile.
const QUERIES: usize = 112;

/// See [`Attention`]; `(batch, queries, heads · head_dim)`, row-major.
pub fn attention(op: &Attention, args: &[View<'_, Storage>], meta: &Meta) -> Result<CpuStorage> {
    let [query, key, value] = args else { return Err(Error::other("attention of 3 operands")) };
    let (&[batch, queries, inner], &[_, keys, _]) = (query.layout.dims(), key.layout.dims()) else {
        return Err(Error::other("attention of operands without 3 dimensions"));
    };
    let (heads, head_dim) = (op.heads, inner / op.heads);
    let (query, key, value) = (Rows::read(*query)?, Rows::read(*key)?, Rows::read(*value)?);
    let packed = (0..batch * heads)
        .into_par_iter()
        .map(|i| {
            let (first, at) = (i / heads * keys, i % heads * head_dim);
            Ok([
                pack(&key, first, keys, at, head_dim, true)?,
                pack(&value, first, keys, at, head_dim, false)?,
            ])
        })
        .collect::<Result<Vec<_>>>()?;
    let mut values = spare::take(batch * queries * inner)?;
    let out = Shared::new(&mut values);
    let tiles = queries.div_ceil(QUERIES);
    (0..batch * heads * tiles).into_par_iter().for_each(|task| {
        let (i, tile) = (task / tiles, task % tiles);
        let (first, end) = (tile * queries / tiles, (tile + 1) * queries / tiles);
        let (image, at) = (i / heads, i % heads * head_dim);
        let [key, value] = &packed[i];
        let head = Head { key, value, keys, head_dim, causal: op.causal };
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(end - first, head_dim);
            for row in 0..end - first {
                let query = &query.row(image * queries + first + row)[at..at + head_dim];
                scratch.set_query(row, query, op.scale as f32);
            }
            head.attend(first, end, scratch);
            for row in 0..end - first {
                let start = (image * queries + first + row) * inner + at;
                // SAFETY: tasks differ in the image, the head or the queries.
                let piece = unsafe { out.piece(start, head_dim) };
                scratch.write(row, piece);
            }
        });
    });
    result(values, meta.dtype)
}

/// Keys as a matrix `(head_dim, keys)`, values as `(keys, head_dim)`.
fn pack(
    rows: &Rows<'_>,
    first: usize,
    keys: usize,
    at: usize,
    head_dim: usize,
    transposed: bool,
) -> Result<Panels> {
    let (values, offset, stride) = rows.matrix(first);
    let (offset, taps) = (offset + at, &[0]);
    let source = if transposed {
        Source {
            offset,
            columns: keys,
            column_stride: stride,
            taps,
            channels: head_dim,
            channel_stride: 1,
        }
    } else {
        Source {
            offset,
            columns: head_dim,
            column_stride: 1,
            taps,
            channels: keys,
            channel_stride: stride,
        }
    };
    Panels::pack(values, &source)
}

/// What one head of one image looks at.
struct Head<'a> {
    key: &'a Panels,
    value: &'a Panels,
    keys: usize,
    head_dim: usize,
    causal: bool,
}

/// Buffers of one tile.
struct Scratch {
    /// The queries, scaled, in blocks of `DEPTH` columns: `(block, rows, ROW)`.
    query: Vec<f32>,
    /// Scores of the tile with one block of keys, then their exponentials: `(rows, ROW)`.
    scores: Vec<f32>,
    /// Weighted sums of values so far: `(rows, sum_row)`.
    sums: Vec<f32>,
    /// Of each query: the largest score so far, and the sum of exponentials relative to it.
    running: Vec<(f32, f32)>,
    rows: usize,
    sum_row: usize,
}

thread_local! {
    /// Kept by each thread: 0.4 MB for usual heads, 0.8 MB for the VAE's of 512.
    static SCRATCH: RefCell<Scratch> = const {
        RefCell::new(Scratch {
            query: Vec::new(),
            scores: Vec::new(),
            sums: Vec::new(),
            running: Vec::new(),
            rows: 0,
            sum_row: 0,
        })
    };
}

impl Scratch {
    fn resize(&mut self, rows: usize, head_dim: usize) {
        (self.rows, self.sum_row) = (rows, head_dim.next_multiple_of(WIDTH));
        self.query.resize(head_dim.div_ceil(DEPTH) * rows * ROW, 0.0);
        self.scores.resize(rows * ROW, 0.0);
        self.sums.clear();
        self.sums.resize(rows * self.sum_row, 0.0);
        self.running.clear();
        self.running.resize(rows, (f32::NEG_INFINITY, 0.0));
    }

    fn set_query(&mut self, row: usize, query: &[f32], scale: f32) {
        for (block, piece) in query.chunks(DEPTH).enumerate() {
            let to = &mut self.query[(block * self.rows + row) * ROW..];
            for (to, from) in to.iter_mut().zip(piece) {
                *to = from * scale;
            }
        }
    }

    fn write(&self, row: usize, to: &mut [f32]) {
        let (_, sum) = self.running[row];
        for (to, from) in to.iter_mut().zip(&self.sums[row * self.sum_row..]) {
            *to = from / sum;
        }
    }
}

impl Head<'_> {
    /// The tile of queries `first..end` against all keys that they may see.
    fn attend(&self, first: usize, end: usize, scratch: &mut Scratch) {
        let isa = Isa::detect();
        let rows = end - first;
        let seen = if self.causal { end } else { self.keys };
        let Scratch { query, scores, sums, running, sum_row, .. } = scratch;
        for k0 in (0..seen).step_by(DEPTH) {
            let depth = DEPTH.min(seen - k0);
            let panels = k0 / WIDTH..(k0 + depth).div_ceil(WIDTH);
            scores.fill(0.0);
            for (block, d0) in (0..self.head_dim).step_by(DEPTH).enumerate() {
                let a = &query[block * rows * ROW..];
                let shape = (rows, d0, DEPTH.min(self.head_dim - d0));
                self.key.multiply(isa, a, shape, panels.clone(), scores, ROW);
            }
            let states = scores.chunks_exact_mut(ROW).zip(sums.chunks_exact_mut(*sum_row));
            for (row, ((scores, sums), running)) in states.zip(running.iter_mut()).enumerate() {
                let visible =
                    if self.causal { (first + row + 1).saturating_sub(k0) } else { depth };
                let (visible, hidden) = scores[..depth].split_at_mut(visible.min(depth));
                hidden.fill(0.0);
                if !visible.is_empty() {
                    advance(visible, sums, running);
                }
            }
            let columns = 0..self.value.count();
            self.value.multiply(isa, scores, (rows, k0, depth), columns, sums, *sum_row);
        }
    }
}

for_each_isa! {
    /// Turns scores into exponentials relative to the new maximum, and what was summed so far too.
    pub fn advance(scores: &mut [f32], sums: &mut [f32], running: &mut (f32, f32)) {
        const LANES: usize = 16;
        let (max, sum) = *running;
        let (blocks, rest) = scores.as_chunks::<LANES>();
        let mut largest = [max; LANES];
        for block in blocks {
            for (largest, score) in largest.iter_mut().zip(block) {
                *largest = if *score > *largest { *score } else { *largest };
            }
        }
        let new = largest.iter().chain(rest).fold(max, |max, &score| max.max(score));
        let (blocks, rest) = scores.as_chunks_mut::<LANES>();
        let mut partial = [0f32; LANES];
        for block in blocks {
            for (partial, score) in partial.iter_mut().zip(block) {
                *score = exp(*score - new);
                *partial += *score;
            }
        }
        for (partial, score) in partial.iter_mut().zip(rest) {
            *score = exp(*score - new);
            *partial += *score;
        }
        let before = if max == new { 1.0 } else { exp(max - new) };
        *running = (new, sum * before + partial.iter().sum::<f32>());
        if before != 1.0 {
            for sum in sums {
                *sum *= before;
            }
        }
    }
}
