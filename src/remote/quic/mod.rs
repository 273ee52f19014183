//! Bytes over QUIC: what client and server of a session share. Separate from the protocol, which
//! knows no sockets; this folder is the only place that names quinn and tokio.
//!
//! One bidirectional stream carries the hello, the answer, and then frames both ways, each after
//! its length (u32, little-endian). A bulk transfer is a unidirectional stream: the length of its
//! header (u32), the header, the bytes. [`client`] and [`server`] run one network thread each.
//!
//! Before the token is accepted a peer may have one stream and [`STRANGER_WINDOW`] bytes in flight.
//! QUIC limits streams, their number, and the connection; quinn fixes the stream's limit in the
//! configuration but can raise the other two, so the connection's is the one that holds strangers.

mod bulk;
pub mod client;
mod explain;
pub mod server;
mod session;

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{
    ConnectionError, Endpoint, EndpointConfig, MtuDiscoveryConfig, ReadError, ReadExactError,
    RecvStream, SendStream, ServerConfig, TokioRuntime, TransportConfig, VarInt, WriteError,
};
use tokio::sync::Notify;

use super::transport::{MAX_FRAME_BYTES, Waker};
use crate::error::{Error, Result};

/// A peer that was not heard from for this long is gone.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(3);
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// Bulk transfers of one session that run at once.
pub const BULK_STREAMS: u32 = 3;
/// Bytes in flight on one stream: 100 ms at 1 Gbit/s, and some.
const STREAM_WINDOW: u32 = 16 << 20;
const _: () = assert!(STREAM_WINDOW >= 1_000_000_000 / 8 / 10);
/// Bytes in flight in one session, and that the sender keeps: transfers that nobody reads, or that
/// the network does not carry, fill at most their own streams and leave room for frames.
const SESSION_WINDOW: u32 = (BULK_STREAMS + 1) * STREAM_WINDOW;
/// Bytes in flight from somebody who has not shown the token: a hello, and some. In tiny pieces
/// they hold the packets they came in, of which quinn keeps at most 32 KiB more per stream.
pub const STRANGER_WINDOW: u32 = 4 << 10;
/// Out-of-order bytes of the TLS handshake, per encryption level (there are three).
const HANDSHAKE_BYTES: usize = 8 << 10;
/// Bytes sent before the first acknowledgement: a program or a picture needs no slow start.
const INITIAL_WINDOW: u64 = 1 << 20;
/// UDP payload that works everywhere.
const MIN_MTU: u16 = 1200;
/// Ten packets of this size, as quinn sends at once, stay below the 64 KiB of one GSO send.
pub const MAX_MTU: u16 = 6500;
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// Bulk bytes go through buffers of this size, two per transfer, used again and again.
const STAGING_BYTES: usize = 1 << 20;
/// How long last words may take to arrive.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a session that is over may take to let go before the worker goes on without it.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(10);
/// Frames go before bulk bytes.
const FRAME_PRIORITY: i32 = 1;

/// Why a connection was closed, for the peer.
#[derive(Debug, Clone, Copy)]
enum Code {
    Done = 0,
    Refused = 1,
    Fault = 2,
    Stopped = 3,
}

impl From<Code> for VarInt {
    fn from(code: Code) -> Self {
        VarInt::from_u32(code as u32)
    }
}

/// How a session, or a part of it, came to an end.
enum Ending {
    /// The peer has said all that it had to say.
    Finished,
    /// The connection is gone.
    Lost(ConnectionError),
    /// The peer broke a stream off; why, it says where it closes the connection.
    Broken(Error),
    /// Something is wrong: the connection must be closed with this message.
    Fault(Error),
}

/// The result of a part of a session.
type Step<T> = std::result::Result<T, Ending>;

impl From<Error> for Ending {
    fn from(error: Error) -> Self {
        Ending::Fault(error)
    }
}

impl From<ConnectionError> for Ending {
    fn from(error: ConnectionError) -> Self {
        Ending::Lost(error)
    }
}

impl From<ReadError> for Ending {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::ConnectionLost(error) => Ending::Lost(error),
            other => Ending::Broken(Error::remote(format!("a transfer was broken off: {other}"))),
        }
    }
}

impl From<WriteError> for Ending {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::ConnectionLost(error) => Ending::Lost(error),
            other => Ending::Broken(Error::remote(format!("a transfer was broken off: {other}"))),
        }
    }
}

impl From<ReadExactError> for Ending {
    fn from(error: ReadExactError) -> Self {
        match error {
            ReadExactError::FinishedEarly(0) => Ending::Finished,
            ReadExactError::FinishedEarly(_) => {
                Ending::Fault(Error::remote("malformed message: it is cut short"))
            }
            ReadExactError::ReadError(error) => error.into(),
        }
    }
}

/// What both sides ask of the transport. The receive window is the stranger's: it is raised later.
fn transport() -> TransportConfig {
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(MAX_MTU);
    let mut congestion = CubicConfig::default();
    congestion.initial_window(INITIAL_WINDOW);
    let mut transport = TransportConfig::default();
    transport
        .max_idle_timeout(Some(VarInt::from_u32(IDLE_TIMEOUT.as_millis() as u32).into()))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(STRANGER_WINDOW))
        .send_window(SESSION_WINDOW.into())
        .crypto_buffer_size(HANDSHAKE_BYTES)
        .datagram_receive_buffer_size(None)
        .initial_mtu(MIN_MTU)
        .mtu_discovery_config(Some(discovery))
        .congestion_controller_factory(Arc::new(congestion));
    transport
}

/// An endpoint on `address` that takes packets of up to `max_mtu` bytes, with large socket buffers
/// where the system allows them.
fn endpoint(
    address: SocketAddr,
    server: Option<ServerConfig>,
    max_mtu: u16,
) -> std::io::Result<Endpoint> {
    let socket = UdpSocket::bind(address)?;
    let state = quinn::udp::UdpSocketState::new((&socket).into())?;
    // Smaller buffers only make it slower.
    let sized = state
        .set_recv_buffer_size((&socket).into(), SOCKET_BUFFER_BYTES)
        .and_then(|()| state.set_send_buffer_size((&socket).into(), SOCKET_BUFFER_BYTES));
    if let Err(error) = sized {
        tracing::debug!(%error, "socket buffers stay small");
    }
    let mut config = EndpointConfig::default();
    if let Err(error) = config.max_udp_payload_size(max_mtu) {
        tracing::debug!(%error, "packets stay small");
    }
    Endpoint::new(config, server, socket, Arc::new(TokioRuntime))
}

/// Wakes the network thread's two loops, those of frames and of bulk transfers, from other threads.
/// While both are awake a call is one atomic exchange, which also orders it: whoever finds a bit
/// set did so before the loop cleared it, hence before the loop looks for what there is to send.
#[derive(Default)]
struct Wake {
    awake: AtomicU8,
    frames: Notify,
    bulk: Notify,
}

impl Wake {
    const FRAMES: u8 = 1;
    const BULK: u8 = 2;

    fn wake(&self) {
        let awake = self.awake.swap(Self::FRAMES | Self::BULK, Ordering::AcqRel);
        if awake & Self::FRAMES == 0 {
            self.frames.notify_one();
        }
        if awake & Self::BULK == 0 {
            self.bulk.notify_one();
        }
    }

    fn waker(self: &Arc<Self>) -> Waker {
        let wake = Arc::clone(self);
        Box::new(move || wake.wake())
    }

    /// To be called before looking for frames.
    fn looks_for_frames(&self) {
        self.awake.fetch_and(!Self::FRAMES, Ordering::AcqRel);
    }

    /// To be called before looking for bulk transfers.
    fn looks_for_bulk(&self) {
        self.awake.fetch_and(!Self::BULK, Ordering::AcqRel);
    }
}

/// Buffers for bulk bytes: fresh ones would cost a page fault every 4 KiB.
#[derive(Default)]
struct Staging(Mutex<Vec<Vec<u8>>>);

impl Staging {
    fn take(&self) -> Vec<u8> {
        let free = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        free.unwrap_or_else(|| vec![0; STAGING_BYTES])
    }

    fn give(&self, buffer: Vec<u8>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }
}

/// The front of a staging buffer, which goes back when the network has no more use for it.
struct Loan {
    buffer: Vec<u8>,
    filled: usize,
    staging: Arc<Staging>,
}

impl AsRef<[u8]> for Loan {
    fn as_ref(&self) -> &[u8] {
        self.buffer.get(..self.filled).unwrap_or_default()
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.staging.give(std::mem::take(&mut self.buffer));
    }
}

/// Sends one frame.
async fn send_frame(stream: &mut SendStream, frame: Vec<u8>) -> Step<()> {
    if frame.len() > MAX_FRAME_BYTES {
        let len = frame.len();
        return Err(Error::remote(format!("a frame of {len} bytes cannot be sent")).into());
    }
    let len = (frame.len() as u32).to_le_bytes().to_vec();
    Ok(stream.write_all_chunks(&mut [len.into(), frame.into()]).await?)
}

/// The next length-prefixed message of at most `max` bytes.
async fn receive(stream: &mut RecvStream, max: usize, what: &str) -> Step<Vec<u8>> {
    let mut len = [0; 4];
    stream.read_exact(&mut len).await?;
    let len = u32::from_le_bytes(len) as usize;
    if len > max {
        let message = format!("malformed message: a {what} of {len} bytes, more than {max}");
        return Err(Error::remote(message).into());
    }
    let mut message = vec![0; len];
    match stream.read_exact(&mut message).await {
        Ok(()) => Ok(message),
        Err(ReadExactError::FinishedEarly(_)) => Err(ReadExactError::FinishedEarly(len).into()),
        Err(error) => Err(error.into()),
    }
}

/// Runs `work` where it may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(Error::remote("internal error: a task of the session panicked")))
}
