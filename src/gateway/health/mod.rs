//! What became of asking the gateways of other zones: those that failed are avoided for a while.
//!
//! A gateway is known by host and port, as in the registry, and forgotten when it leaves that. The
//! first failure puts it behind the others for about a second, each further one for twice as long,
//! up to a minute; a log from it clears that. Failures while it is avoided anyway, of requests that
//! came together, count as one. An executor is not remembered: nobody else has its log.

use std::collections::VecDeque;
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::model::build_id::BuildId;
use crate::model::component::Gateway;
use crate::model::hop::Hop;

/// How long a gateway is avoided after its first failure, and at most; give or take a quarter, so
/// that many gateways do not come back to one in the same moment.
const AVOID_MIN: Duration = Duration::from_secs(1);
const AVOID_MAX: Duration = Duration::from_secs(60);

/// Gateways remembered. Beyond this the one asked longest ago is forgotten.
const GATEWAYS: usize = 1024;

/// Attempts remembered, of those that failed and of those that brought a log.
const ATTEMPTS: usize = 256;

/// The most of a reason that is remembered, in characters.
const REASON: usize = 200;

/// For how long nothing is said again of a gateway, though it brought a log meanwhile: an address that
/// leads to several servers, not all of them right, is not to make a line for each request.
const RETOLD: Duration = Duration::from_secs(600);

/// What kind of failure it was, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FailureKind {
    /// Requests come back.
    Loop,
    Other,
}

/// What is remembered of one gateway.
struct Record {
    hostname: String,
    port: u16,
    /// In a row. None: it brought a log when last asked.
    failures: u32,
    /// Why it failed last.
    reason: String,
    /// Avoided until then.
    until: Instant,
    /// It seems to lead back to us, so it is not asked at all while it is avoided.
    leads_back: bool,
    /// What has been said of its wiring, and when.
    told: Vec<(&'static str, Instant)>,
}

impl Record {
    fn new(gateway: &Gateway, now: Instant) -> Self {
        Self {
            hostname: gateway.hostname.clone(),
            port: gateway.port,
            failures: 0,
            reason: String::new(),
            until: now,
            leads_back: false,
            told: Vec::new(),
        }
    }

    fn is_of(&self, gateway: &Gateway) -> bool {
        self.port == gateway.port && self.hostname == gateway.hostname
    }
}

/// How a gateway stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Not asked since it is in the registry.
    NeverTried,
    /// Brought a log when last asked.
    Good,
    /// Failed, and is to be tried again.
    Due { failures: u32, reason: String },
    /// Failed, and comes behind the others for as long as this.
    Avoided { remaining: Duration, failures: u32, reason: String, leads_back: bool },
}

impl Standing {
    pub(crate) fn is_avoided(&self) -> bool {
        matches!(self, Self::Avoided { .. })
    }
}

/// One hop that was asked.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    pub(crate) at: SystemTime,
    pub(crate) build: BuildId,
    pub(crate) hop: Hop,
    /// What came of it; `None`: a log.
    pub(crate) failure: Option<String>,
}

/// Which gateways to avoid, and the last attempts. Live for all sessions; locked for moments.
#[derive(Default)]
pub(crate) struct Memory(Mutex<Known>);

#[derive(Default)]
struct Known {
    records: Vec<Record>,
    /// The registry's gateways when records were last held against them.
    registered: Option<Arc<[Gateway]>>,
    failed: VecDeque<Attempt>,
    answered: VecDeque<Attempt>,
}

impl Memory {
    /// How `gateway` stands.
    pub(crate) fn standing(&self, gateway: &Gateway) -> Standing {
        self.lock().standing(gateway, Instant::now())
    }

    /// `hops` in the order to try them, and whether each is avoided: gateways, those that are avoided
    /// behind the good ones, the executor, and behind it those that are not asked: they lead back to
    /// us. `registered` are all there are: others are forgotten.
    pub(crate) fn order(&self, hops: &[Hop], registered: Arc<[Gateway]>) -> Vec<(Hop, bool)> {
        let now = Instant::now();
        let mut known = self.lock();
        known.hold_against(registered);
        let mut ranked: Vec<_> = hops
            .iter()
            .map(|hop| {
                let rank = match hop {
                    Hop::Executor(_) => 2,
                    Hop::Gateway(gateway) => match known.standing(gateway, now) {
                        Standing::Avoided { leads_back: true, .. } => 3,
                        Standing::Avoided { .. } => 1,
                        _ => 0,
                    },
                };
                (rank, hop.clone())
            })
            .collect();
        // Stable: among equals it stays as it was drawn.
        ranked.sort_by_key(|(rank, _)| *rank);
        ranked.into_iter().map(|(rank, hop)| (hop, matches!(rank, 1 | 3))).collect()
    }

    /// Notes that `hop` brought the log of `build`.
    pub(crate) fn answered(&self, build: &BuildId, hop: &Hop) {
        let attempt = Attempt::new(build, hop, None);
        let now = Instant::now();
        let mut known = self.lock();
        push(&mut known.answered, attempt);
        if let Hop::Gateway(gateway) = hop {
            let record = known.record(gateway, now);
            // What leads back to us brings the log that one of us had elsewhere.
            if !(record.leads_back && record.until > now) {
                let mut told = std::mem::take(&mut record.told);
                told.retain(|(_, at)| now.saturating_duration_since(*at) < RETOLD);
                *record = Record { told, ..Record::new(gateway, now) };
            }
        }
    }

    /// Notes that `hop` did not bring the log of `build`, and why.
    pub(crate) fn failed(
        &self,
        build: &BuildId,
        hop: &Hop,
        reason: &dyn Display,
        kind: FailureKind,
    ) {
        let reason = bounded(&reason.to_string());
        let attempt = Attempt::new(build, hop, Some(reason.clone()));
        let now = Instant::now();
        let mut known = self.lock();
        push(&mut known.failed, attempt);
        let Hop::Gateway(gateway) = hop else { return };
        let record = known.record(gateway, now);
        let fresh = record.until <= now;
        let leads_back = kind == FailureKind::Loop;
        // In a circle the others fail of the one that found it: that is not why.
        if fresh || leads_back || !record.leads_back {
            record.reason = reason;
        }
        record.leads_back = leads_back || record.leads_back && !fresh;
        if fresh {
            record.failures = record.failures.saturating_add(1);
            record.until = now + delay(record.failures);
        }
    }

    /// Whether `kind` of mistake in the wiring has not been said of `gateway` yet. From now on it
    /// has, until a log comes from it, a while later.
    pub(crate) fn is_news(&self, gateway: &Gateway, kind: &'static str) -> bool {
        let now = Instant::now();
        let mut known = self.lock();
        let told = &mut known.record(gateway, now).told;
        let news = told.iter().all(|(before, _)| *before != kind);
        if news {
            told.push((kind, now));
        }
        news
    }

    /// The last attempts at `build` and at `hops`, the oldest first.
    pub(crate) fn recent(&self, build: &BuildId, hops: &[Hop]) -> Vec<Attempt> {
        let known = self.lock();
        let all = known.failed.iter().chain(&known.answered);
        let concerns = |attempt: &&Attempt| attempt.build == *build || hops.contains(&attempt.hop);
        let mut recent: Vec<_> = all.filter(concerns).cloned().collect();
        drop(known);
        recent.sort_by_key(|attempt| attempt.at);
        recent
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // Whole between any two statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// Forgets the gateways that are not `registered`.
    fn hold_against(&mut self, registered: Arc<[Gateway]>) {
        if self.registered.as_ref().is_some_and(|before| Arc::ptr_eq(before, &registered)) {
            return;
        }
        self.records.retain(|record| registered.iter().any(|gateway| record.is_of(gateway)));
        self.registered = Some(registered);
    }

    fn standing(&self, gateway: &Gateway, now: Instant) -> Standing {
        let Some(record) = self.records.iter().find(|record| record.is_of(gateway)) else {
            return Standing::NeverTried;
        };
        let Record { failures, ref reason, until, leads_back, .. } = *record;
        match until.saturating_duration_since(now) {
            _ if failures == 0 => Standing::Good,
            Duration::ZERO => Standing::Due { failures, reason: reason.clone() },
            remaining => {
                Standing::Avoided { remaining, failures, reason: reason.clone(), leads_back }
            }
        }
    }

    /// The record of `gateway`, the last one asked from now on.
    fn record(&mut self, gateway: &Gateway, now: Instant) -> &mut Record {
        let record = match self.records.iter().position(|record| record.is_of(gateway)) {
            Some(index) => self.records.remove(index),
            None => {
                if self.records.len() >= GATEWAYS {
                    self.records.remove(0);
                }
                Record::new(gateway, now)
            }
        };
        self.records.push(record);
        self.records.last_mut().expect("just pushed")
    }
}

impl Attempt {
    fn new(build: &BuildId, hop: &Hop, failure: Option<String>) -> Self {
        Self { at: SystemTime::now(), build: build.clone(), hop: hop.clone(), failure }
    }
}

/// Printable and not too long: in it may be what a peer has sent.
fn bounded(reason: &str) -> String {
    reason.chars().filter(|char| !char.is_control()).take(REASON).collect()
}

fn push(attempts: &mut VecDeque<Attempt>, attempt: Attempt) {
    if attempts.len() >= ATTEMPTS {
        attempts.pop_front();
    }
    attempts.push_back(attempt);
}

/// How long to avoid a gateway that has failed so often in a row.
fn delay(failures: u32) -> Duration {
    let doubled = 1u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX);
    let delay = AVOID_MIN.saturating_mul(doubled).min(AVOID_MAX);
    delay.mul_f64(0.75 + 0.5 * fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::build_request::Executor;

    fn gateway(port: u16) -> Gateway {
        Gateway { hostname: "gw".to_owned(), port, zone: Some("west".to_owned()), tls: false }
    }

    fn hop(port: u16) -> Hop {
        Hop::Gateway(gateway(port))
    }

    fn executor() -> Hop {
        Hop::Executor(Executor { hostname: "ze".to_owned(), port: 7900, zone: None })
    }

    fn build() -> BuildId {
        BuildId::new("ab").expect("a build id")
    }

    fn ports(memory: &Memory, hops: &[Hop], registered: &[u16]) -> Vec<(u16, bool)> {
        let registered: Vec<_> = registered.iter().copied().map(gateway).collect();
        let ordered = memory.order(hops, registered.into());
        ordered.iter().map(|(hop, avoided)| (hop.address().1, *avoided)).collect()
    }

    #[test]
    fn delays_grow_up_to_a_bound_and_are_jittered() {
        fastrand::seed(1);
        let mut distinct = std::collections::BTreeSet::new();
        for (failures, seconds) in [(1, 1.0), (2, 2.0), (3, 4.0), (6, 32.0), (7, 60.0), (99, 60.0)]
        {
            for _ in 0..50 {
                let delay = delay(failures);
                let range = seconds * 0.75..=seconds * 1.25;
                assert!(range.contains(&delay.as_secs_f64()), "{failures}: {delay:?}");
                distinct.insert(delay);
            }
        }
        assert!(distinct.len() > 100, "no jitter");
    }

    #[test]
    fn failed_ones_come_behind_the_good_and_before_the_executor() {
        let memory = Memory::default();
        let hops = [hop(1), hop(2), hop(3), executor()];
        let registered = [1, 2, 3];
        let order = |memory: &Memory| ports(memory, &hops, &registered);
        assert_eq!(order(&memory), [(1, false), (2, false), (3, false), (7900, false)]);
        memory.failed(&build(), &hops[0], &"refused", FailureKind::Other);
        assert_eq!(order(&memory), [(2, false), (3, false), (1, true), (7900, false)]);
        memory.failed(&build(), &hops[1], &"leads back", FailureKind::Loop);
        assert_eq!(order(&memory), [(3, false), (1, true), (7900, false), (2, true)]);
        memory.answered(&build(), &hops[0]);
        memory.answered(&build(), &hops[1]);
        assert_eq!(order(&memory), [(1, false), (3, false), (7900, false), (2, true)]);
        memory.failed(&build(), &executor(), &"refused", FailureKind::Other);
        assert_eq!(order(&memory).len(), 4);
    }

    #[test]
    fn failures_that_come_together_count_once() {
        let memory = Memory::default();
        assert_eq!(memory.standing(&gateway(1)), Standing::NeverTried);
        for _ in 0..100 {
            memory.failed(&build(), &hop(1), &"refused", FailureKind::Other);
        }
        match memory.standing(&gateway(1)) {
            Standing::Avoided { remaining, failures: 1, reason, leads_back: false } => {
                assert!(remaining < AVOID_MAX / 10 && reason == "refused");
            }
            standing => panic!("{standing:?}"),
        }
        memory.lock().records[0].until = Instant::now();
        let due = Standing::Due { failures: 1, reason: "refused".to_owned() };
        assert_eq!(memory.standing(&gateway(1)), due);
        memory.failed(&build(), &hop(1), &"again", FailureKind::Other);
        assert!(matches!(memory.standing(&gateway(1)), Standing::Avoided { failures: 2, .. }));
        memory.answered(&build(), &hop(1));
        assert_eq!(memory.standing(&gateway(1)), Standing::Good);
    }

    #[test]
    fn who_leaves_the_registry_is_forgotten() {
        let memory = Memory::default();
        memory.failed(&build(), &hop(1), &"refused", FailureKind::Other);
        memory.failed(&build(), &hop(2), &"refused", FailureKind::Other);
        ports(&memory, &[], &[2, 3]);
        assert_eq!(memory.standing(&gateway(1)), Standing::NeverTried);
        assert!(memory.standing(&gateway(2)).is_avoided());
    }

    #[test]
    fn a_mistake_is_news_once_until_it_is_mended() {
        let memory = Memory::default();
        let told: Vec<_> = (0..3).map(|_| memory.is_news(&gateway(1), "zone")).collect();
        assert_eq!(told, [true, false, false]);
        assert!(memory.is_news(&gateway(2), "zone") && memory.is_news(&gateway(1), "circle"));
        memory.answered(&build(), &hop(1));
        assert!(!memory.is_news(&gateway(1), "circle"), "a moment ago");
        for record in &mut memory.lock().records {
            record.told.iter_mut().for_each(|(_, at)| *at -= RETOLD);
        }
        assert!(!memory.is_news(&gateway(1), "circle"), "not mended");
        memory.answered(&build(), &hop(1));
        assert!(memory.is_news(&gateway(1), "circle"));
    }

    #[test]
    fn what_led_back_may_fail_otherwise_later() {
        let memory = Memory::default();
        let failed = |reason: &str, kind| {
            memory.failed(&build(), &hop(1), &reason, kind);
            match memory.standing(&gateway(1)) {
                Standing::Avoided { reason, leads_back, .. } => (reason, leads_back),
                standing => panic!("{standing:?}"),
            }
        };
        assert_eq!(failed("silent", FailureKind::Other), ("silent".to_owned(), false));
        assert_eq!(failed("circle", FailureKind::Loop), ("circle".to_owned(), true));
        assert_eq!(failed("refused", FailureKind::Other), ("circle".to_owned(), true));
        memory.lock().records[0].until = Instant::now();
        assert_eq!(failed("refused", FailureKind::Other), ("refused".to_owned(), false));
    }

    #[test]
    fn memory_is_bounded() {
        let memory = Memory::default();
        for port in 0..3000 {
            memory.failed(&build(), &hop(port), &"x".repeat(5000), FailureKind::Other);
            memory.answered(&build(), &executor());
        }
        let known = memory.lock();
        assert_eq!(known.records.len(), GATEWAYS);
        assert_eq!((known.failed.len(), known.answered.len()), (ATTEMPTS, ATTEMPTS));
        assert!(known.failed.iter().all(|attempt| attempt.failure.as_ref().unwrap().len() < 300));
    }
}
