//! One attempt at one hop: a connection, a TLS handshake, the request and the first bytes.

use std::borrow::Cow;
use std::io;
use std::net::Ipv6Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustls::HandshakeKind;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::debug;

use super::attempt_schedule::Failure;
use super::executor_slots::ExecutorSlot;
use super::{ConnectObserver, ConnectParameters, Connector, Established};
use crate::config::to_ascii;
use crate::gateway::protocol::reply::{self, ErrorReason, FirstBytes, GatewayReply, Reply};
use crate::gateway::protocol::request::{RequestFormat, request_line};
use crate::gateway::transport::connection::{Connection, read_size};
use crate::gateway::transport::read_ahead::ReadAhead;
use crate::gateway::transport::socket::Socket;
use crate::model::build_request::Executor;
use crate::model::component::Gateway;
use crate::model::excerpt::Excerpt;
use crate::model::hop::Hop;
use crate::tls;
use crate::tls::HandshakeFailure;

/// The deadline for the rest of a line that may be a reply. No log of Zuul begins like a reply, so
/// this delays no log.
const REPLY_WAIT: Duration = Duration::from_millis(500);

/// The size of a read for the rest of a reply, in bytes.
const REPLY_READ: usize = 1024;

/// Why an attempt at a hop returned no log.
#[derive(Debug, Error)]
pub(crate) enum AttemptError {
    /// TCP did not connect, or the request was not sent, within the connect deadline.
    #[error("connect timed out")]
    ConnectTimeout,
    /// The TLS handshake was not finished within the connect deadline.
    #[error("TLS handshake timed out")]
    HandshakeTimeout,
    /// The name was not resolved, or the connection or the sending of the request failed.
    #[error("cannot connect: {}{}", .0, local_port_hint(.0))]
    Connect(io::Error),
    #[error("TLS: {}", tls::describe(.0))]
    Tls(io::Error),
    /// The gateway requires TLS and this gateway has no certificate.
    #[error("the gateway requires TLS; set tls.cert, tls.key and tls.ca")]
    NoCertificate,
    /// Too many requests for the build wait for the first byte from this gateway.
    #[error("too many requests for this build wait for the gateway's first byte")]
    TooManyForBuild,
    /// The peer gateway replied that too many gateways have forwarded the request; its certificate
    /// has these names.
    #[error("too many gateways have forwarded the request: {0}")]
    Loop(String),
    /// This gateway listens on the hop's address, or is registered with it.
    #[error("the address is this gateway's own")]
    Ourselves,
    /// No slot of the executor became free in time.
    #[error("too many requests wait for this executor's first byte")]
    NoExecutorSlot,
    /// A peer gateway of another zone than the registered one replied; its certificate has these
    /// names.
    #[error("a gateway of another zone replied: {0}")]
    WrongZone(String),
    /// The hop closed the connection without data, or sent no data in time. The first line of a log
    /// is written before a client can request it.
    #[error("the hop sent no data")]
    Silent,
    /// The connection failed before the first byte.
    #[error("connection to the hop failed: {}", tls::describe(.0))]
    Reset(io::Error),
    /// The hop sent no data within its hedge delay, and another hop was faster or was tried in its
    /// place.
    #[error("superseded by another hop: no data within {0:?}")]
    TooSlow(Duration),
    /// A gateway sent this line, a reply, instead of a log.
    #[error("the gateway replied: {}", Excerpt::new(.line.trim_ascii_end()))]
    Replied { reply: GatewayReply, line: Box<[u8]> },
}

impl AttemptError {
    /// The value of the metric label `reason`. The metric counts attempts at gateways only, so it
    /// has no series for [`Self::NoExecutorSlot`].
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::ConnectTimeout | Self::HandshakeTimeout => "timeout",
            Self::Connect(_) => "connect",
            Self::Tls(_) => "tls",
            Self::NoCertificate => "no_certificate",
            Self::Loop(_) | Self::Ourselves => "loop",
            Self::NoExecutorSlot => "no_executor_slot",
            Self::TooManyForBuild => "too_many_for_build",
            Self::WrongZone(_) => "wrong_zone",
            Self::Silent => "silent",
            Self::Reset(_) => "reset",
            Self::TooSlow(_) => "slower",
            Self::Replied { .. } => "refused",
        }
    }

    /// Returns whether all local ports for connections to the hop are in use.
    pub(crate) fn is_without_local_port(&self) -> bool {
        matches!(self, Self::Connect(error) if error.kind() == io::ErrorKind::AddrNotAvailable)
    }

    /// Returns why the TLS handshake failed, if the attempt failed in it.
    pub(crate) fn handshake_failure(&self) -> Option<HandshakeFailure> {
        match self {
            Self::HandshakeTimeout => Some(HandshakeFailure::Timeout),
            Self::Tls(error) => Some(HandshakeFailure::from_error(error)),
            _ => None,
        }
    }

    /// Returns what this error means for the request.
    pub(super) fn failure(&self) -> Failure {
        match self {
            Self::Silent | Self::NoExecutorSlot => Failure::Silent,
            Self::TooManyForBuild => Failure::TooManyForBuild,
            Self::Replied { .. } => Failure::Refused,
            _ => Failure::Unreachable,
        }
    }

    /// Returns whether the other hops would return the same reply.
    pub(super) fn is_final(&self) -> bool {
        matches!(self, Self::Replied { reply, .. } if !reply.allows_failover())
    }
}

fn local_port_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrNotAvailable => "; no local port is free (net.ipv4.tcp_tw_reuse)",
        _ => "",
    }
}

impl Connector {
    /// Requests the log from `hop` and waits for its first bytes.
    ///
    /// An executor has a deadline for them. A gateway has none of its own, because it waits for its
    /// executor in turn; the caller sets a deadline for all hops. Sets `has_turn` when the attempt
    /// no longer waits for other requests for the build.
    pub(super) async fn attempt<'h, O: ConnectObserver>(
        &self,
        hop: &'h Hop,
        parameters: &ConnectParameters<'_, O>,
        has_turn: &AtomicBool,
    ) -> Result<Established<'h>, AttemptError> {
        let limits = parameters.limits;
        let pending = match hop {
            Hop::Executor(_) if !parameters.executor_is_gateway => None,
            _ => {
                let slot = self.pending_per_build.acquire(parameters.build, hop, limits);
                Some(slot.await.ok_or(AttemptError::TooManyForBuild)?)
            }
        };
        has_turn.store(true, Ordering::Relaxed);
        // The wait for a slot counts towards the deadline, as connecting does.
        let deadline = Instant::now() + limits.connect_timeout + limits.first_byte_timeout;
        let slot = match hop {
            Hop::Gateway(_) => None,
            Hop::Executor(executor) => Some(self.executor_slot(executor, parameters).await?),
        };
        let began = Instant::now();
        let (mut connection, mut handshake) = self.send_request(hop, parameters).await?;
        parameters.observer.connected(hop, began.elapsed());
        // With a peer gateway the number of hops in the request ends loops.
        let pending = pending.filter(|_| !connection.is_peer_gateway());
        let size = read_size(connection.is_tls(), parameters.client_is_tls);
        let read = connection.read_chunk(size);
        let read = match slot {
            None => read.await,
            Some(slot) => {
                let left = deadline.saturating_duration_since(Instant::now());
                let patience = left.min(limits.first_byte_timeout);
                match timeout(patience, read).await {
                    Ok(read) => {
                        if read.as_ref().is_ok_and(|first| !first.is_empty()) {
                            slot.answered();
                        }
                        read
                    }
                    Err(_) => {
                        if patience == limits.first_byte_timeout {
                            slot.silent(parameters.build);
                        }
                        return Err(AttemptError::Silent);
                    }
                }
            }
        };
        drop(pending);
        let first = match read {
            Ok(first) if first.is_empty() => return Err(AttemptError::Silent),
            Ok(first) => first,
            Err(error) => {
                let error = first_read_error(hop, error);
                if let (AttemptError::Tls(_), Some(handshake)) = (&error, &mut handshake) {
                    handshake.is_refused = true;
                }
                return Err(error);
            }
        };
        let mut established = Established { hop, connection, first };
        if matches!(hop, Hop::Gateway(_)) {
            let length = established.first.len();
            debug!(build = %parameters.build, hop = %hop, bytes = length, "first bytes");
            let reply = established.read_reply().await.map_err(AttemptError::Reset)?;
            if let Some(reply) = reply {
                return Err(established.into_error(reply));
            }
        }
        Ok(established)
    }

    /// Waits for a slot of `executor`, at most for the first-byte timeout.
    async fn executor_slot<O: ConnectObserver>(
        &self,
        executor: &Executor,
        parameters: &ConnectParameters<'_, O>,
    ) -> Result<ExecutorSlot, AttemptError> {
        if let Some(slot) = self.executor_slots.try_acquire(executor) {
            return Ok(slot);
        }
        let began = Instant::now();
        let deadline = began + parameters.limits.first_byte_timeout;
        // Boxed, because only requests beyond the first few for one executor need it.
        let slot =
            Box::pin(self.executor_slots.acquire(executor, parameters.build, deadline)).await;
        parameters.observer.executor_slot_awaited(began.elapsed());
        slot.ok_or(AttemptError::NoExecutorSlot)
    }

    /// Connects to `hop` and sends the request, all within the connect deadline.
    async fn send_request<'r, O: ConnectObserver>(
        &self,
        hop: &Hop,
        parameters: &ConnectParameters<'r, O>,
    ) -> Result<(Connection, Option<ReportHandshakeOnDrop<'r, O>>), AttemptError> {
        let deadline = Instant::now() + parameters.limits.connect_timeout;
        let mut connection = self.connect(hop, deadline, parameters).await?;
        let handshake = connection.handshake_kind().map(|kind| ReportHandshakeOnDrop {
            kind,
            observer: parameters.observer,
            is_refused: false,
        });
        let format = RequestFormat::negotiated(connection.is_peer_gateway());
        let forwarded = parameters.forwarded.saturating_add(1);
        let line = request_line(parameters.build, hop.zone(), forwarded, format);
        let sent = async {
            connection.write_all(line.as_bytes()).await?;
            connection.flush().await
        };
        let sent = timeout_at(deadline, sent).await.map_err(|_| AttemptError::ConnectTimeout)?;
        sent.map_err(AttemptError::Connect)?;
        Ok((connection, handshake))
    }

    /// Connects to `hop`, with TLS if its registry entry requires it.
    async fn connect<O: ConnectObserver>(
        &self,
        hop: &Hop,
        deadline: Instant,
        parameters: &ConnectParameters<'_, O>,
    ) -> Result<Connection, AttemptError> {
        let buffer = parameters.limits.stream_buffer;
        let (host, port) = hop.address();
        if self.own_addresses.is_registered_as(host, port) {
            return Err(AttemptError::Ourselves);
        }
        let Hop::Gateway(Gateway { tls: true, .. }) = hop else {
            return Ok(Connection::Plain(self.dial(hop, deadline, buffer).await?));
        };
        let tls = self.tls.as_ref().ok_or(AttemptError::NoCertificate)?;
        let name = server_name(host)?;
        let mut stream = self.dial(hop, deadline, buffer).await?;
        loop {
            // Nagle's algorithm would delay the request, which follows the last message of the
            // handshake immediately.
            stream.set_nodelay().map_err(AttemptError::Connect)?;
            let tcp = ReadAhead::from_hop(stream);
            let handshake = tls.connect(&name, port, tcp);
            let handshake = timeout_at(deadline, handshake).await;
            match handshake.map_err(|_| AttemptError::HandshakeTimeout)? {
                Ok(stream) => {
                    return Ok(Connection::tls(stream));
                }
                Err((error, below)) => {
                    // Closes after the alert with the reason has been sent.
                    below.into_socket().close();
                    // A TLS terminator in front of the gateway may refuse unknown protocols.
                    if !(HandshakeFailure::refuses_protocols(&error)
                        && tls.omit_protocols(&name, port))
                    {
                        return Err(AttemptError::Tls(error));
                    }
                    debug!(hop = %hop, "ALPN refused, retrying without it");
                    stream = self.dial(hop, deadline, buffer).await?;
                }
            }
        }
    }

    /// Connects to `hop` with a receive buffer of `buffer` bytes.
    async fn dial(
        &self,
        hop: &Hop,
        deadline: Instant,
        buffer: usize,
    ) -> Result<Socket, AttemptError> {
        let (host, port) = hop.address();
        let socket = self.dialer.connect(host, port, buffer, &self.spare_sockets);
        let socket = timeout_at(deadline, socket).await;
        let socket = socket.map_err(|_| AttemptError::ConnectTimeout)?;
        let socket = socket.map_err(AttemptError::Connect)?;
        if socket.tcp().is_some_and(|tcp| self.own_addresses.are_dialed_by(tcp, port)) {
            return Err(AttemptError::Ourselves);
        }
        Ok(socket)
    }
}

/// Converts an error of the first read. In TLS 1.3 a gateway refuses our certificate only after our
/// side has finished the handshake (RFC 8446, section 4.4.2.4).
fn first_read_error(hop: &Hop, error: io::Error) -> AttemptError {
    if matches!(hop, Hop::Gateway(_)) && HandshakeFailure::after_handshake(&error).is_some() {
        return AttemptError::Tls(error);
    }
    AttemptError::Reset(error)
}

/// A TLS handshake that our side has finished. The gateway can still refuse our certificate, with
/// an alert before its first byte; without one, dropping this reports the handshake as successful.
struct ReportHandshakeOnDrop<'o, O: ConnectObserver> {
    kind: HandshakeKind,
    observer: &'o O,
    is_refused: bool,
}

impl<O: ConnectObserver> Drop for ReportHandshakeOnDrop<'_, O> {
    fn drop(&mut self) {
        if !self.is_refused {
            self.observer.tls_established(self.kind);
        }
    }
}

impl Established<'_> {
    /// Returns the reply of the gateway, if its first bytes are a reply and not a log. Reads more
    /// while they may be the beginning of a reply.
    async fn read_reply(&mut self) -> io::Result<Option<GatewayReply>> {
        let deadline = Instant::now() + REPLY_WAIT;
        loop {
            match reply::classify(&self.first, false) {
                FirstBytes::Log => return Ok(None),
                FirstBytes::Reply(reply) => return Ok(Some(reply)),
                FirstBytes::Incomplete => {}
            }
            match timeout_at(deadline, self.connection.read_chunk(REPLY_READ)).await {
                Ok(Ok(more)) if !more.is_empty() => self.first.append(&more),
                last => {
                    // No more bytes are coming.
                    return match (reply::classify(&self.first, true), last) {
                        (FirstBytes::Reply(reply), _) => Ok(Some(reply)),
                        (_, Ok(Err(error))) => Err(error),
                        _ => Ok(None),
                    };
                }
            }
        }
    }

    /// Closes the connection and returns the error that `reply`, its first line, stands for.
    fn into_error(self, reply: GatewayReply) -> AttemptError {
        let Self { connection, first, .. } = self;
        let names = || tls::names_of_peer(connection.peer_certificates());
        let error = match reply {
            GatewayReply::Known(Reply::Error(error)) if connection.is_peer_gateway() => Some(error),
            _ => None,
        };
        let error = match error {
            Some(ErrorReason::WrongZone) => AttemptError::WrongZone(names()),
            Some(ErrorReason::Loop) => AttemptError::Loop(names()),
            _ => AttemptError::Replied { reply, line: first.to_vec().into() },
        };
        connection.close();
        error
    }
}

/// Returns the name for SNI and for the check of the certificate: in ASCII (RFC 6066, section 3),
/// without the final dot of a fully qualified name, and without the interface of a link-local
/// address, which certificates do not contain.
fn server_name(host: &str) -> Result<ServerName<'static>, AttemptError> {
    let host = to_ascii(host).unwrap_or(Cow::Borrowed(host));
    let host = match host.split_once('%') {
        Some((address, _)) if address.parse::<Ipv6Addr>().is_ok() => address,
        _ => host.trim_end_matches('.'),
    };
    ServerName::try_from(host.to_owned())
        .map_err(|error| AttemptError::Tls(io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use super::server_name;

    #[test]
    fn server_name_is_ascii_without_final_dot_and_interface() {
        let name = |host| server_name(host).map(|name| name.to_str().into_owned()).ok();
        assert_eq!(name("gw.example.org."), name("gw.example.org"));
        assert_eq!(name("192.0.2.1").as_deref(), Some("192.0.2.1"));
        assert_eq!(name("fe80::1%eth0").as_deref(), Some("fe80::1"));
        assert_eq!(name("b\u{fc}cher.test.").as_deref(), Some("xn--bcher-kva.test"));
        assert_eq!(name("not a name"), None);
    }
}
