//! The values of single flags, each a type that holds only what the flag allows. Separate from
//! the job so that an allowed value is a type wherever it goes, and a new word is one line.

use std::str::FromStr;

use candle_core::DType;

use crate::image::ImageSize;

/// A whole number in a range that is part of its type.
macro_rules! bounded {
    ($(#[$doc:meta])* $name:ident, $range:expr, $what:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub struct $name(usize);

        impl $name {
            /// The number.
            pub fn get(self) -> usize {
                self.0
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> std::result::Result<Self, String> {
                match text.parse() {
                    Ok(number) if $range.contains(&number) => Ok($name(number)),
                    _ => Err(format!("{}, {} to {}", $what, $range.start(), $range.end())),
                }
            }
        }
    };
}

bounded!(
    /// Denoising steps, 1 to 1000: a model was trained on 1000 timesteps.
    Steps,
    (1..=1000_usize),
    "a whole number"
);

bounded!(
    /// Number of pictures, 1 to 10000.
    Count,
    (1..=10_000_usize),
    "a whole number"
);

bounded!(
    /// Layers of the text encoder that are left out, 0 to 100; how many it has, its model says.
    ClipSkip,
    (0..=100_usize),
    "a whole number"
);

/// How many pictures go through the UNet together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchSize {
    /// As many as are worth it: see [`BatchSize::or`].
    Auto,
    /// So many, 1 to 64.
    Fixed(usize),
}

impl BatchSize {
    /// The most pictures that go together.
    pub const MAX: usize = 64;

    /// The number for pictures of `size`, of which `auto` pixels go together where the user did not
    /// say.
    pub fn or(self, auto_pixels: usize, size: ImageSize) -> usize {
        match self {
            BatchSize::Auto => {
                let pixels = size.height.saturating_mul(size.width).max(1);
                (auto_pixels / pixels).clamp(1, BatchSize::MAX)
            }
            BatchSize::Fixed(number) => number,
        }
    }
}

impl FromStr for BatchSize {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.parse() {
            Ok(number) if (1..=BatchSize::MAX).contains(&number) => Ok(BatchSize::Fixed(number)),
            _ if text == "auto" => Ok(BatchSize::Auto),
            _ => Err(format!("auto, or a whole number from 1 to {}", BatchSize::MAX)),
        }
    }
}

/// Height or width in pixels: a multiple of 8, which is what one latent becomes, from 8 to 4096.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Side(usize);

impl Side {
    /// The largest side, in pixels.
    pub const MAX: usize = 4096;

    /// Pixels.
    pub fn get(self) -> usize {
        self.0
    }
}

impl FromStr for Side {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let rule = format!("a multiple of 8 from 8 to {}", Side::MAX);
        match text.parse::<usize>() {
            Ok(pixels) if (8..=Side::MAX).contains(&pixels) && pixels % 8 == 0 => Ok(Side(pixels)),
            Ok(pixels) if (8..Side::MAX).contains(&pixels) => {
                let below = pixels / 8 * 8;
                Err(format!("{rule}; {below} and {} are near", below.saturating_add(8)))
            }
            _ => Err(rule),
        }
    }
}

/// Height and width as far as the user chose them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SizeRequest {
    /// Rows of pixels.
    pub height: Option<Side>,
    /// Columns of pixels.
    pub width: Option<Side>,
}

impl SizeRequest {
    /// The rest is the model's own size.
    pub fn or(self, default: ImageSize) -> ImageSize {
        ImageSize {
            height: self.height.map_or(default.height, Side::get),
            width: self.width.map_or(default.width, Side::get),
        }
    }
}

/// How far from an image a picture may go: 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Strength(f64);

impl Strength {
    /// The part of the steps that are made.
    pub fn get(self) -> f64 {
        self.0
    }
}

impl FromStr for Strength {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.parse() {
            Ok(strength) if (0.0..=1.0).contains(&strength) => Ok(Strength(strength)),
            _ => Err("a number from 0 to 1".into()),
        }
    }
}

/// The weight of classifier-free guidance: finite, 0 to 1000.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GuidanceScale(f64);

impl GuidanceScale {
    /// The weight.
    pub fn get(self) -> f64 {
        self.0
    }

    /// Whether the unconditional pass is made at all (diffusers' `do_classifier_free_guidance`).
    pub fn needs_unconditional(self) -> bool {
        self.0 > 1.0
    }
}

impl FromStr for GuidanceScale {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.parse::<f64>() {
            Ok(scale) if (0.0..=1000.0).contains(&scale) => Ok(GuidanceScale(scale)),
            _ => Err("a number from 0 to 1000".into()),
        }
    }
}

/// A closed set of words, the same ones in parsing, in errors and in `as_str`.
macro_rules! words {
    (
        $(#[$doc:meta])*
        $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal),* $(,)? }
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant),* }

        impl $name {
            /// The word on the command line.
            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $word),* }
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> std::result::Result<Self, String> {
                match text {
                    $($word => Ok($name::$variant),)*
                    _ => Err(format!("one of {}", [$($word),*].join(", "))),
                }
            }
        }
    };
}

words!(
    /// Number type of the computation.
    DtypeChoice {
        /// What suits the device: f32 on the CPU.
        Auto = "auto",
        /// 32-bit floats.
        F32 = "f32",
        /// IEEE half precision.
        F16 = "f16",
        /// bfloat16.
        Bf16 = "bf16",
    }
);

impl DtypeChoice {
    /// `auto` is what the device prefers.
    pub fn or(self, default: DType) -> DType {
        match self {
            DtypeChoice::Auto => default,
            DtypeChoice::F32 => DType::F32,
            DtypeChoice::F16 => DType::F16,
            DtypeChoice::Bf16 => DType::BF16,
        }
    }
}

/// How much is said on standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verbosity {
    /// Errors.
    Quiet,
    /// Progress, and a line for each picture.
    Normal,
    /// The settings too, and the time of each stage.
    Verbose,
}
