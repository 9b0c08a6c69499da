//! Opens a session: the PROXY header of a trusted proxy and the TLS handshake.

use std::io;
use std::net::SocketAddr;

use rustls::HandshakeKind;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tracing::debug;

use super::client_hello::{Arrival, arrival};
use super::client_info::ClientInfo;
use super::closing::send_reply;
use super::outcome::Outcome;
use super::proxy_protocol::{ProxyHeaderError, read_header};
use crate::config::Limits;
use crate::gateway::context::Context;
use crate::gateway::protocol::reply::{ErrorReason, Reply};
use crate::gateway::transport::connection::Connection;
use crate::gateway::transport::read_ahead::ReadAhead;
use crate::gateway::transport::socket::Socket;
use crate::telemetry::metrics::{Direction, Rejection};
use crate::tls;
use crate::tls::{Acceptor, HandshakeFailure};

/// Reads the PROXY header, if the peer is a proxy that the listener trusts.
pub(super) async fn read_proxy_header(
    stream: TcpStream,
    client: &mut ClientInfo,
    cx: &Context,
) -> Result<TcpStream, Outcome> {
    if !client.is_proxy {
        return Ok(stream);
    }
    // Boxed, as the handshake, to keep short-lived state out of the session future.
    Box::pin(proxied_client(stream, client, cx)).await
}

/// Reads the PROXY header of a trusted proxy. From here on `client` is the client that it
/// announces, or the proxy itself for LOCAL and UNKNOWN, and counts against that address.
async fn proxied_client(
    mut stream: TcpStream,
    client: &mut ClientInfo,
    cx: &Context,
) -> Result<TcpStream, Outcome> {
    let ClientInfo { address: peer, listener, .. } = *client;
    let tls = cx.listeners[usize::from(listener)].acceptor.is_some();
    let Limits { handshake_timeout, request_timeout, .. } = cx.limits;
    let patience = if tls { handshake_timeout } else { request_timeout };
    let address = match timeout(patience, read_header(&mut stream)).await {
        Ok(Ok(address)) => address.unwrap_or(peer),
        Ok(Err(ProxyHeaderError::Closed)) => {
            debug!(%peer, "closed without a PROXY header");
            return Err(Outcome::Probe);
        }
        Ok(Err(error)) => {
            debug!(%peer, %error, "connection rejected");
            return Err(Outcome::NoProxyHeader);
        }
        Err(_) => {
            debug!(%peer, error = "PROXY header timed out", "connection rejected");
            return Err(Outcome::NoProxyHeader);
        }
    };
    let address = SocketAddr::new(address.ip().to_canonical(), address.port());
    debug!(proxy = %peer, peer = %address, "PROXY header");
    client.address_permit = cx.limiter.acquire_for_address(address.ip(), &cx.limits);
    client.address = address;
    if let Some(pending) = &client.pending {
        pending.update(|connection| connection.set_peer(address));
    }
    if client.address_permit.is_some() {
        return Ok(stream);
    }
    // An eviction for a newer connection would count it a second time.
    client.leave_pending().await;
    cx.limiter.record_rejection(Rejection::Address, address);
    // Sends the same reply as the listener does to clients that connect directly.
    if !tls && let Some(_permit) = cx.limiter.acquire_rejection() {
        let reply = Reply::Error(ErrorReason::TooManyFromAddress);
        let connection = Connection::Plain(Socket::from_client(stream));
        send_reply(connection, reply.line().as_bytes(), cx).await;
    }
    Err(Outcome::Rejected)
}

/// Does the TLS handshake, if the listener uses TLS.
pub(super) async fn accept_tls(
    stream: TcpStream,
    client: &mut ClientInfo,
    cx: &Context,
) -> Result<Connection, Outcome> {
    match &cx.listeners[usize::from(client.listener)].acceptor {
        None => Ok(Connection::Plain(Socket::from_client(stream))),
        Some(acceptor) => Box::pin(handshake(stream, client, acceptor, cx)).await,
    }
}

/// The result of a TLS handshake that has not timed out.
enum Handshake<S> {
    Finished(S),
    Failed(io::Error),
    /// The client closed the connection before the handshake began, or was rejected at a limit.
    Ended(Outcome),
}

/// Does the TLS handshake with a client. A client that presents a certificate no longer counts
/// against its address: peer gateways and zuul-web send the requests of many clients from one
/// address.
async fn handshake(
    stream: TcpStream,
    client: &mut ClientInfo,
    acceptor: &Acceptor,
    cx: &Context,
) -> Result<Connection, Outcome> {
    let ClientInfo { address: peer, address_permit, .. } = client;
    let peer = *peer;
    let handshake = async {
        // Until the whole ClientHello has arrived, the client costs no more than any other one.
        match arrival(&stream).await {
            Ok(Arrival::Complete) => {}
            Ok(Arrival::Invalid(reason)) => {
                return Handshake::Failed(io::Error::new(io::ErrorKind::InvalidData, reason));
            }
            Ok(Arrival::Closed) | Err(_) => {
                debug!(%peer, "closed before sending data");
                return Handshake::Ended(Outcome::Probe);
            }
        }
        // Counted before the connection is closed, here and below, so that the metric is up to date
        // when the client sees the close.
        if !cx.limiter.take_handshake(address_permit.as_ref(), peer.ip(), &cx.limits) {
            cx.limiter.record_rejection(Rejection::HandshakeRate, peer);
            return Handshake::Ended(Outcome::Rejected);
        }
        let permit = cx.limiter.acquire_handshake(address_permit.as_ref(), peer.ip(), &cx.limits);
        let evicted = async {
            permit.wait_evicted().await;
            cx.limiter.record_rejection(Rejection::Handshakes, peer);
        };
        tokio::select! {
            biased;
            accepted = acceptor.accept(ReadAhead::from_client(Socket::from_client(stream))) => match accepted {
                Ok(stream) => Handshake::Finished(stream),
                Err(error) => Handshake::Failed(error),
            },
            () = evicted => Handshake::Ended(Outcome::Rejected),
        }
    };
    let (failure, error) = match timeout(cx.limits.handshake_timeout, handshake).await {
        Ok(Handshake::Ended(outcome)) => return Err(outcome),
        Ok(Handshake::Finished(stream)) => {
            // A client with Nagle's algorithm sends its request after the acknowledgement of its
            // Finished, which the kernel would delay for up to 40 ms, as no session ticket carries
            // it. The option lasts until the next read (tcp(7)). Systems without the option have
            // the delay.
            stream.get_ref().0.socket().acknowledge_immediately();
            let kind = stream.get_ref().1.handshake_kind();
            let resumed = kind == Some(HandshakeKind::Resumed);
            cx.metrics.handshake_ok(Direction::Inbound, resumed);
            if stream.get_ref().1.peer_certificates().is_some() {
                cx.limiter.remember_certificate(peer.ip());
                *address_permit = None;
            }
            return Ok(Connection::tls(stream));
        }
        Ok(Handshake::Failed(error)) => {
            (HandshakeFailure::from_error(&error), format!("TLS: {}", tls::describe(&error)))
        }
        Err(_) => (HandshakeFailure::Timeout, "TLS handshake timed out".to_owned()),
    };
    cx.metrics.handshake_failed(Direction::Inbound, failure.label());
    debug!(%peer, error, "connection rejected");
    Err(Outcome::NoHandshake)
}
