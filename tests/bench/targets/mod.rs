//! The targets: this gateway, Zuul's gateway, haproxy in front of an executor, and the executor
//! itself.
//!
//! A "pair" is two processes with mutual TLS between them: zone to zone. All listen on
//! free ports of 127.0.0.1.

mod haproxy;
mod ours;
mod zuul_gateway;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::lab::Lab;
use crate::log::{Log, SHORT};
use crate::process::{Process, Usage};
use crate::zuul::Zuul;

/// A kind of target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    /// The client dials the executor.
    Direct,
    /// One haproxy, `mode tcp`.
    Haproxy {
        threads: u8,
        splice: bool,
    },
    /// Two with mutual TLS between them.
    HaproxyPair {
        /// Whether the first may resume sessions with the second, which is the default.
        resume: bool,
    },
    Zuul,
    ZuulPair,
    /// This gateway: 0 is the one of `--gateway`, others are those of `--also`.
    Ours(usize),
    OursPair(usize),
}

pub(crate) const OURS: Kind = Kind::Ours(0);
pub(crate) const OURS_PAIR: Kind = Kind::OursPair(0);
/// haproxy as Debian starts it on two processors, with splicing.
pub(crate) const HAPROXY: Kind = Kind::Haproxy { threads: 2, splice: true };
pub(crate) const HAPROXY_1: Kind = Kind::Haproxy { threads: 1, splice: true };
pub(crate) const HAPROXY_COPY: Kind = Kind::Haproxy { threads: 2, splice: false };
pub(crate) const HAPROXY_PAIR: Kind = Kind::HaproxyPair { resume: false };
pub(crate) const HAPROXY_PAIR_RESUMING: Kind = Kind::HaproxyPair { resume: true };

impl Kind {
    /// Whether it looks up builds.
    pub(crate) fn looks_up(self) -> bool {
        !matches!(self, Self::Direct | Self::Haproxy { .. } | Self::HaproxyPair { .. })
    }

    /// Whether it is two processes with TLS between them.
    pub(crate) fn is_pair(self) -> bool {
        matches!(self, Self::HaproxyPair { .. } | Self::ZuulPair | Self::OursPair(_))
    }

    pub(crate) fn is_zuul(self) -> bool {
        matches!(self, Self::Zuul | Self::ZuulPair)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Direct => f.write_str("direct"),
            Self::Haproxy { threads: 1, splice: true } => f.write_str("haproxy, splice, 1 thread"),
            Self::Haproxy { splice: true, .. } => f.write_str("haproxy, splice"),
            Self::Haproxy { .. } => f.write_str("haproxy, copy"),
            Self::HaproxyPair { resume: false } => f.write_str("haproxy TLS pair"),
            Self::HaproxyPair { resume: true } => f.write_str("haproxy TLS pair, resuming"),
            Self::Zuul => f.write_str("Zuul"),
            Self::ZuulPair => f.write_str("Zuul TLS pair"),
            Self::Ours(0) => f.write_str("ours"),
            Self::OursPair(0) => f.write_str("ours TLS pair"),
            Self::Ours(other) => write!(f, "also {other}"),
            Self::OursPair(other) => write!(f, "also {other} TLS pair"),
        }
    }
}

/// A target that runs.
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    pub(crate) processes: Vec<Process>,
    /// The system in which it looks up builds, if it does.
    zuul: Option<Zuul>,
    executor: SocketAddr,
    /// Configuration and logs.
    _directory: TempDir,
    _keep: Vec<ours::Kept>,
}

/// Options of a target.
#[derive(Clone, Debug, Default)]
pub(crate) struct StartOptions {
    /// The number of zones of its system; 0 is 1.
    pub(crate) zones: usize,
    /// The command that runs this gateway, such as valgrind with its options.
    pub(crate) wrapper: Vec<String>,
}

impl Running {
    /// Starts the target and waits until it serves.
    pub(crate) async fn start(kind: Kind, options: &StartOptions, lab: &Lab) -> Result<Self> {
        let directory = TempDir::new().context("a directory for a target")?;
        let zuul = match kind.looks_up() {
            true => Some(Zuul::new(options.zones.max(1)).await?),
            false => None,
        };
        let mut running = Self {
            address: lab.executor_address,
            processes: Vec::new(),
            zuul,
            executor: lab.executor_address,
            _directory: directory,
            _keep: Vec::new(),
        };
        match kind {
            Kind::Direct => {}
            Kind::Haproxy { threads, splice } => running.haproxy(threads, splice).await?,
            Kind::HaproxyPair { resume } => running.haproxy_pair(resume, lab).await?,
            Kind::Zuul => running.zuul_gateway().await?,
            Kind::ZuulPair => running.zuul_gateway_pair(lab).await?,
            Kind::Ours(which) => running.ours(which, options, lab).await?,
            Kind::OursPair(which) => running.ours_pair(which, options, lab).await?,
        }
        Ok(running)
    }

    fn zuul(&self) -> Result<&Zuul> {
        self.zuul.as_ref().context("a target with a system")
    }

    fn file(&self, name: &str) -> PathBuf {
        self._directory.path().join(name)
    }

    /// Creates `count` builds with this log.
    pub(crate) async fn builds(&self, log: Log, count: usize) -> Result<Vec<String>> {
        let builds: Vec<String> = (0..count).map(|_| log.build()).collect();
        if let Some(zuul) = &self.zuul {
            zuul.add(&builds, self.executor.port()).await?;
        }
        Ok(builds)
    }

    /// Deletes builds.
    pub(crate) async fn forget(&self, builds: &[String]) -> Result<()> {
        match &self.zuul {
            Some(zuul) => zuul.remove(builds).await,
            None => Ok(()),
        }
    }

    /// Serves `requests` requests, because the first ones are slower: connections are made, and
    /// ZooKeeper's Java compiles its code.
    pub(crate) async fn warm_up(&self, requests: usize, lab: &mut Lab) -> Result<()> {
        let builds = self.builds(Log::Short(SHORT), requests).await?;
        lab.requests(self, &builds, true, 1, 60_000).await?;
        self.forget(&builds).await
    }

    /// Requests each of `builds` three times, so that a gateway has cached it.
    pub(crate) async fn fill_cache(&self, builds: &[String], lab: &mut Lab) -> Result<()> {
        let often: Vec<_> = std::iter::repeat_n(builds, 3).flatten().cloned().collect();
        lab.requests(self, &often, true, 1, 60_000).await?;
        Ok(())
    }

    /// The resources that its processes use together.
    pub(crate) fn usage(&self) -> Result<Usage> {
        let mut sum = Usage::default();
        for process in &self.processes {
            let usage = process.usage()?;
            sum.cpu += usage.cpu;
            sum.resident += usage.resident;
            sum.private += usage.private;
            sum.threads += usage.threads;
            sum.descriptors += usage.descriptors;
        }
        Ok(sum)
    }

    /// CPU seconds of its processes together.
    pub(crate) fn cpu(&self) -> Result<f64> {
        self.processes.iter().map(Process::cpu).sum()
    }

    /// Ends the processes with SIGTERM, so that valgrind writes its counts. Returns the output of
    /// each process.
    pub(crate) async fn end(mut self) -> Result<Vec<String>> {
        for process in &mut self.processes {
            process.end(Signal::TERM).await?;
        }
        Ok(self.processes.iter().map(Process::output).collect())
    }
}
