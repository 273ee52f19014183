//! From one device to another. Separate because it is the only place where two backends meet: an
//! op has operands of one, by type, and of one device, by check.

use std::any::Any;
use std::sync::Arc;

use candle_core::backend::BackendDevice;
use candle_core::{Layout, Shape};

use super::Tensor;
use crate::backend::Backend;
use crate::backend::order::{dense_in_order, memory_order};
use crate::error::Result;

/// Bytes that are on the host at a time: a tensor of any size passes through.
const PIECE_BYTES: usize = 16 << 20;

impl<A: Backend> Tensor<A> {
    /// The same elements, in the same memory order, on another device; on this one, this very
    /// tensor. Between two workers they pass through the client, piece by piece.
    ///
    /// # Errors
    /// Whatever went wrong on the way to this tensor, or if the memory cannot be had there.
    pub fn to_device<B: Backend>(&self, device: &B::Device) -> Result<Tensor<B>> {
        match (self as &dyn Any).downcast_ref::<Tensor<B>>() {
            Some(same) if same.device().same_device(device) => Ok(same.clone()),
            Some(_) | None => self.transfer(device, PIECE_BYTES),
        }
    }

    fn transfer<B: Backend>(&self, device: &B::Device, piece_bytes: usize) -> Result<Tensor<B>> {
        let order = memory_order(&self.layout);
        let count = self.elem_count();
        let flat = self.permute(&order)?.reshape(count)?;
        let piece_len = (piece_bytes / self.dtype().size_in_bytes()).max(1);
        let read = |start: usize| -> Result<B> {
            // A copy, so that what is read is the piece and nothing around it.
            let piece = flat.narrow(0, start, piece_len.min(count - start))?.copy()?;
            Ok(device.storage_from_cpu_storage_owned(piece.storage.to_cpu_storage()?)?)
        };
        let storage = if count <= piece_len {
            read(0)?
        } else {
            let mut whole = device.zeros_impl(&Shape::from(count), self.dtype())?;
            for start in (0..count).step_by(piece_len) {
                let len = piece_len.min(count - start);
                read(start)?.copy_strided_src(&mut whole, start, &Layout::contiguous(len))?;
            }
            whole
        };
        Ok(Tensor { storage: Arc::new(storage), layout: dense_in_order(self.dims(), &order) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu;

    fn check(view: &Tensor<cpu::Storage>, device: &cpu::Device) {
        let expected = view.to_vec::<f32>().unwrap();
        for piece_bytes in [1, 12, 40, 1 << 20] {
            let there: Tensor<cpu::Storage> = view.transfer(device, piece_bytes).unwrap();
            assert_eq!(there.to_vec::<f32>().unwrap(), expected, "{view:?} by {piece_bytes}");
            assert_eq!(memory_order(there.layout()), memory_order(view.layout()), "{view:?}");
        }
    }

    #[test]
    fn any_view_arrives_whole_and_in_its_memory_order_however_it_is_cut() {
        let device = cpu::Device::with_threads(1).unwrap();
        let values: Vec<f32> = (0..120).map(|value| value as f32).collect();
        let tensor = Tensor::from_slice(&values, vec![2, 3, 4, 5], &device).unwrap();
        check(&tensor, &device);
        check(&tensor.narrow(2, 1, 2).unwrap(), &device);
        check(&tensor.permute(&[0, 3, 1, 2]).unwrap().narrow(0, 1, 1).unwrap(), &device);
        check(&tensor.narrow(0, 1, 1).unwrap().broadcast_as((3, 3, 4, 5)).unwrap(), &device);
        check(&Tensor::from_slice(&[] as &[f32], vec![2, 0], &device).unwrap(), &device);
        check(&Tensor::from_slice(&[4f32], (), &device).unwrap(), &device);
    }

    #[test]
    fn on_its_own_device_it_is_the_very_tensor() {
        let device = cpu::Device::with_threads(1).unwrap();
        let tensor = Tensor::<cpu::Storage>::from_slice(&[1f32, 2.0], 2, &device).unwrap();
        let same = tensor.to_device::<cpu::Storage>(&device).unwrap();
        assert!(Arc::ptr_eq(tensor.storage(), same.storage()));
    }
}
