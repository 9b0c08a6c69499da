//! Metrics of this process.
//!
//! [`Metrics`] has one method for each event that is counted or timed. Names, help texts and label
//! values are in `definitions`; `docs/metrics.md` explains each value.

mod definitions;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::exemplar::HistogramWithExemplars;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Handles to all metrics. Cheap to clone: all clones update the same values.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    registry: Arc<Registry>,
    connections_accepted: ByLabel<Counter>,
    connections_active: ByLabel<Gauge>,
    connections_rejected: ByLabel<Counter>,
    requests: ByLabel<Counter>,
    streams_active: Gauge,
    lookup: Histogram,
    first_byte: HistogramWithExemplars<[(&'static str, String); 1]>,
    stream: Histogram,
    streamed_bytes: Counter,
    streams_not_logged: Counter,
    routes: ByLabel<Counter>,
    connect: ByLabel<Histogram>,
    executor_wait: Histogram,
    failovers: ByLabel<Counter>,
    misrouted: ByLabel<Counter>,
    local_ports_exhausted: Counter,
    handshakes: Family<[(&'static str, &'static str); 2], Counter>,
    sessions_resumed: ByLabel<Counter>,
    certificate_not_after: Family<Label, Gauge>,
    zookeeper_sessions: Counter,
    panics: Counter,
    reloads: ByLabel<Counter>,
    last_reload_ok: Gauge,
    last_reload_time: Gauge,
    #[cfg_attr(not(feature = "otlp"), expect(dead_code, reason = "stays at 0"))]
    spans: ByLabel<Counter>,
}

/// Defines a label whose values are the variants of an enum.
macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $value:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub(crate) enum $name { $($(#[$variant_doc])* $variant,)+ }

        impl $name {
            const VALUES: &[&str] = &[$($value,)+];

            /// Returns the label's value.
            pub(crate) fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $value,)+ }
            }
        }
    };
}

label! {
    /// Which end opened a connection.
    Direction {
        /// A client or a peer gateway connected to us.
        Inbound = "inbound",
        /// We connected to a hop.
        Outbound = "outbound",
    }
}

label! {
    /// The kind of hop that a stream came from.
    Route {
        /// An executor of our own zone, or one without a zone.
        Direct = "direct",
        /// A gateway of the executor's zone.
        Zone = "zone",
        /// An executor of another zone, after every gateway of that zone failed.
        Fallback = "fallback",
    }
}

label! {
    /// Why a connection was rejected.
    Rejection {
        /// `limits.connections` is reached.
        Limit = "limit",
        /// `limits.connections_per_address` is reached.
        Address = "address",
        /// `limits.handshakes`, or one address's share of it, is reached.
        Handshakes = "handshakes",
        /// An address exceeds `limits.handshakes_per_minute`.
        HandshakeRate = "handshake_rate",
        /// `limits.lookups` is reached.
        Lookups = "lookups",
        /// accept(2) failed because the kernel lacks file descriptors or memory.
        Accept = "accept",
    }
}

/// What a certificate is used for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum CertificateRole {
    /// Our certificate for clients and gateways.
    Gateway,
    /// Our certificate for ZooKeeper.
    ZooKeeper,
    /// The CA certificates that clients and gateways are verified with.
    GatewayCa,
    /// The CA certificates that ZooKeeper is verified with.
    ZooKeeperCa,
}

impl CertificateRole {
    fn as_str(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::ZooKeeper => "zookeeper",
            Self::GatewayCa => "gateway_ca",
            Self::ZooKeeperCa => "zookeeper_ca",
        }
    }
}

type Label = [(&'static str, &'static str); 1];

/// A metric for each value of one label. All series exist from the start, so that `rate()` includes
/// the first increment.
#[derive(Clone, Debug)]
struct ByLabel<M> {
    family: Family<Label, M>,
    label: &'static str,
}

impl<M: Clone> ByLabel<M> {
    fn get(&self, value: &'static str) -> M {
        let label = [(self.label, value)];
        debug_assert!(self.family.get(&label).is_some(), "{label:?} is not defined");
        self.family.get_or_create_owned(&label)
    }
}

/// Increments a gauge until it is dropped.
#[derive(Debug)]
pub(crate) struct GaugeGuard(Gauge);

impl GaugeGuard {
    fn new(gauge: Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Metrics {
    /// Returns the registry that exports all of these metrics.
    pub(crate) fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Counts an accepted connection, which is active until the guard is dropped.
    pub(crate) fn connection_accepted(&self, tls: bool) -> GaugeGuard {
        let listener = if tls { "tls" } else { "plain" };
        self.connections_accepted.get(listener).inc();
        GaugeGuard::new(self.connections_active.get(listener))
    }

    pub(crate) fn connection_rejected(&self, reason: Rejection) {
        self.connections_rejected.get(reason.as_str()).inc();
    }

    /// Counts the end of a connection by its `result`.
    pub(crate) fn connection_closed(&self, result: &'static str) {
        self.requests.get(result).inc();
    }

    /// Counts a stream as active until the guard is dropped.
    pub(crate) fn active_stream(&self) -> GaugeGuard {
        GaugeGuard::new(self.streams_active.clone())
    }

    /// Records the duration of a lookup.
    pub(crate) fn lookup_finished(&self, time: Duration) {
        self.lookup.observe(time.as_secs_f64());
    }

    /// Records how long connecting to a hop took.
    pub(crate) fn connected(&self, route: Route, time: Duration) {
        self.connect.get(route.as_str()).observe(time.as_secs_f64());
    }

    /// Records how long a request waited for a slot of its executor.
    pub(crate) fn executor_slot_acquired(&self, time: Duration) {
        self.executor_wait.observe(time.as_secs_f64());
    }

    /// Records the time to the first byte of a stream. A `trace_id` becomes the bucket's exemplar.
    pub(crate) fn first_byte(&self, time: Duration, trace_id: Option<&str>) {
        let exemplar = trace_id.map(|id| [("trace_id", id.to_owned())]);
        let now = exemplar.is_some().then(SystemTime::now);
        self.first_byte.observe(time.as_secs_f64(), exemplar, now);
    }

    /// Counts bytes that a client's connection accepted.
    pub(crate) fn bytes_sent(&self, bytes: u64) {
        self.streamed_bytes.inc_by(bytes);
    }

    /// Counts a closed stream and records its duration.
    pub(crate) fn stream_closed(&self, route: Route, time: Duration) {
        self.routes.get(route.as_str()).inc();
        self.stream.observe(time.as_secs_f64());
    }

    /// Counts a stream that is logged at debug level because its address opens too many.
    pub(crate) fn stream_not_logged(&self) {
        self.streams_not_logged.inc();
    }

    /// Counts a hop that did not serve the log, by `reason`.
    pub(crate) fn failed_over(&self, reason: &'static str) {
        self.failovers.get(reason).inc();
    }

    /// Counts a request that reached another process than the registry promised, by `kind`.
    pub(crate) fn misrouted(&self, kind: &'static str) {
        self.misrouted.get(kind).inc();
    }

    /// Counts a connection attempt that failed because no local port was free.
    pub(crate) fn local_ports_exhausted(&self) {
        self.local_ports_exhausted.inc();
    }

    /// Counts a successful TLS handshake.
    pub(crate) fn handshake_ok(&self, direction: Direction, resumed: bool) {
        self.handshake(direction, "ok");
        if resumed {
            self.sessions_resumed.get(direction.as_str()).inc();
        }
    }

    /// Counts a failed TLS handshake by its `reason`.
    pub(crate) fn handshake_failed(&self, direction: Direction, reason: &'static str) {
        self.handshake(direction, reason);
    }

    fn handshake(&self, direction: Direction, result: &'static str) {
        let labels = [("direction", direction.as_str()), ("result", result)];
        debug_assert!(self.handshakes.get(&labels).is_some(), "{labels:?} is not defined");
        self.handshakes.get_or_create(&labels).inc();
    }

    /// Sets the expiry of a certificate in seconds since the epoch. `None` removes the series.
    pub(crate) fn certificate(&self, role: CertificateRole, not_after: Option<i64>) {
        let label = [("role", role.as_str())];
        match not_after {
            Some(time) => {
                self.certificate_not_after.get_or_create(&label).set(time);
            }
            None => {
                self.certificate_not_after.remove(&label);
            }
        }
    }

    /// Counts an established ZooKeeper session.
    pub(crate) fn zookeeper_session(&self) {
        self.zookeeper_sessions.inc();
    }

    /// Counts a task that panicked.
    pub(crate) fn panicked(&self) {
        self.panics.inc();
    }

    /// The number of tasks that panicked.
    #[cfg(test)]
    pub(crate) fn panics(&self) -> u64 {
        self.panics.get()
    }

    /// Counts a reload.
    pub(crate) fn reloaded(&self, ok: bool) {
        self.reloads.get(if ok { "ok" } else { "failed" }).inc();
        self.configuration_read(ok);
    }

    /// Records that the configuration was read now: at the start or by a reload.
    fn configuration_read(&self, ok: bool) {
        self.last_reload_ok.set(ok.into());
        if ok {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            self.last_reload_time.set(i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
        }
    }

    /// Counts spans by `state`: `ended`, `exported` or `failed`.
    #[cfg(feature = "otlp")]
    pub(crate) fn spans(&self, state: &'static str, count: u64) {
        self.spans.get(state).inc_by(count);
    }
}
