//! What a gateway that lives the whole time holds on to.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::time::{Instant, sleep};

use crate::lab::{GATEWAYS, Lab, SURVIVORS};

/// For closed connections and late tasks to be gone: longer than the grace that a client is given
/// to close behind the end of its log.
const SETTLING: Duration = Duration::from_secs(30);

/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// What it may hold resident beyond what it held after the warm-up, as a part of that and in KiB:
/// the allocator keeps more after a longer run, and less of it than a leak per stream would make.
const GROWTH: f64 = 0.25;
const GROWTH_KIB: u64 = 4096;

/// What one gateway holds while nobody asks it for anything.
#[derive(Clone, Debug)]
pub(crate) struct Usage {
    pub(crate) name: &'static str,
    pub(crate) sockets: usize,
    /// Other than sockets: pipes are kept by each thread, up to two.
    pub(crate) others: usize,
    /// KiB.
    pub(crate) resident: u64,
    pub(crate) threads: u64,
    /// Connections and streams, as its metrics count them: each is a task.
    pub(crate) connections: f64,
    pub(crate) streams: f64,
}

impl Usage {
    async fn of(number: usize, lab: &Lab) -> Result<Self> {
        let gateway = lab.gateway(number).await;
        let pid = gateway.as_ref().context("it lives the whole time")?.pid();
        let read = |file: &str| {
            let path = format!("/proc/{pid}/{file}");
            fs::read_to_string(&path).context(path)
        };
        let descriptors: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))?
            .flatten()
            .filter_map(|file| fs::read_link(file.path()).ok())
            .collect();
        let is_socket = |name: &&std::path::PathBuf| name.to_string_lossy().starts_with("socket:");
        let sockets = descriptors.iter().filter(is_socket).count();
        Ok(Self {
            name: GATEWAYS[number].0,
            sockets,
            others: descriptors.len() - sockets,
            resident: number_of(&read("smaps_rollup")?, "Rss:"),
            threads: number_of(&read("status")?, "Threads:"),
            connections: lab.metric(number, "zuul_fingergw_connections_active").await?,
            streams: lab.metric(number, "zuul_fingergw_streams_active").await?,
        })
    }

    /// What is wrong with it, `before` having been the same at the beginning.
    fn fault(&self, before: Option<&Self>) -> Option<String> {
        if self.connections > 0.0 || self.streams > 0.0 {
            let (connections, streams) = (self.connections, self.streams);
            return Some(format!("{connections} connections and {streams} streams are left"));
        }
        let before = before?;
        if self.sockets != before.sockets {
            return Some(format!("{} sockets, {} before", self.sockets, before.sockets));
        }
        if self.others > before.others + PIPES_KEPT {
            return Some(format!("{} other descriptors, {} before", self.others, before.others));
        }
        let bound = before.resident + ((before.resident as f64 * GROWTH) as u64).max(GROWTH_KIB);
        (self.resident > bound).then(|| {
            format!("{} KiB resident, {} before, {bound} allowed", self.resident, before.resident)
        })
    }
}

/// Descriptors of the pipes that threads keep for the next log that pours: two pipes in each of the
/// runtime's threads, and the thread that had none before may have them behind it.
const PIPES_KEPT: usize = 8;

/// What all TCP sockets of the host hold in the kernel, in KiB: those of the gateways, and of both ends
/// of the load.
pub(crate) fn tcp_memory() -> Result<u64> {
    let path = "/proc/net/sockstat";
    let sockets = fs::read_to_string(path).context(path)?;
    let tcp = sockets.lines().find_map(|line| line.strip_prefix("TCP:")).context(path)?;
    let pages = tcp.split_whitespace().skip_while(|word| *word != "mem").nth(1);
    let pages: u64 = pages.and_then(|pages| pages.parse().ok()).context(path)?;
    Ok(pages * rustix::param::page_size() as u64 / 1024)
}

/// The number behind `name` in a file of /proc.
fn number_of(text: &str, name: &str) -> u64 {
    let line = text.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
}

/// Measures all that live the whole time, once they have settled: as they were `before`, if there
/// is a before. What does not settle is a violation.
pub(crate) async fn settled(lab: &Lab, before: Option<&[Usage]>) -> Result<Vec<Usage>> {
    let mut all = Vec::new();
    for (index, number) in SURVIVORS.into_iter().enumerate() {
        let before = before.map(|before| &before[index]);
        let deadline = Instant::now() + SETTLING;
        let usage = loop {
            let usage = Usage::of(number, lab).await?;
            let Some(fault) = usage.fault(before) else { break usage };
            if Instant::now() > deadline {
                lab.journal.violation(format!("{}: {fault}", usage.name));
                break usage;
            }
            sleep(LOOK_AGAIN).await;
        };
        all.push(usage);
    }
    Ok(all)
}
