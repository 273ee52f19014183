//! The device across the network: every op is shipped to a worker that owns buffers and runs ops.
//!
//! The path of an op: `storage → client → message → quic → worker → executor → heap → op → kernel`.

pub mod admission;
pub mod client;
pub mod device;
pub mod digests;
pub mod disk_library;
pub mod executor;
pub mod heap;
pub mod hello;
pub mod library;
pub mod loopback;
pub mod message;
pub mod op;
mod program;
pub mod queue;
pub mod quic;
pub mod storage;
mod transcript;
pub mod transport;
pub mod trust;
pub mod turns;
pub mod upload;
pub mod url;
pub mod wire;
pub mod wire_form;
pub mod worker;

/// Of the protocol; a change that an older side would misunderstand raises it. The hash of the op
/// tables does not see it where messages, operands or replies take other bytes.
pub const PROTOCOL_VERSION: u16 = 2;

/// A hash of the tables of ops: client and worker must have the same.
pub fn schema() -> [u8; 16] {
    let mut short = [0; 16];
    short.copy_from_slice(&blake3::hash(wire::SCHEMA.as_bytes()).as_bytes()[..16]);
    short
}
