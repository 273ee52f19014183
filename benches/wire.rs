//! What the network costs: 1 GB to the worker against a plain TCP copy in the same run, with the
//! packets of an ordinary path and with large ones; a round trip; waking the network.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tiny_sd::remote::hello::Hello;
use tiny_sd::remote::quic::MAX_MTU;
use tiny_sd::remote::quic::client::{CONNECT_TIMEOUT, connect};
use tiny_sd::remote::quic::server::{Limits, SessionInfo, serve};
use tiny_sd::remote::transport::{BulkSink, BulkSource, ClientEnd, Waker, WorkerEnd};
use tiny_sd::remote::trust::Identity;
use tiny_sd::remote::url::PairingUrl;
use tiny_sd::{Error, Result};

const HELLO: Hello = Hello { version: 1, schema: [0; 16] };
const BULK_BYTES: u64 = 1 << 30;
/// What stands for a mapped file is larger than the caches.
const FILE_BYTES: usize = 64 << 20;
const PIECE_BYTES: usize = 1 << 20;

/// Echoes frames, counts bulk bytes, and says when a transfer is complete.
struct Worker {
    frames: Mutex<VecDeque<Vec<u8>>>,
    waker: Waker,
    done: Sender<u64>,
}

impl WorkerEnd for Worker {
    fn received(&self, frame: Vec<u8>) -> Result<()> {
        self.frames.lock().unwrap().push_back(frame);
        (self.waker)();
        Ok(())
    }

    fn bulk(&self, _header: &[u8]) -> Result<Box<dyn BulkSink>> {
        Ok(Box::new(Count { bytes: 0, done: self.done.clone() }))
    }

    fn next_frame(&self) -> Option<Vec<u8>> {
        self.frames.lock().unwrap().pop_front()
    }

    fn lost(&self) {}
}

struct Count {
    bytes: u64,
    done: Sender<u64>,
}

impl BulkSink for Count {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.done.send(self.bytes).map_err(|_| Error::other("nobody waits"))
    }
}

struct Client {
    frames: Mutex<VecDeque<Vec<u8>>>,
    bulk: Mutex<VecDeque<BulkSource>>,
    heard: Sender<Vec<u8>>,
}

impl ClientEnd for Client {
    fn next_frame(&self) -> Option<Vec<u8>> {
        self.frames.lock().unwrap().pop_front()
    }

    fn next_bulk(&self) -> Option<BulkSource> {
        self.bulk.lock().unwrap().pop_front()
    }

    fn received(&self, frame: &[u8]) -> Result<()> {
        self.heard.send(frame.to_vec()).map_err(|_| Error::other("nobody waits"))
    }

    fn lost(&self, error: Error) {
        eprintln!("{error}");
    }
}

/// Reads `len` bytes of the file again and again.
fn file_reader(file: Arc<Vec<u8>>, len: u64) -> impl FnMut(&mut [u8]) -> usize + Send {
    let mut done = 0u64;
    move |buffer| {
        let place = (done % FILE_BYTES as u64) as usize;
        let count = buffer.len().min((len - done) as usize).min(FILE_BYTES - place);
        buffer[..count].copy_from_slice(&file[place..place + count]);
        done += count as u64;
        count
    }
}

fn tcp_copy(file: &Arc<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut worker, _) = listener.accept().unwrap();
    let receiver = thread::spawn(move || {
        let (mut buffer, mut bytes) = (vec![0; PIECE_BYTES], 0);
        while let Ok(count) = worker.read(&mut buffer)
            && count > 0
        {
            bytes += count as u64;
        }
        bytes
    });
    let mut read = file_reader(Arc::clone(file), BULK_BYTES);
    let mut buffer = vec![0; PIECE_BYTES];
    loop {
        match read(&mut buffer) {
            0 => break,
            count => client.write_all(&buffer[..count]).unwrap(),
        }
    }
    drop(client);
    assert_eq!(receiver.join().unwrap(), BULK_BYTES);
}

fn with_session(
    max_packet_bytes: u16,
    work: impl FnOnce(&Client, &Waker, &Receiver<u64>, &Receiver<Vec<u8>>),
) {
    let identity = Identity::generate().unwrap();
    let (done_sender, done) = channel();
    let limits = Limits { max_packet_bytes, ..Limits::default() };
    let any = "127.0.0.1:0".parse().unwrap();
    let make = move |info: SessionInfo| {
        let done = done_sender.clone();
        Ok(Arc::new(Worker { frames: Mutex::default(), waker: info.waker, done }) as _)
    };
    let server = serve(any, &identity, HELLO, limits, make).unwrap();
    let port = server.local_addr().port();
    let token = identity.token().clone();
    let url = PairingUrl::new("127.0.0.1", port, token, identity.fingerprint()).unwrap();
    let (heard_sender, heard) = channel();
    let (frames, bulk) = Default::default();
    let client = Arc::new(Client { frames, bulk, heard: heard_sender });
    let connection =
        connect(&url, Arc::clone(&client) as _, HELLO, CONNECT_TIMEOUT, &mut |_| Ok(())).unwrap();
    work(&client, &connection.waker(), &done, &heard);
}

fn upload(criterion: &mut Criterion) {
    let file = Arc::new((0..FILE_BYTES).map(|i| (i / 3) as u8).collect::<Vec<_>>());
    let mut group = criterion.benchmark_group("upload of 1 GB");
    group.sample_size(10).throughput(Throughput::Bytes(BULK_BYTES));
    group.bench_function("plain TCP", |bencher| bencher.iter(|| tcp_copy(&file)));
    for max_packet_bytes in [1472, MAX_MTU] {
        with_session(max_packet_bytes, |client, wake, done, _| {
            let name = format!("QUIC, packets of {max_packet_bytes} bytes");
            group.bench_function(name, |bencher| {
                bencher.iter(|| {
                    let mut read = file_reader(Arc::clone(&file), BULK_BYTES);
                    let source = BulkSource {
                        header: vec![0],
                        len: BULK_BYTES,
                        read: Box::new(move |buffer| Ok(read(buffer))),
                    };
                    client.bulk.lock().unwrap().push_back(source);
                    wake();
                    assert_eq!(done.recv().unwrap(), BULK_BYTES);
                });
            });
        });
    }
    group.finish();
}

fn frames(criterion: &mut Criterion) {
    with_session(MAX_MTU, |client, wake, _, heard| {
        criterion.bench_function("a frame there and back", |bencher| {
            bencher.iter(|| {
                client.frames.lock().unwrap().push_back(vec![7; 100]);
                wake();
                heard.recv().unwrap()
            });
        });
        criterion.bench_function("waking the network", |bencher| bencher.iter(wake));
    });
}

criterion_group!(benches, upload, frames);
criterion_main!(benches);
