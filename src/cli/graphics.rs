//! Pictures in terminals: which protocol one speaks, and a picture in each. Separate because it is
//! bytes from pixels: where on the screen they go is the display's.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::str::FromStr;

use crate::error::Result;
use crate::image::{ImageSize, Picture};

/// Lines of the screen that a picture takes.
pub(super) const ROWS: usize = 16;
/// What is counted on for the height of a line, in pixels, where a protocol counts in pixels.
const LINE_PIXELS: usize = 12;
/// Bytes of base64 in one of kitty's escape sequences at most.
const KITTY_CHUNK: usize = 4096;
/// Sixel's shades of each of red, green and blue.
const SHADES: usize = 6;
/// Rows of pixels in a band of sixels.
const BAND: usize = 6;

/// How a terminal takes pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Graphics {
    /// <https://sw.kovidgoyal.net/kitty/graphics-protocol/>, also of Ghostty.
    Kitty,
    /// <https://iterm2.com/documentation-images.html>, also of WezTerm and mintty.
    Iterm2,
    /// DEC's, of foot, mlterm, Windows Terminal and others.
    Sixel,
}

/// Where previews go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreviewPlace {
    /// Into a terminal that is known to take pictures, else into files.
    Auto,
    /// Into files beside the pictures.
    File,
    /// Into the terminal.
    Terminal(Graphics),
}

impl PreviewPlace {
    const NAMES: [(&'static str, Self); 5] = [
        ("auto", Self::Auto),
        ("file", Self::File),
        ("kitty", Self::Terminal(Graphics::Kitty)),
        ("iterm2", Self::Terminal(Graphics::Iterm2)),
        ("sixel", Self::Terminal(Graphics::Sixel)),
    ];

    /// The place with `Auto` decided, by whether it may draw and in which environment.
    #[must_use]
    pub fn decided(self, may_draw: bool, variable: &dyn Fn(&str) -> Option<OsString>) -> Self {
        match (self, may_draw.then(|| Graphics::of(variable)).flatten()) {
            (Self::Auto, Some(graphics)) => Self::Terminal(graphics),
            (Self::Auto, None) => Self::File,
            (place @ (Self::File | Self::Terminal(_)), _) => place,
        }
    }

    /// The protocol, if it is a terminal.
    pub fn graphics(self) -> Option<Graphics> {
        match self {
            Self::Terminal(graphics) => Some(graphics),
            Self::Auto | Self::File => None,
        }
    }
}

impl FromStr for PreviewPlace {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let found = Self::NAMES.iter().find(|(name, _)| *name == text);
        let names = || Self::NAMES.map(|(name, _)| name).join(", ");
        found.map(|(_, place)| *place).ok_or_else(|| format!("one of {}", names()))
    }
}

impl Graphics {
    /// What the terminal of this environment is known to speak.
    fn of(variable: &dyn Fn(&str) -> Option<OsString>) -> Option<Self> {
        let text = |name| variable(name).map(|value| value.to_string_lossy().into_owned());
        let text = |name| text(name).unwrap_or_default();
        let (term, program) = (text("TERM"), text("TERM_PROGRAM"));
        let is = |programs: &[&str]| programs.contains(&&*program);
        // They pass pictures on only if told to.
        if !text("TMUX").is_empty() || term.starts_with("screen") || term.starts_with("tmux") {
            return None;
        }
        let is_kitty = term.contains("kitty") || term.contains("ghostty") || is(&["ghostty"]);
        if is_kitty || !text("KITTY_WINDOW_ID").is_empty() {
            return Some(Self::Kitty);
        }
        if is(&["iTerm.app", "WezTerm", "mintty"]) || text("LC_TERMINAL") == "iTerm2" {
            return Some(Self::Iterm2);
        }
        let is_sixel = ["foot", "mlterm", "yaft"].iter().any(|name| term.starts_with(name));
        (is_sixel || term.contains("sixel")).then_some(Self::Sixel)
    }

    /// What draws a picture at the cursor, at most `ROWS` lines high.
    ///
    /// # Errors
    /// If it cannot be made a PNG.
    pub fn draw(self, picture: &Picture) -> Result<String> {
        match self {
            Self::Kitty => Ok(kitty(&picture.to_plain_png()?)),
            Self::Iterm2 => Ok(iterm2(&picture.to_plain_png()?)),
            Self::Sixel => sixel(picture),
        }
    }

    /// What takes it away again, beside clearing its lines.
    pub fn forget(self) -> &'static str {
        match self {
            Self::Kitty => "\x1b_Ga=d,d=I,i=1,q=2\x1b\\",
            Self::Iterm2 | Self::Sixel => "",
        }
    }
}

/// The picture as image 1, which the next one replaces; the cursor stays.
fn kitty(png: &[u8]) -> String {
    let encoded = base64(png);
    let chunks = encoded.as_bytes().chunks(KITTY_CHUNK).map(String::from_utf8_lossy);
    let last = encoded.len().div_ceil(KITTY_CHUNK).saturating_sub(1);
    let sequence = |(at, chunk)| {
        let more = u8::from(at < last);
        match at {
            0 => format!("\x1b_Ga=T,f=100,i=1,p=1,q=2,C=1,r={ROWS},m={more};{chunk}\x1b\\"),
            _ => format!("\x1b_Gm={more},q=2;{chunk}\x1b\\"),
        }
    };
    chunks.enumerate().map(sequence).collect()
}

fn iterm2(png: &[u8]) -> String {
    let (bytes, encoded) = (png.len(), base64(png));
    format!(
        "\x1b]1337;File=inline=1;size={bytes};height={ROWS};preserveAspectRatio=1:{encoded}\x07"
    )
}

/// In 216 colours, enlarged to what [`ROWS`] lines hold at least.
fn sixel(picture: &Picture) -> Result<String> {
    let ImageSize { height, width } = picture.size();
    let times = (ROWS * LINE_PIXELS / height.max(1)).max(1);
    let size = ImageSize { height: height * times, width: width * times };
    let picture = picture.enlarged(size)?;
    let shade = |value: u8| (usize::from(value) * (SHADES - 1) + 127) / 255;
    let colour = |rgb: &[u8]| rgb.iter().fold(0, |colour, value| colour * SHADES + shade(*value));
    let colours: Vec<usize> = picture.rgb().chunks(3).map(colour).collect();
    let mut text = format!("\x1bP0;1;0q\"1;1;{};{}", size.width, size.height);
    let mut named = vec![false; SHADES.pow(3)];
    for band in colours.chunks(BAND * size.width) {
        let mut rows: BTreeMap<usize, Vec<u8>> = BTreeMap::new();
        for (at, colour) in band.iter().enumerate() {
            let bits = rows.entry(*colour).or_insert_with(|| vec![0; size.width]);
            bits[at % size.width] |= 1 << (at / size.width);
        }
        for (colour, bits) in rows {
            text.push_str(&format!("#{colour}"));
            if !std::mem::replace(&mut named[colour], true) {
                // Red, green and blue in percent.
                let percent = |place: u32| colour / SHADES.pow(place) % SHADES * 100 / (SHADES - 1);
                text.push_str(&format!(";2;{};{};{}", percent(2), percent(1), percent(0)));
            }
            for run in bits.chunk_by(|one, other| one == other) {
                let sixel = char::from(b'?' + run[0]);
                text.push_str(&format!("!{}{sixel}", run.len()));
            }
            text.push('$');
        }
        text.push('-');
    }
    text.push_str("\x1b\\");
    Ok(text)
}

/// RFC 4648's, with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let encode = |three: &[u8]| {
        let byte = |at: usize| u32::from(three.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        [0, 1, 2, 3].map(|at| match at <= three.len() {
            true => char::from(DIGITS[(bits >> (18 - 6 * at) & 63) as usize]),
            false => '=',
        })
    };
    bytes.chunks(3).flat_map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(text: &str) -> Vec<u8> {
        let digit = |c: char| match c {
            'A'..='Z' => c as u32 - 65,
            'a'..='z' => c as u32 - 71,
            '0'..='9' => c as u32 + 4,
            '+' => 62,
            _ => 63,
        };
        let digits: Vec<u32> = text.trim_end_matches('=').chars().map(digit).collect();
        let bits = |group: &[u32]| {
            let value = (0..4).fold(0, |v, at| v << 6 | group.get(at).copied().unwrap_or(0));
            value.to_be_bytes()[1..group.len()].to_vec()
        };
        digits.chunks(4).flat_map(bits).collect()
    }

    fn picture(height: usize, width: usize) -> Picture {
        let bytes = height * width * 3;
        // Rough enough that a PNG of it is long.
        let value = |at: usize| {
            let mixed = (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            ((mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 56) as u8
        };
        Picture::new(ImageSize { height, width }, (0..bytes).map(value).collect()).unwrap()
    }

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (text, expected) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")]
        {
            assert_eq!(base64(text.as_bytes()), expected);
            assert_eq!(decoded(expected), text.as_bytes());
        }
    }

    #[test]
    fn kitty_and_iterm2_get_the_picture_as_a_png() {
        let picture = picture(64, 48);
        let png = picture.to_plain_png().unwrap();
        let kitty = Graphics::Kitty.draw(&picture).unwrap();
        let parts: Vec<_> = kitty.split_terminator("\x1b\\").collect();
        assert!(parts.len() > 1, "the picture should need several sequences");
        let mut encoded = String::new();
        for (at, part) in parts.iter().enumerate() {
            let (keys, chunk) = part.strip_prefix("\x1b_G").unwrap().split_once(';').unwrap();
            assert!(chunk.len() <= KITTY_CHUNK);
            assert_eq!(keys.contains("m=1"), at + 1 < parts.len(), "{keys}");
            assert_eq!(keys.contains("a=T,f=100,i=1"), at == 0, "{keys}");
            encoded.push_str(chunk);
        }
        assert_eq!(decoded(&encoded), png);
        let iterm2 = Graphics::Iterm2.draw(&picture).unwrap();
        let (keys, encoded) = iterm2.strip_suffix('\x07').unwrap().split_once(':').unwrap();
        assert!(keys.starts_with("\x1b]1337;File=inline=1;"), "{keys}");
        assert!(keys.contains(&format!("size={};height=16", png.len())), "{keys}");
        assert_eq!(decoded(encoded), png);
    }

    /// The pixels of a sixel picture, as percents of red, green and blue.
    fn pixels(text: &str) -> (usize, Vec<Option<[usize; 3]>>) {
        let body = text.strip_prefix("\x1bP0;1;0q\"1;1;").unwrap().strip_suffix("\x1b\\").unwrap();
        let end = body.find('#').unwrap();
        let (width, height) = body[..end].split_once(';').unwrap();
        let [width, height]: [usize; 2] = [width, height].map(|side| side.parse().unwrap());
        let mut pixels = vec![None; width * height];
        let mut palette = BTreeMap::new();
        for (band, colours) in body[end..].split_terminator('-').enumerate() {
            for colour in colours.split_terminator('$') {
                let (name, runs) = colour.split_at(colour.find('!').unwrap());
                let numbers: Vec<usize> =
                    name[1..].split(';').map(|number| number.parse().unwrap()).collect();
                if let [colour, 2, red, green, blue] = *numbers {
                    palette.insert(colour, [red, green, blue]);
                }
                let mut x = 0;
                for run in runs.split_terminator('!').skip(1) {
                    let (count, sixel) = run.split_at(run.len() - 1);
                    let bits = sixel.bytes().next().unwrap() - b'?';
                    for _ in 0..count.parse::<usize>().unwrap() {
                        for row in (0..BAND).filter(|row| bits >> row & 1 == 1) {
                            let pixel: &mut Option<_> =
                                &mut pixels[(band * BAND + row) * width + x];
                            assert!(pixel.is_none(), "a pixel is drawn twice");
                            *pixel = Some(palette[&numbers[0]]);
                        }
                        x += 1;
                    }
                }
                assert_eq!(x, width);
            }
        }
        (width, pixels)
    }

    #[test]
    fn sixels_are_the_picture_in_its_nearest_of_216_colours() {
        for (height, width, times) in [(64, 48, 3), (7, 5, 27), (193, 8, 1)] {
            let picture = picture(height, width);
            let (found_width, found) = pixels(&Graphics::Sixel.draw(&picture).unwrap());
            assert_eq!((found_width, found.len()), (width * times, height * width * times * times));
            for (at, pixel) in found.iter().enumerate() {
                let (y, x) = (at / found_width / times, at % found_width / times);
                let expected = &picture.rgb()[(y * width + x) * 3..][..3];
                for (percent, value) in pixel.unwrap().iter().zip(expected) {
                    let difference = (*percent as f64 * 2.55 - f64::from(*value)).abs();
                    assert!(difference <= 26.0, "{percent} % for {value} at {x}, {y}");
                }
            }
        }
    }

    #[test]
    fn a_terminal_is_known_by_its_environment_and_a_choice_wins() {
        let check = |variables: &[(&str, &str)], expected: Option<Graphics>| {
            let variable = |name: &str| {
                let found = variables.iter().find(|(variable, _)| *variable == name);
                found.map(|(_, value)| OsString::from(value))
            };
            let expected = expected.map_or(PreviewPlace::File, PreviewPlace::Terminal);
            assert_eq!(PreviewPlace::Auto.decided(true, &variable), expected, "{variables:?}");
            assert_eq!(PreviewPlace::Auto.decided(false, &variable), PreviewPlace::File);
            for (_, place) in &PreviewPlace::NAMES[1..] {
                assert_eq!(place.decided(true, &variable), *place);
            }
        };
        check(&[], None);
        check(&[("TERM", "xterm-256color")], None);
        check(&[("TERM", "xterm-kitty")], Some(Graphics::Kitty));
        check(&[("TERM", "xterm-256color"), ("KITTY_WINDOW_ID", "1")], Some(Graphics::Kitty));
        check(&[("TERM_PROGRAM", "ghostty")], Some(Graphics::Kitty));
        check(&[("TERM_PROGRAM", "iTerm.app")], Some(Graphics::Iterm2));
        check(&[("LC_TERMINAL", "iTerm2")], Some(Graphics::Iterm2));
        check(&[("TERM_PROGRAM", "WezTerm")], Some(Graphics::Iterm2));
        check(&[("TERM", "foot")], Some(Graphics::Sixel));
        check(&[("TERM", "xterm-kitty"), ("TMUX", "/tmp/x")], None);
        check(&[("TERM", "screen.xterm-kitty")], None);
    }

    #[test]
    fn places_are_named_as_the_help_says() {
        assert_eq!("sixel".parse(), Ok(PreviewPlace::Terminal(Graphics::Sixel)));
        assert_eq!(
            "vt100".parse::<PreviewPlace>(),
            Err("one of auto, file, kitty, iterm2, sixel".into())
        );
    }
}
