//! A counted run of a target on bytes from seeds, on any toolchain: `counted TARGET COUNT [SEED]`.
//! Every panic ends it, those that a worker would have caught included.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tiny_sd_fuzz::{Random, TARGETS, run, target, warm_up};

/// Where the last panic was.
static PANIC: Mutex<Option<String>> = Mutex::new(None);
static PANICS: AtomicU64 = AtomicU64::new(0);

fn main() {
    let mut arguments = std::env::args().skip(1);
    let found = arguments.next().and_then(|name| target(&name));
    let numbers: Vec<u64> = arguments.filter_map(|number| number.parse().ok()).collect();
    let (Some(target), Some(&count)) = (found, numbers.first()) else {
        let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
        eprintln!("counted TARGET COUNT [SEED], where TARGET is one of {}", names.join(", "));
        std::process::exit(2);
    };
    std::panic::set_hook(Box::new(|panic| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        *PANIC.lock().expect("nobody panics here") = Some(panic.to_string());
    }));
    if std::panic::catch_unwind(|| warm_up(target)).is_err() {
        let panic = PANIC.lock().expect("nobody panics there").take().unwrap_or_default();
        eprintln!("{} at the start: {panic}", target.name);
        std::process::exit(1);
    }
    let first = numbers.get(1).copied().unwrap_or(1) << 40;
    let (began, mut peak) = (Instant::now(), 0);
    for seed in first..first + count {
        let bytes = (target.draw)(&mut Random(seed));
        let survived = std::panic::catch_unwind(|| run(target, &bytes));
        if PANICS.load(Ordering::Relaxed) > 0 {
            let panic = PANIC.lock().expect("nobody panics there").take().unwrap_or_default();
            eprintln!("{} of seed {seed}: {panic}\n{bytes:?}", target.name);
            std::process::exit(1);
        }
        peak = peak.max(survived.unwrap_or(0));
    }
    println!(
        "{}: {count} executions from seed {first}, no panic, at most {peak} bytes of memory at \
         once, {:.0} s",
        target.name,
        began.elapsed().as_secs_f64()
    );
}
