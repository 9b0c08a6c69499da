//! See `zuul_fingergw::fuzzing::log_config`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| zuul_fingergw::fuzzing::log_config(data));
