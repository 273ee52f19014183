//! The elements of a strided tensor in row-major order, as bytes, a piece at a time. Separate
//! because it is a loop with state: hashing and sending read tensors in pieces that fit nothing.

use candle_core::Layout;

/// Rows that are turned over at once: their elements stay in the fastest cache.
const BLOCK_ROWS: usize = 1024;

/// A place in the row-major order of a layout's elements. Made for the strides of convolutions in
/// channels-last checkpoints: (out, in, height, width) with `in` fastest.
#[derive(Debug, Clone)]
pub struct Gather {
    /// Bytes of an element.
    size: usize,
    /// Dimensions before the last two: length and stride in elements.
    outer: Vec<(usize, usize)>,
    /// How far each of these was counted.
    index: Vec<usize>,
    rows: (usize, usize),
    columns: (usize, usize),
    /// Element at which the current plane (rows, columns) begins.
    base: usize,
    /// Elements of the current plane that were read.
    within: usize,
    /// Elements that remain, of the whole.
    left: usize,
}

impl Gather {
    /// The first element of `layout`, whose elements have `size` bytes.
    pub fn new(layout: &Layout, size: usize) -> Self {
        let left = layout.shape().elem_count();
        let mut dims: Vec<(usize, usize)> = Vec::new();
        for (&dim, &stride) in layout.dims().iter().zip(layout.stride()) {
            match dims.last_mut() {
                // Of a layout without elements the strides may say anything.
                _ if left == 0 => {}
                _ if dim == 1 => {}
                // One after the other in memory as in order: one dimension.
                Some((before, step)) if dim.checked_mul(stride) == Some(*step) => {
                    (*before, *step) = (*before * dim, stride);
                }
                _ => dims.push((dim, stride)),
            }
        }
        let columns = dims.pop().unwrap_or((1, 1));
        let rows = dims.pop().unwrap_or((1, 0));
        let index = vec![0; dims.len()];
        let (base, outer) = (layout.start_offset(), dims);
        Self { size, outer, index, rows, columns, base, within: 0, left }
    }

    /// Fills `out` with whole elements from the front, as far as they go, and says how many bytes
    /// that are; 0 at the end. `stored` begins with element 0; what lies beyond it reads as zero.
    pub fn read(&mut self, stored: &[u8], out: &mut [u8]) -> usize {
        match self.size {
            1 => self.read_sized::<1>(stored, out),
            2 => self.read_sized::<2>(stored, out),
            4 => self.read_sized::<4>(stored, out),
            8 => self.read_sized::<8>(stored, out),
            _ => 0,
        }
    }

    fn read_sized<const N: usize>(&mut self, stored: &[u8], out: &mut [u8]) -> usize {
        let (stored, out) = (stored.as_chunks::<N>().0, out.as_chunks_mut::<N>().0);
        let (width, plane) = (self.columns.0, self.rows.0 * self.columns.0);
        let mut filled = 0;
        while let Some(rest) = out.get_mut(filled..).filter(|rest| !rest.is_empty())
            && self.left > 0
        {
            let (row, column) = (self.within / width, self.within % width);
            let start = self.base + row * self.rows.1;
            let whole_rows = (rest.len() / width).min(self.rows.0 - row).min(BLOCK_ROWS);
            let count = if column == 0 && whole_rows > 0 {
                let count = whole_rows * width;
                let target = rest.get_mut(..count).unwrap_or_default();
                self.whole_rows(stored, start, target);
                count
            } else {
                let count = (width - column).min(rest.len());
                let first = start + column * self.columns.1;
                let from = stored.get(first..).unwrap_or_default();
                copy_strided(from, self.columns.1, rest.get_mut(..count).unwrap_or_default());
                count
            };
            filled += count;
            self.left -= count;
            self.within += count;
            if self.within == plane {
                self.next_plane();
            }
        }
        filled * N
    }

    fn whole_rows<const N: usize>(&self, stored: &[[u8; N]], start: usize, out: &mut [[u8; N]]) {
        let ((_, row_stride), (width, stride)) = (self.rows, self.columns);
        if stride == 1 {
            for (row, to) in out.chunks_exact_mut(width).enumerate() {
                let from = start + row * row_stride;
                match stored.get(from..from + width) {
                    Some(from) => to.copy_from_slice(from),
                    None => to.fill([0; N]),
                }
            }
            return;
        }
        // Column by column: with rows next to each other in memory, this reads without gaps.
        for column in 0..width {
            let from = stored.get(start + column * stride..).unwrap_or_default();
            let to = out.iter_mut().skip(column).step_by(width);
            match row_stride {
                0 => {
                    let only = from.first().copied().unwrap_or([0; N]);
                    to.for_each(|to| *to = only);
                }
                1 => to.zip(from).for_each(|(to, from)| *to = *from),
                _ => {
                    let from = from.iter().step_by(row_stride);
                    to.zip(from).for_each(|(to, from)| *to = *from);
                }
            }
        }
    }

    fn next_plane(&mut self) {
        self.within = 0;
        for (index, (dim, stride)) in self.index.iter_mut().zip(&self.outer).rev() {
            *index += 1;
            self.base += stride;
            if *index < *dim {
                return;
            }
            self.base -= stride * dim;
            *index = 0;
        }
    }
}

/// Every `stride`th element of `from`; what lies beyond it reads as zero.
fn copy_strided<const N: usize>(from: &[[u8; N]], stride: usize, out: &mut [[u8; N]]) {
    if stride == 1
        && let Some(from) = from.get(..out.len())
    {
        // At the speed of memory: a whole matrix is one such row.
        return out.copy_from_slice(from);
    }
    for (i, to) in out.iter_mut().enumerate() {
        *to = from.get(i * stride).copied().unwrap_or([0; N]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All elements one by one, by the definition.
    fn expected(layout: &Layout, size: usize, stored: &[u8]) -> Vec<u8> {
        let mut places = vec![layout.start_offset()];
        for (&dim, &stride) in layout.dims().iter().zip(layout.stride()) {
            let step = |place: usize| (0..dim).map(move |n| place + n * stride);
            places = places.into_iter().flat_map(step).collect();
        }
        places.iter().flat_map(|place| stored[place * size..][..size].to_vec()).collect()
    }

    #[test]
    fn every_layout_is_read_in_row_major_order_whatever_the_pieces() {
        let check = |dims: &[usize], stride: &[usize], offset: usize| {
            let layout = Layout::new(dims.into(), stride.to_vec(), offset);
            for size in [1, 2, 4, 8] {
                let stored: Vec<u8> = (0..40_000 * size).map(|n| (n * 7 / 3) as u8).collect();
                let expected = expected(&layout, size, &stored);
                for piece in [size, 3 * size, 64, 1000, 1 << 20] {
                    let (mut gather, mut found) = (Gather::new(&layout, size), Vec::new());
                    let mut buffer = vec![0; piece];
                    loop {
                        match gather.read(&stored, &mut buffer) {
                            0 => break,
                            len => found.extend_from_slice(&buffer[..len]),
                        }
                    }
                    assert!(found == expected, "{dims:?} {stride:?} {size} {piece}");
                }
            }
        };
        check(&[], &[], 5);
        check(&[7], &[1], 2);
        check(&[7], &[3], 2);
        check(&[4, 6], &[6, 1], 0);
        check(&[4, 6], &[1, 4], 1);
        check(&[4, 6], &[9, 1], 1);
        check(&[5, 4], &[1, 0], 0);
        check(&[5, 4], &[0, 3], 0);
        check(&[5, 4], &[0, 1], 0);
        check(&[3, 2, 2], &[0, 0, 0], 8);
        check(&[8, 16, 3, 3], &[144, 1, 48, 16], 3);
        check(&[2, 1500, 3, 3], &[13500, 1, 4500, 1500], 0);
        check(&[8, 16, 1, 1], &[16, 1, 16, 16], 0);
        check(&[2, 3, 4, 5], &[60, 1, 15, 3], 1);
        check(&[2, 3, 4, 5], &[1, 40, 2, 8], 0);
        check(&[3, 0, 4], &[9, 9, 9], 0);
    }
}
