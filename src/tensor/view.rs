//! Views: the same storage under another layout. Separate because nothing here reaches a device,
//! and because a start offset that got lost here is the bug this project was born from.

use candle_core::{Layout, Shape};

use super::Tensor;
use crate::backend::Backend;
use crate::backend::order::fits;
use crate::error::{Error, Result};

impl<B: Backend> Tensor<B> {
    fn view(&self, layout: Layout) -> Self {
        Self { storage: self.storage.clone(), layout }
    }

    fn check_dim(&self, dim: usize, op: &str) -> Result<()> {
        if dim < self.dims().len() {
            return Ok(());
        }
        Err(Error::other(format!("{op}: shape {:?} has no dimension {dim}", self.dims())))
    }

    /// Exchanges two dimensions.
    ///
    /// # Errors
    /// If there is no such dimension.
    pub fn transpose(&self, dim1: usize, dim2: usize) -> Result<Self> {
        self.check_dim(dim1.max(dim2), "transpose")?;
        Ok(self.view(self.layout.transpose(dim1, dim2)?))
    }

    /// Reorders the dimensions: result dimension `i` is dimension `order[i]` of this one.
    ///
    /// # Errors
    /// If `order` is not a permutation.
    pub fn permute(&self, order: &[usize]) -> Result<Self> {
        Ok(self.view(self.layout.permute(order)?))
    }

    /// `len` entries of `dim` from `start` on.
    ///
    /// # Errors
    /// If they are not all there.
    pub fn narrow(&self, dim: usize, start: usize, len: usize) -> Result<Self> {
        self.check_dim(dim, "narrow")?;
        let size = self.dims()[dim];
        if start.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::other(format!(
                "narrow: {len} entries from {start} on in dimension {dim} of shape {:?}",
                self.dims()
            )));
        }
        Ok(self.view(self.layout.narrow(dim, start, len)?))
    }

    /// Equal parts along `dim`.
    ///
    /// # Errors
    /// If the dimension cannot be divided so.
    pub fn chunk(&self, parts: usize, dim: usize) -> Result<Vec<Self>> {
        self.check_dim(dim, "chunk")?;
        let size = self.dims()[dim];
        if parts == 0 || !size.is_multiple_of(parts) {
            let dims = self.dims();
            return Err(Error::other(format!(
                "{parts} equal parts of dimension {dim} of {dims:?}"
            )));
        }
        let len = size / parts;
        (0..parts).map(|part| self.narrow(dim, part * len, len)).collect()
    }

    /// Repeats dimensions of size 1 (stride 0) and adds leading ones.
    ///
    /// # Errors
    /// If a dimension is neither equal nor 1.
    pub fn broadcast_as(&self, shape: impl Into<Shape>) -> Result<Self> {
        Ok(self.view(self.layout.broadcast_as(shape)?))
    }

    /// Adds a dimension of size 1 before `dim`.
    ///
    /// # Errors
    /// If `dim` is beyond the end.
    pub fn unsqueeze(&self, dim: usize) -> Result<Self> {
        if dim > self.dims().len() {
            let dims = self.dims();
            return Err(Error::other(format!("unsqueeze: no place {dim} in shape {dims:?}")));
        }
        let (mut dims, mut stride) = (self.dims().to_vec(), self.layout.stride().to_vec());
        let below: usize = stride.get(dim).zip(dims.get(dim)).map_or(1, |(s, d)| s * d);
        dims.insert(dim, 1);
        stride.insert(dim, below);
        Ok(self.view(Layout::new(dims.into(), stride, self.layout.start_offset())))
    }

    /// The same elements in row-major order under another shape: a view where strides allow it,
    /// else of a row-major copy.
    ///
    /// # Errors
    /// If the number of elements differs.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        if shape.elem_count() != self.elem_count() {
            let (from, to) = (self.dims(), shape.dims());
            return Err(Error::other(format!("reshape: {from:?} does not fill {to:?}")));
        }
        match strides_under(&self.layout, shape.dims()) {
            Some(stride) => Ok(self.view(Layout::new(shape, stride, self.layout.start_offset()))),
            None => Ok(self.copy()?.view(Layout::contiguous(shape))),
        }
    }

    /// Any strided view of the same storage, as torch's `as_strided`, relative to this view's
    /// start offset.
    ///
    /// # Errors
    /// If it would reach beyond the elements from the start of this view to its last.
    pub fn as_strided(&self, shape: impl Into<Shape>, stride: &[usize]) -> Result<Self> {
        let shape = shape.into();
        let layout = Layout::new(shape, stride.to_vec(), self.layout.start_offset());
        let end = crate::backend::order::last_element(&self.layout).flatten().map_or(0, |i| i + 1);
        if stride.len() != layout.dims().len() || !fits(&layout, end) {
            let dims = layout.dims();
            return Err(Error::other(format!(
                "as_strided: shape {dims:?} with strides {stride:?} reaches beyond {self:?}"
            )));
        }
        Ok(self.view(layout))
    }
}

/// Strides under which `dims` reads the elements of `layout` in the same order, if there are any:
/// torch's `computeStride`. Runs of source dimensions that lie evenly in memory are merged, and
/// the new dimensions must split those runs.
fn strides_under(layout: &Layout, dims: &[usize]) -> Option<Vec<usize>> {
    if layout.shape().elem_count() == 0 {
        return Some(Layout::contiguous(dims.to_vec()).stride().to_vec());
    }
    // Merged runs, slowest first: (elements, stride of the fastest).
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (&dim, &stride) in layout.dims().iter().zip(layout.stride()).filter(|(dim, _)| **dim != 1) {
        match runs.last_mut() {
            Some((count, step)) if *step == dim * stride => {
                (*count, *step) = (*count * dim, stride)
            }
            _ => runs.push((dim, stride)),
        }
    }
    let mut strides = vec![0; dims.len()];
    let mut run = runs.pop().unwrap_or((1, 1));
    let mut within = 1;
    for (place, &dim) in dims.iter().enumerate().rev() {
        if within == run.0 && dim != 1 {
            run = runs.pop()?;
            within = 1;
        }
        strides[place] = run.1 * within;
        within *= dim;
        if !run.0.is_multiple_of(within) {
            return None;
        }
    }
    Some(strides)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reshape_is_a_view_exactly_where_strides_allow_it() {
        let check =
            |dims: &[usize], stride: &[usize], new: &[usize], expected: Option<&[usize]>| {
                let layout = Layout::new(dims.into(), stride.to_vec(), 3);
                let found = strides_under(&layout, new);
                assert_eq!(found.as_deref(), expected, "{dims:?} {stride:?} as {new:?}");
            };
        check(&[2, 3], &[3, 1], &[6], Some(&[1]));
        check(&[2, 3], &[1, 2], &[6], None);
        check(&[2, 6], &[12, 2], &[2, 2, 3], Some(&[12, 6, 2]));
        check(&[2, 4, 5, 3], &[60, 15, 3, 1], &[2, 20, 3], Some(&[60, 3, 1]));
        check(&[2, 3, 4, 5], &[60, 1, 15, 3], &[2, 3, 20], Some(&[60, 1, 3]));
        check(&[2, 3, 4, 5], &[60, 1, 15, 3], &[2, 60], None);
        check(&[4, 3], &[0, 1], &[2, 2, 3], Some(&[0, 0, 1]));
        check(&[4, 3], &[0, 1], &[12], None);
        check(&[6], &[2], &[1, 6, 1], Some(&[12, 2, 2]));
        check(&[1, 1], &[9, 9], &[1], Some(&[1]));
        check(&[], &[], &[1, 1], Some(&[1, 1]));
        check(&[0, 3], &[3, 1], &[3, 0], Some(&[0, 1]));
    }
}
