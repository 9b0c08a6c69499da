//! The report as Markdown, for docs/reliability.md.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::time::Duration;

use crate::journal::{FailureSummary, Outcome, Totals};
use crate::usage::Usage;

pub(crate) struct Report {
    pub(crate) seed: u64,
    pub(crate) lasted: Duration,
    pub(crate) clients: usize,
    pub(crate) totals: Totals,
    pub(crate) failures: BTreeMap<&'static str, FailureSummary>,
    /// Requests whose outcome a failure explains.
    pub(crate) explained: usize,
    pub(crate) before: Vec<Usage>,
    pub(crate) after: Vec<Usage>,
    /// Kernel memory for TCP before and after, in KiB.
    pub(crate) tcp_memory: (u64, u64),
    pub(crate) violations: usize,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Totals { requests, streams, bytes } = &self.totals;
        let count: u64 = requests.values().flat_map(BTreeMap::values).sum();
        let failures: u64 = self.failures.values().map(|summary| summary.times).sum();
        let (minutes, seconds) = (self.lasted.as_secs() / 60, self.lasted.as_secs() % 60);
        writeln!(
            f,
            "{minutes} min {seconds} s of load with failures by {} clients (seed {}): {count} \
             requests, {streams} streams, {bytes} bytes compared, {failures} failures; {} requests met \
             a failure. Violations: **{}**.\n",
            self.clients, self.seed, self.explained, self.violations
        )?;
        self.requests(f)?;
        self.failures(f)?;
        self.usage(f)
    }
}

impl Report {
    fn requests(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut head = "| request | all".to_owned();
        let mut rule = "| --- | ---:".to_owned();
        for (_, name) in Outcome::ALL {
            let _ = write!(head, " | {name}");
            rule.push_str(" | ---:");
        }
        writeln!(f, "{head} |\n{rule} |")?;
        for (kind, outcomes) in &self.totals.requests {
            write!(f, "| {kind} | {}", outcomes.values().sum::<u64>())?;
            for (outcome, _) in Outcome::ALL {
                match outcomes.get(&outcome) {
                    None => write!(f, " |")?,
                    Some(count) => write!(f, " | {count}")?,
                }
            }
            writeln!(f, " |")?;
        }
        writeln!(f)
    }

    fn failures(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| failure | times | until recovery, median (longest), s |")?;
        writeln!(f, "| --- | ---: | ---: |")?;
        for (name, FailureSummary { times, median, longest }) in &self.failures {
            let (median, longest) = (median.as_secs_f64(), longest.as_secs_f64());
            writeln!(f, "| {name} | {times} | {median:.1} ({longest:.1}) |")?;
        }
        writeln!(f)
    }

    fn usage(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "| gateway, before → after | sockets | other descriptors | threads | resident, KiB | \
             connections, streams |\n| --- | ---: | ---: | ---: | ---: | ---: |"
        )?;
        for (before, after) in self.before.iter().zip(&self.after) {
            writeln!(
                f,
                "| {} | {} → {} | {} → {} | {} → {} | {} → {} | {}, {} |",
                before.name,
                before.sockets,
                after.sockets,
                before.others,
                after.others,
                before.threads,
                after.threads,
                before.resident,
                after.resident,
                after.connections,
                after.streams
            )?;
        }
        let (before, after) = self.tcp_memory;
        writeln!(f, "\nThe kernel's memory for TCP of the whole host: {before} → {after} KiB.")
    }
}
