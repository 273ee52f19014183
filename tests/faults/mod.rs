//! What may go wrong with a worker, its client and the network between them, with the real program
//! on both sides: faults cost time or end in one clear line, never in a wrong picture.
//!
//! Where something breaks is random; the seed is printed. `scripts/faults` does more of it: it runs
//! the ignored tests, as many rounds as `TINY_SD_FAULT_ROUNDS` says, from `TINY_SD_FAULT_SEED` on.

mod cache;
mod killed;
mod network;
mod refused;
#[cfg(unix)]
mod signals;

use std::hash::{BuildHasher, Hasher};
use std::path::Path;

use crate::processes::{paint, picture, succeeds};
use crate::udp_proxy::random;

/// Random numbers from a seed that is printed.
pub struct Dice(u64);

impl Dice {
    /// `rounds` of them from new seeds, unless the environment names the first.
    pub fn some(rounds: u64) -> impl Iterator<Item = Dice> {
        let named = std::env::var("TINY_SD_FAULT_SEED").ok().map(|seed| seed.parse().unwrap());
        let random = || std::hash::RandomState::new().build_hasher().finish() >> 32;
        let first = named.unwrap_or_else(random);
        (first..first + rounds).map(|seed| {
            println!("TINY_SD_FAULT_SEED={seed}");
            Dice(seed)
        })
    }

    /// As many as `scripts/faults` asks for.
    fn many() -> impl Iterator<Item = Dice> {
        let rounds = std::env::var("TINY_SD_FAULT_ROUNDS").map(|rounds| rounds.parse().unwrap());
        Self::some(rounds.unwrap_or(20))
    }

    /// From `low` to below `high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + (random(&mut self.0) * (high - low) as f64) as u64
    }
}

/// The picture that the CPU makes here.
fn local(folder: &Path, more: &[&str]) -> (Vec<u8>, String) {
    let path = folder.join("local.png");
    succeeds(&paint("tiny", "cpu", &path, more));
    picture(&path)
}

/// What a client left of its output: all files beside those that it caches.
fn outputs(folder: &Path) -> Vec<String> {
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
    names.retain(|name| name != "client-cache" && name != "local.png");
    names
}
