//! One connection from its first byte to its last.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info};

use super::Context;
use super::connection::{Connection, prepare};
use super::finger::{Fault, QueryError, Reply, read_query};
use super::relay::{self, End, Relayed};
use super::upstream::{DialError, Upstream};
use crate::registry::build::BuildId;

/// Serves one accepted connection to its end. Every wait on the peer has a deadline.
pub(crate) async fn run(
    stream: TcpStream,
    peer: SocketAddr,
    acceptor: Option<&TlsAcceptor>,
    cx: &Context,
) {
    let mut client = match greet(stream, acceptor, cx).await {
        Ok(client) => client,
        Err(error) => return debug!(%peer, error, "no connection"),
    };
    let query = timeout(cx.limits.request_timeout, read_query(&mut client)).await;
    let build = match query {
        Ok(Ok(build)) => build,
        Ok(Err(QueryError::Closed)) => return debug!(%peer, "closed without a request"),
        Ok(Err(QueryError::Io(error))) => return debug!(%peer, %error, "no request"),
        Ok(Err(QueryError::NotABuild(text))) => {
            debug!(%peer, %text, "not a build id");
            return refuse(client, Reply::NotFound, cx).await;
        }
        Ok(Err(QueryError::TooLong)) => {
            debug!(%peer, "request too long");
            return refuse(client, Reply::Error(Fault::TooLong), cx).await;
        }
        Err(_) => {
            debug!(%peer, "no request in time");
            return refuse(client, Reply::Error(Fault::NoRequest), cx).await;
        }
    };
    match cx.resolver.resolve(&build).await {
        Err((reply, reason)) => {
            debug!(%peer, %build, reason, "request refused");
            refuse(client, reply, cx).await;
        }
        Ok(hops) => stream_from(&hops, client, peer, &build, cx).await,
    }
}

/// Makes a connection of an accepted socket: options, and the TLS handshake where it is due.
async fn greet(
    stream: TcpStream,
    acceptor: Option<&TlsAcceptor>,
    cx: &Context,
) -> Result<Connection, String> {
    prepare(&stream, cx.limits.keepalive).map_err(|error| error.to_string())?;
    let Some(acceptor) = acceptor else { return Ok(Connection::Plain(stream)) };
    match timeout(cx.limits.handshake_timeout, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => Ok(Connection::Tls(Box::new(stream.into()))),
        Ok(Err(error)) => Err(format!("TLS: {error}")),
        Err(_) => Err("no TLS handshake in time".to_owned()),
    }
}

/// Tries `hops` in turn until one has sent something, and logs how the stream went.
async fn stream_from(
    hops: &[Upstream],
    mut client: Connection,
    peer: SocketAddr,
    build: &BuildId,
    cx: &Context,
) {
    let began = Instant::now();
    let ended = |hop: &Upstream, bytes: u64, end: &dyn std::fmt::Display| {
        let seconds = began.elapsed().as_secs_f64();
        info!(%peer, %build, route = %hop, bytes, seconds, %end, "stream ended");
    };
    let mut fault = Fault::ExecutorUnreachable;
    for (index, hop) in hops.iter().enumerate() {
        let listed = cx.streams.begin(peer, build, hop.to_string(), began);
        let relayed = match cx.asking.place(build, hop, cx.limits.connect_timeout).await {
            Some(place) => match hop.ask(build, cx).await {
                Ok(mut upstream) => {
                    let (limits, cut) = (&cx.limits, &cx.cut);
                    Ok(relay::run(&mut upstream, &mut client, limits, cut, place, &listed).await)
                }
                Err(error) => Err(error),
            },
            None => Err(DialError::Circle),
        };
        drop(listed);
        let (bytes, end): (u64, &dyn std::fmt::Display) = match &relayed {
            Ok(Relayed { bytes, end }) => (*bytes, end),
            Err(error) => (0, error),
        };
        let nothing_came = match &relayed {
            Ok(Relayed { bytes, end }) => *bytes == 0 && end.is_upstreams_fault(),
            Err(_) => true,
        };
        if nothing_came && index + 1 < hops.len() {
            info!(%peer, %build, route = %hop, %end, "trying the next hop");
            continue;
        }
        ended(hop, bytes, end);
        match relayed {
            Ok(Relayed { end: End::Finished, .. }) => {
                return client.finish(cx.limits.write_timeout).await;
            }
            Ok(Relayed { end: End::UpstreamFailed(_), bytes: 1.. }) => {
                return client.cut(cx.limits.write_timeout).await;
            }
            Ok(Relayed { end: End::Stopped | End::ClientLeft(_) | End::ClientStalled, .. }) => {
                return client.cut(Duration::ZERO).await;
            }
            Ok(Relayed { end: End::UpstreamSilent, .. }) => fault = Fault::ExecutorSilent,
            Ok(Relayed { end: End::UpstreamFailed(_), .. }) => {}
            Err(_) if hops.len() > 1 => fault = Fault::ZoneUnreachable,
            Err(_) => {}
        }
    }
    // Nothing of a log has been sent, so a line of ours cannot be mistaken for it.
    refuse(client, Reply::Error(fault), cx).await;
}

/// Sends the one line that stands for a log, and closes.
pub(crate) async fn refuse(mut client: Connection, reply: Reply, cx: &Context) {
    let line = reply.to_string();
    // A client that does not take one line has no claim to be told anything.
    if let Ok(Ok(())) = timeout(cx.limits.request_timeout, client.write_all(line.as_bytes())).await
    {
        client.finish(cx.limits.request_timeout).await;
    }
}
