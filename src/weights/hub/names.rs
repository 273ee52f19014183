//! Names that come from outside and become parts of paths and of URLs: parsed once, so that nothing
//! below has to ask again whether a name may leave the cache folder. Separate because the cache and
//! the client both rest on these guarantees.

use std::fmt;
use std::path::PathBuf;

use crate::error::{Error, Result};

/// Longest namespace or name of a repository, as huggingface_hub's `validate_repo_id`.
const REPOSITORY_PART_LEN: usize = 96;
/// Longest file name, revision or ETag that is taken; file systems end at 255 bytes a component.
const NAME_LEN: usize = 1024;
const COMPONENT_LEN: usize = 255;

/// `organisation/name` of a model, by the hub's rules (huggingface_hub's `validate_repo_id`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepositoryId(String);

impl RepositoryId {
    /// # Errors
    /// A usage error that names the rule if `name` is not a repository's name.
    pub fn parse(name: &str) -> Result<Self> {
        let rule = if name.split('/').count() != 2 {
            "it must have the form ORGANISATION/NAME"
        } else if !name.split('/').all(|part| (1..=REPOSITORY_PART_LEN).contains(&part.len())) {
            "both parts must have 1 to 96 characters"
        } else if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b)) {
            "only letters, digits, '-', '_' and '.' are allowed"
        } else if name
            .split('/')
            .any(|part| part.starts_with(['-', '.']) || part.ends_with(['-', '.']))
        {
            "no part may begin or end with '-' or '.'"
        } else if name.contains("--") || name.contains("..") {
            "'--' and '..' are not allowed"
        } else if name.ends_with(".git") {
            "it must not end with '.git'"
        } else {
            return Ok(Self(name.to_owned()));
        };
        Err(Error::usage(format!(
            "'{}' is neither a folder nor a model on the Hugging Face hub: {rule}",
            printable(name)
        )))
    }

    /// The folder of the model in the cache.
    pub(super) fn folder_name(&self) -> String {
        format!("models--{}", self.0.replace('/', "--"))
    }

    /// The model that a folder of the cache is of; `None` if it is no model's of an organisation.
    pub(super) fn of_folder(name: &str) -> Option<Self> {
        // No part has a double hyphen.
        let (organisation, name) = name.strip_prefix("models--")?.split_once("--")?;
        Self::parse(&format!("{organisation}/{name}")).ok()
    }
}

/// A branch, a tag, a pull request (`refs/pr/1`) or a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revision(String);

impl Revision {
    /// # Errors
    /// A usage error if git could not have such a name or it would leave the cache folder.
    pub fn parse(name: &str) -> Result<Self> {
        match relative_path(name) {
            Some(_) => Ok(Self(name.to_owned())),
            None => Err(Error::usage(format!(
                "'{}' is not a revision: --revision takes a branch, a tag or a commit",
                printable(name)
            ))),
        }
    }

    /// The revision as a commit, if it is a full one: then nothing needs to be looked up.
    pub(super) fn as_commit(&self) -> Option<Commit> {
        (self.0.len() == 40).then(|| Commit::parse(&self.0)).flatten()
    }
}

impl Default for Revision {
    fn default() -> Self {
        Self("main".to_owned())
    }
}

/// The full hash of a commit: 40 hexadecimal digits (64 in a SHA-256 repository).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit(String);

impl Commit {
    /// `None` if it is not a full lower-case hash.
    pub(super) fn parse(hash: &str) -> Option<Self> {
        ((hash.len() == 40 || hash.len() == 64) && is_hex(hash)).then(|| Self(hash.to_owned()))
    }
}

/// A file's path in a repository: relative, with `/`, and within the repository on every system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileName(String);

impl FileName {
    /// `None` if the path is absolute, has `..`, `.` or empty components, a backslash, a Windows
    /// drive, a control character, or is too long: huggingface_hub's `_validate_relative_filename`.
    pub(super) fn parse(name: &str) -> Option<Self> {
        relative_path(name).map(|_| Self(name.to_owned()))
    }
}

/// The name of a file's content: the git blob's SHA-1, or the SHA-256 of a large file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Etag(String);

impl Etag {
    /// The header's value without `W/` and quotes (`_normalize_etag`); `None` if it cannot name a
    /// file.
    pub fn parse(header: &str) -> Option<Self> {
        let etag = header.strip_prefix("W/").unwrap_or(header).trim_matches('"');
        let fits = (1..=COMPONENT_LEN - 32).contains(&etag.len())
            && !etag.starts_with('.')
            && etag.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+=".contains(&b));
        fits.then(|| Self(etag.to_owned()))
    }

    /// The SHA-256 of the content, if the ETag is one: it is for files in large-file storage.
    pub fn sha256(&self) -> Option<&str> {
        (self.0.len() == 64 && is_hex(&self.0)).then_some(self.0.as_str())
    }
}

macro_rules! text {
    ($($name:ident),*) => {$(
        impl $name {
            /// As it was given.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )*};
}
text!(RepositoryId, Revision, Commit, FileName, Etag);

macro_rules! path {
    ($($name:ident),*) => {$(
        impl $name {
            /// As a relative path below a folder of the cache.
            pub(super) fn to_path(&self) -> PathBuf {
                self.0.split('/').collect()
            }
        }
    )*};
}
path!(Revision, FileName);

/// Percent-encodes for a URL all but unreserved characters and those of `keep`.
pub(super) fn url_encoded(text: &str, keep: &[u8]) -> String {
    let mut url = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || keep.contains(&byte) {
            url.push(char::from(byte));
        } else {
            url.push_str(&format!("%{byte:02X}"));
        }
    }
    url
}

/// Foreign text for a one-line message: no control characters, at most 200 characters.
pub(super) fn printable(text: &str) -> String {
    text.chars().take(200).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn relative_path(name: &str) -> Option<&str> {
    let component = |part: &str| {
        let drive = matches!(part.as_bytes(), [letter, b':', ..] if letter.is_ascii_alphabetic());
        (1..=COMPONENT_LEN).contains(&part.len()) && part != "." && part != ".." && !drive
    };
    let fits = name.len() <= NAME_LEN
        && !name.chars().any(|c| c == '\\' || c.is_control())
        && name.split('/').all(component);
    fits.then_some(name)
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_has_an_organisation_and_a_name_by_the_hubs_rules() {
        for good in ["segmind/tiny-sd", "a/b", "CompVis/stable-diffusion-v1-4", "_x/y_0.1"] {
            assert!(RepositoryId::parse(good).is_ok(), "{good}");
        }
        let long = format!("a/{}", "b".repeat(97));
        for bad in [
            "", "/", "a", "a/", "/b", "a/b/c", "../b", "a/..", "a/.b", "a/b-", "a/b--c", "a/b.git",
            "a/b c", "a\\b", "a/b\n", "ä/b", "a/b?c", "a/b%2f", &long,
        ] {
            let error = RepositoryId::parse(bad).expect_err(bad).to_string();
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn a_path_from_the_hub_stays_in_its_folder() {
        for good in ["a", "unet/config.json", "a b/ü.bin", "..a/b..", "ab:c", "refs/pr/1"] {
            assert!(FileName::parse(good).is_some(), "{good}");
            assert!(Revision::parse(good).is_ok(), "{good}");
        }
        let long = "a".repeat(256);
        for bad in [
            "",
            "/",
            "/etc/passwd",
            "a//b",
            "a/",
            "..",
            "../a",
            "a/../b",
            "a/./b",
            "a\\b",
            "..\\a",
            "C:a",
            "x/C:\\a",
            "a\0b",
            "a\nb",
            &long,
        ] {
            assert!(FileName::parse(bad).is_none(), "{bad:?}");
            assert!(Revision::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_etag_names_a_file_in_the_cache() {
        let sha = "0123456789abcdef".repeat(4);
        for (header, etag) in
            [("\"abc\"", Some("abc")), ("W/\"a-1\"", Some("a-1")), ("\"../x\"", None), ("", None)]
        {
            assert_eq!(Etag::parse(header).as_ref().map(Etag::as_str), etag, "{header}");
        }
        assert_eq!(Etag::parse(&sha).and_then(|e| e.sha256().map(str::to_owned)), Some(sha));
        assert_eq!(Etag::parse(&"a".repeat(40)).and_then(|e| e.sha256().map(str::to_owned)), None);
    }

    #[test]
    fn urls_carry_names_percent_encoded() {
        assert_eq!(url_encoded("refs/pr/1", b""), "refs%2Fpr%2F1");
        assert_eq!(url_encoded("a b/ü?.bin", b"/"), "a%20b/%C3%BC%3F.bin");
    }
}
