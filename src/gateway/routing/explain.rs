//! What `zuul-fingergw resolve` tells: where a build runs, which hops would be tried for it now, in
//! which order and why, and what became of them lately. Of logs it tells nothing.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::gateway::Context;
use crate::gateway::health::{Attempt, Standing};
use crate::gateway::upstream::{HopAddress, Upstream};
use crate::model::build_id::BuildId;
use crate::model::build_request::{Build, BuildLocation};
use crate::registry::LookupError;

/// How the decision on a build begins that runs somewhere: as text, and as JSON.
pub(crate) const RUNNING: [&str; 2] = ["running: ", "{\"state\":\"running\","];

/// The most zones that are listed for people.
const ZONES_SHOWN: usize = 20;

/// Decides as sessions do, with what they know.
pub(crate) struct Decider(pub(crate) watch::Receiver<Arc<Context>>);

/// The decision on one build. Its JSON is what programs read: keys are added, never changed.
#[derive(Serialize)]
pub(crate) struct Decision {
    /// `running`, `waiting`, `unknown`, or `error`: nobody can tell.
    state: &'static str,
    build: String,
    /// What is wrong, if something is.
    error: Option<String>,
    executor: Option<HopAddress>,
    executor_zone: Option<String>,
    own_zone: Option<String>,
    /// This gateway.
    here: String,
    hops: Vec<Hop>,
    /// All zones that have a gateway that can be dialed.
    zones_with_gateways: BTreeSet<String>,
    attempts: Vec<Tried>,
}

/// One hop, and what became of asking it.
#[derive(Serialize)]
pub(crate) struct Hop {
    #[serde(flatten)]
    address: Option<HopAddress>,
    /// The same for people.
    hop: String,
    /// `executor`, or of a gateway `ok`, `never tried`, `due`, `avoided` or `leads back`.
    state: &'static str,
    failures: u32,
    /// How much longer it is avoided.
    avoided_seconds: Option<f64>,
    last_failure: Option<String>,
}

#[derive(Serialize)]
struct Tried {
    seconds_ago: f64,
    build: String,
    #[serde(flatten)]
    address: HopAddress,
    /// The same for people.
    hop: String,
    /// `None`: it brought a log.
    failure: Option<String>,
    /// How many attempts went like this; the time is that of the last one.
    times: usize,
}

impl Decider {
    /// Decides on `build` within the look-up deadline.
    pub(crate) async fn decide(&self, build: &BuildId) -> Decision {
        let cx = Arc::clone(&self.0.borrow());
        let finding = async {
            let found = cx.resolver.find(build).await?;
            let hops = match &found {
                Some(Build { location: BuildLocation::Executor(executor), .. }) => {
                    cx.resolver.hops(executor.clone()).await
                }
                _ => Vec::new(),
            };
            Ok((found.map(|build| build.location), hops))
        };
        let found = timeout(cx.limits.lookup_timeout, finding).await;
        let away = || Err(LookupError::Unavailable("no answer in time".to_owned()));
        let (state, executor, hops, error) = match found.unwrap_or_else(|_| away()) {
            Ok((Some(BuildLocation::Executor(executor)), hops)) => {
                ("running", Some(executor), hops, None)
            }
            Ok((Some(BuildLocation::Queued), _)) => ("waiting", None, Vec::new(), None),
            Ok((None, _)) => ("unknown", None, Vec::new(), None),
            Err(LookupError::Unavailable(fault)) => {
                let cause = cx.resolver.registry_trouble().map(|cause| format!(": {cause}"));
                let cause = cause.unwrap_or_default();
                let error = format!("ZooKeeper cannot be reached: {fault}{cause}");
                ("error", None, Vec::new(), Some(error))
            }
            Err(LookupError::Malformed(fault)) => {
                let error = format!("the build's entry cannot be read: {fault}");
                ("error", None, Vec::new(), Some(error))
            }
        };
        let memory = cx.resolver.memory();
        let hops = cx.resolver.order(&hops);
        let hops: Vec<_> = hops.into_iter().map(|(hop, _)| hop).collect();
        let attempts = memory.recent(build, &hops);
        let hops = hops.iter().map(|hop| Hop::of(hop, memory)).collect();
        let zone = executor.as_ref().and_then(|executor| executor.zone.clone());
        Decision {
            state,
            build: build.to_string(),
            error,
            executor: executor.map(|executor| HopAddress::from(&Upstream::Executor(executor))),
            executor_zone: zone,
            own_zone: cx.resolver.zone().map(str::to_owned),
            here: cx.resolver.own(),
            hops,
            zones_with_gateways: cx.resolver.zones_with_gateways(),
            attempts: Tried::all(attempts),
        }
    }
}

impl Hop {
    pub(crate) fn of(hop: &Upstream, memory: &crate::gateway::health::Memory) -> Self {
        let (name, address) = (hop.to_string(), Some(HopAddress::from(hop)));
        let plain = |state| (state, 0, None, None);
        let (state, failures, avoided_seconds, last_failure) = match hop {
            Upstream::Executor(_) => plain("executor"),
            Upstream::Gateway(gateway) => match memory.standing(gateway) {
                Standing::NeverTried => plain("never tried"),
                Standing::Good => plain("ok"),
                Standing::Due { failures, reason } => ("due", failures, None, Some(reason)),
                Standing::Avoided { remaining, failures, reason, leads_back } => {
                    let state = if leads_back { "leads back" } else { "avoided" };
                    (state, failures, Some(in_tenths(remaining)), Some(reason))
                }
            },
        };
        Self { address, hop: name, state, failures, avoided_seconds, last_failure }
    }
}

impl Tried {
    /// One for all of `attempts` at the same build and hop that went alike, in the order of the last
    /// of each. They come with the oldest first.
    fn all(attempts: Vec<Attempt>) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for Attempt { at, build, hop, failure } in attempts {
            // A clock that was set back meanwhile.
            let ago = SystemTime::now().duration_since(at).unwrap_or_default();
            let (seconds_ago, build) = (in_tenths(ago), build.to_string());
            let (hop, address) = (hop.to_string(), HopAddress::from(&hop));
            let alike = |tried: &Self| {
                tried.build == build && tried.address == address && tried.failure == failure
            };
            let before = all.iter().position(alike).map(|index| all.remove(index));
            let times = before.map_or(0, |before| before.times) + 1;
            all.push(Self { seconds_ago, build, address, hop, failure, times });
        }
        all
    }
}

fn in_tenths(time: Duration) -> f64 {
    (time.as_secs_f64() * 10.0).round() / 10.0
}

impl Decision {
    /// For programs: one line of JSON.
    pub(crate) fn json(&self) -> String {
        // Numbers, strings and lists: nothing in it can fail.
        serde_json::to_string(self).unwrap_or_default() + "\n"
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let Self { state, build, error, executor, here, hops, attempts, .. } = self;
        let mut text = match (executor, error) {
            (Some(executor), _) => {
                let zone = self.executor_zone.as_deref();
                let zone = zone.map(|zone| format!(" of zone {}", zone.escape_default()));
                let place = executor.place();
                format!("{state}: {build} on executor {place}{}\n", zone.unwrap_or_default())
            }
            (None, Some(error)) => format!("{state}: {build}: {error}\n"),
            (None, None) if *state == "waiting" => {
                format!("{state}: {build} is queued and no executor has taken it\n")
            }
            (None, None) => {
                format!("{state}: no queue has {build}; Zuul forgets builds when they have ended\n")
            }
        };
        let _ = writeln!(text, "asked here: {here}");
        if let Some(zone) = self.zone_without_gateway() {
            let _ = writeln!(
                text,
                "no gateway of zone {} is registered; {}",
                zone.escape_default(),
                self.zones()
            );
        }
        for (number, hop) in (1..).zip(hops) {
            let _ = writeln!(text, "{number}. {}", hop.text());
        }
        if !attempts.is_empty() {
            text.push_str("lately:\n");
        }
        for Tried { seconds_ago, build, hop, failure, times, .. } in attempts {
            let end = failure.as_deref().unwrap_or("brought a log");
            let times = if *times > 1 { format!(" ({times} times)") } else { String::new() };
            let _ = writeln!(text, "  {seconds_ago} s ago, {build} from {hop}: {end}{times}");
        }
        text
    }

    /// The zone of the executor where that is another one than ours and has no gateway.
    fn zone_without_gateway(&self) -> Option<&str> {
        let zone = self.executor_zone.as_deref()?;
        let elsewhere = self.own_zone.as_deref() != Some(zone);
        (elsewhere && !self.zones_with_gateways.contains(zone)).then_some(zone)
    }

    /// Which zones have gateways.
    fn zones(&self) -> String {
        let zones = self.zones_with_gateways.iter().map(|zone| zone.escape_default().to_string());
        let zones: Vec<_> = zones.take(ZONES_SHOWN + 1).collect();
        match zones.len() {
            0 => "no zone has one".to_owned(),
            more if more > ZONES_SHOWN => {
                format!("there are: {}, ...", zones[..ZONES_SHOWN].join(", "))
            }
            _ => format!("there are: {}", zones.join(", ")),
        }
    }
}

impl Hop {
    /// The hop and how it stands, for people.
    pub(crate) fn text(&self) -> String {
        let Self { hop, state, failures, avoided_seconds, last_failure, .. } = self;
        let last = last_failure.as_deref().unwrap_or_default();
        let times = if *failures == 1 { "once".to_owned() } else { format!("{failures} times") };
        match (*state, avoided_seconds) {
            ("executor", _) => hop.clone(),
            ("avoided", Some(seconds)) => {
                format!("{hop}: avoided for {seconds} s more, failed {times}; last: {last}")
            }
            ("leads back", Some(seconds)) => format!(
                "{hop}: seems to lead back here, not asked for {seconds} s more; last: {last}"
            ),
            ("due", _) => format!("{hop}: to be tried again, failed {times}; last: {last}"),
            (state, _) => format!("{hop}: {state}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::build_request::Executor;

    fn decision(state: &'static str) -> Decision {
        let running = state == "running";
        let hop = |hop: &str, state, failures, avoided_seconds, last: Option<&str>| Hop {
            address: None,
            hop: hop.to_owned(),
            state,
            failures,
            avoided_seconds,
            last_failure: last.map(str::to_owned),
        };
        let hops = vec![
            hop("gateway a", "ok", 0, None, None),
            hop("gateway b", "due", 2, None, Some("refused")),
            hop("gateway c", "avoided", 1, Some(0.5), Some("refused")),
            hop("executor d", "executor", 0, None, None),
        ];
        let executor = Executor { hostname: "d".to_owned(), port: 7900, zone: None };
        let executor = HopAddress::from(&Upstream::Executor(executor));
        let tried = |failure: Option<&str>| Tried {
            seconds_ago: 1.5,
            build: "ab".to_owned(),
            address: executor.clone(),
            hop: "gateway c".to_owned(),
            failure: failure.map(str::to_owned),
            times: 1,
        };
        Decision {
            state,
            build: "ab".to_owned(),
            error: (state == "error").then(|| "ZooKeeper is away".to_owned()),
            executor: running.then(|| executor.clone()),
            executor_zone: running.then(|| "west".to_owned()),
            own_zone: None,
            here: "gw".to_owned(),
            hops: if running { hops } else { Vec::new() },
            zones_with_gateways: ["west".to_owned()].into(),
            attempts: if running { vec![tried(None), tried(Some("refused"))] } else { Vec::new() },
        }
    }

    #[test]
    fn for_people() {
        assert_eq!(
            decision("running").text(),
            "running: ab on executor d:7900 of zone west\nasked here: gw\n1. gateway a: ok\n\
             2. gateway b: to be tried again, failed 2 times; last: refused\n\
             3. gateway c: avoided for 0.5 s more, failed once; last: refused\n4. executor d\n\
             lately:\n  1.5 s ago, ab from gateway c: brought a log\n  \
             1.5 s ago, ab from gateway c: refused\n"
        );
        let first = |state| decision(state).text().lines().next().map(str::to_owned);
        assert_eq!(first("error").as_deref(), Some("error: ab: ZooKeeper is away"));
        assert!(first("waiting").is_some_and(|line| line.starts_with("waiting: ab is queued")));
        assert!(first("unknown").is_some_and(|line| line.starts_with("unknown: no queue has ab")));
    }

    #[test]
    fn a_zone_without_a_gateway_is_named_with_those_that_have_one() {
        let mut decision = decision("running");
        let says = |decision: &Decision| {
            let text = decision.text();
            text.lines().find(|line| line.starts_with("no gateway")).map(str::to_owned)
        };
        assert_eq!(says(&decision), None);
        decision.zones_with_gateways = ["wst".to_owned(), "east".to_owned()].into();
        let expected = "no gateway of zone west is registered; there are: east, wst";
        assert_eq!(says(&decision).as_deref(), Some(expected));
        decision.zones_with_gateways = (0..99).map(|number| format!("zone{number:02}")).collect();
        assert!(says(&decision).is_some_and(|line| line.ends_with("zone19, ...")));
        decision.zones_with_gateways.clear();
        let expected = "no gateway of zone west is registered; no zone has one";
        assert_eq!(says(&decision).as_deref(), Some(expected));
        decision.own_zone = Some("west".to_owned());
        assert_eq!(says(&decision), None, "executors of our own zone are asked themselves");
    }

    #[test]
    fn attempts_that_went_alike_are_one_with_a_count() {
        let build = BuildId::new("ab").expect("a build id");
        let executor = |hostname: &str| {
            Upstream::Executor(Executor { hostname: hostname.to_owned(), port: 1, zone: None })
        };
        let attempt = |hop: &str, failure: Option<&str>| Attempt {
            at: SystemTime::now(),
            build: build.clone(),
            hop: executor(hop),
            failure: failure.map(str::to_owned),
        };
        let tried = Tried::all(vec![
            attempt("a", Some("refused")),
            attempt("b", None),
            attempt("a", Some("refused")),
            attempt("a", None),
        ]);
        let tried: Vec<_> =
            tried.iter().map(|t| (t.hop.as_str(), t.failure.as_deref(), t.times)).collect();
        let [a, b] = ["executor a:1", "executor b:1"];
        assert_eq!(tried, [(b, None, 1), (a, Some("refused"), 2), (a, None, 1)]);
    }

    /// The exit status goes by how an answer begins.
    #[test]
    fn only_what_runs_begins_so() {
        for state in ["running", "waiting", "unknown", "error"] {
            let decision = decision(state);
            for (text, begin) in [decision.text(), decision.json()].iter().zip(RUNNING) {
                assert_eq!(text.starts_with(begin), state == "running", "{text}");
            }
        }
    }
}
