//! The CUDA backend on a real GPU, or on the driver that stands in for one (`stand_in.rs`).
//! Separate because these tests are skipped, by name, where there is none: `scripts/gpu-check` runs
//! them.

use candle_core::DType;
use tiny_sd::Result;
use tiny_sd::backend::cuda::kernel_cache::KernelCache;
use tiny_sd::backend::cuda::nvidia::Nvidia;
use tiny_sd::backend::{Backend, cpu, cuda};
use tiny_sd::image::Picture;
use tiny_sd::pipeline::{Additions, LoadOptions, PictureRequest, Pipeline, Placement};
use tiny_sd::progress::Silent;
use tiny_sd::tensor::Tensor;
use tiny_sd::weights::Model;

use super::{check_ops, check_pictures, check_split_sums, check_unets, check_worker};
use crate::golden::{Case, cases as cases_of, psnr};
use crate::views;

fn device() -> cuda::Device {
    cuda::Device::open(0).unwrap()
}

#[test]
#[ignore = "needs an NVIDIA GPU: scripts/gpu-check"]
fn every_op_gives_what_the_cpu_gives_up_to_rounding() -> Result<()> {
    check_ops(&device())
}

#[test]
#[ignore = "needs an NVIDIA GPU: scripts/gpu-check"]
fn sums_of_small_images_are_split_and_the_batch_changes_no_bit() -> Result<()> {
    check_split_sums(&device())
}

#[test]
#[ignore = "needs an NVIDIA GPU: scripts/gpu-check"]
fn unet_evaluations_are_those_of_diffusers_in_few_launches() {
    check_unets(&device());
}

#[test]
#[ignore = "needs an NVIDIA GPU: scripts/gpu-check"]
fn pictures_are_those_of_diffusers_the_same_bits_each_time() {
    check_pictures(&device());
}

#[test]
#[ignore = "needs an NVIDIA GPU: scripts/gpu-check"]
fn a_worker_makes_the_very_picture_in_replays() {
    check_worker(&device());
}

#[test]
#[ignore = "needs an NVIDIA GPU: scripts/gpu-check"]
fn chains_of_views_read_what_the_model_reads() -> Result<()> {
    views::chains_of_views_read_what_the_model_reads::<cuda::Storage>(&device())?;
    views::a_strided_view_keeps_its_offset::<cuda::Storage>(&device())
}

#[test]
#[ignore = "needs an NVIDIA GPU: scripts/gpu-check"]
fn the_built_in_model_makes_the_picture_of_the_cpu() {
    let case = cases_of("tiny").remove("base").unwrap();
    let gpu = device();
    let here = built_in::<cpu::Storage>(DType::F32, &cpu::Device::with_threads(0).unwrap(), &case);
    for (dtype, least_db) in [(DType::F32, 50.0), (DType::F16, 30.0)] {
        let there = built_in::<cuda::Storage>(dtype, &gpu, &case);
        let found = psnr(there.rgb(), here.rgb());
        println!("{}: {found:.1} dB", dtype.as_str());
        assert!(found >= least_db, "{}: {found:.1} dB", dtype.as_str());
    }
}

/// A portrait by the model in the program.
fn built_in<B: Backend>(dtype: DType, device: &B::Device, case: &Case) -> Picture {
    let additions = Additions::default();
    let options = LoadOptions { dtype, variant: None, scheduler: None, encodes: false, additions };
    let devices = Placement::<B>::whole(device);
    let pipeline = Pipeline::load(&Model::built_in(), &options, devices, &Silent).unwrap();
    let prompt = "Portrait of a pretty girl with red hair";
    let request = PictureRequest {
        prompt,
        negative_prompt: "",
        size: pipeline.default_size(),
        steps: 4,
        guidance_scale: 3.0,
        ..case.request()
    };
    pipeline.paint(&request, &Silent).unwrap()
}

#[test]
#[ignore = "needs an NVIDIA GPU: scripts/gpu-check"]
fn too_much_memory_is_an_error_that_says_how_much_and_what_to_try() -> Result<()> {
    let device = device();
    let error = Tensor::<cuda::Storage>::zeros(1 << 42, DType::U8, &device).unwrap_err();
    assert!(error.is_out_of_memory(), "{error}");
    let text = error.to_string();
    for part in ["4398046511104 bytes", "are free", "--vae-tiling"] {
        assert!(text.contains(part), "{text}");
    }
    let x = Tensor::<cuda::Storage>::from_slice(&[1f32, 2.0], 2, &device)?;
    assert_eq!(x.add(&x)?.to_vec::<f32>()?, [2.0, 4.0], "it goes on");
    Ok(())
}

#[test]
#[ignore = "needs an NVIDIA GPU: scripts/gpu-check"]
fn compiled_kernels_are_kept_and_found_again() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let sum = || -> Result<Vec<f32>> {
        let gpu = Nvidia::open(0, KernelCache::at(folder.path()))?;
        let device = cuda::Device::new(gpu)?;
        let x = Tensor::<cuda::Storage>::from_slice(&[1f32, 2.0], 2, &device)?;
        x.add(&x)?.to_vec()
    };
    let written = || -> Vec<_> {
        let files = std::fs::read_dir(folder.path()).unwrap();
        files.map(|file| file.unwrap().metadata().unwrap().modified().unwrap()).collect()
    };
    assert_eq!(sum()?, [2.0, 4.0]);
    let first = written();
    assert_eq!(first.len(), 1, "one source was needed");
    assert_eq!(sum()?, [2.0, 4.0]);
    assert_eq!(written(), first);
    Ok(())
}
