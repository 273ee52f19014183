//! `--grid NAME=V,V,…`: what differs from picture to picture. Separate because values are read here
//! and become settings by the parsers of the flags of those names.

use std::str::FromStr;

use clap::builder::Resettable;
use clap::{Args as _, Command, FromArgMatches};
use serde::{Deserialize, Serialize};

use super::MAX_CELLS;
use crate::cli::args::PictureArgs;

/// What AUTOMATIC1111 calls Prompt S/R: the first value stands in the prompts, and the others take
/// its place.
const REPLACE: &str = "prompt-sr";
/// The flags that may differ in one sheet: those that leave the model and the size as they are.
const FLAGS: [&str; 6] = ["steps", "guidance-scale", "scheduler", "seed", "strength", "clip-skip"];
/// Those of them that take decimal places.
const DECIMAL: [&str; 2] = ["guidance-scale", "strength"];
/// Longest axis, in bytes.
const MAX_BYTES: usize = 64 << 10;

/// One direction of a sheet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Axis {
    /// The flag's name, or `prompt-sr`.
    pub name: String,
    /// What it has, in this order, each as the flag takes it.
    pub values: Vec<String>,
}

impl Axis {
    /// The label of a value.
    pub fn label(&self, value: &str) -> String {
        match self.name == REPLACE {
            true => value.to_owned(),
            false => format!("{}: {value}", self.name),
        }
    }

    /// A picture's flags and its prompt with a value in them.
    ///
    /// # Errors
    /// If the flag does not take it, or the prompts do not have what it is to replace.
    pub fn put(
        &self,
        value: &str,
        picture: &mut PictureArgs,
        prompt: &mut String,
    ) -> Result<(), String> {
        if self.name != REPLACE {
            return put(&self.name, value, picture);
        }
        let searched = self.values.first().map_or("", |first| first);
        let negative_prompt = &mut picture.negative_prompt;
        if !prompt.contains(searched) && !negative_prompt.contains(searched) {
            return Err(format!("{REPLACE}: neither prompt has its first value, {searched:?}"));
        }
        *prompt = prompt.replace(searched, value);
        *negative_prompt = negative_prompt.replace(searched, value);
        Ok(())
    }
}

impl FromStr for Axis {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((name, list)) = text.split_once('=') else {
            return Err("it is no NAME=VALUE,VALUE,…; the prompt goes before --grid".into());
        };
        if text.len() > MAX_BYTES {
            return Err(format!("an axis has at most {MAX_BYTES} bytes"));
        }
        let name = known(name)?;
        let listed = listed(list)?;
        let values = match (name, &*listed) {
            (REPLACE | "scheduler", _) => listed,
            _ => listed
                .iter()
                .map(|value| range(name, value))
                .collect::<Result<Vec<_>, _>>()?
                .concat(),
        };
        if values.len() > MAX_CELLS {
            return Err(format!("{name} has {} values, at most {MAX_CELLS}", values.len()));
        }
        for value in values.iter().filter(|_| name != REPLACE) {
            put(name, value, &mut no_flags()?)?;
        }
        Ok(Self { name: name.into(), values })
    }
}

/// The axis that a name means: a flag's own names, or how one of them begins.
fn known(name: &str) -> Result<&'static str, String> {
    let wanted = name.trim().to_lowercase().replace(['_', ' '], "-");
    let command = PictureArgs::augment_args(Command::new("grid"));
    let names = |flag: &'static str| -> Vec<String> {
        let found = command.get_arguments().find(|known| known.get_long() == Some(flag));
        let aliases = found.and_then(clap::Arg::get_all_aliases).unwrap_or_default();
        let names = aliases.into_iter().chain([flag]);
        names.map(str::to_owned).collect()
    };
    let all = || FLAGS.into_iter().chain([REPLACE]);
    let exact = all().find(|flag| names(flag).contains(&wanted));
    let is_meant = |flag: &&'static str| names(flag).iter().any(|name| name.starts_with(&wanted));
    let near: Vec<_> = all().filter(|flag| !wanted.is_empty() && is_meant(flag)).collect();
    match (exact, &*near) {
        (Some(flag), _) => Ok(flag),
        (None, [flag]) => Ok(flag),
        (None, _) => {
            let known = all().collect::<Vec<_>>().join(", ");
            Err(format!("{name:?} is no axis (known: {known})"))
        }
    }
}

/// The flags of a picture with nothing but one.
fn put(name: &str, value: &str, picture: &mut PictureArgs) -> Result<(), String> {
    let command = Command::new("grid").no_binary_name(true).disable_help_flag(true);
    let command = PictureArgs::augment_args_for_update(command);
    let command = command.mut_args(|flag| flag.default_value(Resettable::Reset));
    let found = command.try_get_matches_from([format!("--{name}={value}")]);
    found.and_then(|matches| picture.update_from_arg_matches(&matches)).map_err(|error| {
        let reason = std::error::Error::source(&error).map(ToString::to_string);
        format!("{name} {value:?}: {}", reason.unwrap_or_else(|| "it is no value".into()))
    })
}

fn no_flags() -> Result<PictureArgs, String> {
    let command = PictureArgs::augment_args(Command::new("grid").no_binary_name(true));
    let found = command.try_get_matches_from([""; 0]);
    found
        .and_then(|matches| PictureArgs::from_arg_matches(&matches))
        .map_err(|error| error.to_string())
}

/// The values of a list: `a,b`, in quotes where they have commas.
fn listed(list: &str) -> Result<Vec<String>, String> {
    let mut values = Vec::new();
    let mut rest = list.trim();
    loop {
        let (value, behind) = match rest.strip_prefix('"') {
            Some(quoted) => {
                let end = quoted.find('"').ok_or_else(|| format!("{rest:?}: a quote is open"))?;
                let (value, behind) = quoted.split_at(end);
                (value, behind.get(1..).unwrap_or_default().trim_start())
            }
            None => {
                let (value, behind) = rest.split_at(rest.find(',').unwrap_or(rest.len()));
                (value.trim_end(), behind)
            }
        };
        if value.is_empty() {
            return Err("a value is empty".into());
        }
        values.push(value.to_owned());
        match (behind.is_empty(), behind.strip_prefix(',')) {
            (true, _) => return Ok(values),
            (false, Some(next)) => rest = next.trim_start(),
            (false, None) => return Err(format!("{behind:?} behind a quote")),
        }
    }
}

/// AUTOMATIC1111's ranges: `1-5`, `1-9(+2)`, `9-1(-2)`, and `1-10[4]`, so many values.
fn range(name: &str, value: &str) -> Result<Vec<String>, String> {
    let Some(Range { first, last, step }) = Range::read(value) else {
        return Ok(vec![value.to_owned()]);
    };
    let too_many = || format!("{value}: more than {MAX_CELLS} values");
    // Whole numbers stay exact, whatever their size; the others have this many parts in one.
    let parts = if DECIMAL.contains(&name) { PARTS } else { 1 };
    let is_whole = [first, last].iter().all(|number| number.fract == 0) && step.is_whole();
    if parts == 1 && !is_whole {
        return Ok(vec![value.to_owned()]);
    }
    let scaled = |number: Number| {
        number.whole.checked_mul(parts)?.checked_add(number.fract.checked_mul(parts)? / PARTS)
    };
    let (Some(first), Some(last)) = (scaled(first), scaled(last)) else { return Err(too_many()) };
    let numbers: Vec<i128> = match step {
        Steps::By(step, sign) => {
            let step = scaled(step).unwrap_or_default() * sign;
            if step == 0 || (last - first).signum() * step.signum() < 0 {
                return Err(format!("{value}: no step leads from the first to the last"));
            }
            let count = usize::try_from((last - first) / step).map_err(|_| too_many())?;
            if count >= MAX_CELLS {
                return Err(too_many());
            }
            (0..=count as i128).map(|at| first + at * step).collect()
        }
        Steps::Number(count @ 2..) if count <= MAX_CELLS as u64 => {
            let between = i128::from(count) - 1;
            (0..=between).map(|at| first + (last - first) * at / between).collect()
        }
        Steps::Number(..2) => return Err(format!("{value}: a range has at least two values")),
        Steps::Number(_) => return Err(too_many()),
    };
    Ok(numbers.into_iter().map(|number| shown(number, parts)).collect())
}

/// Parts in one: so many decimal places are exact.
const PARTS: i128 = 1_000_000;

/// A number of parts, in decimal places.
fn shown(number: i128, parts: i128) -> String {
    if parts == 1 {
        return number.to_string();
    }
    let text = format!("{}.{:06}", number / parts, number % parts);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A range as it is written.
struct Range {
    first: Number,
    last: Number,
    step: Steps,
}

/// How a range goes on.
#[derive(Clone, Copy)]
enum Steps {
    /// By so much, up (1) or down (-1).
    By(Number, i128),
    /// In so many values.
    Number(u64),
}

impl Steps {
    fn is_whole(self) -> bool {
        match self {
            Steps::By(Number { fract, .. }, _) => fract == 0,
            Steps::Number(_) => true,
        }
    }
}

/// A decimal number without a sign.
#[derive(Clone, Copy)]
struct Number {
    whole: i128,
    /// Of [`PARTS`].
    fract: i128,
}

impl Number {
    fn read(text: &str) -> Option<Self> {
        let (whole, fract) = text.trim().split_once('.').unwrap_or((text.trim(), "0"));
        let is_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        if !is_digits(whole) || !is_digits(fract) || fract.len() > 6 || whole.len() > 20 {
            return None;
        }
        Some(Self { whole: whole.parse().ok()?, fract: format!("{fract:0<6}").parse().ok()? })
    }
}

impl Range {
    fn read(text: &str) -> Option<Self> {
        let (first, rest) = text.split_once('-')?;
        let first = Number::read(first)?;
        if let Some((last, count)) =
            rest.trim_end().strip_suffix(']').and_then(|r| r.split_once('['))
        {
            let (last, step) = (Number::read(last)?, Steps::Number(count.trim().parse().ok()?));
            return Some(Self { first, last, step });
        }
        if let Some((last, step)) =
            rest.trim_end().strip_suffix(')').and_then(|r| r.split_once('('))
        {
            let (sign, number) = match step.trim().strip_prefix('-') {
                Some(number) => (-1, number),
                None => (1, step.trim().strip_prefix('+').unwrap_or(step)),
            };
            let step = Steps::By(Number::read(number)?, sign);
            return Some(Self { first, last: Number::read(last)?, step });
        }
        let (last, one) = (Number::read(rest)?, Number { whole: 1, fract: 0 });
        Some(Self { first, last, step: Steps::By(one, 1) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_is_a_flags_name_and_what_the_flag_takes() {
        let check = |text: &str, name: &str, values: &[&str]| {
            let axis: Axis = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!((&*axis.name, &*axis.values), (name, &values.map_owned()[..]), "{text}");
        };
        check("steps=10,20", "steps", &["10", "20"]);
        check("guidance=5, 7.5", "guidance-scale", &["5", "7.5"]);
        check("cfg_scale=5", "guidance-scale", &["5"]);
        check("Sampler=Euler a,\"DPM++ 2M Karras\"", "scheduler", &["Euler a", "DPM++ 2M Karras"]);
        check(
            "seed=18446744073709551614-18446744073709551615",
            "seed",
            &["18446744073709551614", "18446744073709551615"],
        );
        check("seed=5,1-3", "seed", &["5", "1", "2", "3"]);
        check("steps=10-20(+5)", "steps", &["10", "15", "20"]);
        check("steps=20-10 (-4)", "steps", &["20", "16", "12"]);
        check("steps=1-10[4]", "steps", &["1", "4", "7", "10"]);
        check("strength=0.1-0.4(+0.1)", "strength", &["0.1", "0.2", "0.3", "0.4"]);
        check("strength=0-1[5]", "strength", &["0", "0.25", "0.5", "0.75", "1"]);
        check("clip=0,1", "clip-skip", &["0", "1"]);
        check("prompt-sr=red,\"a, b\",1-3", "prompt-sr", &["red", "a, b", "1-3"]);
    }

    trait MapOwned {
        fn map_owned(&self) -> Vec<String>;
    }

    impl MapOwned for &[&str] {
        fn map_owned(&self) -> Vec<String> {
            self.iter().map(|text| (*text).to_owned()).collect()
        }
    }

    #[test]
    fn what_is_no_axis_is_refused_with_the_reason() {
        for (text, expected) in [
            ("a fox", "it is no NAME=VALUE,VALUE,…; the prompt goes before --grid"),
            (
                "width=64,128",
                "\"width\" is no axis (known: steps, guidance-scale, scheduler, seed,",
            ),
            ("s=1", "\"s\" is no axis"),
            ("=1", "\"\" is no axis"),
            ("steps=0", "steps \"0\": a whole number, 1 to 1000"),
            ("steps=5,x", "steps \"x\": a whole number, 1 to 1000"),
            ("scheduler=eular", "did you mean euler?"),
            ("strength=1.5", "strength \"1.5\": a number from 0 to 1"),
            ("steps=", "a value is empty"),
            ("steps=1,,2", "a value is empty"),
            ("prompt-sr=\"a", "a quote is open"),
            ("prompt-sr=\"a\"b", "\"b\" behind a quote"),
            ("seed=1-1000000", "1-1000000: more than 256 values"),
            ("seed=0-99999999999999999999[9999]", "more than 256 values"),
            ("steps=1.5-3", "steps \"1.5-3\": a whole number"),
            ("steps=1-9[1]", "at least two values"),
            ("steps=9-1", "9-1: no step leads from the first to the last"),
            ("steps=1-9(+0)", "no step leads"),
        ] {
            let error = text.parse::<Axis>().unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let many = format!("seed={}", "1,".repeat(300));
        let error = many.trim_end_matches(',').parse::<Axis>().unwrap_err();
        assert_eq!(error, "seed has 300 values, at most 256");
    }

    #[test]
    fn the_first_value_of_prompt_sr_stands_in_the_prompts_and_the_others_take_its_place() {
        let axis: Axis = "prompt-sr=red,blue".parse().unwrap();
        let mut picture = no_flags().unwrap();
        picture.negative_prompt = "dark red".into();
        let mut prompt = "a red fox, red".to_owned();
        axis.put("blue", &mut picture, &mut prompt).unwrap();
        assert_eq!((&*prompt, &*picture.negative_prompt), ("a blue fox, blue", "dark blue"));
        let error = axis.put("green", &mut picture, &mut prompt).unwrap_err();
        assert_eq!(error, "prompt-sr: neither prompt has its first value, \"red\"");
    }
}
