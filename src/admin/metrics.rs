//! What is counted and timed. Labels have few values, all of them there from the start, so that a
//! rate is right from the first event on.

use std::time::{Duration, SystemTime};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use rustls::HandshakeKind;

use crate::gateway::outcome::Outcome;
use crate::gateway::upstream::Upstream;
use crate::otlp;
use crate::tls::Failure;

/// One label with one of a few values.
type Label = [(&'static str, &'static str); 1];

type Counters = Family<Label, Counter>;
type Histograms = Family<Label, Histogram, fn() -> Histogram>;

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
    requests: Counters,
    routes: Counters,
    lookup: Histogram,
    connect: Histograms,
    first_byte: Histogram,
    stream: Histogram,
    streamed: Counter,
    streams: Gauge,
    zookeeper_sessions: Counter,
    reloads: Counters,
    last_reload_ok: Gauge,
    last_good_reload: Gauge,
    not_after: Family<Label, Gauge>,
    pub(crate) spans: otlp::Counts,
}

/// Why a gateway is passed over.
const FAILOVERS: [&str; 11] = [
    "timeout",
    "connect",
    "tls",
    "no_certificate",
    "circle",
    "zone",
    "silent",
    "cut",
    "overtaken",
    "refused",
    "foreign",
];

/// What can be wrong with the wiring.
const MISWIRED: [&str; 4] = ["circle", "zone", "foreign", "silent"];

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
}

impl Role {
    fn as_str(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::ZooKeeper => "zookeeper",
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
    /// `limits.lookups` reached.
    Lookups,
    /// The kernel had none to give: descriptors or memory.
    Accept,
}

impl Rejection {
    const ALL: [Self; 5] =
        [Self::Limit, Self::Address, Self::Handshakes, Self::Lookups, Self::Accept];

    /// The value of the metric label `reason`.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Limit => "limit",
            Self::Address => "address",
            Self::Handshakes => "handshakes",
            Self::Lookups => "lookups",
            Self::Accept => "accept",
        }
    }
}

fn short() -> Histogram {
    Histogram::new([
        0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    ])
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
            requests: Family::default(),
            routes: Family::default(),
            lookup: short(),
            connect: Family::new_with_constructor(short as fn() -> Histogram),
            first_byte: short(),
            stream: long(),
            streamed: Counter::default(),
            streams: Gauge::default(),
            zookeeper_sessions: Counter::default(),
            reloads: Family::default(),
            last_reload_ok: Gauge::default(),
            last_good_reload: Gauge::default(),
            not_after: Family::default(),
            spans: otlp::Counts::default(),
        };
        for result in ["ok", "failed"] {
            drop(metrics.reloads.get_or_create(&[("result", result)]));
        }
        metrics.configured(true);
        for listener in ["plain", "tls"] {
            drop(metrics.accepted.get_or_create(&[("listener", listener)]));
            drop(metrics.active.get_or_create(&[("listener", listener)]));
        }
        for reason in Rejection::ALL {
            drop(metrics.rejected.get_or_create(&[("reason", reason.as_str())]));
        }
        for side in ["client", "upstream"] {
            drop(metrics.resumed.get_or_create(&[("side", side)]));
            let failures = Failure::ALL.iter().map(|failure| failure.label());
            for result in failures.chain(["ok"]) {
                drop(metrics.handshakes.get_or_create(&[("side", side), ("result", result)]));
            }
        }
        for result in Outcome::LABELS {
            drop(metrics.requests.get_or_create(&[("result", result)]));
        }
        for reason in FAILOVERS {
            drop(metrics.failovers.get_or_create(&[("reason", reason)]));
        }
        for kind in MISWIRED {
            drop(metrics.miswired.get_or_create(&[("kind", kind)]));
        }
        for route in [Route::Direct, Route::Zone, Route::Fallback] {
            drop(metrics.routes.get_or_create(&[("route", route.as_str())]));
            drop(metrics.connect.get_or_create(&[("route", route.as_str())]));
        }
        metrics
    }
}

impl Metrics {
    /// Names everything in `registry`, below the prefix `zuul_fingergw`.
    pub(super) fn register(&self, registry: &mut Registry) {
        let Self {
            accepted,
            active,
            rejected,
            handshakes,
            resumed,
            failovers,
            miswired,
            requests,
            routes,
            lookup,
            connect,
            first_byte,
            stream,
            streamed,
            streams,
            zookeeper_sessions,
            reloads,
            last_reload_ok,
            last_good_reload,
            not_after,
            spans: _,
        } = self.clone();
        let registry = registry.sub_registry_with_prefix("zuul_fingergw");
        registry.register("connections_accepted", "Connections accepted", accepted);
        registry.register("connections_active", "Connections open", active);
        registry.register("connections_rejected", "Connections not served", rejected);
        registry.register(
            "tls_handshakes",
            "TLS handshakes with clients and next hops",
            handshakes,
        );
        registry.register(
            "tls_sessions_resumed",
            "TLS handshakes that were short because gateways of our kind resumed a session",
            resumed,
        );
        registry.register(
            "failovers",
            "Gateways of other zones passed over for another hop, by what was wrong with them",
            failovers,
        );
        registry.register(
            "wiring_faults",
            "Mistakes in the wiring of zones met by requests, by kind",
            miswired,
        );
        registry.register("requests", "Connections by how they ended", requests);
        registry.register("routes", "Streams by where they came from", routes);
        let seconds = || Unit::Seconds;
        registry.register_with_unit("lookup", "Finding out where a build runs", seconds(), lookup);
        registry.register_with_unit("upstream_connect", "Reaching a next hop", seconds(), connect);
        registry.register_with_unit(
            "first_byte",
            "From a request to its first byte",
            seconds(),
            first_byte,
        );
        registry.register_with_unit("stream", "From a request to its last byte", seconds(), stream);
        registry.register_with_unit("streamed", "Log sent to clients", Unit::Bytes, streamed);
        registry.register("streams_active", "Streams under way", streams);
        registry.register("zookeeper_sessions", "Sessions with ZooKeeper", zookeeper_sessions);
        registry.register("config_reloads", "Times the configuration was read again", reloads);
        registry.register(
            "config_last_reload_successful",
            "Whether the configuration was good when last read",
            last_reload_ok,
        );
        registry.register_with_unit(
            "config_last_reload_success_timestamp",
            "When the configuration was last read and good",
            seconds(),
            last_good_reload,
        );
        registry.register_with_unit(
            "certificate_not_after_timestamp",
            "Until when our certificates are good",
            seconds(),
            not_after,
        );
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

    /// Counts a gateway that had not what was asked of it, by one of [`FAILOVERS`].
    pub(crate) fn failed_over(&self, reason: &'static str) {
        self.failovers.get_or_create(&[("reason", reason)]).inc();
    }

    /// Counts a request that met a mistake in the wiring, by one of [`MISWIRED`].
    pub(crate) fn miswired(&self, kind: &'static str) {
        self.miswired.get_or_create(&[("kind", kind)]).inc();
    }

    /// Counts the end of a connection.
    pub(crate) fn ended(&self, outcome: &Outcome) {
        self.requests.get_or_create(&[("result", outcome.label())]).inc();
    }

    pub(crate) fn looked_up(&self, time: Duration) {
        self.lookup.observe(time.as_secs_f64());
    }

    pub(crate) fn connected(&self, route: Route, time: Duration) {
        self.connect.get_or_create(&[("route", route.as_str())]).observe(time.as_secs_f64());
    }

    pub(crate) fn first_byte(&self, time: Duration) {
        self.first_byte.observe(time.as_secs_f64());
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
