//! The remote device over an in-process network, against the CPU: calls, sessions, programs.

mod bytes;
mod cases;
mod cost;
mod hostile;
mod picture;
pub mod programs;
mod session;

use tiny_sd::Result;
use tiny_sd::backend::{Backend, HostTensor, cpu};
use tiny_sd::remote::disk_library::{self, DiskLibrary};
use tiny_sd::remote::executor::Limits;
use tiny_sd::remote::loopback::Loopback;
use tiny_sd::remote::op::Digest;
use tiny_sd::remote::storage::Storage;
use tiny_sd::remote::worker;

use crate::views;

pub const LIMITS: Limits = Limits { memory_bytes: 64 << 20, buffers: 10_000 };

/// A worker, on the CPU if nothing else is said.
pub struct Worker<B: Backend = cpu::Storage> {
    pub device: B::Device,
    pub library: DiskLibrary,
}

impl Worker {
    pub fn new() -> Result<Self> {
        Ok(Self::on(cpu::Device::with_threads(1)?))
    }
}

impl<B: Backend> Worker<B> {
    pub fn on(device: B::Device) -> Self {
        let library = DiskLibrary::in_memory(disk_library::Limits::new(64 << 20));
        Self { device, library }
    }

    pub fn connect(&self, name: &str) -> Result<Loopback> {
        self.connect_with(name, LIMITS)
    }

    pub fn connect_with(&self, name: &str, limits: Limits) -> Result<Loopback> {
        let worker = worker::Worker::<B>::new(self.device.clone(), limits, 64 << 20);
        Loopback::connect(name, &worker, self.library.session())
    }

    /// Puts a weight there, as if a client had sent it.
    pub fn insert(&self, weight: &HostTensor) -> Result<Digest> {
        let digest = Digest(weight.digest());
        let (dtype, dims) = (weight.dtype(), weight.layout().dims());
        let mut sink = self.library.session().receive(digest, dtype, dims)?;
        let mut bytes = Vec::new();
        weight.row_major(&mut |part| bytes.extend_from_slice(part));
        sink.write(&bytes)?;
        sink.finish()?;
        Ok(digest)
    }
}

#[test]
fn chains_of_views_read_what_the_model_reads_on_a_worker() -> Result<()> {
    let session = Worker::new()?.connect("worker")?;
    views::chains_of_views_read_what_the_model_reads::<Storage>(&session.device())
}

#[test]
fn a_strided_view_keeps_its_offset_on_a_worker() -> Result<()> {
    let session = Worker::new()?.connect("worker")?;
    views::a_strided_view_keeps_its_offset::<Storage>(&session.device())
}
