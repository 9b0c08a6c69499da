//! Passive health of gateways of other zones: failed ones are tried after the others for a while.
//!
//! A gateway is identified by the host and port of its registration, and forgotten when it is no
//! longer registered. After its first failure it backs off for about a second, after each further
//! one for twice as long, up to a minute; an answer ends the back-off. Failures during the back-off
//! count once, because they come from requests that were sent together. The health of executors is
//! not recorded: no other hop has their logs.

use std::collections::VecDeque;
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::model::build_id::BuildId;
use crate::model::component::Gateway;
use crate::model::hop::Hop;

/// The first and the longest back-off. A random quarter is added or taken away, so that many
/// gateways do not retry one at the same time.
const BACK_OFF_MIN: Duration = Duration::from_secs(1);
const BACK_OFF_MAX: Duration = Duration::from_secs(60);

/// Gateways with a record. If there are more, the one that was tried longest ago is forgotten.
const MAX_RECORDS: usize = 1024;

/// Recorded attempts: as many failed ones, and as many successful ones.
const MAX_ATTEMPTS: usize = 256;

/// The longest recorded reason, in characters.
const MAX_REASON: usize = 200;

/// The minimum interval between two warnings of one kind about a gateway, even if it answered
/// in between: an address that is balanced over right and wrong servers must not cause a log line
/// for each request.
const WARNING_INTERVAL: Duration = Duration::from_secs(600);

/// What a failure means for the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FailureKind {
    /// Requests to it go in a loop, so it must not be tried while it backs off.
    Loop,
    Other,
}

/// A registered address that leads elsewhere than to the gateway that is registered with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Misrouting {
    /// To this gateway, or to one that sends requests on.
    Loop,
    /// To a gateway of another zone.
    WrongZone,
}

impl Misrouting {
    /// The value of the metric label `kind`.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Loop => "loop",
            Self::WrongZone => "wrong_zone",
        }
    }
}

/// The health of a gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    /// Not tried since it was registered.
    Untried,
    /// It answered when it was last tried: with a log or a final reply.
    Healthy,
    /// It has failed, and the back-off is over.
    RetryDue(Failures),
    /// It is tried after the others, or not at all if requests to it go in a loop.
    BackingOff { remaining: Duration, is_loop: bool, failures: Failures },
}

/// The failures of a gateway since its last success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failures {
    pub(crate) count: u32,
    pub(crate) last_reason: String,
}

/// A candidate hop, in the order in which hops are tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RankedHop {
    pub(crate) hop: Hop,
    pub(crate) rank: Rank,
}

/// The order in which hops are tried, lowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    /// A gateway that does not back off.
    Available,
    /// A gateway that backs off.
    BackingOff,
    Executor,
    /// Not tried: requests to it go in a loop.
    Loop,
}

/// An attempt to get a log from a hop.
#[derive(Clone, Debug)]
pub(crate) struct AttemptRecord {
    pub(crate) at: Instant,
    pub(crate) build: BuildId,
    pub(crate) hop: Hop,
    /// `None` if the hop answered: with a log or a final reply.
    pub(crate) failure: Option<String>,
}

/// The health of all gateways that have been tried, and the last attempts. Shared by all sessions,
/// which lock it for short times.
#[derive(Default)]
pub(crate) struct GatewayHealth(Mutex<State>);

#[derive(Default)]
struct State {
    /// The one that was tried longest ago is the first.
    records: Vec<GatewayRecord>,
    /// The registered gateways when others were last forgotten.
    registered: Option<Arc<[Gateway]>>,
    failed: VecDeque<AttemptRecord>,
    succeeded: VecDeque<AttemptRecord>,
}

/// The record of one gateway.
struct GatewayRecord {
    hostname: String,
    port: u16,
    failures: Option<Failures>,
    /// When the back-off ends.
    retry_at: Instant,
    /// The back-off began with a [`FailureKind::Loop`].
    is_loop: bool,
    /// The warnings that have been logged, and when.
    warned: Vec<(Misrouting, Instant)>,
}

impl GatewayHealth {
    pub(crate) fn health(&self, gateway: &Gateway, now: Instant) -> Health {
        self.lock().health(gateway, now)
    }

    /// Forgets all gateways except the `registered` ones.
    pub(crate) fn retain_registered(&self, registered: Arc<[Gateway]>) {
        let mut state = self.lock();
        if state.registered.as_ref().is_some_and(|before| Arc::ptr_eq(before, &registered)) {
            return;
        }
        state.records.retain(|record| registered.iter().any(|gateway| record.is_of(gateway)));
        state.registered = Some(registered);
    }

    /// Sorts `hops` by rank; hops of the same rank keep their order.
    pub(crate) fn rank(&self, hops: Vec<Hop>, now: Instant) -> Vec<RankedHop> {
        let state = self.lock();
        let ranked = hops.into_iter().map(|hop| RankedHop { rank: state.rank(&hop, now), hop });
        let mut ranked: Vec<_> = ranked.collect();
        ranked.sort_by_key(|ranked| ranked.rank);
        ranked
    }

    /// Records that `hop` has answered the request for `build`: with the log, or with a reply that
    /// no other hop can improve, such as `Build not found`.
    pub(crate) fn record_success(&self, build: &BuildId, hop: &Hop, now: Instant) {
        let mut state = self.lock();
        let attempt =
            AttemptRecord { at: now, build: build.clone(), hop: hop.clone(), failure: None };
        push(&mut state.succeeded, attempt);
        let Hop::Gateway(gateway) = hop else { return };
        let record = state.record(gateway, now);
        // Another gateway of a loop may have got the log elsewhere.
        if record.is_loop && record.retry_at > now {
            return;
        }
        record.failures = None;
        record.retry_at = now;
        record.is_loop = false;
        record.warned.retain(|(_, at)| now.saturating_duration_since(*at) < WARNING_INTERVAL);
    }

    /// Records that `hop` has not sent the log of `build`.
    pub(crate) fn record_failure(
        &self,
        build: &BuildId,
        hop: &Hop,
        reason: &dyn Display,
        kind: FailureKind,
        now: Instant,
    ) {
        let reason = printable(&reason.to_string());
        let failure = Some(reason.clone());
        let mut state = self.lock();
        let attempt = AttemptRecord { at: now, build: build.clone(), hop: hop.clone(), failure };
        push(&mut state.failed, attempt);
        let Hop::Gateway(gateway) = hop else { return };
        let record = state.record(gateway, now);
        let backs_off = record.retry_at > now;
        let is_loop = kind == FailureKind::Loop;
        let count = record.failures.as_ref().map_or(0, |failures| failures.count);
        if !backs_off {
            let count = count.saturating_add(1);
            record.failures = Some(Failures { count, last_reason: reason });
            record.retry_at = now + back_off(count);
            record.is_loop = is_loop;
        } else if is_loop || !record.is_loop {
            // Requests that were sent together also fail because of the loop: its reason stays.
            record.failures = Some(Failures { count, last_reason: reason });
            record.is_loop |= is_loop;
        }
    }

    /// Returns whether a warning about `misrouting` of `gateway` should be logged: once, until the
    /// gateway sends a log at least [`WARNING_INTERVAL`] later.
    pub(crate) fn should_warn(
        &self,
        gateway: &Gateway,
        misrouting: Misrouting,
        now: Instant,
    ) -> bool {
        let mut state = self.lock();
        let warned = &mut state.record(gateway, now).warned;
        if warned.iter().any(|(before, _)| *before == misrouting) {
            return false;
        }
        warned.push((misrouting, now));
        true
    }

    /// Returns the last attempts at `build` and at `hops`, the oldest first.
    pub(crate) fn recent_attempts(&self, build: &BuildId, hops: &[Hop]) -> Vec<AttemptRecord> {
        let state = self.lock();
        let concerns =
            |attempt: &&AttemptRecord| attempt.build == *build || hops.contains(&attempt.hop);
        let all = state.failed.iter().chain(&state.succeeded);
        let mut recent: Vec<_> = all.filter(concerns).cloned().collect();
        drop(state);
        recent.sort_by_key(|attempt| attempt.at);
        recent
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent between any two statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn health(&self, gateway: &Gateway, now: Instant) -> Health {
        let Some(record) = self.records.iter().find(|record| record.is_of(gateway)) else {
            return Health::Untried;
        };
        let Some(failures) = record.failures.clone() else { return Health::Healthy };
        let remaining = record.retry_at.saturating_duration_since(now);
        if remaining.is_zero() {
            return Health::RetryDue(failures);
        }
        Health::BackingOff { remaining, is_loop: record.is_loop, failures }
    }

    fn rank(&self, hop: &Hop, now: Instant) -> Rank {
        let Hop::Gateway(gateway) = hop else { return Rank::Executor };
        match self.health(gateway, now) {
            Health::BackingOff { is_loop: true, .. } => Rank::Loop,
            Health::BackingOff { .. } => Rank::BackingOff,
            _ => Rank::Available,
        }
    }

    /// Returns the record of `gateway`, a new one if necessary, and moves it to the end.
    fn record(&mut self, gateway: &Gateway, now: Instant) -> &mut GatewayRecord {
        let record = match self.records.iter().position(|record| record.is_of(gateway)) {
            Some(index) => self.records.remove(index),
            None => {
                if self.records.len() >= MAX_RECORDS {
                    self.records.remove(0);
                }
                GatewayRecord {
                    hostname: gateway.hostname.clone(),
                    port: gateway.port,
                    failures: None,
                    retry_at: now,
                    is_loop: false,
                    warned: Vec::new(),
                }
            }
        };
        self.records.push(record);
        self.records.last_mut().expect("a record has just been pushed")
    }
}

impl GatewayRecord {
    fn is_of(&self, gateway: &Gateway) -> bool {
        self.port == gateway.port && self.hostname == gateway.hostname
    }
}

/// Returns `reason` without control characters and not too long: it may contain what a peer has
/// sent.
fn printable(reason: &str) -> String {
    reason.chars().filter(|char| !char.is_control()).take(MAX_REASON).collect()
}

fn push(attempts: &mut VecDeque<AttemptRecord>, attempt: AttemptRecord) {
    if attempts.len() >= MAX_ATTEMPTS {
        attempts.pop_front();
    }
    attempts.push_back(attempt);
}

/// Returns the back-off after this many consecutive failures.
fn back_off(failures: u32) -> Duration {
    let factor = 1u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX);
    let back_off = BACK_OFF_MIN.saturating_mul(factor).min(BACK_OFF_MAX);
    back_off.mul_f64(0.75 + 0.5 * fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::Rank::{Available, BackingOff};
    use super::*;
    use crate::model::build_request::Executor;

    /// Longer than any back-off.
    const LATER: Duration = Duration::from_secs(90);

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
        BuildId::new("ab").expect("a build ID")
    }

    fn fail(health: &GatewayHealth, port: u16, reason: &str, kind: FailureKind, now: Instant) {
        health.record_failure(&build(), &hop(port), &reason, kind, now);
    }

    fn failures(count: u32, reason: &str) -> Failures {
        Failures { count, last_reason: reason.to_owned() }
    }

    #[test]
    fn back_off_doubles_up_to_a_minute_with_jitter() {
        let mut distinct = std::collections::BTreeSet::new();
        for (failures, seconds) in [(1, 1.0), (2, 2.0), (3, 4.0), (6, 32.0), (7, 60.0), (99, 60.0)]
        {
            for _ in 0..50 {
                let back_off = back_off(failures);
                let range = seconds * 0.75..=seconds * 1.25;
                assert!(range.contains(&back_off.as_secs_f64()), "{failures}: {back_off:?}");
                distinct.insert(back_off);
            }
        }
        assert!(distinct.len() > 100, "no jitter");
    }

    #[test]
    fn gateways_that_back_off_rank_after_the_others_and_before_the_executor() {
        let health = GatewayHealth::default();
        let now = Instant::now();
        let ranked = |now| {
            let hops = vec![hop(1), hop(2), hop(3), executor()];
            let ranked = health.rank(hops, now);
            ranked.iter().map(|ranked| (ranked.hop.address().1, ranked.rank)).collect::<Vec<_>>()
        };
        assert_eq!(
            ranked(now),
            [(1, Available), (2, Available), (3, Available), (7900, Rank::Executor)]
        );
        fail(&health, 1, "refused", FailureKind::Other, now);
        assert_eq!(
            ranked(now),
            [(2, Available), (3, Available), (1, BackingOff), (7900, Rank::Executor)]
        );
        fail(&health, 2, "loop", FailureKind::Loop, now);
        assert_eq!(
            ranked(now),
            [(3, Available), (1, BackingOff), (7900, Rank::Executor), (2, Rank::Loop)]
        );
        health.record_success(&build(), &hop(1), now);
        health.record_success(&build(), &hop(2), now);
        assert_eq!(
            ranked(now),
            [(1, Available), (3, Available), (7900, Rank::Executor), (2, Rank::Loop)]
        );
        assert!(ranked(now + LATER).iter().all(|(_, rank)| *rank <= Rank::Executor));
        health.record_failure(&build(), &executor(), &"refused", FailureKind::Other, now);
        assert_eq!(ranked(now).len(), 4);
    }

    #[test]
    fn failures_during_a_back_off_count_once() {
        let health = GatewayHealth::default();
        let now = Instant::now();
        assert_eq!(health.health(&gateway(1), now), Health::Untried);
        for _ in 0..100 {
            fail(&health, 1, "refused", FailureKind::Other, now);
        }
        match health.health(&gateway(1), now) {
            Health::BackingOff { remaining, is_loop: false, failures: actual } => {
                assert!(remaining < 2 * BACK_OFF_MIN, "{remaining:?}");
                assert_eq!(actual, failures(1, "refused"));
            }
            health => panic!("{health:?}"),
        }
        let now = now + LATER;
        let due = Health::RetryDue(failures(1, "refused"));
        assert_eq!(health.health(&gateway(1), now), due);
        fail(&health, 1, "again", FailureKind::Other, now);
        let Health::BackingOff { failures: actual, .. } = health.health(&gateway(1), now) else {
            panic!("no back-off");
        };
        assert_eq!(actual, failures(2, "again"));
        health.record_success(&build(), &hop(1), now);
        assert_eq!(health.health(&gateway(1), now), Health::Healthy);
    }

    #[test]
    fn gateway_that_is_no_longer_registered_is_forgotten() {
        let health = GatewayHealth::default();
        let now = Instant::now();
        fail(&health, 1, "refused", FailureKind::Other, now);
        fail(&health, 2, "refused", FailureKind::Other, now);
        health.retain_registered([2, 3].map(gateway).into());
        assert_eq!(health.health(&gateway(1), now), Health::Untried);
        assert!(matches!(health.health(&gateway(2), now), Health::BackingOff { .. }));
    }

    #[test]
    fn misrouting_is_warned_about_once_until_it_is_fixed_later() {
        let health = GatewayHealth::default();
        let now = Instant::now();
        let warns = |port, misrouting, now| health.should_warn(&gateway(port), misrouting, now);
        assert!(warns(1, Misrouting::WrongZone, now));
        assert!(!warns(1, Misrouting::WrongZone, now));
        assert!(warns(2, Misrouting::WrongZone, now) && warns(1, Misrouting::Loop, now));
        health.record_success(&build(), &hop(1), now);
        assert!(!warns(1, Misrouting::Loop, now), "too early");
        let now = now + WARNING_INTERVAL;
        assert!(!warns(1, Misrouting::Loop, now), "not fixed");
        health.record_success(&build(), &hop(1), now);
        assert!(warns(1, Misrouting::Loop, now));
    }

    #[test]
    fn reason_of_a_loop_stays_until_the_back_off_is_over() {
        let health = GatewayHealth::default();
        let now = Instant::now();
        let failed = |reason: &str, kind, now| {
            fail(&health, 1, reason, kind, now);
            match health.health(&gateway(1), now) {
                Health::BackingOff { is_loop, failures, .. } => (failures.last_reason, is_loop),
                health => panic!("{health:?}"),
            }
        };
        assert_eq!(failed("silent", FailureKind::Other, now), ("silent".to_owned(), false));
        assert_eq!(failed("loop", FailureKind::Loop, now), ("loop".to_owned(), true));
        assert_eq!(failed("refused", FailureKind::Other, now), ("loop".to_owned(), true));
        let refused = failed("refused", FailureKind::Other, now + LATER);
        assert_eq!(refused, ("refused".to_owned(), false));
    }

    #[test]
    fn records_and_attempts_are_bounded() {
        let health = GatewayHealth::default();
        let now = Instant::now();
        for port in 0..3000 {
            fail(&health, port, &"x".repeat(5000), FailureKind::Other, now);
            health.record_success(&build(), &executor(), now);
        }
        let state = health.lock();
        assert_eq!(state.records.len(), MAX_RECORDS);
        assert_eq!((state.failed.len(), state.succeeded.len()), (MAX_ATTEMPTS, MAX_ATTEMPTS));
        let longest = state.failed.iter().filter_map(|attempt| attempt.failure.as_ref());
        assert_eq!(longest.map(String::len).max(), Some(MAX_REASON));
    }
}
