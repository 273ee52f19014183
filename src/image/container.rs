//! JPEG's segments and WebP's chunks, as far as they say something about the picture. Separate
//! because the decoders read pixels, and nothing of this needs any.

use std::borrow::Cow;

use super::ImageSize;
use crate::error::{Error, Result};

/// How a JPEG's segment of EXIF begins; a block that is too long for one goes on in the next.
const EXIF_SEGMENT: &[u8] = b"Exif\0\0";
const XMP_SEGMENT: &[u8] = b"http://ns.adobe.com/xap/1.0/\0";
/// Bytes of a segment's content at most; its length counts itself.
const MAX_SEGMENT_LEN: usize = 65_533;
/// Markers of segments.
const APP0: u8 = 0xe0;
const APP1: u8 = 0xe1;
const COMMENT: u8 = 0xfe;

/// What a file has beside its pixels.
pub(super) struct Beside<'a> {
    /// Height and width in pixels, before they are turned.
    pub size: ImageSize,
    /// The EXIF block.
    pub exif: Cow<'a, [u8]>,
    /// The XMP packet.
    pub xmp: &'a [u8],
    /// A comment of anybody's.
    pub comment: &'a [u8],
}

impl<'a> Beside<'a> {
    /// Of a JPEG, also one whose pixels are cut off.
    ///
    /// # Errors
    /// If no segment says its size.
    pub fn in_jpeg(file: &'a [u8]) -> Result<Self> {
        let (mut size, mut exif) = (None, Cow::Borrowed(&[][..]));
        let (mut xmp, mut comment) = (&[][..], &[][..]);
        for (marker, segment) in Segments(file.get(2..).unwrap_or_default()) {
            match marker {
                APP1 if segment.starts_with(EXIF_SEGMENT) => {
                    let part = segment.get(EXIF_SEGMENT.len()..).unwrap_or_default();
                    match exif.is_empty() {
                        true => exif = Cow::Borrowed(part),
                        false => exif.to_mut().extend(part),
                    }
                }
                APP1 => xmp = segment.strip_prefix(XMP_SEGMENT).unwrap_or(xmp),
                COMMENT => comment = segment,
                // The frames' headers, without tables that have the numbers between.
                0xc0..=0xcf if !matches!(marker, 0xc4 | 0xc8 | 0xcc) => {
                    if let [_, h0, h1, w0, w1, ..] = *segment {
                        let side = |bytes| usize::from(u16::from_be_bytes(bytes));
                        size = Some(ImageSize { height: side([h0, h1]), width: side([w0, w1]) });
                    }
                }
                _ => {}
            }
        }
        let size = size.ok_or_else(|| Error::other("the JPEG cannot be read: it has no frame"))?;
        Ok(Self { size, exif, xmp, comment })
    }

    /// Of a WebP.
    ///
    /// # Errors
    /// If its first chunk does not say its size, or it is animated.
    pub fn in_webp(file: &'a [u8]) -> Result<Self> {
        let (mut size, mut exif, mut xmp) = (None, &[][..], &[][..]);
        for (name, chunk) in Chunks(file.get(12..).unwrap_or_default()) {
            match name {
                b"VP8X" | b"VP8 " | b"VP8L" if size.is_none() => {
                    size = webp_size(name, chunk);
                }
                b"ANIM" | b"ANMF" => return Err(Error::other("it is an animation, no picture")),
                b"EXIF" => exif = chunk,
                b"XMP " => xmp = chunk,
                _ => {}
            }
        }
        let size = size.ok_or_else(|| Error::other("the WebP cannot be read: it has no frame"))?;
        Ok(Self { size, exif: Cow::Borrowed(exif), xmp, comment: &[] })
    }
}

fn webp_size(name: &[u8; 4], chunk: &[u8]) -> Option<ImageSize> {
    let number = |bytes: &[u8]| {
        bytes.iter().rev().fold(0_usize, |number, byte| number << 8 | usize::from(*byte))
    };
    Some(match name {
        b"VP8X" => {
            let [width, height] = [number(chunk.get(4..7)?), number(chunk.get(7..10)?)];
            ImageSize { height: height + 1, width: width + 1 }
        }
        b"VP8L" => {
            let bits = number(chunk.get(1..5)?);
            ImageSize { height: (bits >> 14 & 0x3fff) + 1, width: (bits & 0x3fff) + 1 }
        }
        _ => {
            let [width, height] = [number(chunk.get(6..8)?), number(chunk.get(8..10)?)];
            ImageSize { height: height & 0x3fff, width: width & 0x3fff }
        }
    })
}

/// A JPEG of our encoder's with an EXIF block, behind the segment that says that it is JFIF.
pub(super) fn with_exif(jpeg: Vec<u8>, exif: &[u8]) -> Vec<u8> {
    let first = jpeg.get(2..).unwrap_or_default();
    let at = match (first, Segments(first).next()) {
        ([0xff, APP0, ..], Some((APP0, segment))) => 2 + 4 + segment.len(),
        _ => 2,
    };
    let (before, behind) = jpeg.split_at(at.min(jpeg.len()));
    let mut file = before.to_vec();
    for part in exif.chunks(MAX_SEGMENT_LEN - EXIF_SEGMENT.len()) {
        // It fits: the chunks are no longer.
        let len = (2 + EXIF_SEGMENT.len() + part.len()) as u16;
        file.extend([0xff, APP1]);
        file.extend(len.to_be_bytes());
        file.extend(EXIF_SEGMENT);
        file.extend(part);
    }
    file.extend(behind);
    file
}

/// The segments before the pixels: marker and content.
struct Segments<'a>(&'a [u8]);

impl<'a> Iterator for Segments<'a> {
    type Item = (u8, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match *self.0 {
                // Bytes that fill, and markers without content.
                [0xff, 0xff, ..] => self.0 = self.0.get(1..)?,
                [0xff, 0x01 | 0xd0..=0xd7, ..] => self.0 = self.0.get(2..)?,
                // Pixels, or the end.
                [0xff, 0xda | 0xd9, ..] => return None,
                [0xff, marker, high, low, ..] => {
                    let len = usize::from(u16::from_be_bytes([high, low]));
                    let segment = self.0.get(4..2 + len)?;
                    self.0 = self.0.get(2 + len..)?;
                    return Some((marker, segment));
                }
                _ => return None,
            }
        }
    }
}

/// The chunks of a RIFF file: name and content.
struct Chunks<'a>(&'a [u8]);

impl<'a> Iterator for Chunks<'a> {
    type Item = (&'a [u8; 4], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (name, rest) = self.0.split_first_chunk::<4>()?;
        let (len, rest) = rest.split_first_chunk::<4>()?;
        let len = u32::from_le_bytes(*len) as usize;
        // What is cut off may be the pixels.
        let chunk = rest.get(..len).unwrap_or(rest);
        self.0 = rest.get(len.checked_next_multiple_of(2)?..).unwrap_or_default();
        Some((name, chunk))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FileFormat, Picture, PictureTexts};
    use super::*;

    const SIZE: ImageSize = ImageSize { height: 8, width: 24 };

    fn file(format: FileFormat) -> Vec<u8> {
        let rgb = (0..SIZE.height * SIZE.width * 3).map(|at| at as u8).collect();
        Picture::new(SIZE, rgb).unwrap().to_plain_file(format).unwrap()
    }

    #[test]
    fn an_exif_block_of_any_length_comes_back_from_as_many_segments_as_it_needs() {
        let jpeg = file(FileFormat::Jpeg);
        for len in [0, 1, 65_527, 65_528, 200_000] {
            let exif: Vec<u8> = (0..len).map(|at| (at * 31 % 251) as u8).collect();
            let with = with_exif(jpeg.clone(), &exif);
            let found = Beside::in_jpeg(&with).unwrap();
            assert!(found.exif == exif, "{len}");
            assert_eq!(found.size, SIZE);
            // Behind the segment that says JFIF, which old readers want first.
            assert_eq!(with[..20], jpeg[..20]);
            assert!(Picture::from_file(&with).unwrap() == Picture::from_file(&jpeg).unwrap());
        }
    }

    #[test]
    fn sizes_are_read_from_headers_and_comments_are_parameters_where_there_are_no_others() {
        let jpeg = file(FileFormat::Jpeg);
        let text = b"a fox\nSteps: 1, Sampler: Euler a, Seed: 5";
        let segment = [&[0xff, COMMENT, 0, text.len() as u8 + 2][..], text].concat();
        let with = [&jpeg[..2], &*segment, &jpeg[2..]].concat();
        let found = PictureTexts::read(&with).unwrap();
        assert_eq!(found.parameters.as_deref(), std::str::from_utf8(text).ok());
        assert_eq!(found.upright_size(), SIZE);
        let webp = file(FileFormat::WebP);
        assert_eq!(Beside::in_webp(&webp).unwrap().size, SIZE);
        for cut in 0..webp.len().min(30) {
            // Whatever is left of it, it is not a panic.
            let _ = Beside::in_webp(&webp[..cut]);
        }
        let lossy = b"RIFF\x16\0\0\0WEBPVP8 \x0a\0\0\0\0\0\0\x9d\x01\x2a\x18\x40\x08\x80";
        assert_eq!(Beside::in_webp(lossy).unwrap().size, SIZE);
        let animated = b"RIFF\x20\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0\x17\0\0\x07\0\0ANIM\0\0\0\0";
        let error = Beside::in_webp(animated).err().unwrap().to_string();
        assert!(error.contains("an animation"), "{error}");
    }
}
