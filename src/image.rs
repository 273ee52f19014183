//! A picture: its pixels, the file they become or come from, and the text that says how it was
//! made.
//! Separate because it is plain memory: no device, no tensor, no file.

mod container;
mod exif;
mod format;
mod infotext;
mod mask;
mod of_png;
mod read;
mod resize;
mod turn;

use std::fmt;

pub use format::{FileFormat, JPEG_QUALITY};
pub use infotext::Infotext;
pub use mask::Mask;
pub use read::{MAX_PICTURE_BYTES, MAX_PICTURE_PIXELS, PictureTexts};

use crate::error::{Error, Result};

/// Keyword of the text chunk with what AUTOMATIC1111's web UI and others read.
pub const PARAMETERS_KEYWORD: &str = "parameters";
/// Keyword of the iTXt chunk with the record of JSON.
pub const RECORD_KEYWORD: &str = "tiny-sd";

/// Height and width of a picture or a part of it, in pixels; never a bare pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageSize {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

/// `512x768`: width first, as everyone writes it.
impl fmt::Display for ImageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

/// 8-bit RGB pixels, row by row, three bytes each.
#[derive(Clone, PartialEq, Eq)]
pub struct Picture {
    size: ImageSize,
    rgb: Vec<u8>,
}

impl Picture {
    /// A picture of `height × width × 3` bytes.
    ///
    /// # Errors
    /// If `rgb` has another length, or the picture has no pixels.
    pub fn new(size: ImageSize, rgb: Vec<u8>) -> Result<Self> {
        let bytes = size.height.checked_mul(size.width).and_then(|pixels| pixels.checked_mul(3));
        if rgb.is_empty() || bytes != Some(rgb.len()) {
            return Err(Error::other(format!("{} bytes are no RGB picture of {size}", rgb.len())));
        }
        Ok(Self { size, rgb })
    }

    /// Height and width in pixels.
    pub fn size(&self) -> ImageSize {
        self.size
    }

    /// The pixels: rows from the top, R, G, B in 0–255.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// The picture as large as `size`, each pixel repeated.
    ///
    /// # Errors
    /// If `size` has no pixels.
    pub fn enlarged(&self, size: ImageSize) -> Result<Self> {
        let row = |y: usize| {
            let from = y * self.size.height / size.height * self.size.width;
            (0..size.width).map(move |x| 3 * (from + x * self.size.width / size.width))
        };
        let pixels = (0..size.height).flat_map(row);
        Self::new(
            size,
            pixels.flat_map(|at| [self.rgb[at], self.rgb[at + 1], self.rgb[at + 2]]).collect(),
        )
    }

    /// The picture as a PNG file without a word about how it was made.
    ///
    /// # Errors
    /// If a side does not fit a PNG's 32 bits.
    pub fn to_plain_png(&self) -> Result<Vec<u8>> {
        self.encode(None)
    }

    /// The picture as a PNG file, with the parameters in the text chunk `parameters` that
    /// AUTOMATIC1111's web UI writes and other tools read, tEXt if Latin-1 can say it, else iTXt;
    /// and with a `record` of JSON, which loses nothing, in the iTXt chunk [`RECORD_KEYWORD`].
    ///
    /// # Errors
    /// If a side does not fit a PNG's 32 bits.
    pub fn to_png(&self, parameters: &Parameters, record: &str) -> Result<Vec<u8>> {
        self.encode(Some((parameters, record)))
    }

    fn encode(&self, texts: Option<(&Parameters, &str)>) -> Result<Vec<u8>> {
        let side = |side: usize| {
            u32::try_from(side).map_err(|_| Error::other(format!("{} fits no PNG", self.size)))
        };
        let mut file = Vec::new();
        let (width, height) = (side(self.size.width)?, side(self.size.height)?);
        let mut encoder = png::Encoder::new(&mut file, width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let written = texts.map_or(Ok(()), |(parameters, record)| {
            encoder.add_itxt_chunk(RECORD_KEYWORD.to_owned(), record.to_owned())?;
            // A text chunk cannot hold NUL, and nothing may be left out unseen.
            let text = parameters.to_string().replace('\0', "\u{fffd}");
            let keyword = PARAMETERS_KEYWORD.to_owned();
            if text.chars().all(|c| u32::from(c) < 256) {
                encoder.add_text_chunk(keyword, text)
            } else {
                encoder.add_itxt_chunk(keyword, text)
            }
        });
        written
            .and_then(|()| encoder.write_header())
            .and_then(|mut writer| {
                writer.write_image_data(&self.rgb)?;
                writer.finish()
            })
            .map_err(|error| Error::other(format!("PNG: {error}")))?;
        Ok(file)
    }
}

impl fmt::Debug for Picture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Picture({})", self.size)
    }
}

/// How a picture was made: what someone needs to make it again.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameters {
    /// The prompt, whole, also where the model did not see its end.
    pub prompt: String,
    /// What the picture should not show; empty for nothing.
    pub negative_prompt: String,
    /// Steps of the scheduler.
    pub steps: usize,
    /// The scheduler's name in AUTOMATIC1111's spelling, such as `DPM++ 2M`.
    pub sampler: String,
    /// How its sigmas are spaced, in the same spelling, such as `Karras`; none for the usual way.
    pub schedule_type: Option<String>,
    /// The weight of classifier-free guidance.
    pub guidance_scale: f64,
    /// The seed of the noise.
    pub seed: u64,
    /// Height and width in pixels.
    pub size: ImageSize,
    /// The model's short name, such as `tiny-sd`.
    pub model: String,
    /// Layers of the text encoder that were left out.
    pub clip_skip: usize,
    /// Of a picture that was made of another: how far from it, 0 to 1.
    pub denoising_strength: Option<f64>,
}

/// `create_infotext` of AUTOMATIC1111's modules/processing.py: the prompt, the negative prompt if
/// there is one, and one line of named values.
impl fmt::Display for Parameters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.prompt.is_empty() {
            writeln!(f, "{}", self.prompt)?;
        }
        if !self.negative_prompt.is_empty() {
            writeln!(f, "Negative prompt: {}", self.negative_prompt)?;
        }
        write!(f, "Steps: {}, Sampler: {}", self.steps, quoted(&self.sampler))?;
        if let Some(schedule_type) = &self.schedule_type {
            write!(f, ", Schedule type: {}", quoted(schedule_type))?;
        }
        write!(f, ", CFG scale: {}, Seed: {}", self.guidance_scale, self.seed)?;
        write!(f, ", Size: {}, Model: {}", self.size, quoted(&self.model))?;
        if self.clip_skip > 0 {
            // Which counts the layer that is used, from the end.
            write!(f, ", Clip skip: {}", self.clip_skip.saturating_add(1))?;
        }
        if let Some(strength) = self.denoising_strength {
            write!(f, ", Denoising strength: {strength}")?;
        }
        write!(f, ", Version: tiny-sd {}", env!("CARGO_PKG_VERSION"))
    }
}

/// A value with a separator in it is written as a JSON string, as AUTOMATIC1111's `quote` does.
fn quoted(value: &str) -> String {
    if value.contains([',', '\n', ':']) {
        serde_json::Value::from(value).to_string()
    } else {
        value.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters() -> Parameters {
        Parameters {
            prompt: "Portrait of a pretty girl".into(),
            negative_prompt: "blurry, ugly".into(),
            steps: 25,
            sampler: "DPM++ 2M".into(),
            schedule_type: None,
            guidance_scale: 7.5,
            seed: 42,
            size: ImageSize { height: 512, width: 768 },
            model: "tiny-sd".into(),
            clip_skip: 0,
            denoising_strength: None,
        }
    }

    fn gradient(size: ImageSize) -> Picture {
        let rgb = (0..size.height * size.width * 3).map(|at| (at * 7 % 256) as u8).collect();
        Picture::new(size, rgb).unwrap()
    }

    /// Reads a PNG back: picture, the text of a tEXt chunk, the text of an iTXt chunk.
    fn read(png: &[u8]) -> (Picture, Option<String>, Option<String>) {
        let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
        let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
        let frame = reader.next_frame(&mut rgb).unwrap();
        assert_eq!(
            (frame.color_type, frame.bit_depth),
            (png::ColorType::Rgb, png::BitDepth::Eight)
        );
        let size = ImageSize { height: frame.height as usize, width: frame.width as usize };
        let info = reader.info();
        let latin1 = info.uncompressed_latin1_text.iter().find(|c| c.keyword == "parameters");
        let utf8 = info.utf8_text.iter().find(|c| c.keyword == "parameters");
        let utf8 = utf8.map(|chunk| chunk.get_text().unwrap());
        (Picture::new(size, rgb).unwrap(), latin1.map(|chunk| chunk.text.clone()), utf8)
    }

    #[test]
    fn the_parameters_read_as_automatic1111_writes_them() {
        let version = env!("CARGO_PKG_VERSION");
        let line = format!(
            "Steps: 25, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 42, Size: 768x512, \
             Model: tiny-sd, Version: tiny-sd {version}"
        );
        let whole = parameters();
        let text = "Portrait of a pretty girl\nNegative prompt: blurry, ugly\n";
        assert_eq!(whole.to_string(), format!("{text}{line}"));
        let short = Parameters { negative_prompt: String::new(), ..whole.clone() };
        assert_eq!(short.to_string(), format!("Portrait of a pretty girl\n{line}"));
        let empty = Parameters { prompt: String::new(), ..short };
        assert_eq!(empty.to_string(), line);
        let changed = Parameters { denoising_strength: Some(0.6), ..whole.clone() };
        assert!(changed.to_string().contains("Model: tiny-sd, Denoising strength: 0.6, Version"));
        let karras = Parameters { schedule_type: Some("Karras".into()), ..whole.clone() };
        let text = karras.to_string();
        assert!(text.contains("Sampler: DPM++ 2M, Schedule type: Karras, CFG"), "{text}");
        let odd = Parameters { model: "a,b: \"c\"".into(), guidance_scale: 7.0, ..whole };
        assert!(odd.to_string().contains(r#"CFG scale: 7, "#), "{odd}");
        assert!(odd.to_string().contains(r#"Model: "a,b: \"c\"", Version"#), "{odd}");
    }

    #[test]
    fn a_png_gives_back_the_pixels_and_the_text_in_the_smaller_chunk_that_can_hold_it() {
        for (prompt, is_latin1) in [
            ("plain", true),
            ("two\nlines, café ÿ", true),
            ("東京の少女 👩‍🎨", false),
            ("“quotes”", false),
            ("", true),
        ] {
            let parameters = Parameters { prompt: prompt.into(), ..parameters() };
            let picture = gradient(ImageSize { height: 8, width: 24 });
            let (back, latin1, utf8) = read(&picture.to_png(&parameters, "{}").unwrap());
            assert!(back == picture, "{prompt:?}");
            let text = Some(parameters.to_string());
            let expected = if is_latin1 { (text, None) } else { (None, text) };
            assert_eq!((latin1, utf8), expected, "{prompt:?}");
        }
        let nul = Parameters { prompt: "a\0b".into(), ..parameters() };
        let png = gradient(ImageSize { height: 1, width: 1 }).to_png(&nul, "{}").unwrap();
        assert!(read(&png).2.unwrap().starts_with("a\u{fffd}b\n"));
    }

    #[test]
    fn a_record_is_in_a_chunk_of_its_own_as_it_is() {
        let record = "{\"prompt\":\"é 東京 \\u0000\"}";
        let png =
            gradient(ImageSize { height: 2, width: 2 }).to_png(&parameters(), record).unwrap();
        let reader = png::Decoder::new(std::io::Cursor::new(&png)).read_info().unwrap();
        let chunks = reader.info().utf8_text.iter();
        let found: Vec<_> =
            chunks.map(|chunk| (chunk.keyword.clone(), chunk.get_text().unwrap())).collect();
        assert_eq!(found, [("tiny-sd".to_owned(), record.to_owned())]);
    }

    #[test]
    fn pixels_of_another_size_are_no_picture() {
        for (height, width, bytes) in [(2, 2, 11), (2, 2, 13), (0, 0, 0), (usize::MAX, 2, 6)] {
            assert!(Picture::new(ImageSize { height, width }, vec![0; bytes]).is_err());
        }
    }
}
