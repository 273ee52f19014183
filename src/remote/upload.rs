//! The weights' way to a worker: what it has is only named, the rest is streamed from the mapped
//! files. Separate from the device because this waits, hashes and remembers.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use candle_core::DType;
use rayon::prelude::*;

use super::client::Session;
use super::digests::Digests;
use super::op::{Digest, Op};
use super::transport::BulkSource;
use super::wire::Wire;
use super::wire_form::WireForm;
use crate::backend::HostTensor;
use crate::backend::gather::Gather;
use crate::error::{Error, Kind, Result};

/// Told the bytes of weights that were sent, and how many there are to send; 0 of 0 while that is
/// not known.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> Result<()>;

/// How much is hashed before anybody is asked whether to go on.
const HASHED_BYTES: u64 = 256 << 20;
/// How often progress is told.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(50);
/// How long a worker may take none of the bytes that wait.
const STALL: Duration = Duration::from_secs(60);

/// What a session's worker was told of weights.
#[derive(Default)]
pub struct Uploads {
    digests: Option<Digests>,
    /// The worker has these, or they are on their way.
    known: Mutex<HashSet<Digest>>,
}

impl Uploads {
    /// Nothing yet; digests are remembered in `digests`.
    pub fn new(digests: Option<Digests>) -> Self {
        Self { digests, known: Mutex::default() }
    }

    /// Asks once which of the weights the worker has and sends the others, in order; returns when
    /// the last byte was handed to the network.
    ///
    /// # Errors
    /// If the session is over, or `progress` says so: what was sent until then stays there.
    pub fn announce(
        &self,
        session: &Session,
        weights: &[WireForm],
        progress: Progress<'_>,
    ) -> Result<()> {
        self.hash(weights, progress)?;
        let flow = self.send(session, weights)?;
        flow.wait(session, progress).inspect_err(|error| {
            // Should a remembered digest be to blame, the next run computes it anew.
            if let Some(digests) = self.digests.as_ref().filter(|_| error.kind() == Kind::Remote) {
                digests.forget(&stored(weights));
            }
        })
    }

    /// As [`announce`](Self::announce) for one weight, if that was not done, but does not wait
    /// until it is sent.
    ///
    /// # Errors
    /// If the session is over.
    pub fn digest(&self, session: &Session, weight: &WireForm) -> Result<Digest> {
        let digest = weight.digest()?;
        if !self.known().contains(&digest) {
            self.send(session, std::slice::from_ref(weight))?;
        }
        Ok(digest)
    }

    /// Computes the digests that no earlier run has computed.
    fn hash(&self, weights: &[WireForm], progress: Progress<'_>) -> Result<()> {
        let now = SystemTime::now();
        let tensors = stored(weights);
        if let Some(digests) = &self.digests {
            digests.recall(&tensors);
        }
        let unknown: Vec<_> =
            weights.iter().filter(|weight| weight.known_digest().is_none()).collect();
        let mut rest = unknown.as_slice();
        while !rest.is_empty() {
            progress(0, 0)?;
            let mut bytes = 0;
            let fits = rest.iter().position(|weight| {
                bytes += weight.stored().byte_len();
                bytes > HASHED_BYTES
            });
            let (part, others) = rest.split_at(fits.map_or(rest.len(), |fits| fits.max(1)));
            part.par_iter().try_for_each(|weight| weight.digest().map(drop))?;
            rest = others;
        }
        if let Some(digests) = self.digests.as_ref().filter(|_| !unknown.is_empty()) {
            digests.keep(&tensors, now);
        }
        Ok(())
    }

    /// Probes, and queues what is not there.
    fn send(&self, session: &Session, weights: &[WireForm]) -> Result<Arc<Flow>> {
        let mut seen = self.known().clone();
        let mut new = Vec::new();
        for weight in weights {
            let digest = weight.digest()?;
            if seen.insert(digest) {
                new.push((digest, weight));
            }
        }
        let flow = Arc::new(Flow::default());
        if new.is_empty() {
            return Ok(flow);
        }
        let digests: Vec<_> = new.iter().map(|(digest, _)| *digest).collect();
        let present = session.probe(&digests)?;
        let missing = new.iter().zip(&present).filter(|(_, is_there)| !**is_there);
        let missing: Vec<_> = missing.map(|(new, _)| *new).collect();
        // The total is whole before the first is taken.
        flow.state().total = missing.iter().map(|(_, weight)| weight.byte_len()).sum();
        for (digest, weight) in missing {
            session.send_bulk(source(digest, weight.clone(), &flow))?;
        }
        self.known().extend(digests);
        Ok(flow)
    }

    fn known(&self) -> MutexGuard<'_, HashSet<Digest>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The tensors, each with its dtype on the wire.
fn stored(weights: &[WireForm]) -> Vec<(&HostTensor, DType)> {
    weights.iter().map(|weight| (weight.stored(), weight.dtype())).collect()
}

/// Transfers that somebody waits for together.
#[derive(Default)]
struct Flow {
    state: Mutex<FlowState>,
    changed: Condvar,
    is_cancelled: AtomicBool,
}

#[derive(Default, Clone, Copy)]
struct FlowState {
    sent: u64,
    total: u64,
    /// Transfers that have not come to their end.
    open: usize,
}

impl Flow {
    fn wait(&self, session: &Session, progress: Progress<'_>) -> Result<()> {
        let (mut last, mut since) = (0, Instant::now());
        loop {
            let FlowState { sent, total, open } = *self.state();
            if total > 0 {
                progress(sent, total).inspect_err(|_| self.cancel())?;
            }
            if open == 0 {
                session.check()?;
                return match sent == total {
                    true => Ok(()),
                    false => Err(Error::remote(format!(
                        "{}: {sent} of {total} bytes of weights were sent",
                        session.name()
                    ))),
                };
            }
            session.check().inspect_err(|_| self.cancel())?;
            if sent != last {
                (last, since) = (sent, Instant::now());
            } else if since.elapsed() > STALL {
                self.cancel();
                return Err(Error::remote(format!(
                    "{} took no weights for {STALL:?}, after {sent} of {total} bytes",
                    session.name()
                )));
            }
            self.pause();
        }
    }

    /// Until all is sent, but no longer than progress can wait.
    fn pause(&self) {
        let waits = |state: &mut FlowState| state.open > 0;
        // Either way the caller looks again.
        let _ = self.changed.wait_timeout_while(self.state(), PROGRESS_INTERVAL, waits);
    }

    /// Transfers that have not begun send nothing.
    fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
    }

    fn state(&self) -> MutexGuard<'_, FlowState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One transfer of a flow, to its end or until it is dropped.
struct Part(Arc<Flow>);

impl Drop for Part {
    fn drop(&mut self) {
        self.0.state().open -= 1;
        self.0.changed.notify_all();
    }
}

/// A weight in row-major order. It is cast when the first byte is asked for and forgotten with the
/// transfer, so that few are in memory at a time.
fn source(digest: Digest, weight: WireForm, flow: &Arc<Flow>) -> BulkSource {
    let (dtype, dims) = (weight.dtype(), weight.stored().layout().dims().to_vec());
    let mut header = Vec::new();
    Op::Weight { digest, dtype, dims }.put(&mut header);
    flow.state().open += 1;
    let (part, len) = (Part(flow.clone()), weight.byte_len());
    let mut started = None::<RowMajor>;
    let read = move |buffer: &mut [u8]| {
        if part.0.is_cancelled.load(Ordering::Relaxed) {
            return Err(Error::interrupted());
        }
        let bytes = match &mut started {
            Some(bytes) => bytes,
            None => started.insert(RowMajor::new(weight.cast()?)),
        };
        let read = bytes.read(buffer);
        part.0.state().sent += read as u64;
        Ok(read)
    };
    BulkSource { header, len, read: Box::new(read) }
}

/// A tensor's bytes, read into buffers of any size.
struct RowMajor {
    tensor: HostTensor,
    gather: Gather,
    /// An element that did not fit into the last buffer, and what of it is left.
    carry: [u8; 8],
    carried: std::ops::Range<usize>,
}

impl RowMajor {
    fn new(tensor: HostTensor) -> Self {
        Self { gather: tensor.gather(), tensor, carry: [0; 8], carried: 0..0 }
    }

    fn read(&mut self, buffer: &mut [u8]) -> usize {
        if self.carried.is_empty() {
            match self.gather.read(self.tensor.bytes(), buffer) {
                0 => {
                    let size = self.tensor.dtype().size_in_bytes().min(self.carry.len());
                    let carry = self.carry.get_mut(..size).unwrap_or_default();
                    self.carried = 0..self.gather.read(self.tensor.bytes(), carry);
                }
                read => return read,
            }
        }
        let carried = self.carry.get(self.carried.clone()).unwrap_or_default();
        let count = carried.len().min(buffer.len());
        for (to, from) in buffer.iter_mut().zip(carried) {
            *to = *from;
        }
        self.carried.start += count;
        count
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Layout;

    use super::*;

    #[test]
    fn a_source_fills_buffers_of_any_size() {
        let stored: Vec<u8> = (0..96).collect();
        let layout = Layout::new((3, 4).into(), vec![1, 3], 0);
        let tensor = HostTensor::new(DType::F64, layout, Arc::new(stored), 0).unwrap();
        let mut expected = Vec::new();
        tensor.row_major(&mut |bytes| expected.extend_from_slice(bytes));
        for size in 1..40 {
            let weight = WireForm::new(&tensor, DType::F64);
            let mut source = source(weight.digest().unwrap(), weight, &Arc::default());
            let (mut found, mut buffer) = (Vec::new(), vec![0; size]);
            loop {
                match (source.read)(&mut buffer).unwrap() {
                    0 => break,
                    read => found.extend_from_slice(&buffer[..read]),
                }
            }
            assert_eq!(found, expected, "{size}");
            assert_eq!(source.len, 96);
        }
    }
}
