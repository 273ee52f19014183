//! The three questions that are put to a hub, and what its answers mean. Separate because this is
//! what changes when the hub does; how a question travels is the transport's matter.

use serde::Deserialize;
use ureq::http::{HeaderMap, StatusCode};

use super::names::{Commit, Etag, FileName, RepositoryId, Revision, printable, url_encoded};
use super::options::Purpose;
use super::transport::{Answer, Attempt, Failure, Method, Transport, text};
use crate::error::Error;

/// Largest answer to a question about a repository, in bytes; a long list has about 100 a file.
const MAX_LISTING_BYTES: u64 = 16 << 20;

/// What one question is about, for the message when it fails.
pub(super) struct Subject<'a> {
    pub id: &'a RepositoryId,
    pub revision: &'a str,
    pub file: Option<&'a FileName>,
}

/// What the hub says about a file.
pub(super) struct Metadata {
    pub etag: Etag,
    pub size_bytes: Option<u64>,
}

/// A repository at a revision.
pub(super) struct Listing {
    pub commit: Commit,
    pub files: Vec<FileName>,
}

pub(super) struct Client<'c> {
    transport: Transport<'c>,
    purpose: Purpose,
}

impl<'c> Client<'c> {
    pub fn new(transport: Transport<'c>, purpose: Purpose) -> Self {
        Self { transport, purpose }
    }

    /// Why there is no answer about `what`, with what helps.
    pub fn error(&self, failure: Failure, what: &str) -> Error {
        failure.into_error(what, self.purpose)
    }

    pub fn transport(&self) -> &Transport<'c> {
        &self.transport
    }

    /// The commit and the files of a revision: `GET /api/models/{id}/revision/{revision}`.
    pub fn listing(&self, id: &RepositoryId, revision: &Revision) -> Attempt<Listing> {
        let revision_part = url_encoded(revision.as_str(), b"");
        let url = format!("{}/api/models/{id}/revision/{revision_part}", self.transport.endpoint());
        let subject = Subject { id, revision: revision.as_str(), file: None };
        let answer = self.transport.exchange(Method::GetWhole, &url, |_, _| false)?;
        self.check_status(answer.status, &answer.headers, &subject)?;
        let bytes = self.transport.read_whole(answer, MAX_LISTING_BYTES)?;
        parse_listing(&bytes).map_err(|problem| {
            Failure::Refused(Error::model(format!(
                "{id}: the answer of {} is not that of a Hugging Face hub ({problem}): check \
                 HF_ENDPOINT and the proxy",
                self.transport.endpoint()
            )))
        })
    }

    /// What a file is called in the cache and how long it is: `HEAD`, as `get_hf_file_metadata`.
    pub fn metadata(&self, subject: &Subject, commit: &Commit) -> Attempt<Metadata> {
        let url = self.file_url(subject, commit);
        // The hub answers for a large file with a redirect to its storage and says itself what the
        // file is; a mirror that redirects to the hub does not.
        let answer = self.transport.exchange(Method::Head, &url, |headers, leaves| {
            headers.contains_key("x-repo-commit")
                && (leaves || headers.contains_key("x-linked-etag"))
        })?;
        self.check_status(answer.status, &answer.headers, subject)?;
        let not_the_hub = |problem: &str| {
            Failure::Final(Error::model(format!(
                "{}: {} gives {problem}, as a Hugging Face hub would not: check HF_ENDPOINT and \
                 the proxy",
                subject.what(),
                self.transport.endpoint()
            )))
        };
        let headers = &answer.headers;
        match text(headers, "x-repo-commit") {
            Some(found) if found == commit.as_str() => {}
            Some(_) => return Err(not_the_hub("another commit than the one asked for")),
            None => return Err(not_the_hub("no X-Repo-Commit")),
        }
        let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag"));
        let etag = etag.and_then(Etag::parse).ok_or_else(|| not_the_hub("no usable ETag"))?;
        let own_length = || {
            let whole = !answer.status.is_redirection();
            text(headers, "content-length").filter(|_| whole)
        };
        let size = text(headers, "x-linked-size").or_else(own_length);
        Ok(Metadata { etag, size_bytes: size.and_then(|size| size.parse().ok()) })
    }

    /// The content of a file from a byte on. The address is resolved anew each time, because those
    /// of the storage expire.
    pub fn download(
        &self,
        subject: &Subject,
        commit: &Commit,
        start_bytes: u64,
    ) -> Attempt<Answer> {
        let url = self.file_url(subject, commit);
        let answer = self.transport.exchange(Method::GetFrom(start_bytes), &url, |_, _| false)?;
        if answer.status != StatusCode::RANGE_NOT_SATISFIABLE {
            self.check_status(answer.status, &answer.headers, subject)?;
        }
        Ok(answer)
    }

    fn file_url(&self, subject: &Subject, commit: &Commit) -> String {
        let file = subject.file.map_or("", FileName::as_str);
        format!(
            "{}/{}/resolve/{commit}/{}",
            self.transport.endpoint(),
            subject.id,
            url_encoded(file, b"/")
        )
    }

    /// `hf_raise_for_status`, in words that say what to do.
    fn check_status(
        &self,
        status: StatusCode,
        headers: &HeaderMap,
        subject: &Subject,
    ) -> Attempt<()> {
        if status.is_success() || status.is_redirection() {
            return Ok(());
        }
        let (id, endpoint) = (subject.id, self.transport.endpoint());
        let sign_in = match self.transport.has_token() {
            true => "use a token that may read it in HF_TOKEN (the one given is refused)",
            false => "set HF_TOKEN to a token that may read it",
        };
        let refused = |message: String| Err(Failure::Refused(Error::model(message)));
        match (text(headers, "x-error-code").unwrap_or_default(), status.as_u16()) {
            ("GatedRepo", _) => refused(format!(
                "{id} is gated: accept its conditions at {endpoint}/{id} and {sign_in}"
            )),
            ("RevisionNotFound", _) => Err(Failure::Final(Error::model(format!(
                "{id} has no branch, tag or commit '{}': check --revision",
                subject.revision
            )))),
            ("EntryNotFound", _) => refused(subject.no_such_file()),
            ("RepoNotFound", _) | ("", 401) => refused(format!(
                "there is no model {id} at {endpoint}, or it is private: check the name, or \
                 {sign_in}"
            )),
            ("", 404) if subject.file.is_some() => refused(subject.no_such_file()),
            ("", 404) => refused(format!("there is no model {id} at {endpoint}: check the name")),
            (_, 401 | 403) => refused(format!("{endpoint} denies access to {id}: {sign_in}")),
            (_, 429) => Err(Failure::Passing(format!(
                "{endpoint} has had too many requests (429); a token in HF_TOKEN allows more"
            ))),
            (_, 408 | 500..) => Err(Failure::Passing(format!("{endpoint} answers {status}"))),
            _ => refused(format!(
                "{}: {endpoint} answers {status} {}",
                subject.what(),
                printable(text(headers, "x-error-message").unwrap_or_default())
            )),
        }
    }
}

impl Subject<'_> {
    pub fn what(&self) -> String {
        match self.file {
            Some(file) => format!("{file} of {}", self.id),
            None => self.id.to_string(),
        }
    }

    pub fn no_such_file(&self) -> String {
        let file = self.file.map_or("", FileName::as_str);
        format!("{} has no file {file} at revision '{}'", self.id, self.revision)
    }
}

#[derive(Deserialize)]
struct RepositoryInfo {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

fn parse_listing(bytes: &[u8]) -> std::result::Result<Listing, String> {
    let info: RepositoryInfo =
        serde_json::from_slice(bytes).map_err(|error| printable(&error.to_string()))?;
    let commit = Commit::parse(&info.sha)
        .ok_or_else(|| format!("'{}' is not a commit", printable(&info.sha)))?;
    let file = |sibling: &Sibling| {
        FileName::parse(&sibling.rfilename)
            .ok_or_else(|| format!("'{}' is not the name of a file", printable(&sibling.rfilename)))
    };
    let files = info.siblings.iter().map(file).collect::<std::result::Result<_, _>>()?;
    Ok(Listing { commit, files })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_with_a_name_that_leaves_the_folder_is_refused() {
        let sha = "0123456789abcdef0123456789abcdef01234567";
        let listing = |sha: &str, name: &str| {
            format!(r#"{{"sha":"{sha}","siblings":[{{"rfilename":"{name}"}}]}}"#)
        };
        assert!(parse_listing(listing(sha, "unet/a.bin").as_bytes()).is_ok());
        for bad in [
            listing(sha, "../a"),
            listing(sha, "/etc/passwd"),
            listing(sha, "a\\\\..\\\\b"),
            listing("main", "a"),
            "<html>".to_owned(),
        ] {
            assert!(parse_listing(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
