//! How requests travel: who gets the token, which redirects are followed, how long is waited, and
//! that Ctrl-C ends it. Separate because it knows neither models nor the disk.

use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

use ureq::http::{HeaderMap, StatusCode, Uri, header};
use ureq::{Agent, Body, Timeout};

use super::HubOptions;
use super::names::printable;
use super::options::{Purpose, Token};
use crate::error::Error;

/// Most redirects that one request follows.
const MAX_REDIRECTS: usize = 10;
/// Longest time for an answer that is read as a whole.
const LISTING_TIMEOUT: Duration = Duration::from_secs(60);
/// How often a wait looks whether the user has pressed Ctrl-C.
pub(super) const POLL: Duration = Duration::from_millis(50);
/// Bytes read at once, and how many such pieces wait to be written.
const CHUNK_BYTES: usize = 256 << 10;
const CHUNKS_AHEAD: usize = 8;

/// What an answer or the lack of one comes to.
pub(super) type Attempt<T> = std::result::Result<T, Failure>;

/// Why there is no answer, or not the one that was hoped for.
pub(super) enum Failure {
    /// The network, or a server that may answer another time: worth another try.
    Passing(String),
    /// The hub says no; what is cached may serve nevertheless.
    Refused(Error),
    /// Nothing to be done about.
    Final(Error),
}

impl Failure {
    /// For one line.
    pub fn into_error(self, what: &str, purpose: Purpose) -> Error {
        match self {
            Failure::Passing(reason) => Error::model(format!(
                "{what}: {reason}; check the network (or HF_ENDPOINT) and run again, or give a \
                 local folder with {}",
                purpose.folder_flag()
            )),
            Failure::Refused(error) | Failure::Final(error) => error,
        }
    }
}

/// The headers of an answer, and what is to come.
pub(super) struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    body: Body,
}

pub(super) struct Transport<'c> {
    agent: Agent,
    endpoint: String,
    origin: Option<Origin>,
    token: Option<Token>,
    tries: u32,
    retry_wait: Duration,
    cancelled: &'c AtomicBool,
}

impl<'c> Transport<'c> {
    pub fn new(options: &HubOptions, cancelled: &'c AtomicBool) -> Self {
        let mut config = Agent::config_builder()
            // Redirects and statuses are handled here: the token must not follow a redirect.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .user_agent(concat!("tiny-sd/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(options.answer_timeout))
            .timeout_connect(Some(options.answer_timeout))
            .timeout_recv_response(Some(options.answer_timeout))
            .timeout_per_read(Some(options.read_timeout))
            .timeout_per_write(Some(options.read_timeout));
        if !options.proxy_from_environment {
            config = config.proxy(None);
        }
        Self {
            agent: config.build().new_agent(),
            endpoint: options.endpoint.clone(),
            origin: options.endpoint.parse().ok().and_then(|uri| Origin::of(&uri)),
            token: options.token.clone(),
            tries: options.tries.max(1),
            retry_wait: options.retry_wait,
            cancelled,
        }
    }

    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub fn tries(&self) -> u32 {
        self.tries
    }

    pub fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// One request and those it is redirected to, until an answer is no redirect or `enough` says
    /// that its headers will do; it is told whether the redirect leads to another server.
    pub fn exchange(
        &self,
        method: Method,
        url: &str,
        enough: impl Fn(&HeaderMap, bool) -> bool,
    ) -> Attempt<Answer> {
        let mut uri: Uri = url.parse().map_err(|_| bad_address(url))?;
        for _ in 0..=MAX_REDIRECTS {
            let answer = self.call(method, &uri)?;
            let location = text(&answer.headers, "location");
            let Some(location) = location.filter(|_| is_redirect(answer.status)) else {
                return Ok(answer);
            };
            let next = resolve(&uri, location).ok_or_else(|| bad_address(location))?;
            if enough(&answer.headers, Origin::of(&next) != Origin::of(&uri)) {
                return Ok(answer);
            }
            if uri.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
                return Err(Failure::Final(Error::model(format!(
                    "{} redirects from https to an address without encryption: refused",
                    self.endpoint
                ))));
            }
            uri = next;
        }
        Err(Failure::Passing(format!("{} redirects in a circle", self.endpoint)))
    }

    /// Gives the body to `sink` piece by piece, and stops when it or the user says so. Another
    /// thread reads ahead, so that neither a stalled server nor a slow disk holds up the other.
    pub fn read(&self, answer: Answer, mut sink: impl FnMut(&[u8]) -> Attempt<()>) -> Attempt<()> {
        let (sender, receiver) = mpsc::sync_channel(CHUNKS_AHEAD);
        let mut reader = answer.body.into_with_config().limit(u64::MAX).reader();
        spawn(move || {
            loop {
                let mut chunk = vec![0; CHUNK_BYTES];
                let read = reader.read(&mut chunk).map(|len| {
                    chunk.truncate(len);
                    chunk
                });
                let last = !matches!(&read, Ok(chunk) if !chunk.is_empty());
                if sender.send(read).is_err() || last {
                    break;
                }
            }
        })?;
        loop {
            let chunk = self.wait_for(&receiver)?;
            let chunk = chunk.map_err(|error| {
                let cause = cause(&ureq::Error::from(error));
                Failure::Passing(format!("the download broke off: {cause}"))
            })?;
            if chunk.is_empty() {
                return Ok(());
            }
            sink(&chunk)?;
        }
    }

    /// Up to `tries` times, with pauses that double, as long as the failure is a passing one.
    pub fn retry<T>(&self, tries: u32, mut attempt: impl FnMut() -> Attempt<T>) -> Attempt<T> {
        let mut failures = 0;
        loop {
            match attempt() {
                Err(Failure::Passing(_)) if failures + 1 < tries => {
                    failures += 1;
                    self.pause(failures)?;
                }
                other => return other,
            }
        }
    }

    /// The pause after the given number of failures in a row.
    pub fn pause(&self, failures: u32) -> Attempt<()> {
        let doubled = self.retry_wait.saturating_mul(1 << failures.saturating_sub(1).min(4));
        let mut left = doubled.min(Duration::from_secs(8));
        while !left.is_zero() {
            self.check_cancelled()?;
            let step = left.min(POLL);
            std::thread::sleep(step);
            left -= step;
        }
        self.check_cancelled()
    }

    pub fn check_cancelled(&self) -> Attempt<()> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(Failure::Final(Error::interrupted()));
        }
        Ok(())
    }

    /// A body that must fit into `limit_bytes`.
    pub fn read_whole(&self, answer: Answer, limit_bytes: u64) -> Attempt<Vec<u8>> {
        let body = answer.body.into_with_config().limit(limit_bytes);
        self.interruptible(move || body.read_to_vec())?
            .map_err(|error| Failure::Passing(self.reason(&error)))
    }

    fn call(&self, method: Method, uri: &Uri) -> Attempt<Answer> {
        let mut request = match method {
            Method::Head => self.agent.head(uri.clone()),
            Method::GetWhole | Method::GetFrom(_) => self.agent.get(uri.clone()),
        }
        // Lengths and ranges are those of the file, not of a compressed form of it.
        .header(header::ACCEPT_ENCODING, "identity");
        if let Method::GetFrom(start @ 1..) = method {
            request = request.header(header::RANGE, format!("bytes={start}-"));
        }
        // The token goes to the endpoint and to no other server.
        if let Some(token) = self.token.as_ref().filter(|_| Origin::of(uri) == self.origin) {
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", token.secret()));
        }
        let whole = matches!(method, Method::GetWhole).then_some(LISTING_TIMEOUT);
        let request = request.config().timeout_global(whole).build();
        let host = uri.host().unwrap_or_default().to_owned();
        let response = self.interruptible(move || request.call())?.map_err(|error| {
            Failure::Passing(if Origin::of(uri) == self.origin {
                self.reason(&error)
            } else {
                let (endpoint, cause) = (&self.endpoint, cause(&error));
                format!("cannot reach {host}, where {endpoint} keeps files: {cause}")
            })
        })?;
        let (parts, body) = response.into_parts();
        Ok(Answer { status: parts.status, headers: parts.headers, body })
    }

    fn reason(&self, error: &ureq::Error) -> String {
        format!("cannot reach {}: {}", self.endpoint, cause(error))
    }

    /// Runs what may block on another thread and waits for it, or for Ctrl-C.
    fn interruptible<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Attempt<T> {
        let (sender, receiver) = mpsc::sync_channel(1);
        // Nobody listens any more if the user has stopped it.
        spawn(move || drop(sender.send(work())))?;
        self.wait_for(&receiver)
    }

    fn wait_for<T>(&self, receiver: &Receiver<T>) -> Attempt<T> {
        loop {
            self.check_cancelled()?;
            match receiver.recv_timeout(POLL) {
                Ok(value) => return Ok(value),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Failure::Passing("a request ended without an answer".to_owned()));
                }
            }
        }
    }
}

#[derive(Clone, Copy)]
pub(super) enum Method {
    Head,
    GetWhole,
    GetFrom(u64),
}

/// Scheme, host and port: who gets what is sent to an address.
#[derive(PartialEq)]
struct Origin {
    scheme: String,
    host: String,
    port: u16,
}

impl Origin {
    fn of(uri: &Uri) -> Option<Self> {
        let scheme = uri.scheme_str()?.to_ascii_lowercase();
        let port = uri.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
        Some(Self { scheme, host: uri.host()?.to_ascii_lowercase(), port })
    }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// The address that a `Location` means; absolute, without host, or without the beginning.
fn resolve(base: &Uri, location: &str) -> Option<Uri> {
    let (scheme, authority) = (base.scheme_str()?, base.authority()?);
    let location = location.split('#').next()?;
    let absolute = if location.starts_with("http://") || location.starts_with("https://") {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.contains("://") {
        return None;
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    absolute.parse().ok().filter(|uri| Origin::of(uri).is_some())
}

fn bad_address(url: &str) -> Failure {
    Failure::Final(Error::model(format!("'{}' is not an address", printable(url))))
}

pub(super) fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

fn cause(error: &ureq::Error) -> String {
    match error {
        ureq::Error::HostNotFound => "the name is unknown (no network?)".to_owned(),
        ureq::Error::Timeout(Timeout::Connect | Timeout::Resolve) => {
            "no connection in time".to_owned()
        }
        ureq::Error::Timeout(_) => "no answer in time".to_owned(),
        // Without the "io: " that ureq puts before it.
        ureq::Error::Io(error) => printable(&error.to_string()),
        error => printable(&error.to_string()),
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) -> Attempt<()> {
    let thread = std::thread::Builder::new().name("hub".to_owned()).spawn(work);
    thread
        .map(|_| ())
        .map_err(|error| Failure::Final(Error::other(format!("cannot start a thread: {error}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_relative_to_where_it_came_from() {
        let base: Uri = "https://h:8/a/b/c?q".parse().expect("an address");
        for (location, expected) in [
            ("http://x/y?z#f", Some("http://x/y?z")),
            ("//x/y", Some("https://x/y")),
            ("/y?z", Some("https://h:8/y?z")),
            ("y", Some("https://h:8/a/b/y")),
            ("ftp://x/y", None),
            ("http://", None),
            ("a b", None),
        ] {
            let found = resolve(&base, location).map(|uri| uri.to_string());
            assert_eq!(found.as_deref(), expected, "{location}");
        }
    }
}
