//! Which files of a model are needed: decided from names alone, so that a local folder and a
//! repository's list of files are treated by the same code. The names are those that diffusers
//! (`utils/constants.py`) and transformers (`utils/__init__.py`) give. Separate because it reads
//! nothing: whoever asks says which names exist.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{json, shown};
use crate::error::{Error, Result};

/// The variants that are used unasked where nothing else is there.
const KNOWN_VARIANTS: [&str; 2] = ["fp16", "bf16"];
/// Most files that one component is split into.
const MAX_SHARDS: usize = 1024;
/// Longest name of a file, in bytes, as in every file system.
const MAX_FILE_NAME_LEN: usize = 255;

/// A part of the model with weights of its own: a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Component {
    /// CLIP's text model.
    TextEncoder,
    /// UNet2DConditionModel.
    Unet,
    /// AutoencoderKL.
    Vae,
}

impl Component {
    /// Every component that has weights.
    pub const ALL: [Self; 3] = [Self::TextEncoder, Self::Unet, Self::Vae];

    /// The folder's name, which is also the component's in messages.
    pub fn folder(self) -> &'static str {
        match self {
            Self::TextEncoder => "text_encoder",
            Self::Unet => "unet",
            Self::Vae => "vae",
        }
    }

    /// The name of its configuration in the model's folder.
    pub fn config_file(self) -> &'static str {
        match self {
            Self::TextEncoder => "text_encoder/config.json",
            Self::Unet => "unet/config.json",
            Self::Vae => "vae/config.json",
        }
    }

    /// How the names of its weight files begin: transformers' models have other names than
    /// diffusers'.
    fn stem(self, format: Format) -> &'static str {
        match (self, format) {
            (Self::TextEncoder, Format::Safetensors) => "model",
            (Self::TextEncoder, Format::Pickle) => "pytorch_model",
            (Self::Unet | Self::Vae, _) => "diffusion_pytorch_model",
        }
    }
}

/// How weights are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `.safetensors`
    Safetensors,
    /// `.bin`, as `torch.save` writes it.
    Pickle,
}

impl Format {
    /// In the order of preference.
    const ALL: [Self; 2] = [Self::Safetensors, Self::Pickle];

    /// The format of a file that begins so: archives and pickles have their marks, and the first
    /// bytes of a safetensors file are the length of its header.
    pub fn of(bytes: &[u8]) -> Self {
        let is_pickle = bytes.starts_with(b"PK\x03\x04") || bytes.starts_with(b"\x80\x02");
        if is_pickle { Self::Pickle } else { Self::Safetensors }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::Pickle => "bin",
        }
    }
}

/// The word that `--variant` gives, such as `fp16`: a part of the weight files' names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variant(String);

impl Variant {
    /// # Errors
    /// A usage error if it is not made of letters, digits, `_` and `-`.
    pub fn parse(text: &str) -> Result<Self> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
        if text.is_empty() || text.len() > 64 || !text.bytes().all(fits) {
            return Err(Error::usage(format!(
                "--variant {} is not a word such as fp16 or bf16",
                shown(text)
            )));
        }
        Ok(Self(text.to_owned()))
    }

    /// The word.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The file to begin with for one component.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Whose weights they are.
    pub component: Component,
    /// The path in the model's folder or repository, with `/`.
    pub file: String,
    /// How the weights are written.
    pub format: Format,
    /// Whether the file is only an index: [`Choice::shards`] tells the weight files from its text.
    pub is_index: bool,
}

/// Chooses a component's weights among the names that exist (paths with `/` from the top of the
/// model): safetensors before pickle, one file before several, and without `variant` the plain
/// names before `fp16` or `bf16`.
///
/// # Errors
/// If nothing fits, with every name looked for; if only variants are there and more than one.
pub fn choose(
    component: Component,
    variant: Option<&Variant>,
    exists: &dyn Fn(&str) -> bool,
) -> Result<Choice> {
    let find = |variant: Option<&str>| {
        candidates(component, variant).into_iter().find(|choice| exists(&choice.file))
    };
    let folder = component.folder();
    if let Some(variant) = variant {
        let word = variant.as_str();
        return find(Some(word)).ok_or_else(|| {
            let advice = match choose(component, None, exists) {
                Ok(other) => format!("; without --variant, {} would be used", other.file),
                Err(_) => String::new(),
            };
            let looked = looked_for(component, &[Some(word)]);
            Error::model(format!("{folder} has no {word} weights: looked for {looked}{advice}"))
        });
    }
    if let Some(choice) = find(None) {
        return Ok(choice);
    }
    let mut found = KNOWN_VARIANTS.iter().filter_map(|&word| Some((word, find(Some(word))?)));
    match (found.next(), found.next()) {
        (Some((_, choice)), None) => Ok(choice),
        (Some((one, _)), Some((other, _))) => Err(Error::model(format!(
            "{folder} has weights as {one} and as {other}: choose with --variant {one} or \
             --variant {other}"
        ))),
        (None, _) => {
            let [fp16, bf16] = KNOWN_VARIANTS.map(Some);
            let looked = looked_for(component, &[None, fp16, bf16]);
            Err(Error::model(format!("{folder} has no weights: looked for {looked}")))
        }
    }
}

/// All names that a component's weights may have, best first.
fn candidates(component: Component, variant: Option<&str>) -> Vec<Choice> {
    let mut choices = Vec::new();
    for format in Format::ALL {
        let (stem, suffix) = (component.stem(format), format.suffix());
        let mut add = |name: String, is_index| {
            let file = format!("{}/{name}", component.folder());
            choices.push(Choice { component, file, format, is_index });
        };
        match variant {
            None => {
                add(format!("{stem}.{suffix}"), false);
                add(format!("{stem}.{suffix}.index.json"), true);
            }
            Some(variant) => {
                add(format!("{stem}.{variant}.{suffix}"), false);
                // Three ways in which diffusers and transformers have written it over time.
                add(format!("{stem}.{suffix}.index.{variant}.json"), true);
                add(format!("{stem}.{suffix}.{variant}.index.json"), true);
                add(format!("{stem}.{variant}.{suffix}.index.json"), true);
            }
        }
    }
    choices
}

fn looked_for(component: Component, variants: &[Option<&str>]) -> String {
    let names = variants.iter().flat_map(|&variant| candidates(component, variant));
    names.map(|choice| choice.file).collect::<Vec<_>>().join(", ")
}

impl Choice {
    /// Why it is this one, of the names that exist: what of the rules of [`choose`] decided.
    pub fn why(&self, asked: Option<&Variant>, exists: &dyn Fn(&str) -> bool) -> String {
        let asked = asked.map(Variant::as_str);
        let words = [None, asked].into_iter().chain(KNOWN_VARIANTS.map(Some));
        let mut there: Vec<(Option<&str>, Self)> = Vec::new();
        for word in words {
            for choice in candidates(self.component, word) {
                let is_new = !there.iter().any(|(_, known)| *known == choice);
                if is_new && exists(&choice.file) {
                    there.push((word, choice));
                }
            }
        }
        let own = there.iter().find(|(_, choice)| choice == self).and_then(|(word, _)| *word);
        let mut reasons = BTreeSet::new();
        let others = there.iter().filter(|(_, choice)| choice != self);
        for (word, other) in others.clone() {
            match *word == own {
                true if other.format != self.format => {
                    reasons.insert("safetensors before pickle".to_owned());
                }
                true => drop(reasons.insert("one file before several".to_owned())),
                false if asked.is_none() => drop(reasons.insert("plain names first".to_owned())),
                false => {}
            }
        }
        reasons.extend(asked.map(|word| format!("--variant {word}")));
        if let (None, Some(word)) = (asked, own) {
            reasons.insert(format!("no plain names, but {word}"));
        }
        let reasons = match reasons.is_empty() {
            true => "the only one".to_owned(),
            false => reasons.into_iter().collect::<Vec<_>>().join(", "),
        };
        let others: Vec<_> = others.map(|(_, other)| other.file.as_str()).collect();
        match others.is_empty() {
            true => reasons,
            false => format!("{reasons}; also there: {}", others.join(", ")),
        }
    }

    /// The weight files that an index names, as paths in the model's folder, each once.
    ///
    /// # Errors
    /// If the text is not such an index, or names a file outside of the component's folder or of
    /// another format: it comes from whoever made the model.
    pub fn shards(&self, index: &str) -> Result<Vec<String>> {
        self.read_index(index).map_err(|error| error.context(&self.file))
    }

    fn read_index(&self, index: &str) -> Result<Vec<String>> {
        let index = json::parse(index)?;
        let map = index.get("weight_map").and_then(Value::as_object);
        let map = map.filter(|map| !map.is_empty());
        let map = map.ok_or_else(|| Error::model("it has no weight_map: not an index"))?;
        let mut names = BTreeSet::new();
        for (tensor, name) in map {
            let name = name.as_str().filter(|name| self.is_shard(name)).ok_or_else(|| {
                Error::model(format!(
                    "tensor {} is said to be in {}, which is not the name of a .{} file in {}",
                    shown(tensor),
                    shown(name.as_str().unwrap_or("?")),
                    self.format.suffix(),
                    self.component.folder()
                ))
            })?;
            names.insert(name);
        }
        if names.len() > MAX_SHARDS {
            return Err(Error::model(format!("it names more than {MAX_SHARDS} files")));
        }
        Ok(names.into_iter().map(|name| format!("{}/{name}", self.component.folder())).collect())
    }

    /// Whether foreign text is a plain file name with the right end, on every platform.
    fn is_shard(&self, name: &str) -> bool {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let stem = name.strip_suffix(self.format.suffix()).and_then(|rest| rest.strip_suffix('.'));
        stem.is_some_and(|stem| !stem.is_empty() && !stem.starts_with('.'))
            && name.len() <= MAX_FILE_NAME_LEN
            && name.bytes().all(plain)
    }
}

/// Configurations that every model has.
const REQUIRED: [&str; 4] = [
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
];
/// The tokenizer in one file, or else the two that it can be made from.
const TOKENIZER: &str = "tokenizer/tokenizer.json";
const TOKENIZER_PARTS: [&str; 2] = ["tokenizer/vocab.json", "tokenizer/merges.txt"];
/// Files that are used where they are there.
const OPTIONAL: [&str; 4] = [
    "model_index.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/added_tokens.json",
];

/// The files of a model that are needed besides the weights, among the names that exist.
///
/// # Errors
/// If some are missing, with all of their names.
pub fn config_files(exists: &dyn Fn(&str) -> bool) -> Result<Vec<&'static str>> {
    let (mut files, mut missing): (Vec<_>, Vec<_>) =
        REQUIRED.into_iter().partition(|name| exists(name));
    let has_parts = TOKENIZER_PARTS.iter().all(|name| exists(name));
    if exists(TOKENIZER) {
        files.push(TOKENIZER);
    }
    if has_parts {
        files.extend(TOKENIZER_PARTS);
    }
    if !exists(TOKENIZER) && !has_parts {
        missing.push("tokenizer/tokenizer.json (or vocab.json and merges.txt)");
    }
    if !missing.is_empty() {
        let what = match files.len() {
            0 => "this is not a model in diffusers layout: there is no ",
            _ => "the model lacks ",
        };
        return Err(Error::model(format!("{what}{}", missing.join(", "))));
    }
    files.extend(OPTIONAL.into_iter().filter(|name| exists(name)));
    Ok(files)
}

/// The tokenizer's files among those that exist and are used.
pub(super) fn tokenizer_files(exists: &dyn Fn(&str) -> bool) -> Vec<&'static str> {
    let names = [&[TOKENIZER][..], &TOKENIZER_PARTS, &OPTIONAL].concat();
    let is_there = |name: &&str| name.starts_with("tokenizer/") && exists(name);
    names.into_iter().filter(is_there).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(component: Component, variant: Option<&str>, names: &[&str]) -> Result<Choice> {
        let variant = variant.map(|word| Variant::parse(word).unwrap());
        choose(component, variant.as_ref(), &|name| names.contains(&name))
    }

    #[test]
    fn safetensors_come_first_then_pickles_then_the_only_variant() {
        let check = |variant, names: &[&str], expected: &str| {
            let names: Vec<String> = names.iter().map(|name| format!("unet/{name}")).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let choice = chosen(Component::Unet, variant, &names).unwrap();
            assert_eq!(choice.file, format!("unet/{expected}"));
            assert_eq!(choice.is_index, expected.ends_with(".json"));
            assert_eq!(choice.format == Format::Pickle, expected.contains(".bin"));
        };
        let [safe, bin] = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"];
        let safe_index = "diffusion_pytorch_model.safetensors.index.json";
        let bin_index = "diffusion_pytorch_model.bin.index.json";
        let safe_16 = "diffusion_pytorch_model.fp16.safetensors";
        let bin_16 = "diffusion_pytorch_model.fp16.bin";
        let safe_b16 = "diffusion_pytorch_model.bf16.safetensors";
        check(None, &[bin, safe, safe_16], safe);
        check(None, &[bin, safe_index], safe_index);
        check(None, &[bin_index, bin], bin);
        check(None, &[bin_index, safe_16], bin_index);
        check(None, &[bin, safe_16], bin);
        check(None, &[bin_16, safe_16], safe_16);
        check(None, &[safe_b16], safe_b16);
        check(Some("fp16"), &[bin, safe, safe_16, safe_b16], safe_16);
        check(Some("bf16"), &[bin, safe, safe_16, safe_b16], safe_b16);
        check(Some("fp16"), &[safe, bin_16], bin_16);
        for index in [
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "diffusion_pytorch_model.safetensors.fp16.index.json",
            "diffusion_pytorch_model.fp16.safetensors.index.json",
        ] {
            check(None, &[index], index);
            check(Some("fp16"), &[index, safe], index);
        }
    }

    #[test]
    fn the_text_encoder_has_the_names_of_transformers() {
        let check = |names: &[&str], expected: &str| {
            assert_eq!(chosen(Component::TextEncoder, None, names).unwrap().file, expected);
        };
        let [safe, bin] = ["text_encoder/model.safetensors", "text_encoder/pytorch_model.bin"];
        check(&[bin, safe], safe);
        check(&[bin, "text_encoder/diffusion_pytorch_model.safetensors"], bin);
        check(&["text_encoder/model.fp16.safetensors"], "text_encoder/model.fp16.safetensors");
    }

    #[test]
    fn nothing_found_lists_all_that_was_looked_for() {
        let error = chosen(Component::Vae, None, &[]).unwrap_err().to_string();
        for name in [
            "vae/diffusion_pytorch_model.safetensors,",
            "vae/diffusion_pytorch_model.safetensors.index.json,",
            "vae/diffusion_pytorch_model.bin,",
            "vae/diffusion_pytorch_model.fp16.safetensors,",
            "vae/diffusion_pytorch_model.bin.index.bf16.json,",
        ] {
            assert!(error.contains(name), "{name} is not in {error}");
        }
        let names = ["vae/diffusion_pytorch_model.bin"];
        let error = chosen(Component::Vae, Some("fp16"), &names).unwrap_err().to_string();
        assert!(error.contains("vae/diffusion_pytorch_model.fp16.bin"), "{error}");
        assert!(
            error.ends_with("without --variant, vae/diffusion_pytorch_model.bin would be used")
        );
        let names = [
            "vae/diffusion_pytorch_model.fp16.safetensors",
            "vae/diffusion_pytorch_model.bf16.safetensors",
        ];
        let error = chosen(Component::Vae, None, &names).unwrap_err().to_string();
        assert!(error.contains("--variant fp16 or --variant bf16"), "{error}");
        assert!(Variant::parse("../fp16").is_err() && Variant::parse("").is_err());
    }

    #[test]
    fn an_index_names_files_of_its_own_folder_only() {
        let file = "unet/diffusion_pytorch_model.safetensors.index.json";
        let choice = chosen(Component::Unet, None, &[file]).unwrap();
        let index = |name: &str| {
            serde_json::json!({"metadata": {"total_size": 1}, "weight_map": {"a": name, "b": name}})
                .to_string()
        };
        assert_eq!(choice.shards(&index("m-1.safetensors")).unwrap(), ["unet/m-1.safetensors"]);
        for name in [
            "../m.safetensors",
            "/m.safetensors",
            "a/m.safetensors",
            "a\\m.safetensors",
            "c:m.safetensors",
            "..safetensors",
            ".safetensors",
            "safetensors",
            "m.bin",
            "m\0.safetensors",
            "",
        ] {
            let error = choice.shards(&index(name)).unwrap_err().to_string();
            assert!(error.starts_with(file) && error.contains("\"a\""), "{error}");
        }
        for text in ["", "{}", "[]", "{\"weight_map\": {}}", "{\"weight_map\": {\"a\": 1}}"] {
            assert!(choice.shards(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_a_model_needs_besides_weights_is_named_all_at_once() {
        let mut names = REQUIRED.to_vec();
        let files = |names: &[&str]| config_files(&|name| names.contains(&name));
        assert!(files(&names).unwrap_err().to_string().contains("tokenizer/tokenizer.json (or"));
        names.push(TOKENIZER_PARTS[0]);
        assert!(files(&names).is_err());
        names.push(TOKENIZER_PARTS[1]);
        assert_eq!(files(&names).unwrap(), names);
        names.push("model_index.json");
        assert_eq!(files(&names).unwrap(), names);
        let error = files(&["unet/config.json"]).unwrap_err().to_string();
        assert!(error.starts_with("the model lacks text_encoder/config.json, vae/"), "{error}");
        assert!(files(&[]).unwrap_err().to_string().contains("not a model in diffusers layout"));
    }
}
