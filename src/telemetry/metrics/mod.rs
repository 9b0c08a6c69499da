//! What is counted and timed. Labels have few values, all of them there from the start, so that a
//! rate is right from the first event on.

pub(crate) mod definitions;
pub(crate) mod descriptor;

use std::time::{Duration, SystemTime};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::exemplar::HistogramWithExemplars;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use rustls::HandshakeKind;

use self::descriptor::Descriptor;
use crate::gateway::session::outcome::Outcome;
use crate::gateway::upstream::Upstream;
use crate::tls::Failure;

/// One label with one of a few values.
type Label = [(&'static str, &'static str); 1];

type Counters = Family<Label, Counter>;
type Histograms = Family<Label, Histogram, fn() -> Histogram>;

/// Where to look closer at what was observed last in a bucket.
type TraceId = [(&'static str, String); 1];

/// Everything this process measures about itself. Cheap to clone: all share the same numbers.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    accepted: Counters,
    active: Family<Label, Gauge>,
    rejected: Counters,
    handshakes: Family<[(&'static str, &'static str); 2], Counter>,
    resumed: Counters,
    failovers: Counters,
    miswired: Counters,
    no_local_port: Counter,
    requests: Counters,
    routes: Counters,
    lookup: Histogram,
    connect: Histograms,
    executor_wait: Histogram,
    first_byte: HistogramWithExemplars<TraceId>,
    stream: Histogram,
    streamed: Counter,
    not_logged: Counter,
    streams: Gauge,
    zookeeper_sessions: Counter,
    reloads: Counters,
    last_reload_ok: Gauge,
    last_good_reload: Gauge,
    not_after: Family<Label, Gauge>,
    spans: Counters,
}

/// Which side of a relay.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Side {
    Client,
    Upstream,
}

impl Side {
    fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Upstream => "upstream",
        }
    }
}

/// Where a stream came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// An executor of our zone, or of none.
    Direct,
    /// A gateway of the executor's zone.
    Zone,
    /// An executor of another zone, because no gateway of that zone had it.
    Fallback,
}

impl Route {
    /// The route over `hop`, one of `hops` that were worth trying.
    pub(crate) fn of(hop: &Upstream, hops: usize) -> Self {
        match hop {
            Upstream::Gateway(_) => Self::Zone,
            Upstream::Executor(_) if hops > 1 => Self::Fallback,
            Upstream::Executor(_) => Self::Direct,
        }
    }

    /// The value of the metric label `route`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Zone => "zone",
            Self::Fallback => "fallback",
        }
    }
}

/// For whom a certificate of ours is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Role {
    /// Clients and other gateways.
    Gateway,
    ZooKeeper,
    /// The authorities that clients' and gateways' certificates are checked against.
    GatewayAuthority,
    ZooKeeperAuthority,
}

impl Role {
    fn as_str(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::ZooKeeper => "zookeeper",
            Self::GatewayAuthority => "gateway_ca",
            Self::ZooKeeperAuthority => "zookeeper_ca",
        }
    }
}

/// Why a connection was not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Rejection {
    /// `limits.connections` reached.
    Limit,
    /// `limits.connections_per_address` reached.
    Address,
    /// `limits.handshakes` reached, or an address's share of them.
    Handshakes,
    /// `limits.handshakes_per_minute` exceeded by an address.
    HandshakeRate,
    /// `limits.lookups` reached.
    Lookups,
    /// The kernel had none to give: descriptors or memory.
    Accept,
}

impl Rejection {
    /// The value of the metric label `reason`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Limit => "limit",
            Self::Address => "address",
            Self::Handshakes => "handshakes",
            Self::HandshakeRate => "handshake_rate",
            Self::Lookups => "lookups",
            Self::Accept => "accept",
        }
    }
}

const SHORT: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

fn short() -> Histogram {
    Histogram::new(SHORT)
}

fn long() -> Histogram {
    Histogram::new([0.1, 1.0, 10.0, 60.0, 300.0, 1800.0, 7200.0, 21_600.0])
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            accepted: Family::default(),
            active: Family::default(),
            rejected: Family::default(),
            handshakes: Family::default(),
            resumed: Family::default(),
            failovers: Family::default(),
            miswired: Family::default(),
            no_local_port: Counter::default(),
            requests: Family::default(),
            routes: Family::default(),
            lookup: short(),
            connect: Family::new_with_constructor(short as fn() -> Histogram),
            executor_wait: short(),
            first_byte: HistogramWithExemplars::new(SHORT.into_iter()),
            stream: long(),
            streamed: Counter::default(),
            not_logged: Counter::default(),
            streams: Gauge::default(),
            zookeeper_sessions: Counter::default(),
            reloads: Family::default(),
            last_reload_ok: Gauge::default(),
            last_good_reload: Gauge::default(),
            not_after: Family::default(),
            spans: Family::default(),
        };
        metrics.configured(true);
        all_there(&metrics.reloads, &definitions::RELOADS);
        all_there(&metrics.accepted, &definitions::ACCEPTED);
        all_there(&metrics.active, &definitions::ACTIVE);
        all_there(&metrics.rejected, &definitions::REJECTED);
        all_there(&metrics.resumed, &definitions::RESUMED);
        all_there(&metrics.spans, &definitions::SPANS);
        for side in definitions::HANDSHAKES.values(0) {
            for result in definitions::HANDSHAKES.values(1) {
                drop(metrics.handshakes.get_or_create(&[("side", side), ("result", result)]));
            }
        }
        all_there(&metrics.requests, &definitions::REQUESTS);
        all_there(&metrics.failovers, &definitions::FAILOVERS);
        all_there(&metrics.miswired, &definitions::WIRING_FAULTS);
        all_there(&metrics.routes, &definitions::ROUTES);
        all_there(&metrics.connect, &definitions::CONNECT);
        metrics
    }
}

/// Has every value of the one label that `descriptor` names counted from zero.
fn all_there<M: Clone, C: MetricConstructor<M>>(
    family: &Family<Label, M, C>,
    descriptor: &Descriptor,
) {
    for value in descriptor.values(0) {
        drop(family.get_or_create(&[(descriptor.labels[0].name, value)]));
    }
}

impl Metrics {
    /// Names everything in `registry`.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let Self {
            accepted,
            active,
            rejected,
            handshakes,
            resumed,
            failovers,
            miswired,
            no_local_port,
            requests,
            routes,
            lookup,
            connect,
            executor_wait,
            first_byte,
            stream,
            streamed,
            not_logged,
            streams,
            zookeeper_sessions,
            reloads,
            last_reload_ok,
            last_good_reload,
            not_after,
            spans,
        } = self.clone();
        definitions::ACCEPTED.register(registry, accepted);
        definitions::ACTIVE.register(registry, active);
        definitions::REJECTED.register(registry, rejected);
        definitions::HANDSHAKES.register(registry, handshakes);
        definitions::RESUMED.register(registry, resumed);
        definitions::FAILOVERS.register(registry, failovers);
        definitions::WIRING_FAULTS.register(registry, miswired);
        definitions::NO_LOCAL_PORT.register(registry, no_local_port);
        definitions::REQUESTS.register(registry, requests);
        definitions::ROUTES.register(registry, routes);
        definitions::LOOKUP.register(registry, lookup);
        definitions::CONNECT.register(registry, connect);
        definitions::EXECUTOR_WAIT.register(registry, executor_wait);
        definitions::FIRST_BYTE.register(registry, first_byte);
        definitions::STREAM.register(registry, stream);
        definitions::STREAMED.register(registry, streamed);
        definitions::STREAMS_NOT_LOGGED.register(registry, not_logged);
        definitions::STREAMS.register(registry, streams);
        definitions::ZOOKEEPER_SESSIONS.register(registry, zookeeper_sessions);
        definitions::RELOADS.register(registry, reloads);
        definitions::LAST_RELOAD_OK.register(registry, last_reload_ok);
        definitions::LAST_GOOD_RELOAD.register(registry, last_good_reload);
        definitions::NOT_AFTER.register(registry, not_after);
        definitions::SPANS.register(registry, spans);
    }

    /// Counts a connection for as long as the guard lives.
    pub(crate) fn connection(&self, tls: bool) -> Active {
        let label = [("listener", if tls { "tls" } else { "plain" })];
        self.accepted.get_or_create(&label).inc();
        let active = self.active.get_or_create(&label).clone();
        Active::new(active)
    }

    /// Counts a stream for as long as the guard lives.
    pub(crate) fn stream(&self) -> Active {
        Active::new(self.streams.clone())
    }

    pub(crate) fn rejected(&self, reason: Rejection) {
        self.rejected.get_or_create(&[("reason", reason.as_str())]).inc();
    }

    /// Counts a stream whose lines are at debug because its address has asked too often.
    pub(crate) fn stream_not_logged(&self) {
        self.not_logged.inc();
    }

    /// Counts a TLS handshake.
    pub(crate) fn handshake(&self, side: Side, result: Result<(), Failure>) {
        let side = side.as_str();
        let result = result.map_or_else(Failure::label, |()| "ok");
        self.handshakes.get_or_create(&[("side", side), ("result", result)]).inc();
    }

    /// Counts a TLS handshake that succeeded, as `kind`.
    pub(crate) fn shaken(&self, side: Side, kind: Option<HandshakeKind>) {
        self.handshake(side, Ok(()));
        if kind == Some(HandshakeKind::Resumed) {
            self.resumed.get_or_create(&[("side", side.as_str())]).inc();
        }
    }

    /// Counts a gateway that had not what was asked of it, by one of its reasons.
    pub(crate) fn failed_over(&self, reason: &'static str) {
        debug_assert!(definitions::FAILOVERS.has(0, reason), "{reason}");
        self.failovers.get_or_create(&[("reason", reason)]).inc();
    }

    /// Counts a request that met a mistake in the wiring, by one of its kinds.
    pub(crate) fn miswired(&self, kind: &'static str) {
        debug_assert!(definitions::WIRING_FAULTS.has(0, kind), "{kind}");
        self.miswired.get_or_create(&[("kind", kind)]).inc();
    }

    /// Counts an attempt to connect to a next hop that had no local port.
    pub(crate) fn no_local_port(&self) {
        self.no_local_port.inc();
    }

    /// Counts the end of a connection.
    pub(crate) fn ended(&self, outcome: &Outcome) {
        let result = outcome.label();
        debug_assert!(definitions::REQUESTS.has(0, result), "{result}");
        self.requests.get_or_create(&[("result", result)]).inc();
    }

    pub(crate) fn looked_up(&self, time: Duration) {
        self.lookup.observe(time.as_secs_f64());
    }

    pub(crate) fn connected(&self, route: Route, time: Duration) {
        self.connect.get_or_create(&[("route", route.as_str())]).observe(time.as_secs_f64());
    }

    /// Times how long a request has waited for a slot to ask its executor.
    pub(crate) fn waited_for_executor(&self, time: Duration) {
        self.executor_wait.observe(time.as_secs_f64());
    }

    /// Times the first byte of a stream, which is in the trace `trace_id`, if in any.
    pub(crate) fn first_byte(&self, time: Duration, trace_id: Option<&str>) {
        let exemplar = trace_id.map(|id| [("trace_id", id.to_owned())]);
        let now = exemplar.is_some().then(SystemTime::now);
        self.first_byte.observe(time.as_secs_f64(), exemplar, now);
    }

    /// Counts the end of a stream that took `time`.
    pub(crate) fn streamed(&self, route: Route, time: Duration) {
        self.routes.get_or_create(&[("route", route.as_str())]).inc();
        self.stream.observe(time.as_secs_f64());
    }

    /// Counts bytes of logs sent to clients.
    pub(crate) fn sent(&self, bytes: u64) {
        self.streamed.inc_by(bytes);
    }

    /// Counts a reload.
    pub(crate) fn reloaded(&self, good: bool) {
        let result = if good { "ok" } else { "failed" };
        self.reloads.get_or_create(&[("result", result)]).inc();
        self.configured(good);
    }

    /// Notes that the configuration was read just now: at the start it was good.
    fn configured(&self, good: bool) {
        self.last_reload_ok.set(good.into());
        if good {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            let seconds = now.unwrap_or_default().as_secs();
            self.last_good_reload.set(i64::try_from(seconds).unwrap_or(i64::MAX));
        }
    }

    /// Tells until when our certificate for `role` is good, in seconds since the epoch; nothing if
    /// there is none.
    pub(crate) fn certificate(&self, role: Role, not_after: Option<i64>) {
        let label = [("role", role.as_str())];
        match not_after {
            Some(time) => {
                self.not_after.get_or_create(&label).set(time);
            }
            None => {
                self.not_after.remove(&label);
            }
        }
    }

    /// Counts spans by what became of them: `exported` or `lost`.
    #[cfg(feature = "otlp")]
    pub(crate) fn spans(&self, result: &'static str, spans: u64) {
        self.spans.get_or_create(&[("result", result)]).inc_by(spans);
    }

    /// Counts a session with ZooKeeper.
    pub(crate) fn session(&self) {
        self.zookeeper_sessions.inc();
    }
}

/// Holds a place in a gauge.
#[derive(Debug)]
pub(crate) struct Active(Gauge);

impl Active {
    fn new(gauge: Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.dec();
    }
}
