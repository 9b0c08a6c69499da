//! The `process_*` metrics that Zuul documents for its services (`doc/source/monitoring.rst`), with
//! the names of Prometheus' Python client, read from proc(5).

use std::fmt;
use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

use super::encoding::encode_metric;

/// Reads `/proc/self` at each scrape. Values that cannot be read are left out.
#[derive(Debug)]
pub(super) struct ProcessCollector {
    /// Read once, in seconds since the epoch: the kernel adjusts the boot time with the clock, and
    /// each change would look like a restart.
    started: Option<f64>,
}

/// Fields of `/proc/self/stat` after the command name, counted from 0 (proc(5)).
const UTIME: usize = 11;
const STIME: usize = 12;
const START_TIME: usize = 19;
const VIRTUAL_BYTES: usize = 20;
const RESIDENT_PAGES: usize = 21;

impl ProcessCollector {
    pub(super) fn new() -> Self {
        let ticks = read_stat().get(START_TIME).copied();
        let since_boot = ticks.map(|ticks| ticks / clock_ticks_per_second() as f64);
        Self { started: since_boot.map(|start| boot_time() + start) }
    }
}

/// Reads the fields of `/proc/self/stat` after the command name. Empty if that fails.
fn read_stat() -> Vec<f64> {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The command name can contain blanks and parentheses; it ends at the last parenthesis.
    let Some((_, fields)) = stat.rsplit_once(") ") else { return Vec::new() };
    fields.split_whitespace().map(|field| field.parse().unwrap_or(f64::NAN)).collect()
}

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let stat = read_stat();
        let field = |index: usize| stat.get(index).copied();
        let open_files = fs::read_dir("/proc/self/fd").ok().map(|files| files.count() as f64);
        let file_limit = getrlimit(Resource::Nofile).current.map(|limit| limit as f64);
        for (name, help, value) in [
            (
                "process_virtual_memory_bytes",
                "Size of the address space in bytes",
                field(VIRTUAL_BYTES),
            ),
            (
                "process_resident_memory_bytes",
                "Resident memory in bytes",
                field(RESIDENT_PAGES).map(|pages| pages * page_size() as f64),
            ),
            (
                "process_start_time_seconds",
                "When the process started, in seconds since the epoch",
                self.started,
            ),
            ("process_open_fds", "Open file descriptors", open_files),
            ("process_max_fds", "Limit of open file descriptors", file_limit),
        ] {
            if let Some(value) = value {
                encode_metric(&mut encoder, name, help, &ConstGauge::new(value))?;
            }
        }
        if let Some((user, system)) = field(UTIME).zip(field(STIME)) {
            let seconds = ConstCounter::new((user + system) / clock_ticks_per_second() as f64);
            let help = "User and system CPU time in seconds";
            encode_metric(&mut encoder, "process_cpu_seconds", help, &seconds)?;
        }
        Ok(())
    }
}

/// Returns when the machine was booted, in seconds since the epoch. `/proc/stat` has it too, but a
/// service with `ProcSubset=pid` cannot read that.
fn boot_time() -> f64 {
    let seconds = |clock| {
        let time = clock_gettime(clock);
        time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
    };
    seconds(ClockId::Realtime) - seconds(ClockId::Boottime)
}
