//! The measurements of docs/performance.md: load generator and driver in one program, run by
//! `tests/bench/run`.
//!
//! The driver starts a real ZooKeeper, an executor, a client and the targets (`targets`). It
//! measures the scenarios in rounds (`rounds`) and writes every sample as JSON, a report, and
//! plots.

mod client;
mod clock;
mod executor;
mod goals;
mod lab;
mod log;
mod machine;
mod plots;
mod process;
mod report;
mod role;
mod rounds;
mod sample;
mod scenarios;
mod statistics;
#[allow(dead_code, reason = "shared with the test binaries")]
#[path = "../support/mod.rs"]
mod support;
mod targets;
mod zuul;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser;

use crate::lab::Lab;
use crate::report::Report;
use crate::rounds::Rounds;
use crate::scenarios::{Effort, Scenario};

/// Measures this gateway, Zuul's gateway, haproxy, and a direct connection.
#[derive(Parser)]
#[command(name = "tests/bench/run")]
struct Arguments {
    /// Scenarios: bulk, requests, first-byte, zones, quiet, burst, idle, counts; or one size of a
    /// scenario, such as bulk-8 or quiet-9000. Default: all.
    scenarios: Vec<String>,
    /// How often each target is measured. Default: 7, or 3 with --quick.
    #[arg(long)]
    rounds: Option<usize>,
    /// Short measurements, not for published figures.
    #[arg(long)]
    quick: bool,
    /// Do not discard measurements that other processes disturbed; the report says so.
    #[arg(long)]
    allow_noise: bool,
    /// CPU time that other processes may use during a measurement, in percent of the machine.
    #[arg(long, default_value_t = 5.0)]
    threshold: f64,
    /// Only targets whose name contains this; may be repeated.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Another build of this gateway to measure as well; may be repeated.
    #[arg(long, value_name = "FILE")]
    also: Vec<PathBuf>,
    /// The gateway to measure.
    #[arg(long, value_name = "FILE", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/target/dist/zuul-fingergw"))]
    gateway: PathBuf,
    /// The directory of the report.
    #[arg(long, value_name = "DIRECTORY", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/target/bench"))]
    output: PathBuf,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    // Roles are started by the driver only, so the usage does not list them.
    let outcome = match std::env::args().nth(1).as_deref() {
        Some("executor") => executor::run(),
        Some("client") => client::run(),
        _ => drive(Arguments::parse()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("figures: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn drive(arguments: Arguments) -> Result<()> {
    let scenarios: Vec<Scenario> = match arguments.scenarios.as_slice() {
        [] => Scenario::all(),
        names => {
            names.iter().map(|name| Scenario::named(name)).collect::<Result<Vec<_>>>()?.concat()
        }
    };
    let descriptors = machine::raise_descriptors()?;
    let rounds = Rounds {
        rounds: arguments.rounds.unwrap_or(if arguments.quick { 3 } else { 7 }),
        effort: if arguments.quick { Effort::QUICK } else { Effort::FULL },
        threshold: arguments.threshold / 100.0,
        allow_noise: arguments.allow_noise,
        also: arguments.also.len(),
        only: arguments.only,
    };
    fs::create_dir_all(&arguments.output)
        .with_context(|| arguments.output.display().to_string())?;
    let gateways = [vec![arguments.gateway], arguments.also].concat();
    let mut report = Report::new(&rounds, descriptors, &gateways);
    // The kernel ends child processes when the thread that started them ends (PR_SET_PDEATHSIG):
    // the main thread, which lives as long as the driver.
    let finished = role::runtime(1)?.block_on(async {
        tokio::select! {
            measured = measure(&scenarios, &rounds, gateways, &arguments.output, &mut report) => {
                measured.map(|()| true)
            }
            interrupted = tokio::signal::ctrl_c() => interrupted.map(|()| false).map_err(Into::into),
        }
    });
    // Also if the run was interrupted.
    report.write(&arguments.output)?;
    if !finished? {
        eprintln!("interrupted; {} has the results so far", arguments.output.display());
    }
    Ok(())
}

async fn measure(
    scenarios: &[Scenario],
    rounds: &Rounds,
    gateways: Vec<PathBuf>,
    output: &Path,
    report: &mut Report,
) -> Result<()> {
    let mut lab = Lab::new(gateways).await?;
    for scenario in scenarios {
        eprintln!("{scenario}: {}", scenario.title());
        rounds.run(*scenario, &mut lab, output, |sample| report.add(sample)).await?;
        // Each scenario takes its time; what is there need not wait for the last.
        report.write(output)?;
    }
    Ok(())
}
