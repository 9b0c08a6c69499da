//! The next hop: an executor's log streamer, or the gateway of another zone.

use std::fmt;
use std::io;

use rustls::pki_types::ServerName;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use super::Context;
use super::connection::Connection;
use super::read_ahead::ReadAhead;
use crate::admin::metrics::Side;
use crate::registry::build::{BuildId, Executor};
use crate::registry::component::Gateway;
use crate::tls::{self, Failure};

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
    /// Too many requests for the build wait for it already.
    Circle,
    /// It is a gateway of another zone than its entry says, with these names in its certificate.
    Elsewhere(String),
}

impl DialError {
    /// The value of the metric label `reason`.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::TimedOut => "timeout",
            Self::Tcp(_) => "connect",
            Self::Tls(_) => "tls",
            Self::NoCertificate => "no_certificate",
            Self::Circle => "circle",
            Self::Elsewhere(_) => "zone",
        }
    }
}

impl fmt::Display for DialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TimedOut => f.write_str("no connection in time"),
            Self::Tcp(error) => write!(f, "{error}"),
            Self::Tls(error) => write!(f, "TLS: {}", tls::describe(error)),
            Self::Circle => f.write_str("too many requests for this build wait for it"),
            Self::Elsewhere(found) => write!(f, "a gateway of another zone answers: {found}"),
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

    /// Connects and asks for `build`, all within the connect deadline.
    pub(crate) async fn ask(&self, build: &BuildId, cx: &Context) -> Result<Connection, DialError> {
        let deadline = Instant::now() + cx.limits.connect_timeout;
        let mut connection = self.dial(deadline, cx).await?;
        let request = format!("{build}\n");
        let asked = async {
            connection.write_all(request.as_bytes()).await?;
            connection.flush().await
        };
        in_time(deadline, asked).await?.map_err(DialError::Tcp)?;
        Ok(connection)
    }

    async fn dial(&self, deadline: Instant, cx: &Context) -> Result<Connection, DialError> {
        let (host, port) = self.address();
        let secure = match self {
            Self::Gateway(gateway @ Gateway { tls: true, .. }) => {
                Some((gateway, cx.connector.as_ref().ok_or(DialError::NoCertificate)?))
            }
            _ => None,
        };
        let connect = async || -> Result<TcpStream, DialError> {
            let connected = in_time(deadline, cx.dialer.connect(host, port)).await?;
            connected.map_err(DialError::Tcp)
        };
        let mut stream = connect().await?;
        let Some((gateway, connector)) = secure else { return Ok(Connection::Plain(stream)) };
        let name = server_name(host)?;
        let (failure, error) = loop {
            // The request follows the handshake's last message at once; a plain one has nothing to
            // wait for anyway.
            stream.set_nodelay(true).map_err(DialError::Tcp)?;
            let zone = gateway.zone.as_deref();
            let tcp = ReadAhead::from_next_hop(stream);
            let shaken = in_time(deadline, connector.connect(name.clone(), port, zone, tcp)).await;
            match shaken {
                Ok(Ok(stream)) => {
                    cx.metrics.shaken(Side::Upstream, stream.get_ref().1.handshake_kind());
                    return Ok(Connection::Tls(Box::new(stream.into())));
                }
                // Something in between ends TLS and knows other protocols only.
                Ok(Err(error))
                    if Failure::refuses_protocols(&error)
                        && connector.omit_protocols(&name, port) =>
                {
                    debug!(route = %self, "TLS without ALPN, which this gateway's address refuses");
                    stream = connect().await?;
                }
                Ok(Err(error)) => break (Failure::of(&error), DialError::Tls(error)),
                Err(late) => break (Failure::Timeout, late),
            }
        };
        cx.metrics.handshake(Side::Upstream, Err(failure));
        cx.familiar.dialing_failed(gateway, &error);
        Err(error)
    }
}

async fn in_time<T>(deadline: Instant, step: impl Future<Output = T>) -> Result<T, DialError> {
    timeout_at(deadline, step).await.map_err(|_| DialError::TimedOut)
}

/// The name for SNI and for the certificate: without the dot of a fully qualified name, which is
/// no part of it there (RFC 6066, section 3).
fn server_name(host: &str) -> Result<ServerName<'static>, DialError> {
    ServerName::try_from(host.trim_end_matches('.').to_owned())
        .map_err(|error| DialError::Tls(io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use super::server_name;

    #[test]
    fn a_final_dot_is_no_part_of_a_name() {
        let name = |host| server_name(host).map(|name| name.to_str().into_owned()).ok();
        assert_eq!(name("gw.example.org."), name("gw.example.org"));
        assert_eq!(name("192.0.2.1").as_deref(), Some("192.0.2.1"));
        assert_eq!(name("not a name"), None);
    }
}
