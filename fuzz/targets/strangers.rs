//! What is read before a token is accepted, and pairing URLs.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tiny_sd_fuzz::fuzz("strangers", bytes));
