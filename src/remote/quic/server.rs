//! The worker's end: listens, lets in who has the token, and refuses readably who cannot be served.
//! One network thread serves all sessions.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Connection, Endpoint, Incoming, RecvStream, SendStream, ServerConfig, VarInt};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::session::{Session, reason};
use super::{
    BULK_STREAMS, Code, Ending, FAREWELL_TIMEOUT, FRAME_PRIORITY, MAX_MTU, RELEASE_TIMEOUT,
    SESSION_WINDOW, Step, Wake, blocking, endpoint, transport,
};
use crate::error::{Error, Result};
use crate::remote::admission::{Admission, Caps, Verdict};
use crate::remote::hello::{Answer, HELLO_BYTES, Hello, Offer, Status, greeting};
use crate::remote::queue::{Entry, Queue, Ticket};
use crate::remote::transport::{Waker, WorkerEnd};
use crate::remote::trust::{Identity, Token};

/// Bytes that are kept of a connection that nobody has looked at yet.
const INCOMING_BYTES: u64 = 8 << 10;

/// What a worker gives at most.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Sessions at a time (`--max-sessions`).
    pub max_sessions: usize,
    /// Clients that may wait for a session to end (`--max-waiting`).
    pub max_waiting: usize,
    /// A session without a frame either way for this long is ended (`--idle-timeout`).
    pub idle_timeout: Option<Duration>,
    /// How long a connection may take to show its token.
    pub hello_timeout: Duration,
    /// Connections without an accepted token.
    pub strangers: Caps,
    /// UDP payload that clients may send, 1200 to [`MAX_MTU`]: where it fits the path is found out.
    pub max_packet_bytes: u16,
    /// What the welcome says of the worker's device.
    pub offer: Offer,
}

impl Default for Limits {
    fn default() -> Self {
        let strangers =
            Caps { pending: 64, pending_per_address: 8, wrong_token_delay: Duration::from_secs(1) };
        Self {
            max_sessions: 4,
            max_waiting: 16,
            idle_timeout: None,
            hello_timeout: Duration::from_secs(5),
            strangers,
            max_packet_bytes: MAX_MTU,
            offer: Offer::default(),
        }
    }
}

/// What a session is told about itself.
pub struct SessionInfo {
    /// Counts from 1 over the worker's life.
    pub number: u64,
    /// The client's.
    pub address: SocketAddr,
    /// To be called when [`WorkerEnd::next_frame`] has something.
    pub waker: Waker,
}

type MakeSession = dyn Fn(SessionInfo) -> Result<Arc<dyn WorkerEnd>> + Send + Sync;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Serving,
    Draining,
    Stopped,
}

/// A worker that listens. Dropping it stops it.
pub struct Server {
    address: SocketAddr,
    phase: watch::Sender<Phase>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Listens on `address` (port 0 is any free one) for clients that know the identity's certificate
/// and token and speak what `hello` says; `make_session` may block, its error is the refusal.
///
/// # Errors
/// If the address cannot be had.
pub fn serve(
    address: SocketAddr,
    identity: &Identity,
    hello: Hello,
    limits: Limits,
    make_session: impl Fn(SessionInfo) -> Result<Arc<dyn WorkerEnd>> + Send + Sync + 'static,
) -> Result<Server> {
    let config = server_config(identity, &limits)?;
    let failed = |error: std::io::Error| Error::other(format!("no network thread: {error}"));
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let entered = runtime.enter();
    let endpoint = endpoint(address, Some(config), limits.max_packet_bytes).map_err(|error| {
        Error::usage(format!("cannot listen on UDP {address}: {error} (--listen HOST:PORT)"))
    })?;
    drop(entered);
    let address = endpoint.local_addr().map_err(failed)?;
    let (phase, phases) = watch::channel(Phase::Serving);
    let worker = Arc::new(Worker {
        token: identity.token().clone(),
        hello,
        admission: Mutex::new(Admission::new(limits.strangers)),
        queue: Mutex::new(Queue::new(limits.max_sessions, limits.max_waiting)),
        moved: watch::Sender::new(()),
        limits,
        phases: phases.clone(),
        sessions: AtomicU64::new(0),
        make_session: Box::new(make_session),
    });
    let run = move || {
        runtime.block_on(worker.run(endpoint, phases));
        runtime.shutdown_timeout(FAREWELL_TIMEOUT);
    };
    let thread = thread::Builder::new().name("network".into()).spawn(run).map_err(failed)?;
    Ok(Server { address, phase, thread: Mutex::new(Some(thread)) })
}

impl Server {
    /// Where it listens, with the port that was bound.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// From now on new sessions are refused, and when the running ones have ended so does the
    /// worker. Returns at once.
    pub fn begin_shutdown(&self) {
        self.advance(Phase::Draining);
    }

    /// Refuses new sessions and waits for the running ones.
    pub fn shutdown(&self) {
        self.begin_shutdown();
        self.wait();
    }

    /// Ends all sessions at once.
    pub fn stop(&self) {
        self.advance(Phase::Stopped);
    }

    /// Waits until the worker has ended, for whichever reason.
    pub fn wait(&self) {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the network thread panicked");
        }
    }

    fn advance(&self, to: Phase) {
        self.phase.send_modify(|phase| *phase = to.max(*phase));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
        self.wait();
    }
}

/// Small buffers for strangers; [`Worker::welcome`] raises what can be raised.
fn server_config(identity: &Identity, limits: &Limits) -> Result<ServerConfig> {
    let tls = QuicServerConfig::try_from(identity.server_config()?)
        .map_err(|error| Error::other(format!("QUIC needs TLS 1.3: {error}")))?;
    let mut config = ServerConfig::with_crypto(Arc::new(tls));
    let mut transport = transport();
    transport.max_concurrent_bidi_streams(VarInt::from_u32(1));
    let pending = limits.strangers.pending;
    config
        .transport_config(Arc::new(transport))
        .max_incoming(pending)
        .incoming_buffer_size(INCOMING_BYTES)
        .incoming_buffer_size_total(INCOMING_BYTES.saturating_mul(pending as u64));
    Ok(config)
}

struct Worker {
    token: Token,
    hello: Hello,
    limits: Limits,
    admission: Mutex<Admission>,
    phases: watch::Receiver<Phase>,
    queue: Mutex<Queue>,
    /// The queue has moved.
    moved: watch::Sender<()>,
    sessions: AtomicU64,
    make_session: Box<MakeSession>,
}

/// A place among the sessions, given back when dropped.
struct Place(Arc<Worker>);

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.0.queue).finished();
        self.0.moved.send_replace(());
    }
}

/// A place among those who wait, given back when dropped.
struct Waiting {
    worker: Arc<Worker>,
    ticket: Ticket,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        lock(&self.worker.queue).leave(self.ticket);
        self.worker.moved.send_replace(());
    }
}

/// Somebody with the token.
enum Guest {
    Place(Place),
    Waiting(Waiting),
}

/// A place among the strangers.
struct Stranger {
    worker: Arc<Worker>,
    address: SocketAddr,
}

impl Drop for Stranger {
    fn drop(&mut self) {
        lock(&self.worker.admission).left(self.address.ip());
    }
}

impl Worker {
    async fn run(self: Arc<Self>, endpoint: Endpoint, mut phases: watch::Receiver<Phase>) {
        let mut connections = JoinSet::new();
        loop {
            let phase = *phases.borrow_and_update();
            if phase == Phase::Stopped
                || phase == Phase::Draining && lock(&self.queue).running() == 0
            {
                break;
            }
            tokio::select! {
                incoming = endpoint.accept() => match incoming {
                    Some(incoming) => self.knock(incoming, &mut connections),
                    None => break,
                },
                Some(_) = connections.join_next() => {}
                // The sender is gone only after the server was stopped.
                Ok(()) = phases.changed() => {}
            }
        }
        endpoint.close(Code::Stopped.into(), b"the worker was stopped");
        let ended = async { while connections.join_next().await.is_some() {} };
        if timeout(RELEASE_TIMEOUT, ended).await.is_err() {
            tracing::warn!("a session does not let go; the worker ends without it");
        }
        let _ = timeout(FAREWELL_TIMEOUT, endpoint.wait_idle()).await;
    }

    fn knock(self: &Arc<Self>, incoming: Incoming, connections: &mut JoinSet<()>) {
        let address = incoming.remote_address();
        let validated = incoming.remote_address_validated();
        match lock(&self.admission).knock(address.ip(), validated, Instant::now()) {
            Verdict::Admit => {}
            Verdict::Validate => {
                // Fails only where it was validated already.
                let _ = incoming.retry();
                return;
            }
            Verdict::Refuse => return incoming.refuse(),
        }
        let stranger = Stranger { worker: Arc::clone(self), address };
        connections.spawn(Arc::clone(self).serve(incoming, stranger));
    }

    /// One connection, from the handshake to the end of its session.
    async fn serve(self: Arc<Self>, incoming: Incoming, stranger: Stranger) {
        let address = stranger.address;
        let opened = timeout(self.limits.hello_timeout, async {
            let connection = incoming.accept()?.await?;
            let heard = self.hear(&connection).await;
            heard.map(|(send, receive, hello)| (connection, send, receive, hello))
        });
        let (connection, mut send, receive, hello) = match opened.await {
            Ok(Ok(opened)) => opened,
            Ok(Err(ending)) => {
                return tracing::debug!(%address, reason = reason(&ending), "nobody came in");
            }
            // What is dropped with the timeout is closed by that.
            Err(_) => return tracing::debug!(%address, "no token was shown in time"),
        };
        let judged = match self.judge(hello, address) {
            Ok(guest) => {
                drop(stranger);
                match guest {
                    Guest::Place(place) => Ok(place),
                    Guest::Waiting(waiting) => {
                        tracing::info!(%address, "waits for its turn");
                        match self.wait(waiting, &connection, &mut send).await {
                            Ok(place) => Ok(place),
                            Err(None) => return tracing::info!(%address, "waited and left"),
                            Err(Some(answer)) => Err((answer, Duration::ZERO)),
                        }
                    }
                }
            }
            Err(refused) => Err(refused),
        };
        match judged {
            Ok(place) => self.welcome(place, connection, send, receive).await,
            Err((answer, delay)) => {
                tracing::info!(%address, status = ?answer.status, "refused");
                let until = async {
                    sleep(delay).await;
                    self.refuse(&connection, send, answer).await;
                };
                tokio::select! { () = until => {}, _ = connection.closed() => {} }
            }
        }
    }

    /// The hello, and nothing more.
    async fn hear(&self, connection: &Connection) -> Step<(SendStream, RecvStream, Vec<u8>)> {
        let (send, mut receive) = connection.accept_bi().await?;
        let mut hello = vec![0; HELLO_BYTES];
        receive.read_exact(&mut hello).await?;
        Ok((send, receive, hello))
    }

    /// A place among the sessions, or a refusal and how long to wait with it.
    fn judge(
        self: &Arc<Self>,
        hello: Vec<u8>,
        address: SocketAddr,
    ) -> std::result::Result<Guest, (Answer, Duration)> {
        let hello = <[u8; HELLO_BYTES]>::try_from(hello).ok().and_then(|h| Hello::decode(&h));
        let Some((hello, _)) = hello.filter(|(_, token)| *token == self.token) else {
            let delay = lock(&self.admission).failed(address.ip(), Instant::now());
            return Err((Answer::new(Status::WrongToken, "it is not this worker's"), delay));
        };
        lock(&self.admission).passed(address.ip());
        let at_once = |answer| (answer, Duration::ZERO);
        self.hello.check(&hello).map_err(at_once)?;
        if *self.phases.borrow() != Phase::Serving {
            return Err(at_once(self.shutting_down()));
        }
        let mut queue = lock(&self.queue);
        match queue.enter() {
            Entry::Run => Ok(Guest::Place(Place(Arc::clone(self)))),
            Entry::Wait(ticket) => Ok(Guest::Waiting(Waiting { worker: Arc::clone(self), ticket })),
            Entry::Busy => {
                let text = format!(
                    "{} of {} in use, {} waiting; try again later, or start it with a larger \
                     --max-sessions or --max-waiting",
                    queue.running(),
                    count(self.limits.max_sessions, "session"),
                    count(queue.waiting(), "client"),
                );
                Err(at_once(Answer::new(Status::Busy, text)))
            }
        }
    }

    fn shutting_down(&self) -> Answer {
        let running = lock(&self.queue).running();
        let text = format!("first {} must end", count(running, "session"));
        Answer::new(Status::ShuttingDown, text)
    }

    /// Waits for the turn of a client, which is told whenever the queue moves. `Err(None)` if it is
    /// gone, else why it waited in vain.
    async fn wait(
        self: &Arc<Self>,
        waiting: Waiting,
        connection: &Connection,
        send: &mut SendStream,
    ) -> std::result::Result<Place, Option<Answer>> {
        let (mut moved, mut phases) = (self.moved.subscribe(), self.phases.clone());
        let mut told = None;
        loop {
            if *phases.borrow_and_update() != Phase::Serving {
                return Err(Some(self.shutting_down()));
            }
            let ahead = {
                let mut queue = lock(&self.queue);
                if queue.start(waiting.ticket) {
                    return Ok(Place(Arc::clone(self)));
                }
                queue.ahead(waiting.ticket).unwrap_or(0)
            };
            if told.replace(ahead) != Some(ahead) {
                let text = format!(
                    "{} before this client, {} running",
                    count(ahead, "client"),
                    count(self.limits.max_sessions, "session")
                );
                let answer = Answer::new(Status::Wait, text).encode();
                // Who does not read must not hold up who comes behind.
                let written = timeout(FAREWELL_TIMEOUT, send.write_all(&answer)).await;
                written.map_err(|_| None)?.map_err(|_| None)?;
            }
            tokio::select! {
                // An error would mean that the worker is gone, and its endpoint with it.
                _ = moved.changed() => {}
                _ = phases.changed() => {}
                _ = connection.closed() => return Err(None),
            }
        }
    }

    async fn refuse(&self, connection: &Connection, mut send: SendStream, answer: Answer) {
        let farewell = async {
            send.write_all(&answer.encode()).await?;
            // Closed already only if the connection is; the client closes when it has read.
            let _ = send.finish();
            Ok::<_, Ending>(connection.closed().await)
        };
        let _ = timeout(FAREWELL_TIMEOUT, farewell).await;
        connection.close(Code::Refused.into(), answer.text.as_bytes());
    }

    async fn welcome(
        self: Arc<Self>,
        place: Place,
        connection: Connection,
        mut send: SendStream,
        receive: RecvStream,
    ) {
        let address = connection.remote_address();
        let number = self.sessions.fetch_add(1, Ordering::Relaxed) + 1;
        let wake = Arc::new(Wake::default());
        let info = SessionInfo { number, address, waker: wake.waker() };
        let worker = Arc::clone(&self);
        let end = match blocking(move || (worker.make_session)(info)).await {
            Ok(end) => end,
            Err(error) => {
                tracing::warn!(number, %address, %error, "session refused");
                let answer = Answer::new(Status::Refused, error.to_string());
                return self.refuse(&connection, send, answer).await;
            }
        };
        connection.set_receive_window(VarInt::from_u32(SESSION_WINDOW));
        connection.set_max_concurrent_uni_streams(VarInt::from_u32(BULK_STREAMS));
        // A stream that is open cannot refuse a priority.
        let _ = send.set_priority(FRAME_PRIORITY);
        let running = lock(&self.queue).running();
        let Limits { max_sessions, offer, .. } = &self.limits;
        let text = greeting(running, *max_sessions, offer);
        tracing::info!(number, %address, running, "session begins");
        let session = Session { number, end, wake, connection };
        let welcome = Answer::new(Status::Welcome, text).encode();
        let ending = match timeout(FAREWELL_TIMEOUT, send.write_all(&welcome)).await {
            Ok(Ok(())) => session.drive(self.limits.idle_timeout, &mut send, receive).await,
            Ok(Err(error)) => error.into(),
            Err(_) => Error::remote("the client does not read its welcome").into(),
        };
        tracing::info!(number, %address, reason = reason(&ending), "session ends");
        session.part(ending, send).await;
        drop(place);
    }
}

/// `1 session`, `2 sessions`.
fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
