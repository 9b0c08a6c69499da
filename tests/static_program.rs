//! The program once more, to be linked statically: `tests/system/empty_root.rs` has cargo do so beside the
//! one that all other tests run.

use std::process::ExitCode;

fn main() -> ExitCode {
    zuul_fingergw::cli::run()
}
