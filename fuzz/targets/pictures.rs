//! Pictures of anybody's, and what they say of themselves.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tiny_sd_fuzz::fuzz("pictures", bytes));
