//! Hands ended spans to the collector, in batches, from threads of their own.
//!
//! The SDK's processor keeps up to 2048 spans and gives away at most 512 at once, every 5 s and
//! sooner if there are so many (`OTEL_BSP_*` in the environment, as with Zuul's services). What comes
//! while it is full is lost (`backlog`): a stream waits for no collector.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use opentelemetry::KeyValue;
use opentelemetry_otlp::{
    Compression, Protocol as Wire, SpanExporter as OtlpExporter, WithExportConfig as _,
    WithHttpConfig as _, WithTonicConfig as _,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;
use tracing::{info, warn};

use super::bounded_processor::{Backlog, Processor};
use super::transport::Collector;
use crate::config::{Protocol, Tracing};
use crate::telemetry::metrics::Metrics;

/// Starts it.
pub(crate) fn start(
    config: &Tracing,
    hostname: &str,
    metrics: Metrics,
) -> Result<SdkTracerProvider> {
    // Apart from the streams'. What drives connections between two exports is its one thread;
    // spans are encoded in the SDK's.
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("tracing")
        .enable_all()
        .build()
        .context("no thread for tracing")?;
    let exporter = {
        let _inside = runtime.enter();
        exporter(config)?
    };
    let backlog = Arc::new(Backlog::new(metrics));
    let exporter = Exporter {
        runtime: Some(runtime),
        exporter,
        config: config.clone(),
        backlog: Arc::clone(&backlog),
        failing: AtomicBool::new(false),
    };
    let resource = Resource::builder_empty()
        .with_service_name(config.service_name.clone())
        .with_attributes([
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("host.name", hostname.to_owned()),
        ])
        .build();
    let processor = Processor::new(exporter, backlog);
    Ok(SdkTracerProvider::builder().with_resource(resource).with_span_processor(processor).build())
}

fn exporter(config: &Tracing) -> Result<OtlpExporter> {
    let collector = Collector::new(config);
    let gzip = config.gzip.then_some(Compression::Gzip);
    let exporter = match config.protocol {
        Protocol::Grpc => {
            let builder = OtlpExporter::builder()
                .with_tonic()
                .with_protocol(Wire::Grpc)
                .with_timeout(config.timeout)
                .with_channel(collector.channel()?);
            match gzip {
                Some(gzip) => builder.with_compression(gzip).build(),
                None => builder.build(),
            }
        }
        Protocol::HttpProtobuf => {
            let builder = OtlpExporter::builder()
                .with_http()
                .with_protocol(Wire::HttpBinary)
                .with_endpoint(config.endpoint.to_string())
                .with_timeout(config.timeout)
                .with_http_client(collector);
            match gzip {
                Some(gzip) => builder.with_compression(gzip).build(),
                None => builder.build(),
            }
        }
    };
    exporter.context("tracing")
}

/// Runs the exporter of the library in the runtime that it needs, in bounds, and tells how it goes.
#[derive(Debug)]
struct Exporter {
    /// There until the drop.
    runtime: Option<Runtime>,
    exporter: OtlpExporter,
    config: Tracing,
    backlog: Arc<Backlog>,
    failing: AtomicBool,
}

impl SpanExporter for Exporter {
    /// Called by the thread of the SDK, and by nothing else.
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let runtime = self.runtime.as_ref().expect("there until the drop");
        let patience = self.config.timeout;
        // With its tries again, which it makes within the same time.
        let outcome =
            runtime.block_on(async { timeout(patience, self.exporter.export(batch)).await });
        let outcome = outcome.unwrap_or(Err(OTelSdkError::Timeout(patience)));
        self.tell(spans, &outcome);
        outcome
    }

    fn shutdown_with_timeout(&self, timeout: std::time::Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

impl Exporter {
    /// Counts, and says once that the collector fails and once that it does no more.
    fn tell(&self, spans: usize, outcome: &OTelSdkResult) {
        let endpoint = &self.config.endpoint;
        match outcome {
            Ok(()) => {
                self.backlog.exported(spans);
                if self.failing.swap(false, Ordering::Relaxed) {
                    let lost = self.backlog.lost();
                    info!(%endpoint, lost, "tracing: the collector takes spans again");
                }
            }
            Err(error) => {
                self.backlog.failed(spans);
                if !self.failing.swap(true, Ordering::Relaxed) {
                    warn!(%endpoint, %error, "tracing: spans are lost until the collector takes them");
                }
            }
        }
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // A name server may be asked still, and nobody waits for its answer.
            runtime.shutdown_background();
        }
    }
}
