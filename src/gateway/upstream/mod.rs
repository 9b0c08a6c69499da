//! The connect phase of a request: from the hops of its route to the first bytes of the log.
//!
//! [`Connector::connect_any`] tries the hops until one sends the log, and returns an
//! [`Established`] connection. A route is one executor, or the gateways of another zone and the
//! executor.

mod attempt;
mod attempt_schedule;
mod dialer;
mod executor_slots;
mod failover;
mod own_addresses;
mod pending_per_build;

use std::sync::Arc;
use std::time::Duration;

use rustls::HandshakeKind;
use tokio::sync::Semaphore;

pub(crate) use self::attempt::AttemptError;
use self::dialer::Dialer;
use self::executor_slots::ExecutorSlots;
pub(crate) use self::failover::FailoverError;
pub(crate) use self::own_addresses::OwnAddresses;
use self::pending_per_build::PendingPerBuild;
use super::health::GatewayHealth;
use super::transport::buffer_pool::Chunk;
use super::transport::connection::Connection;
use crate::config::Limits;
use crate::model::build_id::BuildId;
use crate::model::hop::Hop;
use crate::tls;

/// The number of sockets for concurrent attempts at several gateways, and at several addresses of
/// one host, beyond the first socket of each request. All requests share them. The limit of open
/// files includes them (`daemon::capacity`). A request that gets none tries one hop and one address
/// after the other.
pub(crate) const SPARE_SOCKETS: usize = 128;

/// Connects to hops. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Connector {
    /// For gateways that use TLS; `None` if this gateway has no certificate.
    tls: Option<tls::Connector>,
    dialer: Arc<Dialer>,
    executor_slots: ExecutorSlots,
    pending_per_build: PendingPerBuild,
    own_addresses: OwnAddresses,
    health: Arc<GatewayHealth>,
    spare_sockets: Arc<Semaphore>,
}

impl Connector {
    pub(crate) fn new(
        tls: Option<tls::Connector>,
        own_addresses: OwnAddresses,
        health: Arc<GatewayHealth>,
    ) -> Self {
        Self {
            tls,
            dialer: Arc::default(),
            executor_slots: ExecutorSlots::default(),
            pending_per_build: PendingPerBuild::default(),
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

/// What [`Connector::connect_any`] needs besides the hops of the route.
pub(crate) struct ConnectParameters<'a, O> {
    pub(crate) build: &'a BuildId,
    /// How many gateways have sent this request before.
    pub(crate) forwarded: u8,
    /// Whether the executor's address is also that of a registered gateway, so that the request may
    /// return to this gateway.
    pub(crate) executor_is_gateway: bool,
    pub(crate) client_is_tls: bool,
    pub(crate) limits: &'a Limits,
    pub(crate) observer: &'a O,
}

/// A connection to a hop that has sent the beginning of the log.
pub(crate) struct Established<'h> {
    pub(crate) hop: &'h Hop,
    pub(crate) connection: Connection,
    /// The first bytes; never empty.
    pub(crate) first: Chunk,
}

/// Receives the events of a connect phase, to count and log them.
pub(crate) trait ConnectObserver: Sync {
    /// An attempt at one of several hops has started.
    fn attempt_started(&self, hop: &Hop);

    /// The request waited this long for a slot of the executor.
    fn executor_slot_awaited(&self, time: Duration);

    /// A TLS handshake with a hop has succeeded, and the hop has accepted our certificate.
    fn tls_established(&self, kind: HandshakeKind);

    /// The request has been sent to `hop`, this long after the attempt began to connect.
    fn connected(&self, hop: &Hop, time: Duration);

    /// The attempt at `hop` failed. `is_last` means that the request fails with it.
    fn attempt_failed(&self, hop: &Hop, error: &AttemptError, is_last: bool);
}
