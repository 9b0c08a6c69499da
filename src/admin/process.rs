//! The `process_*` series that Zuul documents for its services (`doc/source/monitoring.rst`),
//! under the names of the Python client, read from proc(5) when asked.

use std::fmt;
use std::fs;
use std::sync::LazyLock;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

/// Reads `/proc/self` at every scrape. A figure that cannot be read is left out.
#[derive(Debug)]
pub(super) struct Process;

/// Fields of `/proc/self/stat` behind the command's name, counted from 0 (proc(5)).
const UTIME: usize = 11;
const STIME: usize = 12;
const START_TIME: usize = 19;
const VIRTUAL_BYTES: usize = 20;
const RESIDENT_PAGES: usize = 21;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // The command's name may hold anything, even blanks and parentheses; it ends at the last.
        let fields: Vec<f64> = stat
            .rsplit_once(") ")
            .map(|(_, rest)| rest.split_whitespace().map(|field| field.parse().unwrap_or(f64::NAN)))
            .into_iter()
            .flatten()
            .collect();
        let field = |index: usize| fields.get(index).copied();
        let ticks = clock_ticks_per_second() as f64;
        let mut gauge = |name: &str, help: &str, value: Option<f64>| match value {
            Some(value) => {
                let gauge = ConstGauge::new(value);
                gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
            }
            None => Ok(()),
        };
        gauge(
            "process_virtual_memory_bytes",
            "Virtual memory size in bytes",
            field(VIRTUAL_BYTES),
        )?;
        let resident = field(RESIDENT_PAGES).map(|pages| pages * page_size() as f64);
        gauge("process_resident_memory_bytes", "Resident memory size in bytes", resident)?;
        let start = field(START_TIME).map(|start| *BOOT_TIME + start / ticks);
        gauge("process_start_time_seconds", "Start time since the epoch in seconds", start)?;
        let open = fs::read_dir("/proc/self/fd").ok().map(|files| files.count() as f64);
        gauge("process_open_fds", "Number of open file descriptors", open)?;
        let most = getrlimit(Resource::Nofile).current.map(|most| most as f64);
        gauge("process_max_fds", "Maximum number of open file descriptors", most)?;
        if let Some((user, system)) = field(UTIME).zip(field(STIME)) {
            let seconds = ConstCounter::new((user + system) / ticks);
            let help = "User and system CPU time spent in seconds";
            let kind = seconds.metric_type();
            seconds.encode(encoder.encode_descriptor(
                "process_cpu_seconds",
                help,
                None,
                kind,
            )?)?;
        }
        Ok(())
    }
}

/// When the machine was started, in seconds since the epoch. The kernel says so in `/proc/stat`, which
/// a service may not see (`ProcSubset=pid`); and asked once, as the clock may be set.
static BOOT_TIME: LazyLock<f64> = LazyLock::new(|| {
    let seconds = |clock| {
        let time = clock_gettime(clock);
        time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
    };
    seconds(ClockId::Realtime) - seconds(ClockId::Boottime)
});
