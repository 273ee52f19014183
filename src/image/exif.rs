//! EXIF: the block of tags in JPEG and WebP, and sometimes PNG. Separate because it is a format
//! of its own (TIFF's), and because strangers write it: what does not fit in the block is not
//! there.

/// How the record begins in `MakerNote`, which is every maker's own.
const MAKER: &[u8] = b"tiny-sd\0";
/// How `UserComment` begins where UTF-16 follows.
const UNICODE: &[u8] = b"UNICODE\0";
/// How a block begins where it is not known to be one.
const HEADER: &[u8] = b"Exif\0\0";

const ORIENTATION: u16 = 0x0112;
const EXIF_IFD: u16 = 0x8769;
const MAKER_NOTE: u16 = 0x927c;
const USER_COMMENT: u16 = 0x9286;
/// Types of values: 16 bits, 32 bits, bytes.
const SHORT: u16 = 3;
const LONG: u16 = 4;
const UNDEFINED: u16 = 7;

/// Longest text that is read, in bytes.
const MAX_TEXT_BYTES: usize = 4 << 20;

/// A block with AUTOMATIC1111's parameters where it writes them itself, and the record.
pub(super) fn block(parameters: &str, record: &str) -> Vec<u8> {
    let note = [MAKER, record.as_bytes()].concat();
    let units = parameters.encode_utf16().flat_map(u16::to_be_bytes);
    let comment: Vec<u8> = UNICODE.iter().copied().chain(units).collect();
    // One directory with nothing but the place of the other one, which has two entries.
    let (first, second): (u32, u32) = (8, 26);
    let data = second + 2 + 2 * 12 + 4;
    let mut block = b"MM\0\x2a".to_vec();
    block.extend(first.to_be_bytes());
    let directory = |block: &mut Vec<u8>, entries: &[(u16, u16, u32, u32)]| {
        block.extend((entries.len() as u16).to_be_bytes());
        for (tag, kind, count, value) in entries {
            block.extend([tag.to_be_bytes(), kind.to_be_bytes()].concat());
            block.extend([count.to_be_bytes(), value.to_be_bytes()].concat());
        }
        block.extend(0_u32.to_be_bytes());
    };
    // Both come from texts that are capped at some hundred KiB.
    let (note_len, comment_len) = (note.len() as u32, comment.len() as u32);
    directory(&mut block, &[(EXIF_IFD, LONG, 1, second)]);
    let entries = [
        (MAKER_NOTE, UNDEFINED, note_len, data),
        (USER_COMMENT, UNDEFINED, comment_len, data + note_len),
    ];
    directory(&mut block, &entries);
    block.extend(note);
    block.extend(comment);
    block
}

/// What a block says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Exif {
    /// How the pixels are to be turned, 1 to 8.
    pub orientation: Option<u8>,
    /// A text about the picture.
    pub user_comment: Option<String>,
    /// tiny-sd's record.
    pub record: Option<String>,
}

impl Exif {
    /// Reads a block of anybody's.
    pub fn read(block: &[u8]) -> Self {
        let tiff = block.strip_prefix(HEADER).unwrap_or(block);
        let is_big_endian = match tiff {
            [b'M', b'M', ..] => true,
            [b'I', b'I', ..] => false,
            _ => return Self::default(),
        };
        let block = Block { tiff, is_big_endian };
        let mut found = Self::default();
        let Some(first) = block.u32_at(4) else { return found };
        let mut second = None;
        for entry in block.entries(first) {
            match (entry.tag, entry.kind, entry.value) {
                (ORIENTATION, SHORT, value) => {
                    let value = block.u16_of(value).and_then(|value| u8::try_from(value).ok());
                    found.orientation = value.filter(|value| (1..=8).contains(value));
                }
                (EXIF_IFD, LONG, value) => second = block.u32_of(value),
                _ => {}
            }
        }
        for entry in second.into_iter().flat_map(|second| block.entries(second)) {
            let value = entry.value.get(..MAX_TEXT_BYTES).unwrap_or(entry.value);
            match entry.tag {
                USER_COMMENT => found.user_comment = comment(value, is_big_endian),
                MAKER_NOTE => found.record = record(value),
                _ => {}
            }
        }
        found
    }
}

/// The orientation that an XMP packet says, as Pillow looks for it.
pub(super) fn orientation_of_xmp(packet: &[u8]) -> Option<u8> {
    const NAME: &[u8] = b"tiff:Orientation";
    let at = packet.windows(NAME.len()).position(|window| window == NAME)?;
    match packet.get(at + NAME.len()..)? {
        [b'=', b'"', digit @ b'1'..=b'8', ..] | [b'>', digit @ b'1'..=b'8', ..] => {
            Some(digit - b'0')
        }
        _ => None,
    }
}

fn record(note: &[u8]) -> Option<String> {
    String::from_utf8(note.strip_prefix(MAKER)?.to_vec()).ok()
}

/// `UserComment`: eight bytes say how the rest is to be read.
fn comment(value: &[u8], is_big_endian: bool) -> Option<String> {
    let (code, text) = value.split_at_checked(8)?;
    let text = match code {
        UNICODE => utf16(text, is_big_endian),
        b"ASCII\0\0\0" | [0, 0, 0, 0, 0, 0, 0, 0] => bytes(text),
        _ => bytes(value),
    };
    let text = text.trim_end_matches('\0');
    (!text.is_empty()).then(|| text.to_owned())
}

/// AUTOMATIC1111 writes the high byte first in every block, others in the block's order: the half
/// of the bytes that has more zeros has the high ones.
fn utf16(text: &[u8], is_big_endian: bool) -> String {
    let (pairs, _) = text.as_chunks::<2>();
    let zeros = |half: usize| pairs.iter().filter(|pair| pair[half] == 0).count();
    let is_high_first = match zeros(0).cmp(&zeros(1)) {
        std::cmp::Ordering::Greater => true,
        std::cmp::Ordering::Less => false,
        std::cmp::Ordering::Equal => is_big_endian,
    };
    let unit = if is_high_first { u16::from_be_bytes } else { u16::from_le_bytes };
    String::from_utf16_lossy(&pairs.iter().copied().map(unit).collect::<Vec<_>>())
}

fn bytes(text: &[u8]) -> String {
    match std::str::from_utf8(text) {
        Ok(text) => text.to_owned(),
        Err(_) => text.iter().copied().map(char::from).collect(),
    }
}

struct Block<'a> {
    tiff: &'a [u8],
    is_big_endian: bool,
}

struct Entry<'a> {
    tag: u16,
    kind: u16,
    value: &'a [u8],
}

impl<'a> Block<'a> {
    fn bytes_at(&self, at: usize, len: usize) -> Option<&'a [u8]> {
        self.tiff.get(at..at.checked_add(len)?)
    }

    fn u16_of(&self, value: &[u8]) -> Option<u16> {
        let bytes = value.first_chunk()?;
        Some(match self.is_big_endian {
            true => u16::from_be_bytes(*bytes),
            false => u16::from_le_bytes(*bytes),
        })
    }

    fn u32_of(&self, value: &[u8]) -> Option<u32> {
        let bytes = value.first_chunk()?;
        Some(match self.is_big_endian {
            true => u32::from_be_bytes(*bytes),
            false => u32::from_le_bytes(*bytes),
        })
    }

    fn u32_at(&self, at: usize) -> Option<u32> {
        self.u32_of(self.bytes_at(at, 4)?)
    }

    /// The entries of a directory whose values are in the block, 65535 at most.
    fn entries(&self, directory: u32) -> impl Iterator<Item = Entry<'a>> {
        let at = directory as usize;
        let count = self.bytes_at(at, 2).and_then(|bytes| self.u16_of(bytes)).unwrap_or(0);
        (0..usize::from(count))
            .map_while(move |index| {
                let at = at.checked_add(2 + index * 12)?;
                Some(self.bytes_at(at, 12).map(|entry| self.entry(entry)))
            })
            .map_while(|entry| entry)
            .flatten()
    }

    fn entry(&self, entry: &'a [u8]) -> Option<Entry<'a>> {
        let (tag, kind) = (self.u16_of(entry)?, self.u16_of(entry.get(2..)?)?);
        let (count, value) = (self.u32_of(entry.get(4..)?)?, entry.get(8..)?);
        let size = match kind {
            1 | 2 | 6 | 7 => 1,
            3 | 8 => 2,
            4 | 9 | 11 => 4,
            5 | 10 | 12 => 8,
            _ => return None,
        };
        let len = (count as usize).checked_mul(size)?;
        let value = match len <= value.len() {
            true => value,
            false => self.bytes_at(self.u32_of(value)? as usize, len)?,
        };
        Some(Entry { tag, kind, value })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_whatever_the_letters() {
        for text in ["Steps: 1", "", "東京の少女 👩‍🎨\nSteps: 1, Seed: 2", "é\u{fffd}"]
        {
            let record = format!("{{\"prompt\":{text:?}}}");
            let found = Exif::read(&block(text, &record));
            assert_eq!(found.user_comment.unwrap_or_default(), text);
            assert_eq!(found.record, Some(record));
        }
    }

    #[test]
    fn other_writers_orders_and_codes_are_read() {
        let little = |tag: u16, kind: u16, value: &[u8]| {
            let mut block = b"II\x2a\0\x08\0\0\0\x01\0".to_vec();
            block.extend([tag.to_le_bytes(), kind.to_le_bytes()].concat());
            block.extend([1, 0, 0, 0]);
            block.extend(value);
            block
        };
        assert_eq!(Exif::read(&little(ORIENTATION, SHORT, &[6, 0, 0, 0])).orientation, Some(6));
        assert_eq!(Exif::read(&little(ORIENTATION, SHORT, &[9, 0, 0, 0])).orientation, None);
        let with_header = [HEADER, &little(ORIENTATION, SHORT, &[8, 0, 0, 0])].concat();
        assert_eq!(Exif::read(&with_header).orientation, Some(8));
        let comments: [(&[u8], bool, Option<&str>); 6] = [
            (b"UNICODE\0a\0 \0f\0", true, Some("a f")),
            (b"UNICODE\0\0a\0 \0f", false, Some("a f")),
            (b"UNICODE\0\x67\x71", true, Some("東")),
            (b"UNICODE\0\x71\x67", false, Some("東")),
            (b"ASCII\0\0\0caf\xc3\xa9\0\0", true, Some("café")),
            (b"\0\0\0\0\0\0\0\0\0", true, None),
        ];
        for (value, is_big_endian, expected) in comments {
            assert_eq!(comment(value, is_big_endian).as_deref(), expected, "{value:?}");
        }
    }

    #[test]
    fn a_block_that_is_cut_or_lies_is_read_as_far_as_it_is_there() {
        let whole = block("a", "{}");
        for len in 0..whole.len() {
            let found = Exif::read(&whole[..len]);
            assert!(found.user_comment.is_none(), "{len}");
        }
        for at in 0..whole.len() {
            for byte in [0, 1, 0x7f, 0xff] {
                let mut damaged = whole.clone();
                damaged[at] = byte;
                // Whatever it says, it is not a panic.
                let _ = Exif::read(&damaged);
            }
        }
        assert_eq!(orientation_of_xmp(b"<x tiff:Orientation=\"3\"/>"), Some(3));
        assert_eq!(orientation_of_xmp(b"<tiff:Orientation>8</tiff:Orientation>"), Some(8));
        assert_eq!(orientation_of_xmp(b"tiff:Orientation"), None);
    }
}
