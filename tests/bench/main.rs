//! The measurements of docs/performance.md: load generator and driver in one program, run by
//! `tests/bench/run`.
//!
//! The driver starts everything: a real ZooKeeper, an executor, a client, and what is measured
//! (`targets`). It goes through the scenarios in rounds (`rounds`) and writes what came out: every
//! sample as JSON, a report, plots.

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

/// Measures zuul-fingergw beside upstream's, haproxy, and nothing at all.
#[derive(Parser)]
#[command(name = "tests/bench/run")]
struct Arguments {
    /// What to measure: bulk, requests, first-byte, zones, quiet, burst, idle, counts; or one size
    /// of it, as bulk-8 or quiet-9000. Everything if there is none.
    scenarios: Vec<String>,
    /// How often each target is measured.
    #[arg(long)]
    rounds: Option<usize>,
    /// Short measurements and three rounds: for a look, not for the record.
    #[arg(long)]
    quick: bool,
    /// Counts measurements that others disturbed as well, and marks the report.
    #[arg(long)]
    allow_noise: bool,
    /// What others may use of the machine during a measurement, in percent.
    #[arg(long, default_value_t = 5.0)]
    threshold: f64,
    /// Only targets whose name contains this; may be given often.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Another binary of ours to measure beside the first; may be given often.
    #[arg(long, value_name = "FILE")]
    also: Vec<PathBuf>,
    /// The gateway to measure.
    #[arg(long, value_name = "FILE", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/target/dist/zuul-fingergw"))]
    gateway: PathBuf,
    /// Where the report goes.
    #[arg(long, value_name = "DIRECTORY", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/target/bench"))]
    output: PathBuf,
    /// `cargo bench` says so.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    // The roles are no one's to choose, so they are no part of the usage.
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
    // Processes are started, and therefore ended by the kernel, with the thread that runs this: the
    // main one, which lives as long as the driver.
    let finished = role::runtime(1)?.block_on(async {
        tokio::select! {
            measured = measure(&scenarios, &rounds, gateways, &arguments.output, &mut report) => {
                measured.map(|()| true)
            }
            interrupted = tokio::signal::ctrl_c() => interrupted.map(|()| false).map_err(Into::into),
        }
    });
    // Also of a run that was cut short.
    report.write(&arguments.output)?;
    if !finished? {
        eprintln!("interrupted; {} tells what there is", arguments.output.display());
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
