//! The settings and shared state that each session receives.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::limits::Limiter;
use super::relay::client_waits::ClientWaits;
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

/// The part of the configuration that can change while the gateway runs.
#[derive(Clone)]
pub(crate) struct Settings {
    /// By listener index.
    pub(crate) listeners: Arc<[ListenerSettings]>,
    /// For connections to gateways that use TLS; `None` without TLS files.
    pub(crate) connector: Option<tls::Connector>,
    pub(crate) limits: Limits,
}

/// The settings of one listener.
#[derive(Clone)]
pub(crate) struct ListenerSettings {
    pub(crate) config: config::Listener,
    /// `None` without TLS.
    pub(crate) acceptor: Option<Acceptor>,
}

/// The shared state of all sessions, and the settings. A session uses the context that was current
/// when it began, so its settings are consistent; changed settings make a new context for later
/// sessions.
#[derive(Clone)]
pub(crate) struct Context {
    pub(super) router: Arc<Router>,
    pub(super) listeners: Arc<[ListenerSettings]>,
    pub(super) connector: upstream::Connector,
    pub(super) limits: Limits,
    pub(super) limiter: Arc<Limiter>,
    pub(super) metrics: Metrics,
    pub(super) streams: StreamTable,
    pub(super) client_waits: ClientWaits,
    pub(super) heap: HeapTrimmer,
    pub(super) tracer: Tracer,
    /// Cancelled when the grace period is over, to abort the streams that still run.
    pub(super) abort: CancellationToken,
}

impl Context {
    /// Returns the settings of this context.
    pub(super) fn settings(&self) -> Settings {
        Settings {
            listeners: Arc::clone(&self.listeners),
            connector: self.connector.tls().cloned(),
            limits: self.limits.clone(),
        }
    }

    /// Returns a context with the same shared state and other settings.
    pub(super) fn with_settings(&self, settings: Settings) -> Self {
        let Settings { listeners, connector, limits } = settings;
        let connector = self.connector.with_tls(connector);
        Self { listeners, connector, limits, ..self.clone() }
    }
}
