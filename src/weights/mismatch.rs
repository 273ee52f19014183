//! What a model expects and a checkpoint has, in one message. Separate because loaders find the
//! differences one by one and users want them all at once.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::{Checkpoint, shown};
use crate::error::{Error, Result};

/// Most names of a kind in the message; the others are counted.
const MOST_NAMES: usize = 8;

/// The differences between a model and a checkpoint. Fill it while loading, or take
/// [`Mismatch::between`]; then [`Mismatch::into_result`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mismatch {
    /// Names that the model needs and the checkpoint lacks.
    pub missing: Vec<String>,
    /// Names with the shape that the model expects and the one that the checkpoint has.
    pub misshapen: Vec<(String, Vec<usize>, Vec<usize>)>,
    /// Names that the checkpoint has and the model does not know.
    pub unexpected: Vec<String>,
}

impl Mismatch {
    /// Compares names and shapes.
    pub fn between(expected: &[(String, Vec<usize>)], checkpoint: &Checkpoint) -> Self {
        let mut mismatch = Self::default();
        for (name, shape) in expected {
            match checkpoint.get(name).map(|tensor| tensor.layout().dims()) {
                None => mismatch.missing.push(name.clone()),
                Some(found) if found == shape.as_slice() => {}
                Some(found) => {
                    mismatch.misshapen.push((name.clone(), shape.clone(), found.to_vec()));
                }
            }
        }
        let known: BTreeSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
        let unexpected = checkpoint.iter().map(|(name, _)| name).filter(|n| !known.contains(n));
        mismatch.unexpected.extend(unexpected.map(str::to_owned));
        mismatch
    }

    /// Nothing if nothing differs.
    ///
    /// # Errors
    /// One line that names what differs; the caller knows of which component.
    pub fn into_result(self) -> Result<()> {
        let mut message = String::new();
        let mut list = |count: usize, kind: &str, names: &mut dyn Iterator<Item = String>| {
            if count == 0 {
                return;
            }
            let separator = if message.is_empty() { "" } else { "; " };
            let names = names.take(MOST_NAMES).collect::<Vec<_>>().join(", ");
            let more = match count.saturating_sub(MOST_NAMES) {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            // Writing to a String cannot fail.
            let _ = write!(message, "{separator}{count} {kind}: {names}{more}");
        };
        list(self.missing.len(), "missing", &mut self.missing.iter().map(|name| shown(name)));
        list(
            self.misshapen.len(),
            "of another shape",
            &mut self.misshapen.iter().map(|(name, expected, found)| {
                format!("{} is {found:?}, not {expected:?}", shown(name))
            }),
        );
        let mut unexpected = self.unexpected.iter().map(|name| shown(name));
        list(self.unexpected.len(), "unexpected", &mut unexpected);
        if message.is_empty() {
            return Ok(());
        }
        Err(Error::model(format!("the weights do not fit its config.json: {message}")))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{DType, Layout};

    use super::*;
    use crate::backend::host::HostTensor;

    #[test]
    fn all_differences_are_in_one_line() {
        let mut checkpoint = Checkpoint::default();
        for (name, dims) in [("a", vec![2, 3]), ("b", vec![4]), ("extra", vec![])] {
            let layout = Layout::contiguous(dims);
            let tensor = HostTensor::new(DType::F16, layout, Arc::new([0u8; 12]), 0).unwrap();
            checkpoint.insert(name.to_owned(), tensor).unwrap();
        }
        let check = |expected: &[(&str, &[usize])], message: &str| {
            let expected: Vec<_> =
                expected.iter().map(|(name, shape)| (name.to_string(), shape.to_vec())).collect();
            let result = Mismatch::between(&expected, &checkpoint).into_result();
            let found = result.err().map_or(String::new(), |error| error.to_string());
            assert_eq!(
                found.trim_start_matches("the weights do not fit its config.json: "),
                message
            );
        };
        check(&[("a", &[2, 3]), ("b", &[4]), ("extra", &[])], "");
        check(
            &[("a", &[3, 2]), ("b", &[4]), ("c", &[1]), ("d", &[])],
            "2 missing: \"c\", \"d\"; 1 of another shape: \"a\" is [2, 3], not [3, 2]; \
             1 unexpected: \"extra\"",
        );
    }

    #[test]
    fn long_lists_are_cut_and_counted() {
        let missing = (0..700).map(|n| format!("block.{n}.weight")).collect();
        let mismatch = Mismatch { missing, ..Mismatch::default() };
        let error = mismatch.into_result().unwrap_err().to_string();
        assert!(error.contains("700 missing: \"block.0.weight\""), "{error}");
        assert!(error.ends_with("\"block.7.weight\" and 692 more"), "{error}");
    }
}
