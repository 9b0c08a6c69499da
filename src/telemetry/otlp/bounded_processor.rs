//! The ended spans that wait for the collector. The SDK's processor throws away in silence what it has
//! no room for, so it is given no more than it has room for, and the rest is counted here.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use opentelemetry::Context;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Span, SpanData, SpanExporter, SpanProcessor,
};

use crate::telemetry::metrics::Metrics;

/// As with Zuul's services, which have it from OpenTelemetry's SDK.
const ROOM: &str = "OTEL_BSP_MAX_QUEUE_SIZE";
const DEFAULT_ROOM: usize = 2048;

/// How many spans wait, and how many were lost.
#[derive(Debug)]
pub(crate) struct Backlog {
    /// Those on their way to the collector are among them.
    waiting: AtomicUsize,
    /// Since it was last told.
    lost: AtomicU64,
    metrics: Metrics,
}

impl Backlog {
    pub(crate) fn new(metrics: Metrics) -> Self {
        Self { waiting: AtomicUsize::new(0), lost: AtomicU64::new(0), metrics }
    }

    /// The collector has taken this many of them.
    pub(crate) fn exported(&self, spans: usize) {
        self.waiting.fetch_sub(spans, Ordering::Relaxed);
        self.metrics.spans("exported", spans as u64);
    }

    /// It has not.
    pub(crate) fn failed(&self, spans: usize) {
        self.waiting.fetch_sub(spans, Ordering::Relaxed);
        self.lose(spans as u64);
    }

    /// How many were lost since this was last called.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.swap(0, Ordering::Relaxed)
    }

    fn lose(&self, spans: u64) {
        self.lost.fetch_add(spans, Ordering::Relaxed);
        self.metrics.spans("failed", spans);
    }
}

/// The SDK's processor behind the count.
#[derive(Debug)]
pub(crate) struct Processor {
    inner: BatchSpanProcessor,
    room: usize,
    backlog: Arc<Backlog>,
}

impl Processor {
    /// Hands spans to `exporter`, which tells `backlog` what became of them.
    pub(crate) fn new(exporter: impl SpanExporter + 'static, backlog: Arc<Backlog>) -> Self {
        let room = std::env::var(ROOM).ok().and_then(|room| room.parse().ok());
        let room = room.filter(|room| *room > 0).unwrap_or(DEFAULT_ROOM);
        let config = BatchConfigBuilder::default().with_max_queue_size(room).build();
        let inner = BatchSpanProcessor::builder(exporter).with_batch_config(config).build();
        Self { inner, room, backlog }
    }
}

impl SpanProcessor for Processor {
    fn on_start(&self, span: &mut Span, cx: &Context) {
        self.inner.on_start(span, cx);
    }

    fn on_end(&self, span: SpanData) {
        let more = |waiting| (waiting < self.room).then_some(waiting + 1);
        match self.backlog.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => self.inner.on_end(span),
            Err(_) => self.backlog.lose(1),
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}
