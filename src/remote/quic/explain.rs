//! Why there is no connection, as a line for the user that says what to try. Separate because the
//! network's errors are many and the client has other things to do.

use quinn::ConnectionError;

use super::IDLE_TIMEOUT;
use crate::error::Error;
use crate::remote::hello::readable;

/// A handshake that failed.
pub(super) fn explain_handshake(name: &str, port: u16, error: &ConnectionError) -> Error {
    match error {
        ConnectionError::TimedOut => Error::remote(format!(
            "the worker {name} does not answer: is `tiny-sd worker` running there, and does its \
             firewall let UDP port {port} in?"
        )),
        error => explain(name, error),
    }
}

/// A connection that was lost.
pub(super) fn explain(name: &str, error: &ConnectionError) -> Error {
    let text = match error {
        ConnectionError::TimedOut => format!(
            "the worker {name} was not heard from for {} s: check that it still runs and that the \
             network is up, then run the command again",
            IDLE_TIMEOUT.as_secs()
        ),
        ConnectionError::ApplicationClosed(close) => {
            format!("the worker {name} ended the session: {}", readable(&close.reason))
        }
        ConnectionError::ConnectionClosed(close)
            if close.error_code == quinn::TransportErrorCode::CONNECTION_REFUSED =>
        {
            format!("the worker {name} takes no connections just now: try again in a minute")
        }
        ConnectionError::ConnectionClosed(_)
        | ConnectionError::VersionMismatch
        | ConnectionError::TransportError(_)
        | ConnectionError::Reset
        | ConnectionError::LocallyClosed
        | ConnectionError::CidsExhausted => {
            let error = readable(error.to_string().as_bytes());
            format!("the connection to the worker {name} failed: {error}; run the command again")
        }
    };
    Error::remote(text)
}
