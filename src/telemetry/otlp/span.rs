//! The span of one stream, and what begins it.

use std::fmt::Display;
use std::mem::ManuallyDrop;
use std::net::SocketAddr;
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
use crate::gateway::relay::EndReason;
use crate::gateway::session::outcome::Outcome;
use crate::gateway::upstream::Upstream;
use crate::model::build_id::BuildId;
use crate::model::trace_parent::TraceParent;
use crate::telemetry::metrics::{Metrics, Route};

/// How long the last spans may take to reach the collector when the gateway stops.
const FLUSH_PATIENCE: Duration = Duration::from_secs(2);

/// Begins spans, where that is configured. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Tracer(Option<Arc<Running>>);

struct Running {
    tracer: SdkTracer,
    /// Never dropped: its drop would wait for a collector. [`Tracer::stop`] does, and in bounds.
    provider: ManuallyDrop<SdkTracerProvider>,
}

impl Tracer {
    /// Starts what exports spans as `config` says, for the gateway called `hostname`. The collector
    /// need not be there.
    ///
    /// # Errors
    /// A file of TLS cannot be used, or there is no thread to be had.
    pub(crate) fn start(
        config: Option<&Tracing>,
        hostname: &str,
        metrics: Metrics,
    ) -> Result<Self> {
        let Some(config) = config else { return Ok(Self::default()) };
        let provider = exporter::start(config, hostname, metrics)?;
        let scope = InstrumentationScope::builder(env!("CARGO_PKG_NAME"))
            .with_version(env!("CARGO_PKG_VERSION"));
        let tracer = provider.tracer_with_scope(scope.build());
        info!(endpoint = %config.endpoint, "tracing: spans of streams go to this collector");
        Ok(Self(Some(Arc::new(Running { tracer, provider: ManuallyDrop::new(provider) }))))
    }

    /// Begins the span of a stream of `build`'s log, which was looked up from `began` until now, by a
    /// gateway of `zone`.
    ///
    /// A stream whose build is in no trace begins none: strangers may ask for anything. Nor does one
    /// in a trace that is not sampled.
    pub(crate) fn span(
        &self,
        parent: Option<&Arc<TraceParent>>,
        build: &BuildId,
        zone: Option<&str>,
        began: Instant,
    ) -> Span {
        let (Some(running), Some(parent)) = (&self.0, parent) else { return Span(None) };
        let context = SpanContext::new(
            TraceId::from(parent.trace_id),
            SpanId::from(parent.span_id),
            TraceFlags::new(parent.flags),
            true,
            TraceState::NONE,
        );
        if !context.is_sampled() {
            return Span(None);
        }
        let trace_id = context.trace_id().to_string();
        let mut attributes = vec![KeyValue::new("zuul.build.uuid", build.to_string())];
        let event_id = parent.event_id.clone().map(|id| KeyValue::new("zuul.event.id", id));
        let zone = zone.map(|zone| KeyValue::new("zuul.zone", zone.to_owned()));
        attributes.extend(event_id.into_iter().chain(zone));
        let now = SystemTime::now();
        let builder = running
            .tracer
            .span_builder("LogStream")
            .with_kind(SpanKind::Server)
            .with_start_time(now.checked_sub(began.elapsed()).unwrap_or(now))
            .with_attributes(attributes);
        let context = Context::new().with_remote_span_context(context);
        let mut span = running.tracer.build_with_context(builder, &context);
        if !span.is_recording() {
            return Span(None);
        }
        span.add_event("looked up", Vec::new());
        let parent = Arc::clone(parent);
        Span(Some(Box::new(Recording { span: Mutex::new(span), trace_id, parent })))
    }

    /// Hands over what there is, for at most [`FLUSH_PATIENCE`]. Spans that end later are lost.
    pub(crate) async fn stop(self) {
        let Some(running) = self.0 else { return };
        let flush = move || running.provider.shutdown_with_timeout(FLUSH_PATIENCE).is_ok();
        // It keeps to its time by itself, but for the thread that it needs.
        let flushed = tokio::task::spawn_blocking(flush);
        if !matches!(tokio::time::timeout(FLUSH_PATIENCE, flushed).await, Ok(Ok(true))) {
            warn!("tracing: the collector has not taken the last spans in time");
        }
    }
}

/// The span of one stream; of none, where nobody records it.
pub(crate) struct Span(Option<Box<Recording>>);

/// Boxed: streams that nobody records have no room for it.
struct Recording {
    /// Locked a few times in a stream's life, by the one task that it has.
    span: Mutex<opentelemetry_sdk::trace::Span>,
    trace_id: String,
    parent: Arc<TraceParent>,
}

impl Recording {
    fn lock(&self) -> MutexGuard<'_, opentelemetry_sdk::trace::Span> {
        // What was recorded is whole at any time.
        self.span.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Span {
    /// Zuul's event id of the build, if its request tells.
    pub(crate) fn event_id(&self) -> Option<&str> {
        self.0.as_ref()?.parent.event_id.as_deref()
    }

    /// The trace that it is in, as collectors write it.
    pub(crate) fn trace_id(&self) -> Option<&str> {
        self.0.as_ref().map(|recording| recording.trace_id.as_str())
    }

    /// Tells from where the request came. Only for peers that have shown a certificate: those are
    /// gateways and servers of the system. The addresses of people are no business of who reads traces.
    pub(crate) fn asked_by(&self, peer: SocketAddr) {
        self.set(|| vec![KeyValue::new("network.peer.address", peer.ip().to_string())]);
    }

    /// Tells that `hop` has taken the request.
    pub(crate) fn connected(&self, hop: &Upstream) {
        self.event("connected", || server(hop));
    }

    /// Tells that `hop` had not what was asked of it, or another one was quicker.
    pub(crate) fn passed_over(&self, hop: &Upstream, reason: &dyn Display) {
        self.event("passed over", || {
            let mut attributes = server(hop);
            attributes.push(KeyValue::new("reason", reason.to_string()));
            attributes
        });
    }

    /// Tells that the log has begun.
    pub(crate) fn first_byte(&self) {
        self.event("first byte", Vec::new);
    }

    /// Tells how much came, from `hop` and on which way.
    pub(crate) fn over(&self, hop: &Upstream, route: Route, bytes: u64) {
        self.set(|| {
            let mut attributes = server(hop);
            attributes.push(KeyValue::new("zuul.route", route.as_str()));
            let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
            attributes.push(KeyValue::new("zuul.stream.bytes", bytes));
            attributes
        });
    }

    /// Ends it. A client that leaves has its reasons; everything else but a whole log is an error.
    pub(crate) fn end(&self, outcome: &Outcome) {
        let Some(recording) = &self.0 else { return };
        let mut span = recording.lock();
        span.set_attribute(KeyValue::new("zuul.stream.result", outcome.label()));
        let failure = match outcome {
            Outcome::Streamed(
                EndReason::Finished | EndReason::ClientLeft(_) | EndReason::ClientStalled,
            ) => None,
            Outcome::Streamed(end) => Some(end.to_string()),
            Outcome::Refused(reply) => Some(reply.to_string().trim_end().to_owned()),
            _ => Some(outcome.label().to_owned()),
        };
        if let Some(failure) = failure {
            span.set_attribute(KeyValue::new("error.type", outcome.label()));
            span.set_status(Status::error(failure));
        }
        span.end();
    }

    fn set(&self, attributes: impl FnOnce() -> Vec<KeyValue>) {
        if let Some(recording) = &self.0 {
            recording.lock().set_attributes(attributes());
        }
    }

    fn event(&self, name: &'static str, attributes: impl FnOnce() -> Vec<KeyValue>) {
        if let Some(recording) = &self.0 {
            recording.lock().add_event(name, attributes());
        }
    }
}

/// Who was asked.
fn server(hop: &Upstream) -> Vec<KeyValue> {
    let (host, port) = hop.address();
    vec![
        KeyValue::new("server.address", host.to_owned()),
        KeyValue::new("server.port", i64::from(port)),
    ]
}
