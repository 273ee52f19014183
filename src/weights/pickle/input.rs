//! The bytes of a pickle, taken from front to back; none twice and none beyond the end. Separate
//! from the machine because only this touches bytes.

use crate::error::{Error, Result};

/// Longest line, such as the name of a global, in bytes.
const MAX_LINE_LEN: usize = 256;

/// The bytes of the pickle and how far they are read.
pub(super) struct Input<'p> {
    bytes: &'p [u8],
    at: usize,
}

impl<'p> Input<'p> {
    pub(super) fn new(bytes: &'p [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// How many bytes are read.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    fn take(&mut self, len: usize) -> Result<&'p [u8]> {
        let end = self.at.checked_add(len);
        let taken = end.and_then(|end| self.bytes.get(self.at..end)).ok_or_else(|| {
            Error::model(format!("data.pkl ends too early, after {} bytes", self.bytes.len()))
        })?;
        self.at += len;
        Ok(taken)
    }

    pub(super) fn byte(&mut self) -> Result<u8> {
        self.array().map(|[byte]| byte)
    }

    /// The next bytes, as many as the caller's type has.
    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    /// A whole number: one byte of length, little-endian, signed. None if it has more than 8 bytes,
    /// which nothing about a tensor has.
    pub(super) fn long(&mut self) -> Result<Option<i64>> {
        let len = usize::from(self.byte()?);
        let bytes = self.take(len)?;
        if len > 8 {
            return Ok(None);
        }
        let sign = bytes.last().is_some_and(|&last| last >= 0x80);
        let mut array = [if sign { 0xff } else { 0 }; 8];
        for (to, &from) in array.iter_mut().zip(bytes) {
            *to = from;
        }
        Ok(Some(i64::from_le_bytes(array)))
    }

    /// Text after four bytes that give its length.
    pub(super) fn text(&mut self) -> Result<&'p str> {
        let len = u32::from_le_bytes(self.array()?);
        let len = usize::try_from(len).map_err(|_| damaged("a text of this length"))?;
        std::str::from_utf8(self.take(len)?).map_err(|_| damaged("text in UTF-8"))
    }

    /// Text up to a newline, which is not part of it.
    pub(super) fn line(&mut self) -> Result<&'p str> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let len = rest.iter().take(MAX_LINE_LEN + 1).position(|&byte| byte == b'\n');
        let line = self.take(len.ok_or_else(|| damaged("a line"))?)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| damaged("a line in UTF-8"))
    }
}

/// The message for a pickle that does not go on as one that torch wrote would.
pub(super) fn damaged(expected: &str) -> Error {
    Error::model(format!("expected {expected}: the file is damaged, or holds more than tensors"))
}
