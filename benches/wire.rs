//! What the network costs for small things: a round trip; waking the network.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use criterion::{Criterion, criterion_group, criterion_main};
use tiny_sd::remote::hello::Hello;
use tiny_sd::remote::quic::client::{CONNECT_TIMEOUT, connect};
use tiny_sd::remote::quic::server::{Limits, SessionInfo, serve};
use tiny_sd::remote::transport::{BulkSink, BulkSource, ClientEnd, Waker, WorkerEnd};
use tiny_sd::remote::trust::Identity;
use tiny_sd::remote::url::PairingUrl;
use tiny_sd::{Error, Result};

const HELLO: Hello = Hello { version: 1, schema: [0; 16] };

/// Echoes frames.
struct Worker {
    frames: Mutex<VecDeque<Vec<u8>>>,
    waker: Waker,
}

impl WorkerEnd for Worker {
    fn received(&self, frame: Vec<u8>) -> Result<()> {
        self.frames.lock().unwrap().push_back(frame);
        (self.waker)();
        Ok(())
    }

    fn bulk(&self, _header: &[u8]) -> Result<Box<dyn BulkSink>> {
        Err(Error::other("nothing large is sent here"))
    }

    fn next_frame(&self) -> Option<Vec<u8>> {
        self.frames.lock().unwrap().pop_front()
    }

    fn lost(&self) {}
}

struct Client {
    frames: Mutex<VecDeque<Vec<u8>>>,
    heard: Sender<Vec<u8>>,
}

impl ClientEnd for Client {
    fn next_frame(&self) -> Option<Vec<u8>> {
        self.frames.lock().unwrap().pop_front()
    }

    fn next_bulk(&self) -> Option<BulkSource> {
        None
    }

    fn received(&self, frame: &[u8]) -> Result<()> {
        self.heard.send(frame.to_vec()).map_err(|_| Error::other("nobody waits"))
    }

    fn lost(&self, error: Error) {
        eprintln!("{error}");
    }
}

fn with_session(work: impl FnOnce(&Client, &Waker, &Receiver<Vec<u8>>)) {
    let identity = Identity::generate().unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let make = |info: SessionInfo| {
        Ok(Arc::new(Worker { frames: Mutex::default(), waker: info.waker }) as _)
    };
    let server = serve(any, &identity, HELLO, Limits::default(), make).unwrap();
    let port = server.local_addr().port();
    let token = identity.token().clone();
    let url = PairingUrl::new("127.0.0.1", port, token, identity.fingerprint()).unwrap();
    let (heard_sender, heard) = channel();
    let client = Arc::new(Client { frames: Mutex::default(), heard: heard_sender });
    let connection =
        connect(&url, Arc::clone(&client) as _, HELLO, CONNECT_TIMEOUT, &mut |_| Ok(())).unwrap();
    work(&client, &connection.waker(), &heard);
}

fn frames(criterion: &mut Criterion) {
    with_session(|client, wake, heard| {
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

criterion_group!(benches, frames);
criterion_main!(benches);
