//! Explains a routing decision (`zuul-fingergw resolve`): where a build runs, which hops would be
//! tried for it now and in which order, their health, and the recent attempts at them.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::Router;
use crate::gateway::health::{AttemptRecord, GatewayHealth, Health};
use crate::model::build_id::BuildId;
use crate::model::build_request::{Build, BuildLocation};
use crate::model::hop::{Hop, HopAddress};
use crate::registry::LookupError;

/// How a request for one build would be routed. Programs read its JSON, so members are added and
/// never renamed.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RouteReport {
    pub(crate) state: BuildState,
    pub(crate) build: String,
    /// Why the state is [`BuildState::Error`].
    pub(crate) error: Option<String>,
    pub(crate) executor: Option<HopAddress>,
    pub(crate) executor_zone: Option<String>,
    /// The zone of this gateway.
    pub(crate) own_zone: Option<String>,
    /// The registered name of this gateway.
    pub(crate) gateway: String,
    /// The hops in the order in which they would be tried.
    pub(crate) hops: Vec<HopReport>,
    /// All zones that have a gateway which can be reached from other zones.
    pub(crate) zones_with_gateways: BTreeSet<String>,
    /// Recent attempts at this build and at these hops, the oldest first.
    pub(crate) attempts: Vec<AttemptReport>,
}

/// What is known of a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum BuildState {
    /// An executor has it.
    Running,
    /// No executor has taken it yet.
    Queued,
    /// ZooKeeper has no such build.
    Unknown,
    /// ZooKeeper could not be reached, or the build's entry is malformed.
    Error,
}

/// A hop and its health.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct HopReport {
    #[serde(flatten)]
    pub(crate) address: HopAddress,
    /// `None` for an executor, whose health is not recorded.
    pub(crate) state: Option<HopState>,
    /// Consecutive failures.
    pub(crate) failures: u32,
    /// How much longer the hop is tried only after others.
    pub(crate) retry_seconds: Option<f64>,
    pub(crate) last_failure: Option<String>,
}

/// The health of a gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum HopState {
    Untried,
    Healthy,
    /// It failed, and the back-off time is over.
    RetryDue,
    BackingOff,
    /// Requests to it go in a loop.
    Loop,
}

/// Attempts at one hop for one build that had the same result.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct AttemptReport {
    /// The age of the last of them.
    pub(crate) seconds_ago: f64,
    pub(crate) build: String,
    #[serde(flatten)]
    pub(crate) address: HopAddress,
    /// `None` if the hop answered: with the log, or with a reply that is final.
    pub(crate) failure: Option<String>,
    pub(crate) times: usize,
}

impl RouteReport {
    /// Explains how `router` routes a request for `build`, within the deadline of lookups.
    pub(crate) async fn new(build: &BuildId, router: &Router, lookup_timeout: Duration) -> Self {
        let lookup = async {
            let found = router.find_build(build).await?;
            let hops = match &found {
                Some(Build { location: BuildLocation::Executor(executor), .. }) => {
                    router.candidates(executor.clone()).await
                }
                _ => Vec::new(),
            };
            Ok((found.map(|build| build.location), hops))
        };
        let result = timeout(lookup_timeout, lookup).await;
        let result = result
            .unwrap_or_else(|_| Err(LookupError::Unavailable("no answer in time".to_owned())));
        let mut executor = None;
        let mut candidates = Vec::new();
        let mut error = None;
        let state = match result {
            Ok((Some(BuildLocation::Executor(on)), hops)) => {
                executor = Some(on);
                candidates = hops;
                BuildState::Running
            }
            Ok((Some(BuildLocation::Queued), _)) => BuildState::Queued,
            Ok((None, _)) => BuildState::Unknown,
            Err(LookupError::Unavailable(reason)) => {
                let cause = router.registry_outage().map(|cause| format!(": {cause}"));
                let cause = cause.unwrap_or_default();
                error = Some(format!("ZooKeeper cannot be reached: {reason}{cause}"));
                BuildState::Error
            }
            Err(LookupError::Malformed(reason)) => {
                error = Some(format!("the build's entry cannot be read: {reason}"));
                BuildState::Error
            }
        };
        let health = router.health();
        let ranked = router.rank(candidates);
        let hops: Vec<Hop> = ranked.into_iter().map(|ranked| ranked.hop).collect();
        let now = Instant::now();
        Self {
            state,
            build: build.to_string(),
            error,
            executor_zone: executor.as_ref().and_then(|executor| executor.zone.clone()),
            executor: executor.map(|executor| HopAddress::from(&Hop::Executor(executor))),
            own_zone: router.zone().map(str::to_owned),
            gateway: router.describe_self(),
            hops: hops.iter().map(|hop| HopReport::new(hop, health, now)).collect(),
            zones_with_gateways: router.zones_with_gateways(),
            attempts: AttemptReport::merge(health.recent_attempts(build, &hops), now),
        }
    }
}

impl HopReport {
    pub(crate) fn new(hop: &Hop, health: &GatewayHealth, now: Instant) -> Self {
        let mut report = Self {
            address: HopAddress::from(hop),
            state: None,
            failures: 0,
            retry_seconds: None,
            last_failure: None,
        };
        let Hop::Gateway(gateway) = hop else { return report };
        let (state, failures) = match health.health(gateway, now) {
            Health::Untried => (HopState::Untried, None),
            Health::Healthy => (HopState::Healthy, None),
            Health::RetryDue(failures) => (HopState::RetryDue, Some(failures)),
            Health::BackingOff { remaining, is_loop, failures } => {
                report.retry_seconds = Some(round_to_tenths(remaining));
                let state = if is_loop { HopState::Loop } else { HopState::BackingOff };
                (state, Some(failures))
            }
        };
        report.state = Some(state);
        if let Some(failures) = failures {
            report.failures = failures.count;
            report.last_failure = Some(failures.last_reason);
        }
        report
    }
}

impl AttemptReport {
    /// Merges attempts at the same build and hop with the same result, in the order of the last of
    /// each. `attempts` have the oldest first.
    fn merge(attempts: Vec<AttemptRecord>, now: Instant) -> Vec<Self> {
        let mut merged: Vec<Self> = Vec::new();
        for AttemptRecord { at, build, hop, failure } in attempts {
            let age = now.saturating_duration_since(at);
            let build = build.to_string();
            let address = HopAddress::from(&hop);
            let same = merged.iter().position(|other| {
                other.build == build && other.address == address && other.failure == failure
            });
            let times = same.map_or(0, |index| merged.remove(index).times) + 1;
            let seconds_ago = round_to_tenths(age);
            merged.push(Self { seconds_ago, build, address, failure, times });
        }
        merged
    }
}

fn round_to_tenths(time: Duration) -> f64 {
    (time.as_secs_f64() * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    use serde_json::json;

    use crate::model::build_request::Executor;
    use crate::model::component::Gateway;

    #[test]
    fn attempts_with_the_same_result_are_merged_and_counted() {
        let build = BuildId::new("ab").expect("a build id");
        let executor = |hostname: &str| {
            Hop::Executor(Executor { hostname: hostname.to_owned(), port: 1, zone: None })
        };
        let attempt = |hop: &str, failure: Option<&str>| AttemptRecord {
            at: Instant::now(),
            build: build.clone(),
            hop: executor(hop),
            failure: failure.map(str::to_owned),
        };
        let attempts = vec![
            attempt("a", Some("refused")),
            attempt("b", None),
            attempt("a", Some("refused")),
            attempt("a", None),
        ];
        let merged = AttemptReport::merge(attempts, Instant::now());
        let merged: Vec<_> = merged
            .iter()
            .map(|report| (report.address.host.as_str(), report.failure.as_deref(), report.times))
            .collect();
        assert_eq!(merged, [("b", None, 1), ("a", Some("refused"), 2), ("a", None, 1)]);
    }

    #[test]
    fn health_of_a_gateway_is_reported_and_that_of_an_executor_is_not() {
        let health = GatewayHealth::default();
        let now = Instant::now();
        let gateway = Gateway {
            hostname: "gw".to_owned(),
            port: 7979,
            zone: Some("west".to_owned()),
            tls: true,
        };
        let executor = Executor { hostname: "ze".to_owned(), port: 7900, zone: None };
        let json = |hop: Hop| {
            serde_json::to_value(HopReport::new(&hop, &health, now)).expect("a JSON value")
        };
        assert_eq!(
            json(Hop::Gateway(gateway)),
            json!({"kind": "gateway", "host": "gw", "port": 7979, "zone": "west", "tls": true,
                   "state": "untried", "failures": 0, "retry_seconds": null,
                   "last_failure": null})
        );
        assert_eq!(
            json(Hop::Executor(executor)),
            json!({"kind": "executor", "host": "ze", "port": 7900, "zone": null, "tls": false,
                   "state": null, "failures": 0, "retry_seconds": null, "last_failure": null})
        );
    }
}
