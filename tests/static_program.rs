//! The program as an example target, to be linked statically: `tests/system/empty_root.rs` has
//! cargo build it beside the binary that all other tests run.

use std::process::ExitCode;

fn main() -> ExitCode {
    zuul_fingergw::cli::run()
}
