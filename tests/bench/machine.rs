//! The machine: its use by other processes during a measurement, and the memory of its kernel.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The limit of open files: a gateway uses two for each of 9,000 streams.
const DESCRIPTORS: u64 = 65_536;

/// The lowest limit of open files that suffices.
const DESCRIPTORS_AT_LEAST: u64 = 20_000;

/// Raises the limit of open files of this process and its children as far as permitted.
pub(crate) fn raise_descriptors() -> Result<u64> {
    let limit = |most| Rlimit { current: Some(most), maximum: Some(most) };
    let maximum = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    if setrlimit(Resource::Nofile, limit(DESCRIPTORS.max(maximum))).is_err() {
        let rlimit = Rlimit { current: Some(maximum), maximum: Some(maximum) };
        setrlimit(Resource::Nofile, rlimit).context("the limit of open files")?;
    }
    let current = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    ensure!(
        current >= DESCRIPTORS_AT_LEAST,
        "open files are limited to {current}; {DESCRIPTORS_AT_LEAST} are needed: \
         run as root, or raise the limit (ulimit -n)"
    );
    Ok(current)
}

/// The number of processors.
pub(crate) fn processors() -> f64 {
    std::thread::available_parallelism().map_or(1.0, |count| count.get() as f64)
}

/// The used members of /proc/PID/stat.
struct Stat {
    name: String,
    parent: u32,
    /// CPU seconds of its own. The time of its children is added only when they end.
    cpu: f64,
}

/// Seconds per clock tick of /proc: USER_HZ is 100 on all architectures that Zuul supports.
const JIFFY: f64 = 0.01;

fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may contain parentheses.
    let (name, rest) = text.split_once('(')?.1.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split(' ').collect();
    // proc(5) numbers these fields from 3: utime and stime are 14 and 15.
    let jiffies: f64 = fields.get(11..13)?.iter().filter_map(|f| f.parse::<f64>().ok()).sum();
    Some(Stat { name: name.to_owned(), parent: fields.get(1)?.parse().ok()?, cpu: jiffies * JIFFY })
}

/// The CPU times of the whole machine at one moment.
pub(crate) struct Snapshot {
    at: Instant,
    /// Idle seconds of all processors.
    idle: f64,
    /// Seconds stolen by the hypervisor.
    steal: f64,
    processes: HashMap<u32, Stat>,
}

/// Use of the machine by other processes.
#[derive(Clone, Debug)]
pub(crate) struct Foreign {
    /// The share of all processors' time, 0 to 1.
    pub(crate) share: f64,
    /// The names of the busiest processes, with their CPU seconds.
    pub(crate) by: String,
}

impl Snapshot {
    pub(crate) fn take() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat")?;
        let line = text.lines().next().context("/proc/stat")?;
        let fields: Vec<f64> =
            line.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
        let field = |number: usize| fields.get(number).copied().unwrap_or(0.0) * JIFFY;
        let pids = fs::read_dir("/proc")?.flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        Ok(Self {
            at: Instant::now(),
            idle: field(3) + field(4),
            steal: field(7),
            processes: pids.filter_map(|pid| Some((pid, stat(pid)?))).collect(),
        })
    }

    /// What was used between this snapshot and `later` by neither this process nor its descendants.
    ///
    /// The busy time is what was not idle, so it includes processes that ended in between. Kernel
    /// threads count as ours, because they also work for us. The inaccuracy of hundredths of a
    /// second is subtracted.
    pub(crate) fn foreign(&self, later: &Self) -> Foreign {
        let seconds = (later.at - self.at).as_secs_f64() * processors();
        let spent = |pid: &u32, stat: &Stat| {
            stat.cpu - self.processes.get(pid).map_or(0.0, |before| before.cpu)
        };
        let ours = later.descendants(std::process::id());
        let (mut known, mut others) = (0.0, BTreeMap::<&str, f64>::new());
        for (pid, stat) in &later.processes {
            if ours.contains(pid) || later.is_kernels(*pid) {
                known += spent(pid, stat).max(0.0);
            } else {
                *others.entry(&stat.name).or_default() += spent(pid, stat).max(0.0);
            }
        }
        let busy = (seconds - (later.idle - self.idle) - known).max(0.0);
        let seen: f64 = others.values().sum();
        let inexact = 2.0 * JIFFY * processors();
        let steal = later.steal - self.steal;
        let mut others: Vec<_> = others.into_iter().filter(|(_, spent)| *spent > 0.0).collect();
        others.sort_by(|(_, a), (_, b)| b.total_cmp(a));
        others.push(("the hypervisor", steal));
        let by = others.iter().take(4).filter(|(_, spent)| *spent > 0.0);
        let by: Vec<_> = by.map(|(name, spent)| format!("{name} {spent:.2} s")).collect();
        let share = (busy.max(seen).max(steal) - inexact).max(0.0) / seconds;
        Foreign { share, by: by.join(", ") }
    }

    fn descendants(&self, of: u32) -> HashSet<u32> {
        let mut found = HashSet::from([of]);
        loop {
            let before = found.len();
            for (pid, stat) in &self.processes {
                if found.contains(&stat.parent) {
                    found.insert(*pid);
                }
            }
            if found.len() == before {
                return found;
            }
        }
    }

    fn is_kernels(&self, pid: u32) -> bool {
        const KTHREADD: u32 = 2;
        let parent = self.processes.get(&pid).map(|stat| stat.parent);
        self.processes.get(&KTHREADD).is_some_and(|stat| stat.name == "kthreadd")
            && (pid == KTHREADD || parent == Some(KTHREADD))
    }
}

/// The memory of the kernel in KiB: objects, stacks, page tables, and socket buffers.
pub(crate) fn kernel_memory() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let kib = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok()).unwrap_or(0.0)
    };
    // Reclaimable objects are not counted: they cache files and directories.
    let objects = kib("SUnreclaim:") + kib("KernelStack:") + kib("PageTables:");
    let sockets = fs::read_to_string("/proc/net/sockstat")?;
    let tcp = sockets.lines().find(|line| line.starts_with("TCP:")).unwrap_or("");
    let pages = tcp.split_whitespace().last().and_then(|pages| pages.parse().ok()).unwrap_or(0.0);
    Ok(objects + pages * rustix::param::page_size() as f64 / 1024.0)
}
