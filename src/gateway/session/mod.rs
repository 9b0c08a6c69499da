//! One connection from its first byte to its last.

pub(crate) mod client_hello;
pub(crate) mod outcome;
pub(crate) mod proxy_protocol;
pub(crate) mod stream_table;

use std::fmt::Display;
use std::future::ready;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rustls::HandshakeKind;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, sleep_until, timeout};
use tracing::debug;
use tracing::field::display;

use self::client_hello::{Arrival, arrival};
use self::outcome::Outcome;
use self::proxy_protocol::{NoHeader, read_header};
use self::stream_table::Listed;
use super::Context;
use super::health::FailureKind;
use super::limits::eviction_queue::Entry;
use super::limits::{AddressPermit, CountedClient, PendingConnection};
use super::protocol::reply::{Reply, ReplyError};
use super::protocol::request::{RequestError, RequestFormat, read_request};
use super::relay;
use super::relay::{EndReason, RelayContext, RelaySummary};
use super::routing::access::Access;
use super::transport::connection::{Connection, read_size};
use super::transport::read_ahead::ReadAhead;
use super::transport::socket::Socket;
use super::upstream::executor_slots::ExecutorSlot;
use super::upstream::failover;
use super::upstream::failover::{Answered, Raced, SILENT};
use super::upstream::{DialError, Upstream};
use crate::config::Limits;
use crate::model::build_id::BuildId;
use crate::telemetry::metrics::{Direction, Rejection, Route};
use crate::telemetry::otlp::Span;
use crate::tls;
use crate::tls::{Acceptor, HandshakeFailure};

/// Who has connected.
pub(crate) struct Caller {
    /// The client, once a balancer has said for whom it comes.
    pub(crate) peer: SocketAddr,
    /// The place that it takes of those for its address; given back by who is known otherwise.
    pub(crate) of_address: Option<AddressPermit>,
    /// The connection comes from a trusted proxy, which sends a PROXY header.
    pub(crate) is_proxy: bool,
    /// Which listener accepted the connection.
    pub(crate) index: u16,
    /// Whether lines of its stream are logged at info; at debug if its address has asked too often.
    pub(crate) logged: bool,
    /// Its entry among the connections that may be closed for a new one: until it has asked.
    pub(crate) waiting: Option<Entry<PendingConnection>>,
}

impl Caller {
    /// Keeps the connection from being closed for a new one. Does not return if it has been closed
    /// already: then its task is about to be aborted.
    pub(crate) async fn stop_waiting(&mut self) {
        if self.waiting.take().is_some_and(|entry| !entry.leave()) {
            std::future::pending::<()>().await;
        }
    }
}

/// Logs a line of a stream at info, or at debug if `$logged` is false.
macro_rules! log_stream {
    ($logged:expr, $($line:tt)+) => {
        if $logged { tracing::info!($($line)+) } else { tracing::debug!($($line)+) }
    };
}
pub(crate) use log_stream;

/// What a client has asked for.
pub(crate) struct Asked<'a> {
    pub(crate) build: BuildId,
    /// How many gateways have sent this request before.
    pub(crate) sent_hops: u8,
    pub(crate) caller: &'a Caller,
    /// When it was known where the build runs.
    began: Instant,
    pub(crate) span: Span,
    pub(crate) cx: &'a Context,
}

impl Asked<'_> {
    /// Its place in the list of streams, as long as `hop` is asked or relayed from.
    pub(crate) fn listed(&self, hop: &Upstream) -> Listed {
        self.cx.streams.begin(self.caller.peer, &self.build, hop.clone(), self.began)
    }

    /// The client, if limits count it by its address.
    fn client(&self) -> Option<CountedClient> {
        self.caller.of_address.as_ref().and_then(AddressPermit::client)
    }

    fn relay_context<'a>(&'a self, listed: &'a Listed) -> RelayContext<'a> {
        RelayContext {
            limits: &self.cx.limits,
            stalled_clients: &self.cx.stalled_clients,
            metrics: &self.cx.metrics,
            abort: &self.cx.cut,
            client: self.client(),
            began: self.began,
            bytes: listed.byte_counter(),
        }
    }

    /// Counts and logs how the stream from `hop` ended, or the wait for it.
    pub(crate) fn ended(&self, hop: &Upstream, route: Route, bytes: u64, end: &dyn Display) {
        let Self { build, caller: Caller { peer, logged, .. }, began, span, cx, .. } = self;
        let seconds = began.elapsed();
        cx.metrics.stream_closed(route, seconds);
        let (host, port) = hop.address();
        span.stream_closed(host, port, route, bytes);
        // Milliseconds: JSON would show all digits.
        let seconds = (seconds.as_secs_f64() * 1000.0).round() / 1000.0;
        let (event_id, trace_id) = (span.event_id().map(display), span.trace_id().map(display));
        let (kind, host, port, zone, tls) = hop.fields();
        log_stream!(
            *logged, %peer, %build, event_id, trace_id, route = %hop, hop.kind = kind,
            hop.host = host, hop.port = port, hop.zone = zone, hop.tls = tls, bytes, seconds, %end,
            "stream ended"
        );
    }
}

/// Serves one connection of `caller`'s to its end. Every wait on the peer has a deadline.
pub(crate) async fn run(mut stream: TcpStream, caller: &mut Caller, cx: &Context) -> Outcome {
    let index = usize::from(caller.index);
    if caller.is_proxy {
        match Box::pin(introduction(stream, caller, cx)).await {
            Ok(introduced) => stream = introduced,
            Err(outcome) => return outcome,
        }
    }
    let mut client = match &cx.acceptors[index] {
        None => Connection::Plain(Socket::from_client(stream)),
        // Boxed, as dialing is: what is large and soon over is to be no part of a quiet stream.
        Some(acceptor) => match Box::pin(shake_hands(stream, caller, acceptor, cx)).await {
            Ok(client) => client,
            Err(outcome) => return outcome,
        },
    };
    // What is bound here lives as long as the stream, and is part of it.
    let (build, sent_hops, hops, span) = match asked_for(&mut client, caller, cx).await {
        Ok(asked) => asked,
        Err(None) => return Outcome::Probe,
        Err(Some(reply)) => {
            refuse(client, reply, cx).await;
            return Outcome::Refused(reply);
        }
    };
    caller.logged = cx.limiter.logs_stream(caller.peer, &cx.limits);
    let asked = Asked { build, sent_hops, caller, began: Instant::now(), span, cx };
    stream_from(&hops, client, &asked).await
}

/// Reads what `client` asks for and finds out who may have it, in order. An error is what the client
/// is told instead, if it has not left.
async fn asked_for(
    client: &mut Connection,
    caller: &mut Caller,
    cx: &Context,
) -> Result<(BuildId, u8, Vec<Upstream>, Span), Option<Reply>> {
    let peer = caller.peer;
    let format = RequestFormat::negotiated(client.is_peer_gateway());
    let query = timeout(cx.limits.request_timeout, read_request(client, format)).await;
    if matches!(query, Ok(Ok(_))) {
        caller.stop_waiting().await;
    }
    let (reply, reason) = match query {
        Ok(Ok(request)) => {
            let authenticated = client.peer_certificates().is_some();
            let checked = request.check(cx.resolver.zone(), authenticated);
            let resolved = match checked {
                Ok(()) => resolve(&request.build, access(client, caller, cx), peer, cx).await,
                Err(error) => Err((Reply::Error(error), "wrong zone or too many hops".to_owned())),
            };
            match resolved {
                Ok((hops, span)) => {
                    if authenticated {
                        span.requested_by(peer.ip());
                    }
                    return Ok((request.build, request.hops, hops, span));
                }
                Err((reply, reason)) => (reply, format!("{}: {reason}", request.build)),
            }
        }
        Ok(Err(RequestError::Malformed(text))) => {
            (Reply::NotFound, format!("not a build ID: {text}"))
        }
        Ok(Err(RequestError::TooLong)) => {
            (Reply::Error(ReplyError::RequestTooLong), "too long".to_owned())
        }
        Ok(Err(RequestError::Closed)) => {
            debug!(%peer, "closed without a request");
            return Err(None);
        }
        Ok(Err(RequestError::Io(error))) => {
            debug!(%peer, error = %tls::describe(&error), "no request");
            return Err(None);
        }
        Err(_) => (Reply::Error(ReplyError::NoRequest), "nothing in time".to_owned()),
    };
    debug!(%peer, %reason, "request refused");
    Err(Some(reply))
}

/// Has a balancer say for whom it comes: `caller` is from here on the client, or the balancer itself if
/// it comes for nobody, and counts against that address.
async fn introduction(
    mut stream: TcpStream,
    caller: &mut Caller,
    cx: &Context,
) -> Result<TcpStream, Outcome> {
    let Caller { peer, index, .. } = *caller;
    let tls = cx.acceptors[usize::from(index)].is_some();
    let Limits { handshake_timeout, request_timeout, .. } = cx.limits;
    let patience = if tls { handshake_timeout } else { request_timeout };
    let client = match timeout(patience, read_header(&mut stream)).await {
        Ok(Ok(client)) => client.unwrap_or(peer),
        Ok(Err(NoHeader::Closed)) => {
            debug!(%peer, "closed without a PROXY header");
            return Err(Outcome::Probe);
        }
        Ok(Err(error)) => {
            debug!(%peer, %error, "no connection");
            return Err(Outcome::NoHeader);
        }
        Err(_) => {
            debug!(%peer, error = "no PROXY header in time", "no connection");
            return Err(Outcome::NoHeader);
        }
    };
    let client = SocketAddr::new(client.ip().to_canonical(), client.port());
    debug!(proxy = %peer, peer = %client, "PROXY header");
    caller.of_address = cx.limiter.per_address(client.ip(), &cx.limits);
    caller.peer = client;
    if let Some(waiting) = &caller.waiting {
        waiting.update(|connection| connection.set_peer(client));
    }
    if caller.of_address.is_some() {
        return Ok(stream);
    }
    // So that it is not closed, and counted, for another connection as well.
    caller.stop_waiting().await;
    cx.limiter.record_rejection(Rejection::Address, client);
    // As the listener does with clients that come by themselves.
    if !tls && let Some(_permit) = cx.limiter.rejection() {
        let reply = Reply::Error(ReplyError::TooManyFromAddress);
        refuse(Connection::Plain(Socket::from_client(stream)), reply, cx).await;
    }
    Err(Outcome::Rejected)
}

/// What the rules of its listener give to `caller`, if there are any.
fn access<'c>(client: &Connection, caller: &Caller, cx: &'c Context) -> Option<Access<'c>> {
    let index = usize::from(caller.index);
    let names = || match (client.peer_certificates(), &cx.acceptors[index]) {
        (Some(chain), Some(acceptor)) => acceptor.names_of(chain),
        _ => Vec::new(),
    };
    Access::new(&cx.listeners[index].allow, caller.peer.ip(), names)
}

/// Shakes hands with a TLS client. One that shows a certificate is known, and gives the place of
/// its address back: other gateways and zuul-web bring many people through one.
async fn shake_hands(
    stream: TcpStream,
    caller: &mut Caller,
    acceptor: &Acceptor,
    cx: &Context,
) -> Result<Connection, Outcome> {
    let Caller { peer, of_address, .. } = caller;
    let peer = *peer;
    let shaken = async {
        // Until all of the ClientHello is there it costs no more than any other connection.
        match arrival(&stream).await {
            Ok(Arrival::Complete) => {}
            Ok(Arrival::Invalid(reason)) => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
            }
            Ok(Arrival::Closed) | Err(_) => {
                debug!(%peer, "closed without a word");
                return Ok(Err(Outcome::Probe));
            }
        }
        // Counted before the connection is closed, here and below: a client that sees the close also
        // sees the counter.
        if !cx.limiter.may_begin_handshake(of_address.as_ref(), peer.ip(), &cx.limits) {
            cx.limiter.record_rejection(Rejection::HandshakeRate, peer);
            return Ok(Err(Outcome::Rejected));
        }
        let handshake = cx.limiter.handshake(of_address.as_ref(), peer.ip(), &cx.limits);
        let evicted = async {
            handshake.wait_evicted().await;
            cx.limiter.record_rejection(Rejection::Handshakes, peer);
        };
        tokio::select! {
            biased;
            shaken = acceptor.accept(ReadAhead::from_client(Socket::from_client(stream))) => shaken.map(Ok),
            () = evicted => Ok(Err(Outcome::Rejected)),
        }
    };
    let (failure, error) = match timeout(cx.limits.handshake_timeout, shaken).await {
        Ok(Ok(Err(outcome))) => return Err(outcome),
        Ok(Ok(Ok(stream))) => {
            // The client's request waits for the acknowledgement of its Finished (Nagle), which the
            // kernel would delay for up to 40 ms: no session ticket carries it. Lasts until the
            // next read (tcp(7)); systems without it are as slow as before.
            stream.get_ref().0.socket().acknowledge_immediately();
            let kind = stream.get_ref().1.handshake_kind();
            let resumed = kind == Some(HandshakeKind::Resumed);
            cx.metrics.handshake_ok(Direction::Inbound, resumed);
            if stream.get_ref().1.peer_certificates().is_some() {
                cx.limiter.certify(peer.ip());
                *of_address = None;
            }
            return Ok(Connection::tls(stream));
        }
        Ok(Err(error)) => {
            (HandshakeFailure::from_error(&error), format!("TLS: {}", tls::describe(&error)))
        }
        Err(_) => (HandshakeFailure::Timeout, "no TLS handshake in time".to_owned()),
    };
    cx.metrics.handshake_failed(Direction::Inbound, failure.label());
    debug!(%peer, error, "no connection");
    Err(Outcome::NoHandshake)
}

async fn resolve(
    build: &BuildId,
    access: Option<Access<'_>>,
    peer: SocketAddr,
    cx: &Context,
) -> Result<(Vec<Upstream>, Span), (Reply, String)> {
    let Some(place) = cx.limiter.lookup(&cx.limits) else {
        cx.limiter.record_rejection(Rejection::Lookups, peer);
        return Err((Reply::Error(ReplyError::TooManyLookups), "too many look-ups".to_owned()));
    };
    let began = Instant::now();
    let resolved = cx.resolver.resolve(build, access.as_ref());
    let resolved = timeout(cx.limits.lookup_timeout, resolved).await;
    let resolved = resolved.unwrap_or_else(|_| {
        Err((Reply::Error(ReplyError::RegistryUnavailable), "no answer in time".to_owned()))
    });
    cx.metrics.lookup_finished(began.elapsed());
    drop(place);
    if access.is_some() && matches!(resolved, Err((Reply::NotFound | Reply::Denied, _))) {
        Box::pin(hide_duration(began.into())).await;
    }
    let (hops, trace_parent) = resolved?;
    Ok((hops, cx.tracer.span(trace_parent.as_deref(), build, cx.resolver.zone(), began)))
}

/// Relays the log from one of `hops`, and logs how the stream went.
async fn stream_from(hops: &[Upstream], mut client: Connection, asked: &Asked<'_>) -> Outcome {
    let cx = asked.cx;
    let streamed = match hops {
        [hop @ Upstream::Executor(executor)] if !cx.resolver.is_gateway(executor) => {
            relay_from(hop, &mut client, asked).await
        }
        _ => match Box::pin(failover::race(hops, &mut client, asked)).await {
            Raced::Answered(answered) => Ok(go_on(*answered, &mut client, asked).await),
            Raced::Failed(fault) => Err(fault),
            Raced::Over(end) => Ok(end),
        },
    };
    let outcome = match streamed {
        Ok(end) => Outcome::Streamed(end),
        Err(fault) => Outcome::Refused(Reply::Error(fault)),
    };
    asked.span.end(outcome.label(), outcome.error());
    let deadline = || cx.stalled_clients.write_deadline(&cx.limits, asked.client());
    match &outcome {
        Outcome::Streamed(EndReason::Finished) => client.close_gracefully(deadline).await,
        Outcome::Streamed(EndReason::UpstreamFailed(_) | EndReason::Idle | EndReason::TooLong) => {
            client.abort(deadline).await;
        }
        // Nothing of a log has been sent, so a line of ours cannot be mistaken for it.
        Outcome::Refused(reply) => refuse(client, *reply, cx).await,
        _ => client.abort(|| ready(())).await,
    }
    outcome
}

/// Asks the only hop, an executor, for the log and relays it.
async fn relay_from(
    hop: &Upstream,
    client: &mut Connection,
    asked: &Asked<'_>,
) -> Result<EndReason, ReplyError> {
    let Asked { build, span, cx, .. } = asked;
    let route = Route::Direct;
    let listed = asked.listed(hop);
    let memory = cx.resolver.memory();
    let deadline = cx.first_byte_deadline();
    let mut slot = match executor_slot(hop, client, asked).await {
        Ok(slot) => slot,
        Err(Some(end)) => {
            asked.ended(hop, route, 0, &end);
            return Ok(end);
        }
        Err(None) => {
            memory.failed(build, hop, &DialError::Busy, FailureKind::Other);
            asked.ended(hop, route, 0, &DialError::Busy);
            return Err(ReplyError::ExecutorSilent);
        }
    };
    let dialed = Instant::now();
    let mut upstream = match Box::pin(hop.ask(asked)).await {
        Ok(upstream) => upstream,
        Err(error) => {
            if matches!(error, DialError::Ourselves) {
                cx.metrics.misrouted("loop");
            }
            memory.failed(build, hop, &error, FailureKind::Other);
            asked.ended(hop, route, 0, &error);
            return Err(ReplyError::ExecutorUnreachable);
        }
    };
    cx.metrics.connected(route, dialed.elapsed());
    let (host, port) = hop.address();
    span.connected(host, port);
    let _active = cx.metrics.active_stream();
    let first = {
        let patience = cx.first_byte_patience(deadline);
        let size = read_size(false, client.is_tls());
        let read = Box::pin(async {
            tokio::select! {
                biased;
                () = cx.cut.cancelled() => Err(EndReason::Stopped),
                read = timeout(patience, upstream.read_chunk(size)) => Ok(read),
                error = client.wait_closed() => Err(EndReason::ClientLeft(error)),
            }
        })
        .await;
        match read {
            Err(end) => {
                asked.ended(hop, route, 0, &end);
                return Ok(end);
            }
            Ok(Ok(Ok(chunk))) if !chunk.is_empty() => chunk,
            Ok(Ok(Err(error))) => {
                let end = EndReason::UpstreamFailed(error);
                asked.ended(hop, route, 0, &end);
                memory.failed(build, hop, &end, FailureKind::Other);
                return Err(ReplyError::ExecutorUnreachable);
            }
            Ok(silent) => {
                asked.ended(hop, route, 0, &SILENT);
                memory.failed(build, hop, &SILENT, FailureKind::Other);
                let whole_timeout = patience == cx.limits.first_byte_timeout;
                if let Some(slot) = slot.filter(|_| silent.is_err() && whole_timeout) {
                    slot.silent(build);
                }
                return Err(ReplyError::ExecutorSilent);
            }
        }
    };
    if let Some(slot) = slot.take() {
        slot.answered();
    }
    memory.answered(build, hop);
    cx.metrics.first_byte(listed.age(), span.trace_id());
    span.first_byte();
    let relay_cx = asked.relay_context(&listed);
    let RelaySummary { bytes, end } = relay::run(&mut upstream, first, client, &relay_cx).await;
    if matches!(end, EndReason::Finished) {
        upstream.close();
    }
    asked.ended(hop, route, bytes, &end);
    Ok(end)
}

/// Takes a slot to ask `hop`, waiting for it up to the first-byte deadline. Without one the error is
/// how the stream has ended meanwhile, or `None` if it is to fail.
async fn executor_slot(
    hop: &Upstream,
    client: &mut Connection,
    asked: &Asked<'_>,
) -> Result<Option<ExecutorSlot>, Option<EndReason>> {
    let Upstream::Executor(executor) = hop else { return Ok(None) };
    let Asked { build, cx, .. } = asked;
    if let Some(slot) = cx.executor_slots.try_acquire(executor) {
        return Ok(Some(slot));
    }
    // Boxed: only a crowd comes here.
    Box::pin(async {
        let meanwhile = async {
            tokio::select! {
                biased;
                () = cx.cut.cancelled() => EndReason::Stopped,
                reason = client.wait_closed() => EndReason::ClientLeft(reason),
            }
        };
        cx.executor_slot(executor, build, meanwhile).await.map(Some)
    })
    .await
}

/// Relays the log of which one of several hops has sent the first bytes.
async fn go_on(answered: Answered, client: &mut Connection, asked: &Asked<'_>) -> EndReason {
    let Answered { hop, route, mut connection, listed, first } = answered;
    let _active = asked.cx.metrics.active_stream();
    let relay_cx = asked.relay_context(&listed);
    let summary = relay::run(&mut connection, first, client, &relay_cx).await;
    let RelaySummary { bytes, end } = summary;
    if matches!(end, EndReason::Finished) {
        connection.close();
    }
    asked.ended(&hop, route, bytes, &end);
    end
}

/// Sends the line that replaces a log, and closes.
pub(crate) async fn refuse(mut client: Connection, reply: Reply, cx: &Context) {
    let line = reply.line().as_bytes();
    // If the client does not read one line in time, close.
    if let Ok(Ok(())) = timeout(cx.limits.request_timeout, client.write_all(line)).await {
        client.close_gracefully(|| sleep(cx.limits.request_timeout)).await;
    }
}

/// On a listener with rules, "Build not found" comes a multiple of this time after the request.
const NOT_FOUND_STEP: Duration = Duration::from_millis(50);

/// Waits until a multiple of [`NOT_FOUND_STEP`] has passed since `began`, at least one, so that the
/// time does not show which look-ups were made: for a build that a rule denies they are others than
/// for one that does not exist.
async fn hide_duration(began: tokio::time::Instant) {
    let steps = began.elapsed().as_nanos().div_ceil(NOT_FOUND_STEP.as_nanos()).max(1);
    let steps = u32::try_from(steps).unwrap_or(u32::MAX);
    let until = began + NOT_FOUND_STEP * steps;
    sleep_until(until - TIMER_DELAY).await;
    let left = until.saturating_duration_since(tokio::time::Instant::now());
    // Fails only when the runtime ends.
    let _ = spawn_blocking(move || std::thread::sleep(left)).await;
}

/// How late a timer of the runtime may be. It waits in whole milliseconds from the moment in which its
/// thread has nothing more to do, so the rest would show when the last look-up was answered. For this
/// last part a thread sleeps, which is exact.
const TIMER_DELAY: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests {
    use super::*;

    /// What bounds the number of quiet streams is what each of their tasks holds.
    #[test]
    fn a_session_is_small() {
        fn size<F>(_: impl Fn(TcpStream, &'static mut Caller, &'static Context) -> F) -> usize {
            size_of::<F>()
        }
        let bytes = size(run);
        assert!(bytes <= 1808, "{bytes} bytes: box what a quiet stream does not need");
    }

    #[tokio::test(start_paused = true)]
    async fn not_found_comes_at_multiples_of_its_step() {
        for (took, answered) in
            [(0, 50), (1, 50), (49, 50), (50, 50), (51, 100), (99, 100), (100, 100), (4999, 5000)]
        {
            let began = tokio::time::Instant::now();
            tokio::time::advance(Duration::from_millis(took)).await;
            hide_duration(began).await;
            // The clock of the test stands still while the thread sleeps.
            let elapsed = began.elapsed().as_millis();
            assert!((answered - 2..=answered + 1).contains(&elapsed), "{took} ms: {elapsed} ms");
        }
    }
}
