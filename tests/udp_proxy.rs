//! A network between client and worker that loses, reorders and delays packets, or falls silent.
//! Separate because every test of the remote device can be put behind it. Only std: one thread per
//! socket reads, one timer thread sends what is due.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
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
    /// A while in which no packet passes.
    pub blackout: Option<Blackout>,
}

/// From the `from_packet`th packet on, counted from 1 both ways.
#[derive(Clone, Copy)]
pub struct Blackout {
    pub from_packet: u64,
    pub lasts: Duration,
}

/// What is to happen when so many packets have come.
type Action = Box<dyn FnOnce() + Send>;

/// A proxy on loopback. Dropping it ends its threads.
pub struct UdpProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    faults: Faults,
    worker: SocketAddr,
    /// Where the worker sees the clients.
    clients_ip: IpAddr,
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
    dark_until: Option<Instant>,
    action: Option<(u64, Action)>,
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
        Self::start_as(Ipv4Addr::LOCALHOST.into(), worker, faults)
    }

    /// In front of `worker`, which sees `clients_ip` as the address of whoever comes.
    pub fn start_as(clients_ip: IpAddr, worker: SocketAddr, faults: Faults) -> Self {
        let front = UdpSocket::bind("127.0.0.1:0").unwrap();
        front.set_read_timeout(Some(POLL)).unwrap();
        let address = front.local_addr().unwrap();
        let state = State {
            random: faults.seed,
            packets: 0,
            lost: 0,
            dark_until: None,
            action: None,
            queue: BinaryHeap::new(),
        };
        let shared = Arc::new(Shared {
            faults,
            worker,
            clients_ip,
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

    /// Does something once, when the `number`th packet has come, counted from 1 both ways.
    pub fn at_packet(&self, number: u64, action: impl FnOnce() + Send + 'static) {
        self.shared.lock().action = Some((number, Box::new(action)));
    }

    /// Packets that came, both ways.
    pub fn packets(&self) -> u64 {
        self.shared.lock().packets
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
        let back = Arc::new(UdpSocket::bind((self.clients_ip, 0)).unwrap());
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
        let (now, mut state) = (Instant::now(), self.lock());
        state.packets += 1;
        let number = state.packets;
        if let Some((_, action)) = state.action.take_if(|(at, _)| *at == number) {
            drop(state);
            action();
            state = self.lock();
        }
        if let Some(blackout) = self.faults.blackout.filter(|b| b.from_packet == number) {
            state.dark_until = Some(now + blackout.lasts);
        }
        let [loses, holds] = [state.random(), state.random()];
        if loses < self.faults.loss || state.dark_until.is_some_and(|until| now < until) {
            state.lost += 1;
            return;
        }
        let delays = if holds < self.faults.reorder { 2 } else { 1 };
        let due = now + self.faults.delay * delays;
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
    fn random(&mut self) -> f64 {
        random(&mut self.random)
    }
}

/// In [0, 1): splitmix64.
pub fn random(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}
