//! The first upload of a model to a worker against a plain TCP copy of the same bytes, in turns, in
//! one run: `cargo bench --bench upload [-- --rounds N] [--mib N]`. Separate from the criterion
//! benches because only the ratio within a round says something on a machine that others use too.
//!
//! It is the way of the product: tensors of a mapped file, hashed, asked for, sent, verified, kept.
//! The TCP copy sends the same mapped bytes, and keeps them where the upload does: in new memory or
//! in a file. Beside it goes one that throws them away, which is no copy but what the loopback of
//! this machine can carry.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Instant;

use candle_core::{DType, Layout};
use tiny_sd::backend::host::{SharedBytes, map};
use tiny_sd::backend::{Device as _, HostTensor, cpu};
use tiny_sd::remote::client;
use tiny_sd::remote::device::Device;
use tiny_sd::remote::disk_library::{self, DiskLibrary};
use tiny_sd::remote::executor;
use tiny_sd::remote::hello::Hello;
use tiny_sd::remote::library::Library;
use tiny_sd::remote::op::Digest;
use tiny_sd::remote::quic::MAX_MTU;
use tiny_sd::remote::quic::client::{CONNECT_TIMEOUT, connect};
use tiny_sd::remote::quic::server::{Limits, Server, SessionInfo, serve};
use tiny_sd::remote::transport::BulkSink;
use tiny_sd::remote::trust::Identity;
use tiny_sd::remote::url::PairingUrl;
use tiny_sd::remote::worker::Worker;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const HELLO: Hello = Hello { version: 1, schema: [0; 16] };
/// UDP payload of an Ethernet packet.
const ETHERNET: u16 = 1472;
/// Of one tensor, as of a convolution of the UNet.
const TENSOR_BYTES: usize = 8 << 20;
const PIECE_BYTES: usize = 1 << 20;

/// Where a worker keeps what comes.
#[derive(Debug, Clone, Copy)]
enum Kept {
    InMemory,
    OnDisk,
}

/// What becomes of the bytes of a TCP copy.
enum Target {
    Nowhere,
    Memory(Vec<Vec<u8>>),
    File(File),
}

impl Target {
    fn keep(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Target::Nowhere => Ok(()),
            Target::Memory(tensors) => {
                let has_room = |tensor: &&mut Vec<u8>| tensor.len() + bytes.len() <= TENSOR_BYTES;
                match tensors.last_mut().filter(has_room) {
                    Some(tensor) => tensor.extend_from_slice(bytes),
                    None => {
                        let mut tensor = Vec::with_capacity(TENSOR_BYTES);
                        tensor.extend_from_slice(bytes);
                        tensors.push(tensor);
                    }
                }
                Ok(())
            }
            Target::File(file) => file.write_all(bytes),
        }
    }
}

/// What is measured beside TCP, and the ratio to it that is promised.
const UPLOADS: [(u16, Kept, f64); 4] = [
    (ETHERNET, Kept::InMemory, 0.22),
    (ETHERNET, Kept::OnDisk, 0.22),
    (MAX_MTU, Kept::InMemory, 0.4),
    (MAX_MTU, Kept::OnDisk, 0.4),
];

/// A copy or an upload: what it took.
#[derive(Debug, Clone, Copy)]
struct Used {
    seconds: f64,
    /// Of all cores, by this process, which is both sides: what other programs do moves it less.
    processor_seconds: f64,
}

/// One after the other.
#[derive(Clone, Copy)]
struct Round {
    thrown_away: Used,
    copy: Used,
    upload: Used,
}

fn main() -> Result<()> {
    let (rounds, mib) = (argument("--rounds", 5), argument("--mib", 1024));
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model");
    write_model(&path, mib << 20)?;
    let whole = map(&File::open(&path)?)?;
    // Nobody goes first.
    tcp_copy(&whole, Target::Nowhere)?;
    let mut rounds_of = vec![Vec::new(); UPLOADS.len()];
    for _ in 0..rounds {
        for (&(max_packet_bytes, kept, _), rounds) in UPLOADS.iter().zip(&mut rounds_of) {
            let target = match kept {
                Kept::InMemory => Target::Memory(Vec::new()),
                Kept::OnDisk => Target::File(tempfile::tempfile_in(folder.path())?),
            };
            rounds.push(Round {
                thrown_away: tcp_copy(&whole, Target::Nowhere)?,
                copy: tcp_copy(&whole, target)?,
                upload: upload(&whole, max_packet_bytes, kept, folder.path())?,
            });
        }
    }
    let bytes = whole_bytes(&whole).len();
    println!("{rounds} rounds of {mib} MiB; the median (the least to the most)");
    let mut is_kept = true;
    for (promise, rounds) in UPLOADS.iter().zip(rounds_of) {
        is_kept &= report(*promise, &rounds, bytes);
    }
    std::process::exit(i32::from(!is_kept))
}

/// Whether the promise is kept.
fn report(
    (max_packet_bytes, kept, promised): (u16, Kept, f64),
    rounds: &[Round],
    bytes: usize,
) -> bool {
    let describe = |used: &dyn Fn(&Round) -> Used| {
        let gigabytes = bytes as f64 / 1e9;
        let [least, median, most] =
            spread(rounds.iter().map(|round| gigabytes / used(round).seconds));
        let [_, processor, _] = spread(rounds.iter().map(|round| used(round).processor_seconds));
        format!("{median:.2} GB/s ({least:.2} to {most:.2}), {processor:.2} s of processor")
    };
    let ratio = |to: &dyn Fn(&Round) -> Used| {
        spread(rounds.iter().map(|round| to(round).seconds / round.upload.seconds))
    };
    let [least, median, most] = ratio(&|round| round.copy);
    let [least_away, away, most_away] = ratio(&|round| round.thrown_away);
    println!(
        "packets of {max_packet_bytes} bytes, {kept:?}: {median:.2} x a TCP copy ({least:.2} to \
         {most:.2}), at least {promised}: {}; {away:.2} x TCP thrown away ({least_away:.2} to \
         {most_away:.2})\n  upload {}\n  TCP copy {}\n  TCP thrown away {}",
        if median >= promised { "ok" } else { "MISSED" },
        describe(&|round| round.upload),
        describe(&|round| round.copy),
        describe(&|round| round.thrown_away),
    );
    median >= promised
}

fn whole_bytes(whole: &SharedBytes) -> &[u8] {
    (**whole).as_ref()
}

/// The number behind `name` among the arguments.
fn argument(name: &str, default: usize) -> usize {
    let behind = std::env::args().skip_while(|argument| argument != name).nth(1);
    behind.map_or(default, |number| number.parse().expect("a number"))
}

struct Clock {
    started: Instant,
    processor_seconds: f64,
}

impl Clock {
    fn start() -> Self {
        Self { started: Instant::now(), processor_seconds: processor_seconds() }
    }

    fn used(&self) -> Used {
        let processor_seconds = processor_seconds() - self.processor_seconds;
        Used { seconds: self.started.elapsed().as_secs_f64(), processor_seconds }
    }
}

/// Seconds of all cores that this process has used; none where the system does not say so.
fn processor_seconds() -> f64 {
    // Behind the name: the state is field 3 of proc(5), user and system ticks are 14 and 15.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Bytes that repeat nowhere: no tensor is like another.
fn write_model(path: &Path, bytes: usize) -> Result<()> {
    let mut file = std::io::BufWriter::new(File::create(path)?);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..bytes / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.write_all(&state.to_le_bytes())?;
    }
    Ok(file.flush()?)
}

fn tcp_copy(whole: &SharedBytes, mut target: Target) -> Result<Used> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let (mut worker, _) = listener.accept()?;
    let clock = Clock::start();
    let receiver = thread::spawn(move || {
        let (mut buffer, mut bytes) = (vec![0; PIECE_BYTES], 0);
        while let Ok(count) = worker.read(&mut buffer)
            && count > 0
        {
            bytes += count;
            target.keep(&buffer[..count])?;
        }
        // What was kept is there until the clock was read.
        Ok::<_, std::io::Error>((bytes, target))
    });
    for piece in whole_bytes(whole).chunks(PIECE_BYTES) {
        client.write_all(piece)?;
    }
    drop(client);
    let (received, _kept) = receiver.join().expect("the receiver does not panic")?;
    assert_eq!(received, whole_bytes(whole).len());
    Ok(clock.used())
}

/// From the first byte that is hashed to the last that is kept.
fn upload(whole: &SharedBytes, max_packet_bytes: u16, kept: Kept, folder: &Path) -> Result<Used> {
    let scratch = tempfile::tempdir_in(folder)?;
    let limits = disk_library::Limits::new(u64::MAX);
    let library = match kept {
        Kept::InMemory => DiskLibrary::in_memory(limits),
        Kept::OnDisk => DiskLibrary::open(scratch.path(), limits)?,
    };
    let identity = Identity::generate()?;
    let (server, finished) = start(&identity, library, max_packet_bytes)?;
    let port = server.local_addr().port();
    let url = PairingUrl::new("127.0.0.1", port, identity.token().clone(), identity.fingerprint())?;
    let session = client::Session::new("worker");
    let connection = connect(&url, session.clone(), HELLO, CONNECT_TIMEOUT, &mut |_| Ok(()))?;
    session.set_waker(connection.waker());
    // Without digests from earlier runs.
    let device = Device::new(session);
    let tensors = tensors(whole)?;
    let clock = Clock::start();
    device.announce(&tensors.iter().collect::<Vec<_>>(), DType::F16, &mut |_, _| Ok(()))?;
    for _ in &tensors {
        finished.recv().expect("every weight comes");
    }
    let used = clock.used();
    drop(device);
    drop(connection);
    server.shutdown();
    Ok(used)
}

/// A worker that says when it has kept a weight.
fn start(
    identity: &Identity,
    library: DiskLibrary,
    max_packet_bytes: u16,
) -> Result<(Server, Receiver<()>)> {
    let device = cpu::Device::with_threads(0)?;
    let limits = executor::Limits { memory_bytes: 1 << 30, buffers: 1000 };
    let worker = Worker::<cpu::Storage>::new(device, limits, 1 << 30);
    let (tell, finished) = channel();
    let make = move |info: SessionInfo| {
        let library = Watched { library: library.session(), tell: tell.clone() };
        worker.session(Arc::new(library), info.waker)
    };
    let limits = Limits { max_packet_bytes, ..Limits::default() };
    let any = "127.0.0.1:0".parse().expect("an address");
    Ok((serve(any, identity, HELLO, limits, make)?, finished))
}

fn tensors(whole: &SharedBytes) -> Result<Vec<HostTensor>> {
    let places = (0..whole_bytes(whole).len()).step_by(TENSOR_BYTES);
    let tensor = |place| {
        let len = TENSOR_BYTES.min(whole_bytes(whole).len() - place);
        Ok(HostTensor::new(DType::F16, Layout::contiguous(len / 2), whole.clone(), place)?)
    };
    places.map(tensor).collect()
}

struct Watched {
    library: Arc<dyn Library>,
    tell: Sender<()>,
}

impl Library for Watched {
    fn has(&self, digests: &[Digest]) -> Vec<bool> {
        self.library.has(digests)
    }

    fn get(&self, digest: &Digest) -> tiny_sd::Result<HostTensor> {
        self.library.get(digest)
    }

    fn receive(
        &self,
        digest: Digest,
        dtype: DType,
        dims: &[usize],
    ) -> tiny_sd::Result<Box<dyn BulkSink>> {
        let sink = self.library.receive(digest, dtype, dims)?;
        Ok(Box::new(WatchedSink { sink, tell: self.tell.clone() }))
    }

    fn end(&self) {
        self.library.end();
    }
}

struct WatchedSink {
    sink: Box<dyn BulkSink>,
    tell: Sender<()>,
}

impl BulkSink for WatchedSink {
    fn write(&mut self, bytes: &[u8]) -> tiny_sd::Result<()> {
        self.sink.write(bytes)
    }

    fn finish(self: Box<Self>) -> tiny_sd::Result<()> {
        self.sink.finish()?;
        // Nobody counts any more if the bench failed.
        let _ = self.tell.send(());
        Ok(())
    }
}

/// The least, the median and the most.
fn spread(numbers: impl Iterator<Item = f64>) -> [f64; 3] {
    let mut numbers: Vec<_> = numbers.collect();
    numbers.sort_by(f64::total_cmp);
    let at = |place: usize| numbers.get(place).copied().unwrap_or(f64::NAN);
    [at(0), at(numbers.len() / 2), at(numbers.len().saturating_sub(1))]
}
