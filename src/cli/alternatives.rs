//! Alternatives in prompts, of which each seed chooses: `{red|blue}`, `{2::red|blue}` where red is
//! twice as likely, and `__name__`, a line of `name.txt` in the folder of `--wildcards`.
//! Separate because a prompt is text before and after, and what is chosen depends on nothing else.
//!
//! The generator is BLAKE3's output for the seed, 64 bits for each choice from left to right: the
//! same seed chooses the same in every version, on every machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::prompt::MAX_PROMPT_BYTES;
use super::surroundings::{At, Surroundings};
use crate::error::{Error, Result};

/// Largest file of lines, in bytes.
const MAX_FILE_BYTES: usize = 1 << 20;
/// Most files of a command line.
const MAX_FILES: usize = 256;
/// Most files or braces within each other.
const MAX_DEPTH: usize = 16;
/// Most choices for one prompt.
const MAX_CHOICES: usize = 10_000;
/// What the generator's numbers are for.
const CONTEXT: &str = "tiny-sd 0.1 alternatives in prompts";

/// A prompt, or a part of one.
#[derive(Debug, Clone, PartialEq)]
enum Node {
    Text(String),
    OneOf(Arc<Options>),
}

/// What is chosen from.
#[derive(Debug, PartialEq)]
struct Options {
    /// How likely each is, and what it is.
    options: Vec<(f64, Vec<Node>)>,
    /// Bytes of the longest, choices of the one with the most, and how deep it goes.
    most: Most,
}

/// How far a text can go.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Most {
    bytes: usize,
    choices: usize,
    depth: usize,
}

/// A prompt that has alternatives.
#[derive(Debug, Clone, PartialEq)]
pub struct Template(Vec<Node>);

impl Template {
    /// The prompt that a seed chooses; `which` tells the prompts of a picture apart.
    pub fn resolve(&self, which: &str, seed: u64) -> String {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&seed.to_le_bytes()).update(which.as_bytes());
        let mut numbers = hasher.finalize_xof();
        let mut draw = || {
            let mut bytes = [0; 8];
            numbers.fill(&mut bytes);
            // 53 bits: every one of these is a float of its own.
            (u64::from_le_bytes(bytes) >> 11) as f64 / (1u64 << 53) as f64
        };
        let mut text = String::new();
        write(&self.0, &mut draw, &mut text);
        text
    }
}

fn write(nodes: &[Node], draw: &mut dyn FnMut() -> f64, text: &mut String) {
    for node in nodes {
        match node {
            Node::Text(part) => text.push_str(part),
            Node::OneOf(options) => write(options.choose(draw()), draw, text),
        }
    }
}

impl Options {
    fn new(options: Vec<(f64, Vec<Node>)>) -> Result<Self> {
        let total: f64 = options.iter().map(|(weight, _)| weight).sum();
        if !(total > 0.0 && total.is_finite()) {
            return Err(Error::usage("of alternatives one at least must be possible"));
        }
        let mut most = Most::default();
        for (_, nodes) in &options {
            let of = most_of(nodes);
            most.bytes = most.bytes.max(of.bytes);
            most.choices = most.choices.max(of.choices.saturating_add(1));
            most.depth = most.depth.max(of.depth.saturating_add(1));
        }
        if most.depth > MAX_DEPTH {
            return Err(Error::usage(format!("more than {MAX_DEPTH} alternatives in each other")));
        }
        Ok(Self { options, most })
    }

    /// The option at a place from 0 to 1 of all that is likely.
    fn choose(&self, at: f64) -> &[Node] {
        let total: f64 = self.options.iter().map(|(weight, _)| weight).sum();
        let mut rest = at * total;
        let possible = self.options.iter().filter(|(weight, _)| *weight > 0.0);
        let mut chosen: &[Node] = &[];
        for (weight, nodes) in possible {
            chosen = nodes;
            if rest < *weight {
                break;
            }
            rest -= weight;
        }
        chosen
    }
}

fn most_of(nodes: &[Node]) -> Most {
    let mut sum = Most::default();
    for node in nodes {
        match node {
            Node::Text(text) => sum.bytes = sum.bytes.saturating_add(text.len()),
            Node::OneOf(options) => {
                sum.bytes = sum.bytes.saturating_add(options.most.bytes);
                sum.choices = sum.choices.saturating_add(options.most.choices);
                sum.depth = sum.depth.max(options.most.depth);
            }
        }
    }
    sum
}

/// The files of lines, each read once.
pub(super) struct Wildcards<'a> {
    surroundings: &'a dyn Surroundings,
    files: BTreeMap<PathBuf, Arc<Options>>,
    /// Those that are being read, outermost first.
    reading: Vec<PathBuf>,
}

impl<'a> Wildcards<'a> {
    /// None is read yet.
    pub fn new(surroundings: &'a dyn Surroundings) -> Self {
        Self { surroundings, files: BTreeMap::new(), reading: Vec::new() }
    }

    /// A prompt with its alternatives, none if it has none; `__name__` is one where there is a
    /// folder of files.
    ///
    /// # Errors
    /// If a file cannot be read or leaves the folder, or there are too many alternatives.
    pub fn read(&mut self, prompt: &str, folder: Option<&Path>) -> Result<Option<Template>> {
        let nodes = self.parse(prompt, folder)?;
        let most = most_of(&nodes);
        if most.choices == 0 {
            return Ok(None);
        }
        if most.choices > MAX_CHOICES || most.bytes > MAX_PROMPT_BYTES {
            return Err(Error::usage(format!(
                "its alternatives may make {} choices and {} bytes, more than {MAX_CHOICES} or \
                 {MAX_PROMPT_BYTES}",
                most.choices, most.bytes
            )));
        }
        Ok(Some(Template(nodes)))
    }

    fn parse(&mut self, text: &str, folder: Option<&Path>) -> Result<Vec<Node>> {
        // What is open, outermost first; the bottom is the text itself.
        let mut open: Vec<Group> = vec![Group::default()];
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            let mut taken = c.len_utf8();
            let depth = open.len();
            let Some(group) = open.last_mut() else { break };
            match c {
                '\\' => {
                    let escaped = rest.get(taken..).and_then(|rest| rest.chars().next());
                    taken = taken.saturating_add(escaped.map_or(0, char::len_utf8));
                    group.push_text(rest.get(..taken).unwrap_or_default());
                }
                '{' if depth > MAX_DEPTH => {
                    let text = format!("more than {MAX_DEPTH} braces are open at once");
                    return Err(Error::usage(text));
                }
                '{' => open.push(Group::default()),
                '|' if depth > 1 => {
                    let option = std::mem::take(&mut group.nodes);
                    group.options.push(option);
                }
                '}' if depth > 1 => {
                    let closed = open.pop().unwrap_or_default().close()?;
                    if let Some(outer) = open.last_mut() {
                        closed.into_iter().for_each(|node| outer.push(node));
                    }
                }
                '_' => match folder.zip(wildcard(rest)) {
                    Some((folder, name)) => {
                        taken = name.len().saturating_add(4);
                        group.push(Node::OneOf(self.file(folder, name)?));
                    }
                    None => group.push_text("_"),
                },
                _ => {
                    let end = rest.find(['\\', '{', '|', '}', '_']).filter(|end| *end > 0);
                    taken = end.unwrap_or(if "|}".contains(c) { 1 } else { rest.len() });
                    group.push_text(rest.get(..taken).unwrap_or_default());
                }
            }
            rest = rest.get(taken..).unwrap_or_default();
        }
        // What was never closed is text.
        let mut nodes = Group::default();
        for (index, group) in open.into_iter().enumerate() {
            if index > 0 {
                nodes.push_text("{");
            }
            group.into_text().into_iter().for_each(|node| nodes.push(node));
        }
        Ok(nodes.nodes)
    }

    /// The lines of a file in the folder.
    fn file(&mut self, folder: &Path, name: &str) -> Result<Arc<Options>> {
        let is_part = |part: &str| !part.is_empty() && !part.starts_with('.');
        if !name.split('/').all(is_part) || name.contains(['\\', '*']) {
            return Err(Error::usage(format!("__{name}__ is no file in --wildcards")));
        }
        let path = folder.join(format!("{name}.txt"));
        if let Some(known) = self.files.get(&path) {
            return Ok(Arc::clone(known));
        }
        if self.reading.contains(&path) {
            return Err(Error::usage(format!("__{name}__ names itself, in {}", path.display())));
        }
        if self.reading.len() >= MAX_DEPTH || self.files.len() >= MAX_FILES {
            return Err(Error::usage(format!(
                "__{name}__: more than {MAX_DEPTH} files that name each other, or {MAX_FILES} files"
            )));
        }
        self.reading.push(path.clone());
        let options = self
            .read_lines(&path)
            .and_then(|lines| self.options_of(&lines, folder))
            .map_err(|error| error.context(format!("__{name}__ ({})", path.display())))?;
        self.reading.pop();
        let options = Arc::new(options);
        self.files.insert(path, Arc::clone(&options));
        Ok(options)
    }

    fn read_lines(&self, path: &Path) -> Result<String> {
        match self.surroundings.at(path) {
            At::File => {}
            At::Nothing => return Err(Error::usage("there is no such file")),
            At::Folder | At::Device => return Err(Error::usage("it is not a file")),
        }
        let bytes = self.surroundings.read_file(path, MAX_FILE_BYTES);
        let bytes = bytes.map_err(|error| Error::usage(error.to_string()))?;
        if bytes.len() > MAX_FILE_BYTES {
            return Err(Error::usage(format!("it is larger than {MAX_FILE_BYTES} bytes")));
        }
        String::from_utf8(bytes).map_err(|_| Error::usage("it is not UTF-8"))
    }

    /// One for each line; `#` begins a comment.
    fn options_of(&mut self, text: &str, folder: &Path) -> Result<Options> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let lines = text.lines().map(str::trim);
        let mut options = Vec::new();
        for line in lines.filter(|line| !line.is_empty() && !line.starts_with('#')) {
            options.push(weighted(self.parse(line, Some(folder))?));
        }
        if options.is_empty() {
            return Err(Error::usage("there is no line in it"));
        }
        Options::new(options)
    }
}

/// What stands in braces, as far as it was read.
#[derive(Default)]
struct Group {
    /// Those that a `|` has ended.
    options: Vec<Vec<Node>>,
    nodes: Vec<Node>,
}

impl Group {
    fn push_text(&mut self, text: &str) {
        match self.nodes.last_mut() {
            Some(Node::Text(last)) => last.push_str(text),
            Some(Node::OneOf(_)) | None => self.nodes.push(Node::Text(text.to_owned())),
        }
    }

    fn push(&mut self, node: Node) {
        match node {
            Node::Text(text) => self.push_text(&text),
            node @ Node::OneOf(_) => self.nodes.push(node),
        }
    }

    /// One of several; what is alone in braces stays as it is written.
    fn close(mut self) -> Result<Vec<Node>> {
        if self.options.is_empty() {
            let mut whole = Group::default();
            whole.push_text("{");
            self.nodes.into_iter().for_each(|node| whole.push(node));
            whole.push_text("}");
            return Ok(whole.nodes);
        }
        self.options.push(self.nodes);
        if let Some([Node::Text(first), ..]) = self.options.first().map(Vec::as_slice)
            && let Some((count, _)) = first.split_once("$$")
        {
            let shown: String = count.trim().chars().take(20).collect();
            return Err(Error::usage(format!(
                "{{{shown}$$…}}, several of the alternatives at once, is not read; \\$ is a dollar"
            )));
        }
        let options = self.options.into_iter().map(weighted).collect();
        Ok(vec![Node::OneOf(Arc::new(Options::new(options)?))])
    }

    /// What was read, as it was written.
    fn into_text(self) -> Vec<Node> {
        let mut whole = Group::default();
        for option in self.options {
            option.into_iter().for_each(|node| whole.push(node));
            whole.push_text("|");
        }
        self.nodes.into_iter().for_each(|node| whole.push(node));
        whole.nodes
    }
}

/// An option, and how likely it is: `2::` at its beginning, or 1.
fn weighted(mut nodes: Vec<Node>) -> (f64, Vec<Node>) {
    if let Some(Node::Text(text)) = nodes.first_mut()
        && let Some((number, rest)) = text.split_once("::")
        && let Ok(weight) = number.trim().parse::<f64>()
        && (0.0..=1e6).contains(&weight)
    {
        *text = rest.to_owned();
        return (weight, nodes);
    }
    (1.0, nodes)
}

/// The name between double underscores at the beginning of a text.
fn wildcard(text: &str) -> Option<&str> {
    let (name, _) = text.strip_prefix("__")?.split_once("__")?;
    let is_allowed = |c: char| c.is_alphanumeric() || "_-./\\*".contains(c);
    (!name.is_empty() && name.chars().all(is_allowed)).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::surroundings::tests::Fake;

    fn fake(files: &[(&'static str, &str)]) -> Fake {
        let there = files.iter().map(|(name, _)| (*name, At::File)).collect();
        let files = files.iter().map(|(name, text)| (*name, text.as_bytes().to_vec())).collect();
        Fake { there, files, ..Fake::default() }
    }

    /// All that seeds choose, each with how often.
    fn chosen(prompt: &str, files: &[(&'static str, &str)], seeds: u64) -> BTreeMap<String, u64> {
        let fake = fake(files);
        let template = Wildcards::new(&fake).read(prompt, Some(Path::new("w"))).unwrap();
        let mut found = BTreeMap::new();
        for seed in 0..seeds {
            let text = match &template {
                Some(template) => template.resolve("prompt", seed),
                None => prompt.to_owned(),
            };
            *found.entry(text).or_default() += 1;
        }
        found
    }

    fn check(prompt: &str, files: &[(&'static str, &str)], expected: &[&str]) {
        let found = chosen(prompt, files, 200);
        let found: Vec<_> = found.keys().map(String::as_str).collect();
        assert_eq!(found, expected, "{prompt:?}");
    }

    #[test]
    fn every_alternative_is_chosen_and_nothing_else() {
        check("a {red|blue} fox", &[], &["a blue fox", "a red fox"]);
        check("{a|b{c|d}}", &[], &["a", "bc", "bd"]);
        check("{a|}x", &[], &["ax", "x"]);
        check("{|||}", &[], &[""]);
        check("{0::a|b|0::c}", &[], &["b"]);
        let files =
            [("w/color.txt", "red\n# no\n\n  blue \n"), ("w/a/b.txt", "\u{feff}{x|y} __color__")];
        check("__color__!", &files, &["blue!", "red!"]);
        check("__a/b__", &files, &["x blue", "x red", "y blue", "y red"]);
        check("{__color__|z}", &files, &["blue", "red", "z"]);
    }

    #[test]
    fn what_is_no_alternative_stays_as_it_is() {
        let texts = "a fox\n{a fox}\n{{a}}\na|b\na}b|c{\n{a|b\nx{y{a|b\n\\{a|b\\}\n{a\\|b}\n\
                     a_b __c d__ _\n__ __\n____\n\\\né_";
        for text in texts.split('\n') {
            check(text, &[], &[text]);
        }
        // Escapes stay as they are, for the syntax that reads the text.
        check(r"{a\}|b}", &[], &[r"a\}", "b"]);
        let template = Wildcards::new(&fake(&[])).read("__color__", None).unwrap();
        assert_eq!(template, None, "without a folder it is text");
    }

    #[test]
    fn weights_are_how_often_and_a_seed_always_chooses_the_same() {
        let found = chosen("{3::a|b}", &[], 4000);
        assert!((2850..3150).contains(&found["a"]), "{found:?}");
        let template =
            |prompt: &str| Wildcards::new(&fake(&[])).read(prompt, None).unwrap().unwrap();
        // These are promised: pictures are made again by them.
        let letters = template("{a|b|c|d|e|f|g|h}{a|b|c|d|e|f|g|h} {x|y}");
        let found: Vec<_> = [0, 1, 42, u64::MAX].map(|seed| letters.resolve("prompt", seed)).into();
        assert_eq!(found, ["eg y", "bb y", "ha x", "dg y"]);
        assert_ne!(letters.resolve("prompt", 0), letters.resolve("negative prompt", 0));
    }

    #[test]
    fn any_text_is_a_prompt_that_is_no_longer_than_was_said() {
        const SIGNS: [&str; 14] =
            ["{", "}", "|", "::", "2::", "__", "_", "w", "é", "\\", "$$", "0::", " ", "__w__"];
        let fake = fake(&[("w/w.txt", "a{b|}\n{c|d\n2::é")]);
        let mut random = 5_u64;
        for round in 0..3000 {
            let mut prompt = String::new();
            for _ in 0..round % 30 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                prompt.push_str(SIGNS[(random >> 33) as usize % SIGNS.len()]);
            }
            let found = Wildcards::new(&fake).read(&prompt, Some(Path::new("w")));
            let Ok(Some(template)) = found else { continue };
            let most = most_of(&template.0).bytes;
            for seed in 0..4 {
                let text = template.resolve("prompt", seed);
                assert!(text.len() <= most, "{prompt:?} became {text:?}, longer than {most}");
            }
        }
    }

    #[test]
    fn what_cannot_be_chosen_from_is_one_line() {
        let long = "x".repeat(MAX_FILE_BYTES + 1);
        let wide = "{a|b}".repeat(100);
        let files = [
            ("w/self.txt", "a\n__self__"),
            ("w/one.txt", "__two__"),
            ("w/two.txt", "__one__"),
            ("w/empty.txt", "# nothing\n"),
            ("w/long.txt", &long),
            ("w/wide.txt", &wide),
            ("w/wider.txt", "__wide__ __wide__ __wide__ __wide__ __wide__ __wide__ __wide__"),
            ("w/widest.txt", &"__wider__".repeat(40)),
        ];
        let fake = fake(&files);
        let deep = "{".repeat(MAX_DEPTH + 1);
        for (prompt, expected) in [
            ("__none__", "__none__ (w/none.txt): there is no such file"),
            ("__../x__", "__../x__ is no file in --wildcards"),
            ("__/etc/x__", "__/etc/x__ is no file in --wildcards"),
            ("__a//b__", "__a//b__ is no file"),
            ("__.x__", "__.x__ is no file"),
            ("__a*__", "__a*__ is no file"),
            (r"__a\b__", r"__a\b__ is no file"),
            ("__self__", "__self__ names itself"),
            ("__one__", "__one__ names itself"),
            ("__empty__", "there is no line in it"),
            ("__long__", "larger than 1048576 bytes"),
            ("__widest__", "more than 10000"),
            ("{2$$a|b}", "{2$$…}, several of the alternatives at once, is not read"),
            ("{0::a|0::b}", "one at least must be possible"),
            (&deep, "more than 16 braces"),
        ] {
            let error = Wildcards::new(&fake).read(prompt, Some(Path::new("w"))).unwrap_err();
            let message = error.to_string();
            assert!(message.contains(expected) && !message.contains('\n'), "{message}");
        }
    }
}
