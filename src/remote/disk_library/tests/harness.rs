//! A worker and its clients in one process, joined by threads in place of a network. Separate so
//! that the tests say only what happens.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use crate::backend::cpu::{Device as Cpu, Storage as CpuBuffer};
use crate::error::{Error, Result};
use crate::remote::client;
use crate::remote::device::Device;
use crate::remote::disk_library::{DiskLibrary, Limits};
use crate::remote::executor::{Arrivals, Executor, Limits as SessionLimits, Shared};
use crate::remote::library::Library;
use crate::remote::message::{Numbering, Reply, decode_frame};
use crate::remote::op::Op;
use crate::remote::transport::{BulkSource, ClientEnd};
use crate::remote::wire::{Reader, Wire};

/// A worker without a network.
pub struct Worker {
    pub library: DiskLibrary,
    pub shared: Arc<Shared<CpuBuffer>>,
}

impl Worker {
    pub fn new(library: DiskLibrary) -> Self {
        Self { library, shared: Arc::new(Shared::new(Cpu::with_threads(1).unwrap(), 1 << 30)) }
    }

    pub fn open(folder: &Path) -> Self {
        Self::new(DiskLibrary::open(folder, Limits::new(1 << 30)).unwrap())
    }
}

struct NoArrivals;

impl Arrivals for NoArrivals {
    fn take(&self, _: u64) -> Result<Vec<u8>> {
        Err(Error::other("nothing arrives"))
    }
}

/// A client's connection: one thread takes frames, one takes bulk bytes.
pub struct Connection {
    pub device: Device,
    /// Bytes of weights that came over.
    sent: Arc<AtomicU64>,
    stop: Vec<Sender<bool>>,
    threads: Vec<JoinHandle<()>>,
}

impl Connection {
    /// The connection breaks once `cut` bytes of weights came over.
    pub fn new(worker: &Worker, cut: u64) -> Self {
        let session = client::Session::new("test");
        let (frames, some_frames) = channel();
        let (bulk, some_bulk) = channel();
        let stop = vec![frames.clone(), bulk.clone()];
        session.set_waker(Box::new(move || {
            // A connection that is closed takes nothing.
            let _ = (frames.send(true), bulk.send(true));
        }));
        let library = worker.library.session();
        let limits = SessionLimits { memory_bytes: 1 << 30, buffers: 1000 };
        let mut executor = Executor::<CpuBuffer>::new(
            worker.shared.clone(),
            library.clone(),
            Arc::new(NoArrivals),
            limits,
        );
        let (sent, end) = (Arc::new(AtomicU64::new(0)), session.clone());
        let run_frames = move || {
            let mut numbering = Numbering::default();
            while some_frames.recv() == Ok(true) {
                while let Some(frame) = end.next_frame() {
                    for (id, message) in decode_frame(&frame, &mut numbering).unwrap() {
                        let mut reply = |reply: Reply| {
                            let mut bytes = Vec::new();
                            reply.put(&mut bytes);
                            end.received(&bytes)
                        };
                        executor.run(id, message, &mut reply).unwrap();
                    }
                }
            }
        };
        let (count, end) = (sent.clone(), session.clone());
        let run_bulk = move || {
            while some_bulk.recv() == Ok(true) {
                while let Some(source) = end.next_bulk() {
                    if let Err(error) = carry(source, &*library, &count, cut) {
                        end.lost(error);
                        library.end();
                        return;
                    }
                }
            }
        };
        let threads = vec![std::thread::spawn(run_frames), std::thread::spawn(run_bulk)];
        Self { device: Device::new(session), sent, stop, threads }
    }

    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::SeqCst)
    }
}

/// Carries one weight over, in small pieces.
fn carry(mut source: BulkSource, library: &dyn Library, sent: &AtomicU64, cut: u64) -> Result<()> {
    let Op::Weight { digest, dtype, dims } = Op::get(&mut Reader::new(&source.header))? else {
        return Err(Error::other("not a weight"));
    };
    let mut sink = library.receive(digest, dtype, &dims)?;
    let mut piece = [0; 100];
    loop {
        let read = (source.read)(&mut piece)?;
        if read == 0 {
            return sink.finish();
        }
        sink.write(&piece[..read])?;
        if sent.fetch_add(read as u64, Ordering::SeqCst) + read as u64 > cut {
            return Err(Error::remote("the cable was cut"));
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        for stop in self.stop.drain(..) {
            // The thread of a broken connection is gone.
            let _ = stop.send(false);
        }
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}
