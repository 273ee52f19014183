//! A session from the client's side: numbers buffers, gathers messages into frames, matches replies
//! to requests. Separate from the storage, which speaks candle, and from the network: bytes come
//! and go through [`ClientEnd`], and nothing here waits but for a reply.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use candle_core::Layout;

use super::message::{Message, Numbering, Outbox, Progress, Reply, fatal};
use super::op::{Call, Digest, Id, Op};
use super::transport::{BulkSource, ClientEnd, Waker};
use super::wire::{Reader, malformed, put_call};
use crate::error::{Error, Result};

mod bulk;
mod programs;
mod stages;

use programs::Programs;
pub use programs::{Begun, Output};
pub use stages::Stage;
use stages::Stages;

/// Bytes that may wait to be sent before callers are held back.
const MAX_WAITING_BYTES: usize = 16 << 20;
/// What waits goes without waiting for more when it is this much: some hundred ops.
const GATHERED_BYTES: usize = 16 << 10;
/// How long a request may take: longer than any op on any machine.
const REPLY_TIMEOUT: Duration = Duration::from_secs(600);

/// One session with a worker.
pub struct Session {
    /// Of the worker, for people; never the token.
    name: String,
    state: Mutex<State>,
    /// Something arrived, was sent, or broke.
    changed: Condvar,
    waker: OnceLock<Waker>,
    this: Weak<Session>,
}

#[derive(Default)]
struct State {
    outbox: Outbox,
    /// Whether the network was called and has not yet found the outbox empty.
    is_awake: bool,
    /// Whether somebody waits for an answer to what is in the outbox.
    is_urgent: bool,
    /// Whether the network was called for what is due.
    is_hurried: bool,
    /// Whether the last thing that was said, but for frees, is a read or a mark.
    asked_last: bool,
    bulk: VecDeque<BulkSource>,
    numbering: Numbering,
    next_transfer: u64,
    next_ticket: u64,
    /// Requests in the order in which they will be answered.
    requests: VecDeque<Request>,
    answers: HashMap<u64, Result<Answer>>,
    /// Pieces of the read that is being answered.
    pieces: Vec<u8>,
    failure: Option<Error>,
    programs: Programs,
    statistics: Statistics,
    stages: Stages,
}

impl State {
    /// Whether what waits should wait no longer.
    fn is_due(&self) -> bool {
        self.is_urgent || self.failure.is_some() || self.outbox.bytes() >= GATHERED_BYTES
    }
}

struct Request {
    ticket: u64,
    /// Of the answer, if it is data.
    bytes: u64,
    /// The stage that begins with a mark for which nobody waits, and what was done before.
    stage: Option<(Option<&'static str>, Statistics)>,
}

enum Answer {
    Data(Vec<u8>),
    Done(Progress),
    Present(Vec<bool>),
}

/// What went over the wire and what was done there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Calls that were sent.
    pub calls: u64,
    /// Programs that were replayed.
    pub replays: u64,
    /// Requests that had to wait for an answer.
    pub round_trips: u64,
    /// Bytes of frames to the worker.
    pub bytes_up: u64,
    /// Bytes of frames from the worker.
    pub bytes_down: u64,
    /// Bytes of weights and other bulk to the worker.
    pub bulk_bytes_up: u64,
    /// Of these, bytes of weights.
    pub weight_bytes_up: u64,
    /// As the worker said last.
    pub worker: Progress,
}

/// A promise of an answer.
#[derive(Debug)]
#[must_use]
pub struct Ticket(u64);

impl Session {
    /// A session with the worker `name`. It speaks when somebody takes its frames.
    pub fn new(name: impl Into<String>) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            name: name.into(),
            state: Mutex::default(),
            changed: Condvar::new(),
            waker: OnceLock::new(),
            this: this.clone(),
        })
    }

    /// Who is called when there is something to send; set once, by the network.
    pub fn set_waker(&self, waker: Waker) {
        // A second waker would mean two networks for one session: the first stays.
        let _ = self.waker.set(waker);
        self.wake();
    }

    /// The worker, for people.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What went over the wire so far.
    pub fn statistics(&self) -> Statistics {
        self.lock().statistics
    }

    /// Whether the session goes on.
    ///
    /// # Errors
    /// Why it does not.
    pub fn check(&self) -> Result<()> {
        self.lock().failure.clone().map_or(Ok(()), Err)
    }

    /// Runs `call` there; its result's id. An error is one of the session, not of the call.
    ///
    /// # Errors
    /// If the session is over.
    pub fn call(&self, call: Call) -> Result<Id> {
        self.call_op(&call.op, call.args.iter().map(|arg| (arg.id, arg.layout.as_ref())))
    }

    /// [`call`](Self::call) without a [`Call`]: the path of every op, which allocates nothing.
    ///
    /// # Errors
    /// If the session is over.
    pub fn call_op<'a>(
        &self,
        op: &Op,
        args: impl ExactSizeIterator<Item = (Id, Option<&'a Layout>)> + Clone,
    ) -> Result<Id> {
        let mut state = self.ready()?;
        state.statistics.calls += 1;
        state.programs.add(op, args.clone());
        let next = state.numbering.next();
        state.numbering.advance_call(op);
        state.asked_last = false;
        state.outbox.push(|out| put_call(op, args, next, out));
        self.wake_once(&mut state);
        Ok(next)
    }

    /// Gives a buffer back. After the session's end nobody needs to hear of it.
    pub fn free(&self, id: Id) {
        let mut state = self.lock();
        if state.failure.is_none() {
            let next = state.numbering.next();
            // It goes along with whatever is sent next: nobody is woken for it.
            state.outbox.push(|out| Message::Free(id).put(next, out));
        }
    }

    /// Asks for a whole buffer, of `bytes`, early: the answer is taken by [`data`](Self::data).
    ///
    /// # Errors
    /// If the session is over.
    pub fn read(&self, id: Id, bytes: u64) -> Result<Ticket> {
        self.request(&Message::Read(id), bytes)
    }

    /// Asks to hear when everything so far is done.
    ///
    /// # Errors
    /// If the session is over.
    pub fn mark(&self) -> Result<Ticket> {
        self.request(&Message::Mark, 0)
    }

    /// Which of the weights the worker has.
    ///
    /// # Errors
    /// If the session is over.
    pub fn probe(&self, digests: &[Digest]) -> Result<Vec<bool>> {
        let mut present = Vec::with_capacity(digests.len());
        for part in digests.chunks(super::message::MAX_PROBE) {
            let ticket = self.request(&Message::Probe(part.to_vec()), 0)?;
            match self.wait(ticket)? {
                Answer::Present(answer) if answer.len() == part.len() => present.extend(answer),
                Answer::Present(_) | Answer::Data(_) | Answer::Done(_) => {
                    return Err(self.confused());
                }
            }
        }
        Ok(present)
    }

    /// The bytes of a buffer.
    ///
    /// # Errors
    /// The first cause why the buffer could not be made, or of the session's end.
    pub fn data(&self, ticket: Ticket) -> Result<Vec<u8>> {
        match self.wait(ticket)? {
            Answer::Data(bytes) => Ok(bytes),
            Answer::Done(_) | Answer::Present(_) => Err(self.confused()),
        }
    }

    /// Waits until a mark was reached.
    ///
    /// # Errors
    /// If the session is over.
    pub fn done(&self, ticket: Ticket) -> Result<Progress> {
        match self.wait(ticket)? {
            Answer::Done(progress) => Ok(progress),
            Answer::Data(_) | Answer::Present(_) => Err(self.confused()),
        }
    }

    /// Whether a mark was reached, without waiting.
    pub fn is_answered(&self, ticket: &Ticket) -> bool {
        let state = self.lock();
        state.failure.is_some() || state.answers.contains_key(&ticket.0)
    }

    fn request(&self, message: &Message, bytes: u64) -> Result<Ticket> {
        let mut state = self.ready()?;
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.requests.push_back(Request { ticket, bytes, stage: None });
        state.statistics.round_trips += u64::from(*message != Message::Mark);
        state.is_urgent = true;
        self.send(&mut state, message)?;
        Ok(Ticket(ticket))
    }

    fn wait(&self, Ticket(ticket): Ticket) -> Result<Answer> {
        let state = self.lock();
        let waits =
            |state: &mut State| state.failure.is_none() && !state.answers.contains_key(&ticket);
        let waited = self.changed.wait_timeout_while(state, REPLY_TIMEOUT, waits);
        let (mut state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        match state.answers.remove(&ticket) {
            Some(answer) => answer,
            None if timeout.timed_out() => Err(Error::remote(format!(
                "{} did not answer within {} s",
                self.name,
                REPLY_TIMEOUT.as_secs()
            ))),
            None => Err(state.failure.clone().unwrap_or_else(|| self.confused())),
        }
    }

    /// Appends a message; the id of its first result.
    fn send(&self, state: &mut State, message: &Message) -> Result<Id> {
        let next = state.numbering.next();
        state.numbering.advance(message)?;
        state.asked_last = matches!(message, Message::Read(_) | Message::Mark);
        state.outbox.push(|out| message.put(next, out));
        self.wake_once(state);
        Ok(next)
    }

    fn wake_once(&self, state: &mut State) {
        let is_due = state.is_due();
        let knows = std::mem::replace(&mut state.is_awake, true);
        let hurries = std::mem::replace(&mut state.is_hurried, is_due);
        if !knows || is_due && !hurries {
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some(waker) = self.waker.get() {
            waker();
        }
    }

    /// The state of a session that goes on, when there is room for more.
    fn ready(&self) -> Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        while state.failure.is_none() && state.outbox.bytes() > MAX_WAITING_BYTES {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        match &state.failure {
            None => Ok(state),
            Some(failure) => Err(failure.clone()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn confused(&self) -> Error {
        Error::remote(format!("{} answered something else than was asked", self.name))
    }

    fn take(&self, state: &mut State, reply: Reply) -> Result<()> {
        let answer = match reply {
            Reply::Fatal(text) => return Err(fatal(format!("{}: {text}", self.name))),
            Reply::Data { bytes, is_last } => {
                let expected = state.requests.front().map_or(0, |request| request.bytes);
                state.pieces.extend(bytes);
                let len = state.pieces.len() as u64;
                if len > expected || (is_last && len < expected) {
                    return Err(malformed(&format!("has {len} bytes of a buffer of {expected}")));
                }
                if !is_last {
                    return Ok(());
                }
                Ok(Answer::Data(std::mem::take(&mut state.pieces)))
            }
            Reply::Failed(cause) => Err(Error::remote(format!("{}: {cause}", self.name))),
            Reply::Done(progress) => {
                state.statistics.worker = progress;
                Ok(Answer::Done(progress))
            }
            Reply::Present(present) => Ok(Answer::Present(present)),
        };
        let unasked = || malformed("answers what was not asked");
        let request = state.requests.pop_front().ok_or_else(unasked)?;
        match request.stage {
            None => drop(state.answers.insert(request.ticket, answer)),
            Some((name, sent)) => {
                state.stages.reached(name, sent, &state.statistics, Instant::now());
            }
        }
        Ok(())
    }
}

impl ClientEnd for Session {
    fn next_frame(&self) -> Option<Vec<u8>> {
        let mut state = self.lock();
        let Some(frame) = state.outbox.take() else {
            (state.is_awake, state.is_urgent, state.is_hurried) = (false, false, false);
            return None;
        };
        state.statistics.bytes_up += frame.len() as u64;
        self.changed.notify_all();
        Some(frame)
    }

    fn next_bulk(&self) -> Option<BulkSource> {
        let bulk = self.lock().bulk.pop_front();
        self.changed.notify_all();
        bulk
    }

    fn received(&self, frame: &[u8]) -> Result<()> {
        let mut state = self.lock();
        if state.failure.is_some() {
            // What the worker says of a session that is over is no cause of its end.
            return Ok(());
        }
        state.statistics.bytes_down += frame.len() as u64;
        let mut input = Reader::new(frame);
        while !input.is_empty() {
            self.take(&mut state, Reply::get(&mut input)?)?;
        }
        self.changed.notify_all();
        Ok(())
    }

    fn is_due(&self) -> bool {
        self.lock().is_due()
    }

    fn is_settled(&self) -> bool {
        let state = self.lock();
        state.asked_last && state.requests.is_empty()
    }

    fn lost(&self, error: Error) {
        let mut state = self.lock();
        state.failure.get_or_insert(error);
        state.bulk.clear();
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use candle_core::DType;

    use super::*;

    fn zeros(session: &Session) -> Id {
        let op = Op::Zeros { dtype: DType::F32, dims: vec![2, 3] };
        session.call(Call { op, args: vec![] }).unwrap()
    }

    #[test]
    fn small_ops_are_gathered_and_a_request_is_not_held_back() {
        let session = Session::new("nobody");
        let wakes = Arc::new(AtomicUsize::new(0));
        let counted = wakes.clone();
        session.set_waker(Box::new(move || {
            counted.fetch_add(1, Ordering::Relaxed);
        }));
        let woken = || wakes.swap(0, Ordering::Relaxed);
        woken();
        let id = zeros(&session);
        zeros(&session);
        assert!(!session.is_due() && woken() == 1, "the first begins the wait, alone");
        let _read = session.read(id, 24).unwrap();
        assert!(session.is_due() && woken() == 1, "a read ends it");
        zeros(&session);
        assert!(session.is_due() && woken() == 0, "what follows goes with it");
        while session.next_frame().is_some() {}
        zeros(&session);
        assert!(!session.is_due() && woken() == 1);
        while !session.is_due() {
            zeros(&session);
        }
        assert_eq!(woken(), 1, "enough ends it as well");
        let frame = session.next_frame().unwrap();
        assert!((GATHERED_BYTES..GATHERED_BYTES + 100).contains(&frame.len()), "{}", frame.len());
    }

    #[test]
    fn a_session_is_settled_when_its_last_request_was_answered_and_nothing_was_said_since() {
        let session = Session::new("nobody");
        let answer = |reply: Reply| {
            let mut bytes = Vec::new();
            reply.put(&mut bytes);
            session.received(&bytes).unwrap();
        };
        zeros(&session);
        assert!(!session.is_settled());
        let _mark = session.mark().unwrap();
        assert!(!session.is_settled());
        answer(Reply::Done(Progress::default()));
        assert!(session.is_settled());
        session.free(Id(0));
        assert!(session.is_settled(), "frees go with the session");
        zeros(&session);
        assert!(!session.is_settled());
    }
}
