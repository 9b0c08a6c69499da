//! The next hop: an executor's log streamer, or the gateway of another zone.

#[cfg(test)]
mod attempt_schedule;
pub(crate) mod dialer;
pub(crate) mod executor_slots;
pub(crate) mod failover;
pub(crate) mod loop_guard;
pub(crate) mod misrouting;
pub(crate) mod own_addresses;

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::net::Ipv6Addr;

use rustls::HandshakeKind;
use rustls::pki_types::ServerName;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use super::Context;
use super::transport::connection::Connection;
use super::transport::read_ahead::ReadAhead;
use super::transport::socket::Socket;
use crate::config::to_ascii;
use crate::gateway::protocol::request::{Request, RequestFormat};
use crate::gateway::session::Asked;
use crate::model::build_request::Executor;
use crate::model::component::Gateway;
use crate::telemetry::metrics::{Direction, Route};
use crate::tls;
use crate::tls::HandshakeFailure;

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

/// Why the next hop could not be asked.
#[derive(Debug)]
pub(crate) enum DialError {
    /// Not connected, or no TLS session, within the deadline.
    TimedOut,
    /// The name, the connection or the request failed.
    Tcp(io::Error),
    /// The TLS handshake failed.
    Tls(io::Error),
    /// It speaks TLS and this gateway has no certificate.
    NoCertificate,
    /// Too many requests for the build wait for its first byte.
    TooManyForBuild,
    /// It has answered that too many gateways have sent the request; with the names in its
    /// certificate.
    Loop(String),
    /// Its address is one that this gateway listens on, or is registered with.
    Ourselves,
    /// No slot to ask this executor became free in time.
    Busy,
    /// It is a gateway of another zone than its entry says, with these names in its certificate.
    WrongZone(String),
}

impl DialError {
    /// The value of the metric label `reason`.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::TimedOut => "timeout",
            Self::Tcp(_) => "connect",
            Self::Tls(_) => "tls",
            Self::NoCertificate => "no_certificate",
            Self::Loop(_) | Self::Ourselves => "loop",
            Self::Busy | Self::TooManyForBuild => "busy",
            Self::WrongZone(_) => "wrong_zone",
        }
    }
}

impl fmt::Display for DialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TimedOut => f.write_str("no connection in time"),
            Self::Tcp(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
                write!(f, "{error}; no local port is free (net.ipv4.tcp_tw_reuse)")
            }
            Self::Tcp(error) => write!(f, "{error}"),
            Self::Tls(error) => write!(f, "TLS: {}", tls::describe(error)),
            Self::TooManyForBuild => f.write_str("too many requests for this build wait for it"),
            Self::Loop(found) => write!(f, "too many gateways have sent the request: {found}"),
            Self::Ourselves => f.write_str("its address is that of this gateway itself"),
            Self::Busy => f.write_str("too many requests wait for this executor's first byte"),
            Self::WrongZone(found) => write!(f, "a gateway of another zone answers: {found}"),
            Self::NoCertificate => f.write_str("it speaks TLS; set tls.cert, tls.key and tls.ca"),
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

    /// Returns the route over this hop, one of `hops` candidates.
    pub(crate) fn route(&self, hops: usize) -> Route {
        match self {
            Self::Gateway(_) => Route::Zone,
            Self::Executor(_) if hops > 1 => Route::Fallback,
            Self::Executor(_) => Route::Direct,
        }
    }

    /// Connects and sends the request, all within the connect deadline.
    pub(crate) async fn ask(&self, asked: &Asked<'_>) -> Result<Connection, DialError> {
        let Asked { build, sent_hops, cx, .. } = asked;
        let deadline = Instant::now() + cx.limits.connect_timeout;
        let mut connection = self.dial(deadline, cx).await?;
        let (_, _, _, zone, _) = self.fields();
        let request = Request {
            build: build.clone(),
            zone: zone.map(str::to_owned),
            hops: sent_hops.saturating_add(1),
        };
        let request = request.to_line(RequestFormat::negotiated(connection.is_peer_gateway()));
        let asked = async {
            connection.write_all(request.as_bytes()).await?;
            connection.flush().await
        };
        in_time(deadline, asked).await?.map_err(DialError::Tcp)?;
        Ok(connection)
    }

    async fn dial(&self, deadline: Instant, cx: &Context) -> Result<Connection, DialError> {
        let (host, port) = self.address();
        if cx.resolver.is_own(host, port) {
            return Err(DialError::Ourselves);
        }
        let secure = match self {
            Self::Gateway(Gateway { tls: true, .. }) => {
                Some(cx.connector.as_ref().ok_or(DialError::NoCertificate)?)
            }
            _ => None,
        };
        let connect = async || -> Result<Socket, DialError> {
            let connected = cx.dialer.connect(host, port, cx.limits.stream_buffer);
            let stream = in_time(deadline, connected).await?.map_err(|error| {
                if error.kind() == io::ErrorKind::AddrNotAvailable {
                    cx.metrics.local_ports_exhausted();
                }
                DialError::Tcp(error)
            })?;
            if stream.tcp().is_some_and(|tcp| cx.own_addresses.are_dialed_by(tcp, port)) {
                return Err(DialError::Ourselves);
            }
            Ok(stream)
        };
        let mut stream = connect().await?;
        let Some(connector) = secure else { return Ok(Connection::Plain(stream)) };
        let name = server_name(host)?;
        let (failure, error) = loop {
            // The request follows the handshake's last message at once; a plain one has nothing to
            // wait for anyway.
            stream.set_nodelay().map_err(DialError::Tcp)?;
            let tcp = ReadAhead::from_hop(stream);
            let shaken = in_time(deadline, connector.connect(&name, port, tcp)).await;
            match shaken {
                Ok(Ok(stream)) => {
                    let kind = stream.get_ref().1.handshake_kind();
                    let resumed = kind == Some(HandshakeKind::Resumed);
                    cx.metrics.handshake_ok(Direction::Outbound, resumed);
                    return Ok(Connection::tls(stream));
                }
                Ok(Err((error, below))) => {
                    // The alert that says why has to arrive.
                    below.into_socket().close();
                    // A TLS terminator in between knows other protocols only.
                    if !(HandshakeFailure::refuses_protocols(&error)
                        && connector.omit_protocols(&name, port))
                    {
                        break (HandshakeFailure::from_error(&error), DialError::Tls(error));
                    }
                    debug!(route = %self, "TLS without ALPN, which this gateway's address refuses");
                    stream = connect().await?;
                }
                Err(late) => break (HandshakeFailure::Timeout, late),
            }
        };
        cx.metrics.handshake_failed(Direction::Outbound, failure.label());
        Err(error)
    }
}

async fn in_time<T>(deadline: Instant, step: impl Future<Output = T>) -> Result<T, DialError> {
    timeout_at(deadline, step).await.map_err(|_| DialError::TimedOut)
}

/// The name for SNI and for the certificate: in ASCII (RFC 6066, section 3), without the dot of a fully
/// qualified name, and without the interface of a link-local address, which no certificate names.
fn server_name(host: &str) -> Result<ServerName<'static>, DialError> {
    let host = to_ascii(host).unwrap_or(Cow::Borrowed(host));
    let host = match host.split_once('%') {
        Some((address, _)) if address.parse::<Ipv6Addr>().is_ok() => address,
        _ => host.trim_end_matches('.'),
    };
    ServerName::try_from(host.to_owned()).map_err(|error| DialError::Tls(io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use super::server_name;

    #[test]
    fn the_name_for_tls_is_ascii_without_dot_and_interface() {
        let name = |host| server_name(host).map(|name| name.to_str().into_owned()).ok();
        assert_eq!(name("gw.example.org."), name("gw.example.org"));
        assert_eq!(name("192.0.2.1").as_deref(), Some("192.0.2.1"));
        assert_eq!(name("fe80::1%eth0").as_deref(), Some("fe80::1"));
        assert_eq!(name("b\u{fc}cher.test.").as_deref(), Some("xn--bcher-kva.test"));
        assert_eq!(name("not a name"), None);
    }
}
