//! What a session promises: the first cause of an error, caps, freed memory, shared weights, and
//! that sessions do not see each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::op::{Mul, Sub};
use candle_core::{DType, Layout};
use tiny_sd::backend::{Activation, HostTensor, Role, cpu};
use tiny_sd::error::Kind;
use tiny_sd::remote::executor::Limits;
use tiny_sd::remote::library::Library;
use tiny_sd::remote::loopback::Loopback;
use tiny_sd::remote::op::{Digest, Id, Op};
use tiny_sd::remote::storage::Storage;
use tiny_sd::remote::transport::{BulkSink, BulkSource};
use tiny_sd::remote::wire::Wire;
use tiny_sd::remote::worker;
use tiny_sd::tensor::Tensor;
use tiny_sd::{Error, Result};

use super::{LIMITS, Worker};

type Remote = Tensor<Storage>;

fn used_bytes(session: &Loopback) -> Result<u64> {
    let session = session.session();
    Ok(session.done(session.mark()?)?.memory_bytes)
}

fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.expect_err("it fails").to_string()
}

#[test]
fn a_read_tells_the_first_cause_and_the_session_goes_on() -> Result<()> {
    let session = Worker::new()?.connect("worker-1")?;
    let device = session.device();
    let table: Remote = Tensor::from_slice(&[1f32, 2., 3., 4., 5., 6.], (3, 2), &device)?;
    let rows = table.embedding(&Tensor::from_slice(&[2u32, 7], 2, &device)?)?; // call 3
    let later = rows.affine(2.0, 0.0)?.binary::<Mul>(&rows)?;
    let last = Tensor::cat(&[&later, &rows], 0)?;
    for x in [&rows, &later, &last] {
        let error = x.to_vec::<f32>().expect_err("there is no row 7");
        assert_eq!(error.kind(), Kind::Remote);
        let text = error.to_string();
        for part in ["worker-1", "call 3", "index_select of ([3, 2] f32, [2] u32)", "7"] {
            assert!(text.contains(part), "no {part:?} in {text:?}");
        }
        assert!(!text.contains('\n'), "{text:?}");
    }
    assert_eq!(table.add(&table)?.to_vec::<f32>()?, [2., 4., 6., 8., 10., 12.]);
    Ok(())
}

#[test]
fn a_panic_in_a_kernel_is_one_poisoned_result() -> Result<()> {
    let session = Worker::new()?.connect("worker")?;
    let one: Remote = Tensor::from_slice(&[1u8], 1, &session.device())?;
    let two: Remote = Tensor::from_slice(&[2u8], 1, &session.device())?;
    // Overflow checks are on in tests, as in the worker's debug builds.
    let text = message(one.binary::<Sub>(&two)?.to_vec::<u8>());
    assert!(text.contains("sub of ([1] u8, [1] u8)") && text.contains("panicked"), "{text}");
    assert_eq!(two.binary::<Sub>(&one)?.to_vec::<u8>()?, [1]);
    Ok(())
}

#[test]
fn memory_is_capped_and_comes_back() -> Result<()> {
    let limits = Limits { memory_bytes: 1 << 20, ..LIMITS };
    let session = Worker::new()?.connect_with("worker", limits)?;
    let zeros = |count: usize| Remote::zeros(count, DType::F32, &session.device());
    let text = message(zeros(1 << 19)?.to_vec::<f32>());
    for part in ["zeros", "out of memory", "2097152", "1048576", "--session-memory"] {
        assert!(text.contains(part), "no {part:?} in {text:?}");
    }
    let (a, b) = (zeros(100_000)?, zeros(100_000)?);
    assert!(message(zeros(100_000)?.to_vec::<f32>()).contains("out of memory"));
    assert_eq!(used_bytes(&session)?, 800_000);
    drop(a);
    assert_eq!(zeros(100_000)?.to_vec::<f32>()?.len(), 100_000);
    drop(b);
    assert_eq!(used_bytes(&session)?, 0);
    Ok(())
}

#[test]
fn a_session_with_too_many_buffers_ends_and_says_why() -> Result<()> {
    let limits = Limits { buffers: 5, ..LIMITS };
    let session = Worker::new()?.connect_with("worker", limits)?;
    let zeros = || Remote::zeros(1, DType::U8, &session.device());
    for _ in 0..20 {
        zeros()?.to_vec::<u8>()?; // freed each time
    }
    let held = (0..6).map(|_| zeros()).collect::<Result<Vec<_>>>()?;
    let error = held[0].to_vec::<u8>().expect_err("the sixth is too many");
    assert_eq!(error.kind(), Kind::Remote);
    assert!(error.to_string().contains("more than 5 buffers"), "{error}");
    assert_eq!(message(zeros()), error.to_string(), "every later op says the same");
    Ok(())
}

#[test]
fn tensors_of_any_size_go_there_and_back() -> Result<()> {
    let session = Worker::new()?.connect("worker")?;
    // Nothing, inline, at the border, on a stream, in many pieces.
    for count in [0, 1, 4096, 4097, 1_000_003] {
        let values: Vec<f32> = (0..count).map(|i| i as f32).collect();
        let x: Remote = Tensor::from_slice(&values, count, &session.device())?;
        assert_eq!(x.to_vec::<f32>()?, values, "{count}");
        assert_eq!(x.affine(2.0, 0.0)?.to_vec::<f32>()?.len(), count);
    }
    let statistics = session.session().statistics();
    assert_eq!(statistics.bulk_bytes_up, 4 * (4097 + 1_000_003));
    assert_eq!(used_bytes(&session)?, 0);
    Ok(())
}

/// Counts what is asked for.
struct Counting {
    library: Arc<dyn Library>,
    asked: Arc<AtomicUsize>,
}

impl Library for Counting {
    fn has(&self, digests: &[Digest]) -> Vec<bool> {
        self.library.has(digests)
    }

    fn get(&self, digest: &Digest) -> Result<HostTensor> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.library.get(digest)
    }

    fn receive(&self, digest: Digest, dtype: DType, dims: &[usize]) -> Result<Box<dyn BulkSink>> {
        self.library.receive(digest, dtype, dims)
    }

    fn end(&self) {
        self.library.end();
    }
}

fn host(dims: &[usize]) -> Result<HostTensor> {
    let count = dims.iter().product::<usize>();
    let bytes: Vec<u8> = (0..count).flat_map(|i| (i as f32 / 9.0).to_le_bytes()).collect();
    HostTensor::new(DType::F32, Layout::contiguous(dims.to_vec()), Arc::new(bytes), 0)
}

#[test]
fn sessions_share_a_weight_and_its_prepared_form() -> Result<()> {
    let (setup, asked) = (Worker::new()?, Arc::new(AtomicUsize::new(0)));
    let host = host(&[4, 6])?;
    setup.insert(&host)?;
    let cpu = cpu::Device::with_threads(1)?;
    let worker = worker::Worker::<cpu::Storage>::new(cpu.clone(), LIMITS, 1 << 20);
    let connect = |name| {
        let counting = Counting { library: setup.library.session(), asked: asked.clone() };
        Loopback::connect(name, &worker, Arc::new(counting))
    };
    let (first, second) = (connect("first")?, connect("second")?);

    let x = [1f32, -1., 2., -2., 3., -3.];
    let expected = {
        let weight = Tensor::<cpu::Storage>::upload(&host, DType::F32, &cpu)?;
        let x = Tensor::from_slice(&x, (1, 6), &cpu)?;
        x.linear(&weight.prepare(Role::Linear)?, None, Activation::Silu)?.to_vec::<f32>()?
    };
    for session in [&first, &second, &first] {
        let device = session.device();
        let weight: Remote = Tensor::upload(&host, DType::F32, &device)?;
        let weight = weight.prepare(Role::Linear)?;
        let x = Tensor::from_slice(&x, (1, 6), &device)?;
        let y = x.linear(&weight, None, Activation::Silu)?;
        assert_eq!(y.to_vec::<f32>()?, expected);
        drop((weight, x, y));
        assert_eq!(used_bytes(session)?, 0, "weights are nobody's memory");
    }
    assert_eq!(asked.load(Ordering::Relaxed), 1, "made once, for the prepared form");
    Ok(())
}

#[test]
fn a_weight_that_does_not_fit_is_an_error_that_names_it() -> Result<()> {
    let worker = Worker::new()?;
    let host = host(&[4, 6])?;
    let digest = worker.insert(&host)?;
    let session = worker.connect("worker")?;
    let op = Op::Weight { digest, dtype: DType::F16, dims: vec![4, 7] };
    let id = session.session().call(tiny_sd::remote::op::Call { op, args: vec![] })?;
    let text = message(session.session().data(session.session().read(id, 56)?));
    assert!(text.contains("weight [4, 7] f16") && text.contains("[4, 6]"), "{text}");
    Ok(())
}

#[test]
fn a_session_sees_no_buffer_of_another() -> Result<()> {
    let worker = Worker::new()?;
    let (first, second) = (worker.connect("first")?, worker.connect("second")?);
    let secrets = (0..5).map(|i| Remote::from_slice(&[i as f32], 1, &first.device()));
    let secrets = secrets.collect::<Result<Vec<_>>>()?;
    assert_eq!(secrets[4].to_vec::<f32>()?, [4.0]);
    let own: Remote = Tensor::from_slice(&[7f32], 1, &second.device())?;
    let read = |id| second.session().data(second.session().read(Id(id), 4)?);
    assert_eq!(read(0)?, 7f32.to_le_bytes(), "the same number is another buffer");
    drop(own);
    assert!(message(read(0)).contains("buffer #0 is not there"), "a freed one");
    // A number that this session never gave out is no mistake that a client makes.
    let error = read(3).expect_err("#3 is of the other session");
    assert!(error.to_string().contains("before it is made"), "{error}");
    assert!(Remote::zeros(1, DType::F32, &second.device()).is_err(), "that session is over");
    assert_eq!(secrets[3].to_vec::<f32>()?, [3.0], "the other one is not");
    Ok(())
}

#[test]
fn a_tensor_goes_to_another_device_whole_and_in_its_memory_order() -> Result<()> {
    let (worker, other) = (Worker::new()?, Worker::new()?);
    let (one, two) = (worker.connect("one")?, other.connect("two")?);
    // More than one piece.
    let values: Vec<f32> = (0..6 << 20).map(|value| value as f32).collect();
    let here: Tensor<cpu::Storage> = Tensor::from_slice(&values, (3, 1 << 20, 2), &worker.device)?;
    let here = here.permute(&[2, 0, 1])?.narrow(1, 0, 3)?; // (2, 3, 2^20), not contiguous
    let there = here.to_device::<Storage>(&one.device())?;
    let beyond = there.to_device::<Storage>(&two.device())?;
    let back = beyond.narrow(1, 1, 2)?.to_device::<cpu::Storage>(&worker.device)?;
    assert_eq!(beyond.layout(), here.layout());
    assert_eq!(back.to_vec::<f32>()?, here.narrow(1, 1, 2)?.to_vec::<f32>()?);
    let reads = two.session().statistics().round_trips;
    let same = beyond.to_device::<Storage>(&two.device())?;
    assert!(Arc::ptr_eq(same.storage(), beyond.storage()));
    assert_eq!(two.session().statistics().round_trips, reads);
    Ok(())
}

#[test]
fn tensors_of_two_workers_do_not_meet() -> Result<()> {
    let worker = Worker::new()?;
    let (first, second) = (worker.connect("worker-a:1")?, worker.connect("worker-b:2")?);
    let one = |session: &Loopback| Remote::from_slice(&[1f32], 1, &session.device());
    let (a, b) = (one(&first)?, one(&second)?);
    for text in [message(a.add(&b)), message(Tensor::cat(&[&b, &a], 0))] {
        let names = ["worker-a:1", "worker-b:2", "to_device"];
        assert!(names.iter().all(|name| text.contains(name)), "{text}");
    }
    assert_eq!(a.add(&a)?.to_vec::<f32>()?, [2.0]);
    assert_eq!(b.add(&b)?.to_vec::<f32>()?, [2.0]);
    Ok(())
}

#[test]
fn a_lost_worker_ends_every_wait_with_one_error() -> Result<()> {
    let session = Worker::new()?.connect("worker")?;
    let x: Remote = Tensor::from_slice(&[1f32], 1, &session.device())?;
    let (device, ticket) = (session.device(), session.session().mark()?);
    session.session().done(ticket)?;
    drop(session);
    for text in [
        message(x.to_vec::<f32>()),
        message(x.add(&x)),
        message(Remote::from_slice(&[0f32; 5000], 5000, &device)),
        message(device.session().mark()),
    ] {
        assert_eq!(text, "the session with worker is closed");
    }
    Ok(())
}

#[test]
fn bytes_that_never_come_are_an_error_and_not_a_wait_for_ever() -> Result<()> {
    let session = Worker::new()?.connect("worker")?;
    let op = session.session().transfer(|transfer| {
        let op = Op::Received { transfer, dtype: DType::U8, len: 20_000 };
        let mut header = Vec::new();
        op.put(&mut header);
        let read = Box::new(|_: &mut [u8]| Err(Error::other("the file was cut short")));
        (BulkSource { header, len: 20_000, read }, op)
    })?;
    // The failure may be there before the first of these, or only for the last.
    let session = session.session();
    let called = session.call(tiny_sd::remote::op::Call { op, args: vec![] });
    let asked = called.and_then(|id| session.read(id, 20_000));
    let text = message(asked.and_then(|ticket| session.data(ticket)));
    assert!(text.contains("the file was cut short"), "{text}");
    Ok(())
}

#[test]
fn each_stage_has_what_was_done_in_it() -> Result<()> {
    let worker = Worker::new()?.connect("worker")?;
    let (session, device) = (worker.session(), worker.device());
    let one: Remote = Tensor::from_slice(&[1f32], 1, &device)?;
    session.begin_stage(Some("add"));
    let two = one.add(&one)?.add(&one)?.add(&one)?;
    session.begin_stage(Some("read"));
    assert_eq!(two.add(&one)?.to_vec::<f32>()?, [5.0]);
    session.begin_stage(None);
    let _unseen = one.add(&one)?;
    session.begin_stage(Some("add"));
    let _seen = one.add(&one)?;
    let stages = session.stages()?;
    let found = stages.iter().map(|stage| {
        let did = &stage.statistics;
        assert!(did.bytes_up > 0 && !stage.elapsed.is_zero(), "{stage:?}");
        (stage.name, did.calls, did.worker.ops, did.round_trips)
    });
    assert_eq!(found.collect::<Vec<_>>(), [("add", 4, 4, 0), ("read", 1, 1, 1)]);
    Ok(())
}
