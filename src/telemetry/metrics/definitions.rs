//! Names, help texts and label values of all metrics of [`Metrics`]. Those that are read when
//! Prometheus scrapes are defined in `admin`, by the collectors that read them.
//!
//! Every name and value is explained in `docs/metrics.md`; a test compares the two.

use std::fmt::Debug;
use std::sync::Arc;

use prometheus_client::encoding::EncodeMetric;
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::exemplar::HistogramWithExemplars;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

use super::{ByLabel, Direction, Metrics, Rejection, Route};

const LISTENERS: &[&str] = &["plain", "tls"];

/// Results of connections, as `gateway::session::outcome` names them.
const REQUEST_RESULTS: &[&str] = &[
    "ok",
    "upstream_failed",
    "client_closed",
    "client_stalled",
    "client_evicted",
    "stopped",
    "stream_idle",
    "stream_total",
    "not_found",
    "not_started",
    "denied",
    "bad_request",
    "timeout",
    "rejected",
    "zookeeper",
    "malformed",
    "upstream_unreachable",
    "upstream_silent",
    "zone_unreachable",
    "wrong_zone",
    "loop",
    "proxy_header",
    "tls",
    "probe",
];

/// Why a hop did not serve a log.
const FAILOVER_REASONS: &[&str] = &[
    "timeout",
    "connect",
    "tls",
    "no_certificate",
    "loop",
    "too_many_for_build",
    "wrong_zone",
    "silent",
    "reset",
    "slower",
    "refused",
];

const MISROUTING_KINDS: &[&str] = &["loop", "wrong_zone"];

/// `ok`, and why a TLS handshake failed, as `tls::handshake_error` names it.
const HANDSHAKE_RESULTS: &[&str] = &[
    "ok",
    "timeout",
    "closed",
    "not_tls",
    "no_certificate",
    "unknown_ca",
    "dates",
    "name",
    "certificate",
    "refused_by_peer",
    "protocol",
];

/// Buckets of times until something happens, in seconds.
const SHORT_BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Buckets of the durations of streams, in seconds.
const LONG_BUCKETS: [f64; 8] = [0.1, 1.0, 10.0, 60.0, 300.0, 1800.0, 7200.0, 21_600.0];

impl Default for Metrics {
    #[expect(clippy::too_many_lines, reason = "an entry for each metric")]
    fn default() -> Self {
        let mut new = Definer(Registry::default());
        let metrics = Self {
            connections_accepted: new.by_label(
                "zuul_fingergw_connections_accepted",
                "Connections accepted, without those rejected immediately at a limit",
                "listener",
                LISTENERS,
                Counter::default,
            ),
            connections_active: new.by_label(
                "zuul_fingergw_connections_active",
                "Open connections; limits.connections bounds their sum",
                "listener",
                LISTENERS,
                Gauge::default,
            ),
            connections_rejected: new.by_label(
                "zuul_fingergw_connections_rejected",
                "Connections rejected, by the limit that was reached",
                "reason",
                Rejection::VALUES,
                Counter::default,
            ),
            requests: new.by_label(
                "zuul_fingergw_requests",
                "Closed connections by result; every accepted connection is counted once",
                "result",
                REQUEST_RESULTS,
                Counter::default,
            ),
            streams_active: new.metric(
                "zuul_fingergw_streams_active",
                "Logs that are being streamed",
                Gauge::default(),
            ),
            lookup: new.metric(
                "zuul_fingergw_lookup_seconds",
                "Time to look up a build in ZooKeeper",
                short(),
            ),
            first_byte: new.metric(
                "zuul_fingergw_first_byte_seconds",
                "Time from the end of the lookup to the first byte of the log",
                HistogramWithExemplars::new(SHORT_BUCKETS.into_iter()),
            ),
            stream: new.metric(
                "zuul_fingergw_stream_seconds",
                "Time from the end of the lookup to the end of the stream or of the failed attempts",
                Histogram::new(LONG_BUCKETS),
            ),
            streamed_bytes: new.metric(
                "zuul_fingergw_streamed_bytes",
                "Bytes of logs written to clients",
                Counter::default(),
            ),
            streams_not_logged: new.metric(
                "zuul_fingergw_streams_not_logged",
                "Streams logged at debug level because their address exceeds \
                 limits.streams_logged_per_minute",
                Counter::default(),
            ),
            routes: new.by_label(
                "zuul_fingergw_routes",
                "Closed streams, failed ones included, by the kind of hop they came from",
                "route",
                Route::VALUES,
                Counter::default,
            ),
            connect: new.by_label(
                "zuul_fingergw_upstream_connect_seconds",
                "Time to connect to a hop, TLS handshake included; successful attempts only",
                "route",
                Route::VALUES,
                short,
            ),
            executor_wait: new.metric(
                "zuul_fingergw_executor_wait_seconds",
                "Time that requests waited because three connections to their executor had not \
                 received a first byte yet; requests that did not wait are not observed",
                short(),
            ),
            failovers: new.by_label(
                "zuul_fingergw_failovers",
                "Gateways of other zones that did not serve a log, by reason",
                "reason",
                FAILOVER_REASONS,
                Counter::default,
            ),
            misrouted: new.by_label(
                "zuul_fingergw_misrouted_requests",
                "Requests that did not reach the process registered at an address, by kind",
                "kind",
                MISROUTING_KINDS,
                Counter::default,
            ),
            local_ports_exhausted: new.metric(
                "zuul_fingergw_local_ports_exhausted",
                "Connections to executors and gateways that failed with EADDRNOTAVAIL: all local \
                 ports towards that address were in use",
                Counter::default(),
            ),
            handshakes: new.metric(
                "zuul_fingergw_tls_handshakes",
                "TLS handshakes with clients (inbound) and with gateways (outbound), by result",
                Family::default(),
            ),
            sessions_resumed: new.by_label(
                "zuul_fingergw_tls_sessions_resumed",
                "Successful TLS handshakes that resumed a session with a peer gateway",
                "direction",
                Direction::VALUES,
                Counter::default,
            ),
            certificate_not_after: new.metric(
                "zuul_fingergw_certificate_not_after_timestamp_seconds",
                "When certificates expire, in seconds since the epoch; no series for those that \
                 are not configured",
                Family::default(),
            ),
            zookeeper_sessions: new.metric(
                "zuul_fingergw_zookeeper_sessions",
                "ZooKeeper sessions established: one, and one for each session that was lost",
                Counter::default(),
            ),
            panics: new.metric(
                "zuul_fingergw_panics",
                "Tasks that panicked because of a bug in this program",
                Counter::default(),
            ),
            reloads: new.by_label(
                "zuul_fingergw_config_reloads",
                "Reloads of the configuration and the certificates",
                "result",
                &["ok", "failed"],
                Counter::default,
            ),
            last_reload_ok: new.metric(
                "zuul_fingergw_config_last_reload_successful",
                "1 if the configuration had no error when it was last read, else 0",
                Gauge::default(),
            ),
            last_reload_time: new.metric(
                "zuul_fingergw_config_last_reload_success_timestamp_seconds",
                "When the configuration was last read without an error, in seconds since the epoch",
                Gauge::default(),
            ),
            spans: new.by_label(
                "zuul_fingergw_spans",
                "Spans for the OpenTelemetry collector, by state",
                "state",
                &["ended", "exported", "failed"],
                Counter::default,
            ),
            registry: Arc::new(new.0),
        };
        for direction in Direction::VALUES {
            for result in HANDSHAKE_RESULTS {
                drop(
                    metrics
                        .handshakes
                        .get_or_create(&[("direction", direction), ("result", result)]),
                );
            }
        }
        metrics.configuration_read(true);
        metrics
    }
}

fn short() -> Histogram {
    Histogram::new(SHORT_BUCKETS)
}

/// Creates metrics and registers them.
struct Definer(Registry);

impl Definer {
    fn metric<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.0.register(name, help, metric.clone());
        metric
    }

    fn by_label<M>(
        &mut self,
        name: &str,
        help: &str,
        label: &'static str,
        values: &'static [&'static str],
        new: fn() -> M,
    ) -> ByLabel<M>
    where
        M: EncodeMetric + TypedMetric + Clone + Debug + Send + Sync + 'static,
    {
        let family = self.metric(name, help, Family::new_with_constructor(new));
        for value in values {
            drop(family.get_or_create(&[(label, *value)]));
        }
        ByLabel { family, label }
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;

    /// OpenMetrics, Prometheus' text format 1.0, has exemplars; the older format has not.
    #[test]
    fn traced_first_byte_is_exported_with_an_exemplar() {
        let metrics = Metrics::default();
        metrics.first_byte(std::time::Duration::from_millis(20), Some("abc"));
        metrics.first_byte(std::time::Duration::from_millis(20), None);
        let mut text = String::new();
        encode(&mut text, metrics.registry()).unwrap();
        let expected =
            "zuul_fingergw_first_byte_seconds_bucket{le=\"0.025\"} 2 # {trace_id=\"abc\"} 0.02 ";
        assert!(text.contains(expected), "{text}");
    }
}
