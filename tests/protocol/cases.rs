//! Every case of the op table, on a worker and here.

use std::collections::BTreeSet;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType};
use tiny_sd::Result;
use tiny_sd::backend::elements::to_bytes;
use tiny_sd::backend::{MetaRef, cpu, twin};
use tiny_sd::remote::op::cases::{Lie, cases};
use tiny_sd::remote::op::infer::Source;
use tiny_sd::remote::op::{Op, cases};
use tiny_sd::remote::storage::Storage;
use tiny_sd::remote::wire::{Reader, Wire};

use super::Worker;
use crate::op_cases::{run, weight};

/// dtype and elements of what `infer` says.
fn inferred(case: &cases::Case) -> Result<(DType, usize)> {
    let len = |values: &CpuStorage| Ok::<_, tiny_sd::Error>(to_bytes(values)?.len());
    let sources = case.operands.iter().map(|(values, layout)| {
        let meta = MetaRef { dtype: values.dtype(), layout };
        Ok(Source { meta, len: len(values)? / values.dtype().size_in_bytes() })
    });
    let sources = sources.collect::<Result<Vec<_>>>()?;
    let meta = case.op.infer(&sources)?;
    // Ops in place give their target's view; what is read is all of it.
    let count =
        if case.op.is_in_place() { sources[0].len } else { meta.layout.shape().elem_count() };
    Ok((meta.dtype, count))
}

#[test]
fn every_op_gives_the_same_bits_on_a_worker_as_here() -> Result<()> {
    let worker = Worker::new()?;
    let weight = weight()?;
    worker.insert(&weight)?;
    let session = worker.connect("worker")?;
    let mut unsupported = BTreeSet::new();
    let mut ran = 0;
    for case in cases() {
        let what = format!("{:?} {} {:?}", case.op, case.dtype.as_str(), case.lie);
        let here = run::<cpu::Storage>(&case, &weight, &worker.device);
        let there = run::<Storage>(&case, &weight, &session.device());
        match (here, there) {
            (Ok(here), Ok(there)) => {
                ran += 1;
                let is_random = matches!(case.op, Op::RandUniform { .. } | Op::RandNormal { .. });
                let (here_bytes, there_bytes) = (to_bytes(&here)?, to_bytes(&there)?);
                assert_eq!(here.dtype(), there.dtype(), "{what}");
                assert_eq!(here_bytes.len(), there_bytes.len(), "{what}");
                assert!(is_random || here_bytes == there_bytes, "{what}");
                let count = here_bytes.len() / here.dtype().size_in_bytes();
                assert_eq!(inferred(&case)?, (here.dtype(), count), "{what}");
            }
            (Err(_), Err(there)) => {
                let named = there.to_string().contains(case.op.name());
                let is_prepared = there.to_string().contains("a prepared weight is not a tensor");
                assert!(named || is_prepared, "{what}: {there}");
                if case.lie == Lie::Contiguous {
                    unsupported.insert(format!("{} {}", case.op.name(), case.dtype.as_str()));
                }
            }
            (here, there) => panic!("{what}: here {here:?}, there {there:?}"),
        }
    }
    // The CPU does the rest; prepared weights cannot be read.
    let expected = ["prepare bf16", "prepare f16", "prepare f32"].map(String::from);
    assert_eq!(unsupported, BTreeSet::from(expected));
    assert!(ran > 1000, "{ran} cases ran");
    let done = session.session().done(session.session().mark()?)?;
    assert_eq!(done.memory_bytes, 0, "buffers were left behind");
    Ok(())
}

#[test]
fn every_op_runs_on_a_pair_of_devices_as_on_one() -> Result<()> {
    type Pair = twin::Storage<cpu::Storage, Storage>;
    let worker = Worker::new()?;
    let weight = weight()?;
    worker.insert(&weight)?;
    let session = worker.connect("worker")?;
    let pair = twin::Device::<cpu::Storage, Storage>::new(worker.device.clone(), session.device());
    let mut ran = 0;
    for case in cases() {
        let what = format!("{:?} {} {:?}", case.op, case.dtype.as_str(), case.lie);
        let one = run::<cpu::Storage>(&case, &weight, &worker.device);
        let compared = pair.findings().compared;
        match (one, run::<Pair>(&case, &weight, &pair)) {
            (Ok(one), Ok(both)) => {
                ran += 1;
                let is_random = matches!(case.op, Op::RandUniform { .. } | Op::RandNormal { .. });
                assert!(is_random || to_bytes(&one)? == to_bytes(&both)?, "{what}");
                // Its operands came from the host, and the op itself.
                let found = pair.findings();
                let in_place = usize::from(case.op.is_in_place());
                let expected = case.operands.len() + in_place + 1;
                assert_eq!(found.compared - compared, expected as u64, "{what}");
                assert_eq!(found.compared, found.identical, "{what}");
            }
            (Err(one), Err(both)) => {
                assert!(both.to_string().ends_with(&one.to_string()), "{what}: {both}");
            }
            (one, both) => panic!("{what}: on one {one:?}, on both {both:?}"),
        }
    }
    assert!(ran > 1000, "{ran} cases ran");
    Ok(())
}

#[test]
fn every_op_has_cases() {
    let tags: BTreeSet<u8> = cases()
        .iter()
        .map(|case| {
            let mut bytes = Vec::new();
            case.op.put(&mut bytes);
            bytes[0]
        })
        .collect();
    let is_known = |tag: &u8| {
        let error = Op::get(&mut Reader::new(&[*tag])).err().map(|error| error.to_string());
        !error.is_some_and(|error| error.contains("unknown Op"))
    };
    let known: BTreeSet<u8> = (0..=u8::MAX).filter(is_known).collect();
    assert_eq!(tags, known);
    for dtype in tiny_sd::remote::op::infer::DTYPES {
        assert!(cases::cases().iter().any(|case| case.dtype == *dtype));
    }
}
