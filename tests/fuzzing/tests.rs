//! The targets in every test run: bytes that are kept because they once did harm or reach far, and
//! random ones for a moment.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use super::session::{self, Tally};
use super::{TARGETS, Target};
use crate::numbers::Random;

/// How long each target runs on random bytes.
const MOMENT: Duration = Duration::from_millis(350);

fn survive(target: &Target, bytes: &[u8], what: &str) {
    let survived = catch_unwind(AssertUnwindSafe(|| (target.run)(bytes)));
    assert!(survived.is_ok(), "{} of {what}: {bytes:?}", target.name);
}

#[test]
fn bytes_that_once_did_harm_are_survived() {
    for target in TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target.name);
        let seeds: Vec<_> = folder.read_dir().expect("seeds").map(|seed| seed.unwrap()).collect();
        assert!(!seeds.is_empty(), "{} is empty", folder.display());
        for seed in seeds {
            let path = seed.path();
            survive(target, &std::fs::read(&path).unwrap(), &path.display().to_string());
        }
    }
}

#[test]
fn random_bytes_are_survived() {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    for target in TARGETS {
        let began = Instant::now();
        let mut seed = now.as_nanos() as u64;
        while began.elapsed() < MOMENT {
            survive(target, &(target.draw)(&mut Random(seed)), &format!("seed {seed}"));
            seed += 1;
        }
    }
}

/// Sessions that only ended at their first message would show nothing.
#[test]
fn sessions_reach_the_kernels_and_the_checks() {
    let mut all = Tally::default();
    for seed in 0..500 {
        let bytes = (session::TARGET.draw)(&mut Random(seed << 32));
        let Tally { read, failed, ended } = session::run(&bytes);
        all =
            Tally { read: all.read + read, failed: all.failed + failed, ended: all.ended + ended };
    }
    assert!(all.read > 500 && all.failed > 100 && all.ended > 5, "{all:?}");
}
