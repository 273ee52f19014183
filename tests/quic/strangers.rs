//! Peers that know where the worker is but not how to behave, on quinn itself: what they can make
//! it hold, and for how long.

use std::sync::Arc;
use std::time::Duration;

use tiny_sd::remote::quic::STRANGER_WINDOW;
use tiny_sd::remote::quic::server::Limits;
use tiny_sd::remote::trust::PinnedCertificate;

use super::ends::{Event, HELLO, PATIENCE, Waiter, Worker, join, limits};

/// A peer that knows where the worker is but not the token, on quinn itself.
struct Stranger {
    runtime: tokio::runtime::Runtime,
    connection: quinn::Connection,
    _endpoint: quinn::Endpoint,
}

impl Stranger {
    fn connect(worker: &Worker) -> Self {
        Self::connect_as(worker, quinn::TransportConfig::default())
    }

    fn connect_as(worker: &Worker, transport: quinn::TransportConfig) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let tls = PinnedCertificate::new(worker.identity.fingerprint()).client_config().unwrap();
        let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        config.transport_config(Arc::new(transport));
        let address = worker.server.local_addr();
        let (connection, endpoint) = runtime.block_on(async {
            let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
            let connecting = endpoint.connect_with(config, address, "tiny-sd").unwrap();
            (connecting.await.unwrap(), endpoint)
        });
        Self { runtime, connection, _endpoint: endpoint }
    }

    /// Writes as much as it may on one stream until it is cut off: how many bytes that were.
    fn flood(&self) -> usize {
        self.runtime.block_on(async {
            let (mut send, _receive) = self.connection.open_bi().await.unwrap();
            let mut written = 0;
            let bytes = vec![0xa5; 1 << 20];
            while let Ok(count) = send.write(&bytes).await {
                written += count;
            }
            self.connection.closed().await;
            written
        })
    }
}

#[test]
fn a_stranger_that_floods_is_cut_off() {
    let hello_timeout = Duration::from_millis(300);
    let worker = Worker::start(Limits { hello_timeout, ..limits() });
    let stranger = Stranger::connect(&worker);
    let written = stranger.flood();
    assert!(written <= STRANGER_WINDOW as usize, "{written} bytes went through");
    // Nor may it have more streams.
    let stranger = Stranger::connect(&worker);
    let more = stranger.runtime.block_on(async {
        let _first = stranger.connection.open_bi().await.unwrap();
        tokio::select! {
            second = stranger.connection.open_bi() => second.is_ok(),
            uni = stranger.connection.open_uni() => uni.is_ok(),
        }
    });
    assert!(!more);
    assert!(worker.events.try_recv().is_err(), "a session was made");
}

#[test]
fn a_stranger_that_says_nothing_is_cut_off_and_others_come_in() {
    let hello_timeout = Duration::from_millis(300);
    let worker = Worker::start(Limits { hello_timeout, ..limits() });
    let silent: Vec<_> = (0..4).map(|_| Stranger::connect(&worker)).collect();
    join(&worker.url());
    for stranger in silent {
        stranger.runtime.block_on(stranger.connection.closed());
    }
}

#[test]
fn who_does_not_read_holds_nobody_up_who_waits_behind() {
    let worker = Worker::start(Limits { max_sessions: 1, max_waiting: 2, ..limits() });
    let running = join(&worker.url());
    let mut transport = quinn::TransportConfig::default();
    transport.stream_receive_window(8u32.into()).keep_alive_interval(Some(PATIENCE / 100));
    let rude = Stranger::connect_as(&worker, transport);
    let hello = HELLO.encode(worker.identity.token());
    let rude = std::thread::spawn(move || {
        rude.runtime.block_on(async {
            let (mut send, _unread) = rude.connection.open_bi().await.unwrap();
            send.write_all(&hello).await.unwrap();
            rude.connection.closed().await
        })
    });
    // It may not be in the queue yet: then whoever comes is before it, and goes; who comes next may
    // find that one's place still taken.
    let behind = std::iter::repeat_with(|| Waiter::new(&worker))
        .find(|waiter| waiter.first_news().is_some_and(|news| news.starts_with("1 client before")))
        .unwrap();
    assert!(behind.news().starts_with("0 clients before"));
    drop(rude.join().unwrap());
    drop(running);
    assert!(behind.joined.recv_timeout(PATIENCE).unwrap().is_ok());
}

#[test]
fn headers_that_promise_too_much_are_refused_by_the_worker() {
    let worker = Worker::start(limits());
    let hello = HELLO.encode(worker.identity.token());
    let is_bulk = [false, true];
    for is_bulk in is_bulk {
        let rude = Stranger::connect(&worker);
        let closed = rude.runtime.block_on(async {
            let (mut send, mut receive) = rude.connection.open_bi().await.unwrap();
            send.write_all(&hello).await.unwrap();
            receive.read_exact(&mut [0; 11]).await.unwrap();
            let huge = u32::MAX.to_le_bytes();
            if is_bulk {
                let mut uni = rude.connection.open_uni().await.unwrap();
                uni.write_all(&huge).await.unwrap();
                rude.connection.closed().await
            } else {
                send.write_all(&huge).await.unwrap();
                rude.connection.closed().await
            }
        });
        let message = closed.to_string();
        assert!(message.contains("4294967295 bytes, more than"), "{message}");
        assert_eq!(worker.event(), Event::Lost);
    }
}
