//! The CUDA backend without a GPU: every op and whole pictures on kernels that the processor runs,
//! against the CPU and against diffusers. What only a GPU shows is in `scripts/gpu-check`.

mod compiling;
mod emulated;
mod gpu;
mod programs;
mod stand_in;

use std::time::{Duration, Instant};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, DType, Layout};
use tiny_sd::Result;
use tiny_sd::backend::{Activation, Backend, Conv2d, Fused, Linear, Role, View, cpu, cuda};
use tiny_sd::pipeline::{Additions, LoadOptions, Pipeline, Placement};
use tiny_sd::progress::Silent;
use tiny_sd::remote;
use tiny_sd::remote::op::Op;
use tiny_sd::remote::op::cases::{Case, cases};
use tiny_sd::tensor::Tensor;
use tiny_sd::weights::Model;

use super::golden::{
    cases as cases_of, check_close, fixtures, golden_picture, goldens, psnr, upload,
};
use super::op_cases::{run, weight};
use super::protocol::{LIMITS, Worker};
use emulated::Emulated;

fn device() -> cuda::Device {
    cuda::Device::new(Emulated::default()).unwrap()
}

#[test]
fn every_op_gives_what_the_cpu_gives_up_to_rounding() -> Result<()> {
    check_ops(&device())
}

#[test]
fn a_unet_evaluation_is_that_of_diffusers_in_few_launches_and_none_of_it_on_the_host() {
    check_unets(&device());
}

#[test]
fn pictures_are_those_of_diffusers_in_replays_and_leave_no_memory_behind() {
    let gpu = Emulated::default();
    let device = cuda::Device::new(gpu.clone()).unwrap();
    check_pictures(&device);
    drop(device);
    assert_eq!(gpu.held_bytes(), 0);
}

#[test]
fn a_worker_on_a_gpu_makes_the_very_picture_in_replays() {
    let gpu = Emulated::default();
    let device = cuda::Device::new(gpu.clone()).unwrap();
    check_worker(&device);
    drop(device);
    // The session's thread ends after the session.
    let began = Instant::now();
    while gpu.held_bytes() > 0 {
        assert!(began.elapsed() < Duration::from_secs(20), "{} bytes", gpu.held_bytes());
        std::thread::yield_now();
    }
}

fn numbers(values: &CpuStorage) -> Vec<f64> {
    let layout = Layout::contiguous(match values {
        CpuStorage::U8(values) => values.len(),
        CpuStorage::U32(values) => values.len(),
        CpuStorage::I64(values) => values.len(),
        CpuStorage::BF16(values) => values.len(),
        CpuStorage::F16(values) => values.len(),
        CpuStorage::F32(values) => values.len(),
        CpuStorage::F64(values) => values.len(),
        other => panic!("{:?}", other.dtype()),
    });
    match values.to_dtype(&layout, DType::F64).unwrap() {
        CpuStorage::F64(values) => values,
        other => panic!("{:?}", other.dtype()),
    }
}

/// The largest difference that rounding explains, as a part of the largest number.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2e-6,
        DType::F16 => 2e-3,
        DType::BF16 => 1.6e-2,
        _ => 0.0,
    }
}

/// Every case of the op table on this GPU and on the CPU.
fn check_ops(gpu: &cuda::Device) -> Result<()> {
    let host = cpu::Device::with_threads(2)?;
    let weight = weight()?;
    let mut ran = 0;
    for case in cases() {
        let what = format!("{:?} {} {:?}", case.op, case.dtype.as_str(), case.lie);
        let here = run::<cpu::Storage>(&case, &weight, &host);
        match (here, run::<cuda::Storage>(&case, &weight, gpu)) {
            (Ok(here), Ok(there)) => {
                ran += 1;
                check_result(&case, &here, &there, &what);
            }
            (Err(_), Err(_)) => {}
            // Of prepared weights the CPU shows nothing, and candle selects from dense ones only.
            (Err(_), Ok(_)) if ["prepare", "index_select"].contains(&case.op.name()) => {}
            (here, there) => panic!("{what}: here {here:?}, there {there:?}"),
        }
    }
    assert!(ran > 1000, "{ran} cases ran");
    Ok(())
}

fn check_result(case: &Case, here: &CpuStorage, there: &CpuStorage, what: &str) {
    let dtype = here.dtype();
    assert_eq!(dtype, there.dtype(), "{what}");
    let (here, there) = (numbers(here), numbers(there));
    assert_eq!(here.len(), there.len(), "{what}");
    if matches!(case.op, Op::RandUniform { .. } | Op::RandNormal { .. }) {
        return;
    }
    let finite = here.iter().filter(|x| x.is_finite());
    let most = tolerance(dtype) * finite.fold(1f64, |most, x| most.max(x.abs()));
    for (a, b) in here.iter().zip(&there) {
        let same = a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= most;
        assert!(same, "{what}: {a} here, {b} there");
    }
}

fn load(model: &str, dtype: DType, device: &cuda::Device) -> Pipeline<cuda::Storage> {
    load_on(model, dtype, device)
}

fn load_on<B: Backend>(model: &str, dtype: DType, device: &B::Device) -> Pipeline<B> {
    let folder = Model::open(fixtures().join("models").join(model), None).unwrap();
    let additions = Additions::default();
    let options = LoadOptions { dtype, variant: None, scheduler: None, encodes: false, additions };
    Pipeline::load(&folder, &options, Placement::whole(device), &Silent).unwrap()
}

/// Evaluations of UNets against diffusers' on this GPU, counted.
fn check_unets(device: &cuda::Device) {
    // "tiny" has segmind/tiny-sd's blocks; its images are small, and norms of large ones take two
    // launches more.
    for (model, tolerance, most) in [("tiny", 1e-5, 260), ("sd2", 5e-5, 500)] {
        let pipeline = load(model, DType::F32, device);
        let goldens = goldens(model, "stages.safetensors");
        let up = |name: &str| {
            let (host, golden) = (upload_host(), &goldens[name]);
            let values = upload(golden, &host).to_vec::<f32>().unwrap();
            Tensor::<cuda::Storage>::from_slice(&values, golden.dims(), device).unwrap()
        };
        let timestep = up("unet_timestep").reshape(1).unwrap();
        let text = Tensor::cat(&[&up("negative_embeddings"), &up("prompt_embeddings")], 0).unwrap();
        let text = pipeline.unet.text_key_values(&text).unwrap();
        let sample = up("unet_sample");
        let (launches, on_host) = (device.launches(), device.ops_on_host());
        let found = pipeline.unet.forward(&sample, &timestep, &text).unwrap();
        let launches = device.launches() - launches;
        println!("{model}: {launches} launches");
        assert!(launches <= most, "{model}: {launches}");
        assert_eq!(device.ops_on_host(), on_host, "{model}");
        let found = found.to_vec::<f32>().unwrap();
        check_close(model, &found, &goldens["unet_output"], tolerance);
    }
}

/// Whole pictures against diffusers' on this GPU; all evaluations of the UNet but the first are
/// replays.
fn check_pictures(device: &cuda::Device) {
    let (name, case) = cases_of("tiny").into_iter().find(|case| case.0 == "base").unwrap();
    let golden = golden_picture("tiny", &name);
    for (dtype, least_db) in [(DType::F32, 50.0), (DType::F16, 30.0), (DType::BF16, 20.0)] {
        let pipeline = load("tiny", dtype, device);
        let (on_host, replays) = (device.ops_on_host(), device.replays());
        let picture = pipeline.paint(&case.request(), &Silent).unwrap();
        let found = psnr(picture.rgb(), &golden);
        println!("{}: {found:.1} dB", dtype.as_str());
        assert!(found >= least_db, "{}: {found:.1} dB", dtype.as_str());
        assert_eq!(device.ops_on_host(), on_host, "{}", dtype.as_str());
        assert_eq!(device.replays() - replays, case.request().steps as u64 - 1);
        let again = pipeline.paint(&case.request(), &Silent).unwrap();
        assert!(again.rgb() == picture.rgb(), "{}: other bits", dtype.as_str());
    }
}

/// The same picture from a worker on this GPU, in replays too.
fn check_worker(device: &cuda::Device) {
    let case = cases_of("tiny").remove("base").unwrap();
    let here = load("tiny", DType::F16, device).paint(&case.request(), &Silent).unwrap();
    let worker = Worker::<cuda::Storage>::on(device.clone());
    let session = worker.connect_with("worker", LIMITS).unwrap();
    let pipeline = load_on::<remote::storage::Storage>("tiny", DType::F16, &session.device());
    let replays = device.replays();
    for round in 0..2 {
        let there = pipeline.paint(&case.request(), &Silent).unwrap();
        assert!(there.rgb() == here.rgb(), "round {round}: other bits");
    }
    // The first evaluation is recorded by the worker, the second by the GPU.
    assert_eq!(device.replays() - replays, 2 * case.request().steps as u64 - 2);
}

fn upload_host() -> cpu::Device {
    cpu::Device::with_threads(1).unwrap()
}

/// A convolution of `x`, (batch, channels, height, width), to `out` channels in a window of 3×3,
/// each image dense: as much of the batch as `images` says.
fn convolve<B: Backend>(
    [batch, channels, height, width]: [usize; 4],
    out: usize,
    images: std::ops::Range<usize>,
    dtype: DType,
    device: &B::Device,
) -> Result<Vec<f32>> {
    let values = |dims: &[usize]| {
        let values = (0..dims.iter().product()).map(|i: usize| ((i * 7919 + 13) % 2003) as f32);
        let values: Vec<f32> = values.map(|value| value / 2003.0 - 0.5).collect();
        Tensor::<B>::from_slice(&values, dims, device)?.to_dtype(dtype)
    };
    let x = values(&[batch, height, width, channels])?.permute(&[0, 3, 1, 2])?;
    let x = x.narrow(0, images.start, images.len())?;
    let weight = values(&[out, channels, 3, 3])?.prepare(Role::Conv2d { stride: 1 })?;
    let y = x.conv2d(&weight, Some(&values(&[out])?), Conv2d::same(3))?;
    y.to_dtype(DType::F32)?.to_vec::<f32>()
}

#[test]
fn sums_of_small_images_are_split_and_neither_batch_nor_tile_changes_a_bit() -> Result<()> {
    check_split_sums(&device())
}

/// Images whose sums are split are what they are in another batch, and what the CPU says.
fn check_split_sums(gpu: &cuda::Device) -> Result<()> {
    let host = cpu::Device::with_threads(2)?;
    for (x, out, parts) in
        [([3, 384, 5, 6], 72, 3), ([5, 256, 7, 7], 72, 2), ([3, 48, 5, 6], 72, 1)]
    {
        let all = convolve::<cuda::Storage>(x, out, 0..x[0], DType::F16, gpu)?;
        for image in 0..x[0] {
            let one = convolve::<cuda::Storage>(x, out, image..image + 1, DType::F16, gpu)?;
            let len = one.len();
            assert!(one == all[image * len..(image + 1) * len], "{x:?}: image {image}");
        }
        let launches = gpu.launches();
        let found = convolve::<cuda::Storage>(x, out, 0..x[0], DType::F32, gpu)?;
        // The weight and, when it is read, the result are laid anew; parts are joined.
        assert_eq!(gpu.launches() - launches, 3 + u64::from(parts > 1), "{x:?}");
        let expected = convolve::<cpu::Storage>(x, out, 0..x[0], DType::F32, &host)?;
        let error = expected.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        let most = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
        assert!(error < 3e-5 * most, "{x:?}: {error} of {most}");
    }
    Ok(())
}

#[test]
fn a_prepared_weight_is_read_as_what_it_is_and_nothing_else() -> Result<()> {
    let device = device();
    let buffer = |len: usize| device.storage_from_slice(&vec![1f32; len]);
    let x = buffer(8)?;
    let row = Layout::contiguous((1, 8));
    let prepare = |role, dims: &[usize]| {
        let weight = buffer(dims.iter().product())?;
        let layout = Layout::contiguous(dims);
        let view = View { storage: &weight, layout: &layout };
        cuda::Storage::fused(&Fused::Prepare(role), &[view])
    };
    let linear = Fused::Linear(Linear { activation: Activation::Identity, residual: false });
    // One number, seen as many: what is behind it would be read.
    let small = prepare(Role::Linear, &[1, 1])?;
    let spread = Layout::new((4000, 8).into(), vec![0, 0], 0);
    let whole = prepare(Role::Linear, &[2, 8])?;
    let part = Layout::contiguous_with_offset((1, 8), 8);
    let image = prepare(Role::Conv2d { stride: 1 }, &[2, 8, 1, 1])?;
    let flat = Layout::contiguous((2, 8));
    for (weight, layout) in [(&small, &spread), (&whole, &part), (&image, &flat)] {
        let views =
            [(&x, &row), (weight, layout)].map(|(storage, layout)| View { storage, layout });
        let error = cuda::Storage::fused(&linear, &views).unwrap_err().to_string();
        assert!(error.contains("prepared for"), "{error}");
    }
    let views = [(&x, &row), (&whole, &flat)].map(|(storage, layout)| View { storage, layout });
    let sums = cuda::Storage::fused(&linear, &views)?;
    assert_eq!(numbers(&sums.to_cpu_storage()?), [8.0, 8.0]);
    Ok(())
}
