//! Attention: heads are packed once, then tiles of queries are worked on beside each other. The
//! arithmetic is in [`flash`](super::flash).

use candle_core::{CpuStorage, DType};
use half::bf16;
use rayon::prelude::*;

use super::super::Storage;
use super::choice;
use super::element::{As, Element, with_number};
use super::flash::{Head, QUERIES, Scale, Seen};
use super::matrix::with_scratch;
use super::memory::{Rows, Shared};
use super::pair::Pair;
use super::simd::Isa;
use super::softmax::Weight;
use super::spare;
use crate::backend::{Attention, Meta, View};
use crate::error::{Error, Result};

/// See [`Attention`]; `(batch, queries, heads · head_dim)`, row-major.
pub fn attention(op: &Attention, args: &[View<'_, Storage>], meta: &Meta) -> Result<CpuStorage> {
    if meta.dtype == DType::BF16 && choice::chosen().multiplies_bf16() {
        return attend::<bf16, Pair>(op, args);
    }
    with_number!(meta.dtype, T => attend::<T, f32>(op, args))
}

fn attend<T, U>(op: &Attention, args: &[View<'_, Storage>]) -> Result<CpuStorage>
where
    T: Element + As<U::Number>,
    U: Weight,
{
    let [query, key, value] = args else { return Err(Error::other("attention of 3 operands")) };
    let (&[batch, queries, inner], &[_, keys, _]) = (query.layout.dims(), key.layout.dims()) else {
        return Err(Error::other("attention of operands without 3 dimensions"));
    };
    let (heads, head_dim) = (op.heads, inner / op.heads);
    let scale = Scale::new(op.scale);
    let (query, key, value) =
        (Rows::<T>::read(*query)?, Rows::<T>::read(*key)?, Rows::<T>::read(*value)?);
    let (isa, seen) = (Isa::detect(), Seen { keys, head_dim });
    let [key_units, value_units] = seen.units::<U>();
    let mut packed_keys = spare::take::<U>(batch * heads * key_units)?;
    let mut packed_values = spare::take::<U>(batch * heads * value_units)?;
    let packed = packed_keys.par_chunks_mut(key_units);
    let packed = packed.zip(packed_values.par_chunks_mut(value_units)).enumerate();
    let packed: Vec<_> = packed
        .map(|(i, packed)| {
            let (first, at) = (i / heads * keys, i % heads * head_dim);
            let key = |k: usize| &key.row(first + k)[at..at + head_dim];
            let value = |k: usize| &value.row(first + k)[at..at + head_dim];
            Head::<U>::pack(isa, seen, key, value, packed)
        })
        .collect();
    let mut values = spare::take::<T>(batch * queries * inner)?;
    let out = Shared::new(&mut values);
    let tiles = queries.div_ceil(QUERIES);
    (0..batch * heads * tiles).into_par_iter().for_each(|task| {
        let (i, tile) = (task / tiles, task % tiles);
        let (first, end) = (tile * QUERIES, queries.min((tile + 1) * QUERIES));
        let (row, at) = (i / heads * queries + first, i % heads * head_dim);
        let query = |q: usize| &query.row(row + q)[at..at + head_dim];
        let (units, numbers) = packed[i].scratch();
        with_scratch(units, numbers + head_dim, |units, numbers| {
            let (buffer, numbers) = numbers.split_at_mut(head_dim);
            let mut tile = packed[i].tile(end - first, query, (units, numbers), scale);
            packed[i].attend(&mut tile, scale, op.causal, first);
            for q in 0..end - first {
                // SAFETY: tasks differ in the image, the head or the queries.
                let piece = unsafe { out.piece((row + q) * inner + at, head_dim) };
                T::write(piece, buffer, |numbers| tile.read(q, numbers));
            }
        });
    });
    spare::keep(packed_keys);
    spare::keep(packed_values);
    Ok(T::store(values))
}
