//! The `process_*` series that Zuul documents for its services (`doc/source/monitoring.rst`),
//! under the names of the Python client, read from proc(5) when asked.

use std::fmt;
use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

use crate::telemetry::metrics::definitions;
use crate::telemetry::metrics::descriptor::Descriptor;

/// Reads `/proc/self` at every scrape. A figure that cannot be read is left out.
#[derive(Debug)]
pub(crate) struct Process {
    /// Read once: the kernel's idea of when it was booted changes with the clock, and each change
    /// would look like a restart.
    started: Option<f64>,
}

/// Fields of `/proc/self/stat` behind the command's name, counted from 0 (proc(5)).
const UTIME: usize = 11;
const STIME: usize = 12;
const START_TIME: usize = 19;
const VIRTUAL_BYTES: usize = 20;
const RESIDENT_PAGES: usize = 21;

impl Process {
    pub(crate) fn new() -> Self {
        let ticks = stat().get(START_TIME).copied();
        let since_boot = ticks.map(|ticks| ticks / clock_ticks_per_second() as f64);
        Self { started: since_boot.map(|start| boot_time() + start) }
    }
}

/// The fields of `/proc/self/stat` behind the command's name; none if it cannot be read.
fn stat() -> Vec<f64> {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The command's name may hold anything, even blanks and parentheses; it ends at the last.
    let Some((_, fields)) = stat.rsplit_once(") ") else { return Vec::new() };
    fields.split_whitespace().map(|field| field.parse().unwrap_or(f64::NAN)).collect()
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let fields = stat();
        let field = |index: usize| fields.get(index).copied();
        let mut gauge = |descriptor: &Descriptor, value: Option<f64>| match value {
            Some(value) => {
                let gauge = ConstGauge::new(value);
                descriptor.encode(&mut encoder, |encoder| gauge.encode(encoder))
            }
            None => Ok(()),
        };
        gauge(&definitions::VIRTUAL_MEMORY, field(VIRTUAL_BYTES))?;
        let resident = field(RESIDENT_PAGES).map(|pages| pages * page_size() as f64);
        gauge(&definitions::RESIDENT_MEMORY, resident)?;
        gauge(&definitions::START_TIME, self.started)?;
        let open = fs::read_dir("/proc/self/fd").ok().map(|files| files.count() as f64);
        gauge(&definitions::OPEN_FDS, open)?;
        let most = getrlimit(Resource::Nofile).current.map(|most| most as f64);
        gauge(&definitions::MAX_FDS, most)?;
        if let Some((user, system)) = field(UTIME).zip(field(STIME)) {
            let seconds = ConstCounter::new((user + system) / clock_ticks_per_second() as f64);
            definitions::CPU_SECONDS.encode(&mut encoder, |encoder| seconds.encode(encoder))?;
        }
        Ok(())
    }
}

/// When the machine was started, in seconds since the epoch. The kernel says so in `/proc/stat` as well,
/// which a service may not see (`ProcSubset=pid`).
fn boot_time() -> f64 {
    let seconds = |clock| {
        let time = clock_gettime(clock);
        time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
    };
    seconds(ClockId::Realtime) - seconds(ClockId::Boottime)
}
