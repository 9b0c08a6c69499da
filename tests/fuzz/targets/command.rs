//! See `zuul_fingergw::fuzzing::command`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| zuul_fingergw::fuzzing::command(data));
