//! Programs: a replay gives the bits of a recording, costs a few bytes, and is never stale.

use candle_core::backend::BackendStorage;
use candle_core::op::{Mul, Sin};
use candle_core::scalar::Scalar;
use candle_core::{DType, Layout};
use tiny_sd::Result;
use tiny_sd::backend::{Activation, Attention, Backend, Device, Role, cpu};
use tiny_sd::remote::loopback::Loopback;
use tiny_sd::remote::message::MAX_PROGRAMS;
use tiny_sd::remote::op::{Call, Op, Operand};
use tiny_sd::remote::storage::Storage;
use tiny_sd::tensor::{Tensor, Weight, program};

use super::Worker;
use crate::numbers::Random;

type Remote = Tensor<Storage>;

/// A small network with everything that a step of the UNet has: views, inputs of several shapes,
/// weights and constants of its own.
pub struct Network<B> {
    weight: Weight<B>,
    bias: Tensor<B>,
}

impl<B: Backend> Network<B> {
    pub fn new(device: &B::Device) -> Result<Self> {
        let mut random = Random(5);
        let weight: Tensor<B> = Tensor::from_slice(&random.values(64), (8, 8), device)?;
        Ok(Self {
            weight: weight.prepare(Role::Linear)?,
            bias: Tensor::from_slice(&random.values(8), 8, device)?,
        })
    }

    pub fn forward(&self, x: &Tensor<B>, time: &Tensor<B>) -> Result<Tensor<B>> {
        let scales: Tensor<B> = Tensor::from_slice(&[0.5f32; 8], 8, x.device())?;
        let time = time.unsqueeze(1)?.binary::<Mul>(&scales)?.unary::<Sin>()?;
        let hidden = x.linear(&self.weight, Some(&self.bias), Activation::Silu)?.add(&time)?;
        let attention = Attention { heads: 2, scale: 0.5, causal: false };
        let looked = hidden.attention(&hidden, x, attention)?;
        let joined = Tensor::cat(&[&looked, &hidden.transpose(1, 2)?.transpose(1, 2)?], 1)?;
        let sum = Tensor::linear_combination(&[(0.3, &looked), (-1.5, x)])?;
        Tensor::cat(&[&joined, &sum], 1)?.narrow(1, 2, 9)
    }

    pub fn step(&self, x: &Tensor<B>, time: &Tensor<B>) -> Result<Tensor<B>> {
        program("network", x.device(), &[x, time], || self.forward(x, time))
    }
}

pub fn inputs<B: Backend>(seed: u64, device: &B::Device) -> Result<(Tensor<B>, Tensor<B>)> {
    let mut random = Random(seed);
    let x = Tensor::from_slice(&random.values(32), (1, 4, 8), device)?;
    Ok((x, Tensor::from_slice(&random.values(1), 1, device)?))
}

fn values<B: Backend>(output: &Tensor<B>) -> Result<Vec<f32>> {
    output.to_vec()
}

fn expected(network: &Network<cpu::Storage>, seed: u64) -> Result<Vec<f32>> {
    let (x, time) = inputs(seed, network.bias.device())?;
    values(&network.forward(&x, &time)?)
}

struct Both {
    session: Loopback,
    here: Network<cpu::Storage>,
    there: Network<Storage>,
}

fn both() -> Result<Both> {
    let worker = Worker::new()?;
    let session = worker.connect("worker")?;
    let (here, there) = (Network::new(&worker.device)?, Network::new(&session.device())?);
    Ok(Both { session, here, there })
}

fn sent(session: &Loopback) -> Result<(u64, u64)> {
    let session = session.session();
    session.done(session.mark()?)?;
    let statistics = session.statistics();
    Ok((statistics.bytes_up, statistics.replays))
}

#[test]
fn a_replay_gives_the_bits_of_a_recording_for_a_few_bytes() -> Result<()> {
    let Both { session, here, there } = both()?;
    for seed in 0..6 {
        let (x, time) = inputs(seed, &session.device())?;
        let (before, _) = sent(&session)?;
        let outputs = there.step(&x, &time)?;
        let (after, replays) = sent(&session)?;
        assert_eq!(replays, seed);
        let bytes = after - before;
        assert!(seed == 0 || bytes < 20, "{bytes} bytes for a replay");
        // The inputs are gone before the results are read.
        drop((x, time));
        assert_eq!(values(&outputs)?, expected(&here, seed)?, "seed {seed}");
        assert_eq!(outputs.layout().start_offset(), 16, "{outputs:?}");
    }
    let ops = session.session().statistics().worker.ops;
    assert!(ops > 6 * 8, "{ops} ops ran");
    Ok(())
}

#[test]
fn what_a_program_holds_comes_back_when_it_goes() -> Result<()> {
    let Both { session, here, there } = both()?;
    let (x, time) = inputs(0, &session.device())?;
    there.step(&x, &time)?;
    // Weights go on the client; the program still has them.
    drop(there);
    let replayed = program("network", &session.device(), &[&x, &time], || panic!("known"))?;
    assert_eq!(values(&replayed)?, expected(&here, 0)?);
    drop((x, time, replayed));
    let used =
        || -> Result<u64> { Ok(session.session().done(session.session().mark()?)?.memory_bytes) };
    assert!(used()? > 0);
    session.session().forget_programs();
    assert_eq!(used()?, 0);
    Ok(())
}

#[test]
fn inputs_of_another_shape_dtype_or_view_are_another_program() -> Result<()> {
    let session = Worker::new()?.connect("worker")?;
    let device = session.device();
    let double = |x: &Remote| -> Result<Vec<f32>> {
        let sum = program("double", &device, &[x], || x.add(x))?;
        sum.to_dtype(DType::F32)?.to_vec()
    };
    let base: Remote = Tensor::from_slice(&[1f32, 2., 3., 4., 5., 6.], (2, 3), &device)?;
    let alone: Remote = Tensor::from_slice(&[1f32, 2., 3.], (1, 3), &device)?;
    assert_eq!(double(&alone)?, [2., 4., 6.]);
    // The same view, but of a larger buffer.
    assert_eq!(double(&base.narrow(0, 0, 1)?)?, [2., 4., 6.]);
    assert_eq!(double(&base.narrow(0, 1, 1)?)?, [8., 10., 12.]);
    assert_eq!(double(&base.transpose(0, 1)?)?, [2., 8., 4., 10., 6., 12.]);
    assert_eq!(double(&alone.to_dtype(DType::F16)?)?, [2., 4., 6.]);
    assert_eq!(session.session().statistics().replays, 0);
    assert_eq!(double(&alone)?, [2., 4., 6.]);
    assert_eq!(session.session().statistics().replays, 1);
    Ok(())
}

#[test]
fn inputs_that_were_one_buffer_are_not_taken_for_two() -> Result<()> {
    let session = Worker::new()?.connect("worker")?;
    let one = |value: f32| Remote::from_slice(&[value], 1, &session.device());
    let (x, y) = (one(1.0)?, one(10.0)?);
    let sum = |a: &Remote, b: &Remote| -> Result<Vec<f32>> {
        program("sum", a.device(), &[a, b], || a.add(b))?.to_vec()
    };
    assert_eq!(sum(&x, &x)?, [2.0]);
    assert_eq!(sum(&x, &y)?, [11.0]);
    assert_eq!(sum(&y, &y)?, [20.0]);
    assert_eq!(sum(&y, &x)?, [11.0]);
    assert_eq!(session.session().statistics().replays, 2);
    Ok(())
}

#[test]
fn the_check_names_what_varies_and_passes_what_does_not() -> Result<()> {
    let Both { session, here, there } = both()?;
    session.session().check_programs();
    for seed in 0..3 {
        let (x, time) = inputs(seed, &session.device())?;
        assert_eq!(values(&there.step(&x, &time)?)?, expected(&here, seed)?);
    }
    assert_eq!(session.session().statistics().replays, 0, "nothing is replayed");

    let (x, _) = inputs::<Storage>(0, &session.device())?;
    let check = |name: &str, f: &dyn Fn(u32) -> Result<Remote>, part: &str| {
        let step = |n| program(name, &session.device(), &[&x], || f(n));
        step(0).expect("the first time there is nothing to differ from");
        let text = step(1).expect_err(name).to_string();
        let parts = [&format!("program {name}"), part, "must be an input"];
        assert!(parts.iter().all(|part| text.contains(part)), "{name}: {text}");
    };
    check("attribute", &|n| x.add(&x)?.affine(f64::from(n), 0.0), "call 1 is Affine");
    check("view", &|n| x.narrow(1, n as usize, 1)?.add(&x.narrow(1, 0, 1)?), "call 0 is Binary");
    check("length", &|n| if n == 0 { x.add(&x) } else { x.add(&x)?.add(&x) }, "was nothing");
    let constant = |n| x.add(&Tensor::from_slice(&[n as f32; 32], (1, 4, 8), x.device())?);
    check("constant", &constant, "Constant");
    let outside = [x.affine(2.0, 0.0)?, x.affine(3.0, 0.0)?];
    check("outside", &|n| x.add(&outside[n as usize]), "call 0 is Binary");
    assert_eq!(x.add(&x)?.to_vec::<f32>()?.len(), 32, "the session goes on");
    Ok(())
}

#[test]
fn a_program_that_was_evicted_is_recorded_again() -> Result<()> {
    let Both { session, here, there } = both()?;
    let device = session.device();
    let step = |n: usize, (x, time): &(Remote, Remote)| {
        program(&format!("network {n}"), &device, &[x, time], || there.forward(x, time))
    };
    for round in 0..2 {
        for n in 0..MAX_PROGRAMS + 4 {
            let output = step(n, &inputs(n as u64, &device)?)?;
            assert_eq!(values(&output)?, expected(&here, n as u64)?, "{round} {n}");
        }
    }
    assert_eq!(session.session().statistics().replays, 0);
    step(MAX_PROGRAMS + 3, &inputs(1, &device)?)?;
    assert_eq!(session.session().statistics().replays, 1, "it is the newest");
    Ok(())
}

#[test]
fn bytes_beside_the_ops_are_no_part_of_a_program_and_nobody_waits_for_them() -> Result<()> {
    let session = Worker::new()?.connect("worker")?;
    let x: Remote = Tensor::from_slice(&[1f32], 1, &session.device())?;
    let large = || -> Result<Remote> {
        let large: Remote = Tensor::from_slice(&[2f32; 10_000], 10_000, x.device())?;
        large.narrow(0, 0, 1)?.add(&x)
    };
    let step = || program("large", x.device(), &[&x], large)?.to_vec::<f32>();
    assert_eq!(step()?, [3.0]);
    let text = step().expect_err("they came once").to_string();
    assert!(text.contains("cannot be replayed"), "{text}");
    Ok(())
}

#[test]
fn a_result_may_be_an_input_or_from_outside() -> Result<()> {
    let session = Worker::new()?.connect("worker")?;
    let x: Remote = Tensor::from_slice(&[1f32, 2.], 2, &session.device())?;
    let outside: Remote = Tensor::from_slice(&[3f32, 4.], 2, &session.device())?;
    for _ in 0..2 {
        let same = program("input", x.device(), &[&x], || x.narrow(0, 1, 1))?;
        assert_eq!(same.to_vec::<f32>()?, [2.0]);
        let same = program("outside", x.device(), &[&x], || outside.narrow(0, 1, 1))?;
        assert_eq!(same.to_vec::<f32>()?, [4.0]);
    }
    assert_eq!(session.session().statistics().replays, 2);
    Ok(())
}

#[test]
fn a_poisoned_input_poisons_the_results_with_its_cause() -> Result<()> {
    let Both { session, here, there } = both()?;
    let (x, time) = inputs(0, &session.device())?;
    let table = x.reshape((4, 8))?;
    let rows = |ids: [u32; 4]| table.embedding(&Tensor::from_slice(&ids, (1, 4), x.device())?);
    let (x, broken) = (rows([0, 1, 2, 3])?, rows([0, 77, 2, 3])?);
    there.step(&x, &time)?;
    let outputs = there.step(&broken, &time)?;
    assert_eq!(session.session().statistics().replays, 1);
    let text = outputs.to_vec::<f32>().expect_err("no row 77").to_string();
    assert!(text.contains("index_select") && text.contains("77"), "{text}");
    assert_eq!(values(&there.step(&x, &time)?)?, expected(&here, 0)?, "the next one is right");
    Ok(())
}

#[test]
fn a_program_recorded_from_what_failed_gives_its_cause_each_time() -> Result<()> {
    let session = Worker::new()?.connect("worker")?;
    let x: Remote = Tensor::from_slice(&[1f32], 1, &session.device())?;
    let table: Remote = Tensor::from_slice(&[0f32; 2], (2, 1), &session.device())?;
    let broken = table.embedding(&Tensor::from_slice(&[5u32], 1, &session.device())?)?;
    for _ in 0..3 {
        let sum = program("sum", x.device(), &[&x], || x.add(&broken))?;
        let text = sum.to_vec::<f32>().expect_err("no row 5").to_string();
        assert!(text.contains("index_select"), "{text}");
    }
    assert_eq!(x.add(&x)?.to_vec::<f32>()?, [2.0]);
    Ok(())
}

#[test]
fn a_write_in_place_leaves_what_a_program_holds() -> Result<()> {
    let session = Worker::new()?.connect("worker")?;
    let device = session.device();
    let x: Remote = Tensor::from_slice(&[1f32, 2.], 2, &device)?;
    let mut held =
        device.randn(tiny_sd::backend::Noise { seed: 1, skip: 0 }, &2.into(), DType::F32)?;
    let layout = Layout::contiguous(2);
    let add = |held: &Storage| -> Result<Vec<f32>> {
        let key = "add|held";
        let views = |s| tiny_sd::backend::View { storage: s, layout: &layout };
        let sum = match device.begin_program(key, &[&**x.storage()])? {
            tiny_sd::backend::Begun::Replayed(mut outputs) => outputs.remove(0).0,
            tiny_sd::backend::Begun::Run => panic!("a worker keeps programs"),
            tiny_sd::backend::Begun::Record => {
                let sum =
                    x.storage().binary_impl::<candle_core::op::Add>(held, &layout, &layout)?;
                device.end_program(&[views(&sum)])?;
                sum
            }
        };
        Ok(sum.to_cpu_storage()?.as_slice::<f32>()?.to_vec())
    };
    let before = add(&held)?;
    held.const_set(Scalar::F32(7.0), &layout)?;
    assert_eq!(held.to_cpu_storage()?.as_slice::<f32>()?, [7.0, 7.0]);
    assert_eq!(add(&held)?, before, "the program has what it was recorded with");
    // Raw: another name for the same buffer does not see the write either.
    let id = session
        .session()
        .call(Call { op: Op::Copy, args: vec![Operand { id: held.id(), layout: None }] })?;
    let bytes = session.session().data(session.session().read(id, 8)?)?;
    assert_eq!(bytes, [7f32.to_le_bytes(), 7f32.to_le_bytes()].concat());
    Ok(())
}
