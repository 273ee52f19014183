//! The first bytes of a session: a hello of fixed size from the client, an answer from the worker,
//! and others before it while the client waits for its turn. Separate because these never change:
//! whatever else the versions of client and worker disagree about, a refusal can be read.

use candle_core::DType;

use super::trust::Token;
use crate::error::{Error, Result};

/// Bytes of every hello, of every version: all that is read before the token is accepted.
pub const HELLO_BYTES: usize = 58;
/// Bytes of an answer before its text.
pub const ANSWER_HEADER_BYTES: usize = 11;
/// Bytes of text that come with an answer, or with the end of a session.
pub const MAX_TEXT_BYTES: usize = 512;
const MAGIC: [u8; 8] = *b"tiny-sd\0";

/// What client and worker must agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// Of the protocol.
    pub version: u16,
    /// A hash of the tables of messages and ops.
    pub schema: [u8; 16],
}

impl Hello {
    /// With the token that opens the worker.
    pub fn encode(&self, token: &Token) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        let fields: [&[u8]; 4] =
            [&MAGIC, &self.version.to_le_bytes(), &self.schema, token.as_bytes()];
        for (byte, field) in bytes.iter_mut().zip(fields.concat()) {
            *byte = field;
        }
        bytes
    }

    /// What [`encode`](Self::encode) wrote; `None` if it did not.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Option<(Self, Token)> {
        let rest = bytes.strip_prefix(&MAGIC)?;
        let (version, rest) = rest.split_first_chunk()?;
        let (schema, rest) = rest.split_first_chunk()?;
        let token = Token::from_bytes(rest.try_into().ok()?);
        Some((Self { version: u16::from_le_bytes(*version), schema: *schema }, token))
    }

    /// Why a worker that speaks `self` cannot serve a client that speaks `client`.
    ///
    /// # Errors
    /// If the two differ.
    pub fn check(&self, client: &Self) -> std::result::Result<(), Answer> {
        if self == client {
            return Ok(());
        }
        let (ours, theirs) = (self.version, client.version);
        let what = if ours == theirs {
            format!("both speak protocol {ours}, but their tables of ops differ")
        } else {
            format!("the worker speaks protocol {ours}, this client {theirs}")
        };
        let version = env!("CARGO_PKG_VERSION");
        let text = format!("{what}; the worker is tiny-sd {version}: install the same on both");
        Err(Answer::new(Status::WrongVersion, text))
    }
}

/// How the worker answers a hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The session begins.
    Welcome,
    /// Others come first; the text says how many, and another answer follows.
    Wait,
    /// All sessions are taken.
    Busy,
    /// The token is another worker's.
    WrongToken,
    /// The protocol or the tables differ.
    WrongVersion,
    /// The worker takes no new sessions.
    ShuttingDown,
    /// Anything else, a status from the future included: the text says it.
    Refused,
}

impl Status {
    fn to_byte(self) -> u8 {
        match self {
            Status::Welcome => 0,
            Status::Busy => 1,
            Status::WrongToken => 2,
            Status::WrongVersion => 3,
            Status::ShuttingDown => 4,
            Status::Refused => 5,
            Status::Wait => 6,
        }
    }

    fn from_byte(byte: u8) -> Self {
        use Status::{Busy, ShuttingDown, Wait, Welcome, WrongToken, WrongVersion};
        let known = [Welcome, Wait, Busy, WrongToken, WrongVersion, ShuttingDown];
        known.into_iter().find(|status| status.to_byte() == byte).unwrap_or(Status::Refused)
    }
}

/// The worker's answer to a hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// For programs.
    pub status: Status,
    /// For people: one line, with the numbers (sessions, versions) that the status has.
    pub text: String,
}

impl Answer {
    /// An answer; of a longer text the first [`MAX_TEXT_BYTES`] are kept.
    pub fn new(status: Status, text: impl Into<String>) -> Self {
        let mut text = text.into();
        text.truncate(text.floor_char_boundary(MAX_TEXT_BYTES));
        Self { status, text }
    }

    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.push(self.status.to_byte());
        bytes.extend((self.text.len() as u16).to_le_bytes());
        bytes.extend(self.text.as_bytes());
        bytes
    }

    /// The status and how many bytes of text follow.
    ///
    /// # Errors
    /// If this is no answer.
    pub fn decode_header(bytes: &[u8; ANSWER_HEADER_BYTES]) -> Result<(Status, usize)> {
        let header = bytes.strip_prefix(&MAGIC);
        let Some(&[status, low, high]) = header else {
            return Err(Error::remote("what answers there is no tiny-sd worker"));
        };
        let len = usize::from(u16::from_le_bytes([low, high]));
        if len > MAX_TEXT_BYTES {
            return Err(Error::remote(format!("the worker's answer of {len} bytes is too long")));
        }
        Ok((Status::from_byte(status), len))
    }

    /// The refusal, as an error that says what to try.
    pub fn refusal(self) -> Error {
        let text = self.text;
        Error::remote(match self.status {
            Status::Welcome | Status::Wait => format!("the worker says at the wrong time: {text}"),
            Status::Busy => format!("the worker is busy: {text}"),
            Status::WrongToken => {
                format!("the worker refused the token: {text}; take the URL that it prints now")
            }
            Status::WrongVersion => format!("client and worker do not fit: {text}"),
            Status::ShuttingDown => format!("the worker is shutting down: {text}"),
            Status::Refused => format!("the worker refused the session: {text}"),
        })
    }
}

/// A line that somebody else wrote, fit for a terminal: no control characters, not too long.
pub fn readable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(MAX_TEXT_BYTES).map(printable).collect()
}

/// What a welcome says of the worker's device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Offer {
    /// Which kernels it has: equal ones give equal bits.
    pub kernel_path: Option<String>,
    /// The dtype behind `--dtype auto`: the fastest there that keeps the picture.
    pub default_dtype: Option<DType>,
}

/// Before the dtype of a worker's device in its welcome.
const DTYPE: &str = ", dtype ";
/// Before the name of its kernels, which comes last.
const KERNELS: &str = ", kernels ";
/// Longest name of kernels that is believed, in bytes.
const MAX_KERNELS_LEN: usize = 64;

/// A welcome's text: what of the worker is in use, and what its device offers.
pub fn greeting(running: usize, most: usize, offer: &Offer) -> String {
    let Offer { kernel_path, default_dtype } = offer;
    let kernels = kernel_path.as_ref().map(|path| format!("{KERNELS}{path}"));
    let dtype = default_dtype.map(|dtype| format!("{DTYPE}{}", dtype.as_str()));
    let [dtype, kernels] = [dtype, kernels].map(Option::unwrap_or_default);
    format!("session {running} of {most}{dtype}{kernels}")
}

impl Offer {
    /// What a welcome says: an older worker says less.
    pub fn of(greeting: &str) -> Self {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_+.".contains(c);
        let is_name = |path: &&str| {
            !path.is_empty() && path.len() <= MAX_KERNELS_LEN && path.chars().all(is_allowed)
        };
        let path = greeting.split_once(KERNELS).map(|(_, path)| path).filter(is_name);
        let dtype = greeting.split_once(DTYPE).and_then(|(_, rest)| {
            let name = rest.split(',').next()?;
            [DType::F32, DType::F16, DType::BF16].into_iter().find(|dtype| dtype.as_str() == name)
        });
        Self { kernel_path: path.map(str::to_owned), default_dtype: dtype }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: Hello = Hello { version: 3, schema: [7; 16] };

    #[test]
    fn a_hello_comes_back_and_nothing_else_is_one() {
        let token = Token::from_bytes([9; 32]);
        let bytes = HELLO.encode(&token);
        let (hello, same) = Hello::decode(&bytes).unwrap();
        assert!(hello == HELLO && same == token);
        assert!(Hello::decode(&[0; HELLO_BYTES]).is_none());
    }

    #[test]
    fn an_answer_comes_back() {
        use Status::{Busy, Refused, ShuttingDown, Wait, Welcome, WrongToken, WrongVersion};
        for status in [Welcome, Wait, Busy, WrongToken, WrongVersion, ShuttingDown, Refused] {
            let bytes = Answer::new(status, "2 of 2 sessions").encode();
            let (header, text) = bytes.split_first_chunk().unwrap();
            assert_eq!(Answer::decode_header(header).unwrap(), (status, text.len()));
            assert_eq!(text, b"2 of 2 sessions");
            let refusal = Answer::new(status, "text").refusal().to_string();
            assert!(refusal.contains("text"), "{refusal}");
        }
        assert_eq!(Status::from_byte(200), Refused);
        assert!(Answer::decode_header(&[1; ANSWER_HEADER_BYTES]).is_err());
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let answer = Answer::new(Status::Refused, "é".repeat(400) + "x");
        assert_eq!(answer.text.len(), MAX_TEXT_BYTES);
        let answer = Answer::new(Status::Refused, "x".to_owned() + &"é".repeat(400));
        assert_eq!(answer.text.len(), MAX_TEXT_BYTES - 1);
    }

    #[test]
    fn a_version_and_a_schema_that_differ_are_told_apart() {
        let text = |client: Hello| HELLO.check(&client).unwrap_err().text;
        assert!(HELLO.check(&HELLO).is_ok());
        let newer = text(Hello { version: 4, ..HELLO });
        assert!(newer.contains("protocol 3") && newer.contains('4'), "{newer}");
        assert!(text(Hello { schema: [0; 16], ..HELLO }).contains("tables of ops"));
    }

    #[test]
    fn a_strangers_text_cannot_drive_the_terminal() {
        assert_eq!(readable(b"a\x1b[2Jb\nc\xff"), "a [2Jb c\u{fffd}");
    }

    #[test]
    fn a_welcome_says_what_is_offered_and_what_is_no_name_is_none() {
        let offer = |path: Option<&str>, default_dtype| Offer {
            kernel_path: path.map(str::to_owned),
            default_dtype,
        };
        let check = |text: &str, expected| assert_eq!(Offer::of(text), expected, "{text}");
        assert_eq!(greeting(1, 4, &offer(None, None)), "session 1 of 4");
        for path in [None, Some("avx512")] {
            for dtype in [None, Some(DType::F32), Some(DType::F16), Some(DType::BF16)] {
                check(&greeting(1, 4, &offer(path, dtype)), offer(path, dtype));
            }
        }
        check("x, kernels avx2", offer(Some("avx2"), None));
        for nothing in ["x, kernels ", "x, kernels a b", "x, dtype u8", "x, dtype ", "x"] {
            check(nothing, offer(None, None));
        }
        check(&format!("x, kernels {}", "a".repeat(65)), offer(None, None));
    }
}
