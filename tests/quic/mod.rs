//! Frames and bulk bytes between trivial ends, over real sockets: what the network promises to the
//! protocol.

pub mod ends;
mod strangers;

use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use tiny_sd::remote::hello::Hello;
use tiny_sd::remote::quic::IDLE_TIMEOUT;
use tiny_sd::remote::quic::client::connect;
use tiny_sd::remote::quic::server::Limits;
use tiny_sd::remote::transport::{BulkSource, MAX_BULK_HEADER_BYTES, MAX_FRAME_BYTES};
use tiny_sd::remote::trust::{Identity, Token};
use tiny_sd::remote::url::PairingUrl;
use tiny_sd::{Error, Result};

use self::ends::{
    Client, Event, HELLO, PATIENCE, Waiter, Worker, bulk_source, join, join_as, limits,
    random_bytes, stopping_at,
};
use crate::udp_proxy::{Faults, UdpProxy};

#[test]
fn frames_of_every_size_come_back_in_order() {
    let worker = Worker::start(limits());
    let joined = join(&worker.url());
    assert_eq!(joined.connection.greeting(), "session 1 of 4");
    let sizes = [0, 1, 3, 0, 1199, 1200, 65_535, 65_536, MAX_FRAME_BYTES - 1, MAX_FRAME_BYTES];
    let frames: Vec<_> = (0..200u64)
        .map(|number| {
            let mut frame = vec![0; sizes[number as usize % sizes.len()]];
            random_bytes(number)(&mut frame);
            frame
        })
        .collect();
    frames.iter().for_each(|frame| joined.client.send(frame));
    for (number, frame) in frames.iter().enumerate() {
        assert!(joined.hear() == *frame, "frame {number}");
    }
}

#[test]
fn bulk_bytes_arrive_intact_while_frames_keep_flowing() {
    let worker = Worker::start(limits());
    let joined = join(&worker.url());
    // The first transfer stops half-way until the frames have come back.
    let (go, stopped) = channel();
    let mut stopped = Some(stopped);
    let lens: [u64; 7] = [64 << 20, 0, 1, 70_000, 1 << 20, (1 << 20) + 1, 5 << 20];
    let mut expected: Vec<_> = (0u8..)
        .zip(lens)
        .map(|(number, len)| {
            let (mut source, digest) = bulk_source(&[number], len, number.into());
            if let Some(stopped) = stopped.take() {
                source = stopping_at(source, len / 2, stopped);
            }
            joined.client.send_bulk(source);
            (vec![number], digest)
        })
        .collect();
    for number in 0..100u64 {
        joined.client.send(&number.to_le_bytes());
        assert_eq!(joined.hear(), number.to_le_bytes());
    }
    go.send(()).unwrap();
    while !expected.is_empty() {
        let Event::Bulk { header, digest } = worker.event() else { panic!("not a transfer") };
        let place = expected.iter().position(|(sent, _)| *sent == header).unwrap();
        assert_eq!(expected.swap_remove(place).1, digest, "transfer {header:?}");
    }
}

#[test]
fn several_clients_are_served_at_once_and_one_too_many_is_told() {
    let worker = Worker::start(Limits { max_sessions: 2, max_waiting: 0, ..limits() });
    let [first, second] = [(); 2].map(|()| join(&worker.url()));
    let refusal = join_as(&worker.url(), HELLO).err().unwrap().to_string();
    assert!(refusal.contains("busy") && refusal.contains("2 of 2"), "{refusal}");
    assert!(refusal.contains("--max-sessions"), "{refusal}");
    for joined in [&first, &second] {
        joined.client.send(b"still here");
        assert_eq!(joined.hear(), b"still here");
    }
    drop(second);
    assert_eq!(worker.event(), Event::Lost);
    // The place is free as soon as the session has let go, which the event only announces.
    let free = std::iter::repeat_with(|| join_as(&worker.url(), HELLO)).take(100);
    assert!(free.into_iter().any(|joined| joined.is_ok()));
}

#[test]
fn who_waits_hears_how_many_come_first_and_gets_a_turn() {
    let worker = Worker::start(Limits { max_sessions: 1, max_waiting: 2, ..limits() });
    let running = join(&worker.url());
    let first = Waiter::new(&worker);
    assert_eq!(first.news(), "0 clients before this client, 1 session running");
    let second = Waiter::new(&worker);
    assert!(second.news().starts_with("1 client before"));
    let message = join_as(&worker.url(), HELLO).err().unwrap().to_string();
    assert!(
        message.contains("2 clients waiting") && message.contains("--max-waiting"),
        "{message}"
    );
    drop(running);
    let joined = first.joined.recv_timeout(PATIENCE).unwrap().unwrap();
    joined.client.send(b"my turn");
    assert_eq!(joined.hear(), b"my turn");
    assert!(second.news().starts_with("0 clients before"));
    let third = Waiter::new(&worker);
    assert!(third.news().starts_with("1 client before"));
    let left = Instant::now();
    drop(second);
    assert!(third.news().starts_with("0 clients before"));
    // Who leaves says so: its silence would be noticed after 3 s.
    assert!(left.elapsed() < Duration::from_secs(2), "{:?}", left.elapsed());
    worker.server.begin_shutdown();
    let message = third.joined.recv_timeout(PATIENCE).unwrap().err().unwrap().to_string();
    assert!(message.contains("shutting down"), "{message}");
}

#[test]
fn who_does_not_fit_is_refused_readably() {
    let worker = Worker::start(limits());
    let url = worker.url();
    let (port, cert) = (url.port(), url.fingerprint());
    let wrong_token = PairingUrl::new("127.0.0.1", port, Token::from_bytes([1; 32]), cert).unwrap();
    let other = Identity::generate().unwrap().fingerprint();
    let wrong_cert = PairingUrl::new("127.0.0.1", port, url.token().clone(), other).unwrap();
    let name = format!("127.0.0.1:{port}");
    for (url, hello, expected) in [
        (&wrong_token, HELLO, "refused the token"),
        (&wrong_cert, HELLO, "another certificate"),
        (&url, Hello { version: 9, ..HELLO }, "protocol 1, this client 9"),
        (&url, Hello { schema: [0; 16], ..HELLO }, "tables of ops"),
    ] {
        let error = join_as(url, hello).err().unwrap();
        let message = error.to_string();
        assert!(message.contains(expected) && message.contains(&name), "{message}");
        assert!(!message.contains(&url.token().to_hex()), "{message}");
        assert_eq!(error.kind().exit_code(), 4);
    }
    join(&url);
}

#[test]
fn nobody_there_is_an_error_that_says_what_to_try() {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let worker = Worker::start(limits());
    let url = worker.url_at(socket.local_addr().unwrap());
    let (end, _lost) = (join(&worker.url()).client, ());
    let limit = Duration::from_millis(200);
    let message = connect(&url, end, HELLO, limit, &mut |_| Ok(())).err().unwrap().to_string();
    assert!(message.contains(&url.name()) && message.contains("firewall"), "{message}");
}

#[test]
fn what_is_wrong_ends_one_session_with_its_message() {
    let worker = Worker::start(limits());
    let bystander = join(&worker.url());
    type Act = fn(&Client);
    let acts: [(Act, &str); 6] = [
        (|client| client.send(b"malformed"), "op 7 is malformed"),
        (|client| client.send(b"panic"), "internal error"),
        (|client| client.send(b"bad for the client"), "reply 3 is malformed"),
        (
            |client| client.send_bulk(bulk_source(b"unasked", 10, 1).0),
            "transfer 9 was not asked for",
        ),
        (
            |client| client.send_bulk(bulk_source(&[0; MAX_BULK_HEADER_BYTES + 1], 1, 1).0),
            "a header of 1025 bytes",
        ),
        (|client| client.send(&vec![0; MAX_FRAME_BYTES + 1]), "a frame of 262145 bytes"),
    ];
    for (act, expected) in acts {
        let joined = join(&worker.url());
        act(&joined.client);
        let message = joined.lost();
        assert!(message.contains(expected), "{message}");
        assert_eq!(worker.event(), Event::Lost, "{expected}");
        drop(joined.connection);
        assert!(joined.lost.try_recv().is_err(), "{expected}: lost was called twice");
    }
    bystander.client.send(b"untouched");
    assert_eq!(bystander.hear(), b"untouched");
}

#[test]
fn a_failing_source_ends_the_session_and_a_short_one_too() {
    let worker = Worker::start(limits());
    let failing = |_: &mut [u8]| Err(Error::model("unet.bin was truncated"));
    let short = |_: &mut [u8]| Ok(0);
    type Read = Box<dyn FnMut(&mut [u8]) -> Result<usize> + Send>;
    let cases: [(Read, &str); 2] =
        [(Box::new(failing), "unet.bin was truncated"), (Box::new(short), "10 bytes had 0")];
    for (read, expected) in cases {
        let joined = join(&worker.url());
        let source = BulkSource { header: vec![1], len: 10, read };
        joined.client.send_bulk(source);
        let error = joined.lost.recv_timeout(PATIENCE).unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_dropped_connection_first_sends_what_waits() {
    let worker = Worker::start(limits());
    let joined = join(&worker.url());
    for number in 0..100u8 {
        joined.client.send(&vec![number; 10_000]);
    }
    joined.client.send(b"tell");
    drop(joined.connection);
    assert!(joined.lost.recv_timeout(PATIENCE).unwrap().to_string().contains("was closed"));
    assert_eq!(worker.event(), Event::Told(100));
    assert_eq!(worker.event(), Event::Lost);
    assert!(joined.lost.try_recv().is_err());
}

#[test]
fn a_stopped_worker_is_heard_of_at_once() {
    let worker = Worker::start(limits());
    let joined = join(&worker.url());
    worker.server.stop();
    worker.server.wait();
    let message = joined.lost();
    assert!(message.contains("stopped") && message.contains(&worker.url().name()), "{message}");
    assert_eq!(worker.event(), Event::Lost);
}

#[test]
fn a_worker_that_shuts_down_serves_whom_it_has() {
    let worker = Worker::start(limits());
    let joined = join(&worker.url());
    worker.server.begin_shutdown();
    let refusal = join_as(&worker.url(), HELLO).err().unwrap().to_string();
    assert!(refusal.contains("shutting down") && refusal.contains("1 session"), "{refusal}");
    joined.client.send(b"one more");
    assert_eq!(joined.hear(), b"one more");
    drop(joined);
    worker.server.shutdown();
    assert_eq!(worker.event(), Event::Lost);
}

#[test]
fn an_idle_session_is_ended_but_not_while_it_works() {
    let idle_timeout = Some(Duration::from_millis(100));
    let worker = Worker::start(Limits { idle_timeout, ..limits() });
    // Without a word from the client, for longer than the limit.
    worker.busy.store(6, Ordering::SeqCst);
    let message = join(&worker.url()).lost();
    assert!(message.contains("--idle-timeout"), "{message}");
    assert_eq!(worker.busy.load(Ordering::SeqCst), 0, "it was not asked whether it works");
}

#[test]
fn a_silent_network_is_noticed_by_both_within_5_s() {
    let worker = Worker::start(limits());
    let proxy = UdpProxy::start(worker.server.local_addr(), Faults::default());
    let joined = join(&worker.url_at(proxy.address()));
    joined.client.send(b"hello");
    joined.hear();
    let start = Instant::now();
    proxy.set_silent(true);
    let message = joined.lost();
    assert!(message.contains("was not heard from"), "{message}");
    assert_eq!(worker.event(), Event::Lost);
    let noticed = start.elapsed();
    assert!(noticed > IDLE_TIMEOUT / 2 && noticed < Duration::from_secs(5), "{noticed:?}");
}

#[test]
fn loss_and_reordering_and_delay_change_nothing_but_time() {
    let worker = Worker::start(limits());
    let seed = 11;
    let delay = Duration::from_millis(20);
    let faults = Faults { loss: 0.05, reorder: 0.1, delay, seed, ..Faults::default() };
    let proxy = UdpProxy::start(worker.server.local_addr(), faults);
    let joined = join(&worker.url_at(proxy.address()));
    let (source, digest) = bulk_source(b"bulk", 1 << 20, seed);
    joined.client.send_bulk(source);
    let frames = |number: u8| vec![number; usize::from(number) * 40];
    (0..200).for_each(|number| joined.client.send(&frames(number)));
    for number in 0..200 {
        assert_eq!(joined.hear(), frames(number), "seed {seed}");
    }
    assert_eq!(worker.event(), Event::Bulk { header: b"bulk".to_vec(), digest }, "seed {seed}");
    assert!(proxy.lost() > 0);
}
