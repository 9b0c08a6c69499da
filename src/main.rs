//! The `zuul-fingergw` program: see the library for all of it.

use std::process::ExitCode;

fn main() -> ExitCode {
    zuul_fingergw::cli::run()
}
