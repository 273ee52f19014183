//! AUTOMATIC1111's prompt syntax: which part of a prompt has which weight. Separate because it is
//! text in, text out, and any text is a prompt.
//!
//! `(word)` weighs 1.1 times as much, `[word]` 1/1.1 times, `(word:1.3)` 1.3 times, also within
//! each other; `\(` and the like are the characters themselves, `BREAK` begins another chunk.
//! Brackets that are never closed reach to the end, those that were never opened are text.

use crate::error::{Error, Result};

/// What a pair of round brackets does; square ones divide by it.
const STEP: f64 = 1.1;
/// Most brackets that are open at once: deeper ones would weigh 10¹⁰ times as much.
const MAX_OPEN: usize = 256;
/// The largest weight either way. Beyond a few nothing is left of the picture.
const MAX_WEIGHT: f64 = 1000.0;

/// A part of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Part {
    /// Text, and how much of it there is: 1 is as much as without brackets.
    Text(String, f64),
    /// What follows is in another chunk.
    Break,
}

/// The parts of a prompt, at least one; neighbours differ in their weight.
///
/// # Errors
/// If a weight is beyond ±1000, or more than 256 brackets are open at once.
pub(super) fn parts(prompt: &str) -> Result<Vec<Part>> {
    let mut parser = Parser::default();
    let mut rest = prompt;
    while let Some(c) = rest.chars().next() {
        rest = parser.take(c, rest)?;
    }
    parser.finish()
}

#[derive(Default)]
struct Parser {
    parts: Vec<Part>,
    /// The parts there were when each bracket was opened.
    round: Vec<usize>,
    square: Vec<usize>,
}

impl Parser {
    /// Takes what begins with `c`, and gives back what follows it.
    fn take<'t>(&mut self, c: char, text: &'t str) -> Result<&'t str> {
        let behind = text.get(c.len_utf8()..).unwrap_or_default();
        match c {
            '\\' => {
                let escaped = behind.chars().next().filter(|c| "()[]\\".contains(*c));
                self.push(escaped.map(String::from).unwrap_or_default());
                return Ok(behind.get(escaped.map_or(0, char::len_utf8)..).unwrap_or_default());
            }
            '(' => open(&mut self.round, self.parts.len())?,
            '[' => open(&mut self.square, self.parts.len())?,
            ':' => match (weight(behind), self.round.pop()) {
                (Some((weight, rest)), Some(from)) => {
                    self.multiply(from, weight);
                    return Ok(rest);
                }
                (_, popped) => {
                    self.round.extend(popped);
                    self.push(":".to_owned());
                }
            },
            ')' => match self.round.pop() {
                Some(from) => self.multiply(from, STEP),
                None => self.push(")".to_owned()),
            },
            ']' => match self.square.pop() {
                Some(from) => self.multiply(from, 1.0 / STEP),
                None => self.push("]".to_owned()),
            },
            _ => {
                let end = text.find(['\\', '(', ')', '[', ']', ':']).unwrap_or(text.len());
                let (plain, rest) = text.split_at(end);
                self.push_with_breaks(plain);
                return Ok(rest);
            }
        }
        Ok(behind)
    }

    fn push(&mut self, text: String) {
        self.parts.push(Part::Text(text, 1.0));
    }

    /// `BREAK` is a word by itself, and takes the spaces around it along.
    fn push_with_breaks(&mut self, text: &str) {
        const WORD: &str = "BREAK";
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let mut start = 0;
        let breaks = text.match_indices(WORD).filter(|(at, word)| {
            let (before, after) = (text.get(..*at), text.get(at.saturating_add(word.len())..));
            let before = before.and_then(|before| before.chars().next_back());
            let after = after.and_then(|after| after.chars().next());
            !before.is_some_and(is_word) && !after.is_some_and(is_word)
        });
        let mut is_after_break = false;
        let mut between = |text: &str, is_after_break: bool, is_before_break: bool| {
            let text = if is_after_break { text.trim_start() } else { text };
            let text = if is_before_break { text.trim_end() } else { text };
            self.parts.push(Part::Text(text.to_owned(), 1.0));
            self.parts.extend(is_before_break.then_some(Part::Break));
        };
        for (at, word) in breaks {
            between(text.get(start..at).unwrap_or_default(), is_after_break, true);
            (start, is_after_break) = (at.saturating_add(word.len()), true);
        }
        between(text.get(start..).unwrap_or_default(), is_after_break, false);
    }

    fn multiply(&mut self, from: usize, by: f64) {
        for part in self.parts.iter_mut().skip(from) {
            if let Part::Text(_, weight) = part {
                *weight *= by;
            }
        }
    }

    fn finish(mut self) -> Result<Vec<Part>> {
        for from in std::mem::take(&mut self.round) {
            self.multiply(from, STEP);
        }
        for from in std::mem::take(&mut self.square) {
            self.multiply(from, 1.0 / STEP);
        }
        let mut merged: Vec<Part> = Vec::new();
        for part in self.parts {
            match (merged.last_mut(), part) {
                (Some(Part::Text(text, weight)), Part::Text(more, same)) if *weight == same => {
                    text.push_str(&more);
                }
                (_, part) => merged.push(part),
            }
        }
        if merged.is_empty() {
            merged.push(Part::Text(String::new(), 1.0));
        }
        let too_large = merged.iter().find_map(|part| match part {
            Part::Text(_, weight) if weight.abs() <= MAX_WEIGHT => None,
            Part::Text(text, weight) => Some((text, weight)),
            Part::Break => None,
        });
        match too_large {
            Some((text, weight)) => {
                let shown: String = text.trim().chars().take(40).collect();
                Err(Error::usage(format!(
                    "{shown:?} has the weight {weight:.0}, beyond ±{MAX_WEIGHT}"
                )))
            }
            None => Ok(merged),
        }
    }
}

fn open(brackets: &mut Vec<usize>, parts: usize) -> Result<()> {
    if brackets.len() >= MAX_OPEN {
        return Err(Error::usage(format!("more than {MAX_OPEN} brackets are open at once")));
    }
    brackets.push(parts);
    Ok(())
}

/// The weight that ends a bracket, behind its colon, and what follows the bracket.
fn weight(text: &str) -> Option<(f64, &str)> {
    let text = text.trim_start();
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let behind = unsigned.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
    let number = text.get(..text.len().checked_sub(behind.len())?)?;
    Some((number.parse().ok()?, behind.trim_start().strip_prefix(')')?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `text*weight` of each part, `|` for a break.
    fn check(prompt: &str, expected: &[(&str, f64)]) {
        let found: Vec<(String, f64)> = parts(prompt)
            .unwrap()
            .into_iter()
            .map(|part| match part {
                Part::Text(text, weight) => (text, weight),
                Part::Break => ("|".to_owned(), -1.0),
            })
            .collect();
        assert_eq!(found.len(), expected.len(), "{prompt:?}: {found:?}");
        for ((text, weight), (expected_text, expected_weight)) in found.iter().zip(expected) {
            assert_eq!(text, expected_text, "{prompt:?}");
            assert!((weight - expected_weight).abs() < 1e-12, "{prompt:?}: {text} {weight}");
        }
    }

    /// The examples of parse_prompt_attention's own description, and its corners.
    #[test]
    fn brackets_weigh_what_they_enclose() {
        check("normal text", &[("normal text", 1.0)]);
        check("an (important) word", &[("an ", 1.0), ("important", 1.1), (" word", 1.0)]);
        check("(unbalanced", &[("unbalanced", 1.1)]);
        check(r"\(literal\]", &[("(literal]", 1.0)]);
        check("(unnecessary)(parens)", &[("unnecessaryparens", 1.1)]);
        check(
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            &[
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        );
        check("", &[("", 1.0)]);
        check("()", &[("", 1.0)]);
        check("a) b] c: d", &[("a) b] c: d", 1.0)]);
        check("(a:b:1.5)", &[("a:b", 1.5)]);
        check("(a: -0.5 )b", &[("a", -0.5), ("b", 1.0)]);
        check("x:1.2)", &[("x:1.2)", 1.0)]);
        check("(x:1.2.3)", &[("x:1.2.3", 1.1)]);
        check("(x:1e3)", &[("x:1e3", 1.1)]);
        check("(x:.)", &[("x:.", 1.1)]);
        check(r"\\(a\b\", &[("\\", 1.0), ("ab", 1.1)]);
        check("[a:0.5]", &[("a:0.5", 1.0 / 1.1)]);
        check("(猫:2)は", &[("猫", 2.0), ("は", 1.0)]);
    }

    #[test]
    fn break_is_a_word_of_its_own() {
        check("a BREAK b", &[("a", 1.0), ("|", -1.0), ("b", 1.0)]);
        check("BREAK", &[("", 1.0), ("|", -1.0), ("", 1.0)]);
        check("aBREAK BREAK_ break", &[("aBREAK BREAK_ break", 1.0)]);
        check("a\nBREAK\tBREAK,b", &[("a", 1.0), ("|", -1.0), ("", 1.0), ("|", -1.0), (",b", 1.0)]);
        check("(a BREAK b:2)", &[("a", 2.0), ("|", -1.0), ("b", 2.0)]);
    }

    #[test]
    fn what_would_weigh_too_much_is_one_line() {
        let nested = format!("{}x", "(".repeat(80));
        let deep = "[".repeat(MAX_OPEN + 1);
        for (prompt, expected) in [
            ("(a b:1001)", "\"a b\" has the weight 1001, beyond ±1000"),
            ("((a:999.9):-999)", "beyond ±1000"),
            (&nested, "beyond ±1000"),
            (&deep, "more than 256 brackets"),
        ] {
            let error = parts(prompt).unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains('\n'), "{error}");
        }
        // Numbers of any length are numbers.
        let long = format!("(a:{})", "9".repeat(400));
        assert!(parts(&long).unwrap_err().to_string().contains("the weight inf"));
    }

    #[test]
    fn any_text_has_parts_that_keep_its_letters() {
        const SIGNS: [&str; 12] =
            ["(", ")", "[", "]", ":", "\\", "1.2)", " BREAK ", "é", "猫", "x ", ":1)"];
        let mut random = 11_u64;
        for seed in 0..3000 {
            let mut prompt = String::new();
            for _ in 0..seed % 40 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                prompt.push_str(SIGNS[(random >> 33) as usize % SIGNS.len()]);
            }
            let Ok(parts) = parts(&prompt) else { continue };
            let text = |part: &Part| match part {
                Part::Text(text, _) => text.clone(),
                Part::Break => String::new(),
            };
            let text: String = parts.iter().map(text).collect();
            for letter in ['é', '猫', 'x'] {
                let count = |text: &str| text.matches(letter).count();
                assert_eq!(count(&text), count(&prompt), "{prompt:?}");
            }
        }
    }
}
