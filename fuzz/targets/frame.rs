//! A frame from a stranger, either way: decoding it gives messages or an error.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tiny_sd_fuzz::fuzz("frame", bytes));
