//! The hops of a request.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::build_request::Executor;
use super::component::Gateway;

/// An executor or a gateway that a request for a log is sent to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Hop {
    /// The executor that has the log. Executors do not use TLS.
    Executor(Executor),
    /// A gateway of the executor's zone.
    Gateway(Gateway),
}

impl fmt::Display for Hop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        HopAddress::from(self).fmt(f)
    }
}

impl Hop {
    /// Returns host and port.
    pub(crate) fn address(&self) -> (&str, u16) {
        match self {
            Self::Executor(executor) => (&executor.hostname, executor.port),
            Self::Gateway(gateway) => (&gateway.hostname, gateway.port),
        }
    }

    /// Returns the zone that is registered.
    pub(crate) fn zone(&self) -> Option<&str> {
        match self {
            Self::Executor(executor) => executor.zone.as_deref(),
            Self::Gateway(gateway) => gateway.zone.as_deref(),
        }
    }

    /// Returns the parts of the `Display` text as fields of a log line: kind, host, port, zone,
    /// TLS.
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

impl From<&Hop> for HopAddress {
    fn from(hop: &Hop) -> Self {
        let kind = match hop {
            Hop::Executor(_) => HopKind::Executor,
            Hop::Gateway(_) => HopKind::Gateway,
        };
        let (_, host, port, zone, tls) = hop.fields();
        Self { kind, host: host.to_owned(), port, zone: zone.map(str::to_owned), tls }
    }
}

impl fmt::Display for HopAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, host, port, zone, tls } = self;
        let host = host.escape_default();
        match kind {
            HopKind::Executor => write!(f, "executor {host}:{port}"),
            HopKind::Gateway => {
                let zone = zone.as_deref().unwrap_or_default().escape_default();
                let protocol = if *tls { "TLS" } else { "plain" };
                write!(f, "gateway {host}:{port} of zone {zone} ({protocol})")
            }
        }
    }
}
