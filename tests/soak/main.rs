//! The soak test: mixed load and random failures, with every byte compared. Run by
//! `tests/soak/run`.
//!
//! What must be true during all failures (`load`, `journal`):
//!
//! - Each byte of a log is the one that was sent at its position: no byte is lost, duplicated or
//!   mixed.
//! - A log that ends as finished is complete; an incomplete one ends with a reset. Exception: if the
//!   gateway that a plain client is connected to is killed, the kernel ends the connection in order.
//! - A request is refused or aborted only if it needed a part that failed, and only between the
//!   failure and the recovery.
//! - The system recovers by itself (`lab`) and leaks nothing (`usage`).
//!
//! A seed repeats the random choices, but not their timing.

mod builds;
mod executor;
mod failures;
mod journal;
mod lab;
mod load;
mod log;
mod report;
#[allow(dead_code, reason = "shared with the test binaries")]
#[path = "../support/mod.rs"]
mod support;
mod usage;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::builds::Builds;
use crate::failures::LANES;
use crate::lab::{GATEWAYS, Lab};
use crate::report::Report;

/// Loads five gateways in two zones while parts of the system fail, and compares every byte.
#[derive(Parser)]
#[command(name = "tests/soak/run")]
struct Arguments {
    /// Minutes of failures.
    #[arg(default_value_t = 30.0)]
    minutes: f64,
    /// The seed of all random choices. Default: a random one, which is printed.
    seed: Option<u64>,
    /// Concurrent clients.
    #[arg(long, default_value_t = 60)]
    clients: usize,
    /// The directory of the report and the gateways' logs.
    #[arg(long, value_name = "DIRECTORY", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/target/soak"))]
    output: PathBuf,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// The time of load before the first measurement and after the last failure, as a share of the
/// whole: enough to fill caches and pools of the gateways.
const WARM_UP: f64 = 0.1;
const WARM_UP_MIN: Duration = Duration::from_secs(15);

fn main() -> ExitCode {
    // The role is started by the driver only, so the usage does not list it.
    let outcome = match std::env::args().nth(1).as_deref() {
        Some("executor") => executor::run().map(|()| 0),
        _ => tokio::runtime::Runtime::new()
            .map_err(Into::into)
            .and_then(|runtime| runtime.block_on(soak(Arguments::parse()))),
    };
    match outcome {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the number of violations.
async fn soak(arguments: Arguments) -> Result<usize> {
    let seed = arguments.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    let long = Duration::from_secs_f64(arguments.minutes * 60.0);
    let warm_up = long.mul_f64(WARM_UP).max(WARM_UP_MIN);
    eprintln!("soak: {} min of failures, seed {seed}", arguments.minutes);
    let mut rng = fastrand::Rng::with_seed(seed);
    let output = &arguments.output;
    fs::create_dir_all(output).with_context(|| output.display().to_string())?;
    for (name, _) in GATEWAYS {
        // The log of an earlier run.
        let _ = fs::remove_file(output.join(format!("{name}.log")));
    }
    let lab = Lab::start(output).await?;
    let builds = Arc::new(Builds::new(&lab, &mut rng).await);
    let probes = Arc::new(Builds::probes(&lab, &mut rng).await);
    let changes = {
        let (lab, builds, rng) = (Arc::clone(&lab), Arc::clone(&builds), rng.fork());
        tokio::spawn(async move { builds.replace_forever(&lab, rng).await })
    };

    eprintln!("soak: warming up for {} s", warm_up.as_secs());
    let load = Load::start(&lab, &builds, arguments.clients, &mut rng);
    sleep(warm_up).await;
    load.stop().await;
    let before = usage::settled(&lab, None).await?;
    let tcp_before = usage::tcp_memory()?;
    lab.journal.take_totals();

    let began = Instant::now();
    let load = Load::start(&lab, &builds, arguments.clients, &mut rng);
    let stop = Arc::new(AtomicBool::new(false));
    let lanes: Vec<JoinHandle<()>> = LANES
        .iter()
        .map(|lane| {
            let (lab, probes, stop) = (Arc::clone(&lab), Arc::clone(&probes), Arc::clone(&stop));
            let rng = rng.fork();
            tokio::spawn(async move { lane.run(&lab, &probes, &stop, rng).await })
        })
        .collect();
    print_progress(&lab, began, long).await;
    stop.store(true, Ordering::Relaxed);
    for lane in lanes {
        lane.await.context("a lane of failures")?;
    }
    eprintln!("soak: failures are over, {} s of load without failures", warm_up.as_secs());
    sleep(warm_up).await;
    load.stop().await;
    changes.abort();
    let lasted = began.elapsed();
    let after = usage::settled(&lab, Some(&before)).await?;
    let tcp_memory = (tcp_before, usage::tcp_memory()?);
    check_registry(&lab).await;

    let explained = lab.journal.explain();
    let violations = lab.journal.violations();
    let report = Report {
        seed,
        lasted,
        clients: arguments.clients,
        totals: lab.journal.take_totals(),
        failures: lab.journal.failures(),
        explained,
        before,
        after,
        tcp_memory,
        violations: violations.len(),
    };
    println!("{report}");
    for violation in &violations {
        println!("VIOLATION: {violation}");
    }
    fs::write(output.join("report.md"), report.to_string())?;
    Ok(violations.len())
}

/// Prints the progress every minute.
async fn print_progress(lab: &Lab, began: Instant, long: Duration) {
    while let Some(left) = long.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) {
        sleep(left.min(Duration::from_secs(60))).await;
        let failures: u64 = lab.journal.failures().values().map(|summary| summary.times).sum();
        let violations = lab.journal.violations().len();
        eprintln!(
            "soak: {} s, {failures} failures, {violations} violations so far",
            began.elapsed().as_secs()
        );
    }
}

/// Checks that every gateway has exactly one entry. One without a zone registers no port.
async fn check_registry(lab: &Lab) {
    let mut ports: Vec<_> = lab
        .system
        .entries()
        .await
        .iter()
        .map(|entry| entry.content["public_port"].as_u64())
        .collect();
    let mut expected: Vec<_> = GATEWAYS
        .iter()
        .zip(&lab.links)
        .map(|((_, zone), link)| zone.map(|_| u64::from(link.address.port())))
        .collect();
    ports.sort_unstable();
    expected.sort_unstable();
    if ports != expected {
        lab.journal.violation(format!("registered ports are {ports:?} instead of {expected:?}"));
    }
}

/// Running clients.
struct Load {
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(
        lab: &Arc<Lab>,
        builds: &Arc<Builds>,
        clients: usize,
        rng: &mut fastrand::Rng,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let tasks = (0..clients)
            .map(|_| {
                let (lab, builds, stop) = (Arc::clone(lab), Arc::clone(builds), Arc::clone(&stop));
                let rng = rng.fork();
                tokio::spawn(async move { load::run(&lab, &builds, &stop, rng).await })
            })
            .collect();
        Self { stop, tasks }
    }

    /// Stops the clients after their current requests.
    async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.expect("a client does not panic");
        }
    }
}
