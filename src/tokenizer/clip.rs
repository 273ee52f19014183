//! CLIP's own vocabulary, which every Stable Diffusion 1.x and 2.x model has: for models that come
//! without a tokenizer. Separate because it is in the program, and every other one in files.

use serde_json::{Map, Value, json};

use super::special::{BOS_DEFAULT, EOS_DEFAULT};
use super::{Merges, Vocab};

/// The ids of the two tokens of each merge, u16 in little-endian order (`scripts/clip-merges`).
const MERGES: &[u8] = include_bytes!("../../models/clip/merges.bin");

/// The characters that stand for the 256 bytes, in the order of their ids: those that print, then
/// the others from U+0100 on.
fn byte_characters() -> Vec<String> {
    let printable = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff);
    let printable: Vec<char> = printable.filter_map(char::from_u32).collect();
    let others = (0x100..).map_while(char::from_u32).take(256 - printable.len());
    printable.iter().copied().chain(others).map(String::from).collect()
}

/// Bytes, bytes at the end of a word, merges, and the two ends of a prompt (OpenAI's
/// `SimpleTokenizer`).
pub(super) fn vocabulary() -> (Vocab, Merges) {
    let mut tokens = byte_characters();
    tokens.extend(byte_characters().into_iter().map(|byte| byte + "</w>"));
    let mut merges = Merges::new();
    for &[a, b, c, d] in MERGES.as_chunks::<4>().0 {
        let [left, right] = [[a, b], [c, d]].map(|id| usize::from(u16::from_le_bytes(id)));
        let (Some(left), Some(right)) = (tokens.get(left), tokens.get(right)) else { continue };
        let pair = (left.clone(), right.clone());
        tokens.push(format!("{left}{right}"));
        merges.push(pair);
    }
    tokens.extend([BOS_DEFAULT, EOS_DEFAULT].map(str::to_owned));
    (tokens.into_iter().zip(0..).collect(), merges)
}

/// What the published models' `tokenizer_config.json` and `special_tokens_map.json` say.
pub(super) fn config(pad_token: &str) -> Map<String, Value> {
    let token = |content: &str| json!({"content": content, "normalized": true, "special": true});
    let fields = [
        ("bos_token", token(BOS_DEFAULT)),
        ("eos_token", token(EOS_DEFAULT)),
        ("unk_token", token(EOS_DEFAULT)),
        ("pad_token", json!(pad_token)),
    ];
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}
