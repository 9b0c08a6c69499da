//! One connection from its first byte to its last.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tracing::{debug, info};

use super::Context;
use super::connection::Connection;
use super::failover::{self, Answered, Asked, Raced};
use super::finger::{Fault, QueryError, Reply, read_query};
use super::outcome::Outcome;
use super::read_ahead::ReadAhead;
use super::relay::{self, End, Relayed};
use super::upstream::Upstream;
use crate::admin::metrics::{Route, Side};
use crate::registry::build::BuildId;
use crate::tls::{Acceptor, Failure};

/// Serves one accepted connection to its end. Every wait on the peer has a deadline.
pub(crate) async fn run(
    stream: TcpStream,
    peer: SocketAddr,
    acceptor: Option<&Acceptor>,
    cx: &Context,
) -> Outcome {
    let mut client = match acceptor {
        None => Connection::Plain(stream),
        // Boxed, as dialing is: what is large and soon over is to be no part of a quiet stream.
        Some(acceptor) => match Box::pin(shake_hands(stream, peer, acceptor, cx)).await {
            Ok(client) => client,
            Err(error) => {
                debug!(%peer, error, "no connection");
                return Outcome::NoHandshake;
            }
        },
    };
    let query = timeout(cx.limits.request_timeout, read_query(&mut client)).await;
    let (reply, reason) = match query {
        Ok(Ok(build)) => match resolve(&build, cx).await {
            Ok(hops) => return stream_from(&hops, client, peer, &build, cx).await,
            Err((reply, reason)) => (reply, format!("{build}: {reason}")),
        },
        Ok(Err(QueryError::NotABuild(text))) => (Reply::NotFound, format!("no build id: {text}")),
        Ok(Err(QueryError::TooLong)) => (Reply::Error(Fault::TooLong), "too long".to_owned()),
        Ok(Err(QueryError::Closed)) => {
            debug!(%peer, "closed without a request");
            return Outcome::Probe;
        }
        Ok(Err(QueryError::Io(error))) => {
            debug!(%peer, %error, "no request");
            return Outcome::Probe;
        }
        Err(_) => (Reply::Error(Fault::NoRequest), "nothing in time".to_owned()),
    };
    debug!(%peer, %reason, "request refused");
    refuse(client, reply, cx).await;
    Outcome::Refused(reply)
}

/// Shakes hands with a TLS client.
async fn shake_hands(
    stream: TcpStream,
    peer: SocketAddr,
    acceptor: &Acceptor,
    cx: &Context,
) -> Result<Connection, String> {
    let accepting = acceptor.accept(ReadAhead::from_client(stream));
    let shaken = timeout(cx.limits.handshake_timeout, accepting).await;
    let (failure, error) = match shaken {
        Ok(Ok(stream)) => {
            cx.metrics.shaken(Side::Client, stream.get_ref().1.handshake_kind());
            cx.familiar.greeted(peer.ip());
            return Ok(Connection::Tls(Box::new(stream.into())));
        }
        Ok(Err(error)) => (Failure::of(&error), format!("TLS: {error}")),
        Err(_) => (Failure::Timeout, "no TLS handshake in time".to_owned()),
    };
    cx.metrics.handshake(Side::Client, Err(failure));
    // Who only connects and leaves looks whether we are there.
    if failure != Failure::Closed {
        cx.familiar.greeting_failed(peer.ip(), &cx.resolver.gateways_elsewhere(), &error).await;
    }
    Err(error)
}

async fn resolve(build: &BuildId, cx: &Context) -> Result<Vec<Upstream>, (Reply, String)> {
    let began = Instant::now();
    let resolved = timeout(cx.limits.lookup_timeout, cx.resolver.resolve(build)).await;
    let resolved = resolved.unwrap_or_else(|_| {
        Err((Reply::Error(Fault::RegistryAway), "no answer in time".to_owned()))
    });
    cx.metrics.looked_up(began.elapsed());
    resolved
}

/// Relays the log from one of `hops`, and logs how the stream went.
async fn stream_from(
    hops: &[Upstream],
    mut client: Connection,
    peer: SocketAddr,
    build: &BuildId,
    cx: &Context,
) -> Outcome {
    let began = Instant::now();
    let streamed = match hops {
        [hop] => relay_from(hop, &mut client, peer, build, cx).await,
        _ => {
            let asked = Asked { build, peer, began, cx };
            match Box::pin(failover::race(hops, &mut client, &asked)).await {
                Raced::Answered(answered) => Ok(go_on(*answered, &mut client, &asked).await),
                Raced::Failed(fault) => Err(fault),
                Raced::Over(end) => Ok(end),
            }
        }
    };
    match streamed {
        Ok(end) => {
            match end {
                End::Finished => client.finish(cx.limits.write_timeout).await,
                End::UpstreamFailed(_) => client.cut(cx.limits.write_timeout).await,
                _ => client.cut(Duration::ZERO).await,
            }
            Outcome::Streamed(end)
        }
        Err(fault) => {
            // Nothing of a log has been sent, so a line of ours cannot be mistaken for it.
            let reply = Reply::Error(fault);
            refuse(client, reply, cx).await;
            Outcome::Refused(reply)
        }
    }
}

/// Asks the only hop, an executor, for the log and relays it.
async fn relay_from(
    hop: &Upstream,
    client: &mut Connection,
    peer: SocketAddr,
    build: &BuildId,
    cx: &Context,
) -> Result<End, Fault> {
    let began = Instant::now();
    let route = Route::Direct;
    let listed = cx.streams.begin(peer, build, hop.to_string(), began);
    let ended = |bytes: u64, end: &(dyn std::fmt::Display + Sync)| {
        let seconds = began.elapsed();
        cx.metrics.streamed(route, seconds);
        let seconds = seconds.as_secs_f64();
        info!(%peer, %build, route = %hop, bytes, seconds, %end, "stream ended");
    };
    let memory = cx.resolver.memory();
    let mut upstream = match Box::pin(hop.ask(build, cx)).await {
        Ok(upstream) => upstream,
        Err(error) => {
            memory.failed(build, hop, &error, false);
            ended(0, &error);
            return Err(Fault::ExecutorUnreachable);
        }
    };
    cx.metrics.connected(route, began.elapsed());
    let _active = cx.metrics.stream();
    let first_byte = || {
        memory.answered(build, hop);
        cx.metrics.first_byte(listed.age());
    };
    let relayed = relay::run(&mut upstream, client, cx, None, first_byte, &listed).await;
    let Relayed { bytes, end } = relayed;
    ended(bytes, &end);
    if bytes == 0 && end.is_upstreams_fault() {
        memory.failed(build, hop, &end, false);
    }
    match end {
        End::UpstreamSilent => Err(Fault::ExecutorSilent),
        End::UpstreamFailed(_) if bytes == 0 => Err(Fault::ExecutorUnreachable),
        end => Ok(end),
    }
}

/// Relays the log of which one of several hops has sent the first bytes.
async fn go_on(answered: Answered, client: &mut Connection, asked: &Asked<'_>) -> End {
    let Asked { build, peer, began, cx } = asked;
    let Answered { hop, route, mut connection, listed, first } = answered;
    let _active = cx.metrics.stream();
    let relayed = relay::run(&mut connection, client, cx, Some(first), || {}, &listed).await;
    let Relayed { bytes, end } = relayed;
    let seconds = began.elapsed();
    cx.metrics.streamed(route, seconds);
    let seconds = seconds.as_secs_f64();
    info!(%peer, %build, route = %hop, bytes, seconds, %end, "stream ended");
    end
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What bounds the number of quiet streams is what each of their tasks holds.
    #[test]
    fn a_session_is_small() {
        fn size<A, B, C, D, F>(_: impl Fn(A, B, C, D) -> F) -> usize {
            size_of::<F>()
        }
        let bytes = size(run);
        assert!(bytes <= 2048, "{bytes} bytes: box what a quiet stream does not need");
    }
}
