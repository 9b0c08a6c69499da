//! See `zuul_fingergw::fuzzing::zuul_conf`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| zuul_fingergw::fuzzing::zuul_conf(data));
