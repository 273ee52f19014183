//! The bytes of strangers: targets that turn any bytes into a run of the code that meets them, and
//! seeded bytes that come close to what it accepts. Separate because the same targets run under
//! libFuzzer and counted (`fuzz/`), and for a moment in every test run.

mod cache;
mod choices;
mod frame;
mod pictures;
mod session;
mod strangers;
#[cfg(test)]
mod tests;
mod weights;

use crate::numbers::Random;

/// Something that meets bytes of strangers.
pub struct Target {
    /// As in `fuzz/targets` and `fuzz/seeds`.
    pub name: &'static str,
    /// Runs it; whatever the bytes are, it must not panic.
    pub run: fn(&[u8]),
    /// Bytes that come close to what it accepts.
    pub draw: fn(&mut Random) -> Vec<u8>,
    /// How many bytes of memory it may take at once, for an input of so many.
    #[cfg_attr(test, allow(dead_code, reason = "memory is counted in `fuzz/`"))]
    pub max_memory_bytes: fn(usize) -> usize,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    frame::TARGET,
    session::TARGET,
    cache::TARGET,
    cache::FILES,
    strangers::TARGET,
    pictures::TARGET,
    weights::TARGET,
];

/// The target of a name.
#[cfg(not(test))]
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// `len` random bytes.
fn noise(random: &mut Random, len: usize) -> Vec<u8> {
    (0..len).map(|_| random.bits() as u8).collect()
}

/// Bytes with a few of them changed, cut off or put in.
fn damaged(random: &mut Random, bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..random.below(4) {
        if bytes.is_empty() {
            break;
        }
        let place = random.below(bytes.len());
        match random.below(8) {
            0 => bytes.truncate(place),
            1 => bytes.insert(place, random.bits() as u8),
            2 => bytes[place] ^= 1 << random.below(8),
            3 => bytes[place] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            _ => bytes[place] = random.bits() as u8,
        }
    }
    bytes
}
