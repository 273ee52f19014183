//! `--image`, `--mask` and `--strength`: pictures that others are made of, looked at before
//! anything is loaded and read when they are needed. Separate because these are the only files that
//! jobs read, and a batch may name a thousand of them.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::args::PictureArgs;
use super::settings::Settings;
use super::surroundings::{At, Process, Surroundings};
use super::values::{Side, SizeRequest};
use crate::error::{Error, Result};
use crate::image::{ImageSize, MAX_PICTURE_BYTES, Mask, Picture, PictureTexts};
use crate::pipeline::ImageMode;

/// Sides are multiples of this where the user does not say: what one latent becomes.
const FACTOR: usize = 8;
/// Strength where the user does not say, as diffusers' pipelines have it.
const STRENGTH: f64 = 0.8;
const STRENGTH_WITH_MASK: f64 = 1.0;

/// A picture to begin with.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageRequest {
    /// The picture.
    pub image: InputFile,
    /// What of it is painted, if not all.
    pub mask: Option<InputFile>,
    /// How far from it the result may go.
    pub strength: f64,
}

/// A picture's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputFile {
    /// As the user wrote it.
    pub path: PathBuf,
    /// BLAKE3-256 of its content, in hexadecimal digits.
    pub hash: String,
    /// Height and width in pixels, as it is looked at.
    pub size: ImageSize,
}

/// The bytes of a picture's file.
///
/// # Errors
/// If it cannot be read or is too large; the caller names it.
pub(super) fn read_picture(path: &Path, surroundings: &dyn Surroundings) -> Result<Vec<u8>> {
    match surroundings.at(path) {
        At::Nothing => return Err(Error::other("there is no such file")),
        At::Folder => return Err(Error::other("it is a folder, not a picture")),
        At::File | At::Device => {}
    }
    let bytes = surroundings.read_file(path, MAX_PICTURE_BYTES);
    let bytes = bytes.map_err(|error| Error::other(error.to_string()))?;
    if bytes.len() > MAX_PICTURE_BYTES {
        return Err(Error::other(format!("it is larger than {MAX_PICTURE_BYTES} bytes")));
    }
    Ok(bytes)
}

/// Files that were looked at, each once.
pub(super) struct Inputs<'a> {
    surroundings: &'a dyn Surroundings,
    known: RefCell<HashMap<PathBuf, InputFile>>,
}

impl<'a> Inputs<'a> {
    /// None so far.
    pub fn new(surroundings: &'a dyn Surroundings) -> Self {
        Self { surroundings, known: RefCell::default() }
    }

    /// What the flags say.
    ///
    /// # Errors
    /// If they do not go together, or a file is not there or no picture.
    pub fn request(&self, flags: &PictureArgs) -> Result<Option<ImageRequest>> {
        let PictureArgs { image, mask, strength, .. } = flags;
        let Some(image) = image else {
            let flag = match (mask, strength) {
                (Some(_), _) => "--mask says what of an image is painted",
                (None, Some(_)) => "--strength says how far from an image it goes",
                (None, None) => return Ok(None),
            };
            return Err(Error::usage(format!("{flag}: give --image")));
        };
        let strength = match (strength, mask) {
            (Some(strength), _) => strength.get(),
            (None, Some(_)) => STRENGTH_WITH_MASK,
            (None, None) => STRENGTH,
        };
        let steps = flags.steps.get();
        if ((steps as f64 * strength) as usize) < 1 {
            return Err(Error::usage(format!(
                "--strength {strength} of --steps {steps} is not one step; try more of either"
            )));
        }
        let file = |flag: &str, path: &PathBuf| {
            self.file(path).map_err(|error| {
                Error::usage(error.context(format!("{flag} {}", path.display())).to_string())
            })
        };
        let image = file("--image", image)?;
        let mask = mask.as_ref().map(|mask| file("--mask", mask)).transpose()?;
        let request = ImageRequest { image, mask, strength };
        request.check_size(SizeRequest { height: flags.height, width: flags.width })?;
        Ok(Some(request))
    }

    /// A picture's file by its path.
    ///
    /// # Errors
    /// If it is not there, or no picture.
    pub fn file(&self, path: &Path) -> Result<InputFile> {
        if let Some(known) = self.known.borrow().get(path) {
            return Ok(known.clone());
        }
        // It is read again when it is used, and a stranger's record may name one that never ends.
        if self.surroundings.at(path) == At::Device {
            return Err(Error::other("it is not a file"));
        }
        let bytes = read_picture(path, self.surroundings)?;
        let size = PictureTexts::read(&bytes)?.upright_size();
        let hash = blake3::hash(&bytes).to_hex().to_string();
        let file = InputFile { path: path.to_owned(), hash, size };
        self.known.borrow_mut().insert(path.to_owned(), file.clone());
        Ok(file)
    }

    /// Says which of a record's pictures are no longer what they were, of those whose flags the
    /// user did not give.
    pub fn changed(&self, settings: &Settings, is_given: &dyn Fn(&str) -> bool) -> Vec<String> {
        let files = [("image", &settings.image), ("mask", &settings.mask_image)];
        let files = files.into_iter().filter(|(flag, _)| !is_given(flag) && !is_given("image"));
        let changed = files.filter_map(|(flag, recorded)| {
            let recorded = recorded.as_ref()?;
            // One that is not there is an error of its own.
            let here = self.file(Path::new(&recorded.path)).ok()?;
            let text = || format!("--{flag} {}: it is not what it was then", recorded.path);
            (here.hash != recorded.hash).then(text)
        });
        changed.collect()
    }
}

impl ImageRequest {
    /// Its own size, each side rounded down to what a model can paint.
    pub fn size(&self) -> ImageSize {
        let ImageSize { height, width } = self.image.size;
        let side = |side: usize| side - side % FACTOR;
        ImageSize { height: side(height), width: side(width) }
    }

    /// Whether the sides that the user does not choose can be those of the image.
    fn check_size(&self, chosen: SizeRequest) -> Result<()> {
        let ImageSize { height, width } = chosen.or(self.size());
        let is_good = |side: usize| (FACTOR..=Side::MAX).contains(&side);
        match is_good(height) && is_good(width) {
            true => Ok(()),
            false => Err(Error::usage(format!(
                "--image {} has {} pixels: give --width and --height, from {FACTOR} to {}",
                self.image.path.display(),
                self.image.size,
                Side::MAX
            ))),
        }
    }

    /// The pictures, made as large as `size`.
    ///
    /// # Errors
    /// A usage error if one is no picture; another if it is no longer what it was.
    pub(super) fn load(&self, size: ImageSize) -> Result<LoadedImages> {
        let read = |flag: &str, file: &InputFile| {
            let read = || {
                let bytes = read_picture(&file.path, &Process)?;
                match *blake3::hash(&bytes).to_hex() == *file.hash {
                    // As wrong a request as a file that is none: only its pixels tell later.
                    true => {
                        Picture::from_file(&bytes).map_err(|error| Error::usage(error.to_string()))
                    }
                    false => Err(Error::other("it has changed since this run began")),
                }
            };
            read().map_err(|error| error.context(format!("{flag} {}", file.path.display())))
        };
        let image = read("--image", &self.image)?.resized(size)?;
        let mask = match &self.mask {
            Some(file) => Some(Mask::of_picture(&read("--mask", file)?, size)?),
            None => None,
        };
        Ok(LoadedImages { image, mask, strength: self.strength })
    }
}

/// The pictures that others are made of.
pub(super) struct LoadedImages {
    image: Picture,
    mask: Option<Mask>,
    strength: f64,
}

impl LoadedImages {
    /// As the pipeline takes them.
    ///
    /// # Errors
    /// If they do not fit each other.
    pub fn mode(&self) -> Result<ImageMode<'_>> {
        ImageMode::new(&self.image, self.mask.as_ref(), self.strength)
    }
}

#[cfg(test)]
mod tests {
    use super::super::job::tests::{Fake, parse_words};
    use super::super::surroundings::At;
    use crate::cli::Request;
    use crate::error::Kind;
    use crate::image::{ImageSize, Picture};

    fn fake() -> Fake {
        let picture = |height, width| {
            let rgb = vec![9; height * width * 3];
            Picture::new(ImageSize { height, width }, rgb).unwrap().to_plain_png().unwrap()
        };
        let files = vec![
            ("boat.png", picture(61, 86)),
            ("mask.png", picture(20, 20)),
            ("dot.png", picture(7, 9)),
            ("text.png", b"no picture".to_vec()),
        ];
        let there = files.iter().map(|(name, _)| (*name, At::File)).collect();
        Fake { there, files, ..Fake::default() }
    }

    #[test]
    fn an_image_gives_its_size_and_diffusers_strength_unless_flags_do() {
        let check = |words: &str, size: &str, strength: f64, has_mask: bool| {
            let words = format!("x|--image|boat.png{words}");
            let Ok(Request::Paint(job)) = parse_words(&words, &mut fake()) else {
                panic!("{words}")
            };
            let image = job.image.as_ref().unwrap();
            let unused = ImageSize { height: 8, width: 8 };
            assert_eq!(job.picture_size(unused).to_string(), size, "{words}");
            assert_eq!((image.strength, image.mask.is_some()), (strength, has_mask), "{words}");
            assert_eq!(image.image.hash.len(), 64);
        };
        check("", "80x56", 0.8, false);
        check("|--strength|0.6|-W|64", "64x56", 0.6, false);
        check("|--mask|mask.png", "80x56", 1.0, true);
        check("|--mask-image|mask.png|--strength|0.5|-W|64|-H|8", "64x8", 0.5, true);
    }

    #[test]
    fn what_does_not_go_together_is_refused_with_the_reason() {
        for (words, expected) in [
            ("--mask|mask.png", "--mask says what of an image is painted: give --image"),
            ("--strength|0.5", "--strength says how far from an image it goes: give --image"),
            ("--image|boat.png|--strength|1.1", "a number from 0 to 1"),
            ("--image|boat.png|--strength|nan", "a number from 0 to 1"),
            ("--image|boat.png|--strength|0.03", "--strength 0.03 of --steps 25 is not one step"),
            ("--image|boat.png|--strength|0", "is not one step"),
            ("--image|none.png", "--image none.png: there is no such file"),
            ("--image|text.png", "--image text.png: it is no PNG, JPEG or WebP"),
            ("--image|boat.png|--mask|text.png", "--mask text.png: it is no PNG"),
            ("--image|dot.png", "--image dot.png has 9x7 pixels: give --width and --height, from"),
        ] {
            let error = parse_words(&format!("x|{words}"), &mut fake()).unwrap_err();
            let (kind, error) = (error.kind(), error.to_string());
            assert!(error.contains(expected) && !error.contains('\n'), "{words}: {error}");
            assert_eq!(kind, Kind::Usage, "{words}: {error}");
        }
    }

    #[test]
    fn another_programs_strength_is_taken_where_an_image_is_given() {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, 1, 1);
        let text = "a\nSteps: 9, Sampler: DDIM, Seed: 5, RNG: CPU, Denoising strength: 0.5";
        encoder.add_text_chunk("parameters".into(), text.into()).unwrap();
        encoder.write_header().unwrap().write_image_data(&[0]).unwrap();
        for (words, strength, note) in [
            ("--from|theirs.png|-i|boat.png", Some(0.5), None),
            ("--from|theirs.png|-i|boat.png|--strength|0.9", Some(0.9), None),
            ("--from|theirs.png", None, Some("not used: Denoising strength: 0.5")),
        ] {
            let mut fake = fake();
            fake.there.push(("theirs.png", At::File));
            fake.files.push(("theirs.png", file.clone()));
            let Ok(Request::Paint(job)) = parse_words(words, &mut fake) else { panic!("{words}") };
            assert_eq!(job.image.map(|image| image.strength), strength, "{words}");
            let notes = job.notes.concat();
            assert_eq!(notes.contains("strength"), note.is_some(), "{words}: {notes}");
            assert!(note.is_none_or(|note| notes.contains(note)), "{words}: {notes}");
        }
    }
}
