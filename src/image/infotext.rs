//! The text chunk `parameters` read back: of AUTOMATIC1111's web UI, of stable-diffusion.cpp, and
//! of everybody who writes like them. Separate because what is written has one form and what is
//! read has many.
//!
//! The format is a prompt, perhaps of several lines, perhaps `Negative prompt: …`, and one line of
//! named values. It cannot say that a line of the prompt itself begins with `Negative prompt:`.

/// How the negative prompt begins, at the start of a line.
const NEGATIVE: &str = "Negative prompt:";
/// The line of named values has at least so many.
const LEAST_VALUES: usize = 3;

/// What such a text says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Infotext {
    /// The prompt, as it was written.
    pub prompt: String,
    /// The negative prompt; empty for none.
    pub negative_prompt: String,
    /// The named values in their order, such as `Steps` and `25`.
    pub values: Vec<(String, String)>,
}

impl Infotext {
    /// Reads any text; of one in another form all is the prompt.
    pub fn parse(text: &str) -> Self {
        let text = text.replace("\r\n", "\n");
        let lines: Vec<&str> = text.split('\n').collect();
        let has_values = |line: &&str| values(line).len() >= LEAST_VALUES;
        // Extensions write lines behind it, and a prompt may have anything: the last that begins
        // as both programs' do, or else the last line.
        let place = lines.iter().rposition(|line| line.starts_with("Steps: ") && has_values(line));
        let place = place.or_else(|| {
            let last = lines.iter().rposition(|line| !line.trim().is_empty())?;
            lines.get(last).filter(|line| has_values(line)).map(|_| last)
        });
        let (prompts, values) = match place {
            Some(place) => (lines.get(..place).unwrap_or_default(), values(lines[place])),
            None => (&*lines, Vec::new()),
        };
        let (prompt, negative) = match prompts.iter().position(|line| line.starts_with(NEGATIVE)) {
            Some(place) => prompts.split_at(place),
            None => (prompts, &[][..]),
        };
        let negative = negative.join("\n");
        let negative = negative.strip_prefix(NEGATIVE).unwrap_or_default();
        Self {
            prompt: prompt.join("\n"),
            negative_prompt: negative.strip_prefix(' ').unwrap_or(negative).to_owned(),
            values,
        }
    }

    /// The value of this name; of several the last, as AUTOMATIC1111 takes it.
    pub fn get(&self, name: &str) -> Option<&str> {
        let found = self.values.iter().rev().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// `Name: value, Name: "a value, quoted", …`; what has no name is skipped.
fn values(line: &str) -> Vec<(String, String)> {
    let mut values = Vec::new();
    let mut rest = line;
    while !rest.is_empty() {
        let end = rest.find([',', ':']).unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        let Some(after) = after.strip_prefix(':') else {
            rest = after.strip_prefix(',').unwrap_or(after);
            continue;
        };
        let after = after.trim_start();
        let quoted = quoted_len(after).and_then(|len| {
            let (value, behind) = after.split_at(len);
            let is_whole = behind.is_empty() || behind.starts_with(',');
            Some((serde_json::from_str::<String>(value).ok().filter(|_| is_whole)?, behind))
        });
        let (value, behind) = quoted.unwrap_or_else(|| {
            let (value, behind) = after.split_at(after.find(',').unwrap_or(after.len()));
            (value.trim_end().to_owned(), behind)
        });
        if is_name(name.trim()) {
            values.push((name.trim().to_owned(), value));
        }
        rest = behind.strip_prefix(',').unwrap_or(behind);
    }
    values
}

/// Letters, digits, spaces and `-/_`, the first of them a letter or digit.
fn is_name(name: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    name.starts_with(is_word) && name.chars().all(|c| is_word(c) || " -/".contains(c))
}

/// The length of the JSON string that a text begins with.
fn quoted_len(text: &str) -> Option<usize> {
    let mut is_escaped = false;
    for (at, c) in text.strip_prefix('"')?.char_indices() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            '"' => return Some(at + 2),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::{ImageSize, Parameters};
    use super::*;

    fn check(text: &str, prompt: &str, negative_prompt: &str, expected: &[(&str, &str)]) {
        let found = Infotext::parse(text);
        assert_eq!((&*found.prompt, &*found.negative_prompt), (prompt, negative_prompt), "{text}");
        for (name, value) in expected {
            assert_eq!(found.get(name), Some(*value), "{name} of {text}");
        }
    }

    #[test]
    fn what_automatic1111_writes_is_read() {
        check(
            "masterpiece, a fox (red:1.2)\nin snow\nNegative prompt: blurry, text\nworst quality\n\
             Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, \
             Size: 512x768, Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Clip skip: 2, \
             Lora hashes: \"a: 1, b: 2\", Version: v1.10.1",
            "masterpiece, a fox (red:1.2)\nin snow",
            "blurry, text\nworst quality",
            &[
                ("Steps", "20"),
                ("Sampler", "DPM++ 2M"),
                ("Schedule type", "Karras"),
                ("Seed", "965400086"),
                ("Size", "512x768"),
                ("Lora hashes", "a: 1, b: 2"),
                ("Version", "v1.10.1"),
            ],
        );
        // An extension's lines behind it.
        check(
            "a fox\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1\nTemplate: {a|b} fox",
            "a fox",
            "",
            &[("Sampler", "Euler a")],
        );
    }

    #[test]
    fn what_stable_diffusion_cpp_writes_is_read() {
        check(
            "a fox\nNegative prompt: blurry\nSteps: 20, CFG scale: 7.000000, SLG scale: 2.5, \
             Skip layers: [7, 8, 9, ], Guidance: 3.500000, Eta: 0.000000, Seed: 42, \
             Size: 512x512, Model: sd.gguf, RNG: cuda, Sampler: euler_a karras, \
             Version: stable-diffusion.cpp",
            "a fox",
            "blurry",
            &[
                ("CFG scale", "7.000000"),
                ("Seed", "42"),
                ("Sampler", "euler_a karras"),
                ("Version", "stable-diffusion.cpp"),
            ],
        );
        check("\nSteps: 1, CFG scale: 1.0, Seed: 5, Size: 8x8", "", "", &[("Seed", "5")]);
    }

    #[test]
    fn a_text_in_another_form_is_a_prompt() {
        for text in ["", "a fox", "a: b, c: d", "\n\n", "Steps: 3", "Negative prompt:"] {
            let negative = text.starts_with(NEGATIVE);
            check(text, if negative { "" } else { text }, "", &[]);
        }
        let odd = "Steps: 1, : 2, \"x\": 3, a: \"b, c: \"d\"e, -f: 1, Seed: \"\\ud800\", Size: 1x1";
        let found = Infotext::parse(odd);
        assert_eq!(found.get("a"), Some("\"b"));
        assert_eq!(found.get("Seed"), Some("\"\\ud800\""));
    }

    /// A generator of the tests' own, so that a failure says its seed.
    fn random(state: &mut u64) -> usize {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (*state >> 33) as usize
    }

    #[test]
    fn any_prompt_that_the_format_can_hold_comes_back_as_it_was() {
        const PIECES: [&str; 19] = [
            "a",
            " ",
            "\n",
            "\"",
            ", ",
            ": ",
            "\\",
            "é",
            "東",
            "\t",
            "Steps: 3, Sampler: x, CFG scale: 2, Seed: 1",
            "Steps: ",
            "Negative prompt",
            "x Negative prompt: ",
            "Version: 1",
            "{}",
            "\u{200b}",
            "👩‍🎨",
            "(a:1.2)",
        ];
        for seed in 0..20_000 {
            let mut state = seed;
            let mut text = |longest: usize| -> String {
                let len = random(&mut state) % longest;
                (0..len).map(|_| PIECES[random(&mut state) % PIECES.len()]).collect()
            };
            let (prompt, negative_prompt, model) = (text(9), text(9), text(5));
            if prompt.lines().any(|line| line.starts_with(NEGATIVE)) {
                continue;
            }
            let before = Parameters {
                prompt,
                negative_prompt,
                steps: seed as usize % 1000,
                sampler: "DPM++ 2M".into(),
                schedule_type: (seed % 2 == 0).then(|| "Karras".into()),
                guidance_scale: seed as f64 / 7.0,
                seed: u64::MAX - seed,
                size: ImageSize { height: 8, width: 16 },
                model,
                clip_skip: 0,
                denoising_strength: None,
            };
            let found = Infotext::parse(&before.to_string());
            assert_eq!(found.prompt, before.prompt, "seed {seed}");
            assert_eq!(found.negative_prompt, before.negative_prompt, "seed {seed}");
            assert_eq!(found.get("Seed"), Some(&*before.seed.to_string()), "seed {seed}");
            let scale: f64 = found.get("CFG scale").unwrap().parse().unwrap();
            assert_eq!(scale.to_bits(), before.guidance_scale.to_bits(), "seed {seed}");
            let schedule_type = before.schedule_type.as_deref();
            assert_eq!(found.get("Schedule type"), schedule_type, "seed {seed}");
            assert_eq!(found.get("Steps"), Some(&*before.steps.to_string()), "seed {seed}");
            // Plain values lose the spaces at their ends, and what looks quoted its quotes.
            let model = &before.model;
            let is_plain = model.trim() == model && !model.starts_with('"');
            let kept = model.contains([',', '\n', ':']) || is_plain;
            assert!(!kept || found.get("Model") == Some(model), "seed {seed}: {model:?}");
        }
    }
}
