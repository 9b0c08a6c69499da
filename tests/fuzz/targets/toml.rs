//! See `zuul_fingergw::fuzzing::toml`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| zuul_fingergw::fuzzing::toml(data));
