//! A case of the op table on a device. Separate because each backend is held against another by it.

use std::sync::Arc;

use candle_core::backend::BackendDevice;
use candle_core::{CpuStorage, DType, Layout};
use tiny_sd::Result;
use tiny_sd::backend::elements::from_bytes;
use tiny_sd::backend::{Backend, Device, HostTensor, View};
use tiny_sd::remote::op::Op;
use tiny_sd::remote::op::cases::Case;
use tiny_sd::remote::op::execute::{execute, execute_in_place};

/// The case on a device: its result, read.
pub fn run<B: Backend>(case: &Case, weight: &HostTensor, device: &B::Device) -> Result<CpuStorage> {
    let buffers: Vec<B> = case
        .operands
        .iter()
        .map(|(values, _)| device.storage_from_cpu_storage(values))
        .collect::<candle_core::Result<_>>()?;
    let operands = buffers.iter().zip(&case.operands);
    let views: Vec<_> = operands.map(|(storage, (_, layout))| View { storage, layout }).collect();
    let result = match &case.op {
        op if op.is_in_place() => {
            let (values, layout) = &case.operands[0];
            let mut target = device.storage_from_cpu_storage(values)?;
            execute_in_place(op, &mut target, layout, &views[1..])?;
            target
        }
        // Large enough for a stream of its own.
        Op::Received { dtype, len, .. } => {
            let bytes: Vec<u8> = (0..len * dtype.size_in_bytes()).map(|i| i as u8).collect();
            assert!(bytes.len() > tiny_sd::remote::wire::MAX_INLINE_BYTES);
            device.storage_from_cpu_storage_owned(from_bytes(*dtype, &bytes)?)?
        }
        Op::Weight { dtype, .. } => device.upload(weight, *dtype)?,
        op => execute(op, device, &views)?,
    };
    Ok(result.to_cpu_storage()?)
}

/// The weight that cases upload.
pub fn weight() -> Result<HostTensor> {
    let bytes: Vec<u8> = (0..24).flat_map(|i| (i as f32 / 7.0).to_le_bytes()).collect();
    HostTensor::new(DType::F32, Layout::contiguous(vec![2, 3, 4]), Arc::new(bytes), 0)
}
