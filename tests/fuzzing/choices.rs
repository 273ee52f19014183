//! Bytes as decisions. Separate because every structured target reads its bytes so.

use candle_core::Layout;

/// Decisions that are left; zeros when they are used up.
pub struct Choices<'a>(pub &'a [u8]);

impl Choices<'_> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    /// A number below `end`, or 0.
    pub fn below(&mut self, end: usize) -> usize {
        let number = usize::from(self.byte()) << 8 | usize::from(self.byte());
        number % end.max(1)
    }

    /// Mostly small, sometimes anything.
    pub fn number(&mut self) -> usize {
        match self.byte() {
            byte @ 0..=199 => usize::from(byte % 8),
            200..=229 => self.below(1 << 16),
            230..=239 => usize::MAX - self.below(4),
            240..=247 => 1 << self.below(64),
            _ => isize::MAX as usize - self.below(4),
        }
    }

    /// Mostly the layout of a case, sometimes none, sometimes anything that can be sent.
    pub fn layout(&mut self, case: &Layout) -> Option<Layout> {
        match self.byte() {
            0..=199 => Some(case.clone()),
            200..=219 => None,
            _ => {
                let rank = self.below(5);
                let dims: Vec<_> = (0..rank).map(|_| self.number()).collect();
                let stride = (0..rank).map(|_| self.number()).collect();
                let size = dims.iter().try_fold(1usize, |size, &dim| size.checked_mul(dim.max(1)));
                // What overflows is refused by the decoder, and candle cannot even hold it.
                size.map(|_| Layout::new(dims.into(), stride, self.number()))
            }
        }
    }

    /// Changes some of the bytes, their number included.
    pub fn damage(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..self.byte() % 4 {
            let place = self.below(bytes.len());
            match self.byte() {
                0..=63 => bytes.truncate(place),
                64..=95 => bytes.insert(place, self.byte()),
                96..=127 => bytes.extend(std::iter::repeat_n(self.byte(), place)),
                _ => {
                    let new = self.byte();
                    bytes.iter_mut().skip(place).take(1).for_each(|byte| *byte = new);
                }
            }
        }
    }
}
