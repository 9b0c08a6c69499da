//! The soak: mixed load, faults drawn at random, every byte compared; run by `tests/soak/run`.
//!
//! What must be true whatever is broken (`load`, `journal`):
//!
//! - Each byte of a log is the one that was sent at its place: nothing lost, doubled or mixed.
//! - A log that ended as finished is whole. One that is not ends as a cut. (A plain client cannot
//!   tell if the gateway that it speaks to itself is killed: the kernel makes that end.)
//! - What only a fault explains happens only to requests that needed what it broke, while it was
//!   broken and until all was well again: not served at all, or cut.
//! - All is well again by itself (`lab`), and in the end nothing is left over (`usage`).
//!
//! A seed repeats what is drawn, not when it meets what.

mod builds;
mod executor;
mod faults;
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
use crate::faults::LANES;
use crate::lab::{GATEWAYS, Lab};
use crate::report::Report;

/// Loads five gateways in two zones while parts of it all are broken, and compares every byte.
#[derive(Parser)]
#[command(name = "tests/soak/run")]
struct Arguments {
    /// How long faults go on.
    #[arg(default_value_t = 30.0)]
    minutes: f64,
    /// What all that is drawn follows from; printed.
    seed: Option<u64>,
    /// Clients at once.
    #[arg(long, default_value_t = 60)]
    clients: usize,
    /// Where the report and the gateways' logs go.
    #[arg(long, value_name = "DIRECTORY", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/target/soak"))]
    output: PathBuf,
    /// `cargo bench` says so.
    #[arg(long, hide = true)]
    bench: bool,
}

/// The load before the first measurement and behind the last fault, as a part of the whole: as much
/// as fills what a gateway keeps for later.
const WARM_UP: f64 = 0.1;
const WARM_UP_MIN: Duration = Duration::from_secs(15);

fn main() -> ExitCode {
    // The role is no one's to choose, so it is no part of the usage.
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
    eprintln!("soak: {} min of faults, seed {seed}", arguments.minutes);
    let mut rng = fastrand::Rng::with_seed(seed);
    let output = &arguments.output;
    fs::create_dir_all(output).with_context(|| output.display().to_string())?;
    for (name, _) in GATEWAYS {
        // Of an earlier run.
        let _ = fs::remove_file(output.join(format!("{name}.log")));
    }
    let lab = Lab::start(output).await?;
    let builds = Arc::new(Builds::new(&lab, &mut rng).await);
    let probes = Arc::new(Builds::probes(&lab, &mut rng).await);
    let changes = {
        let (lab, builds, rng) = (Arc::clone(&lab), Arc::clone(&builds), rng.fork());
        tokio::spawn(async move { builds.come_and_go(&lab, rng).await })
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
    watch(&lab, began, long).await;
    stop.store(true, Ordering::Relaxed);
    for lane in lanes {
        lane.await.context("a lane of faults")?;
    }
    eprintln!("soak: faults are over, {} s of peace", warm_up.as_secs());
    sleep(warm_up).await;
    load.stop().await;
    changes.abort();
    let lasted = began.elapsed();
    let after = usage::settled(&lab, Some(&before)).await?;
    let tcp_memory = (tcp_before, usage::tcp_memory()?);
    registered(&lab).await;

    let excused = lab.journal.judge();
    let violations = lab.journal.violations();
    let report = Report {
        seed,
        lasted,
        clients: arguments.clients,
        totals: lab.journal.take_totals(),
        faults: lab.journal.faults(),
        excused,
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

/// Says now and then how it goes.
async fn watch(lab: &Lab, began: Instant, long: Duration) {
    while let Some(left) = long.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) {
        sleep(left.min(Duration::from_secs(60))).await;
        let faults: u64 = lab.journal.faults().values().map(|tried| tried.times).sum();
        let violations = lab.journal.violations().len();
        eprintln!(
            "soak: {} s, {faults} faults, {violations} violations so far",
            began.elapsed().as_secs()
        );
    }
}

/// Every gateway has one entry, no more and no less. One without a zone announces no port.
async fn registered(lab: &Lab) {
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
        lab.journal.violation(format!("registered are {ports:?} instead of {expected:?}"));
    }
}

/// Clients at work.
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

    /// Lets each end what it is at.
    async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.expect("a client does not panic");
        }
    }
}
