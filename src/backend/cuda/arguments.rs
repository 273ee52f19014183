//! A kernel's one argument: a C struct, written field by field with C's alignment, and what it says
//! of views. Separate because this is where Rust and the kernels must agree to the byte.

use candle_core::Layout;

use super::driver::Address;

/// As many dimensions as a view of the kernels has (`RANK_LIMIT`).
pub(super) const RANK_LIMIT: usize = 6;

/// The bytes of a struct.
#[derive(Debug, Default)]
pub(super) struct Arguments {
    bytes: Vec<u8>,
}

impl Arguments {
    fn put<const N: usize>(mut self, value: [u8; N]) -> Self {
        self.bytes.resize(self.bytes.len().next_multiple_of(N), 0);
        self.bytes.extend_from_slice(&value);
        self
    }

    /// `T *`; nowhere is null.
    pub fn pointer(self, address: Address) -> Self {
        self.put(address.0.to_le_bytes())
    }

    /// `int`: what does not fit is refused before, by [`int`].
    pub fn int(self, value: i32) -> Self {
        self.put(value.to_le_bytes())
    }

    /// `long long`
    pub fn long(self, value: usize) -> Self {
        self.put((value as i64).to_le_bytes())
    }

    /// `unsigned long long`
    pub fn bits(self, value: u64) -> Self {
        self.put(value.to_le_bytes())
    }

    /// `float`
    pub fn float(self, value: f32) -> Self {
        self.put(value.to_le_bytes())
    }

    /// `double`
    pub fn double(self, value: f64) -> Self {
        self.put(value.to_le_bytes())
    }

    /// `View`
    pub fn view(self, view: &View) -> Self {
        let View { rank, dims, strides, offset } = view;
        // Of 8 bytes' alignment, as its longest field.
        let start = self.align(8).int(*rank);
        let dims = dims.iter().fold(start, |all, dim| all.int(*dim));
        strides.iter().fold(dims, |all, stride| all.long(*stride)).long(*offset)
    }

    fn align(mut self, bytes: usize) -> Self {
        self.bytes.resize(self.bytes.len().next_multiple_of(bytes), 0);
        self
    }

    /// The struct, whose size is a multiple of its alignment: all of ours have a pointer.
    pub fn finish(self) -> Vec<u8> {
        self.align(8).bytes
    }
}

/// A tensor in memory, as the kernels see it; in elements.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct View {
    rank: i32,
    dims: [i32; RANK_LIMIT],
    strides: [usize; RANK_LIMIT],
    offset: usize,
}

impl View {
    /// Of a layout with its dimensions as they are; none if they are too many or too large.
    pub fn of(layout: &Layout) -> Option<Self> {
        let dims = layout.dims().iter().copied().zip(layout.stride().iter().copied());
        Self::new(&dims.collect::<Vec<_>>(), layout.start_offset())
    }

    fn new(places: &[(usize, usize)], offset: usize) -> Option<Self> {
        let mut view = Self { rank: 0, dims: [1; RANK_LIMIT], strides: [0; RANK_LIMIT], offset };
        view.rank = int(places.len())?;
        if places.len() > RANK_LIMIT {
            return None;
        }
        for (d, (dim, stride)) in places.iter().enumerate() {
            view.dims[d] = int(*dim)?;
            view.strides[d] = *stride;
        }
        Some(view)
    }

    /// Of layouts of equal dims, walked together in this order of dimensions: those that lie
    /// together in all of them become one, because fewer and larger ones are quicker.
    pub fn together<const N: usize>(layouts: [&Layout; N], order: &[usize]) -> Option<[Self; N]> {
        let mut merged: Vec<(usize, [usize; N])> = Vec::new();
        for &d in order {
            let dim = layouts.first().map_or(1, |layout| layout.dims()[d]);
            let strides = layouts.map(|layout| layout.stride()[d]);
            if dim == 1 {
                continue;
            }
            match merged.last_mut() {
                Some((before, steps))
                    if before.checked_mul(dim).and_then(int).is_some()
                        && (0..N).all(|i| strides[i].checked_mul(dim) == Some(steps[i])) =>
                {
                    (*before, *steps) = (*before * dim, strides);
                }
                _ => merged.push((dim, strides)),
            }
        }
        let mut views = [const { None }; N];
        for (i, view) in views.iter_mut().enumerate() {
            let places: Vec<_> = merged.iter().map(|(dim, steps)| (*dim, steps[i])).collect();
            *view = Some(Self::new(&places, layouts[i].start_offset())?);
        }
        let views: Option<Vec<Self>> = views.into_iter().collect();
        views?.try_into().ok()
    }
}

/// A size as the kernels count it, if it is not too large.
pub(super) fn int(size: usize) -> Option<i32> {
    i32::try_from(size).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_c_puts_them() {
        let layout = Layout::new((2, 3).into(), vec![7, 1], 5);
        let bytes = Arguments::default()
            .int(1)
            .pointer(Address(2))
            .float(0.5)
            .view(&View::of(&layout).unwrap())
            .int(9)
            .finish();
        // int, 4 bytes of padding, pointer, float, padding, 88 bytes of a view, int, padding.
        assert_eq!(bytes.len(), 8 + 8 + 8 + 88 + 8);
        assert_eq!(bytes[8..16], 2u64.to_le_bytes());
        assert_eq!(bytes[24..28], 2i32.to_le_bytes());
        assert_eq!(bytes[28..32], 2i32.to_le_bytes());
        assert_eq!(bytes[32..36], 3i32.to_le_bytes());
        assert_eq!(bytes[56..64], 7i64.to_le_bytes());
        assert_eq!(bytes[104..112], 5i64.to_le_bytes());
        assert_eq!(bytes[112..116], 9i32.to_le_bytes());
    }

    #[test]
    fn dimensions_that_lie_together_in_all_operands_become_one() {
        let check = |strides: [&[usize]; 2], expected: i32| {
            let layouts = strides.map(|s| Layout::new((2, 3, 4).into(), s.to_vec(), 0));
            let [a, b] = View::together([&layouts[0], &layouts[1]], &[0, 1, 2]).unwrap();
            assert_eq!((a.rank, b.rank), (expected, expected), "{strides:?}");
        };
        check([&[12, 4, 1], &[12, 4, 1]], 1);
        check([&[12, 4, 1], &[0, 0, 0]], 1);
        check([&[12, 4, 1], &[0, 0, 1]], 2);
        check([&[12, 4, 1], &[20, 4, 1]], 2);
        check([&[1, 2, 6], &[12, 4, 1]], 3);
    }
}
