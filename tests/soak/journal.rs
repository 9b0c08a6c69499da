//! What was broken when, what each request met, and whether the one explains the other.

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

    /// The way from other gateways to this one.
    pub(crate) const fn link(number: usize) -> Self {
        Self(1 << (8 + number))
    }

    /// A gateway's way to ZooKeeper.
    pub(crate) const fn registry(number: usize) -> Self {
        Self(1 << (16 + number))
    }

    /// A zone's executor and the way to it.
    pub(crate) const fn executor(zone: usize) -> Self {
        Self(1 << (24 + zone))
    }

    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn meets(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

/// What a fault may do to a request that needs what it breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Harm {
    /// Nobody may notice: a reload.
    None,
    /// It may not be served. What is under way goes on, later.
    Begin,
    /// It may be cut as well, and that is seen.
    Cut,
    /// It may be cut, and its own client, if plain, sees the end that the kernel makes for a
    /// process that was killed.
    Kill,
}

struct Fault {
    name: &'static str,
    parts: Parts,
    harm: Harm,
    from: Instant,
    /// When all was well again.
    until: Option<Instant>,
}

/// What came of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    /// All of the log, and its end.
    Whole,
    /// The line or the end that was to come.
    AsDue,
    /// A part of the log, ended as a cut.
    Cut,
    /// A part of the log, with an end that says nothing: the kernel's, for a plain client.
    EndedShort,
    /// The client left, as it had planned.
    Left,
    /// No log, but a line that says why.
    Refused,
    /// No connection, or one that ended without a word.
    Nothing,
}

impl Outcome {
    pub(crate) const ALL: [(Self, &str); 7] = [
        (Self::Whole, "whole"),
        (Self::AsDue, "as due"),
        (Self::Left, "client left"),
        (Self::Cut, "cut, and seen so"),
        (Self::EndedShort, "end of a killed process"),
        (Self::Refused, "told why not"),
        (Self::Nothing, "no connection"),
    ];
}

/// A request that has ended.
pub(crate) struct Request {
    pub(crate) kind: &'static str,
    /// What has to work for it, from its first byte to its last.
    pub(crate) path: Parts,
    /// What has to work until its first byte.
    pub(crate) registry: Parts,
    /// Where it came in.
    pub(crate) entry: Parts,
    pub(crate) tls: bool,
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    pub(crate) bytes: u64,
    pub(crate) outcome: Outcome,
    /// Whether it could have ended so with nothing broken.
    pub(crate) expected: bool,
    /// What it was about, for whoever looks into a violation.
    pub(crate) detail: String,
}

#[derive(Default)]
pub(crate) struct Totals {
    /// By kind and outcome.
    pub(crate) requests: BTreeMap<&'static str, BTreeMap<Outcome, u64>>,
    /// Requests that were answered with bytes of a log.
    pub(crate) streams: u64,
    /// Of logs, each compared with what was to be sent.
    pub(crate) bytes: u64,
}

#[derive(Default)]
struct Entries {
    totals: Totals,
    faults: Vec<Fault>,
    /// Requests that only a fault explains.
    suspects: Vec<Request>,
    violations: Vec<String>,
}

/// How often a fault was tried, and how long it took until all was well again behind it.
pub(crate) struct Tried {
    pub(crate) times: u64,
    pub(crate) median: Duration,
    pub(crate) longest: Duration,
}

/// Everything that is written down.
#[derive(Default)]
pub(crate) struct Journal(Mutex<Entries>);

/// A fault that lasts.
pub(crate) struct Ongoing(usize);

impl Journal {
    fn entries(&self) -> std::sync::MutexGuard<'_, Entries> {
        self.0.lock().expect("nobody panics with it")
    }

    /// Writes down a fault before it begins.
    pub(crate) fn begin(&self, name: &'static str, parts: Parts, harm: Harm) -> Ongoing {
        let mut entries = self.entries();
        entries.faults.push(Fault { name, parts, harm, from: Instant::now(), until: None });
        Ongoing(entries.faults.len() - 1)
    }

    /// Writes down that all is well again.
    pub(crate) fn healed(&self, fault: Ongoing) {
        self.entries().faults[fault.0].until = Some(Instant::now());
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

    /// Something that no fault excuses.
    pub(crate) fn violation(&self, text: String) {
        eprintln!("VIOLATION: {text}");
        self.entries().violations.push(text);
    }

    /// Holds what requests met against the faults; call when all have ended. Returns how many were
    /// excused.
    pub(crate) fn judge(&self) -> usize {
        let mut entries = self.entries();
        let suspects = std::mem::take(&mut entries.suspects);
        let mut excused = 0;
        for request in suspects {
            if entries.faults.iter().any(|fault| explains(fault, &request)) {
                excused += 1;
                continue;
            }
            let Request { kind, outcome, detail, .. } = &request;
            let near: Vec<&str> = entries
                .faults
                .iter()
                .filter(|fault| fault.from <= request.ended)
                .map(|fault| fault.name)
                .collect();
            let last = &near[near.len().saturating_sub(3)..];
            let lasted = request.ended - request.began;
            let text = format!(
                "{kind}: {outcome:?} after {lasted:?} with nothing broken that it needs: {detail} \
                 (last faults: {last:?})"
            );
            eprintln!("VIOLATION: {text}");
            entries.violations.push(text);
        }
        excused
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        self.entries().violations.clone()
    }

    /// Empties the totals, for a part of the run that counts on its own.
    pub(crate) fn take_totals(&self) -> Totals {
        std::mem::take(&mut self.entries().totals)
    }

    pub(crate) fn faults(&self) -> BTreeMap<&'static str, Tried> {
        let mut times: BTreeMap<&'static str, Vec<Duration>> = BTreeMap::new();
        for fault in &self.entries().faults {
            let lasted = fault.until.unwrap_or_else(Instant::now) - fault.from;
            times.entry(fault.name).or_default().push(lasted);
        }
        let tried = |mut lasted: Vec<Duration>| {
            lasted.sort();
            Tried {
                times: lasted.len() as u64,
                median: lasted[lasted.len() / 2],
                longest: lasted[lasted.len() - 1],
            }
        };
        times.into_iter().map(|(name, lasted)| (name, tried(lasted))).collect()
    }
}

fn explains(fault: &Fault, request: &Request) -> bool {
    let meanwhile =
        fault.from <= request.ended && fault.until.is_none_or(|until| until >= request.began);
    let on_its_path = fault.parts.meets(request.path);
    meanwhile
        && match (request.outcome, fault.harm) {
            (_, Harm::None) => false,
            (Outcome::Cut, Harm::Begin) => false,
            (Outcome::Cut, Harm::Cut | Harm::Kill) => on_its_path,
            (Outcome::EndedShort, Harm::Kill) => !request.tls && fault.parts.meets(request.entry),
            (Outcome::EndedShort, _) => false,
            (_, Harm::Begin | Harm::Cut | Harm::Kill) => {
                on_its_path || fault.parts.meets(request.registry)
            }
        }
}
