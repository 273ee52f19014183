//! Prompt to token ids: CLIP's byte-level byte-pair encoding with the ids that transformers' (≥ 5)
//! `CLIPTokenizer` gives. Separate because it is text in, numbers out, and knows no tensor.
//!
//! transformers 5 builds the same normalizer and pre-tokenizer whatever files a model has, and
//! takes only the vocabulary, the merges and the added tokens from them; so does this.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use crate::error::{Error, Result};
pub use chunks::{Chunk, Chunks, Syntax, Token};
use files::{
    object, read_object, vocabulary_of_files, vocabulary_of_texts, vocabulary_of_tokenizer_json,
};
use special::{SpecialTokens, added_tokens_decoder, tokens_to_add};

mod chunks;
mod clip;
mod emphasis;
mod files;
mod special;

/// CLIP's context: tokens in a prompt, `<|startoftext|>` and `<|endoftext|>` included.
pub const CONTEXT_LENGTH: usize = 77;

/// A context beyond this is no CLIP; files of transformers write 1e30 for "no limit".
const MAX_CONTEXT_LENGTH: usize = 1024;

/// `CLIPTokenizer.__init__`, tokenization_clip.py of transformers 5.
const PRE_TOKENIZER_PATTERN: &str = concat!(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d",
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
);

/// What the text encoder takes, and what did not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoding {
    /// The prompt's tokens between bos and eos, then padding: as many as [`Tokenizer::length`].
    pub ids: Vec<u32>,
    /// The end of the prompt, as it was written, that the model will not see.
    pub truncated: Option<String>,
}

/// A model's tokenizer.
pub struct Tokenizer {
    bpe: tokenizers::Tokenizer,
    bos: u32,
    eos: u32,
    pad: u32,
    length: usize,
    /// By the ids that `bpe` gives to their names.
    embeddings: HashMap<u32, Rows>,
}

/// Rows of the text encoder's table that a token is.
#[derive(Debug, Clone, Copy)]
struct Rows {
    first: u32,
    count: u32,
}

impl Rows {
    fn ids(self) -> impl Iterator<Item = u32> {
        (0..self.count).map(move |row| self.first.saturating_add(row))
    }
}

impl Tokenizer {
    /// Reads a `tokenizer/` folder: `tokenizer.json`, or else `vocab.json` and `merges.txt`; with
    /// them `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` where
    /// present.
    ///
    /// # Errors
    /// If a file is missing, cannot be read or contradicts itself.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::read(folder).map_err(|error| error.context(folder.display()))
    }

    fn read(folder: &Path) -> Result<Self> {
        let mut config = read_object(folder, "tokenizer_config.json")?.unwrap_or_default();
        let fast = read_object(folder, "tokenizer.json")?;
        let decoder = added_tokens_decoder(folder, &mut config, fast.as_ref())?;
        let vocabulary = match &fast {
            Some(fast) => vocabulary_of_tokenizer_json(fast)?,
            None => vocabulary_of_files(folder)?,
        };
        Self::new(&config, decoder, vocabulary)
    }

    /// CLIP's own, as in every published model but for the token that prompts are padded with.
    ///
    /// # Errors
    /// If that is no token of CLIP's.
    pub fn clip(pad_token: &str) -> Result<Self> {
        Self::new(&clip::config(pad_token), BTreeMap::new(), clip::vocabulary())
    }

    /// One that is in the program: its `tokenizer_config.json`, `vocab.json` and `merges.txt`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn of_texts(config: &str, vocabulary: &str, merges: &str) -> Result<Self> {
        let config = object("tokenizer_config.json", config)?;
        let vocabulary = object("vocab.json", vocabulary)?;
        Self::new(&config, BTreeMap::new(), vocabulary_of_texts(&vocabulary, merges)?)
    }

    fn new(
        config: &Map<String, Value>,
        decoder: BTreeMap<u64, AddedToken>,
        (vocab, merges): (Vocab, Merges),
    ) -> Result<Self> {
        let special = SpecialTokens::of(config)?;
        let mut bpe = clip_tokenizer(vocab, merges, special.text("unk_token")?)?;
        bpe.add_tokens(tokens_to_add(decoder, &special, config)?)
            .map_err(|error| Error::model(format!("added tokens: {error}")))?;

        let id = |name: &str| -> Result<u32> {
            let text = special.text(name)?;
            bpe.token_to_id(&text)
                .ok_or_else(|| Error::model(format!("{name} {text:?} is not in the vocabulary")))
        };
        let (bos, eos, pad) = (id("bos_token")?, id("eos_token")?, id("pad_token")?);
        let (length, embeddings) = (context_length(config)?, HashMap::new());
        Ok(Self { bos, eos, pad, length, embeddings, bpe })
    }

    /// How many ids every encoding has: `model_max_length`, 77 for every published model.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The ids of a prompt: bos, at most [`length`](Self::length) − 2 tokens, eos, padding. Any
    /// text is a prompt, the empty one included.
    ///
    /// # Errors
    /// If the vocabulary has neither a token for a byte of the prompt nor an unknown token.
    pub fn encode(&self, prompt: &str) -> Result<Encoding> {
        let encoding = self.encode_whole(prompt)?;
        let room = self.length.saturating_sub(2);
        let starts = encoding.get_offsets().iter().map(|(start, _)| *start);
        let tokens = encoding.get_ids().iter().zip(starts);
        let mut tokens =
            tokens.flat_map(|(id, start)| self.rows(*id).ids().map(move |id| (id, start)));
        let mut ids = Vec::with_capacity(self.length);
        ids.push(self.bos);
        ids.extend(tokens.by_ref().take(room).map(|(id, _)| id));
        ids.push(self.eos);
        ids.resize(self.length, self.pad);
        let truncated = tokens.next().map(|(_, start)| {
            let start = (0..=start.min(prompt.len())).rev().find(|&at| prompt.is_char_boundary(at));
            prompt.get(start.unwrap_or(0)..).unwrap_or(prompt).trim().to_owned()
        });
        Ok(Encoding { ids, truncated })
    }

    /// Lets prompts name an embedding of `vectors` rows of the text encoder's table, from `first`
    /// on: all of them by `name`, and those behind the first by `name_1`, `name_2`, … too, as
    /// diffusers does it.
    ///
    /// # Errors
    /// If the vocabulary has the name already.
    pub fn add_embedding(&mut self, name: &str, first: u32, vectors: u32) -> Result<()> {
        for row in 0..vectors {
            let (name, rows) = match row {
                0 => (name.to_owned(), Rows { first, count: vectors }),
                _ => (format!("{name}_{row}"), Rows { first: first.saturating_add(row), count: 1 }),
            };
            if self.bpe.token_to_id(&name).is_some() {
                return Err(Error::usage(format!(
                    "the vocabulary has a token {name:?} already; give another name: \
                     --embedding NAME=FILE"
                )));
            }
            self.bpe
                .add_tokens([AddedToken::from(name.clone(), false)])
                .map_err(|error| Error::model(format!("the token {name:?}: {error}")))?;
            let id = self.bpe.token_to_id(&name);
            let id = id.ok_or_else(|| Error::other(format!("there is no token {name:?}")))?;
            self.embeddings.insert(id, rows);
        }
        Ok(())
    }

    /// What the text encoder gets for an id of `bpe`.
    fn rows(&self, id: u32) -> Rows {
        self.embeddings.get(&id).copied().unwrap_or(Rows { first: id, count: 1 })
    }

    /// The tokens of a text, all of them, and nothing around them.
    fn tokens(&self, text: &str) -> Result<Vec<Rows>> {
        let encoding = self.encode_whole(text)?;
        Ok(encoding.get_ids().iter().map(|id| self.rows(*id)).collect())
    }

    fn encode_whole(&self, text: &str) -> Result<tokenizers::Encoding> {
        self.bpe.encode(text, false).map_err(|error| Error::model(format!("tokenizer: {error}")))
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let size = self.bpe.get_vocab_size(true);
        write!(f, "Tokenizer({size} tokens, length {}, pad {})", self.length, self.pad)
    }
}

type Vocab = HashMap<String, u32>;
type Merges = Vec<(String, String)>;

/// `CLIPTokenizer.__init__`: NFC, whitespace collapsed, lowercase; words, digits one by one,
/// punctuation; bytes; pairs, with `</w>` at the end of a word.
fn clip_tokenizer(vocab: Vocab, merges: Merges, unknown: String) -> Result<tokenizers::Tokenizer> {
    let broken = |error: tokenizers::Error| Error::model(error.to_string());
    // The builder copies each pair into a buffer as long as the longest token, unchecked.
    for (left, right) in &merges {
        let merged = format!("{left}{right}");
        if let Some(missing) = [left, right, &merged].into_iter().find(|t| !vocab.contains_key(*t))
        {
            return Err(Error::model(format!(
                "the merge {left:?} {right:?} needs the token {missing:?}, which is not in the \
                 vocabulary"
            )));
        }
    }
    let model = BPE::builder()
        .vocab_and_merges(vocab.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
        .unk_token(unknown)
        .continuing_subword_prefix(String::new())
        .end_of_word_suffix("</w>".to_owned())
        .fuse_unk(false)
        .build()
        .map_err(broken)?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".to_owned()), " ").map_err(broken)?;
    tokenizer
        .with_normalizer(Some(Normalizers::new(vec![NFC.into(), spaces.into(), Lowercase.into()])))
        .map_err(broken)?;
    let words = SplitPattern::Regex(PRE_TOKENIZER_PATTERN.to_owned());
    let words = Split::new(words, SplitDelimiterBehavior::Removed, true).map_err(broken)?;
    tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(vec![
        PreTokenizerWrapper::Split(words),
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, true)),
    ])));
    Ok(tokenizer)
}

fn context_length(config: &Map<String, Value>) -> Result<usize> {
    let value = config.get("model_max_length").or_else(|| config.get("max_len"));
    match value.and_then(Value::as_f64) {
        Some(length) if length < 2.0 => {
            Err(Error::model(format!("model_max_length {length} leaves no room for a prompt")))
        }
        Some(length) if length <= MAX_CONTEXT_LENGTH as f64 => Ok(length as usize),
        _ => Ok(CONTEXT_LENGTH),
    }
}

#[cfg(test)]
mod tests {
    use super::special::{BOS_DEFAULT, EOS_DEFAULT};
    use super::*;
    use serde_json::json;
    use tempfile::TempDir;

    /// `!` is 0, bytes are 1.., then `</w>` forms, `he`, `hel`, `lo</w>`, bos 600, eos 601.
    fn vocab() -> Map<String, Value> {
        let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let single = alphabet.iter().map(char::to_string);
        let ending = alphabet.iter().map(|c| format!("{c}</w>"));
        let merged = ["he", "hel", "lo</w>"].map(str::to_owned);
        let tokens = single.chain(ending).chain(merged);
        let mut vocab: Map<_, _> = tokens.zip(0u32..).map(|(t, id)| (t, id.into())).collect();
        vocab.insert(BOS_DEFAULT.into(), 600.into());
        vocab.insert(EOS_DEFAULT.into(), 601.into());
        vocab
    }

    const MERGES: &str = "#version: 0.2\nh e\nhe l\nl o</w>\n";

    fn folder(files: &[(&str, Value)]) -> TempDir {
        let folder = TempDir::new().unwrap();
        for (name, content) in files {
            let text = match content {
                Value::String(text) => text.clone(),
                json => json.to_string(),
            };
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    pub fn slow(config: Value, map: Value) -> TempDir {
        folder(&[
            ("vocab.json", vocab().into()),
            ("merges.txt", MERGES.into()),
            ("tokenizer_config.json", config),
            ("special_tokens_map.json", map),
        ])
    }

    pub fn id(token: &str) -> u32 {
        vocab()[token].as_u64().unwrap() as u32
    }

    /// Checks the ids between bos and eos, and everything around them.
    fn check(folder: &TempDir, prompt: &str, expected: &[u32], pad: u32) {
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        let encoding = tokenizer.encode(prompt).unwrap();
        let mut ids = vec![600];
        ids.extend(expected);
        ids.push(601);
        ids.resize(77, pad);
        assert_eq!(encoding, Encoding { ids, truncated: None }, "{prompt:?}");
    }

    #[test]
    fn text_is_composed_collapsed_lowered_and_merged_with_ends_of_words() {
        let folder = slow(json!({}), json!({}));
        let hello = [id("hel"), id("lo</w>")];
        check(&folder, "HELLO\t\n hello", &[hello, hello].concat(), 601);
        check(&folder, "", &[], 601);
        // U+00E9 is the bytes C3 A9, however it was typed.
        let e_acute = [id("Ã"), id("©</w>")];
        check(&folder, "\u{e9} e\u{301} \u{c9}", &[e_acute, e_acute, e_acute].concat(), 601);
        check(&folder, "42'S", &[id("4</w>"), id("2</w>"), id("'"), id("s</w>")], 601);
        check(&folder, "o<|endoftext|>o", &[id("o</w>"), 601, id("o</w>")], 601);
    }

    #[test]
    fn the_pad_token_comes_from_where_transformers_takes_it() {
        let bang = json!({"content": "!", "lstrip": false, "normalized": false});
        let decoder = json!({"601": {"content": EOS_DEFAULT, "special": true}});
        for (config, map, pad) in [
            (json!({}), json!({}), 601),
            (json!({"pad_token": EOS_DEFAULT}), json!({"pad_token": "!"}), 0),
            (json!({"pad_token": "!"}), json!({"pad_token": EOS_DEFAULT}), 601),
            (json!({"pad_token": "!"}), json!({}), 0),
            (json!({}), json!({"pad_token": bang}), 0),
            (json!({"added_tokens_decoder": decoder}), json!({"pad_token": "!"}), 601),
        ] {
            // A pad token in the text is itself: "!!" is two of them, as in transformers 5.
            let bangs = if pad == 0 { [0, 0] } else { [id("!"), id("!</w>")] };
            check(&slow(config, map), "!!", &bangs, pad);
        }
    }

    #[test]
    fn tokenizer_json_gives_the_same_ids_as_vocab_and_merges() {
        for merges in [json!(["h e", "he l", "l o</w>"]), json!([["h", "e"], ["l", "o</w>"]])] {
            let merges_hel = merges[1] == "he l";
            let model = json!({"type": "BPE", "vocab": vocab(), "merges": merges});
            let added = json!([{"id": 0, "content": "!", "special": true}]);
            let file = json!({"model": model, "added_tokens": added});
            let folder = folder(&[("tokenizer.json", file)]);
            let hel = if merges_hel { vec![id("hel")] } else { vec![id("he"), id("l")] };
            check(&folder, "Hello!", &[hel, vec![id("lo</w>"), 0]].concat(), 601);
        }
    }

    #[test]
    fn what_does_not_fit_is_given_back_as_it_was_written() {
        let tokenizer = Tokenizer::open(slow(json!({}), json!({})).path()).unwrap();
        let fits = "x ".repeat(75);
        assert_eq!(tokenizer.encode(&fits).unwrap().truncated, None);
        for (tail, expected) in [("É Ünd", "É Ünd"), ("  End. ", "End."), ("😀", "😀")] {
            let encoding = tokenizer.encode(&format!("{fits}{tail}")).unwrap();
            assert_eq!(encoding.truncated.as_deref(), Some(expected));
            assert_eq!(encoding.ids.len(), 77);
            assert_eq!(encoding.ids.last(), Some(&601));
        }
    }

    #[test]
    fn a_length_without_limit_is_clips_own() {
        for (length, expected) in [("1e30", 77), ("77", 77), ("12", 12), ("null", 77)] {
            let length: Value = serde_json::from_str(length).unwrap();
            let folder = slow(json!({"model_max_length": length}), json!({}));
            let tokenizer = Tokenizer::open(folder.path()).unwrap();
            assert_eq!(tokenizer.length(), expected);
            assert_eq!(tokenizer.encode("hello").unwrap().ids.len(), expected);
        }
    }

    #[test]
    fn broken_files_are_errors_that_name_the_file() {
        let vocab = || ("vocab.json", Value::from(vocab()));
        let merges = |text: &str| ("merges.txt", Value::from(text));
        let config = |value| ("tokenizer_config.json", value);
        for (files, expected) in [
            (vec![], "neither tokenizer.json nor vocab.json with merges.txt"),
            (vec![vocab()], "neither tokenizer.json nor vocab.json with merges.txt"),
            (vec![("vocab.json", json!([])), merges("")], "vocab.json: not a JSON object"),
            (vec![("vocab.json", json!({"a": -1})), merges("")], "vocab.json: the id of \"a\""),
            (vec![vocab(), merges("h e l")], "merges.txt: line 1 is no pair"),
            (vec![vocab(), merges("x y")], "needs the token \"xy\""),
            (vec![("tokenizer.json", json!({}))], "tokenizer.json: no \"model\""),
            (vec![("tokenizer.json", "{".into())], "tokenizer.json: EOF"),
            (
                vec![vocab(), merges(""), config(json!({"pad_token": null}))],
                "pad_token must be a string",
            ),
            (vec![vocab(), merges(""), config(json!({"model_max_length": 1}))], "leaves no room"),
        ] {
            let folder = folder(&files);
            let error = Tokenizer::open(folder.path()).unwrap_err();
            assert_eq!(error.kind(), crate::error::Kind::Model);
            let message = error.to_string();
            assert!(message.contains(expected), "{message}");
            assert!(message.starts_with(&folder.path().display().to_string()), "{message}");
        }
    }
}
