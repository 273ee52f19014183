//! The right op is named, and nothing else, beside a device that is wrong on purpose.

mod command;
pub mod wrong;

use std::sync::Arc;

use candle_core::backend::BackendDevice;
use candle_core::{DType, Layout, WithDType};
use tiny_sd::Result;
use tiny_sd::backend::twin::{self, DIFFERS, Divergence};
use tiny_sd::backend::{
    Attention, Backend, Begun, Conv2d, Device as _, Fused, HostTensor, MetaRef, Noise, Role, View,
    cpu,
};
use wrong::Fault;

type Both = twin::Storage<cpu::Storage, wrong::Storage>;
type Pair = twin::Device<cpu::Storage, wrong::Storage>;

fn pair(op: &'static str, fault: Fault) -> Result<Pair> {
    let cpu = cpu::Device::with_threads(1)?;
    Ok(twin::Device::new(cpu.clone(), wrong::Device::new(&cpu, op, fault)))
}

/// What the right device gives.
fn right() -> Result<Vec<f32>> {
    work::<cpu::Storage>(&cpu::Device::with_threads(1)?)
}

fn values(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i * 37 % 101) as f32 / 8.0 - 5.0).collect()
}

fn fused<B: Backend>(op: &Fused, args: &[(&B, &Layout)]) -> Result<(B, Layout)> {
    let metas = args.iter().map(|&(storage, layout)| MetaRef { dtype: storage.dtype(), layout });
    let layout = op.infer(&metas.collect::<Vec<_>>())?.layout;
    let views = args.iter().map(|&(storage, layout)| View { storage, layout });
    Ok((B::fused(op, &views.collect::<Vec<_>>())?, layout))
}

/// A little of what a model does, with views that do not begin at element 0.
fn work<B: Backend>(device: &B::Device) -> Result<Vec<f32>> {
    let dense = |dims: &[usize]| Layout::contiguous(dims);
    let x = device.storage_from_slice(&values(2 * 3 * 4 * 4))?; // op 1
    let weight = device.storage_from_slice(&values(4 * 3 * 3 * 3))?; // op 2
    let prepare = Fused::Prepare(Role::Conv2d { stride: 1 });
    let (weight, weight_l) = fused::<B>(&prepare, &[(&weight, &dense(&[4, 3, 3, 3]))])?; // op 3
    let second = Layout::contiguous_with_offset((1, 3, 4, 4), 48);
    let conv = Fused::Conv2d(Conv2d::same(3));
    let (x, x_l) = fused(&conv, &[(&x, &second), (&weight, &weight_l)])?; // op 4
    let x = x.to_dtype(&x_l, DType::F32)?; // op 5
    let x = x.affine(&Layout::contiguous_with_offset((1, 4, 4), 16), 0.01, 1.0)?; // op 6
    let square = dense(&[1, 4, 4]);
    let attention = Fused::Attention(Attention { heads: 2, scale: 0.3, causal: false });
    let (x, _) = fused(&attention, &[(&x, &square); 3])?; // op 7
    let mut x = x.binary_impl::<candle_core::op::Add>(&x, &square, &square)?; // op 8
    let noise = device.randn(Noise { seed: 7, skip: 3 }, &(4, 4).into(), DType::F32)?; // op 9
    noise.copy_strided_src(&mut x, 8, &Layout::contiguous_with_offset((2, 4), 4))?; // op 10
    let sum = Fused::LinearCombination(vec![0.5, 2.0]);
    let (x, _) = fused(&sum, &[(&x, &square), (&noise, &square)])?; // op 11
    Ok(f32::cpu_storage_data(x.to_cpu_storage()?)?)
}

/// Operations of `work`, and those of them whose results are compared: all but `prepare`.
const OPS: u64 = 11;
const COMPARED: u64 = 10;

#[test]
fn devices_that_agree_run_to_the_end_and_give_the_result_of_one() -> Result<()> {
    let pair = pair("none", Fault::Fails)?;
    assert_eq!(work::<Both>(&pair)?, right()?);
    let found = pair.findings();
    assert_eq!((found.ops, found.compared, found.identical), (OPS, COMPARED, COMPARED));
    assert!(found.closest.is_none() && found.divergence.is_none());
    assert_eq!(pair.default_dtype(), DType::F32, "the first one's");
    // Noise without a seed is the first device's, and the second one's is another.
    pair.rand_uniform(&(4, 4).into(), DType::F32, 1.0, 2.0)?;
    pair.rand_normal(&(4, 4).into(), DType::F32, 1.0, 2.0)?;
    assert!(matches!(pair.begin_program("step", &[])?, Begun::Run));
    pair.wait(pair.mark()?)?;
    assert_eq!(pair.findings().marks, 1);
    Ok(())
}

#[test]
fn the_first_op_that_differs_is_named_with_its_operands() -> Result<()> {
    let check = |op, fault, number, name: &str, operand: &str| -> Result<()> {
        let pair = pair(op, fault)?;
        let error = work::<Both>(&pair).unwrap_err();
        assert_eq!(error.to_string(), DIFFERS, "{op} {fault:?}");
        let found = pair.findings();
        let Divergence { call, .. } = found.divergence.expect(op);
        assert_eq!((call.number, found.ops), (number, number), "{op} {fault:?}: {call}");
        assert_eq!(call.to_string(), name, "{op} {fault:?}");
        let operands = call.operands.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(operands.first().map_or("", String::as_str), operand, "{op} {fault:?}");
        assert_eq!(found.identical + 1, found.compared, "{op} {fault:?}: what was before it");
        Ok(())
    };
    let conv = "conv2d, Conv2d { stride: 1, padding: 1, upsample: None, residual: false }";
    let image = "f32 [1, 3, 4, 4] strides [48, 16, 4, 1] offset 48, from op 1 (constant)";
    check("conv2d", Fault::ForgetsOffset, 4, conv, image)?;
    check("conv2d", Fault::NotANumber, 4, conv, image)?;
    let rows = "f32 [1, 4, 4] strides [16, 4, 1] offset 16, from op 5 (cast)";
    check("affine", Fault::ForgetsOffset, 6, "affine, mul 0.01, add 1", rows)?;
    let attention = "attention, Attention { heads: 2, scale: 0.3, causal: false }";
    let square = "f32 [1, 4, 4] strides [16, 4, 1] offset 0, from op 6 (affine)";
    check("attention", Fault::SwapsStrides, 7, attention, square)?;
    let target = "f32, the whole buffer, from op 8 (add)";
    check("copy_strided", Fault::ForgetsOffset, 10, "copy_strided, to offset 8", target)?;
    check("constant", Fault::NotANumber, 1, "constant, f32", "")?;
    check("randn", Fault::Imprecise(1e-3), 9, "randn, seed 7, skip 3, F32 [4, 4]", "")?;
    let written = "f32 [1, 4, 4] strides [16, 4, 1] offset 0, from op 10 (copy_strided)";
    let sum = "linear_combination, [0.5, 2.0]";
    check("linear_combination", Fault::Imprecise(1e-3), 11, sum, written)?;
    let image = "f32 [1, 4, 4, 4] strides [64, 1, 16, 4] offset 0, from op 4 (conv2d)";
    check("to_dtype", Fault::TooLong, 5, "cast, to f32", image)
}

#[test]
fn what_differs_within_the_tolerance_is_told_and_does_not_add_up() -> Result<()> {
    for (op, number) in [("conv2d", 4), ("copy_strided", 10)] {
        let pair = pair(op, Fault::Imprecise(2e-6))?;
        assert_eq!(work::<Both>(&pair)?, right()?);
        let found = pair.findings();
        // All ops after it have equal operands, so that they give equal bits.
        assert_eq!((found.ops, found.compared, found.identical), (OPS, COMPARED, COMPARED - 1));
        let (call, gap) = found.closest.expect(op);
        assert_eq!(call.number, number);
        assert!(gap.difference > 0.0 && gap.difference <= gap.allowed, "{gap}");
    }
    Ok(())
}

#[test]
fn a_weight_that_arrives_otherwise_is_the_upload_s_fault() -> Result<()> {
    let pair = pair("upload", Fault::Imprecise(1e-3))?;
    let bytes: Vec<u8> = values(12).into_iter().flat_map(f32::to_le_bytes).collect();
    let layout = Layout::new((3, 2).into(), vec![1, 3], 2);
    let tensor = HostTensor::new(DType::F32, layout, Arc::new(bytes), 0)?;
    assert_eq!(pair.upload(&tensor, DType::F32).unwrap_err().to_string(), DIFFERS);
    let call = pair.findings().divergence.expect("the upload").call;
    assert_eq!(call.to_string(), "upload, f32 [3, 2] strides [1, 3] offset 2 as f32");
    Ok(())
}

#[test]
fn an_op_that_fails_is_an_error_that_names_the_device_and_no_difference() -> Result<()> {
    let pair = pair("conv2d", Fault::Fails)?;
    let error = work::<Both>(&pair).unwrap_err().to_string();
    assert_eq!(error, "op 4, conv2d, on wrong: it does not work");
    assert!(pair.findings().divergence.is_none());
    Ok(())
}
