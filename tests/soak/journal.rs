//! Records failures and requests, and checks that failures explain the results of requests.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// A set of parts of the system, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parts(pub(crate) u32);

impl Parts {
    /// ZooKeeper itself.
    pub(crate) const ZOOKEEPER: Self = Self(1 << 31);

    /// A gateway's process.
    pub(crate) const fn gateway(number: usize) -> Self {
        Self(1 << number)
    }

    /// The link from other gateways to this one.
    pub(crate) const fn link(number: usize) -> Self {
        Self(1 << (8 + number))
    }

    /// A gateway's link to ZooKeeper.
    pub(crate) const fn registry(number: usize) -> Self {
        Self(1 << (16 + number))
    }

    /// A zone's executor and the link to it.
    pub(crate) const fn executor(zone: usize) -> Self {
        Self(1 << (24 + zone))
    }

    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn overlaps(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

/// The effect that a failure may have on requests that need the failed parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Harm {
    /// None: a reload.
    None,
    /// New requests may not be served. Streams are only delayed.
    Begin,
    /// Streams may be aborted, visibly for the client.
    Cut,
    /// Streams may be aborted. A plain client of the killed process itself sees an orderly end,
    /// which the kernel sends.
    Kill,
}

struct Failure {
    name: &'static str,
    parts: Parts,
    harm: Harm,
    from: Instant,
    /// When everything had recovered.
    until: Option<Instant>,
}

/// The result of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    /// The complete log and its end.
    Complete,
    /// The expected reply or end.
    AsExpected,
    /// A part of the log, and a reset.
    Cut,
    /// A part of the log, and an orderly end: for a plain client, that of the kernel.
    EndedShort,
    /// The client left, as intended.
    Left,
    /// A reply with the reason.
    Refused,
    /// No connection, or one that ended without data.
    Nothing,
}

impl Outcome {
    pub(crate) const ALL: [(Self, &str); 7] = [
        (Self::Complete, "complete"),
        (Self::AsExpected, "as expected"),
        (Self::Left, "client left"),
        (Self::Cut, "cut, and recognized"),
        (Self::EndedShort, "end of a killed process"),
        (Self::Refused, "answered with a reason"),
        (Self::Nothing, "no connection"),
    ];
}

/// A request that has ended.
pub(crate) struct Request {
    pub(crate) kind: &'static str,
    /// The parts that must work until its last byte.
    pub(crate) path: Parts,
    /// The parts that must work until its first byte.
    pub(crate) registry: Parts,
    /// The gateway that the client is connected to.
    pub(crate) entry: Parts,
    pub(crate) tls: bool,
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    pub(crate) bytes: u64,
    pub(crate) outcome: Outcome,
    /// Whether this outcome needs no failure.
    pub(crate) expected: bool,
    /// Details for the report of a violation.
    pub(crate) detail: String,
}

#[derive(Default)]
pub(crate) struct Totals {
    /// By kind and outcome.
    pub(crate) requests: BTreeMap<&'static str, BTreeMap<Outcome, u64>>,
    /// Requests that received bytes of a log.
    pub(crate) streams: u64,
    /// Bytes of logs, each compared with what was sent.
    pub(crate) bytes: u64,
}

#[derive(Default)]
struct Entries {
    totals: Totals,
    failures: Vec<Failure>,
    /// Requests that need a failure as their explanation.
    suspects: Vec<Request>,
    violations: Vec<String>,
}

/// How often a kind of failure happened, and how long the recovery took.
pub(crate) struct FailureSummary {
    pub(crate) times: u64,
    pub(crate) median: Duration,
    pub(crate) longest: Duration,
}

/// The record of failures and requests.
#[derive(Default)]
pub(crate) struct Journal(Mutex<Entries>);

/// A failure that has not ended.
pub(crate) struct Ongoing(usize);

impl Journal {
    fn entries(&self) -> std::sync::MutexGuard<'_, Entries> {
        self.0.lock().expect("no panic while it is locked")
    }

    /// Records a failure before it begins.
    pub(crate) fn begin(&self, name: &'static str, parts: Parts, harm: Harm) -> Ongoing {
        let mut entries = self.entries();
        entries.failures.push(Failure { name, parts, harm, from: Instant::now(), until: None });
        Ongoing(entries.failures.len() - 1)
    }

    /// Records that everything has recovered.
    pub(crate) fn recovered(&self, failure: Ongoing) {
        self.entries().failures[failure.0].until = Some(Instant::now());
    }

    pub(crate) fn request(&self, request: Request) {
        let mut entries = self.entries();
        let totals = &mut entries.totals;
        *totals.requests.entry(request.kind).or_default().entry(request.outcome).or_default() += 1;
        totals.bytes += request.bytes;
        totals.streams += u64::from(request.bytes > 0);
        if !request.expected {
            entries.suspects.push(request);
        }
    }

    /// Records a violation, which no failure explains.
    pub(crate) fn violation(&self, text: String) {
        eprintln!("VIOLATION: {text}");
        self.entries().violations.push(text);
    }

    /// Checks that failures explain the outcomes of requests, after all requests have ended.
    /// Returns how many they explain.
    pub(crate) fn explain(&self) -> usize {
        let mut entries = self.entries();
        let suspects = std::mem::take(&mut entries.suspects);
        let mut explained = 0;
        for request in suspects {
            if entries.failures.iter().any(|failure| explains(failure, &request)) {
                explained += 1;
                continue;
            }
            let Request { kind, outcome, detail, .. } = &request;
            let near: Vec<&str> = entries
                .failures
                .iter()
                .filter(|failure| failure.from <= request.ended)
                .map(|failure| failure.name)
                .collect();
            let last = &near[near.len().saturating_sub(3)..];
            let lasted = request.ended - request.began;
            let text = format!(
                "{kind}: {outcome:?} after {lasted:?} without a failure that explains it: {detail} \
                 (last failures: {last:?})"
            );
            eprintln!("VIOLATION: {text}");
            entries.violations.push(text);
        }
        explained
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        self.entries().violations.clone()
    }

    /// Takes the totals, for a part of the run that is counted separately.
    pub(crate) fn take_totals(&self) -> Totals {
        std::mem::take(&mut self.entries().totals)
    }

    pub(crate) fn failures(&self) -> BTreeMap<&'static str, FailureSummary> {
        let mut times: BTreeMap<&'static str, Vec<Duration>> = BTreeMap::new();
        for failure in &self.entries().failures {
            let lasted = failure.until.unwrap_or_else(Instant::now) - failure.from;
            times.entry(failure.name).or_default().push(lasted);
        }
        let tried = |mut lasted: Vec<Duration>| {
            lasted.sort();
            FailureSummary {
                times: lasted.len() as u64,
                median: lasted[lasted.len() / 2],
                longest: lasted[lasted.len() - 1],
            }
        };
        times.into_iter().map(|(name, lasted)| (name, tried(lasted))).collect()
    }
}

fn explains(failure: &Failure, request: &Request) -> bool {
    let meanwhile =
        failure.from <= request.ended && failure.until.is_none_or(|until| until >= request.began);
    let on_its_path = failure.parts.overlaps(request.path);
    meanwhile
        && match (request.outcome, failure.harm) {
            (_, Harm::None) => false,
            (Outcome::Cut, Harm::Begin) => false,
            (Outcome::Cut, Harm::Cut | Harm::Kill) => on_its_path,
            (Outcome::EndedShort, Harm::Kill) => {
                !request.tls && failure.parts.overlaps(request.entry)
            }
            (Outcome::EndedShort, _) => false,
            (_, Harm::Begin | Harm::Cut | Harm::Kill) => {
                on_its_path || failure.parts.overlaps(request.registry)
            }
        }
}
