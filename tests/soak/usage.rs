//! The resources of the gateways that run the whole time.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::time::{Instant, sleep};

use crate::lab::{GATEWAYS, Lab, SURVIVORS};

/// The time limit until closed connections and late tasks are gone: longer than a client may take
/// to close after the end of its log.
const SETTLING: Duration = Duration::from_secs(30);

/// The interval of measurements.
const CHECK_INTERVAL: Duration = Duration::from_millis(200);

/// The permitted growth of resident memory after the warm-up, as a share and in KiB. The allocator
/// keeps more memory after a longer run, but less than a leak per stream would take.
const GROWTH: f64 = 0.25;
const GROWTH_KIB: u64 = 4096;

/// The resources of one gateway without clients.
#[derive(Clone, Debug)]
pub(crate) struct Usage {
    pub(crate) name: &'static str,
    pub(crate) sockets: usize,
    /// Other descriptors, among them those of pooled pipes.
    pub(crate) others: usize,
    /// Resident memory in KiB.
    pub(crate) resident: u64,
    pub(crate) threads: u64,
    /// Connections and streams, each a task, as its metrics count them.
    pub(crate) connections: f64,
    pub(crate) streams: f64,
}

impl Usage {
    async fn of(number: usize, lab: &Lab) -> Result<Self> {
        let gateway = lab.gateway(number).await;
        let pid = gateway.as_ref().context("it runs the whole time")?.pid();
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

    /// Returns which resource has leaked since `before`.
    fn leak(&self, before: Option<&Self>) -> Option<String> {
        if self.connections > 0.0 || self.streams > 0.0 {
            let (connections, streams) = (self.connections, self.streams);
            return Some(format!("{connections} connections and {streams} streams are left"));
        }
        let before = before?;
        if self.sockets != before.sockets {
            return Some(format!("{} sockets, {} before", self.sockets, before.sockets));
        }
        if self.others > before.others + POOLED_PIPES {
            return Some(format!("{} other descriptors, {} before", self.others, before.others));
        }
        let bound = before.resident + ((before.resident as f64 * GROWTH) as u64).max(GROWTH_KIB);
        (self.resident > bound).then(|| {
            format!("{} KiB resident, {} before, {bound} allowed", self.resident, before.resident)
        })
    }
}

/// The descriptors of the pipes that a gateway keeps for further bulk logs: two for each of eight
/// (`IDLE_MAX` in `src/gateway/relay/splice.rs`).
const POOLED_PIPES: usize = 16;

/// The kernel memory of all TCP sockets of the host in KiB, those of clients and executors
/// included.
pub(crate) fn tcp_memory() -> Result<u64> {
    let path = "/proc/net/sockstat";
    let sockets = fs::read_to_string(path).context(path)?;
    let tcp = sockets.lines().find_map(|line| line.strip_prefix("TCP:")).context(path)?;
    let pages = tcp.split_whitespace().skip_while(|word| *word != "mem").nth(1);
    let pages: u64 = pages.and_then(|pages| pages.parse().ok()).context(path)?;
    Ok(pages * rustix::param::page_size() as u64 / 1024)
}

/// The number after `name` in a file of /proc.
fn number_of(text: &str, name: &str) -> u64 {
    let line = text.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
}

/// Measures the gateways that run the whole time after they have released their resources, compared
/// with `before` if that is given. It is a violation if they do not release them in time.
pub(crate) async fn settled(lab: &Lab, before: Option<&[Usage]>) -> Result<Vec<Usage>> {
    let mut all = Vec::new();
    for (index, number) in SURVIVORS.into_iter().enumerate() {
        let before = before.map(|before| &before[index]);
        let deadline = Instant::now() + SETTLING;
        let usage = loop {
            let usage = Usage::of(number, lab).await?;
            let Some(leak) = usage.leak(before) else { break usage };
            if Instant::now() > deadline {
                lab.journal.violation(format!("{}: {leak}", usage.name));
                break usage;
            }
            sleep(CHECK_INTERVAL).await;
        };
        all.push(usage);
    }
    Ok(all)
}
