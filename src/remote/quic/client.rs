//! The client's end of a connection: finds the worker, shows the token, and then moves the bytes of
//! a [`ClientEnd`] on a thread of its own until one side is gone.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Endpoint, RecvStream, SendStream, VarInt};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::bulk::send_one_bulk;
use super::explain::{explain, explain_handshake};
use super::{
    BULK_STREAMS, Code, Ending, FAREWELL_TIMEOUT, FRAME_PRIORITY, MAX_MTU, SESSION_WINDOW, Staging,
    Step, Wake, blocking, endpoint, receive, send_frame, transport,
};
use crate::error::{Error, Result};
use crate::remote::hello::{ANSWER_HEADER_BYTES, Answer, Hello, Status, readable};
use crate::remote::transport::{ClientEnd, MAX_FRAME_BYTES, Waker};
use crate::remote::trust::{PinnedCertificate, SERVER_NAME};
use crate::remote::url::PairingUrl;

/// How long a worker may take to answer, from the first packet to the welcome.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long ops for which nobody waits are held back, so that more go with them.
const GATHER_TIME: Duration = Duration::from_millis(1);
/// How long a connection that is dropped may take to send what waits.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// How long its last packet may take to leave. That it arrives nobody waits for: a worker that does
/// not hear it notices the silence.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(10);
/// How long a client waits for its turn.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(4 * 3600);
/// How often a caller that waits for its turn can say that it does not want to any more.
const QUEUE_TICK: Duration = Duration::from_millis(100);
/// Addresses of one host that are tried, all at once.
const MAX_ADDRESSES: usize = 8;

/// A session's connection. Dropping it sends the frames that wait (for at most a second) unless the
/// worker has answered everything, closes, and then ends whatever still waits through
/// [`ClientEnd::lost`].
pub struct Connection {
    name: String,
    greeting: String,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    wake: Arc<Wake>,
    is_closing: AtomicBool,
    closing: Notify,
    /// What the worker said last of the queue: whatever it says how often, one line is kept.
    news: Mutex<Option<String>>,
}

impl Shared {
    /// What is new since it was asked for last.
    fn news(&self) -> Option<String> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn tell(&self, news: String) {
        *self.news.lock().unwrap_or_else(PoisonError::into_inner) = Some(news);
    }
}

/// What a client does while others come first: hears how many when that changes, else `None` from
/// time to time; an error ends the wait.
pub type WhileWaiting<'a> = dyn FnMut(Option<&str>) -> Result<()> + 'a;

/// Connects to the worker of `url`, which must answer within `limit`: [`CONNECT_TIMEOUT`] but in
/// tests. `end` is asked for frames at once, and again whenever [`Connection::waker`] is called.
///
/// # Errors
/// If the worker is not found, does not answer, has another certificate, or refuses, or as `waits`
/// says. Then `end` was not touched: [`ClientEnd::lost`] is called, once, when an established
/// connection ends.
pub fn connect(
    url: &PairingUrl,
    end: Arc<dyn ClientEnd>,
    hello: Hello,
    limit: Duration,
    waits: &mut WhileWaiting<'_>,
) -> Result<Connection> {
    let shared = Arc::new(Shared::default());
    let (tell, answer) = mpsc::channel();
    let network = Network { url: url.clone(), hello, limit, shared: Arc::clone(&shared) };
    let failed = |error: std::io::Error| Error::other(format!("no network thread: {error}"));
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let run = move || {
        runtime.block_on(network.run(end, &tell));
        runtime.shutdown_timeout(CLOSE_TIMEOUT);
    };
    let thread = thread::Builder::new().name("network".into()).spawn(run).map_err(failed)?;
    // Dropped on an error, it ends the thread.
    let mut connection =
        Connection { name: url.name(), greeting: String::new(), shared, thread: Some(thread) };
    connection.greeting = loop {
        match answer.recv_timeout(QUEUE_TICK) {
            Ok(greeting) => break greeting?,
            Err(RecvTimeoutError::Timeout) => waits(connection.shared.news().as_deref())?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::other("the network thread died"));
            }
        }
    };
    Ok(connection)
}

impl Connection {
    /// To be called when `end` has something to send; from any thread, and often.
    pub fn waker(&self) -> Waker {
        self.shared.wake.waker()
    }

    /// The worker, `HOST:PORT`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the worker said when the session began, such as `session 1 of 4`.
    pub fn greeting(&self) -> &str {
        &self.greeting
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.is_closing.store(true, Ordering::Release);
        self.shared.closing.notify_one();
        self.shared.wake.frames.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // It catches what panics in the session; there is nobody left to tell.
            let _ = thread.join();
        }
    }
}

/// Everything waiting ends with an error, whatever becomes of the network thread.
struct LostOnce {
    end: Arc<dyn ClientEnd>,
    error: Error,
}

impl Drop for LostOnce {
    fn drop(&mut self) {
        self.end.lost(self.error.clone());
    }
}

struct Network {
    url: PairingUrl,
    hello: Hello,
    limit: Duration,
    shared: Arc<Shared>,
}

/// A session, as far as the worker's answer says.
struct Session {
    endpoint: Endpoint,
    connection: quinn::Connection,
    send: SendStream,
    receive: RecvStream,
    answer: Answer,
}

impl Network {
    async fn run(self, end: Arc<dyn ClientEnd>, tell: &mpsc::Sender<Result<String>>) {
        let silent = || {
            Error::remote(format!(
                "the worker {name} does not answer within {limit:?}: is `tiny-sd worker` running \
                 there, and does its firewall let UDP port {port} in?",
                name = self.url.name(),
                limit = self.limit,
                port = self.url.port(),
            ))
        };
        let established = tokio::select! {
            established = timeout(self.limit, self.establish()) => established,
            // The caller does not want it any more.
            () = self.shared.closing.notified() => return,
        };
        let welcomed = match established.unwrap_or_else(|_| Err(silent())) {
            Ok(session) => self.take_turn(session).await,
            Err(error) => Err(error),
        };
        let session = match welcomed {
            Ok(session) => session,
            Err(error) => {
                // The caller waits for this.
                let _ = tell.send(Err(error));
                return;
            }
        };
        let name = self.url.name();
        let error = Error::remote(format!("internal error in the connection to {name}"));
        let mut lost = LostOnce { end: Arc::clone(&end), error };
        let Session { endpoint, connection, send, receive, answer } = session;
        let _ = tell.send(Ok(answer.text));
        let ending = self.drive(&end, &connection, send, receive).await;
        let is_closing = self.shared.is_closing.load(Ordering::Acquire);
        // A stream that breaks is mostly the shadow of a connection that does, and comes before it.
        if matches!(ending, Ending::Broken(_)) {
            let _ = timeout(FAREWELL_TIMEOUT, connection.closed()).await;
        }
        let ending = connection.close_reason().map_or(ending, Ending::Lost);
        let (code, text, error) = match ending {
            _ if is_closing => {
                (Code::Done, "", Error::remote(format!("the session with {name} was closed")))
            }
            Ending::Finished => {
                (Code::Done, "", Error::remote(format!("the worker {name} ended the session")))
            }
            Ending::Lost(error) => (Code::Done, "", explain(&name, &error)),
            Ending::Broken(error) | Ending::Fault(error) => {
                (Code::Fault, "client gave up", error.context(&name))
            }
        };
        connection.close(code.into(), text.as_bytes());
        lost.error = error;
        drop(lost);
        let _ = timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await;
    }

    /// Finds the worker, shows the token and hears its answer.
    async fn establish(&self) -> Result<Session> {
        let url = self.url.clone();
        let addresses = blocking(move || url.resolve()).await?;
        let verifier = PinnedCertificate::new(self.url.fingerprint());
        let tls = QuicClientConfig::try_from(verifier.client_config()?)
            .map_err(|error| Error::other(format!("QUIC needs TLS 1.3: {error}")))?;
        let mut config = ClientConfig::new(Arc::new(tls));
        let mut transport = transport();
        transport.receive_window(VarInt::from_u32(SESSION_WINDOW));
        config.transport_config(Arc::new(transport));

        let mut attempts = JoinSet::new();
        for address in addresses.into_iter().take(MAX_ADDRESSES) {
            attempts.spawn(handshake(address, config.clone()));
        }
        let mut failure = None;
        while let Some(attempt) = attempts.join_next().await {
            match attempt {
                Ok(Ok((endpoint, connection))) => {
                    return self.introduce(endpoint, connection).await;
                }
                Ok(Err(error)) => failure = Some(error),
                Err(_) => {}
            }
        }
        let name = self.url.name();
        Err(match (verifier.stranger(), failure) {
            (Some(stranger), _) => Error::remote(format!(
                "the worker {name} has another certificate ({stranger}) than its URL says: it was \
                 set up anew or is not the one you mean; take the URL that it prints now"
            )),
            (None, Some(Ending::Lost(error))) => explain_handshake(&name, self.url.port(), &error),
            (None, Some(Ending::Broken(error) | Ending::Fault(error))) => error.context(name),
            (None, Some(Ending::Finished) | None) => {
                Error::remote(format!("the worker {name} cannot be reached"))
            }
        })
    }

    async fn introduce(
        &self,
        endpoint: Endpoint,
        connection: quinn::Connection,
    ) -> Result<Session> {
        let exchange = async {
            let (mut send, mut receive) = connection.open_bi().await?;
            // A stream that is open cannot refuse a priority.
            let _ = send.set_priority(FRAME_PRIORITY);
            send.write_all(&self.hello.encode(self.url.token())).await?;
            let answer = hear(&mut receive).await?;
            Ok((answer, send, receive))
        };
        let (answer, send, receive) =
            exchange.await.map_err(|ending| self.explain_silence(ending))?;
        Ok(Session { endpoint, connection, send, receive, answer })
    }

    /// Waits while others come first; then the session begins, or not.
    async fn take_turn(&self, mut session: Session) -> Result<Session> {
        let name = self.url.name();
        let turn = async {
            while session.answer.status == Status::Wait {
                self.shared.tell(std::mem::take(&mut session.answer.text));
                session.answer = hear(&mut session.receive)
                    .await
                    .map_err(|ending| self.explain_silence(ending))?;
            }
            Ok(())
        };
        let waited = tokio::select! {
            waited = timeout(QUEUE_TIMEOUT, turn) => waited.unwrap_or_else(|_| {
                let hours = QUEUE_TIMEOUT.as_secs() / 3600;
                Err(Error::remote(format!("the worker {name} had no place within {hours} h")))
            }),
            () = self.shared.closing.notified() => Err(Error::interrupted()),
        };
        if waited.is_ok() && session.answer.status == Status::Welcome {
            return Ok(session);
        }
        // So that nobody waits for this client's turn.
        session.connection.close(Code::Done.into(), b"");
        let _ = timeout(CLOSE_TIMEOUT, session.endpoint.wait_idle()).await;
        waited?;
        Err(session.answer.refusal().context(&name))
    }

    fn explain_silence(&self, ending: Ending) -> Error {
        let name = self.url.name();
        match ending {
            Ending::Lost(error) => explain(&name, &error),
            Ending::Broken(error) | Ending::Fault(error) => error.context(&name),
            Ending::Finished => Error::remote(format!("the worker {name} gave no answer")),
        }
    }

    /// Moves bytes until something ends.
    async fn drive(
        &self,
        end: &Arc<dyn ClientEnd>,
        connection: &quinn::Connection,
        mut send: SendStream,
        mut receive_stream: RecvStream,
    ) -> Ending {
        let frames_up = async {
            match self.send_frames(&**end, &mut send).await {
                // All was said: what ends now is the worker's side.
                Ok(()) => std::future::pending().await,
                Err(ending) => ending,
            }
        };
        let frames_down = async {
            loop {
                let frame = receive(&mut receive_stream, MAX_FRAME_BYTES, "frame").await;
                let received = frame.and_then(|frame| Ok(end.received(&frame)?));
                if let Err(ending) = received {
                    return ending;
                }
            }
        };
        let flushed = async {
            self.shared.closing.notified().await;
            tokio::time::sleep(FLUSH_TIMEOUT).await;
        };
        tokio::select! {
            biased; // What has arrived is heard before the connection's end.
            ending = frames_down => ending,
            ending = frames_up => ending,
            ending = self.send_bulk(end, connection) => ending,
            error = connection.closed() => Ending::Lost(error),
            () = flushed => Ending::Finished,
        }
    }

    async fn send_frames(&self, end: &dyn ClientEnd, send: &mut SendStream) -> Step<()> {
        loop {
            let is_closing = self.shared.is_closing.load(Ordering::Acquire);
            if is_closing && end.is_settled() {
                return Err(Ending::Finished);
            }
            self.shared.wake.looks_for_frames();
            while let Some(frame) = end.next_frame() {
                send_frame(send, frame).await?;
            }
            if is_closing {
                // Closed already only if the connection is.
                let _ = send.finish();
                return Ok(());
            }
            self.shared.wake.frames.notified().await;
            // Alone, a small op would cost a packet: mostly others follow.
            let _ = timeout(GATHER_TIME, self.due(end)).await;
        }
    }

    async fn due(&self, end: &dyn ClientEnd) {
        loop {
            self.shared.wake.looks_for_frames();
            if end.is_due() || self.shared.is_closing.load(Ordering::Acquire) {
                return;
            }
            self.shared.wake.frames.notified().await;
        }
    }

    async fn send_bulk(&self, end: &Arc<dyn ClientEnd>, connection: &quinn::Connection) -> Ending {
        let staging = Arc::new(Staging::default());
        let mut running = JoinSet::new();
        loop {
            self.shared.wake.looks_for_bulk();
            while running.len() < BULK_STREAMS as usize
                && let Some(source) = end.next_bulk()
            {
                running.spawn(send_one_bulk(connection.clone(), source, Arc::clone(&staging)));
            }
            tokio::select! {
                Some(sent) = running.join_next() => match sent {
                    Ok(Ok(())) => {}
                    Ok(Err(ending)) => return ending,
                    Err(_) => return Error::remote("internal error in a transfer").into(),
                },
                () = self.shared.wake.bulk.notified() => {}
            }
        }
    }
}

/// One answer to the hello.
async fn hear(receive: &mut RecvStream) -> Step<Answer> {
    let mut header = [0; ANSWER_HEADER_BYTES];
    receive.read_exact(&mut header).await?;
    let (status, len) = Answer::decode_header(&header)?;
    let mut text = vec![0; len];
    receive.read_exact(&mut text).await?;
    Ok(Answer::new(status, readable(&text)))
}

async fn handshake(
    address: SocketAddr,
    config: ClientConfig,
) -> Step<(Endpoint, quinn::Connection)> {
    let any = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let unreachable = |error: String| Error::remote(format!("{address} is out of reach: {error}"));
    let endpoint = endpoint(any, None, MAX_MTU).map_err(|error| unreachable(error.to_string()))?;
    let connecting = endpoint.connect_with(config, address, SERVER_NAME);
    let connection = connecting.map_err(|error| unreachable(error.to_string()))?.await?;
    Ok((endpoint, connection))
}
