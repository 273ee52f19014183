//! `defaults.json` of a model: what flags are where nobody gives them. Separate because a command
//! line needs it before there is a model, and whoever describes one says it.

use serde_json::{Map, Value};

use super::json;
use crate::error::{Error, Result};

/// The file's name in the model's folder.
pub const FILE: &str = "defaults.json";
/// The flags that it may say something of: how the model was made to be used. No other, since the
/// folder may be a stranger's.
const FLAGS: [&str; 3] = ["steps", "guidance-scale", "scheduler"];

/// What a file's text says, by the names of flags: texts and numbers.
///
/// # Errors
/// If it is no object of JSON, or a flag has something else.
pub fn parse(text: &str) -> Result<Map<String, Value>> {
    let Value::Object(mut found) = json::parse(text)? else {
        return Err(Error::model("it is no JSON object"));
    };
    found.retain(|name, _| FLAGS.contains(&name.as_str()));
    match found.iter().find(|(_, value)| !value.is_number() && !value.is_string()) {
        Some((name, _)) => Err(Error::model(format!("{name} is neither a number nor a text"))),
        None => Ok(found),
    }
}

/// A value as it would be typed.
pub fn typed(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_says_something_of_its_own_flags_and_of_no_others() {
        let found = parse(
            r#"{"steps": 20, "guidance-scale": 3.0, "scheduler": "ddim", "output": "x", "n": []}"#,
        );
        let found = found.unwrap();
        let found: Vec<_> = found.iter().map(|(name, value)| (&**name, typed(value))).collect();
        let expected = [("guidance-scale", "3.0"), ("scheduler", "ddim"), ("steps", "20")];
        assert_eq!(found, expected.map(|(name, value)| (name, value.to_owned())));
        for (text, expected) in [
            ("", "line 1: "),
            ("[]", "it is no JSON object"),
            (r#"{"steps": [3]}"#, "steps is neither a number nor a text"),
            (r#"{"steps": null}"#, "steps is neither a number nor a text"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }
}
