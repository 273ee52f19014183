//! Weight files of anybody's.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tiny_sd_fuzz::fuzz("weights", bytes));
