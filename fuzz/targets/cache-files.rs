//! A folder of damaged files as the worker's cache: what is found is right.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tiny_sd_fuzz::fuzz("cache-files", bytes));
