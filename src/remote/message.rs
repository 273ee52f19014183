//! What is said in a session: messages from the client, replies from the worker. Separate from the
//! wire's records because these decide the protocol: which of them are answered, and in what order.
//!
//! Messages run in the order in which they were sent. [`Read`](Message::Read),
//! [`Mark`](Message::Mark) and [`Probe`](Message::Probe) are each answered by one reply, in order;
//! nothing else is answered.

use std::collections::HashMap;

use super::op::{Call, Digest, Id, Op};
use super::transport::MAX_FRAME_BYTES;
use super::wire::{Reader, Wire, malformed};
use crate::error::{Error, Kind, Result};

/// Weights in one probe.
pub const MAX_PROBE: usize = 4096;
/// Inputs or outputs of a program.
pub const MAX_BINDINGS: usize = 160;
/// Programs that a session keeps; the least recently used goes first.
pub const MAX_PROGRAMS: usize = 16;
/// Bytes of one piece of data in a reply.
pub const MAX_PIECE_BYTES: usize = 128 << 10;
/// Bytes of an error's text.
const MAX_TEXT_BYTES: usize = 4 << 10;

/// From the client.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// Run this; unless in place, the result gets the next id.
    Call(Call),
    /// The buffer is not needed any more.
    Free(Id),
    /// Send the whole buffer: answered by [`Reply::Data`] pieces or [`Reply::Failed`].
    Read(Id),
    /// Say when everything before is done: answered by [`Reply::Done`].
    Mark,
    /// Say which weights are there: answered by [`Reply::Present`].
    Probe(Vec<Digest>),
    /// What follows is run and also kept as `program`.
    BeginProgram { program: u64, inputs: Vec<Id> },
    /// The program's results; what else was made since its beginning is its own.
    EndProgram { outputs: Vec<Id> },
    /// The program could not be recorded to its end: forget it.
    AbortProgram,
    /// Run the program with other inputs; its results get the next ids.
    Replay { program: u64, inputs: Vec<Id> },
    /// The program is not needed any more.
    DropProgram { program: u64 },
}

impl Message {
    /// It and its operands, which have layouts of their own: what it takes in memory, about.
    pub fn weight(&self) -> usize {
        match self {
            Message::Call(call) => 1 + call.args.len(),
            Message::BeginProgram { inputs, .. } | Message::Replay { inputs, .. } => {
                1 + inputs.len()
            }
            Message::EndProgram { outputs } => 1 + outputs.len(),
            Message::Probe(digests) => 1 + digests.len(),
            Message::Free(_)
            | Message::Read(_)
            | Message::Mark
            | Message::AbortProgram
            | Message::DropProgram { .. } => 1,
        }
    }
}

/// From the worker.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// A piece of what was read, and whether it is the last.
    Data { bytes: Vec<u8>, is_last: bool },
    /// The buffer that was read could not be made: the first cause.
    Failed(String),
    /// A mark was reached.
    Done(Progress),
    /// For each probed weight, whether it is there.
    Present(Vec<bool>),
    /// The session is over.
    Fatal(String),
}

/// What the worker has done in this session so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Ops that ran, those of replayed programs included.
    pub ops: u64,
    /// Programs that were replayed.
    pub replays: u64,
    /// Time spent running ops, in microseconds.
    pub busy_us: u64,
    /// Time spent waiting for other sessions' ops, in microseconds.
    pub queued_us: u64,
    /// Time spent waiting for messages and weights, in microseconds.
    pub idle_us: u64,
    /// Bytes of this session's buffers.
    pub memory_bytes: u64,
    /// The most that they took at once, in bytes.
    pub peak_bytes: u64,
}

// Calls begin with their opcode, so these lie above all opcodes.
const FREE: u8 = 0xe0;
const READ: u8 = 0xe1;
const MARK: u8 = 0xe2;
const PROBE: u8 = 0xe3;
const BEGIN: u8 = 0xe4;
const END: u8 = 0xe5;
const ABORT: u8 = 0xe6;
const REPLAY: u8 = 0xe7;
const DROP: u8 = 0xe8;

impl Message {
    /// Appends the message; `next` is the id that the next result gets.
    pub fn put(&self, next: Id, out: &mut Vec<u8>) {
        match self {
            Message::Call(call) => call.put(next, out),
            Message::Free(id) => put_tagged(FREE, next, &[*id], out),
            Message::Read(id) => put_tagged(READ, next, &[*id], out),
            Message::Mark => out.push(MARK),
            Message::Probe(digests) => {
                out.push(PROBE);
                digests.len().put(out);
                digests.iter().for_each(|digest| digest.put(out));
            }
            Message::BeginProgram { program, inputs } => {
                out.push(BEGIN);
                program.put(out);
                put_ids(next, inputs, out);
            }
            Message::EndProgram { outputs } => {
                out.push(END);
                put_ids(next, outputs, out);
            }
            Message::AbortProgram => out.push(ABORT),
            Message::Replay { program, inputs } => {
                out.push(REPLAY);
                program.put(out);
                put_ids(next, inputs, out);
            }
            Message::DropProgram { program } => {
                out.push(DROP);
                program.put(out);
            }
        }
    }

    /// Reads a message.
    ///
    /// # Errors
    /// If it is none.
    pub fn get(next: Id, input: &mut Reader<'_>) -> Result<Self> {
        let tag = input.peek().ok_or_else(|| malformed("is cut short"))?;
        if tag < FREE {
            return Call::get(next, input).map(Message::Call);
        }
        input.bytes(1)?;
        Ok(match tag {
            FREE => Message::Free(get_id(next, input)?),
            READ => Message::Read(get_id(next, input)?),
            MARK => Message::Mark,
            PROBE => {
                let count = capped(input, MAX_PROBE, "weights")?;
                Message::Probe((0..count).map(|_| Digest::get(input)).collect::<Result<_>>()?)
            }
            BEGIN => {
                Message::BeginProgram { program: u64::get(input)?, inputs: get_ids(next, input)? }
            }
            END => Message::EndProgram { outputs: get_ids(next, input)? },
            ABORT => Message::AbortProgram,
            REPLAY => Message::Replay { program: u64::get(input)?, inputs: get_ids(next, input)? },
            DROP => Message::DropProgram { program: u64::get(input)? },
            _ => return Err(malformed("has an unknown tag")),
        })
    }
}

/// How buffers are numbered: both sides count alike, so that no id of a result is ever sent.
#[derive(Debug, Default)]
pub struct Numbering {
    next: u64,
    /// How many results each program has.
    programs: HashMap<u64, usize>,
    recording: Option<u64>,
}

impl Numbering {
    /// The id that the next result gets.
    pub fn next(&self) -> Id {
        Id(self.next)
    }

    /// Counts the result of a call.
    pub fn advance_call(&mut self, op: &Op) {
        self.next += u64::from(!op.is_in_place());
    }

    /// Counts the results of `message`.
    ///
    /// # Errors
    /// If it ends a recording that was not begun, begins a second, or replays what is not known.
    pub fn advance(&mut self, message: &Message) -> Result<()> {
        let unknown = || malformed("names a program that is not there");
        match message {
            Message::Call(call) => self.advance_call(&call.op),
            Message::BeginProgram { program, .. } => {
                let is_new = self.recording.is_none() && !self.programs.contains_key(program);
                if !is_new || self.programs.len() >= MAX_PROGRAMS {
                    return Err(malformed("begins a program at the wrong time"));
                }
                self.recording = Some(*program);
            }
            Message::EndProgram { outputs } => {
                let program = self.recording.take().ok_or_else(unknown)?;
                self.programs.insert(program, outputs.len());
            }
            Message::AbortProgram => drop(self.recording.take().ok_or_else(unknown)?),
            Message::Replay { program, .. } => {
                let outputs = self.programs.get(program).filter(|_| self.recording.is_none());
                self.next += *outputs.ok_or_else(unknown)? as u64;
            }
            Message::DropProgram { program } => {
                self.programs.remove(program).ok_or_else(unknown)?;
            }
            Message::Free(_) | Message::Read(_) | Message::Mark | Message::Probe(_) => {}
        }
        Ok(())
    }
}

/// A frame's messages, each with the id of its first result.
///
/// # Errors
/// If the frame is not whole messages in the right order.
pub fn decode_frame(frame: &[u8], numbering: &mut Numbering) -> Result<Vec<(Id, Message)>> {
    let mut input = Reader::new(frame);
    // About as many as there will be: a call and a free take some fifteen bytes.
    let mut messages = Vec::with_capacity(frame.len() / 8);
    while !input.is_empty() {
        let id = numbering.next();
        let message = Message::get(id, &mut input)?;
        numbering.advance(&message)?;
        messages.push((id, message));
    }
    Ok(messages)
}

/// Ids count back from the next one, so that they stay short.
fn put_id(next: Id, id: Id, out: &mut Vec<u8>) {
    next.0.wrapping_sub(id.0).put(out);
}

fn get_id(next: Id, input: &mut Reader<'_>) -> Result<Id> {
    let back = u64::get(input)?;
    let id = next.0.checked_sub(back).filter(|_| back > 0);
    id.map(Id).ok_or_else(|| malformed("names a buffer before it is made"))
}

fn put_tagged(tag: u8, next: Id, ids: &[Id], out: &mut Vec<u8>) {
    out.push(tag);
    ids.iter().for_each(|id| put_id(next, *id, out));
}

fn put_ids(next: Id, ids: &[Id], out: &mut Vec<u8>) {
    ids.len().put(out);
    ids.iter().for_each(|id| put_id(next, *id, out));
}

fn get_ids(next: Id, input: &mut Reader<'_>) -> Result<Vec<Id>> {
    let count = capped(input, MAX_BINDINGS, "bindings")?;
    (0..count).map(|_| get_id(next, input)).collect()
}

fn capped(input: &mut Reader<'_>, max: usize, what: &str) -> Result<usize> {
    let count = usize::get(input)?;
    if count > max {
        return Err(malformed(&format!("has {count} {what}, more than {max}")));
    }
    Ok(count)
}

impl Reply {
    /// Appends the reply.
    pub fn put(&self, out: &mut Vec<u8>) {
        match self {
            Reply::Data { bytes, is_last } => {
                out.push(u8::from(*is_last));
                put_bytes(bytes, out);
            }
            Reply::Failed(text) => {
                out.push(2);
                put_bytes(shortened(text).as_bytes(), out);
            }
            Reply::Done(progress) => {
                out.push(3);
                let Progress {
                    ops,
                    replays,
                    busy_us,
                    queued_us,
                    idle_us,
                    memory_bytes,
                    peak_bytes,
                } = progress;
                [ops, replays, busy_us, queued_us, idle_us, memory_bytes, peak_bytes]
                    .iter()
                    .for_each(|n| n.put(out));
            }
            Reply::Present(present) => {
                out.push(4);
                present.len().put(out);
                present.iter().for_each(|is_there| is_there.put(out));
            }
            Reply::Fatal(text) => {
                out.push(5);
                put_bytes(shortened(text).as_bytes(), out);
            }
        }
    }

    /// Reads a reply.
    ///
    /// # Errors
    /// If it is none.
    pub fn get(input: &mut Reader<'_>) -> Result<Self> {
        let tag = input.peek().ok_or_else(|| malformed("is cut short"))?;
        input.bytes(1)?;
        Ok(match tag {
            0 | 1 => Reply::Data { bytes: get_bytes(input, MAX_PIECE_BYTES)?, is_last: tag == 1 },
            2 => Reply::Failed(get_text(input)?),
            3 => {
                let mut number = || u64::get(input);
                Reply::Done(Progress {
                    ops: number()?,
                    replays: number()?,
                    busy_us: number()?,
                    queued_us: number()?,
                    idle_us: number()?,
                    memory_bytes: number()?,
                    peak_bytes: number()?,
                })
            }
            4 => {
                let count = capped(input, MAX_PROBE, "weights")?;
                Reply::Present((0..count).map(|_| bool::get(input)).collect::<Result<_>>()?)
            }
            5 => Reply::Fatal(get_text(input)?),
            _ => return Err(malformed("has an unknown reply")),
        })
    }
}

fn put_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    bytes.len().put(out);
    out.extend(bytes);
}

fn get_bytes(input: &mut Reader<'_>, max: usize) -> Result<Vec<u8>> {
    let len = capped(input, max, "bytes")?;
    Ok(input.bytes(len)?.to_vec())
}

fn get_text(input: &mut Reader<'_>) -> Result<String> {
    let text = get_bytes(input, MAX_TEXT_BYTES)?;
    // A worker's text reaches a terminal: no control characters.
    Ok(String::from_utf8_lossy(&text).chars().filter(|c| !c.is_control()).collect())
}

fn shortened(text: &str) -> &str {
    let end = (0..=MAX_TEXT_BYTES.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    &text[..end.unwrap_or(0)]
}

/// Messages as frames: none is split, none is larger than [`MAX_FRAME_BYTES`].
#[derive(Debug, Default)]
pub struct Outbox {
    full: std::collections::VecDeque<Vec<u8>>,
    current: Vec<u8>,
    bytes: usize,
}

impl Outbox {
    /// Appends what `put` writes, which must be less than a frame.
    pub fn push(&mut self, put: impl FnOnce(&mut Vec<u8>)) {
        let before = self.current.len();
        put(&mut self.current);
        self.bytes += self.current.len() - before;
        if self.current.len() > MAX_FRAME_BYTES {
            let last = self.current.split_off(before);
            self.full.push_back(std::mem::replace(&mut self.current, last));
        }
    }

    /// The next frame, if anything waits.
    pub fn take(&mut self) -> Option<Vec<u8>> {
        let frame = match self.full.pop_front() {
            Some(frame) => frame,
            None if self.current.is_empty() => return None,
            None => std::mem::take(&mut self.current),
        };
        self.bytes -= frame.len();
        Some(frame)
    }

    /// Bytes that wait.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// The error of a session that ended, as the peer said it.
pub fn fatal(text: String) -> Error {
    Error::new(Kind::Remote, text)
}
