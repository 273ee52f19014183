//! A session of almost valid calls: each gives a result or an error, and memory stays in its cap.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tiny_sd_fuzz::fuzz("session", bytes));
