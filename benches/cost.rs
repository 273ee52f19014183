//! What the protocol itself costs: a worker that computes nothing, over QUIC on this machine.
//!
//! `cargo bench --bench cost`. Bars: an op ≤ 0.3 µs on the client, ≤ 0.5 µs end to end, ≤ 16 bytes;
//! a replayed program next to nothing on the client.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tiny_sd::remote::client::Session;
use tiny_sd::remote::device::Device;
use tiny_sd::remote::disk_library::{self, DiskLibrary};
use tiny_sd::remote::executor;
use tiny_sd::remote::hello::Hello;
use tiny_sd::remote::quic::client::{CONNECT_TIMEOUT, Connection, connect};
use tiny_sd::remote::quic::server::{Limits, Server, serve};
use tiny_sd::remote::storage::Storage;
use tiny_sd::remote::transport::ClientEnd;
use tiny_sd::remote::trust::Identity;
use tiny_sd::remote::url::PairingUrl;
use tiny_sd::remote::worker::Worker;
use tiny_sd::remote::{PROTOCOL_VERSION, schema};
use tiny_sd::tensor::program;

#[path = "../tests/null.rs"]
mod null;
#[path = "../tests/small_ops.rs"]
mod small_ops;

use small_ops::{NAMES, SmallOps};

/// Ops between two looks at the network, and in the program.
const ROUND: u64 = 1000;

/// A worker that computes nothing, and a session with it over QUIC on the loopback interface.
struct Quic {
    session: Arc<Session>,
    _connection: Connection,
    _server: Server,
}

fn quic() -> Quic {
    let hello = Hello { version: PROTOCOL_VERSION, schema: schema() };
    let identity = Identity::generate().unwrap();
    let limits = executor::Limits { memory_bytes: u64::MAX, buffers: 1 << 20 };
    let worker = Worker::<null::Storage>::new(null::Device, limits, 0);
    let library = DiskLibrary::in_memory(disk_library::Limits::new(0));
    let here = "127.0.0.1:0".parse().unwrap();
    let server = serve(here, &identity, hello, Limits::default(), move |info| {
        worker.session(library.session(), info.waker)
    });
    let server = server.unwrap();
    let port = server.local_addr().port();
    let url = PairingUrl::new("127.0.0.1", port, identity.token().clone(), identity.fingerprint());
    let session = Session::new("null");
    let connection =
        connect(&url.unwrap(), session.clone(), hello, CONNECT_TIMEOUT, &mut |_| Ok(())).unwrap();
    session.set_waker(connection.waker());
    Quic { session, _connection: connection, _server: server }
}

/// Time of `count` ops on the client, without the taking of frames.
fn on_client(count: u64, session: &Session, mut op: impl FnMut(u64)) -> Duration {
    let mut time = Duration::ZERO;
    for first in (0..count).step_by(ROUND as usize) {
        let began = Instant::now();
        (first..count.min(first + ROUND)).for_each(&mut op);
        time += began.elapsed();
        while session.next_frame().is_some() {}
    }
    time
}

/// Time of `count` ops until the worker has done them.
fn end_to_end(count: u64, session: &Session, op: impl FnMut(u64)) -> Duration {
    let began = Instant::now();
    (0..count).for_each(op);
    session.done(session.mark().unwrap()).unwrap();
    began.elapsed()
}

/// Bytes to the worker for each of `count` ops, their frees included.
fn bytes_each(count: u64, session: &Session, op: impl FnMut(u64)) -> f64 {
    end_to_end(0, session, |_| ());
    let before = session.statistics().bytes_up;
    end_to_end(count, session, op);
    (session.statistics().bytes_up - before) as f64 / count as f64
}

fn ops(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("op");
    group.throughput(Throughput::Elements(1));
    let session = Session::new("nowhere");
    let small = SmallOps::<Storage>::new(&Device::new(session.clone())).unwrap();
    for (n, name) in NAMES.iter().enumerate() {
        group.bench_function(format!("client, {name}"), |bencher| {
            bencher.iter_custom(|count| {
                on_client(count, &session, |_| drop(black_box(small.run(n as u64).unwrap())))
            });
        });
    }
    group.bench_function("client, mixed", |bencher| {
        bencher.iter_custom(|count| {
            on_client(count, &session, |n| drop(black_box(small.run(n).unwrap())))
        });
    });
    let quic = quic();
    let small = SmallOps::<Storage>::new(&Device::new(quic.session.clone())).unwrap();
    group.bench_function("end to end over QUIC, mixed", |bencher| {
        bencher.iter_custom(|count| {
            end_to_end(count, &quic.session, |n| drop(black_box(small.run(n).unwrap())))
        });
    });
    let bytes = bytes_each(60_000, &quic.session, |n| drop(small.run(n).unwrap()));
    println!("{bytes:.1} bytes an op, its free included");
}

fn programs(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("program of 1000 ops");
    group.throughput(Throughput::Elements(ROUND));
    let quic = quic();
    let device = Device::new(quic.session.clone());
    let small = SmallOps::<Storage>::new(&device).unwrap();
    let step = |_| {
        let last = program("bench", &device, &[&small.x, &small.y], || {
            (0..ROUND).try_fold(small.x.clone(), |_, n| small.run(n))
        });
        drop(black_box(last.unwrap()));
    };
    step(0);
    group.bench_function("replay, end to end over QUIC", |bencher| {
        bencher.iter_custom(|count| end_to_end(count, &quic.session, step));
    });
    group.bench_function("replay, client", |bencher| {
        bencher.iter_custom(|count| {
            // The worker's time is not the client's: it catches up between the rounds.
            let mut time = Duration::ZERO;
            for first in (0..count).step_by(64) {
                let began = Instant::now();
                (first..count.min(first + 64)).for_each(step);
                time += began.elapsed();
                end_to_end(0, &quic.session, |_| ());
            }
            time
        });
    });
    let bytes = bytes_each(1000, &quic.session, step);
    println!("{bytes:.1} bytes a replay, {:.3} an op", bytes / ROUND as f64);
}

criterion_group!(benches, ops, programs);
criterion_main!(benches);
