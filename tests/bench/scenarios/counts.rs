//! Counts that do not depend on the load of the machine: system calls (strace); instructions,
//! allocations, and the memory of an idle stream (valgrind, for this gateway, as the difference
//! between two runs, one twice as long).
//!
//! These tools slow all processes down, so that work is done in smaller portions, with more system
//! calls per MiB.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use tempfile::TempDir;

use super::{Effort, quiet, start};
use crate::client::{self, Bulk, Opened};
use crate::lab::Lab;
use crate::log::{Log, SHORT};
use crate::process::Process;
use crate::sample::{Entry, Figures};
use crate::targets::{Kind, Running, StartOptions};

pub(crate) const COLUMNS: &[&str] = &[
    "system calls/request",
    "system calls/MiB",
    "system calls/line",
    "instructions/request",
    "allocations/request",
    "allocated KiB/request",
    "allocations/idle stream",
    "bytes/idle stream",
];

/// The streams that receive lines, and the lines of each.
const STREAMS: usize = 50;
const WAVES: usize = 4;

/// The time limit for strace to attach.
const ATTACHING: Duration = Duration::from_secs(10);

/// Counts of one target. The output of strace and valgrind goes into `directory`.
pub(crate) async fn measure(
    entry: Entry,
    lab: &mut Lab,
    effort: Effort,
    directory: &Path,
) -> Result<Figures> {
    let mut figures = Figures::new();
    let target = start(entry, lab).await?;
    let file = |what: &str| {
        let name = format!("{entry} {what}").replace([' ', ','], "-").replace("--", "-");
        directory.join(format!("{name}.strace"))
    };

    let count = effort.requests;
    let builds = builds(&target, entry, count).await?;
    let trace = Trace::attach(&target, &file("request")).await?;
    request(lab, &target, &builds, count).await?;
    figures.insert("system calls/request", trace.calls().await? / count as f64);

    if !entry.cold {
        let build = target.builds(Log::Bulk(effort.milliseconds), 1).await?;
        let trace = Trace::attach(&target, &file("MiB")).await?;
        let job = client::Job::Bulk { address: target.address, builds: build };
        let bulk: Bulk = lab.client.run(&job).await?;
        let mib = bulk.bytes as f64 / f64::from(1 << 20);
        figures.insert("system calls/MiB", trace.calls().await? / mib);

        let builds = target.builds(Log::Quiet, STREAMS).await?;
        open(lab, &target, builds).await?;
        let trace = Trace::attach(&target, &file("line")).await?;
        for _ in 0..WAVES {
            quiet::lines(lab, 100).await?;
        }
        let lines = (STREAMS * WAVES) as f64;
        figures.insert("system calls/line", trace.calls().await? / lines);
        lab.end_quiet().await?;
    }
    drop(target);

    if matches!(entry.kind, Kind::Ours(_) | Kind::OursPair(_)) {
        let tool = Tool::Callgrind;
        let [instructions] = difference(entry, lab, effort, tool, directory).await?;
        figures.insert("instructions/request", instructions);
        let tool = Tool::Dhat;
        let [bytes, blocks] = difference(entry, lab, effort, tool, directory).await?;
        figures.insert("allocations/request", blocks);
        figures.insert("allocated KiB/request", bytes / 1024.0);
        if !entry.cold {
            let tool = Tool::DhatOfStreams;
            let [bytes, blocks] = difference(entry, lab, effort, tool, directory).await?;
            figures.insert("allocations/idle stream", blocks);
            figures.insert("bytes/idle stream", bytes);
        }
    }
    Ok(figures)
}

/// A build for each request, or the same one for all.
async fn builds(target: &Running, entry: Entry, count: usize) -> Result<Vec<String>> {
    let distinct = if entry.cold { count } else { 1 };
    let builds = target.builds(Log::Short(SHORT), distinct).await?;
    Ok(builds.into_iter().cycle().take(count).collect())
}

async fn request(lab: &mut Lab, target: &Running, builds: &[String], count: usize) -> Result<()> {
    let requests = lab.requests(target, builds, true, 1, 300_000).await?;
    ensure!(requests.served == count, "only {} of {count} requests served", requests.served);
    Ok(())
}

/// Opens an idle stream for each of `builds`.
async fn open(lab: &mut Lab, target: &Running, builds: Vec<String>) -> Result<()> {
    let count = builds.len();
    let job = client::Job::Open { address: target.address, builds, concurrency: 4 };
    let opened: Opened = lab.client.run(&job).await?;
    ensure!(opened.open == count, "only {} of {count} streams", opened.open);
    Ok(())
}

/// strace on all processes of a target.
struct Trace {
    strace: Process,
    output: std::path::PathBuf,
    _directory: TempDir,
}

impl Trace {
    async fn attach(target: &Running, output: &Path) -> Result<Self> {
        let directory = TempDir::new()?;
        let mut command = Command::new("strace");
        command.args(["-f", "-c", "-S", "calls", "-o"]).arg(output);
        for process in &target.processes {
            command.args(["-p", &process.id().to_string()]);
        }
        let mut strace = Process::start("strace", &command, &directory.path().join("log"))?;
        let start = Instant::now();
        // It prints this for each process.
        while strace.output().matches(" attached").count() < target.processes.len() {
            strace.still_runs()?;
            ensure!(start.elapsed() < ATTACHING, "strace does not attach: {}", strace.output());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(Self { strace, output: output.to_owned(), _directory: directory })
    }

    /// Returns the number of all system calls.
    async fn calls(mut self) -> Result<f64> {
        self.strace.end(Signal::INT).await?;
        let table = fs::read_to_string(&self.output)?;
        // "100.00    0.001234           1      1234       12 total"
        let total = table.lines().find(|line| line.trim_end().ends_with(" total"));
        let calls = total.and_then(|line| line.split_whitespace().nth(3)?.parse().ok());
        calls.with_context(|| format!("no total in {}", self.output.display()))
    }
}

#[derive(Clone, Copy)]
enum Tool {
    /// Instructions.
    Callgrind,
    /// All allocations.
    Dhat,
    /// Allocations at their peak, which is while all streams are open.
    DhatOfStreams,
}

/// The cost per request or stream: the difference between a run and one with twice as many, which
/// leaves out startup and shutdown.
async fn difference<const N: usize>(
    entry: Entry,
    lab: &mut Lab,
    effort: Effort,
    tool: Tool,
    directory: &Path,
) -> Result<[f64; N]> {
    let mut totals = [[0.0; N]; 2];
    for (times, totals) in [1, 2].into_iter().zip(&mut totals) {
        let count = effort.requests * times;
        *totals = run(entry, lab, count, tool, directory).await?;
    }
    let [once, twice] = totals;
    Ok(std::array::from_fn(|which| (twice[which] - once[which]) / effort.requests as f64))
}

async fn run<const N: usize>(
    entry: Entry,
    lab: &mut Lab,
    count: usize,
    tool: Tool,
    directory: &Path,
) -> Result<[f64; N]> {
    let name = format!("{entry}").replace([' ', ','], "-").replace("--", "-");
    let out = |tool: &str| format!("{}/{name}.%p.{tool}", directory.display());
    let (options, marker) = match tool {
        Tool::Callgrind => (
            vec![
                "--tool=callgrind".to_owned(),
                format!("--callgrind-out-file={}", out("callgrind")),
            ],
            "Collected :",
        ),
        Tool::Dhat | Tool::DhatOfStreams => (
            vec!["--tool=dhat".to_owned(), format!("--dhat-out-file={}", out("dhat"))],
            if matches!(tool, Tool::Dhat) { "Total:" } else { "At t-gmax:" },
        ),
    };
    let wrapper = [vec!["valgrind".to_owned()], options].concat();
    let start_options = StartOptions { wrapper, ..StartOptions::default() };
    let target = Running::start(entry.kind, &start_options, lab).await?;
    target.warm_up(20, lab).await?;
    if matches!(tool, Tool::DhatOfStreams) {
        let builds = target.builds(Log::Quiet, count).await?;
        open(lab, &target, builds).await?;
        lab.end_quiet().await?;
    } else {
        let builds = builds(&target, entry, count).await?;
        request(lab, &target, &builds, count).await?;
    }
    let mut sum = [0.0; N];
    for text in target.end().await? {
        let line = text.lines().find(|line| line.contains(marker));
        let line = line.with_context(|| format!("no counts of valgrind:\n{text}"))?;
        // "==123== Collected : 1234", "==123== Total:     1,234 bytes in 56 blocks" and the same
        // after "At t-gmax:"
        let (_, rest) = line.split_once(marker).context("the marker")?;
        let rest = rest.replace(',', "");
        let mut numbers = rest.split_whitespace().filter_map(|word| word.parse::<f64>().ok());
        for sum in &mut sum {
            *sum += numbers.next().with_context(|| format!("too few numbers: {line}"))?;
        }
    }
    Ok(sum)
}
