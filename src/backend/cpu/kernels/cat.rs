//! Joining tensors: each part is copied run by run to its place in the result, whatever its
//! layout and dtype.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Layout};
use rayon::prelude::*;

use super::super::Storage;
use super::memory::{Gather, Plain, TASK, check, unsupported, zeroed};
use super::spare;
use crate::backend::order::memory_order;
use crate::backend::{Meta, View};
use crate::error::{Error, Result};

/// See [`crate::backend::Fused::Cat`]; in the order of the first operand.
pub fn cat(dim: usize, args: &[View<'_, Storage>], meta: &Meta) -> Result<CpuStorage> {
    for arg in args {
        check(*arg)?;
    }
    /// Joins the parts if all are of one variant.
    macro_rules! join_as {
        ($variant:ident, $take:path) => {{
            let mut parts = Vec::with_capacity(args.len());
            for arg in args {
                let CpuStorage::$variant(values) = arg.storage.elements()? else {
                    return Err(Error::other("cat of different dtypes"));
                };
                parts.push((values.as_slice(), arg.layout));
            }
            join(dim, &parts, meta, $take).map(CpuStorage::$variant)
        }};
    }
    let Some(first) = args.first() else { return Err(Error::other("cat of nothing")) };
    match first.storage.elements()? {
        CpuStorage::U8(_) => join_as!(U8, zeroed),
        CpuStorage::U32(_) => join_as!(U32, zeroed),
        CpuStorage::I16(_) => join_as!(I16, zeroed),
        CpuStorage::I32(_) => join_as!(I32, zeroed),
        CpuStorage::I64(_) => join_as!(I64, zeroed),
        CpuStorage::BF16(_) => join_as!(BF16, spare::take),
        CpuStorage::F16(_) => join_as!(F16, spare::take),
        CpuStorage::F32(_) => join_as!(F32, spare::take),
        CpuStorage::F64(_) => join_as!(F64, zeroed),
        other @ (CpuStorage::F8E4M3(_)
        | CpuStorage::F6E2M3(_)
        | CpuStorage::F6E3M2(_)
        | CpuStorage::F4(_)
        | CpuStorage::F8E8M0(_)) => Err(unsupported(other.dtype())),
    }
}

fn join<T: Plain>(
    dim: usize,
    parts: &[(&[T], &Layout)],
    meta: &Meta,
    take: impl Fn(usize) -> Result<Vec<T>>,
) -> Result<Vec<T>> {
    let order = memory_order(&meta.layout);
    let dims = meta.layout.dims();
    let mut values = take(meta.layout.shape().elem_count())?;
    let place = order.iter().position(|&d| d == dim).unwrap_or(0);
    // In memory: everything slower than `dim`, then the parts' entries of `dim` and all faster.
    let faster: usize = order[place + 1..].iter().map(|&d| dims[d]).product();
    let row = dims[dim] * faster;
    let sources = parts
        .iter()
        .map(|(values, layout)| {
            let width = layout.dims()[dim] * faster;
            Ok((*values, Gather::new(&layout.permute(&order)?), width))
        })
        .collect::<Result<Vec<_>>>()?;
    let rows = (TASK / row).max(1);
    values.par_chunks_mut(rows * row).enumerate().for_each(|(task, piece)| {
        for (i, mut rest) in piece.chunks_exact_mut(row).enumerate() {
            for (values, source, width) in &sources {
                let (to, after) = rest.split_at_mut(*width);
                source.copy_from(values, (task * rows + i) * width, to);
                rest = after;
            }
        }
    });
    Ok(values)
}
