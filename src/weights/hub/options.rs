//! What the environment says about the hub: the variables of Python's huggingface_hub, read in one
//! place and from an argument, so that a test can give its own. Separate because nothing else here
//! knows an environment.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::names::Revision;
use crate::error::{Error, Result};
use crate::weights::built_in;

/// Where the hub is, who asks, and where files are kept. Field by field as huggingface_hub's
/// `constants.py`.
#[derive(Debug, Clone)]
pub struct HubOptions {
    /// The hub's address without a slash at the end: `HF_ENDPOINT`.
    pub endpoint: String,
    /// Who asks: `HF_TOKEN`, or the file that `hf auth login` writes.
    pub token: Option<Token>,
    /// The cache that Python uses too: `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`.
    pub cache_dir: PathBuf,
    /// Nothing is asked of the network: `--offline` or `HF_HUB_OFFLINE`.
    pub offline: bool,
    /// `--revision`.
    pub revision: Revision,
    /// What the repository is wanted for.
    pub purpose: Purpose,
    /// Snapshots link to blobs; otherwise they hold the files: `HF_HUB_DISABLE_SYMLINKS`.
    pub symlinks: bool,
    /// `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY` of this process are heeded.
    pub proxy_from_environment: bool,
    /// Longest wait for a connection and for the headers of an answer: `HF_HUB_ETAG_TIMEOUT`.
    pub answer_timeout: Duration,
    /// Longest pause within a download: `HF_HUB_DOWNLOAD_TIMEOUT`.
    pub read_timeout: Duration,
    /// Times that a request is tried until it is given up, at least 1.
    pub tries: u32,
    /// The pause before the second try; it doubles with each further one.
    pub retry_wait: Duration,
}

/// What a repository is wanted for, which decides what helps where it cannot be had.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Purpose {
    /// `--model`.
    #[default]
    Model,
    /// `--vae`.
    Vae,
}

impl Purpose {
    /// The flag that takes a folder in its place.
    pub(super) fn folder_flag(self) -> &'static str {
        match self {
            Self::Model => "-m DIR",
            Self::Vae => "--vae DIR",
        }
    }

    /// What can be taken in its place: the end of a list of advice.
    pub(super) fn instead(self) -> String {
        let folder = format!("give a local folder with {}", self.folder_flag());
        match self {
            Self::Model => {
                format!("{folder}, or take the small built-in model: -m {}", built_in::NAME)
            }
            Self::Vae => format!("or {folder}"),
        }
    }
}

/// A secret: it is sent to the endpoint and shown nowhere.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// `None` if nothing is left after trimming.
    ///
    /// # Errors
    /// A usage error if it has characters that no token has.
    pub fn parse(text: &str) -> Result<Option<Self>> {
        let token = text.trim();
        if !token.bytes().all(|b| b.is_ascii_graphic()) || token.len() > 4096 {
            return Err(Error::usage(
                "the Hugging Face token has characters that no token has: check HF_TOKEN",
            ));
        }
        Ok((!token.is_empty()).then(|| Self(token.to_owned())))
    }

    /// The secret itself, for the one header that carries it.
    pub(super) fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl HubOptions {
    /// The options as the environment has them: `env` gives a variable's value.
    ///
    /// # Errors
    /// A usage error for a variable whose value makes no sense, or if there is no home directory
    /// and no variable that names the cache.
    pub fn from_environment(env: &dyn Fn(&str) -> Option<OsString>) -> Result<Self> {
        let environment = Environment(env);
        let home = environment.huggingface_home();
        let cache_dir = environment
            .path("HF_HUB_CACHE")
            .or_else(|| environment.path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| home.as_ref().map(|home| home.join("hub")))
            .ok_or_else(|| {
                Error::usage(
                    "there is no home directory to keep models in: set HF_HOME to a folder",
                )
            })?;
        Ok(Self {
            endpoint: environment.endpoint()?,
            token: environment.token(home.as_deref())?,
            // Absolute, so that relative links and a change of the working directory agree.
            cache_dir: std::path::absolute(&cache_dir).unwrap_or(cache_dir),
            offline: environment.is_true("HF_HUB_OFFLINE")
                || environment.is_true("TRANSFORMERS_OFFLINE"),
            revision: Revision::default(),
            purpose: Purpose::default(),
            symlinks: !environment.is_true("HF_HUB_DISABLE_SYMLINKS"),
            proxy_from_environment: true,
            answer_timeout: environment.seconds("HF_HUB_ETAG_TIMEOUT")?,
            read_timeout: environment.seconds("HF_HUB_DOWNLOAD_TIMEOUT")?,
            tries: 5,
            retry_wait: Duration::from_millis(500),
        })
    }
}

struct Environment<'e>(&'e dyn Fn(&str) -> Option<OsString>);

impl Environment<'_> {
    /// An empty variable is the same as none.
    fn os(&self, name: &str) -> Option<OsString> {
        (self.0)(name).filter(|value| !value.is_empty())
    }

    fn text(&self, name: &str) -> Result<Option<String>> {
        match self.os(name).map(OsString::into_string) {
            None => Ok(None),
            Some(Ok(text)) => Ok(Some(text)),
            Some(Err(_)) => Err(Error::usage(format!("{name} is not UTF-8"))),
        }
    }

    fn is_true(&self, name: &str) -> bool {
        self.os(name).is_some_and(|value| {
            ["1", "on", "yes", "true"].iter().any(|word| value.eq_ignore_ascii_case(word))
        })
    }

    fn seconds(&self, name: &str) -> Result<Duration> {
        let Some(text) = self.text(name)? else { return Ok(Duration::from_secs(10)) };
        match text.trim().parse() {
            Ok(seconds @ 1..=3600) => Ok(Duration::from_secs(seconds)),
            _ => Err(Error::usage(format!("{name}={text}: seconds from 1 to 3600 are expected"))),
        }
    }

    fn endpoint(&self) -> Result<String> {
        let endpoint =
            self.text("HF_ENDPOINT")?.unwrap_or_else(|| "https://huggingface.co".to_owned());
        let endpoint = endpoint.trim().trim_end_matches('/');
        let uri = endpoint.parse::<ureq::http::Uri>().ok().filter(|uri| {
            matches!(uri.scheme_str(), Some("http" | "https"))
                && uri.host().is_some_and(|host| !host.is_empty())
                && uri.query().is_none()
        });
        match uri {
            Some(_) => Ok(endpoint.to_owned()),
            None => Err(Error::usage(format!(
                "HF_ENDPOINT={endpoint} is not an address such as https://huggingface.co"
            ))),
        }
    }

    fn token(&self, home: Option<&Path>) -> Result<Option<Token>> {
        if self.is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            return Ok(None);
        }
        for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
            if let Some(token) = self.text(name)?.map(|text| Token::parse(&text)).transpose()? {
                return Ok(token);
            }
        }
        let file = self.path("HF_TOKEN_PATH").or_else(|| home.map(|home| home.join("token")));
        // A public model needs no token, so a file that cannot be read is no reason to stop.
        match file.and_then(|file| std::fs::read_to_string(file).ok()) {
            Some(text) => Token::parse(&text),
            None => Ok(None),
        }
    }

    fn huggingface_home(&self) -> Option<PathBuf> {
        self.path("HF_HOME").or_else(|| {
            let caches = self.path("XDG_CACHE_HOME").or_else(|| Some(self.home()?.join(".cache")));
            Some(caches?.join("huggingface"))
        })
    }

    fn home(&self) -> Option<PathBuf> {
        let name = if cfg!(windows) { "USERPROFILE" } else { "HOME" };
        self.os(name).map(PathBuf::from)
    }

    /// A path with `~` and `$NAME` filled in, as Python's `expanduser` and `expandvars`.
    fn path(&self, name: &str) -> Option<PathBuf> {
        let value = self.os(name)?;
        let Some(text) = value.to_str() else { return Some(value.into()) };
        let text = match (text.strip_prefix('~'), self.home().as_deref().and_then(Path::to_str)) {
            (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with(['/', '\\']) => {
                format!("{home}{rest}")
            }
            _ => text.to_owned(),
        };
        Some(self.with_variables(&text).into())
    }

    fn with_variables(&self, text: &str) -> String {
        let mut filled = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('$') {
            filled.push_str(before);
            let braced = after.strip_prefix('{').and_then(|after| after.split_once('}'));
            let (name, after_name) = braced.unwrap_or_else(|| {
                let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
                after.split_at(after.find(|c| !is_name(c)).unwrap_or(after.len()))
            });
            match self.os(name).and_then(|value| value.into_string().ok()) {
                Some(value) if !name.is_empty() => {
                    filled.push_str(&value);
                    rest = after_name;
                }
                // As Python: what is not set stays as it is written.
                _ => {
                    filled.push('$');
                    rest = after;
                }
            }
        }
        filled + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(variables: &[(&str, &str)]) -> Result<HubOptions> {
        HubOptions::from_environment(&|name| {
            let (_, value) = variables.iter().find(|(variable, _)| *variable == name)?;
            Some(OsString::from(value))
        })
    }

    #[cfg(unix)]
    #[test]
    fn the_cache_is_where_python_has_it() {
        for (variables, expected) in [
            (vec![("HOME", "/h")], "/h/.cache/huggingface/hub"),
            (vec![("HOME", "/h"), ("HF_HOME", "")], "/h/.cache/huggingface/hub"),
            (vec![("HOME", "/h"), ("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (vec![("HOME", "/h"), ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "~/hf")], "/h/hf/hub"),
            (vec![("HF_HOME", "/a/$NO/${B}$B/c"), ("B", "b")], "/a/$NO/bb/c/hub"),
            (vec![("HF_HOME", "/a"), ("HF_HUB_CACHE", "/c")], "/c"),
            (vec![("HF_HOME", "/a"), ("HUGGINGFACE_HUB_CACHE", "/d")], "/d"),
        ] {
            let options = options(&variables).expect(expected);
            assert_eq!(options.cache_dir, Path::new(expected), "{variables:?}");
        }
        assert!(options(&[]).is_err());
    }

    #[test]
    fn offline_is_a_word_for_true() {
        for (value, expected) in [("1", true), ("TRUE", true), ("yes", true), ("on", true)]
            .into_iter()
            .chain([("0", false), ("", false), ("off", false)])
        {
            let options = options(&[("HF_HOME", "/a"), ("HF_HUB_OFFLINE", value)]).expect(value);
            assert_eq!(options.offline, expected, "{value}");
        }
    }

    #[test]
    fn a_token_comes_from_the_variable_then_from_the_file_and_is_never_shown() {
        let home = tempfile::tempdir().expect("a folder");
        std::fs::write(home.path().join("token"), "hf_file\n").expect("a token file");
        let home = home.path().to_str().expect("UTF-8");
        let secret = |variables: &[(&str, &str)]| {
            let token = options(variables).expect("options").token;
            assert!(!format!("{token:?}").contains("hf_"), "{token:?}");
            token.map(|token| token.secret().to_owned())
        };
        assert_eq!(secret(&[("HF_HOME", home)]).as_deref(), Some("hf_file"));
        assert_eq!(secret(&[("HF_HOME", home), ("HF_TOKEN", " hf_a ")]).as_deref(), Some("hf_a"));
        assert_eq!(secret(&[("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        assert!(options(&[("HF_HOME", home), ("HF_TOKEN", "a\nb")]).is_err());
    }

    #[test]
    fn the_endpoint_is_an_http_address() {
        let endpoint = |value| options(&[("HF_HOME", "/a"), ("HF_ENDPOINT", value)]);
        for (value, expected) in
            [("https://m.example/", "https://m.example"), ("http://[::1]:8/x", "http://[::1]:8/x")]
        {
            assert_eq!(endpoint(value).expect(value).endpoint, expected);
        }
        for bad in ["huggingface.co", "ftp://x", "https://", "file:///etc", "https://a/?b"] {
            assert!(endpoint(bad).is_err(), "{bad}");
        }
    }
}
