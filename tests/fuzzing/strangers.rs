//! What is read of those who are not trusted yet: hellos, answers, pairing URLs, and what a bulk
//! transfer says of itself.

use std::sync::OnceLock;

use tiny_sd::remote::hello::{ANSWER_HEADER_BYTES, Answer, HELLO_BYTES, Hello, Status};
use tiny_sd::remote::op::cases::cases;
use tiny_sd::remote::op::{Digest, Op};
use tiny_sd::remote::trust::{Fingerprint, Token};
use tiny_sd::remote::url::PairingUrl;
use tiny_sd::remote::wire::{Reader, Wire};

use super::{Target, damaged, noise};
use crate::numbers::Random;

pub const TARGET: Target =
    Target { name: "strangers", run, draw, max_memory_bytes: |len| (16 << 10) + 200 * len };

fn run(bytes: &[u8]) {
    if let Some((first, _)) = bytes.split_first_chunk::<HELLO_BYTES>()
        && let Some((hello, token)) = Hello::decode(first)
    {
        assert_eq!(hello.encode(&token), *first);
    }
    if let Some((header, rest)) = bytes.split_first_chunk::<ANSWER_HEADER_BYTES>()
        && let Ok((status, len)) = Answer::decode_header(header)
    {
        let text = String::from_utf8_lossy(rest.get(..len).unwrap_or_default());
        let answer = Answer::new(status, text);
        assert!(answer.encode().len() < 1 << 10);
        drop(answer.refusal());
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        url(text);
    }
    if let Ok(op) = Op::get(&mut Reader::new(bytes)) {
        let _ = op.infer(&[]);
    }
}

/// A URL comes back as it was, and nothing but itself tells the token.
fn url(text: &str) {
    match text.parse::<PairingUrl>() {
        Err(error) => assert!(!error.to_string().contains(&secret()), "{text}"),
        Ok(url) => {
            let again: PairingUrl = url.to_secret_string().parse().expect("it was one");
            assert!(again.name() == url.name() && again.token() == url.token(), "{text}");
            let told = format!("{url} {url:?} {}", url.name());
            assert!(!told.contains(&url.token().to_hex()), "{told}");
        }
    }
}

fn token() -> Token {
    Token::from_bytes(std::array::from_fn(|n| 0xd0 ^ n as u8))
}

fn secret() -> String {
    token().to_hex()
}

fn draw(random: &mut Random) -> Vec<u8> {
    let bytes = match random.below(6) {
        0 => Hello { version: 1, schema: [3; 16] }.encode(&token()).to_vec(),
        1 => Answer::new(Status::Busy, "4 of 4 sessions are taken").encode(),
        2 => {
            let host = ["127.0.0.1", "[::1]", "worker.example"][random.below(3)];
            let fingerprint = Fingerprint::of(b"certificate");
            format!("quic://{}@{host}:4433?cert={fingerprint}", secret()).into_bytes()
        }
        3 => {
            let mut bytes = Vec::new();
            let dtype = candle_core::DType::F16;
            Op::Weight { digest: Digest([9; 32]), dtype, dims: vec![320, 4, 3, 3] }.put(&mut bytes);
            bytes
        }
        4 => {
            static OPS: OnceLock<Vec<Op>> = OnceLock::new();
            let ops = OPS.get_or_init(|| cases().into_iter().map(|case| case.op).collect());
            let mut bytes = Vec::new();
            ops[random.below(ops.len())].put(&mut bytes);
            bytes
        }
        _ => {
            let len = random.below(80);
            noise(random, len)
        }
    };
    damaged(random, &bytes)
}
