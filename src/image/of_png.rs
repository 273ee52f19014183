//! A PNG file of anybody's: its texts, in three kinds of chunks, and its pixels, in fifteen forms.
//! Separate because a PNG says in its own ways what JPEG and WebP say in EXIF.

use std::io::Cursor;

use png::{BitDepth, ColorType, Decoder, Limits, Transformations};

use super::exif::{Exif, orientation_of_xmp};
use super::read::{MAX_SIDE, Pixels};
use super::turn::Orientation;
use super::{FileFormat, ImageSize, PARAMETERS_KEYWORD, Picture, PictureTexts, RECORD_KEYWORD};
use crate::error::{Error, Result};

/// Keyword of the text with XMP.
const XMP_KEYWORD: &str = "XML:com.adobe.xmp";
/// Longest text, unpacked, in bytes. Workflows of other programs have some hundred thousand.
const MAX_TEXT_BYTES: usize = 4 << 20;
/// Memory that the decoder may take for all chunks together, in bytes.
const MAX_CHUNKS_BYTES: usize = 32 << 20;

/// What a file says of itself, also one whose pixels are cut off.
///
/// # Errors
/// If it is no PNG, or more than what is read.
pub(super) fn texts(file: &[u8]) -> Result<PictureTexts> {
    let mut reader = decoder(file)?.read_info().map_err(|error| failed(&error))?;
    let info = reader.info();
    let size = ImageSize { height: info.height as usize, width: info.width as usize };
    let exif = info.exif_metadata.as_deref().and_then(|block| Exif::read(block).orientation);
    let xmp = || orientation_of_xmp(find(info, XMP_KEYWORD)?.ok()?.as_bytes());
    let orientation = Orientation::new(exif.or_else(xmp));
    let format = FileFormat::Png;
    let mut found = PictureTexts { format, size, orientation, record: None, parameters: None };
    take(&mut found, info)?;
    if found.record.is_none() && found.parameters.is_none() {
        // Some programs write behind the pixels; what is damaged there has no texts.
        if reader.finish().is_ok() {
            take(&mut found, reader.info())?;
        }
    }
    Ok(found)
}

fn take(found: &mut PictureTexts, info: &png::Info<'_>) -> Result<()> {
    for (keyword, text) in
        [(RECORD_KEYWORD, &mut found.record), (PARAMETERS_KEYWORD, &mut found.parameters)]
    {
        *text = find(info, keyword)
            .transpose()
            .map_err(|error| error.context(format!("its text {keyword:?}")))?;
    }
    Ok(())
}

/// The first text of this keyword, in whichever of the three kinds of chunks.
fn find(info: &png::Info<'_>, keyword: &str) -> Option<Result<String>> {
    let unpacked = |result: std::result::Result<(), png::DecodingError>| {
        result.map_err(|_| {
            Error::other(format!("cannot be unpacked to at most {MAX_TEXT_BYTES} bytes"))
        })
    };
    let text = |text: std::result::Result<String, png::DecodingError>| {
        text.map_err(|error| failed(&error))
    };
    if let Some(chunk) = info.utf8_text.iter().find(|chunk| chunk.keyword == keyword) {
        let mut chunk = chunk.clone();
        let result = unpacked(chunk.decompress_text_with_limit(MAX_TEXT_BYTES));
        return Some(result.and_then(|()| text(chunk.get_text())));
    }
    if let Some(chunk) = info.uncompressed_latin1_text.iter().find(|c| c.keyword == keyword) {
        return Some(Ok(perhaps_utf8(chunk.text.clone())));
    }
    let chunk = info.compressed_latin1_text.iter().find(|chunk| chunk.keyword == keyword)?;
    let mut chunk = chunk.clone();
    let result = unpacked(chunk.decompress_text_with_limit(MAX_TEXT_BYTES));
    Some(result.and_then(|()| text(chunk.get_text())).map(perhaps_utf8))
}

/// stable-diffusion.cpp writes UTF-8 where the format says Latin-1.
fn perhaps_utf8(text: String) -> String {
    if !text.contains("Version: stable-diffusion.cpp") {
        return text;
    }
    let bytes: std::result::Result<Vec<u8>, _> = text.chars().map(u8::try_from).collect();
    bytes.ok().and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or(text)
}

/// The pixels, whatever form they have in the file.
///
/// # Errors
/// If it is no whole PNG.
pub(super) fn pixels(file: &[u8]) -> Result<Pixels> {
    let mut decoder = decoder(file)?;
    decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
    let mut reader = decoder.read_info().map_err(|error| failed(&error))?;
    let len = reader.output_buffer_size().unwrap_or_default();
    let mut samples = vec![0; len];
    let frame = reader.next_frame(&mut samples).map_err(|error| failed(&error))?;
    samples.truncate(frame.buffer_size());
    let size = ImageSize { height: frame.height as usize, width: frame.width as usize };
    let mut is_opaque = true;
    let rgb = match (frame.color_type, frame.bit_depth) {
        (ColorType::Rgb, BitDepth::Eight) => samples,
        (ColorType::Grayscale, BitDepth::Eight) => {
            samples.iter().flat_map(|&gray| [gray; 3]).collect()
        }
        (ColorType::GrayscaleAlpha, BitDepth::Eight) => {
            let (pixels, _) = samples.as_chunks::<2>();
            is_opaque = pixels.iter().all(|[_, alpha]| *alpha == u8::MAX);
            pixels.iter().flat_map(|&[gray, _]| [gray; 3]).collect()
        }
        (ColorType::Rgba, BitDepth::Eight) => {
            let (pixels, _) = samples.as_chunks::<4>();
            is_opaque = pixels.iter().all(|[.., alpha]| *alpha == u8::MAX);
            pixels.iter().flat_map(|&[red, green, blue, _]| [red, green, blue]).collect()
        }
        (color, depth) => {
            return Err(Error::other(format!("pixels of {color:?}, {depth:?} are not read")));
        }
    };
    Ok(Pixels { picture: Picture::new(size, rgb)?, is_opaque })
}

/// A decoder for a picture whose sides are not too large.
fn decoder(file: &[u8]) -> Result<Decoder<Cursor<&[u8]>>> {
    let limits = Limits { bytes: MAX_CHUNKS_BYTES };
    let mut decoder = Decoder::new_with_limits(Cursor::new(file), limits);
    decoder.set_ignore_iccp_chunk(true);
    let info = decoder.read_header_info().map_err(|error| failed(&error))?;
    let (width, height) = (info.width as usize, info.height as usize);
    if width > MAX_SIDE || height > MAX_SIDE {
        let size = ImageSize { height, width };
        return Err(Error::other(format!("it has {size} pixels; sides up to {MAX_SIDE} are read")));
    }
    Ok(decoder)
}

fn failed(error: &png::DecodingError) -> Error {
    let text = error.to_string().replace(char::is_control, " ");
    Error::other(format!("the PNG cannot be read: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYWORD: &str = "parameters";

    /// A PNG of 3×2 pixels whose encoder `prepare` has been at.
    fn png(prepare: impl FnOnce(&mut png::Encoder<'_, &mut Vec<u8>>)) -> Vec<u8> {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, 3, 2);
        encoder.set_color(ColorType::Rgb);
        prepare(&mut encoder);
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(&(0..18).collect::<Vec<u8>>()).unwrap();
        drop(writer);
        file
    }

    fn parameters(file: &[u8]) -> std::result::Result<Option<String>, String> {
        PictureTexts::read(file).map(|found| found.parameters).map_err(|error| error.to_string())
    }

    /// A chunk with its checksum.
    fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
        let body = [&kind[..], data].concat();
        let mut crc = !0u32;
        for byte in &body {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
            }
        }
        [&(data.len() as u32).to_be_bytes(), &*body, &(!crc).to_be_bytes()].concat()
    }

    /// The file with a chunk behind its header, or before its end.
    fn with_chunk(file: &[u8], chunk: &[u8], is_last: bool) -> Vec<u8> {
        let place = if is_last { file.len() - 12 } else { 8 + 25 };
        [&file[..place], chunk, &file[place..]].concat()
    }

    #[test]
    fn a_text_is_found_in_every_kind_of_chunk_and_behind_the_pixels() {
        let text = || "a café\nSteps: 1".to_owned();
        let plain = png(|_| ());
        assert_eq!(parameters(&plain), Ok(None));
        let latin: Vec<u8> = text().chars().map(|c| u8::try_from(c).unwrap()).collect();
        let text_chunk = chunk(b"tEXt", &[KEYWORD.as_bytes(), &[0], &latin].concat());
        for file in [
            png(|e| e.add_text_chunk(KEYWORD.into(), text()).unwrap()),
            png(|e| e.add_itxt_chunk(KEYWORD.into(), text()).unwrap()),
            png(|e| e.add_ztxt_chunk(KEYWORD.into(), text()).unwrap()),
            with_chunk(&plain, &text_chunk, false),
            with_chunk(&plain, &text_chunk, true),
        ] {
            assert_eq!(parameters(&file), Ok(Some(text())));
        }
        // A picture whose end is lost still says how it was made.
        let file = png(|e| e.add_text_chunk(KEYWORD.into(), text()).unwrap());
        assert_eq!(parameters(&file[..file.len() - 20]), Ok(Some(text())));
    }

    #[test]
    fn utf8_in_the_place_of_latin1_is_read_where_it_is_known_to_be() {
        let check = |text: &str, expected: &str| {
            let data = [KEYWORD.as_bytes(), &[0], text.as_bytes()].concat();
            let file = with_chunk(&png(|_| ()), &chunk(b"tEXt", &data), false);
            assert_eq!(parameters(&file), Ok(Some(expected.into())));
        };
        check("東\nVersion: stable-diffusion.cpp", "東\nVersion: stable-diffusion.cpp");
        check("é", "Ã©");
    }

    #[test]
    fn pixels_come_back_from_every_form_and_transparent_ones_are_refused() {
        let check = |color, depth, samples: &[u8], expected: std::result::Result<&[u8], &str>| {
            let mut file = Vec::new();
            let mut encoder = png::Encoder::new(&mut file, 2, 1);
            encoder.set_color(color);
            encoder.set_depth(depth);
            encoder.set_palette(vec![1, 2, 3, 4, 5, 6]);
            let mut writer = encoder.write_header().unwrap();
            writer.write_image_data(samples).unwrap();
            drop(writer);
            let found = Picture::from_opaque_file(&file);
            let found = found.as_ref().map(Picture::rgb).map_err(ToString::to_string);
            assert_eq!(found, expected.map_err(str::to_owned));
        };
        let eight = BitDepth::Eight;
        check(ColorType::Rgb, eight, &[1, 2, 3, 4, 5, 6], Ok(&[1, 2, 3, 4, 5, 6]));
        let deep = [1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0];
        check(ColorType::Rgb, BitDepth::Sixteen, &deep, Ok(&[1, 2, 3, 4, 5, 6]));
        check(ColorType::Indexed, BitDepth::One, &[0b0100_0000], Ok(&[1, 2, 3, 4, 5, 6]));
        check(ColorType::Grayscale, eight, &[7, 8], Ok(&[7, 7, 7, 8, 8, 8]));
        let transparent = Err("it has transparent pixels");
        check(ColorType::GrayscaleAlpha, eight, &[7, 255, 8, 255], Ok(&[7, 7, 7, 8, 8, 8]));
        check(ColorType::GrayscaleAlpha, eight, &[7, 255, 8, 254], transparent);
        check(ColorType::Rgba, eight, &[1, 2, 3, 255, 4, 5, 6, 255], Ok(&[1, 2, 3, 4, 5, 6]));
        check(ColorType::Rgba, eight, &[1, 2, 3, 255, 4, 5, 6, 0], transparent);
    }

    #[test]
    fn what_strangers_send_is_capped_and_ends_in_one_line() {
        let huge = |side: u32| {
            let header = [&side.to_be_bytes()[..], &side.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
            let parts = [chunk(b"IHDR", &header), chunk(b"IDAT", &[]), chunk(b"IEND", &[])];
            [&b"\x89PNG\r\n\x1a\n"[..], &parts.concat()].concat()
        };
        // 8 MiB of zeros take a few thousand bytes.
        let bomb = "\0".repeat(8 << 20).replace('\0', "a");
        let plain = png(|_| ());
        let zeros = |len| chunk(b"tEXt", &[&b"x\0"[..], &vec![b'a'; len]].concat());
        for (what, file, expected) in [
            (
                "a bomb",
                png(|e| e.add_ztxt_chunk(KEYWORD.into(), bomb.clone()).unwrap()),
                "unpacked",
            ),
            ("no PNG", b"GIF89a".to_vec(), "it is no PNG, JPEG or WebP"),
            ("nothing", vec![], "it is no PNG, JPEG or WebP"),
            ("cut off", plain[..20].to_vec(), "cannot be read"),
            ("huge", huge(u32::MAX >> 1), "sides up to 65536 are read"),
            ("large texts", with_chunk(&plain, &zeros(MAX_CHUNKS_BYTES), false), "limits"),
        ] {
            let error = parameters(&file).unwrap_err();
            assert!(error.contains(expected) && !error.contains('\n'), "{what}: {error}");
        }
        for (file, expected) in [
            (huge(8200), "up to 67108864 (8192x8192) are read"),
            (huge(8192), "cannot be read"),
            (plain[..plain.len() - 30].to_vec(), "cannot be read"),
        ] {
            let error = Picture::from_file(&file).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
