//! A network between client and worker that loses, reorders and delays packets, or falls silent.
//! Separate because every test of the remote device can be put behind it. Only std: one thread per
//! socket reads, one timer thread sends what is due.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

/// How often a reading thread looks whether it is over.
const POLL: Duration = Duration::from_millis(50);

/// What happens to packets, either way.
#[derive(Clone, Copy, Default)]
pub struct Faults {
    /// Share of packets that vanish.
    pub loss: f64,
    /// Share of packets that are held back by another `delay`, so that later ones overtake them.
    pub reorder: f64,
    /// One way.
    pub delay: Duration,
    /// Equal seeds lose the same packets, counted as they come.
    pub seed: u64,
}

/// A proxy on loopback. Dropping it ends its threads.
pub struct UdpProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    faults: Faults,
    worker: SocketAddr,
    front: UdpSocket,
    state: Mutex<State>,
    due: Condvar,
    is_over: AtomicBool,
    is_silent: AtomicBool,
}

struct State {
    random: u64,
    packets: u64,
    lost: u64,
    queue: BinaryHeap<Reverse<Packet>>,
}

/// Ordered by when it is due, then by when it came.
struct Packet {
    due: Instant,
    number: u64,
    bytes: Vec<u8>,
    from: Arc<UdpSocket>,
    to: SocketAddr,
}

impl Ord for Packet {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.number).cmp(&(other.due, other.number))
    }
}

impl PartialOrd for Packet {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Packet {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Packet {}

impl UdpProxy {
    /// In front of `worker`.
    pub fn start(worker: SocketAddr, faults: Faults) -> Self {
        let front = UdpSocket::bind("127.0.0.1:0").unwrap();
        front.set_read_timeout(Some(POLL)).unwrap();
        let address = front.local_addr().unwrap();
        let state = State { random: faults.seed, packets: 0, lost: 0, queue: BinaryHeap::new() };
        let shared = Arc::new(Shared {
            faults,
            worker,
            front,
            state: Mutex::new(state),
            due: Condvar::new(),
            is_over: AtomicBool::new(false),
            is_silent: AtomicBool::new(false),
        });
        let [reader, timer] = [Arc::clone(&shared), Arc::clone(&shared)];
        thread::spawn(move || reader.read_clients());
        thread::spawn(move || timer.send_what_is_due());
        Self { address, shared }
    }

    /// Where clients find it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on no packet passes, or they do again.
    pub fn set_silent(&self, is_silent: bool) {
        self.shared.is_silent.store(is_silent, Ordering::SeqCst);
    }

    /// Packets that were lost on purpose.
    pub fn lost(&self) -> u64 {
        self.shared.lock().lost
    }
}

impl Drop for UdpProxy {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        self.shared.due.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    fn read_clients(self: Arc<Self>) {
        let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
        let mut buffer = vec![0; 1 << 16];
        while !self.is_over() {
            let Ok((len, client)) = self.front.recv_from(&mut buffer) else { continue };
            let back = backs.entry(client).or_insert_with(|| self.open_back(client));
            self.take(&buffer[..len], Arc::clone(back), self.worker);
        }
    }

    /// A socket towards the worker for one client, and the way back.
    fn open_back(self: &Arc<Self>, client: SocketAddr) -> Arc<UdpSocket> {
        let back = Arc::new(UdpSocket::bind("127.0.0.1:0").unwrap());
        back.set_read_timeout(Some(POLL)).unwrap();
        let (shared, reads) = (Arc::clone(self), Arc::clone(&back));
        let front = Arc::new(self.front.try_clone().unwrap());
        thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while !shared.is_over() {
                let Ok((len, _)) = reads.recv_from(&mut buffer) else { continue };
                shared.take(&buffer[..len], Arc::clone(&front), client);
            }
        });
        back
    }

    fn take(&self, bytes: &[u8], from: Arc<UdpSocket>, to: SocketAddr) {
        if self.is_silent.load(Ordering::SeqCst) {
            return;
        }
        let mut state = self.lock();
        let [loses, holds] = [state.random(), state.random()];
        if loses < self.faults.loss {
            state.lost += 1;
            return;
        }
        let delays = if holds < self.faults.reorder { 2 } else { 1 };
        let due = Instant::now() + self.faults.delay * delays;
        let number = state.packets;
        state.packets += 1;
        state.queue.push(Reverse(Packet { due, number, bytes: bytes.to_vec(), from, to }));
        self.due.notify_all();
    }

    fn send_what_is_due(&self) {
        let mut state = self.lock();
        while !self.is_over() {
            let now = Instant::now();
            let wait = state.queue.peek().map_or(POLL, |next| next.0.due - now.min(next.0.due));
            if !wait.is_zero() {
                state = self.due.wait_timeout(state, wait).unwrap().0;
                continue;
            }
            if let Some(Reverse(packet)) = state.queue.pop() {
                drop(state);
                // A peer that is gone is part of the test.
                let _ = packet.from.send_to(&packet.bytes, packet.to);
                state = self.lock();
            }
        }
    }
}

impl State {
    /// In [0, 1): splitmix64.
    fn random(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}
