//! The connect phase of a request: from the hops of its route to the first bytes of the log.
//!
//! [`Connector::connect_any`] tries the hops until one sends the log and returns an [`Established`]
//! connection, whatever the route: one executor, or the gateways of another zone.

mod attempt;
mod attempt_schedule;
mod dialer;
mod executor_slots;
mod failover;
mod loop_guard;
mod own_addresses;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rustls::HandshakeKind;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

pub(crate) use self::attempt::AttemptError;
use self::dialer::Dialer;
use self::executor_slots::ExecutorSlots;
pub(crate) use self::failover::FailoverError;
use self::loop_guard::LoopGuard;
pub(crate) use self::own_addresses::OwnAddresses;
use super::health::Memory;
use super::transport::buffer_pool::Chunk;
use super::transport::connection::Connection;
use crate::config::Limits;
use crate::model::build_id::BuildId;
use crate::model::build_request::Executor;
use crate::model::component::Gateway;
use crate::telemetry::metrics::Route;
use crate::tls;

/// Sockets in the connect phase beyond one for each request, over all requests: for attempts at several
/// gateways, and for several addresses of one host. The limit of open files has room for them
/// (`os::fd_limit`); a request that gets none tries one hop, and one address, after the other.
const SPARE_SOCKETS: usize = 128;

/// Connects to hops. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Connector {
    /// For gateways that use TLS; `None` without a certificate of ours.
    tls: Option<tls::Connector>,
    dialer: Arc<Dialer>,
    executor_slots: ExecutorSlots,
    loop_guard: LoopGuard,
    own_addresses: OwnAddresses,
    health: Arc<Memory>,
    spare_sockets: Arc<Semaphore>,
}

impl Connector {
    pub(crate) fn new(
        tls: Option<tls::Connector>,
        own_addresses: OwnAddresses,
        health: Arc<Memory>,
    ) -> Self {
        Self {
            tls,
            dialer: Arc::default(),
            executor_slots: ExecutorSlots::default(),
            loop_guard: LoopGuard::default(),
            own_addresses,
            health,
            spare_sockets: Arc::new(Semaphore::new(SPARE_SOCKETS)),
        }
    }

    pub(crate) fn tls(&self) -> Option<&tls::Connector> {
        self.tls.as_ref()
    }

    /// The same connector, slots and state included, with other TLS settings.
    pub(crate) fn with_tls(&self, tls: Option<tls::Connector>) -> Self {
        Self { tls, ..self.clone() }
    }
}

/// What is asked of the hops of a route.
pub(crate) struct ConnectRequest<'a, O> {
    pub(crate) build: &'a BuildId,
    /// How many gateways have sent this request before.
    pub(crate) sent_hops: u8,
    /// Whether the executor is registered with the address of a gateway, so that the request may come
    /// back.
    pub(crate) executor_is_gateway: bool,
    pub(crate) client_is_tls: bool,
    pub(crate) limits: &'a Limits,
    pub(crate) observer: &'a O,
}

/// A connection that has brought the beginning of the log.
pub(crate) struct Established<'h> {
    pub(crate) hop: &'h Upstream,
    pub(crate) connection: Connection,
    /// The first bytes; never empty.
    pub(crate) first: Chunk,
}

/// Receives the events of a connect phase, to count and log them.
pub(crate) trait ConnectObserver: Sync {
    /// One of several hops is tried now.
    fn attempt_started(&self, hop: &Upstream);

    /// The request waited this long for its turn to ask the executor.
    fn executor_slot_awaited(&self, time: Duration);

    /// A TLS handshake with a hop has succeeded.
    fn tls_established(&self, kind: Option<HandshakeKind>);

    /// `hop` was sent the request, this long after the first connection attempt.
    fn connected(&self, hop: &Upstream, time: Duration);

    /// The attempt at `hop` failed. `is_last` says that the request fails with it.
    fn attempt_failed(&self, hop: &Upstream, error: &AttemptError, is_last: bool);
}

/// Somebody who may have the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Upstream {
    /// The executor itself. Executors speak no TLS.
    Executor(Executor),
    /// A gateway of the executor's zone.
    Gateway(Gateway),
}

impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Executor(Executor { hostname, port, .. }) => {
                write!(f, "executor {}:{port}", hostname.escape_default())
            }
            Self::Gateway(Gateway { hostname, port, zone, tls }) => {
                let zone = zone.as_deref().unwrap_or_default().escape_default();
                let speech = if *tls { "TLS" } else { "plain" };
                write!(f, "gateway {}:{port} of zone {zone} ({speech})", hostname.escape_default())
            }
        }
    }
}

impl Upstream {
    /// Host and port.
    pub(crate) fn address(&self) -> (&str, u16) {
        match self {
            Self::Executor(executor) => (&executor.hostname, executor.port),
            Self::Gateway(gateway) => (&gateway.hostname, gateway.port),
        }
    }

    /// The zone in the registry.
    pub(crate) fn zone(&self) -> Option<&str> {
        match self {
            Self::Executor(executor) => executor.zone.as_deref(),
            Self::Gateway(gateway) => gateway.zone.as_deref(),
        }
    }

    /// The route over this hop, one of `hops`.
    pub(crate) fn route(&self, hops: usize) -> Route {
        match self {
            Self::Gateway(_) => Route::Zone,
            Self::Executor(_) if hops > 1 => Route::Fallback,
            Self::Executor(_) => Route::Direct,
        }
    }

    /// The parts of the `Display` text, as fields of a log line in JSON: kind, host, port, zone, TLS.
    pub(crate) fn fields(&self) -> (&'static str, &str, u16, Option<&str>, bool) {
        match self {
            Self::Executor(Executor { hostname, port, zone }) => {
                ("executor", hostname, *port, zone.as_deref(), false)
            }
            Self::Gateway(Gateway { hostname, port, zone, tls }) => {
                ("gateway", hostname, *port, zone.as_deref(), *tls)
            }
        }
    }
}

/// The address of a hop, as reports have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HopAddress {
    pub(crate) kind: HopKind,
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) zone: Option<String>,
    pub(crate) tls: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum HopKind {
    Executor,
    Gateway,
}

impl From<&Upstream> for HopAddress {
    fn from(hop: &Upstream) -> Self {
        let kind = match hop {
            Upstream::Executor(_) => HopKind::Executor,
            Upstream::Gateway(_) => HopKind::Gateway,
        };
        let (_, host, port, zone, tls) = hop.fields();
        Self { kind, host: host.to_owned(), port, zone: zone.map(str::to_owned), tls }
    }
}
