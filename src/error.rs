//! The one error of the crate: a kind, which decides the exit code, and a message that names the
//! thing, the numbers and the flag that helps. Separate because every module speaks it.

use std::fmt;

/// What went wrong, as far as a script needs to know: each kind is an exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The command line or a job asks for something that cannot be: exit code 2.
    Usage,
    /// A model, its files, its configuration or its weights: exit code 3.
    Model,
    /// A remote worker or the way to it: exit code 4.
    Remote,
    /// Anything else, such as an output that cannot be written: exit code 1.
    Other,
    /// The user pressed Ctrl-C: exit code 130.
    Interrupted,
}

impl Kind {
    /// The process's exit code, as documented in `--help`.
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Other => 1,
            Kind::Usage => 2,
            Kind::Model => 3,
            Kind::Remote => 4,
            Kind::Interrupted => 130,
        }
    }
}

/// One line for the user. The message never carries a backtrace.
#[derive(Debug, Clone)]
pub struct Error {
    kind: Kind,
    message: String,
}

/// How the message of a device without memory begins, behind its context.
const OUT_OF_MEMORY: &str = "out of memory: ";

/// The result of everything that can fail here.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `kind` with a message that stands on its own.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// A wrong request: exit code 2.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// A model or its files: exit code 3.
    pub fn model(message: impl Into<String>) -> Self {
        Self::new(Kind::Model, message)
    }

    /// A remote worker: exit code 4.
    pub fn remote(message: impl Into<String>) -> Self {
        Self::new(Kind::Remote, message)
    }

    /// Anything else: exit code 1.
    pub fn other(message: impl Into<String>) -> Self {
        Self::new(Kind::Other, message)
    }

    /// A device has less memory than something needs, with the numbers: exit code 1. It is known
    /// by its words also when it comes from a worker.
    pub fn out_of_memory(message: impl fmt::Display) -> Self {
        Self::other(format!("{OUT_OF_MEMORY}{message}"))
    }

    /// Whether a device had less memory than was needed.
    pub fn is_out_of_memory(&self) -> bool {
        self.message.contains(OUT_OF_MEMORY)
    }

    /// The user asked to stop: exit code 130.
    pub fn interrupted() -> Self {
        Self::new(Kind::Interrupted, "interrupted")
    }

    /// The kind, which decides the exit code.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Says where it happened: `what: message`.
    #[must_use]
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// candle's errors may wrap ours (a remote device answers through candle's traits) and may carry
/// a backtrace; ours comes back as it was, and of any other only the message is kept.
impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        use candle_core::Error as Candle;
        match error {
            Candle::WithBacktrace { inner, .. } => Self::from(*inner),
            Candle::WithPath { inner, path } => Self::from(*inner).context(path.display()),
            Candle::Context { inner, context } => Self::from(*inner).context(context),
            Candle::WrappedContext { wrapped, context } => match wrapped.downcast::<Error>() {
                Ok(ours) => *ours,
                Err(foreign) => Self::other(foreign.to_string()).context(context),
            },
            other => Self::other(other.to_string()),
        }
    }
}

/// For the implementations of candle's traits: the kind survives the way through candle.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        // The one variant of candle's error that can be taken apart again.
        candle_core::Error::WrappedContext { wrapped: Box::new(error), context: String::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_keeps_its_kind_through_candle() {
        let candle: candle_core::Error = Error::remote("worker is gone").into();
        let back = Error::from(candle.context("matmul").bt());
        assert_eq!(back.kind(), Kind::Remote);
        assert!(back.to_string().ends_with("worker is gone"), "{back}");
    }
}
