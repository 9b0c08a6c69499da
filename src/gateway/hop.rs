//! Hops: what a request is sent to.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::model::build_request::Executor;
use crate::model::component::Gateway;
use crate::telemetry::metrics::Route;

/// An executor or a gateway that a request is sent to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Hop {
    /// The executor itself. Executors speak no TLS.
    Executor(Executor),
    /// A gateway of the executor's zone.
    Gateway(Gateway),
}

impl fmt::Display for Hop {
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

impl Hop {
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
