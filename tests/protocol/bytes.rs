//! Calls and messages as bytes: there and back, cut short, and with bits flipped.

use candle_core::{CpuStorage, DType};
use tiny_sd::Result;
use tiny_sd::backend::MetaRef;
use tiny_sd::remote::message::{Message, Numbering, Progress, Reply, decode_frame};
use tiny_sd::remote::op::cases::{Case, cases};
use tiny_sd::remote::op::infer::Source;
use tiny_sd::remote::op::{Call, Digest, Id, Operand};
use tiny_sd::remote::wire::Reader;

use crate::numbers::Random;

const NEXT: Id = Id(1000);

fn call(case: &Case) -> Call {
    let operand = |(i, (_, layout)): (usize, &(CpuStorage, _))| {
        let layout: &candle_core::Layout = layout;
        Operand { id: Id(1 + 300 * i as u64), layout: (i != 1).then(|| layout.clone()) }
    };
    Call { op: case.op.clone(), args: case.operands.iter().enumerate().map(operand).collect() }
}

/// Bytes that decode must be usable without a panic.
fn survive(bytes: &[u8]) {
    let Ok(call) = Call::get(NEXT, &mut Reader::new(bytes)) else { return };
    let whole = candle_core::Layout::contiguous(vec![3]);
    let metas = call.args.iter().map(|arg| arg.layout.as_ref().unwrap_or(&whole));
    let sources: Vec<_> = metas
        .map(|layout| Source { meta: MetaRef { dtype: DType::F32, layout }, len: 1 << 20 })
        .collect();
    // Whatever it says, it says so.
    let _ = call.op.infer(&sources);
}

#[test]
fn every_call_comes_back_from_its_bytes_and_no_other_bytes_pass_for_it() -> Result<()> {
    let mut random = Random(1);
    for case in cases() {
        let call = call(&case);
        let mut bytes = Vec::new();
        call.put(NEXT, &mut bytes);
        let mut input = Reader::new(&bytes);
        assert_eq!(Call::get(NEXT, &mut input)?, call);
        assert!(input.is_empty(), "{call:?}");
        for end in 0..bytes.len().min(100) {
            let cut = Call::get(NEXT, &mut Reader::new(&bytes[..end]));
            assert!(cut.is_err(), "{call:?} cut to {end} bytes");
        }
        for _ in 0..30 {
            let mut changed = bytes.clone();
            for _ in 0..1 + random.below(3) {
                let place = random.below(changed.len());
                changed[place] = random.bits() as u8;
            }
            survive(&changed);
        }
    }
    Ok(())
}

#[test]
fn every_message_comes_back_from_its_bytes() -> Result<()> {
    let ids = vec![Id(3), Id(999)];
    for message in [
        Message::Free(Id(0)),
        Message::Read(Id(999)),
        Message::Mark,
        Message::Probe(vec![Digest([7; 32]), Digest([9; 32])]),
        Message::BeginProgram { program: 1 << 40, inputs: ids.clone() },
        Message::EndProgram { outputs: ids.clone() },
        Message::AbortProgram,
        Message::Replay { program: 5, inputs: ids },
        Message::DropProgram { program: 0 },
    ] {
        let mut bytes = Vec::new();
        message.put(NEXT, &mut bytes);
        let mut input = Reader::new(&bytes);
        assert_eq!(Message::get(NEXT, &mut input)?, message);
        assert!(input.is_empty(), "{message:?}");
        for end in 0..bytes.len() {
            assert!(Message::get(NEXT, &mut Reader::new(&bytes[..end])).is_err(), "{message:?}");
        }
    }
    Ok(())
}

#[test]
fn every_reply_comes_back_from_its_bytes_and_texts_are_harmless() -> Result<()> {
    let progress = Progress {
        ops: 1,
        replays: 2,
        busy_us: 3,
        queued_us: 7,
        idle_us: 4,
        memory_bytes: u64::MAX,
        peak_bytes: 5,
    };
    for reply in [
        Reply::Data { bytes: vec![1, 2, 3], is_last: false },
        Reply::Data { bytes: vec![], is_last: true },
        Reply::Failed("no".into()),
        Reply::Done(progress),
        Reply::Present(vec![true, false]),
        Reply::Fatal("over".into()),
    ] {
        let mut bytes = Vec::new();
        reply.put(&mut bytes);
        let mut input = Reader::new(&bytes);
        assert_eq!(Reply::get(&mut input)?, reply);
        assert!(input.is_empty(), "{reply:?}");
        for end in 0..bytes.len() {
            assert!(Reply::get(&mut Reader::new(&bytes[..end])).is_err(), "{reply:?}");
        }
    }
    let mut bytes = Vec::new();
    Reply::Failed("a\x1b[2Jb\n".repeat(5000)).put(&mut bytes);
    let Reply::Failed(text) = Reply::get(&mut Reader::new(&bytes))? else { panic!("not failed") };
    assert!(!text.contains(char::is_control) && text.len() <= 4096, "{} bytes", text.len());
    Ok(())
}

#[test]
fn random_frames_are_refused_or_run_but_never_panic() {
    for seed in 0..3000 {
        let mut random = Random(seed);
        let mut frame: Vec<u8> = (0..random.below(60)).map(|_| random.bits() as u8).collect();
        if seed % 2 == 0 && !frame.is_empty() {
            frame[0] %= 40;
        }
        // The seed is what makes a failure repeat.
        let decoded =
            std::panic::catch_unwind(|| decode_frame(&frame, &mut Numbering::default()).map(drop));
        assert!(decoded.is_ok(), "seed {seed}: {frame:?}");
        survive(&frame);
    }
}

#[test]
fn a_length_alone_allocates_nothing() {
    let check = |bytes: &[u8]| {
        let error = Message::get(NEXT, &mut Reader::new(bytes));
        assert!(error.is_err(), "{bytes:?}");
    };
    let huge = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
    check(&[&[29, 5], &huge[..]].concat()); // constant: bytes
    check(&[&[3, 0], &huge[..]].concat()); // reduce: dimensions
    check(&[&[19, 6], &huge[..]].concat()); // linear combination: coefficients
    check(&[&[17], &huge[..]].concat()); // matmul: operands
    check(&[&[0xe3], &huge[..]].concat()); // probe: weights
    check(&[&[0xe4, 0], &huge[..]].concat()); // program: inputs
    check(&[&[0xe1], &huge[..]].concat()); // an id
    check(&[0xe1, 0]); // the id of what is not made yet
}
