//! The report of `zuul-fingergw status`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::gateway::Usage;
use crate::gateway::health::GatewayHealth;
use crate::gateway::routing::explain::HopReport;
use crate::gateway::stream_table::StreamTable;
use crate::model::component::State;
use crate::model::hop::{Hop, HopAddress};
use crate::registry::{RegistrationStatus, Registry};

/// Where a status report comes from: what was fixed at startup, and handles of what changes.
pub(crate) struct StatusSource {
    pub(crate) hostname: String,
    pub(crate) zone: Option<String>,
    /// The configuration file that the gateway was started with.
    pub(crate) configuration: PathBuf,
    pub(crate) started: Instant,
    pub(crate) listeners: Vec<BoundListener>,
    /// The address of health and metrics.
    pub(crate) admin: Option<SocketAddr>,
    /// The ZooKeeper servers, as configured.
    pub(crate) zookeeper: String,
    pub(crate) state: watch::Receiver<State>,
    pub(crate) registration: watch::Receiver<RegistrationStatus>,
    pub(crate) registry: Registry,
    pub(crate) health: Arc<GatewayHealth>,
    pub(crate) certificates: watch::Receiver<Vec<CertificateStatus>>,
    pub(crate) usage: Usage,
    pub(crate) streams: StreamTable,
}

/// The state of the gateway at one moment. Programs read its JSON, so members are added and never
/// renamed.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StatusReport {
    pub(crate) version: String,
    pub(crate) pid: u32,
    pub(crate) state: ProcessState,
    pub(crate) hostname: String,
    pub(crate) zone: Option<String>,
    pub(crate) configuration: String,
    pub(crate) uptime_seconds: f64,
    pub(crate) listeners: Vec<BoundListener>,
    pub(crate) admin: Option<SocketAddr>,
    pub(crate) zookeeper: ZooKeeperStatus,
    pub(crate) certificates: Vec<CertificateStatus>,
    pub(crate) connections: ConnectionsStatus,
    /// The gateways of other zones and their health.
    pub(crate) gateways: Vec<HopReport>,
    pub(crate) streams: Vec<StreamStatus>,
}

/// The state of the process. Unlike the registry entry it is never `stopped`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ProcessState {
    Initializing,
    Running,
    Stopping,
}

/// A listener with the address it is bound to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct BoundListener {
    pub(crate) address: SocketAddr,
    pub(crate) tls: bool,
    /// Whether the registry entry describes this listener.
    pub(crate) advertised: bool,
}

/// The session with ZooKeeper and our registry entry.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ZooKeeperStatus {
    pub(crate) hosts: String,
    pub(crate) connected: bool,
    /// The status of the registration, as text.
    pub(crate) registration: String,
    /// The name of our entry while it is known to exist.
    pub(crate) entry: Option<String>,
    /// How long there has been no session. `None` until an attempt has failed.
    pub(crate) disconnected_seconds: Option<f64>,
    /// Why there is no session.
    pub(crate) disconnected_reason: Option<String>,
}

/// One of our certificates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CertificateStatus {
    pub(crate) role: IdentityRole,
    pub(crate) file: String,
    pub(crate) subject: Option<String>,
    /// When it expires, as RFC 3339 has it.
    pub(crate) not_after: Option<String>,
}

/// Which peers a certificate is shown to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum IdentityRole {
    /// Clients and other gateways.
    Gateway,
    /// ZooKeeper servers.
    ZooKeeper,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ConnectionsStatus {
    pub(crate) open: usize,
    pub(crate) limit: usize,
}

/// One stream.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StreamStatus {
    pub(crate) seconds: f64,
    pub(crate) peer: SocketAddr,
    pub(crate) build: String,
    pub(crate) hop: HopAddress,
    pub(crate) bytes: u64,
}

impl StatusSource {
    /// Returns the state of the gateway now.
    pub(crate) fn report(&self) -> StatusReport {
        let streams = self.streams.list().into_iter().map(|stream| StreamStatus {
            seconds: round_to_milliseconds(stream.began.elapsed()),
            peer: stream.peer,
            build: stream.build.to_string(),
            hop: HopAddress::from(&stream.hop()),
            bytes: stream.bytes(),
        });
        let gateways = self.registry.gateways();
        let now = Instant::now();
        let other_zones = gateways.iter().filter(|gateway| gateway.zone != self.zone).cloned();
        let gateways =
            other_zones.map(|gateway| HopReport::new(&Hop::Gateway(gateway), &self.health, now));
        let (open, limit) = self.usage.connections();
        StatusReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            state: match *self.state.borrow() {
                State::Initializing => ProcessState::Initializing,
                State::Running => ProcessState::Running,
                // The entry is removed and `stopped`; the process is still draining.
                State::Stopped => ProcessState::Stopping,
            },
            hostname: self.hostname.clone(),
            zone: self.zone.clone(),
            configuration: self.configuration.display().to_string(),
            uptime_seconds: round_to_milliseconds(self.started.elapsed()),
            listeners: self.listeners.clone(),
            admin: self.admin,
            zookeeper: self.zookeeper(),
            certificates: self.certificates.borrow().clone(),
            connections: ConnectionsStatus { open, limit },
            gateways: gateways.collect(),
            streams: streams.collect(),
        }
    }

    fn zookeeper(&self) -> ZooKeeperStatus {
        let registration = self.registration.borrow().clone();
        let outage = self.registry.outage();
        let is_disconnected = matches!(
            registration,
            RegistrationStatus::Connecting
                | RegistrationStatus::ConnectionLost
                | RegistrationStatus::SessionLost
        );
        let disconnected = outage.as_ref().map(|outage| outage.since.elapsed());
        ZooKeeperStatus {
            hosts: self.zookeeper.clone(),
            connected: outage.is_none() && !is_disconnected,
            registration: registration.to_string(),
            entry: match registration {
                RegistrationStatus::Registered(name) => Some(name),
                _ => None,
            },
            disconnected_seconds: disconnected.map(round_to_milliseconds),
            disconnected_reason: outage.map(|outage| outage.cause),
        }
    }
}

/// Returns seconds with three decimal places.
fn round_to_milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1000.0).round() / 1000.0
}
