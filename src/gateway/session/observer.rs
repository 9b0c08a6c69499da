//! Records the events of one request with a route: metrics, span, stream table and log lines. The
//! relay counts the bytes.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustls::HandshakeKind;
use tracing::field::display;
use tracing::warn;

use super::client_info::ClientInfo;
use super::outcome::Outcome;
use super::request::StreamRequest;
use crate::gateway::context::Context;
use crate::gateway::health::Misrouting;
use crate::gateway::relay::RelayContext;
use crate::gateway::stream_table::StreamGuard;
use crate::gateway::upstream::{AttemptError, ConnectObserver};
use crate::model::build_id::BuildId;
use crate::model::component::Gateway;
use crate::model::hop::Hop;
use crate::telemetry::metrics::{Direction, GaugeGuard, Route};
use crate::telemetry::otlp::Span;

/// Logs a line of a stream at info, or at debug if `$logged` is false.
macro_rules! log_stream {
    ($logged:expr, $($line:tt)+) => {
        if $logged { tracing::info!($($line)+) } else { tracing::debug!($($line)+) }
    };
}

/// The observer of one request, from the moment its hops are known.
pub(super) struct Observer<'a> {
    client: &'a ClientInfo,
    cx: &'a Context,
    build: &'a BuildId,
    /// The number of hops of the route.
    hop_count: usize,
    began: Instant,
    span: &'a Span,
    /// The entry in the stream table.
    stream: StreamGuard,
}

impl<'a> Observer<'a> {
    /// Enters the request into the stream table, with the first of its `hops`.
    pub(super) fn new(request: &'a StreamRequest, client: &'a ClientInfo, cx: &'a Context) -> Self {
        let StreamRequest { build, hops, span, .. } = request;
        let began = Instant::now();
        let stream = cx.streams.insert(client.address, build, &hops[0], began);
        Self { client, cx, build, hop_count: hops.len(), began, span, stream }
    }

    /// Records that the log from `hop` has begun. The stream counts as active until the guard is
    /// dropped.
    pub(super) fn established(&self, hop: &Hop) -> GaugeGuard {
        if self.hop_count > 1 {
            self.stream.set_hop(hop);
        }
        self.cx.metrics.first_byte(self.began.elapsed(), self.span.trace_id());
        self.span.first_byte();
        self.cx.metrics.active_stream()
    }

    /// What the relay needs to know of the gateway and of this stream.
    pub(super) fn relay_context(&self) -> RelayContext<'_> {
        RelayContext {
            limits: &self.cx.limits,
            client_waits: &self.cx.client_waits,
            metrics: &self.cx.metrics,
            abort: &self.cx.abort,
            client: self.client.counted(),
            began: self.began,
            bytes: self.stream.byte_counter(),
        }
    }

    /// Records how the request ended: one count and one log line for each request.
    pub(super) fn finish(self, outcome: &Outcome) {
        let Self {
            client: ClientInfo { address, log_at_info, .. },
            cx,
            build,
            hop_count,
            began,
            span,
            stream,
        } = self;
        let time = began.elapsed();
        let hop = match outcome {
            Outcome::NotConnected(error) => error.hop.clone(),
            _ => stream.hop(),
        };
        let bytes = stream.byte_counter().load(Ordering::Relaxed);
        let route = route(&hop, hop_count);
        cx.metrics.stream_closed(route, time);
        let (host, port) = hop.address();
        span.stream_closed(host, port, route, bytes);
        // Rounded to milliseconds, because JSON would show all digits.
        let seconds = (time.as_secs_f64() * 1000.0).round() / 1000.0;
        let (event_id, trace_id) = (span.event_id().map(display), span.trace_id().map(display));
        let (kind, _, _, zone, tls) = hop.fields();
        log_stream!(
            *log_at_info, peer = %address, %build, event_id, trace_id, hop = %hop, hop_kind = kind,
            hop_host = host, hop_port = port, hop_zone = zone, hop_tls = tls, bytes, seconds,
            end = %outcome, "stream ended"
        );
        span.end(outcome.label(), outcome.error());
    }

    /// Counts a request that the registered address of `gateway` led to a wrong gateway, `found`,
    /// and logs a warning, unless it was logged recently.
    fn misrouted(&self, misrouting: Misrouting, gateway: &Gateway, found: &str) {
        self.cx.metrics.misrouted(misrouting.label());
        if !self.cx.router.health().should_warn(gateway, misrouting, Instant::now()) {
            return;
        }
        let Gateway { hostname, port, zone, .. } = gateway;
        let zone = zone.as_deref().unwrap_or_default().escape_default().to_string();
        let gateway = format!("{}:{port}", hostname.escape_default());
        match misrouting {
            Misrouting::WrongZone => warn!(
                zone,
                gateway,
                found,
                "the registered address of this gateway leads to a gateway of another zone: compare \
                 its hostname and public_port with the port forwards"
            ),
            Misrouting::Loop => warn!(
                zone,
                gateway,
                found,
                "requests to this gateway go in a loop: compare its hostname and public_port with the \
                 port forwards"
            ),
        }
    }
}

/// Returns the route over `hop`, one of `hop_count` candidates.
fn route(hop: &Hop, hop_count: usize) -> Route {
    match hop {
        Hop::Gateway(_) => Route::Zone,
        Hop::Executor(_) if hop_count > 1 => Route::Fallback,
        Hop::Executor(_) => Route::Direct,
    }
}

impl ConnectObserver for Observer<'_> {
    fn attempt_started(&self, hop: &Hop) {
        self.stream.set_hop(hop);
    }

    fn executor_slot_awaited(&self, time: Duration) {
        self.cx.metrics.executor_slot_acquired(time);
    }

    fn tls_established(&self, kind: HandshakeKind) {
        let resumed = kind == HandshakeKind::Resumed;
        self.cx.metrics.handshake_ok(Direction::Outbound, resumed);
    }

    fn connected(&self, hop: &Hop, time: Duration) {
        self.cx.metrics.connected(route(hop, self.hop_count), time);
        let (host, port) = hop.address();
        self.span.connected(host, port);
    }

    fn attempt_failed(&self, hop: &Hop, error: &AttemptError, is_last: bool) {
        let Self { client: ClientInfo { address, log_at_info, .. }, cx, build, span, .. } = self;
        let (host, port) = hop.address();
        span.attempt_failed(host, port, error);
        if let Some(failure) = error.handshake_failure() {
            cx.metrics.handshake_failed(Direction::Outbound, failure.label());
        }
        if error.is_without_local_port() {
            cx.metrics.local_ports_exhausted();
        }
        match hop {
            Hop::Executor(_) if matches!(error, AttemptError::Ourselves) => {
                cx.metrics.misrouted(Misrouting::Loop.label());
            }
            Hop::Executor(_) => {}
            Hop::Gateway(gateway) => {
                cx.metrics.failed_over(error.label());
                match error {
                    AttemptError::WrongZone(names) => {
                        self.misrouted(Misrouting::WrongZone, gateway, names)
                    }
                    AttemptError::Loop(names) => self.misrouted(Misrouting::Loop, gateway, names),
                    AttemptError::Ourselves => {
                        self.misrouted(Misrouting::Loop, gateway, &cx.router.describe_self());
                    }
                    _ => {}
                }
            }
        }
        if !is_last {
            log_stream!(*log_at_info, peer = %address, %build, hop = %hop, end = %error, "hop failed");
        }
    }
}
