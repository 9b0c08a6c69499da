//! `zuul-fingergw demo` in a program that was built without the Cargo feature `demo`.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Args;

/// Accepts any options, so that [`run`] is called with all of them.
#[derive(Args)]
pub(crate) struct Options {
    #[arg(hide = true, trailing_var_arg = true, allow_hyphen_values = true)]
    _ignored: Vec<OsString>,
}

/// Reports on standard error that this program has no demo.
pub(crate) fn run(_options: &Options, _debug: bool) -> ExitCode {
    eprintln!(
        "demo: this program was built without the demo (cargo's feature `demo`); use another build, \
         or in a checkout: cargo run -- demo --once"
    );
    ExitCode::FAILURE
}
