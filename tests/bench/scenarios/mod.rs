//! The scenarios.

mod bulk;
mod burst;
pub(crate) mod counts;
mod entries;
pub(crate) mod idle;
mod quiet;
mod requests;

use std::fmt;
use std::str::FromStr;

use anyhow::{Result, bail};

use crate::lab::Lab;
use crate::sample::{Entry, Measured};
use crate::targets::{Running, StartOptions};

/// The size of one measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// The time of bulk streams and of clients that send requests in sequence.
    pub(crate) milliseconds: u32,
    /// The number of sequential requests.
    pub(crate) requests: usize,
    /// The time of idle targets, in seconds.
    pub(crate) idle: u64,
}

impl Effort {
    pub(crate) const FULL: Self = Self { milliseconds: 3000, requests: 500, idle: 60 };
    pub(crate) const QUICK: Self = Self { milliseconds: 1000, requests: 100, idle: 10 };
}

/// A scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Scenario {
    /// Streams at full speed.
    Bulk { streams: usize },
    /// Clients that request short logs in sequence.
    Requests { clients: usize },
    /// The time from connect to first byte, one request at a time.
    FirstByte,
    /// The same with several numbers of zones.
    Zones,
    /// Open, mostly idle streams.
    Quiet { streams: usize },
    /// Clients that connect concurrently.
    Burst { clients: usize },
    /// No clients.
    Idle,
    /// System calls, instructions, allocations.
    Counts,
}

impl Scenario {
    /// All scenarios, in the order of the report.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![Self::Idle, Self::Bulk { streams: 1 }, Self::Bulk { streams: 8 }];
        all.extend([1, 4, 16, 64, 256].map(|clients| Self::Requests { clients }));
        all.extend([Self::FirstByte, Self::Zones]);
        all.extend([1000, 3000, 5000, 9000].map(|streams| Self::Quiet { streams }));
        all.extend([200, 2000].map(|clients| Self::Burst { clients }));
        all.push(Self::Counts);
        all
    }

    /// The scenarios with this name: one, such as `bulk-8`, or all of a kind, such as `bulk`.
    pub(crate) fn named(name: &str) -> Result<Vec<Self>> {
        let all = Self::all();
        let matching: Vec<_> = all.into_iter().filter(|scenario| scenario.kind() == name).collect();
        if matching.is_empty() { Ok(vec![name.parse()?]) } else { Ok(matching) }
    }

    fn kind(self) -> &'static str {
        match self {
            Self::Bulk { .. } => "bulk",
            Self::Requests { .. } => "requests",
            Self::FirstByte => "first-byte",
            Self::Zones => "zones",
            Self::Quiet { .. } => "quiet",
            Self::Burst { .. } => "burst",
            Self::Idle => "idle",
            Self::Counts => "counts",
        }
    }

    /// The heading in the report.
    pub(crate) fn title(self) -> String {
        match self {
            Self::Bulk { streams: 1 } => "One stream at full speed".to_owned(),
            Self::Bulk { streams } => format!("{streams} streams at full speed"),
            Self::Requests { clients: 1 } => {
                "Logs of 2 KiB, requested in sequence by 1 client".to_owned()
            }
            Self::Requests { clients } => {
                format!("Logs of 2 KiB, requested in sequence by {clients} clients")
            }
            Self::FirstByte => "Connect to first byte, one request at a time".to_owned(),
            Self::Zones => "Connect to first byte, the build in the last of many zones".to_owned(),
            Self::Quiet { streams } => format!("{streams} idle streams"),
            Self::Burst { clients } => format!("{clients} concurrent clients"),
            Self::Idle => "Idle".to_owned(),
            Self::Counts => "Counts".to_owned(),
        }
    }

    /// The columns of the report, the most important first.
    pub(crate) fn columns(self) -> &'static [&'static str] {
        match self {
            Self::Bulk { .. } => &["MB/s", "CPU s/GiB"],
            Self::Requests { .. } => {
                &["requests/s", "CPU ms/request", "p50 ms", "p90 ms", "p99 ms", "max ms", "failed"]
            }
            Self::FirstByte | Self::Zones => {
                &["p50 ms", "p90 ms", "p99 ms", "max ms", "CPU ms/request", "failed"]
            }
            Self::Quiet { .. } => &[
                "resident KiB/stream",
                "resident after lines KiB/stream",
                "kernel KiB/stream",
                "open",
                "first byte p50 ms",
                "first byte p99 ms",
                "lines",
                "line p50 ms",
                "line p99 ms",
                "line max ms",
                "CPU ms/line",
                "wave s",
                "threads",
                "descriptors",
            ],
            Self::Burst { .. } => &[
                "served",
                "refused",
                "failed",
                "seconds",
                "first byte p50 ms",
                "first byte p99 ms",
            ],
            Self::Idle => &["resident MiB", "private MiB", "CPU ms/min", "threads", "descriptors"],
            Self::Counts => counts::COLUMNS,
        }
    }

    /// The figure that the report compares with haproxy's.
    pub(crate) fn main_figure(self) -> &'static str {
        match self {
            Self::Burst { .. } => "seconds",
            _ => self.columns()[0],
        }
    }

    /// Whether each measurement starts a new target, because memory depends on earlier requests.
    pub(crate) fn wants_fresh_targets(self) -> bool {
        matches!(self, Self::Quiet { .. })
    }

    /// Measures once.
    pub(crate) async fn measure(
        self,
        entry: Entry,
        target: &Running,
        lab: &mut Lab,
        effort: Effort,
    ) -> Result<Measured> {
        match self {
            Self::Bulk { streams } => bulk::measure(streams, target, lab, effort).await,
            Self::Requests { clients } => requests::rate(clients, entry, target, lab, effort).await,
            Self::FirstByte | Self::Zones => requests::first_byte(entry, target, lab, effort).await,
            Self::Quiet { streams } => quiet::measure(streams, entry, target, lab).await,
            Self::Burst { clients } => burst::measure(clients, target, lab).await,
            Self::Idle | Self::Counts => bail!("{self} is not measured in rounds"),
        }
    }
}

/// Starts the target of `entry`.
pub(crate) async fn start(entry: Entry, lab: &mut Lab) -> Result<Running> {
    let options = StartOptions { zones: entry.zones, ..StartOptions::default() };
    let target = Running::start(entry.kind, &options, lab).await?;
    target.warm_up(if entry.kind.is_zuul() { 20 } else { 400 }, lab).await?;
    Ok(target)
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())?;
        match self {
            Self::Bulk { streams: number }
            | Self::Requests { clients: number }
            | Self::Quiet { streams: number }
            | Self::Burst { clients: number } => write!(f, "-{number}"),
            Self::FirstByte | Self::Zones | Self::Idle | Self::Counts => Ok(()),
        }
    }
}

impl FromStr for Scenario {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        let parsed = name.rsplit_once('-').and_then(|(kind, number)| {
            let number = number.parse().ok().filter(|number| *number > 0)?;
            match kind {
                "bulk" => Some(Self::Bulk { streams: number }),
                "requests" => Some(Self::Requests { clients: number }),
                "quiet" => Some(Self::Quiet { streams: number }),
                "burst" => Some(Self::Burst { clients: number }),
                _ => None,
            }
        });
        let Some(scenario) = parsed else {
            let mut known: Vec<_> = Self::all().iter().map(|known| known.kind()).collect();
            known.dedup();
            bail!(
                "no scenario {name:?}; known are {}, and most with a number, such as bulk-8",
                known.join(", ")
            );
        };
        Ok(scenario)
    }
}
