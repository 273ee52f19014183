//! Any bytes as a file of the worker's cache: they are the weight, or an error.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tiny_sd_fuzz::fuzz("cache", bytes));
