//! A picture's file of anybody's: what it says of itself, and its pixels. Separate because these
//! files come from strangers: everything is capped before memory is taken for it.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::codecs::jpeg::JpegDecoder;
use image::codecs::webp::WebPDecoder;
use image::{ColorType, ImageDecoder, ImageError};

use super::container::Beside;
use super::exif::{Exif, orientation_of_xmp};
use super::turn::Orientation;
use super::{FileFormat, ImageSize, Picture, of_png};
use crate::error::{Error, Result};

/// Largest file that is read, in bytes: 4096×4096 pixels that do not compress, and more.
pub const MAX_PICTURE_BYTES: usize = 256 << 20;
/// Most pixels that are read: 8192×8192.
pub const MAX_PICTURE_PIXELS: usize = 1 << 26;
/// Largest side of a picture that is read.
pub(super) const MAX_SIDE: usize = 1 << 16;

/// What a file says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PictureTexts {
    /// The kind of file.
    pub format: FileFormat,
    /// Height and width in pixels, as the file has them.
    pub size: ImageSize,
    /// How they are to be turned.
    pub(super) orientation: Orientation,
    /// The record of JSON that tiny-sd writes.
    pub record: Option<String>,
    /// What AUTOMATIC1111's web UI, stable-diffusion.cpp and others write.
    pub parameters: Option<String>,
}

impl PictureTexts {
    /// Reads a file, also one whose pixels are cut off.
    ///
    /// # Errors
    /// If it is no picture that is read here, or more than what is read.
    pub fn read(file: &[u8]) -> Result<Self> {
        let format = FileFormat::of_bytes(file)?;
        let texts = match format {
            FileFormat::Png => of_png::texts(file)?,
            FileFormat::Jpeg => Self::beside(format, &Beside::in_jpeg(file)?),
            FileFormat::WebP => Self::beside(format, &Beside::in_webp(file)?),
        };
        let ImageSize { height, width } = texts.size;
        if height > MAX_SIDE || width > MAX_SIDE {
            let size = texts.size;
            return Err(Error::other(format!(
                "it has {size} pixels; sides up to {MAX_SIDE} are read"
            )));
        }
        Ok(texts)
    }

    fn beside(format: FileFormat, found: &Beside<'_>) -> Self {
        let Exif { orientation, user_comment, record } = Exif::read(&found.exif);
        let orientation = orientation.or_else(|| orientation_of_xmp(found.xmp));
        // stable-diffusion.cpp writes a comment.
        let comment = || {
            let text = std::str::from_utf8(found.comment).ok()?.trim_end_matches('\0');
            (!text.is_empty()).then(|| text.to_owned())
        };
        let parameters = user_comment.or_else(comment);
        let orientation = Orientation::new(orientation);
        Self { format, size: found.size, orientation, record, parameters }
    }

    /// Height and width in pixels, as the picture is looked at.
    pub fn upright_size(&self) -> ImageSize {
        self.orientation.size(self.size)
    }
}

/// Pixels as a file has them.
pub(super) struct Pixels {
    pub picture: Picture,
    /// Whether any can be seen through.
    pub is_opaque: bool,
}

impl Picture {
    /// The pixels of a file, upright and as RGB: diffusers' `load_image`. What can be seen through
    /// loses that, as in Pillow; of 16 bits the upper eight count.
    ///
    /// # Errors
    /// If it is no whole PNG, JPEG or WebP, or has more pixels than are read.
    pub fn from_file(file: &[u8]) -> Result<Self> {
        let texts = PictureTexts::read(file)?;
        let pixels = decode(&texts, file)?;
        Ok(texts.orientation.turn(pixels.picture))
    }

    /// The pixels of a file that is nothing but opaque pixels.
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file), or if it can be seen through.
    pub fn from_opaque_file(file: &[u8]) -> Result<Self> {
        let texts = PictureTexts::read(file)?;
        let pixels = decode(&texts, file)?;
        match pixels.is_opaque {
            true => Ok(texts.orientation.turn(pixels.picture)),
            false => Err(Error::other("it has transparent pixels")),
        }
    }
}

fn decode(texts: &PictureTexts, file: &[u8]) -> Result<Pixels> {
    let ImageSize { height, width } = texts.size;
    if height.checked_mul(width).is_none_or(|pixels| pixels > MAX_PICTURE_PIXELS) {
        let size = texts.size;
        return Err(Error::other(format!(
            "it has {size} pixels; up to {MAX_PICTURE_PIXELS} (8192x8192) are read"
        )));
    }
    let broken = |text: String| {
        let (text, name) = (text.replace(char::is_control, " "), texts.format.name());
        Error::other(format!("the {name} cannot be read: {text}"))
    };
    let decoded = |result: std::result::Result<Pixels, ImageError>| {
        result.map_err(|error| broken(error.to_string()))
    };
    // A decoder that panics has met a file that it cannot read.
    let pixels = catch_unwind(AssertUnwindSafe(|| match texts.format {
        FileFormat::Png => of_png::pixels(file),
        FileFormat::Jpeg => decoded(JpegDecoder::new(Cursor::new(file)).and_then(with_image)),
        FileFormat::WebP => decoded(WebPDecoder::new(Cursor::new(file)).and_then(with_image)),
    }));
    let pixels = pixels.unwrap_or_else(|_| Err(broken("it is damaged".into())))?;
    match pixels.picture.size() == texts.size {
        true => Ok(pixels),
        false => Err(broken("it says two sizes".into())),
    }
}

/// Of what has been looked at: no decoder takes memory for more pixels than its file says, and it
/// is checked that both have read the same.
fn with_image(decoder: impl ImageDecoder) -> std::result::Result<Pixels, ImageError> {
    let (width, height) = decoder.dimensions();
    let color = decoder.color_type();
    let size = ImageSize { height: height as usize, width: width as usize };
    let is_too_large =
        size.height.checked_mul(size.width).is_none_or(|all| all > MAX_PICTURE_PIXELS);
    if is_too_large {
        let kind = image::error::LimitErrorKind::DimensionError;
        return Err(ImageError::Limits(image::error::LimitError::from_kind(kind)));
    }
    let mut samples = vec![0; usize::try_from(decoder.total_bytes()).unwrap_or_default()];
    decoder.read_image(&mut samples)?;
    let (rgb, is_opaque) = match color {
        ColorType::Rgb8 => (samples, true),
        ColorType::L8 => (samples.iter().flat_map(|&grey| [grey; 3]).collect(), true),
        ColorType::Rgba8 => {
            let (pixels, _) = samples.as_chunks::<4>();
            let is_opaque = pixels.iter().all(|[.., alpha]| *alpha == u8::MAX);
            (
                pixels.iter().flat_map(|&[red, green, blue, _]| [red, green, blue]).collect(),
                is_opaque,
            )
        }
        _ => {
            let color = image::ExtendedColorType::from(color);
            let kind = image::error::UnsupportedErrorKind::Color(color);
            let hint = image::error::ImageFormatHint::Unknown;
            return Err(ImageError::Unsupported(
                image::error::UnsupportedError::from_format_and_kind(hint, kind),
            ));
        }
    };
    let picture = Picture::new(size, rgb).map_err(|error| {
        let hint = image::error::ImageFormatHint::Unknown;
        ImageError::Decoding(image::error::DecodingError::new(hint, error.to_string()))
    })?;
    Ok(Pixels { picture, is_opaque })
}
