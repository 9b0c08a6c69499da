//! Exports ended spans to an OpenTelemetry collector over OTLP, with the transports of
//! `opentelemetry-otlp`: tonic for gRPC, hyper for HTTP, rustls for both.
//!
//! The SDK's batch processor queues up to 2048 spans and exports up to 512 of them every 5 s,
//! sooner if so many wait (`OTEL_BSP_*` of the environment, as for Zuul's services). It drops spans
//! while the queue is full: streams never wait for the collector.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use opentelemetry::KeyValue;
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_otlp::tonic_types::transport::{ClientTlsConfig, Identity};
use opentelemetry_otlp::{
    Compression, Protocol as OtlpProtocol, SpanExporter as Transport, WithExportConfig as _,
    WithHttpConfig as _, WithTonicConfig as _,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;
use tracing::{info, warn};

use crate::config::{Protocol, Tracing};
use crate::os::file;
use crate::telemetry::metrics::Metrics;

/// Starts exporting spans in the background.
///
/// # Errors
/// A TLS file cannot be used, or a thread cannot be started.
pub(super) fn start(
    config: &Tracing,
    hostname: &str,
    metrics: Metrics,
) -> Result<SdkTracerProvider> {
    let resource = Resource::builder_empty()
        .with_service_name(config.service_name.clone())
        .with_attributes([
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("host.name", hostname.to_owned()),
        ])
        .build();
    let exporter = Exporter::new(config, metrics)?;
    Ok(SdkTracerProvider::builder().with_resource(resource).with_batch_exporter(exporter).build())
}

/// Checks whether the TLS files of `config` can be used.
///
/// # Errors
/// They cannot.
pub(crate) fn check(config: Option<&Tracing>) -> Result<()> {
    config.map_or(Ok(()), |config| Exporter::new(config, Metrics::default()).map(drop))
}

/// Runs the transport in a runtime apart from that of the streams, and limits its time.
#[derive(Debug)]
struct Exporter {
    config: Tracing,
    resource: Resource,
    metrics: Metrics,
    /// `None` after a failed export: the next one reads renewed certificates, and does not use a
    /// connection to a host that has vanished.
    transport: Mutex<Option<Transport>>,
    /// Spans lost since the last successful export.
    lost: AtomicU64,
    /// Its one worker serves connections between exports. `None` when dropped.
    runtime: Option<Runtime>,
}

impl Exporter {
    fn new(config: &Tracing, metrics: Metrics) -> Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("tracing")
            .enable_all()
            .build()
            .context("tracing: cannot start a thread")?;
        let mut exporter = Self {
            config: config.clone(),
            resource: Resource::builder_empty().build(),
            metrics,
            transport: Mutex::new(None),
            lost: AtomicU64::new(0),
            runtime: Some(runtime),
        };
        let transport = {
            let _guard = exporter.runtime().enter();
            exporter.new_transport()?
        };
        exporter.transport = Mutex::new(Some(transport));
        Ok(exporter)
    }

    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("set until the drop")
    }

    /// Creates a transport, which connects when it exports.
    fn new_transport(&self) -> Result<Transport> {
        let Tracing { endpoint, timeout, gzip, .. } = &self.config;
        let compression = gzip.then_some(Compression::Gzip);
        let transport = match self.config.protocol {
            Protocol::Grpc => {
                let mut builder = Transport::builder()
                    .with_tonic()
                    .with_endpoint(endpoint)
                    .with_timeout(*timeout);
                if self.config.uses_tls() {
                    builder = builder.with_tls_config(grpc_tls(&self.config)?);
                }
                if let Some(compression) = compression {
                    builder = builder.with_compression(compression);
                }
                builder.build()
            }
            Protocol::HttpProtobuf => {
                let mut builder = Transport::builder()
                    .with_http()
                    .with_protocol(OtlpProtocol::HttpBinary)
                    .with_endpoint(endpoint)
                    .with_timeout(*timeout);
                builder = if self.config.uses_tls() {
                    builder.with_http_client(https_client(&self.config)?)
                } else {
                    builder.with_http_client(HyperClient::with_default_connector(*timeout, None))
                };
                if let Some(compression) = compression {
                    builder = builder.with_compression(compression);
                }
                builder.build()
            }
        };
        let mut transport = transport.context("tracing: cannot export to the endpoint")?;
        transport.set_resource(&self.resource);
        Ok(transport)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Transport>> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Exports `batch`, with all retries, within the configured timeout.
    async fn try_export(
        &self,
        transport: &mut Option<Transport>,
        batch: Vec<SpanData>,
    ) -> Result<(), String> {
        let transport = match transport {
            Some(transport) => transport,
            None => transport.insert(self.new_transport().map_err(|error| format!("{error:#}"))?),
        };
        match timeout(self.config.timeout, transport.export(batch)).await {
            Ok(exported) => exported.map_err(|error| error.to_string()),
            Err(_) => Err(format!("no response within {:?}", self.config.timeout)),
        }
    }
}

impl SpanExporter for Exporter {
    /// Called by the thread of the batch processor only.
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len() as u64;
        let endpoint = &self.config.endpoint;
        let mut transport = self.lock();
        let exported = self.runtime().block_on(self.try_export(&mut transport, batch));
        match exported {
            Ok(()) => {
                self.metrics.spans("exported", spans);
                let lost = self.lost.swap(0, Ordering::Relaxed);
                if lost > 0 {
                    info!(%endpoint, lost, "tracing: the collector accepts spans again");
                }
                Ok(())
            }
            Err(error) => {
                *transport = None;
                self.metrics.spans("failed", spans);
                if self.lost.fetch_add(spans, Ordering::Relaxed) == 0 {
                    warn!(%endpoint, error, "tracing: cannot export spans; they are lost");
                }
                Err(OTelSdkError::InternalFailure(error))
            }
        }
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.resource = resource.clone();
        if let Some(transport) = &mut *self.lock() {
            transport.set_resource(resource);
        }
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Does not wait for a name server that has been asked.
            runtime.shutdown_background();
        }
    }
}

/// Returns the TLS settings for gRPC: the CA certificates that verify the collector, or those of
/// the system, and our certificate.
fn grpc_tls(config: &Tracing) -> Result<ClientTlsConfig> {
    let mut tls = ClientTlsConfig::new();
    tls = match &config.authorities {
        Some(path) => tls.trust_anchors(read_ca(path)?.roots),
        None => tls.with_native_roots(),
    };
    if let Some((cert, key)) = &config.identity {
        tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
    }
    Ok(tls)
}

/// Returns a client for HTTPS. `opentelemetry-otlp` has TLS for HTTP only by a client that is
/// passed to it; hyper-rustls is that of the hyper client, and brings fewer crates than reqwest.
fn https_client(config: &Tracing) -> Result<HyperClient<HttpsConnector<HttpConnector>>> {
    let provider = default_provider();
    let builder = HttpsConnectorBuilder::new();
    let builder = match &config.authorities {
        Some(path) => builder.with_tls_config(
            ClientConfig::builder_with_provider(provider.into())
                .with_safe_default_protocol_versions()?
                .with_root_certificates(read_ca(path)?)
                .with_no_client_auth(),
        ),
        None => builder
            .with_provider_and_native_roots(provider)
            .context("tracing: the system has no CA certificates; set certificate_file")?,
    };
    let connector = builder.https_only().enable_http1().build();
    Ok(HyperClient::new(connector, config.timeout, None))
}

/// Reads CA certificates in PEM.
fn read_ca(path: &Path) -> Result<RootCertStore> {
    let pem = read(path)?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.ok();
        let added = certificate.is_some_and(|certificate| roots.add(certificate).is_ok());
        ensure!(added, "{}: has a CA certificate that cannot be used", path.display());
    }
    ensure!(!roots.is_empty(), "{}: has no certificate in PEM", path.display());
    Ok(roots)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    file::read(path).with_context(|| format!("{}: cannot be read", path.display()))
}
