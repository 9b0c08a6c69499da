//! The outcome as Markdown, for docs/reliability.md.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::time::Duration;

use crate::journal::{Outcome, Totals, Tried};
use crate::usage::Usage;

pub(crate) struct Report {
    pub(crate) seed: u64,
    pub(crate) lasted: Duration,
    pub(crate) clients: usize,
    pub(crate) totals: Totals,
    pub(crate) faults: BTreeMap<&'static str, Tried>,
    /// Requests that ended otherwise than without faults, a fault explaining it.
    pub(crate) excused: usize,
    pub(crate) before: Vec<Usage>,
    pub(crate) after: Vec<Usage>,
    /// Before and after, in KiB.
    pub(crate) tcp_memory: (u64, u64),
    pub(crate) violations: usize,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Totals { requests, streams, bytes } = &self.totals;
        let count: u64 = requests.values().flat_map(BTreeMap::values).sum();
        let faults: u64 = self.faults.values().map(|tried| tried.times).sum();
        let (minutes, seconds) = (self.lasted.as_secs() / 60, self.lasted.as_secs() % 60);
        writeln!(
            f,
            "{minutes} min {seconds} s of load with faults by {} clients (seed {}): {count} \
             requests, {streams} streams, {bytes} bytes compared, {faults} faults; {} requests met \
             a fault. Violations: **{}**.\n",
            self.clients, self.seed, self.excused, self.violations
        )?;
        self.requests(f)?;
        self.faults(f)?;
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

    fn faults(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| fault | times | until all was well again, median (longest), s |")?;
        writeln!(f, "| --- | ---: | ---: |")?;
        for (name, Tried { times, median, longest }) in &self.faults {
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
        writeln!(f, "\nThe kernel's memory for TCP, of the whole host: {before} → {after} KiB.")
    }
}
