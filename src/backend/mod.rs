//! Devices: what an op is, and who runs it.

pub mod host;
