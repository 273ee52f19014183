//! Which tokens a model's files add to CLIP's vocabulary and how each is matched in a prompt, by
//! the rules of transformers' (≥ 5) `_from_pretrained` and `TokenizersBackend.__init__`. Separate
//! because these rules are its loading order, not tokenization.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::files::read_object;
use crate::error::{Error, Result};

pub(super) const BOS_DEFAULT: &str = "<|startoftext|>";
pub(super) const EOS_DEFAULT: &str = "<|endoftext|>";

/// `SPECIAL_TOKENS_ATTRIBUTES`, in the order in which transformers adds them (the last one of
/// equal text decides how it is matched), with CLIPTokenizer's default.
const SPECIAL_TOKENS: [(&str, Option<&str>); 7] = [
    ("bos_token", Some(BOS_DEFAULT)),
    ("eos_token", Some(EOS_DEFAULT)),
    ("unk_token", Some(EOS_DEFAULT)),
    ("sep_token", None),
    ("pad_token", Some(EOS_DEFAULT)),
    ("cls_token", None),
    ("mask_token", None),
];

/// A special token in a configuration: its text alone, or with how it is matched.
#[derive(Clone, PartialEq)]
enum SpecialToken {
    Text(String),
    Token(AddedToken),
}

impl SpecialToken {
    fn text(&self) -> &str {
        match self {
            SpecialToken::Text(text) => text,
            SpecialToken::Token(token) => &token.content,
        }
    }

    /// A string or an object; `special` is what the place it stands in says about it.
    fn parse(value: &Value, special: bool, name: &str) -> Result<Self> {
        match value {
            Value::String(text) => Ok(SpecialToken::Text(text.clone())),
            Value::Object(object) => Ok(SpecialToken::Token(added_token(object, special, name)?)),
            _ => Err(Error::model(format!("{name} must be a string or an object"))),
        }
    }

    fn into_token(self) -> AddedToken {
        match self {
            SpecialToken::Text(text) => AddedToken::from(text, true),
            SpecialToken::Token(token) => token,
        }
    }
}

/// The named special tokens, by their place in [`SPECIAL_TOKENS`].
pub(super) struct SpecialTokens {
    tokens: BTreeMap<usize, SpecialToken>,
}

impl SpecialTokens {
    pub(super) fn of(config: &Map<String, Value>) -> Result<Self> {
        let mut tokens = BTreeMap::new();
        for (place, (name, default)) in SPECIAL_TOKENS.into_iter().enumerate() {
            let token = match (config.get(name), default) {
                (None, Some(default)) => SpecialToken::Text(default.to_owned()),
                (None | Some(Value::Null), None) => continue,
                // Without `special`, as transformers reads tokenizer_config.json.
                (Some(value), _) => SpecialToken::parse(value, false, name)?,
            };
            tokens.insert(place, token);
        }
        Ok(Self { tokens })
    }

    pub(super) fn text(&self, name: &str) -> Result<String> {
        let place = SPECIAL_TOKENS.iter().position(|(known, _)| *known == name);
        let token = place.and_then(|place| self.tokens.get(&place));
        let token = token.ok_or_else(|| Error::model(format!("{name} is missing")))?;
        Ok(token.text().to_owned())
    }
}

/// Python's `AddedToken(**object)`: a special token is matched before normalization unless it
/// says otherwise.
fn added_token(object: &Map<String, Value>, special: bool, name: &str) -> Result<AddedToken> {
    let content = match object.get("content") {
        Some(Value::String(content)) => content.clone(),
        _ => return Err(Error::model(format!("{name}: an added token without \"content\""))),
    };
    let flag = |key: &str, default| object.get(key).and_then(Value::as_bool).unwrap_or(default);
    let special = special || flag("special", false);
    Ok(AddedToken {
        content,
        single_word: flag("single_word", false),
        lstrip: flag("lstrip", false),
        rstrip: flag("rstrip", false),
        normalized: flag("normalized", !special),
        special,
    })
}

/// `added_tokens_decoder` as transformers' `_from_pretrained` comes by it, by id; on the way
/// `special_tokens_map.json` is laid over the configuration where transformers does so.
pub(super) fn added_tokens_decoder(
    folder: &Path,
    config: &mut Map<String, Value>,
    fast: Option<&Map<String, Value>>,
) -> Result<BTreeMap<u64, AddedToken>> {
    let mut decoder = BTreeMap::new();
    if let Some(Value::Object(entries)) = config.get("added_tokens_decoder") {
        for (id, entry) in entries {
            let name = "added_tokens_decoder";
            match (id.parse(), entry) {
                (Ok(id), Value::Object(entry)) => {
                    decoder.insert(id, added_token(entry, false, name)?);
                }
                _ => return Err(Error::model(format!("{name}: {id:?} is no id of a token"))),
            }
        }
        return Ok(decoder);
    }
    for (name, mut value) in read_object(folder, "special_tokens_map.json")?.unwrap_or_default() {
        if let Value::Object(object) = &mut value {
            object.insert("special".to_owned(), Value::Bool(true));
        }
        config.insert(name, value);
    }
    let special = SpecialTokens::of(config)?;
    for (content, id) in read_object(folder, "added_tokens.json")?.unwrap_or_default() {
        let id = id.as_u64();
        let id =
            id.ok_or_else(|| Error::model(format!("added_tokens.json: {content:?}: no id")))?;
        let is_special = special.tokens.values().any(|token| token.text() == content);
        decoder.insert(id, AddedToken::from(content, is_special));
    }
    if let Some(Value::Array(entries)) = fast.and_then(|fast| fast.get("added_tokens")) {
        for entry in entries {
            let object = entry.as_object();
            match object.and_then(|entry| Some((entry, entry.get("id")?.as_u64()?))) {
                Some((entry, id)) => {
                    decoder.insert(id, added_token(entry, false, "added_tokens")?);
                }
                None => return Err(Error::model("tokenizer.json: an added token without an id")),
            }
        }
    }
    Ok(decoder)
}

/// `TokenizersBackend.__init__`: the decoder's tokens by id, then the named special tokens, then
/// the extra ones; the order decides because a later token of equal text replaces an earlier one.
pub(super) fn tokens_to_add(
    decoder: BTreeMap<u64, AddedToken>,
    special: &SpecialTokens,
    config: &Map<String, Value>,
) -> Result<Vec<AddedToken>> {
    let known: Vec<String> = decoder.values().map(|token| token.content.clone()).collect();
    let mut tokens: Vec<_> = decoder.into_values().map(SpecialToken::Token).collect();
    let mut extra = Vec::new();
    for name in ["extra_special_tokens", "additional_special_tokens"] {
        if let (true, Some(Value::Array(entries))) = (extra.is_empty(), config.get(name)) {
            for entry in entries {
                extra.push(SpecialToken::parse(entry, true, name)?);
            }
        }
    }
    for token in special.tokens.values().chain(&extra) {
        if !known.iter().any(|known| known == token.text()) && !tokens.contains(token) {
            tokens.push(token.clone());
        }
    }
    Ok(tokens.into_iter().map(SpecialToken::into_token).collect())
}
