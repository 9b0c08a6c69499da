//! Reads the request and finds the hops that may have the log.

use std::time::{Duration, Instant};

use tokio::task::spawn_blocking;
use tokio::time::{sleep_until, timeout};
use tracing::debug;

use super::client_info::ClientInfo;
use super::outcome::Outcome;
use crate::gateway::context::Context;
use crate::gateway::protocol::reply::{Reply, ReplyError};
use crate::gateway::protocol::request::{self, RequestError, RequestFormat};
use crate::gateway::routing::access::Access;
use crate::gateway::transport::connection::Connection;
use crate::model::build_id::BuildId;
use crate::model::hop::Hop;
use crate::telemetry::metrics::Rejection;
use crate::telemetry::otlp::Span;

/// A request that this gateway serves.
pub(super) struct BuildRequest {
    pub(super) build: BuildId,
    /// How many gateways have sent the request before.
    pub(super) sent_hops: u8,
    /// The hops that may have the log, in the order to try them; at least one.
    pub(super) hops: Vec<Hop>,
    pub(super) span: Span,
}

/// Reads the request of `client`, checks that the client may have the log, and finds its hops.
pub(super) async fn read_request(
    connection: &mut Connection,
    client: &mut ClientInfo,
    cx: &Context,
) -> Result<BuildRequest, Outcome> {
    let format = RequestFormat::negotiated(connection.is_peer_gateway());
    let request = request::read_request(connection, format);
    let (reply, reason) = match timeout(cx.limits.request_timeout, request).await {
        Ok(Ok(request)) => {
            client.leave_pending().await;
            let is_authenticated = connection.peer_certificates().is_some();
            let resolved = match request.check(cx.router.zone(), is_authenticated) {
                Ok(()) => resolve(&request.build, connection, client, cx).await,
                Err(error) => Err((Reply::Error(error), "wrong zone or too many hops".to_owned())),
            };
            match resolved {
                Ok((hops, span)) => {
                    if is_authenticated {
                        span.requested_by(client.peer.ip());
                    }
                    client.logged = cx.limiter.logs_stream(client.peer, &cx.limits);
                    let request::Request { build, hops: sent_hops, .. } = request;
                    return Ok(BuildRequest { build, sent_hops, hops, span });
                }
                Err((reply, reason)) => (reply, format!("{}: {reason}", request.build)),
            }
        }
        Ok(Err(error @ (RequestError::Closed | RequestError::Io(_)))) => {
            debug!(peer = %client.peer, %error, "no request");
            return Err(Outcome::Probe);
        }
        Ok(Err(error @ RequestError::Malformed(_))) => (Reply::NotFound, error.to_string()),
        Ok(Err(error @ RequestError::TooLong)) => {
            (Reply::Error(ReplyError::RequestTooLong), error.to_string())
        }
        Err(_) => (Reply::Error(ReplyError::NoRequest), "nothing in time".to_owned()),
    };
    debug!(peer = %client.peer, %reason, "request refused");
    Err(Outcome::Refused(reply))
}

/// What the rules of the listener allow to `client`, if there are any.
fn access<'c>(connection: &Connection, client: &ClientInfo, cx: &'c Context) -> Option<Access<'c>> {
    let listener = &cx.listeners[usize::from(client.index)];
    let names = || match (connection.peer_certificates(), &listener.acceptor) {
        (Some(chain), Some(acceptor)) => acceptor.names_of(chain),
        _ => Vec::new(),
    };
    Access::new(&listener.config.allow, client.peer.ip(), names)
}

/// Looks up where `build` runs, if the client may have its log, and begins the span of the request.
async fn resolve(
    build: &BuildId,
    connection: &Connection,
    client: &ClientInfo,
    cx: &Context,
) -> Result<(Vec<Hop>, Span), (Reply, String)> {
    let Some(place) = cx.limiter.lookup(&cx.limits) else {
        cx.limiter.record_rejection(Rejection::Lookups, client.peer);
        return Err((Reply::Error(ReplyError::TooManyLookups), "too many look-ups".to_owned()));
    };
    let access = access(connection, client, cx);
    let began = Instant::now();
    let resolved = cx.router.route(build, access.as_ref());
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
    Ok((hops, cx.tracer.span(trace_parent.as_deref(), build, cx.router.zone(), began)))
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
