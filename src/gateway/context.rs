//! What the sessions of a gateway share.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::limits::Limiter;
use super::relay::stalled_clients::StalledClients;
use super::routing::Router;
use super::stream_table::StreamTable;
use super::upstream;
use crate::config;
use crate::config::Limits;
use crate::os::heap::HeapTrimmer;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::otlp::Tracer;
use crate::tls;
use crate::tls::Acceptor;

/// The part of a gateway's configuration that can change while it runs.
#[derive(Clone)]
pub(crate) struct Settings {
    /// By listener index.
    pub(crate) listeners: Arc<[config::Listener]>,
    /// By listener index; `None` for listeners without TLS.
    pub(crate) acceptors: Vec<Option<Acceptor>>,
    /// For gateways that use TLS; `None` without TLS files.
    pub(crate) connector: Option<tls::Connector>,
    pub(crate) limits: Limits,
}

/// What every session shares, and the settings when it began: one consistent set, taken once. A change
/// makes another context, for the sessions after it.
#[derive(Clone)]
pub(crate) struct Context {
    pub(super) router: Arc<Router>,
    pub(super) listeners: Arc<[config::Listener]>,
    pub(super) acceptors: Vec<Option<Acceptor>>,
    pub(super) connector: upstream::Connector,
    pub(super) limits: Limits,
    pub(super) limiter: Arc<Limiter>,
    pub(super) metrics: Metrics,
    pub(super) streams: StreamTable,
    pub(super) stalled_clients: StalledClients,
    pub(super) heap: HeapTrimmer,
    pub(super) tracer: Tracer,
    /// Cancelled when the grace period is over, to abort the streams that still run.
    pub(super) abort: CancellationToken,
}

impl Context {
    /// The settings of the sessions that begin now.
    pub(super) fn settings(&self) -> Settings {
        Settings {
            listeners: Arc::clone(&self.listeners),
            acceptors: self.acceptors.clone(),
            connector: self.connector.tls().cloned(),
            limits: self.limits.clone(),
        }
    }

    /// The same context with other settings.
    pub(super) fn with_settings(&self, settings: Settings) -> Self {
        let Settings { listeners, acceptors, connector, limits } = settings;
        let connector = self.connector.with_tls(connector);
        Self { listeners, acceptors, connector, limits, ..self.clone() }
    }
}
