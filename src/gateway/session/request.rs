//! Reads the request of a client and finds the hops that may have the log.

use std::fmt::Display;
use std::time::{Duration, Instant};

use tokio::task::spawn_blocking;
use tokio::time::{sleep_until, timeout};
use tracing::debug;

use super::client_info::ClientInfo;
use super::outcome::Outcome;
use crate::gateway::context::Context;
use crate::gateway::limits::Permit;
use crate::gateway::protocol::reply::{ErrorReason, Reply};
use crate::gateway::protocol::request::{self, Request, RequestError, RequestFormat};
use crate::gateway::routing::RouteError;
use crate::gateway::routing::access::Access;
use crate::gateway::transport::connection::Connection;
use crate::model::build_id::BuildId;
use crate::model::hop::Hop;
use crate::registry::LookupError;
use crate::telemetry::metrics::Rejection;
use crate::telemetry::otlp::Span;

/// A request whose build runs: all that is needed to stream its log.
pub(super) struct StreamRequest {
    pub(super) build: BuildId,
    /// How many gateways have sent the request before.
    pub(super) forwarded: u8,
    /// The hops that may have the log, in the order to try them; at least one.
    pub(super) hops: Vec<Hop>,
    pub(super) span: Span,
}

/// Reads the request of `client` and checks its parameters.
pub(super) async fn read_request(
    connection: &mut Connection,
    client: &mut ClientInfo,
    cx: &Context,
) -> Result<Request, Outcome> {
    let format = RequestFormat::negotiated(connection.is_peer_gateway());
    let request = request::read_request(connection, format);
    let request = match timeout(cx.limits.request_timeout, request).await {
        Ok(Ok(request)) => request,
        Ok(Err(error)) => {
            let reply = match error {
                RequestError::Malformed(_) => Reply::NotFound,
                RequestError::TooLong => Reply::Error(ErrorReason::RequestTooLong),
                RequestError::Closed | RequestError::Io(_) => {
                    debug!(peer = %client.address, %error, "no request");
                    return Err(Outcome::Probe);
                }
            };
            return Err(refuse(client, reply, &error));
        }
        Err(_) => {
            let reply = Reply::Error(ErrorReason::NoRequest);
            return Err(refuse(client, reply, &"no request in time"));
        }
    };
    client.leave_pending().await;
    let is_authenticated = connection.peer_certificates().is_some();
    if let Err(reason) = request.check(cx.router.zone(), is_authenticated) {
        let text = format_args!("{}: wrong zone or too many hops", request.build);
        return Err(refuse(client, Reply::Error(reason), &text));
    }
    Ok(request)
}

/// Finds the hops that may have the log of the requested build, if `client` may have it.
pub(super) async fn find_hops(
    request: Request,
    connection: &Connection,
    client: &mut ClientInfo,
    cx: &Context,
) -> Result<StreamRequest, Outcome> {
    let Request { build, forwarded, .. } = request;
    let Some(permit) = cx.limiter.acquire_lookup(&cx.limits) else {
        cx.limiter.record_rejection(Rejection::Lookups, client.address);
        let reply = Reply::Error(ErrorReason::TooManyLookups);
        return Err(refuse(client, reply, &format_args!("{build}: too many lookups")));
    };
    let (hops, span) = match resolve(&build, permit, connection, client, cx).await {
        Ok(resolved) => resolved,
        Err(error) => {
            return Err(refuse(client, error.reply(), &format_args!("{build}: {error}")));
        }
    };
    if connection.peer_certificates().is_some() {
        span.requested_by(client.address.ip());
    }
    client.log_at_info = cx.limiter.take_stream_log(client.address, &cx.limits);
    Ok(StreamRequest { build, forwarded, hops, span })
}

/// Logs why the request of `client` is refused, and returns the outcome that sends `reply`.
fn refuse(client: &ClientInfo, reply: Reply, reason: &dyn Display) -> Outcome {
    debug!(peer = %client.address, %reason, "request refused");
    Outcome::Refused(reply)
}

/// Returns the access of `client` by the rules of its listener, if there are any.
fn access<'c>(connection: &Connection, client: &ClientInfo, cx: &'c Context) -> Option<Access<'c>> {
    let listener = &cx.listeners[usize::from(client.listener)];
    let names = || match (connection.peer_certificates(), &listener.acceptor) {
        (Some(chain), Some(acceptor)) => acceptor.names_of(chain),
        _ => Vec::new(),
    };
    Access::new(&listener.config.allow, client.address.ip(), names)
}

/// Looks up where `build` runs, if the client may have its log, and begins the span of the request.
/// `permit` is held during the lookup.
async fn resolve(
    build: &BuildId,
    permit: Permit,
    connection: &Connection,
    client: &ClientInfo,
    cx: &Context,
) -> Result<(Vec<Hop>, Span), RouteError> {
    let access = access(connection, client, cx);
    let began = Instant::now();
    let route = timeout(cx.limits.lookup_timeout, cx.router.route(build, access.as_ref())).await;
    let route = route.unwrap_or_else(|_| {
        Err(RouteError::Lookup(LookupError::Unavailable("no answer in time".to_owned())))
    });
    cx.metrics.lookup_finished(began.elapsed());
    drop(permit);
    if access.is_some() && matches!(route, Err(RouteError::NotFound | RouteError::Denied(_))) {
        Box::pin(hide_duration(began.into())).await;
    }
    let (hops, trace_parent) = route?;
    Ok((hops, cx.tracer.span(trace_parent.as_deref(), build, cx.router.zone(), began)))
}

/// On a listener with access rules, "Build not found" is sent a multiple of this time after the
/// request.
const NOT_FOUND_STEP: Duration = Duration::from_millis(50);

/// Waits until a multiple of [`NOT_FOUND_STEP`] has passed since `began`, at least one. The time to
/// the reply must not show which lookups were made, because a denied build needs other lookups than
/// a build that does not exist.
async fn hide_duration(began: tokio::time::Instant) {
    let steps = began.elapsed().as_nanos().div_ceil(NOT_FOUND_STEP.as_nanos()).max(1);
    let steps = u32::try_from(steps).unwrap_or(u32::MAX);
    let until = began + NOT_FOUND_STEP * steps;
    sleep_until(until - TIMER_DELAY).await;
    let left = until.saturating_duration_since(tokio::time::Instant::now());
    // Fails only when the runtime shuts down.
    let _ = spawn_blocking(move || std::thread::sleep(left)).await;
}

/// How late a timer of the runtime may fire. The runtime waits in whole milliseconds from the
/// moment when its thread becomes idle, so the fraction would show when the last lookup was
/// answered. A thread sleeps for this last part, because its sleep is exact.
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
