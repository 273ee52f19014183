//! Who may knock: how many connections may be without an accepted token at a time, in all and from
//! one address, and how long a wrong token waits for its answer. Separate because it decides
//! without sockets and clocks: addresses and times are arguments.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// Addresses that are remembered; beyond it the oldest is forgotten.
const MAX_ADDRESSES: usize = 1024;
/// A wrong token is forgotten after this time.
const MEMORY: Duration = Duration::from_secs(600);
/// Each further wrong token doubles the delay, at most to this.
const MAX_DELAY: Duration = Duration::from_secs(4);
/// Wrong tokens in [`MEMORY`] after which an address is not answered at all.
const MAX_FAILURES: u32 = 64;

/// The caps.
#[derive(Debug, Clone, Copy)]
pub struct Caps {
    /// Connections without an accepted token, in all.
    pub pending: usize,
    /// Of these, from one address.
    pub pending_per_address: usize,
    /// How long the first wrong token of an address waits for its answer.
    pub wrong_token_delay: Duration,
}

/// What to do with somebody who knocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Go on with the handshake; [`Admission::left`] must follow.
    Admit,
    /// Let it first show that its address is its own.
    Validate,
    /// Not now.
    Refuse,
}

/// The connections that have not shown a token yet.
#[derive(Debug)]
pub struct Admission {
    caps: Caps,
    pending: usize,
    addresses: HashMap<IpAddr, Address>,
}

#[derive(Debug)]
struct Address {
    pending: usize,
    failures: u32,
    seen: Instant,
}

impl Admission {
    /// Nobody has knocked yet.
    pub fn new(caps: Caps) -> Self {
        Self { caps, pending: 0, addresses: HashMap::new() }
    }

    /// Somebody knocks at `now`. An address is `validated` if packets to it were answered: a forged
    /// one must neither use up the places nor those of the address that it pretends to be.
    pub fn knock(&mut self, ip: IpAddr, validated: bool, now: Instant) -> Verdict {
        let network = network(ip);
        self.forget(network, now);
        let address = self.addresses.get(&network);
        let (pending, failures) = address.map_or((0, 0), |a| (a.pending, a.failures));
        if self.pending >= self.caps.pending || self.is_full() && address.is_none() {
            return Verdict::Refuse;
        }
        let is_crowded = self.pending >= self.caps.pending / 2
            || pending >= self.caps.pending_per_address / 2
            || failures > 0;
        if is_crowded && !validated {
            return Verdict::Validate;
        }
        if pending >= self.caps.pending_per_address || failures >= MAX_FAILURES {
            return Verdict::Refuse;
        }
        let fresh = Address { pending: 0, failures: 0, seen: now };
        let address = self.addresses.entry(network).or_insert(fresh);
        address.pending += 1;
        address.seen = now;
        self.pending += 1;
        Verdict::Admit
    }

    /// A wrong token: how long to wait before saying so.
    pub fn failed(&mut self, ip: IpAddr, now: Instant) -> Duration {
        let Some(address) = self.addresses.get_mut(&network(ip)) else { return MAX_DELAY };
        let doublings = address.failures.min(16);
        address.failures = address.failures.saturating_add(1);
        address.seen = now;
        self.caps.wrong_token_delay.saturating_mul(1 << doublings).min(MAX_DELAY)
    }

    /// The right token: earlier wrong ones are forgiven.
    pub fn passed(&mut self, ip: IpAddr) {
        if let Some(address) = self.addresses.get_mut(&network(ip)) {
            address.failures = 0;
        }
    }

    /// A connection that was admitted is gone, or has shown its token.
    pub fn left(&mut self, ip: IpAddr) {
        self.pending = self.pending.saturating_sub(1);
        let network = network(ip);
        if let Some(address) = self.addresses.get_mut(&network) {
            address.pending = address.pending.saturating_sub(1);
            if address.pending == 0 && address.failures == 0 {
                self.addresses.remove(&network);
            }
        }
    }

    fn is_full(&self) -> bool {
        self.addresses.len() >= MAX_ADDRESSES
    }

    /// Old failures, and under pressure the oldest that nobody waits on.
    fn forget(&mut self, network: IpAddr, now: Instant) {
        let is_old = |address: &Address| now.saturating_duration_since(address.seen) > MEMORY;
        if let Some(address) = self.addresses.get_mut(&network).filter(|address| is_old(address)) {
            address.failures = 0;
        }
        if self.is_full() {
            self.addresses.retain(|_, address| address.pending > 0 || !is_old(address));
        }
        if self.is_full() {
            let idle = self.addresses.iter().filter(|(_, address)| address.pending == 0);
            if let Some(oldest) = idle.min_by_key(|(_, a)| a.seen).map(|(network, _)| *network) {
                self.addresses.remove(&oldest);
            }
        }
    }
}

/// One IPv4 address, or what one IPv6 customer has at the least: a /64.
fn network(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V4(ip) => IpAddr::V4(ip),
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn admission(pending: usize, pending_per_address: usize) -> (Admission, Instant) {
        let caps = Caps { pending, pending_per_address, wrong_token_delay: SECOND };
        (Admission::new(caps), Instant::now())
    }

    fn ip(n: u32) -> IpAddr {
        IpAddr::V4(n.into())
    }

    #[test]
    fn one_address_cannot_take_all_places() {
        let (mut admission, now) = admission(100, 4);
        let mut knock = |validated| admission.knock(ip(1), validated, now);
        assert_eq!([knock(false), knock(false)], [Verdict::Admit; 2]);
        assert_eq!(knock(false), Verdict::Validate);
        assert_eq!([knock(true), knock(true)], [Verdict::Admit; 2]);
        assert_eq!(knock(true), Verdict::Refuse);
        assert_eq!(admission.knock(ip(2), false, now), Verdict::Admit);
        admission.left(ip(1));
        assert_eq!(admission.knock(ip(1), true, now), Verdict::Admit);
    }

    #[test]
    fn all_addresses_together_cannot_take_more_than_all_places() {
        let (mut admission, now) = admission(4, 4);
        let knocks: Vec<_> = (0..6).map(|n| admission.knock(ip(n), true, now)).collect();
        assert_eq!(knocks[..4], [Verdict::Admit; 4]);
        assert_eq!(knocks[4..], [Verdict::Refuse; 2]);
    }

    #[test]
    fn guessing_gets_slower_and_then_no_answer() {
        let (mut admission, now) = admission(8, 8);
        let mut delays = Vec::new();
        for _ in 0..MAX_FAILURES {
            assert_eq!(admission.knock(ip(1), true, now), Verdict::Admit);
            delays.push(admission.failed(ip(1), now).as_secs());
            admission.left(ip(1));
        }
        assert_eq!(delays[..4], [1, 2, 4, 4]);
        assert_eq!(admission.knock(ip(1), true, now), Verdict::Refuse);
        assert_eq!(admission.knock(ip(1), true, now + MEMORY + SECOND), Verdict::Admit);
    }

    #[test]
    fn the_right_token_forgives() {
        let (mut admission, now) = admission(8, 8);
        admission.knock(ip(1), true, now);
        admission.failed(ip(1), now);
        admission.passed(ip(1));
        assert_eq!(admission.failed(ip(1), now), SECOND);
    }

    #[test]
    fn the_memory_is_capped() {
        let (mut admission, now) = admission(8, 8);
        for n in 0..5000 {
            assert_eq!(admission.knock(ip(n), true, now), Verdict::Admit);
            admission.failed(ip(n), now);
            admission.left(ip(n));
        }
        assert!(admission.addresses.len() <= MAX_ADDRESSES);
    }

    #[test]
    fn an_ipv6_network_counts_as_one_address() {
        let (mut admission, now) = admission(100, 1);
        let [a, b] = ["2001:db8::1", "2001:db8::2"].map(|ip| ip.parse().unwrap());
        assert_eq!(admission.knock(a, true, now), Verdict::Admit);
        assert_eq!(admission.knock(b, true, now), Verdict::Refuse);
    }
}
