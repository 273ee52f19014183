//! The integration tests: one crate, so that it links once.

mod batch;
mod cli;
mod end_to_end;
mod faults;
mod fuzzing;
mod golden;
mod hub;
mod kernel_paths;
mod kernels;
mod metadata;
mod null;
mod numbers;
mod peer;
mod pictures;
mod processes;
mod protocol;
mod quic;
mod remote;
mod second_oracle;
mod small_ops;
mod structure;
mod together;
mod twin;
mod udp_proxy;
mod views;
mod winograd;
