//! Reading a component's config.json into checked types. Separate because every model shares one
//! rule: a field this code does not cover is an error naming it, never a wrong picture.

use std::cell::RefCell;
use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The fields of one config.json, of which each must be asked for or be without effect.
pub struct Fields<'a> {
    file: &'a str,
    object: &'a Map<String, Value>,
    known: RefCell<BTreeSet<String>>,
}

impl<'a> Fields<'a> {
    /// The fields of `file` (its name is for messages).
    ///
    /// # Errors
    /// If the value is no JSON object.
    pub fn new(file: &'a str, value: &'a Value) -> Result<Self> {
        let object = value
            .as_object()
            .ok_or_else(|| Error::model(format!("{file}: expected a JSON object")))?;
        Ok(Self { file, object, known: RefCell::default() })
    }

    /// The field as it stands; `None` if it is missing (an explicit null is `Some(Null)`).
    pub fn raw(&self, name: &str) -> Option<&'a Value> {
        self.known.borrow_mut().insert(name.to_string());
        self.object.get(name)
    }

    /// The field unless it is missing or null.
    fn given(&self, name: &str) -> Option<&'a Value> {
        self.raw(name).filter(|value| !value.is_null())
    }

    /// A count of at least 1 and at most 2²⁰, or the default.
    ///
    /// # Errors
    /// Names the field and what it holds.
    pub fn count(&self, name: &str, default: Option<usize>) -> Result<usize> {
        match (self.given(name), default) {
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.error(name, "is missing")),
            (Some(value), _) => as_count(value).ok_or_else(|| self.unsupported(name, value)),
        }
    }

    /// A list of counts; a lone count stands for `len` equal ones.
    ///
    /// # Errors
    /// Names the field and what it holds.
    pub fn counts(&self, name: &str, default: usize, len: usize) -> Result<Vec<usize>> {
        let counts = match self.given(name) {
            None => Some(vec![default; len]),
            Some(Value::Array(items)) => items.iter().map(as_count).collect(),
            Some(value) => as_count(value).map(|count| vec![count; len]),
        };
        match (counts, self.raw(name)) {
            (Some(counts), _) if counts.len() == len => Ok(counts),
            (_, value) => {
                let value = value.map_or("nothing".to_owned(), Value::to_string);
                Err(self.error(name, &format!("must be a count or {len} of them, not {value}")))
            }
        }
    }

    /// A list of counts whose length is free.
    ///
    /// # Errors
    /// Names the field and what it holds.
    pub fn count_list(&self, name: &str) -> Result<Vec<usize>> {
        let value = self.given(name).ok_or_else(|| self.error(name, "is missing"))?;
        value
            .as_array()
            .filter(|items| (1..=16).contains(&items.len()))
            .and_then(|items| items.iter().map(as_count).collect())
            .ok_or_else(|| self.unsupported(name, value))
    }

    /// A list of names.
    ///
    /// # Errors
    /// Names the field and what it holds.
    pub fn names(&self, name: &str) -> Result<Vec<&'a str>> {
        let value = self.given(name).ok_or_else(|| self.error(name, "is missing"))?;
        value
            .as_array()
            .and_then(|items| items.iter().map(Value::as_str).collect())
            .ok_or_else(|| self.unsupported(name, value))
    }

    /// A finite number, or the default.
    ///
    /// # Errors
    /// Names the field and what it holds.
    pub fn number(&self, name: &str, default: f64) -> Result<f64> {
        match self.given(name) {
            None => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| self.unsupported(name, value)),
        }
    }

    /// A truth value, or the default.
    ///
    /// # Errors
    /// Names the field and what it holds.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool> {
        match self.given(name) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.unsupported(name, value)),
        }
    }

    /// A name, or the default.
    ///
    /// # Errors
    /// Names the field and what it holds.
    pub fn name(&self, name: &str, default: &'a str) -> Result<&'a str> {
        match self.given(name) {
            None => Ok(default),
            Some(value) => value.as_str().ok_or_else(|| self.unsupported(name, value)),
        }
    }

    /// This code does only what `value` means; missing and null mean the same.
    ///
    /// # Errors
    /// Names the field and what it holds.
    pub fn only(&self, name: &str, value: Value) -> Result<()> {
        match self.given(name) {
            None => Ok(()),
            Some(found) if *found == value || as_equal_numbers(found, &value) => Ok(()),
            Some(found) => Err(self.unsupported(name, found)),
        }
    }

    /// Fields that do not change what the model computes here.
    pub fn ignore(&self, names: &[&str]) {
        self.known.borrow_mut().extend(names.iter().map(|name| name.to_string()));
    }

    /// Whether every field was asked for; others may only be null, false, or private (`_…`).
    ///
    /// # Errors
    /// Names the first field that nobody asked for.
    pub fn finish(self) -> Result<()> {
        let known = self.known.borrow();
        let without_effect = |name: &str, value: &Value| {
            known.contains(name)
                || name.starts_with('_')
                || matches!(value, Value::Null | Value::Bool(false))
        };
        match self.object.iter().find(|(name, value)| !without_effect(name, value)) {
            Some((name, value)) => Err(self.unsupported(name, value)),
            None => Ok(()),
        }
    }

    /// "This field holds something that this code does not do."
    pub fn unsupported(&self, name: &str, value: &Value) -> Error {
        self.error(name, &format!("{value} is not supported"))
    }

    /// An error that names the file and the field.
    pub fn error(&self, name: &str, message: &str) -> Error {
        Error::model(format!("{}: `{name}`: {message}", self.file))
    }
}

fn as_count(value: &Value) -> Option<usize> {
    let count = usize::try_from(value.as_u64()?).ok()?;
    (1..=1 << 20).contains(&count).then_some(count)
}

fn as_equal_numbers(a: &Value, b: &Value) -> bool {
    matches!((a.as_f64(), b.as_f64()), (Some(a), Some(b)) if a == b)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_field_that_nobody_asked_for_is_named_unless_it_has_no_effect() {
        let check = |value: Value, expected: Option<&str>| {
            let fields = Fields::new("unet/config.json", &value).unwrap();
            fields.only("act_fn", json!("silu")).unwrap();
            let found = fields.finish().err().map(|error| error.to_string());
            assert_eq!(found.as_deref(), expected, "{value}");
        };
        check(json!({"act_fn": "silu", "_class_name": "X", "new": null, "off": false}), None);
        check(
            json!({"class_embed_type": "timestep"}),
            Some("unet/config.json: `class_embed_type`: \"timestep\" is not supported"),
        );
    }

    #[test]
    fn a_wrong_value_is_an_error_naming_field_and_value() {
        let value = json!({"a": 0, "b": "x", "c": [1, 2], "d": 1e300});
        let fields = Fields::new("f", &value).unwrap();
        assert!(fields.count("a", Some(3)).is_err());
        assert!(fields.flag("b", false).unwrap_err().to_string().contains("`b`: \"x\""));
        assert_eq!(fields.counts("c", 1, 2).unwrap(), [1, 2]);
        assert_eq!(
            fields.counts("c", 1, 3).unwrap_err().to_string(),
            "f: `c`: must be a count or 3 of them, not [1,2]"
        );
        assert_eq!(fields.counts("missing", 7, 3).unwrap(), [7, 7, 7]);
        assert!(fields.count("d", None).is_err());
        assert!(fields.only("b", json!("y")).is_err());
    }
}
