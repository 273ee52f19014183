//! A worker: the device and the weights that its sessions share, and each session's end of the
//! network. Separate from the executor, which knows no threads: here frames are queued, one thread
//! for each session runs them, and whoever waits is told when the client is gone.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use candle_core::DType;

use super::executor::{Arrivals, Executor, Limits, Shared};
use super::library::Library;
use super::message::{Message, Numbering, Outbox, Reply, decode_frame};
use super::op::{Id, Op};
use super::transport::{BulkSink, Waker, WorkerEnd};
use super::wire::{Reader, Wire, malformed};
use crate::backend::{Backend, Device as _};
use crate::error::{Error, Result};

/// Frames that wait to be run before the network stops reading.
const MAX_QUEUED_FRAMES: usize = 64;
/// Messages in them and operands of these: each may be of a few bytes, but takes more than a
/// hundred once it is decoded.
const MAX_QUEUED_MESSAGES: usize = 64 << 10;
/// Bytes of replies that wait to be sent before ops wait too.
const MAX_REPLY_BYTES: usize = 8 << 20;
/// Host tensors that are on their way or not yet taken.
const MAX_TRANSFERS: usize = 1024;
/// How long an op waits for bytes that were announced to come.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(120);

/// What all sessions of a worker share.
pub struct Worker<B: Backend> {
    shared: Arc<Shared<B>>,
    limits: Limits,
}

impl<B: Backend> Worker<B> {
    /// A worker on `device`; each session may use `limits`, and the buffers made of weights
    /// `weights_bytes` together.
    pub fn new(device: B::Device, limits: Limits, weights_bytes: u64) -> Self {
        Self { shared: Arc::new(Shared::new(device, weights_bytes)), limits }
    }

    /// Whether its device has failed for good: no session can be served.
    pub fn is_lost(&self) -> bool {
        self.shared.device().is_lost()
    }

    /// Begins a session that finds its weights in `library`; `waker` is called when it has
    /// something to say.
    ///
    /// # Errors
    /// If its thread cannot be started.
    pub fn session(&self, library: Arc<dyn Library>, waker: Waker) -> Result<Arc<dyn WorkerEnd>> {
        let transfers = Arc::new(Transfers::new(self.limits.memory_bytes));
        let executor = Executor::<B>::new(
            self.shared.clone(),
            library.clone(),
            transfers.clone(),
            self.limits,
        );
        let session = Arc::new(Session {
            numbering: Mutex::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
            waker,
            library,
            transfers,
            is_over: executor.is_over(),
        });
        let running = session.clone();
        let device = self.shared.device().clone();
        let span = tracing::Span::current();
        std::thread::Builder::new()
            .name("session".into())
            .spawn(move || {
                if catch_unwind(AssertUnwindSafe(|| running.run(executor))).is_err() {
                    // The client is told, if it is still there.
                    let _ = running.reply(&Reply::Fatal("internal error: it panicked".into()));
                    running.end();
                }
                let did = device.statistics().unwrap_or_default();
                span.in_scope(|| tracing::info!(did, "the session's memory is free"));
            })
            .map_err(|error| Error::other(format!("no thread for the session: {error}")))?;
        Ok(session)
    }
}

/// One session's end of the network.
struct Session {
    /// Apart from the state, so that ops run while the next frame is decoded.
    numbering: Mutex<Numbering>,
    state: Mutex<State>,
    /// Something was queued, run, sent, or the client is gone.
    changed: Condvar,
    waker: Waker,
    library: Arc<dyn Library>,
    transfers: Arc<Transfers>,
    /// As in the state, to be looked at between two ops, by the executor as well.
    is_over: Arc<AtomicBool>,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Vec<(Id, Message)>>,
    /// Messages in the queue, and their operands.
    messages: usize,
    replies: Outbox,
    is_running: bool,
    is_over: bool,
}

impl State {
    fn is_full(&self) -> bool {
        self.queue.len() >= MAX_QUEUED_FRAMES || self.messages >= MAX_QUEUED_MESSAGES
    }

    fn push(&mut self, frame: Vec<(Id, Message)>) {
        self.messages += weight(&frame);
        self.queue.push_back(frame);
    }

    fn pop(&mut self) -> Option<Vec<(Id, Message)>> {
        let frame = self.queue.pop_front()?;
        self.messages -= weight(&frame);
        Some(frame)
    }

    fn end(&mut self) {
        self.is_over = true;
        self.queue.clear();
        self.messages = 0;
    }
}

fn weight(frame: &[(Id, Message)]) -> usize {
    frame.iter().map(|(_, message)| message.weight()).sum()
}

impl Session {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs what comes until the client is gone. Dropping the executor frees its memory.
    fn run<B: Backend>(&self, mut executor: Executor<B>) {
        while let Some(messages) = self.next(&mut executor) {
            for (id, message) in messages {
                // Without a lock, which would cost as much as an op.
                if self.is_over.load(Ordering::Relaxed) {
                    break;
                }
                let ran = executor.run(id, message, &mut |reply| self.reply(&reply));
                if let Err(error) = ran {
                    // The client is told why, if it is still there; then nothing more is run.
                    let _ = self.reply(&Reply::Fatal(error.to_string()));
                    self.end();
                }
            }
        }
    }

    /// The next frame's messages; `None` when the session is over.
    fn next<B: Backend>(&self, executor: &mut Executor<B>) -> Option<Vec<(Id, Message)>> {
        let mut state = self.lock();
        let started = Instant::now();
        state.is_running = false;
        while !state.is_over {
            if let Some(messages) = state.pop() {
                state.is_running = true;
                executor.idled(started.elapsed());
                self.changed.notify_all();
                return Some(messages);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    fn reply(&self, reply: &Reply) -> Result<()> {
        let mut state = self.lock();
        while !state.is_over && state.replies.bytes() > MAX_REPLY_BYTES {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.replies.push(|out| reply.put(out));
        drop(state);
        (self.waker)();
        Ok(())
    }

    fn end(&self) {
        let mut state = self.lock();
        state.end();
        self.is_over.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }
}

impl WorkerEnd for Session {
    fn received(&self, frame: Vec<u8>) -> Result<()> {
        // Held until the messages are queued: frames keep their order.
        let mut numbering = self.numbering.lock().unwrap_or_else(PoisonError::into_inner);
        let messages = decode_frame(&frame, &mut numbering)?;
        let mut state = self.lock();
        while !state.is_over && state.is_full() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if !state.is_over {
            state.push(messages);
            self.changed.notify_all();
        }
        Ok(())
    }

    fn bulk(&self, header: &[u8]) -> Result<Box<dyn BulkSink>> {
        let mut input = Reader::new(header);
        let op = Op::get(&mut input)?;
        if !input.is_empty() {
            return Err(malformed("has something behind a bulk header"));
        }
        match op {
            Op::Received { transfer, dtype, len } => {
                Transfers::begin(&self.transfers, transfer, dtype, len)
            }
            Op::Weight { digest, dtype, dims } => self.library.receive(digest, dtype, &dims),
            other => Err(malformed(&format!("sends {} in bulk", other.name()))),
        }
    }

    fn next_frame(&self) -> Option<Vec<u8>> {
        let frame = self.lock().replies.take();
        self.changed.notify_all();
        frame
    }

    fn is_busy(&self) -> bool {
        let state = self.lock();
        state.is_running || !state.queue.is_empty()
    }

    fn lost(&self) {
        self.end();
        self.library.end();
        self.transfers.end();
    }
}

/// Large host tensors on their way into one session.
struct Transfers {
    state: Mutex<Arriving>,
    changed: Condvar,
    max_bytes: u64,
}

#[derive(Default)]
struct Arriving {
    whole: HashMap<u64, Vec<u8>>,
    /// Bytes of those that are whole and of those that are coming.
    bytes: u64,
    failure: Option<Error>,
}

impl Transfers {
    fn new(max_bytes: u64) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), max_bytes }
    }

    fn lock(&self) -> MutexGuard<'_, Arriving> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(
        this: &Arc<Self>,
        transfer: u64,
        dtype: DType,
        len: usize,
    ) -> Result<Box<dyn BulkSink>> {
        let bytes = len.checked_mul(dtype.size_in_bytes()).map(|bytes| bytes as u64);
        let mut state = this.lock();
        let total = bytes.and_then(|bytes| state.bytes.checked_add(bytes));
        match (bytes, total) {
            (Some(bytes), Some(total))
                if total <= this.max_bytes && state.whole.len() < MAX_TRANSFERS =>
            {
                state.bytes = total;
                let (transfers, received) = (this.clone(), Vec::new());
                Ok(Box::new(Incoming { transfers, transfer, bytes, received, is_whole: false }))
            }
            _ => Err(Error::out_of_memory(format_args!(
                "{len} elements are more than the session's {} bytes \
                 (worker --session-memory)",
                this.max_bytes
            ))),
        }
    }

    fn fail(&self, error: Error) {
        self.lock().failure.get_or_insert(error);
        self.changed.notify_all();
    }

    fn end(&self) {
        self.fail(Error::remote("the client is gone"));
    }
}

impl Arrivals for Transfers {
    fn take(&self, transfer: u64) -> Result<Vec<u8>> {
        let waits =
            |state: &mut Arriving| state.failure.is_none() && !state.whole.contains_key(&transfer);
        let (mut state, _) = self
            .changed
            .wait_timeout_while(self.lock(), ARRIVAL_TIMEOUT, waits)
            .unwrap_or_else(PoisonError::into_inner);
        match (state.whole.remove(&transfer), &state.failure) {
            (Some(bytes), _) => {
                state.bytes -= bytes.len() as u64;
                Ok(bytes)
            }
            (None, Some(failure)) => Err(failure.clone()),
            (None, None) => Err(Error::other(format!(
                "transfer {transfer} did not come within {} s",
                ARRIVAL_TIMEOUT.as_secs()
            ))),
        }
    }
}

/// One transfer that is coming. Memory grows as bytes arrive, not as they are announced.
struct Incoming {
    transfers: Arc<Transfers>,
    transfer: u64,
    bytes: u64,
    received: Vec<u8>,
    is_whole: bool,
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.is_whole {
            self.transfers.fail(Error::remote("a transfer broke off"));
        }
    }
}

impl BulkSink for Incoming {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if (self.received.len() + bytes.len()) as u64 > self.bytes {
            return Err(malformed("sends more bytes than it announced"));
        }
        self.received.extend_from_slice(bytes);
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        if self.received.len() as u64 != self.bytes {
            return Err(malformed("sends fewer bytes than it announced"));
        }
        self.is_whole = true;
        let mut state = self.transfers.lock();
        // What was there under the same number is not counted any more.
        if let Some(old) = state.whole.insert(self.transfer, std::mem::take(&mut self.received)) {
            state.bytes -= old.len() as u64;
        }
        self.transfers.changed.notify_all();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;
    use crate::backend::{HostTensor, cpu};
    use crate::remote::op::{Call, Digest, Operand, Unary};

    const LIMITS: Limits = Limits { memory_bytes: 1 << 20, buffers: 100 };

    fn worker() -> Worker<cpu::Storage> {
        Worker::new(cpu::Device::with_threads(1).unwrap(), LIMITS, 1 << 20)
    }

    /// A library that says when it is asked, and answers when it is told to.
    struct Slow {
        asked: Sender<()>,
        told: Mutex<Receiver<()>>,
    }

    impl Library for Slow {
        fn has(&self, digests: &[Digest]) -> Vec<bool> {
            self.asked.send(()).unwrap();
            self.told.lock().unwrap().recv().unwrap();
            vec![false; digests.len()]
        }

        fn get(&self, _: &Digest) -> Result<HostTensor> {
            Err(Error::other("nothing is there"))
        }

        fn receive(&self, _: Digest, _: DType, _: &[usize]) -> Result<Box<dyn BulkSink>> {
            Err(Error::other("nothing is taken"))
        }

        fn end(&self) {}
    }

    #[test]
    fn a_session_is_busy_while_something_runs_or_waits() {
        let (asked, hears) = channel();
        let (tells, told) = channel();
        let library = Arc::new(Slow { asked, told: Mutex::new(told) });
        let session = worker().session(library, Box::new(|| {})).unwrap();
        let mut frame = Vec::new();
        Message::Probe(vec![Digest([0; 32])]).put(Numbering::default().next(), &mut frame);
        for _ in 0..2 {
            session.received(frame.clone()).unwrap();
            assert!(session.is_busy());
        }
        for _ in 0..2 {
            hears.recv().unwrap();
            assert!(session.is_busy());
            tells.send(()).unwrap();
        }
        while session.is_busy() {
            std::thread::yield_now();
        }
        session.lost();
    }

    #[test]
    fn a_program_stops_where_it_is_when_the_session_is_over() {
        let (asked, _hears) = channel();
        let (_tells, told) = channel();
        let library = Arc::new(Slow { asked, told: Mutex::new(told) });
        let device = cpu::Device::with_threads(1).unwrap();
        let shared = Arc::new(Shared::new(device, 1 << 20));
        let transfers = Arc::new(Transfers::new(1 << 20));
        let mut executor = Executor::<cpu::Storage>::new(shared, library, transfers, LIMITS);
        let is_over = executor.is_over();
        let mut replies = Vec::new();
        let mut run = |id: u64, message: Message| {
            let mut reply = |reply| {
                replies.push(reply);
                Ok(())
            };
            executor.run(Id(id), message, &mut reply).unwrap();
        };
        let zeros = Op::Zeros { dtype: DType::F32, dims: vec![1] };
        run(0, Message::Call(Call { op: zeros, args: vec![] }));
        run(1, Message::BeginProgram { program: 1, inputs: vec![Id(0)] });
        let args = vec![Operand { id: Id(0), layout: None }];
        run(1, Message::Call(Call { op: Op::Unary(Unary::Exp), args }));
        run(2, Message::EndProgram { outputs: vec![Id(1)] });
        run(2, Message::Replay { program: 1, inputs: vec![Id(0)] });
        run(3, Message::Read(Id(2)));
        is_over.store(true, Ordering::Relaxed);
        run(3, Message::Replay { program: 1, inputs: vec![Id(0)] });
        run(4, Message::Read(Id(3)));
        let bytes = 1f32.to_le_bytes().to_vec();
        let over = Reply::Failed("the session is over".into());
        assert_eq!(replies, [Reply::Data { bytes, is_last: true }, over]);
    }

    #[test]
    fn a_queue_of_decoded_messages_takes_little_memory_whatever_they_are() {
        let frame = |messages| vec![(Id(0), Message::Mark); messages];
        // What the queue may take, and what one frame may add to it.
        let message_bytes = size_of::<(Id, Message)>();
        let most = MAX_QUEUED_MESSAGES + super::super::transport::MAX_FRAME_BYTES;
        assert!(most * message_bytes <= 48 << 20, "{message_bytes} bytes a message");
        let args = vec![Operand { id: Id(0), layout: None }; 63];
        let call = Message::Call(Call { op: Op::Unary(Unary::Exp), args });
        let mut state = State::default();
        state.push(vec![(Id(0), call); MAX_QUEUED_MESSAGES / 64]);
        assert!(state.is_full(), "operands count");
        for (len, frames) in [(1, MAX_QUEUED_FRAMES), (MAX_QUEUED_MESSAGES / 2, 2), (200_000, 1)] {
            let mut state = State::default();
            while !state.is_full() {
                state.push(frame(len));
            }
            assert_eq!(state.queue.len(), frames, "of {len} messages each");
            assert_eq!(state.pop().map(|messages| messages.len()), Some(len));
            assert!(!state.is_full());
            state.end();
            assert!(state.pop().is_none() && state.messages == 0);
        }
    }
}
