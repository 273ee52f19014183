//! How many bytes ops cost on the wire; what time they cost is `benches/cost.rs`.

use tiny_sd::Result;
use tiny_sd::remote::disk_library::{self, DiskLibrary};
use tiny_sd::remote::loopback::Loopback;
use tiny_sd::remote::storage::Storage;
use tiny_sd::remote::worker::Worker;
use tiny_sd::tensor::program;

use super::LIMITS;
use crate::null;
use crate::small_ops::SmallOps;

const OPS: u64 = 6000;

/// With a worker that computes nothing.
fn connect() -> Result<Loopback> {
    let library = DiskLibrary::in_memory(disk_library::Limits::new(0));
    let worker = Worker::<null::Storage>::new(null::Device, LIMITS, 0);
    Loopback::connect("null", &worker, library.session())
}

/// Bytes to the worker for `work`.
fn bytes(loopback: &Loopback, work: impl FnOnce() -> Result<()>) -> Result<u64> {
    let session = loopback.session();
    session.done(session.mark()?)?;
    let before = session.statistics().bytes_up;
    work()?;
    session.done(session.mark()?)?;
    Ok(session.statistics().bytes_up - before)
}

#[test]
fn a_small_op_and_its_free_cost_few_bytes_however_old_their_operands_are() -> Result<()> {
    let loopback = connect()?;
    let small = SmallOps::<Storage>::new(&loopback.device())?;
    let early = bytes(&loopback, || (0..OPS).try_for_each(|n| small.run(n).map(drop)))?;
    // Operands are far behind the next number by now.
    (0..20_000).try_for_each(|n| small.run(n).map(drop))?;
    let late = bytes(&loopback, || (0..OPS).try_for_each(|n| small.run(n).map(drop)))?;
    assert!(early <= 16 * OPS && late <= 16 * OPS, "{early} and {late} bytes for {OPS} ops");
    Ok(())
}

#[test]
fn a_replay_costs_the_bytes_of_one_op() -> Result<()> {
    let loopback = connect()?;
    let device = loopback.device();
    let small = SmallOps::<Storage>::new(&device)?;
    let replay = || {
        program("small", &device, &[&small.x, &small.y], || {
            (0..OPS).try_fold(small.x.clone(), |_, n| small.run(n))
        })
        .map(drop)
    };
    replay()?;
    let bytes = bytes(&loopback, || (0..100).try_for_each(|_| replay()))?;
    assert!(bytes <= 16 * 100, "{bytes} bytes for 100 replays");
    assert_eq!(loopback.session().statistics().replays, 100);
    Ok(())
}
