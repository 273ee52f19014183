//! Ops that have no kernel yet, or that no model of ours uses: the operands come here, the CPU
//! computes, the result goes back. Separate because it is the slow way, and everything here may be
//! given a kernel without anybody noticing but by time.

use candle_core::Result;
use candle_core::backend::{BackendDevice, BackendStorage};

use super::Storage;
use crate::backend::{Backend, Fused, View, cpu};
use crate::error::Error;

impl Storage {
    /// The elements as a buffer of the CPU.
    pub(super) fn host(&self) -> Result<cpu::Storage> {
        self.device().host().storage_from_cpu_storage_owned(self.to_cpu_storage()?)
    }

    /// Computes a result from this buffer's elements.
    pub(super) fn on_host(
        &self,
        op: impl FnOnce(&cpu::Storage) -> Result<cpu::Storage>,
    ) -> Result<Self> {
        let device = self.device();
        device.count_on_host();
        let result = op(&self.host()?)?;
        Ok(Self::of_host(device, &result.to_cpu_storage()?)?)
    }

    /// What a kernel gave, or, if there is none, the same from the host.
    pub(super) fn or_on_host(
        &self,
        kernel: Option<crate::Result<Self>>,
        op: impl FnOnce(&cpu::Storage) -> Result<cpu::Storage>,
    ) -> Result<Self> {
        match kernel {
            Some(result) => Ok(result?),
            None => self.on_host(op),
        }
    }

    /// Changes this buffer's elements in place.
    pub(super) fn change_on_host(
        &mut self,
        op: impl FnOnce(&mut cpu::Storage) -> Result<()>,
    ) -> Result<()> {
        let device = self.device().clone();
        device.count_on_host();
        let mut elements = self.host()?;
        op(&mut elements)?;
        *self = Self::of_host(&device, &elements.to_cpu_storage()?)?;
        Ok(())
    }

    /// Computes an op of ours from these elements.
    pub(super) fn fused_on_host(op: &Fused, args: &[View<'_, Self>]) -> crate::Result<Self> {
        let Some(first) = args.first() else {
            return Err(Error::other(format!("{} of nothing", op.name())));
        };
        let device = first.storage.device();
        device.count_on_host();
        let host = args.iter().map(|arg| arg.storage.host()).collect::<Result<Vec<_>>>()?;
        let views: Vec<_> = host
            .iter()
            .zip(args)
            .map(|(storage, arg)| View { storage, layout: arg.layout })
            .collect();
        let result = cpu::Storage::fused(op, &views)?;
        Self::of_host(device, &result.to_cpu_storage()?)
    }
}
