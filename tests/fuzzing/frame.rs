//! Frames, decoded as both sides do: as messages of a client, and as replies of a worker.

use std::sync::OnceLock;

use candle_core::{DType, Layout};
use tiny_sd::backend::MetaRef;
use tiny_sd::remote::client::Session;
use tiny_sd::remote::message::{Message, Numbering, Progress, Reply, decode_frame};
use tiny_sd::remote::op::cases::cases;
use tiny_sd::remote::op::infer::Source;
use tiny_sd::remote::op::{Call, Digest, Id, Op, Operand};
use tiny_sd::remote::transport::ClientEnd;
use tiny_sd::remote::wire::Reader;

use super::{Target, damaged, noise};
use crate::numbers::Random;

pub const TARGET: Target = Target {
    name: "frame",
    run,
    draw,
    // A message takes far more than its one byte; what it says, no more than it sends.
    max_memory_bytes: |len| (64 << 10) + 1500 * len,
};

/// What the client has asked for when a frame arrives.
const ASKED_BYTES: u64 = 100;

fn run(bytes: &[u8]) {
    from_worker(bytes);
    from_client(bytes);
}

fn from_worker(bytes: &[u8]) {
    let mut input = Reader::new(bytes);
    while let Ok(reply) = Reply::get(&mut input) {
        let mut again = Vec::new();
        reply.put(&mut again);
        assert!(Reply::get(&mut Reader::new(&again)).is_ok(), "{reply:?}");
    }
    let session = Session::new("worker");
    let tickets = [session.read(Id(0), ASKED_BYTES), session.mark(), session.read(Id(0), 0)];
    let is_whole = session.received(bytes).is_ok();
    for (place, ticket) in tickets.into_iter().enumerate() {
        let Ok(ticket) = ticket else { unreachable!("the session has just begun") };
        if !session.is_answered(&ticket) {
            continue;
        }
        match place {
            1 => drop(session.done(ticket)),
            _ => {
                if let Ok(data) = session.data(ticket) {
                    let expected = if place == 0 { ASKED_BYTES } else { 0 };
                    assert_eq!(data.len() as u64, expected, "whole frame: {is_whole}");
                }
            }
        }
    }
}

fn from_client(bytes: &[u8]) {
    let Ok(messages) = decode_frame(bytes, &mut Numbering::default()) else { return };
    let mut again = Vec::new();
    for (id, message) in &messages {
        message.put(*id, &mut again);
        let Message::Call(Call { op, args }) = message else { continue };
        let whole = Layout::contiguous(vec![3]);
        let layouts = args.iter().map(|arg| arg.layout.as_ref().unwrap_or(&whole));
        let source = |layout| Source { meta: MetaRef { dtype: DType::F32, layout }, len: 1 << 20 };
        // Whatever it says, it says so.
        let _ = op.infer(&layouts.map(source).collect::<Vec<_>>());
    }
    // What was accepted comes back from its bytes; steps over a dimension of one element need not.
    let Ok(decoded) = decode_frame(&again, &mut Numbering::default()) else {
        panic!("it does not come back: {messages:?}")
    };
    let mut bytes = Vec::new();
    decoded.iter().for_each(|(id, message)| message.put(*id, &mut bytes));
    assert_eq!(bytes, again, "{messages:?} comes back as {decoded:?}");
}

fn draw(random: &mut Random) -> Vec<u8> {
    static VALID: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    if random.below(8) == 0 {
        let len = random.below(64);
        return noise(random, len);
    }
    let valid = VALID.get_or_init(|| calls().into_iter().chain(rare()).chain(replies()).collect());
    let frame = &valid[random.below(valid.len())];
    damaged(random, frame)
}

/// Every case's op on buffers that are there.
fn calls() -> Vec<Vec<u8>> {
    let frame = |case: tiny_sd::remote::op::cases::Case| {
        let mut frame = some_buffers();
        let operand = |(i, (_, layout)): (usize, &(_, Layout))| Operand {
            id: Id(i as u64),
            layout: (i % 2 == 0).then(|| layout.clone()),
        };
        let args = case.operands.iter().enumerate().map(operand).collect();
        Message::Call(Call { op: case.op, args }).put(Id(4), &mut frame);
        frame.truncate(400);
        frame
    };
    cases().into_iter().map(frame).collect()
}

/// Four buffers, of few bytes each.
fn some_buffers() -> Vec<u8> {
    let mut frame = Vec::new();
    for id in 0..4 {
        let op = Op::Zeros { dtype: DType::F32, dims: vec![] };
        Message::Call(Call { op, args: vec![] }).put(Id(id), &mut frame);
    }
    frame
}

fn rare() -> [Vec<u8>; 2] {
    let mut program = some_buffers();
    for message in [
        Message::BeginProgram { program: 1, inputs: vec![Id(0)] },
        Message::EndProgram { outputs: vec![Id(0), Id(1)] },
        Message::Replay { program: 1, inputs: vec![Id(1)] },
    ] {
        message.put(Id(4), &mut program);
    }
    Message::DropProgram { program: 1 }.put(Id(6), &mut program);
    let mut others = some_buffers();
    for message in [
        Message::Free(Id(3)),
        Message::Read(Id(0)),
        Message::Mark,
        Message::Probe(vec![Digest([7; 32]); 2]),
        Message::BeginProgram { program: 0, inputs: vec![] },
        Message::AbortProgram,
    ] {
        message.put(Id(4), &mut others);
    }
    [program, others]
}

fn replies() -> [Vec<u8>; 2] {
    let all = |replies: &[Reply]| {
        let mut frame = Vec::new();
        replies.iter().for_each(|reply| reply.put(&mut frame));
        frame
    };
    let data = |len: usize, is_last| Reply::Data { bytes: vec![1; len], is_last };
    let done = Reply::Done(Progress { ops: 300, busy_us: 1 << 40, ..Progress::default() });
    [
        all(&[data(60, false), data(40, true), done.clone(), data(0, true)]),
        all(&[
            Reply::Failed("call 1: out of memory".into()),
            done,
            Reply::Present(vec![true, false]),
            Reply::Fatal("gone".into()),
        ]),
    ]
}
