//! See `zuul_fingergw::fuzzing::build_request`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| zuul_fingergw::fuzzing::build_request(data));
