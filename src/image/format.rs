//! The kinds of files that pictures go to and come from, told by name or by first bytes, and the
//! encoders of those that the `png` crate does not write. Separate because a kind is chosen from
//! a name long before there are pixels.

use std::io;
use std::path::Path;

use image::codecs::jpeg::JpegEncoder;
use image::codecs::webp::WebPEncoder;
use image::{ExtendedColorType, ImageEncoder};

use super::container::with_exif;
use super::read::MAX_SIDE;
use super::{ImageSize, Parameters, Picture, exif};
use crate::error::{Error, Result};

/// Quality of JPEG files, 1 to 100, without thinning out colours: what photographers keep.
pub const JPEG_QUALITY: u8 = 95;

/// A kind of file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileFormat {
    /// Every pixel as it is.
    Png,
    /// With the loss of [`JPEG_QUALITY`].
    Jpeg,
    /// Written without loss.
    WebP,
}

impl FileFormat {
    /// How names end, for messages.
    pub const SUFFIXES: &str = ".png, .jpg, .jpeg or .webp";

    /// The kind that a file's name says.
    pub fn of_name(path: &Path) -> Option<Self> {
        let suffix = path.extension()?.to_str()?.to_ascii_lowercase();
        match suffix.as_str() {
            "png" => Some(FileFormat::Png),
            "jpg" | "jpeg" => Some(FileFormat::Jpeg),
            "webp" => Some(FileFormat::WebP),
            _ => None,
        }
    }

    /// The kind that a file's first bytes say.
    ///
    /// # Errors
    /// If it is none of them.
    pub fn of_bytes(file: &[u8]) -> Result<Self> {
        match file {
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Ok(FileFormat::Png),
            [0xff, 0xd8, 0xff, ..] => Ok(FileFormat::Jpeg),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => {
                Ok(FileFormat::WebP)
            }
            _ => Err(Error::other("it is no PNG, JPEG or WebP")),
        }
    }

    /// Longest side, in pixels: what it holds, or what is read back.
    pub fn longest_side(self) -> usize {
        match self {
            FileFormat::Png => MAX_SIDE,
            FileFormat::Jpeg => 65_535,
            FileFormat::WebP => 16_384,
        }
    }

    /// As people write it.
    pub fn name(self) -> &'static str {
        match self {
            FileFormat::Png => "PNG",
            FileFormat::Jpeg => "JPEG",
            FileFormat::WebP => "WebP",
        }
    }
}

impl Picture {
    /// The picture as a file that says how it was made: see [`to_png`](Self::to_png). JPEG and
    /// WebP say it in an EXIF block: `UserComment` has the parameters, where AUTOMATIC1111's web UI
    /// writes them, and `MakerNote` the record.
    ///
    /// # Errors
    /// If a side does not fit the format.
    pub fn to_file(
        &self,
        format: FileFormat,
        parameters: &Parameters,
        record: &str,
    ) -> Result<Vec<u8>> {
        let exif = || exif::block(&parameters.to_string().replace('\0', "\u{fffd}"), record);
        match format {
            FileFormat::Png => self.to_png(parameters, record),
            FileFormat::Jpeg => Ok(with_exif(self.to_jpeg()?, &exif())),
            FileFormat::WebP => self.to_webp(Some(exif())),
        }
    }

    /// The picture as a file without a word about how it was made.
    ///
    /// # Errors
    /// If a side does not fit the format.
    pub fn to_plain_file(&self, format: FileFormat) -> Result<Vec<u8>> {
        match format {
            FileFormat::Png => self.to_plain_png(),
            FileFormat::Jpeg => self.to_jpeg(),
            FileFormat::WebP => self.to_webp(None),
        }
    }

    /// What is left of the picture in a file of this kind.
    ///
    /// # Errors
    /// If a side does not fit the format.
    pub fn as_kept_by(self, format: FileFormat) -> Result<Self> {
        match format {
            FileFormat::Png | FileFormat::WebP => Ok(self),
            FileFormat::Jpeg => Self::from_file(&self.to_jpeg()?),
        }
    }

    fn to_jpeg(&self) -> Result<Vec<u8>> {
        // Of a few KiB for each thousand pixels.
        let mut file = Vec::new();
        let [width, height] = sides(self.size(), FileFormat::Jpeg)?;
        JpegEncoder::new_with_quality(io::Cursor::new(&mut file), JPEG_QUALITY)
            .encode(self.rgb(), width, height, ExtendedColorType::Rgb8)
            .map_err(|error| Error::other(format!("JPEG: {error}")))?;
        Ok(file)
    }

    fn to_webp(&self, exif: Option<Vec<u8>>) -> Result<Vec<u8>> {
        let mut file = Vec::new();
        let [width, height] = sides(self.size(), FileFormat::WebP)?;
        let mut encoder = WebPEncoder::new_lossless(&mut file);
        let failed = |error: &dyn std::fmt::Display| Error::other(format!("WebP: {error}"));
        if let Some(exif) = exif {
            encoder.set_exif_metadata(exif).map_err(|error| failed(&error))?;
        }
        encoder
            .encode(self.rgb(), width, height, ExtendedColorType::Rgb8)
            .map_err(|error| failed(&error))?;
        Ok(file)
    }
}

/// Width and height, where they are no longer than what the format holds.
fn sides(size: ImageSize, format: FileFormat) -> Result<[u32; 2]> {
    let longest = format.longest_side();
    let side = |side: usize| {
        u32::try_from(side).ok().filter(|_| side <= longest).ok_or_else(|| {
            let format = format.name();
            Error::other(format!("{size} fits no {format}, whose sides end at {longest} pixels"))
        })
    };
    Ok([side(size.width)?, side(size.height)?])
}
