//! Spans of streams.

use std::fmt::Display;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use opentelemetry::trace::{
    Span as _, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId,
    TraceState, Tracer as _, TracerProvider,
};
use opentelemetry::{Context, InstrumentationScope, KeyValue};
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tracing::{info, warn};

use super::exporter;
use crate::config::Tracing;
use crate::model::build_id::BuildId;
use crate::model::trace_parent::TraceParent;
use crate::telemetry::metrics::{Metrics, Route};

/// How long [`Tracer::stop`] waits until the collector has accepted the last spans.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Starts spans if tracing is configured. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Tracer(Option<Arc<Inner>>);

struct Inner {
    tracer: SdkTracer,
    provider: SdkTracerProvider,
    metrics: Metrics,
}

impl Tracer {
    /// Starts exporting spans according to `config`, as the gateway `hostname`. Does not wait for
    /// the collector.
    ///
    /// # Errors
    /// A TLS file cannot be used, or a thread cannot be started.
    pub(crate) fn start(
        config: Option<&Tracing>,
        hostname: &str,
        metrics: Metrics,
    ) -> Result<Self> {
        let Some(config) = config else { return Ok(Self::default()) };
        let provider = exporter::start(config, hostname, metrics.clone())?;
        // Dropping the last handle would wait for the collector for 5 s. `stop` ends the provider.
        std::mem::forget(provider.clone());
        let scope = InstrumentationScope::builder(env!("CARGO_PKG_NAME"))
            .with_version(env!("CARGO_PKG_VERSION"))
            .build();
        let tracer = provider.tracer_with_scope(scope);
        info!(endpoint = %config.endpoint, "tracing: exporting spans");
        Ok(Self(Some(Arc::new(Inner { tracer, provider, metrics }))))
    }

    /// Starts the span of a stream of `build`, whose lookup took from `began` until now, on a
    /// gateway of `zone`.
    ///
    /// Records nothing without a sampled `parent`: clients must not be able to start traces.
    pub(crate) fn span(
        &self,
        parent: Option<&TraceParent>,
        build: &BuildId,
        zone: Option<&str>,
        began: Instant,
    ) -> Span {
        let (Some(inner), Some(parent)) = (&self.0, parent) else { return Span(None) };
        let flags = TraceFlags::new(parent.flags);
        if !flags.is_sampled() {
            return Span(None);
        }
        let mut attributes = vec![KeyValue::new("zuul.build.uuid", build.to_string())];
        if let Some(id) = &parent.event_id {
            attributes.push(KeyValue::new("zuul.event.id", id.clone()));
        }
        if let Some(zone) = zone {
            attributes.push(KeyValue::new("zuul.zone", zone.to_owned()));
        }
        let now = SystemTime::now();
        let builder = inner
            .tracer
            .span_builder("LogStream")
            .with_kind(SpanKind::Server)
            .with_start_time(now.checked_sub(began.elapsed()).unwrap_or(now))
            .with_attributes(attributes);
        let trace_id = TraceId::from(parent.trace_id);
        let remote =
            SpanContext::new(trace_id, SpanId::from(parent.span_id), flags, true, TraceState::NONE);
        let context = Context::new().with_remote_span_context(remote);
        let mut span = inner.tracer.build_with_context(builder, &context);
        if !span.is_recording() {
            return Span(None);
        }
        span.add_event("looked up", Vec::new());
        Span(Some(Box::new(Recording {
            span: Mutex::new(span),
            trace_id: trace_id.to_string(),
            event_id: parent.event_id.clone(),
            metrics: inner.metrics.clone(),
        })))
    }

    /// Exports the ended spans, for at most [`FLUSH_TIMEOUT`]. Spans that end later are lost.
    pub(crate) async fn stop(self) {
        let Some(inner) = self.0 else { return };
        // The timeout around it counts if no thread is free for the blocking call.
        let shutdown = move || inner.provider.shutdown_with_timeout(FLUSH_TIMEOUT).is_ok();
        let shutdown = tokio::task::spawn_blocking(shutdown);
        if !matches!(tokio::time::timeout(FLUSH_TIMEOUT, shutdown).await, Ok(Ok(true))) {
            warn!("tracing: cannot export the last spans: timed out");
        }
    }
}

/// The span of a stream; empty if the stream is not traced.
pub(crate) struct Span(Option<Box<Recording>>);

/// Boxed, so that streams that are not traced do not pay for its size.
struct Recording {
    /// Used by the stream's task only.
    span: Mutex<opentelemetry_sdk::trace::Span>,
    trace_id: String,
    event_id: Option<String>,
    metrics: Metrics,
}

impl Recording {
    fn lock(&self) -> MutexGuard<'_, opentelemetry_sdk::trace::Span> {
        self.span.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Span {
    /// Returns Zuul's ID of the event that triggered the build.
    pub(crate) fn event_id(&self) -> Option<&str> {
        self.0.as_ref()?.event_id.as_deref()
    }

    /// Returns the trace ID in hexadecimal digits.
    pub(crate) fn trace_id(&self) -> Option<&str> {
        self.0.as_ref().map(|recording| recording.trace_id.as_str())
    }

    /// Sets the address of a peer that has presented a certificate, which is a gateway or a server
    /// of the system. Addresses of users must not be set: those who can read traces need not know
    /// which user watches which log.
    pub(crate) fn requested_by(&self, peer: IpAddr) {
        self.set(|| vec![KeyValue::new("network.peer.address", peer.to_string())]);
    }

    /// Adds the event that a hop has accepted the request.
    pub(crate) fn connected(&self, host: &str, port: u16) {
        self.add_event("connected", || server(host, port));
    }

    /// Adds the event that an attempt at a hop failed.
    pub(crate) fn attempt_failed(&self, host: &str, port: u16, reason: &dyn Display) {
        self.add_event("attempt failed", || {
            let mut attributes = server(host, port);
            attributes.push(KeyValue::new("reason", reason.to_string()));
            attributes
        });
    }

    /// Adds the event that the first byte of the log has arrived.
    pub(crate) fn first_byte(&self) {
        self.add_event("first byte", Vec::new);
    }

    /// Sets the hop and the route that the log came from, and its length.
    pub(crate) fn stream_closed(&self, host: &str, port: u16, route: Route, bytes: u64) {
        self.set(|| {
            let mut attributes = server(host, port);
            attributes.push(KeyValue::new("zuul.route", route.as_str()));
            let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
            attributes.push(KeyValue::new("zuul.stream.bytes", bytes));
            attributes
        });
    }

    /// Ends the span with the `result` of the connection, and with the `error` if it failed.
    pub(crate) fn end(&self, result: &'static str, error: Option<String>) {
        let Some(recording) = &self.0 else { return };
        let mut span = recording.lock();
        span.set_attribute(KeyValue::new("zuul.stream.result", result));
        if let Some(error) = error {
            span.set_attribute(KeyValue::new("error.type", result));
            span.set_status(Status::error(error));
        }
        span.end();
        recording.metrics.spans("ended", 1);
    }

    fn set(&self, attributes: impl FnOnce() -> Vec<KeyValue>) {
        if let Some(recording) = &self.0 {
            recording.lock().set_attributes(attributes());
        }
    }

    fn add_event(&self, name: &'static str, attributes: impl FnOnce() -> Vec<KeyValue>) {
        if let Some(recording) = &self.0 {
            recording.lock().add_event(name, attributes());
        }
    }
}

/// Returns the attributes for a hop.
fn server(host: &str, port: u16) -> Vec<KeyValue> {
    vec![
        KeyValue::new("server.address", host.to_owned()),
        KeyValue::new("server.port", i64::from(port)),
    ]
}
