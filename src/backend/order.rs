//! Memory order as arithmetic on layouts: which element lies where, and how far a layout reaches.
//! Separate because tensors, ops, kernels and the wire all need the very same answers.

use candle_core::{Layout, Shape};

/// The layout of `(batch, channels, height, width)` stored as batch, height, width, channels.
pub fn channels_last([batch, channels, height, width]: [usize; 4]) -> Layout {
    let row = width * channels;
    let stride = vec![height * row, 1, row, channels];
    Layout::new(Shape::from(vec![batch, channels, height, width]), stride, 0)
}

/// The order of dimensions in memory, slowest first: the permutation under which the strides
/// decrease. Dimensions of size 1 and repeated ones (stride 0) say nothing and stay in place.
/// Elementwise results follow the order of their first full operand.
pub fn memory_order(layout: &Layout) -> Vec<usize> {
    let (dims, stride) = (layout.dims(), layout.stride());
    let mut order: Vec<usize> = (0..dims.len()).collect();
    let places: Vec<usize> =
        order.iter().copied().filter(|&d| dims[d] > 1 && stride[d] > 0).collect();
    let mut sorted = places.clone();
    sorted.sort_by_key(|&d| std::cmp::Reverse(stride[d]));
    for (place, dim) in places.into_iter().zip(sorted) {
        order[place] = dim;
    }
    order
}

/// The layout of a dense result with `dims`, stored in `order` (see [`memory_order`]).
pub fn dense_in_order(dims: &[usize], order: &[usize]) -> Layout {
    let mut stride = vec![0; dims.len()];
    let mut step = 1;
    for &dim in order.iter().rev() {
        stride[dim] = step;
        step *= dims[dim];
    }
    Layout::new(Shape::from(dims.to_vec()), stride, 0)
}

/// The highest element that a layout reaches: `Some(None)` if it has no elements at all, `None` on
/// overflow. The arithmetic is checked because strides come from files and from the network.
pub fn last_element(layout: &Layout) -> Option<Option<usize>> {
    let mut elements: usize = 1;
    let mut last = layout.start_offset();
    for (&dim, &stride) in layout.dims().iter().zip(layout.stride()) {
        if dim == 0 {
            return Some(None);
        }
        elements = elements.checked_mul(dim)?;
        last = last.checked_add((dim - 1).checked_mul(stride)?)?;
    }
    Some(Some(last))
}

/// Whether every element that `layout` reaches lies in a buffer of `len` elements: the check that
/// stands between a foreign layout and a kernel.
pub fn fits(layout: &Layout, len: usize) -> bool {
    match last_element(layout) {
        Some(Some(last)) => last < len,
        Some(None) => true,
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_order_reads_the_strides_and_ignores_what_says_nothing() {
        let check = |dims: &[usize], stride: &[usize], expected: &[usize]| {
            let layout = Layout::new(dims.into(), stride.to_vec(), 7);
            assert_eq!(memory_order(&layout), expected, "{dims:?} {stride:?}");
        };
        check(&[2, 3, 4, 5], &[60, 20, 5, 1], &[0, 1, 2, 3]);
        check(&[2, 3, 4, 5], &[60, 1, 15, 3], &[0, 2, 3, 1]);
        check(&[1, 3, 4, 5], &[0, 1, 15, 3], &[0, 2, 3, 1]);
        check(&[2, 3, 4, 5], &[6, 1, 0, 0], &[0, 1, 2, 3]);
        check(&[4, 6], &[1, 4], &[1, 0]);
        check(&[], &[], &[]);
    }

    #[test]
    fn a_dense_layout_in_its_own_order_is_itself() {
        for dims in [[2, 3, 4, 5], [1, 3, 4, 5], [2, 1, 4, 5], [2, 3, 1, 1]] {
            let layout = channels_last(dims);
            let again = dense_in_order(&dims, &memory_order(&layout));
            for d in (0..4).filter(|&d| dims[d] > 1) {
                assert_eq!(again.stride()[d], layout.stride()[d], "{dims:?}");
            }
        }
    }
}
