//! Trivial ends for both sides of the network: a worker that echoes, and a client that writes down
//! what it hears. Separate because every test of the network uses them.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use tiny_sd::remote::admission::Caps;
use tiny_sd::remote::hello::Hello;
use tiny_sd::remote::quic::client::{CONNECT_TIMEOUT, Connection, WhileWaiting, connect};
use tiny_sd::remote::quic::server::{Limits, Server, SessionInfo, serve};
use tiny_sd::remote::transport::{BulkSink, BulkSource, ClientEnd, Waker, WorkerEnd};
use tiny_sd::remote::trust::Identity;
use tiny_sd::remote::url::PairingUrl;
use tiny_sd::{Error, Result};

pub const HELLO: Hello = Hello { version: 1, schema: [5; 16] };
/// Longer than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What happened at the worker.
#[derive(Debug, PartialEq)]
pub enum Event {
    /// A frame `tell` came, and how many before it.
    Told(usize),
    Bulk {
        header: Vec<u8>,
        digest: blake3::Hash,
    },
    Lost,
}

/// Sends every frame back.
pub struct Echo {
    taken: AtomicUsize,
    frames: Mutex<VecDeque<Vec<u8>>>,
    waker: Waker,
    events: Sender<Event>,
    busy: Arc<AtomicUsize>,
}

impl WorkerEnd for Echo {
    fn received(&self, frame: Vec<u8>) -> Result<()> {
        match frame.as_slice() {
            b"malformed" => return Err(Error::remote("op 7 is malformed")),
            b"panic" => panic!("as the test asks for"),
            b"tell" => {
                let told = Event::Told(self.taken.load(Ordering::SeqCst));
                self.events.send(told).unwrap();
            }
            _ => self.frames.lock().unwrap().push_back(frame),
        }
        self.taken.fetch_add(1, Ordering::SeqCst);
        (self.waker)();
        Ok(())
    }

    fn bulk(&self, header: &[u8]) -> Result<Box<dyn BulkSink>> {
        if header == b"unasked" {
            return Err(Error::remote("transfer 9 was not asked for"));
        }
        let (hasher, events) = (blake3::Hasher::new(), self.events.clone());
        Ok(Box::new(Hashing { header: header.to_vec(), hasher, events }))
    }

    fn next_frame(&self) -> Option<Vec<u8>> {
        self.frames.lock().unwrap().pop_front()
    }

    fn is_busy(&self) -> bool {
        let less = |left: usize| left.checked_sub(1);
        self.busy.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok()
    }

    fn lost(&self) {
        self.events.send(Event::Lost).unwrap();
    }
}

pub struct Hashing {
    header: Vec<u8>,
    hasher: blake3::Hasher,
    events: Sender<Event>,
}

impl BulkSink for Hashing {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        let digest = self.hasher.finalize();
        self.events.send(Event::Bulk { header: self.header, digest }).unwrap();
        Ok(())
    }
}

/// What a client wants sent, and what it hears.
pub struct Client {
    pub frames: Mutex<VecDeque<Vec<u8>>>,
    pub bulk: Mutex<VecDeque<BulkSource>>,
    pub waker: OnceLock<Waker>,
    pub heard: Sender<Vec<u8>>,
    pub lost: Sender<Error>,
}

impl ClientEnd for Client {
    fn next_frame(&self) -> Option<Vec<u8>> {
        self.frames.lock().unwrap().pop_front()
    }

    fn next_bulk(&self) -> Option<BulkSource> {
        self.bulk.lock().unwrap().pop_front()
    }

    fn received(&self, frame: &[u8]) -> Result<()> {
        if frame == b"bad for the client" {
            return Err(Error::remote("reply 3 is malformed"));
        }
        self.heard.send(frame.to_vec()).unwrap();
        Ok(())
    }

    fn lost(&self, error: Error) {
        self.lost.send(error).unwrap();
    }
}

impl Client {
    pub fn send(&self, frame: &[u8]) {
        self.frames.lock().unwrap().push_back(frame.to_vec());
        self.wake();
    }

    pub fn send_bulk(&self, source: BulkSource) {
        self.bulk.lock().unwrap().push_back(source);
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.get() {
            waker();
        }
    }
}

/// `len` random bytes in uneven pieces, and their digest.
pub fn bulk_source(header: &[u8], len: u64, seed: u64) -> (BulkSource, blake3::Hash) {
    let mut source = random_bytes(seed);
    let mut rest = len as usize;
    let read = move |buffer: &mut [u8]| {
        let count = rest.min(buffer.len()).min(300_001);
        source(&mut buffer[..count]);
        rest -= count;
        Ok(count)
    };
    let mut all = vec![0; len as usize];
    random_bytes(seed)(&mut all);
    (BulkSource { header: header.to_vec(), len, read: Box::new(read) }, blake3::hash(&all))
}

/// The same bytes, but none beyond `place` before `go`.
pub fn stopping_at(source: BulkSource, place: u64, go: Receiver<()>) -> BulkSource {
    let BulkSource { header, len, mut read } = source;
    let (mut done, mut go) = (0, Some(go));
    let read = move |buffer: &mut [u8]| {
        if done >= place
            && let Some(go) = go.take()
        {
            go.recv_timeout(PATIENCE).unwrap();
        }
        let count = read(buffer)?;
        done += count as u64;
        Ok(count)
    };
    BulkSource { header, len, read: Box::new(read) }
}

/// The same bytes however they are cut.
pub fn random_bytes(seed: u64) -> impl FnMut(&mut [u8]) + Send {
    let mut output = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
    move |buffer| output.fill(buffer)
}

pub struct Worker {
    pub server: Server,
    pub identity: Identity,
    pub events: Receiver<Event>,
    /// How often its sessions will say that they are busy.
    pub busy: Arc<AtomicUsize>,
}

impl Worker {
    pub fn start(limits: Limits) -> Self {
        Self::start_as(HELLO, limits)
    }

    /// One that speaks something else.
    pub fn start_as(hello: Hello, limits: Limits) -> Self {
        let identity = Identity::generate().unwrap();
        let (tell, events) = channel();
        let busy = Arc::<AtomicUsize>::default();
        let counts = busy.clone();
        let make = move |info: SessionInfo| {
            let (taken, frames) = Default::default();
            let (waker, events, busy) = (info.waker, tell.clone(), counts.clone());
            Ok(Arc::new(Echo { taken, frames, waker, events, busy }) as Arc<dyn WorkerEnd>)
        };
        let any = "127.0.0.1:0".parse().unwrap();
        let server = serve(any, &identity, hello, limits, make).unwrap();
        Self { server, identity, events, busy }
    }

    pub fn url(&self) -> PairingUrl {
        self.url_at(self.server.local_addr())
    }

    pub fn url_at(&self, address: SocketAddr) -> PairingUrl {
        let (token, cert) = (self.identity.token().clone(), self.identity.fingerprint());
        PairingUrl::new(&address.ip().to_string(), address.port(), token, cert).unwrap()
    }

    pub fn event(&self) -> Event {
        self.events.recv_timeout(PATIENCE).unwrap()
    }
}

pub struct Joined {
    pub client: Arc<Client>,
    pub connection: Connection,
    pub heard: Receiver<Vec<u8>>,
    pub lost: Receiver<Error>,
}

impl Joined {
    pub fn hear(&self) -> Vec<u8> {
        self.heard.recv_timeout(PATIENCE).unwrap()
    }

    pub fn lost(&self) -> String {
        let error = self.lost.recv_timeout(PATIENCE).unwrap();
        assert_eq!(error.kind().exit_code(), 4);
        error.to_string()
    }
}

pub fn join_as(url: &PairingUrl, hello: Hello) -> Result<Joined> {
    join_waiting(url, hello, &mut |_| Ok(()))
}

fn join_waiting(url: &PairingUrl, hello: Hello, waits: &mut WhileWaiting<'_>) -> Result<Joined> {
    let (heard_sender, heard) = channel();
    let (lost_sender, lost) = channel();
    let client = Arc::new(Client {
        frames: Mutex::default(),
        bulk: Mutex::default(),
        waker: OnceLock::new(),
        heard: heard_sender,
        lost: lost_sender,
    });
    let connection = connect(url, Arc::clone(&client) as _, hello, CONNECT_TIMEOUT, waits)?;
    assert!(client.waker.set(connection.waker()).is_ok());
    Ok(Joined { client, connection, heard, lost })
}

/// A client that waits for its turn; dropped, it leaves.
pub struct Waiter {
    news: Receiver<Option<String>>,
    pub joined: Receiver<Result<Joined>>,
}

impl Waiter {
    /// Joins on a thread of its own.
    pub fn new(worker: &Worker) -> Self {
        let (tell, news) = channel();
        let (give, joined) = channel();
        let url = worker.url();
        std::thread::spawn(move || {
            let mut waits = |text: Option<&str>| {
                let told = tell.send(text.map(str::to_owned));
                told.map_err(|_| Error::interrupted())
            };
            // The test may not care.
            let _ = give.send(join_waiting(&url, HELLO, &mut waits));
        });
        Self { news, joined }
    }

    /// What it is told first; nothing if it finds no place.
    pub fn first_news(&self) -> Option<String> {
        let mut news = std::iter::from_fn(|| self.news.recv_timeout(PATIENCE).ok());
        news.find_map(|text| text)
    }

    /// What it is told next.
    pub fn news(&self) -> String {
        let mut news = std::iter::repeat_with(|| self.news.recv_timeout(PATIENCE).unwrap());
        news.find_map(|text| text).unwrap()
    }
}

pub fn join(url: &PairingUrl) -> Joined {
    join_as(url, HELLO).unwrap()
}

pub fn limits() -> Limits {
    let strangers =
        Caps { pending: 16, pending_per_address: 8, wrong_token_delay: Duration::from_millis(1) };
    Limits { strangers, ..Limits::default() }
}
