//! The CUDA backend without a GPU: every op and whole pictures on kernels that the processor runs,
//! against the CPU and against diffusers. What only a GPU shows is in `scripts/gpu-check`.

mod emulated;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CpuStorage, DType, Layout};
use tiny_sd::backend::{Backend, View, cpu, cuda};
use tiny_sd::pipeline::{Additions, LoadOptions, Pipeline, Placement};
use tiny_sd::progress::Silent;
use tiny_sd::remote::op::Op;
use tiny_sd::remote::op::cases::{Case, cases};
use tiny_sd::remote::op::execute::{execute, execute_in_place};
use tiny_sd::tensor::Tensor;
use tiny_sd::weights::Model;
use tiny_sd::{Error, Result};

use super::golden::{
    cases as cases_of, check_close, fixtures, golden_picture, goldens, psnr, upload,
};
use emulated::Emulated;

fn device() -> cuda::Device {
    cuda::Device::new(Emulated::default()).unwrap()
}

/// The case on a device: its result, read.
fn run<B: Backend>(case: &Case, device: &B::Device) -> Result<CpuStorage> {
    let upload = |values| Ok::<_, Error>(device.storage_from_cpu_storage(values)?);
    let buffers: Vec<B> =
        case.operands.iter().map(|(values, _)| upload(values)).collect::<Result<_>>()?;
    let operands = buffers.iter().zip(&case.operands);
    let views: Vec<_> = operands.map(|(storage, (_, layout))| View { storage, layout }).collect();
    let result = match &case.op {
        op if op.is_in_place() => {
            let (values, layout) = &case.operands[0];
            let mut target = upload(values)?;
            execute_in_place(op, &mut target, layout, &views[1..])?;
            target
        }
        op => execute(op, device, &views)?,
    };
    Ok(result.to_cpu_storage()?)
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

#[test]
fn every_op_gives_what_the_cpu_gives_up_to_rounding() -> Result<()> {
    let (gpu, host) = (device(), cpu::Device::with_threads(2)?);
    let mut ran = 0;
    for case in cases() {
        let skip = matches!(
            case.op,
            Op::RandUniform { .. }
                | Op::RandNormal { .. }
                | Op::Received { .. }
                | Op::Weight { .. }
        );
        let what = format!("{:?} {} {:?}", case.op, case.dtype.as_str(), case.lie);
        if skip {
            continue;
        }
        match (run::<cpu::Storage>(&case, &host), run::<cuda::Storage>(&case, &gpu)) {
            (Ok(here), Ok(there)) => {
                ran += 1;
                assert_eq!(here.dtype(), there.dtype(), "{what}");
                let dtype = here.dtype();
                let (here, there) = (numbers(&here), numbers(&there));
                assert_eq!(here.len(), there.len(), "{what}");
                let finite = here.iter().filter(|x| x.is_finite());
                let most = tolerance(dtype) * finite.fold(1f64, |most, x| most.max(x.abs()));
                for (a, b) in here.iter().zip(&there) {
                    let same = a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= most;
                    assert!(same, "{what}: {a} here, {b} there");
                }
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

fn load(model: &str, dtype: DType, device: &cuda::Device) -> Pipeline<cuda::Storage> {
    let folder = Model::open(fixtures().join("models").join(model), None).unwrap();
    let additions = Additions::default();
    let options = LoadOptions { dtype, variant: None, scheduler: None, encodes: false, additions };
    Pipeline::load(&folder, &options, Placement::whole(device), &Silent).unwrap()
}

#[test]
fn a_unet_evaluation_is_that_of_diffusers_in_few_launches_and_none_of_it_on_the_host() {
    let device = device();
    // "tiny" has segmind/tiny-sd's blocks; its images are small, and norms of large ones take two
    // launches more.
    for (model, tolerance, most) in [("tiny", 1e-5, 300), ("sd2", 5e-5, 600)] {
        let pipeline = load(model, DType::F32, &device);
        let goldens = goldens(model, "stages.safetensors");
        let up = |name: &str| {
            let (host, golden) = (upload_host(), &goldens[name]);
            let values = upload(golden, &host).to_vec::<f32>().unwrap();
            Tensor::<cuda::Storage>::from_slice(&values, golden.dims(), &device).unwrap()
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

#[test]
fn pictures_are_those_of_diffusers_and_leave_no_memory_behind() {
    let gpu = Emulated::default();
    let device = cuda::Device::new(gpu.clone()).unwrap();
    let (name, case) = cases_of("tiny").into_iter().find(|case| case.0 == "base").unwrap();
    let golden = golden_picture("tiny", &name);
    for (dtype, least_db) in [(DType::F32, 50.0), (DType::F16, 30.0), (DType::BF16, 20.0)] {
        let pipeline = load("tiny", dtype, &device);
        let on_host = device.ops_on_host();
        let picture = pipeline.paint(&case.request(), &Silent).unwrap();
        let found = psnr(picture.rgb(), &golden);
        println!("{}: {found:.1} dB, {}", dtype.as_str(), device.ops_on_host() - on_host);
        assert!(found >= least_db, "{}: {found:.1} dB", dtype.as_str());
        assert_eq!(device.ops_on_host(), on_host, "{}", dtype.as_str());
        drop(pipeline);
        assert_eq!(gpu.held_bytes(), 0, "{}", dtype.as_str());
    }
}

fn upload_host() -> cpu::Device {
    cpu::Device::with_threads(1).unwrap()
}
