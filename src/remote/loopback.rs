//! A network within the process: joins a [`Session`] to a [`WorkerEnd`] by the very bytes that a
//! wire would carry. Separate because tests, benches and a worker inside the client's own process
//! all need a way without sockets.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::client::Session;
use super::device::Device;
use super::library::Library;
use super::transport::{BulkSource, ClientEnd, MAX_BULK_HEADER_BYTES, MAX_FRAME_BYTES, WorkerEnd};
use super::worker::Worker;
use crate::backend::Backend;
use crate::error::{Error, Result};

/// Bytes of a bulk transfer that are moved at once.
const PIECE_BYTES: usize = 64 << 10;

/// A session with a worker inside this process, and the threads that move its bytes. Dropping it
/// cuts the connection.
pub struct Loopback {
    device: Device,
    wires: Vec<(Arc<Signal>, JoinHandle<()>)>,
    worker: Arc<dyn WorkerEnd>,
}

impl Loopback {
    /// A session named `name` with `worker`, whose weights are those of `library`.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn connect<B: Backend>(
        name: &str,
        worker: &Worker<B>,
        library: Arc<dyn Library>,
    ) -> Result<Self> {
        let down = Arc::new(Signal::default());
        let waker = {
            let down = down.clone();
            Box::new(move || down.notify())
        };
        let worker = worker.session(library, waker)?;
        Self::join(Session::new(name), worker, down)
    }

    /// Joins the two ends; the worker's waker notifies `down`.
    fn join(session: Arc<Session>, worker: Arc<dyn WorkerEnd>, down: Arc<Signal>) -> Result<Self> {
        let (up, bulk) = (Arc::new(Signal::default()), Arc::new(Signal::default()));
        let mut this = Self {
            device: Device::new(session.clone()),
            wires: Vec::new(),
            worker: worker.clone(),
        };
        let (client, end) = (session.clone(), worker.clone());
        this.wire("up", &up, session.clone(), move || {
            std::iter::from_fn(|| client.next_frame()).try_for_each(|frame| {
                check_len(frame.len(), MAX_FRAME_BYTES)?;
                end.received(frame)
            })
        })?;
        let (client, end) = (session.clone(), worker.clone());
        this.wire("down", &down, session.clone(), move || {
            std::iter::from_fn(|| end.next_frame()).try_for_each(|frame| {
                check_len(frame.len(), MAX_FRAME_BYTES)?;
                client.received(&frame)
            })
        })?;
        let client = session.clone();
        this.wire("bulk", &bulk, session.clone(), move || {
            std::iter::from_fn(|| client.next_bulk()).try_for_each(|source| carry(source, &*worker))
        })?;
        session.set_waker(Box::new(move || {
            up.notify();
            bulk.notify();
        }));
        Ok(this)
    }

    fn wire(
        &mut self,
        name: &str,
        signal: &Arc<Signal>,
        session: Arc<Session>,
        mut carry: impl FnMut() -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let (heard, worker) = (signal.clone(), self.worker.clone());
        let run = move || {
            while heard.wait() {
                if let Err(error) = carry() {
                    // First: what the worker says from now on is no cause.
                    session.lost(error);
                    return worker.lost();
                }
            }
        };
        let thread = std::thread::Builder::new().name(format!("loopback {name}")).spawn(run);
        let thread = thread.map_err(|error| Error::other(format!("no thread: {error}")))?;
        self.wires.push((signal.clone(), thread));
        Ok(())
    }

    /// The session.
    pub fn session(&self) -> &Arc<Session> {
        self.device.session()
    }

    /// The worker as a device.
    pub fn device(&self) -> Device {
        self.device.clone()
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        let session = self.session();
        session.lost(Error::remote(format!("the session with {} is closed", session.name())));
        self.worker.lost();
        for (signal, _) in &self.wires {
            signal.close();
        }
        for (_, thread) in self.wires.drain(..) {
            // A wire that panicked has told nobody; the session is over either way.
            let _ = thread.join();
        }
    }
}

fn check_len(len: usize, max: usize) -> Result<()> {
    if len > max {
        return Err(Error::remote(format!("a frame of {len} bytes, more than {max}")));
    }
    Ok(())
}

fn carry(mut source: BulkSource, worker: &dyn WorkerEnd) -> Result<()> {
    check_len(source.header.len(), MAX_BULK_HEADER_BYTES)?;
    let mut sink = worker.bulk(&source.header)?;
    let mut buffer = vec![0; PIECE_BYTES];
    loop {
        match (source.read)(&mut buffer)? {
            0 => return sink.finish(),
            len => sink.write(buffer.get(..len).unwrap_or_default())?,
        }
    }
}

/// Something to do, for a thread that waits for it.
#[derive(Default)]
struct Signal {
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Signal {
    fn notify(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0 = true;
        self.changed.notify_one();
    }

    fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.changed.notify_one();
    }

    /// Whether there is something to do; `false` at the end.
    fn wait(&self) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self
            .changed
            .wait_while(state, |(is_notified, is_closed)| !*is_notified && !*is_closed)
            .unwrap_or_else(PoisonError::into_inner);
        state.0 = false;
        !state.1
    }
}
