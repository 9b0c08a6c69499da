//! placeholder
use clap::Args;
#[derive(Args)]
pub(crate) struct Options {}
pub(crate) fn run(_: &Options, _: bool) -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
