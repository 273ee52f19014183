//! Programs on a GPU: a replay gives the bits of the ops one by one, writes over nobody's results,
//! and is never stale.

use candle_core::backend::BackendStorage;
use candle_core::scalar::Scalar;
use candle_core::{DType, Layout};
use tiny_sd::Result;
use tiny_sd::backend::{Begun, Device, View, cuda};
use tiny_sd::tensor::{Tensor, program};

use super::device;
use super::emulated::Emulated;
use crate::protocol::programs::{Network, inputs};

type Gpu = Tensor<cuda::Storage>;

fn one(value: f32, device: &cuda::Device) -> Result<Gpu> {
    Tensor::from_slice(&[value], 1, device)
}

#[test]
fn replays_give_the_bits_of_ops_and_keep_the_results_before() -> Result<()> {
    let gpu = Emulated::default();
    let device = cuda::Device::new(gpu.clone())?;
    let network = Network::<cuda::Storage>::new(&device)?;
    let mut results = Vec::new();
    for seed in 0..4 {
        let (x, time) = inputs(seed, &device)?;
        let expected = network.forward(&x, &time)?.to_vec::<f32>()?;
        let launches = device.launches();
        let output = network.step(&x, &time)?;
        assert_eq!(device.launches() == launches, seed > 0, "{seed}");
        assert_eq!(device.replays(), seed, "{seed}");
        results.push((output, expected));
    }
    for (seed, (output, expected)) in results.iter().enumerate() {
        assert_eq!(output.to_vec::<f32>()?, *expected, "{seed}");
    }
    device.forget_program("nothing");
    assert_eq!(device.ops_on_host(), 0);
    drop((results, network, device));
    assert_eq!(gpu.held_bytes(), 0);
    Ok(())
}

#[test]
fn what_is_used_from_outside_lives_no_longer_for_it_and_a_change_of_it_is_seen() -> Result<()> {
    let device = device();
    let x = one(1.0, &device)?;
    let add = |value: &Gpu| program("add", &device, &[&x], || x.add(value))?.to_vec::<f32>();
    let outside = one(10.0, &device)?;
    assert_eq!((add(&outside)?, add(&outside)?), (vec![11.0], vec![11.0]));
    assert_eq!(device.replays(), 1);
    drop(outside);
    let outside = one(20.0, &device)?;
    assert_eq!((add(&outside)?, add(&outside)?), (vec![21.0], vec![21.0]));
    assert_eq!(device.replays(), 2, "recorded anew");
    // In place.
    let layout = Layout::contiguous(1);
    let mut own = outside.storage().try_clone(&layout)?;
    let key = "own";
    for expected in [21.0, 21.0, 31.0, 31.0] {
        if expected == 31.0 {
            own.const_set(Scalar::F32(30.0), &layout)?;
        }
        let sum = match device.begin_program(key, &[&**x.storage()])? {
            Begun::Replayed(mut outputs) => outputs.remove(0).0,
            Begun::Run => panic!("it can be recorded"),
            Begun::Record => {
                let sum =
                    x.storage().binary_impl::<candle_core::op::Add>(&own, &layout, &layout)?;
                let outputs = device.end_program(&[View { storage: &sum, layout: &layout }])?;
                outputs.expect("a copy").remove(0).0
            }
        };
        assert_eq!(sum.to_cpu_storage()?.as_slice::<f32>()?, [expected]);
    }
    Ok(())
}

#[test]
fn what_the_host_computes_is_not_replayed() -> Result<()> {
    let device = device();
    let on_host =
        |x: &Gpu| program("on host", &device, &[x], || x.unary::<candle_core::op::Gelu>());
    let power = |x: &Gpu| -> Result<Gpu> {
        program("power", &device, &[x], || {
            let values = x.to_vec::<f32>()?;
            x.affine(f64::from(values[0]), 0.0)
        })
    };
    for value in [2.0, 3.0, 4.0] {
        let x = one(value, &device)?;
        assert_eq!(power(&x)?.to_vec::<f32>()?, [value * value]);
        on_host(&x)?;
    }
    assert_eq!(device.replays(), 2, "of the one that has a kernel");
    Ok(())
}

#[test]
fn constants_of_a_program_stay_what_they_are() -> Result<()> {
    let device = device();
    let step = |x: &Gpu| {
        program("constants", &device, &[x], || {
            let mut sum = x.clone();
            for value in 0..3 {
                let zeros = Gpu::zeros(1, DType::F32, &device)?;
                sum = sum.add(&one(value as f32, &device)?)?.add(&zeros)?;
            }
            Ok(sum)
        })
    };
    for value in [1.0, 5.0, 9.0] {
        assert_eq!(step(&one(value, &device)?)?.to_vec::<f32>()?, [value + 3.0]);
    }
    assert_eq!(device.replays(), 2);
    Ok(())
}

#[test]
fn work_that_panics_while_it_is_recorded_leaves_the_device_to_others() -> Result<()> {
    let device = device();
    let x = one(1.0, &device)?;
    std::thread::scope(|scope| {
        let panics = || program("broken", &device, &[&x], || panic!("on purpose")).map(drop);
        assert!(scope.spawn(panics).join().is_err());
    });
    let double = || program("double", &device, &[&x], || x.add(&x))?.to_vec::<f32>();
    assert_eq!((double()?, double()?), (vec![2.0], vec![2.0]));
    assert_eq!(device.replays(), 1);
    Ok(())
}

#[test]
fn other_threads_work_while_one_records() -> Result<()> {
    let device = device();
    let x = one(1.0, &device)?;
    let step = || {
        program("outer", &device, &[&x], || {
            std::thread::scope(|scope| {
                let other = || -> Result<Vec<f32>> {
                    let y = one(7.0, &device)?;
                    program("other", &device, &[&y], || y.add(&y))?.to_vec()
                };
                let other = scope.spawn(other).join().expect("no panic");
                assert_eq!(other.expect("it works"), [14.0]);
            });
            let within = program("inner", &device, &[&x], || x.add(&x));
            assert!(within.unwrap_err().to_string().contains("within another"));
            x.add(&x)
        })
    };
    assert_eq!(step()?.to_vec::<f32>()?, [2.0]);
    let launches = device.launches();
    assert_eq!(step()?.to_vec::<f32>()?, [2.0]);
    assert_eq!((device.launches(), device.replays()), (launches, 1), "one launch was recorded");
    Ok(())
}

#[test]
fn a_program_holds_no_more_than_its_recording_paid_for() -> Result<()> {
    const FLOATS: usize = 16 << 20;
    let gpu = Emulated::default();
    let device = cuda::Device::new(gpu.clone())?;
    let x = one(1.0, &device)?;
    let greedy = || {
        program("greedy", &device, &[&x], || {
            // Each is freed before the next, and none may be used again.
            for _ in 0..10 {
                drop(Gpu::zeros(FLOATS, DType::F32, &device)?);
            }
            x.add(&x)
        })
    };
    for _ in 0..2 {
        assert_eq!(greedy()?.to_vec::<f32>()?, [2.0]);
        assert!(gpu.held_bytes() < 4 * FLOATS, "{} bytes", gpu.held_bytes());
    }
    assert_eq!(device.replays(), 0, "it is too large to be kept");
    Ok(())
}

#[test]
fn memory_is_taken_back_from_programs_before_there_is_none() -> Result<()> {
    const FLOATS: usize = 25_000;
    let gpu = Emulated::with_memory(4 * 100_000);
    let device = cuda::Device::new(gpu.clone())?;
    let x = Gpu::zeros(FLOATS, DType::F32, &device)?;
    // Of its own it has an input and a result; the caller a copy.
    let double = || program("double", &device, &[&x], || x.add(&x)).map(drop);
    double()?;
    double()?;
    assert_eq!(device.replays(), 1);
    let y = Gpu::zeros(2 * FLOATS, DType::F32, &device)?;
    assert_eq!(gpu.held_bytes(), 4 * 3 * FLOATS, "the program's memory was taken back");
    let error = y.add(&y).unwrap_err();
    assert!(error.is_out_of_memory(), "{error}");
    drop(y);
    double()?;
    double()?;
    assert_eq!(device.replays(), 2);
    Ok(())
}
