//! What lies between the protocol and the network: frames and bulk bytes, without sockets or
//! clocks. Separate so that the protocol can be driven by tests, in one process, and over QUIC by
//! the same code, and so that the files that do network I/O only move bytes.
//!
//! A frame is a sequence of whole messages; on a stream each is
//! preceded by its length as u32, little-endian. Bulk bytes (weights, large host tensors) travel on
//! unidirectional streams of their own and never block frames: a header frame, then the raw bytes.

use crate::error::{Error, Result};

/// Bytes of one frame, either way.
pub const MAX_FRAME_BYTES: usize = 256 << 10;
/// Bytes of the header of a bulk transfer.
pub const MAX_BULK_HEADER_BYTES: usize = 1 << 10;

/// The client's side of the protocol, as the network sees it. All methods return at once.
pub trait ClientEnd: Send + Sync {
    /// What waits to be sent, as one frame of at most [`MAX_FRAME_BYTES`]; `None` if nothing does.
    /// Called again and again until `None`, whenever the waker was called.
    fn next_frame(&self) -> Option<Vec<u8>>;

    /// Whether what waits to be sent should go now; else it may be held back for a moment, until
    /// there is more of it. When that changes the waker is called.
    fn is_due(&self) -> bool {
        true
    }

    /// The next bulk transfer that may start; several run at once, in any order.
    fn next_bulk(&self) -> Option<BulkSource>;

    /// A frame from the worker.
    ///
    /// # Errors
    /// If it is malformed: the connection must be closed.
    fn received(&self, frame: &[u8]) -> Result<()>;

    /// Whether the worker has answered all that was said to it: then the end of the session need
    /// not wait until it has heard the rest.
    fn is_settled(&self) -> bool {
        false
    }

    /// The connection is gone, or a transfer failed; every wait ends with this error.
    fn lost(&self, error: Error);
}

/// Calls the network thread when there is something to send. Called often: it must be cheap.
pub type Waker = Box<dyn Fn() + Send + Sync>;

/// Fills a buffer from the front and says how much; 0 at the end.
pub type ReadBytes = Box<dyn FnMut(&mut [u8]) -> Result<usize> + Send>;

/// Bytes that go to the worker beside the frames.
pub struct BulkSource {
    /// Says what it is.
    pub header: Vec<u8>,
    /// How many bytes follow.
    pub len: u64,
    /// Fills the buffer from the front and says how much; 0 at the end.
    pub read: ReadBytes,
}

/// The worker's side of the protocol in one session, as the network sees it.
pub trait WorkerEnd: Send + Sync {
    /// A frame from the client, to be decoded whole and queued. Blocks while the queue is full: the
    /// network then stops reading, so that QUIC's flow control holds the client back.
    ///
    /// # Errors
    /// If it is malformed: the connection must be closed with this message.
    fn received(&self, frame: Vec<u8>) -> Result<()>;

    /// A bulk transfer begins.
    ///
    /// # Errors
    /// If it was not asked for or is too large.
    fn bulk(&self, header: &[u8]) -> Result<Box<dyn BulkSink>>;

    /// What waits to be sent to the client, as one frame; `None` if nothing does.
    fn next_frame(&self) -> Option<Vec<u8>>;

    /// Whether work is running or queued: then silence is no idleness.
    fn is_busy(&self) -> bool {
        false
    }

    /// The client is gone: queued work is dropped and memory freed.
    fn lost(&self);
}

/// Takes the bytes of one bulk transfer.
pub trait BulkSink: Send {
    /// More bytes.
    ///
    /// # Errors
    /// If there are more than announced, or they cannot be kept.
    fn write(&mut self, bytes: &[u8]) -> Result<()>;

    /// All bytes are there.
    ///
    /// # Errors
    /// If there are fewer than announced, or their digest is wrong.
    fn finish(self: Box<Self>) -> Result<()>;
}
