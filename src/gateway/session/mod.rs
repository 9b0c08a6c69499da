//! One connection from its first byte to its last: PROXY header, TLS, request, route, connect, relay,
//! close.

pub(crate) mod client_hello;
mod observer;
mod open;
pub(crate) mod outcome;
pub(crate) mod proxy_protocol;
mod request;

use std::future::ready;
use std::net::SocketAddr;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use self::observer::Observer;
use self::open::{accept_tls, read_proxy_header};
use self::outcome::Outcome;
use self::request::{BuildRequest, read_request};
use super::context::Context;
use super::limits::eviction_queue::Entry;
use super::limits::{AddressPermit, CountedClient, PendingConnection};
use super::relay;
use super::relay::EndReason;
use super::transport::connection::Connection;
use super::upstream::{ConnectRequest, Established};
use crate::model::hop::Hop;

/// The client of a session.
pub(crate) struct ClientInfo {
    /// The client's address; that of a trusted proxy until its PROXY header has been read.
    pub(crate) peer: SocketAddr,
    /// The permit for the client's address; dropped once the client has presented a certificate.
    pub(crate) address_permit: Option<AddressPermit>,
    /// The connection comes from a trusted proxy, which sends a PROXY header.
    pub(crate) is_proxy: bool,
    /// The index of the listener.
    pub(crate) index: u16,
    /// Whether the lines of its stream are logged at info level. They are at debug level if its address
    /// has requested too many streams.
    pub(crate) logged: bool,
    /// The entry among the connections that may be closed for a newer one, until the request is there.
    pub(crate) pending: Option<Entry<PendingConnection>>,
}

impl ClientInfo {
    /// Keeps the connection from being closed for a newer one. Does not return if it has been chosen
    /// already: then its task is about to be aborted.
    pub(crate) async fn leave_pending(&mut self) {
        if self.pending.take().is_some_and(|entry| !entry.leave()) {
            std::future::pending::<()>().await;
        }
    }

    /// The client, if limits count it by its address.
    fn counted(&self) -> Option<CountedClient> {
        self.address_permit.as_ref().and_then(AddressPermit::client)
    }
}

/// Serves one connection from `client` to its end. Every wait on a peer has a deadline.
pub(crate) async fn run(stream: TcpStream, client: &mut ClientInfo, cx: &Context) -> Outcome {
    let stream = match read_proxy_header(stream, client, cx).await {
        Ok(stream) => stream,
        Err(outcome) => return outcome,
    };
    let mut connection = match accept_tls(stream, client, cx).await {
        Ok(connection) => connection,
        Err(outcome) => return outcome,
    };
    let outcome = match read_request(&mut connection, client, cx).await {
        Ok(request) => stream_log(&request, &mut connection, client, cx).await,
        Err(outcome) => outcome,
    };
    close(connection, &outcome, client, cx).await;
    outcome
}

/// Streams the log to the client from the first hop that has it.
async fn stream_log(
    request: &BuildRequest,
    connection: &mut Connection,
    client: &ClientInfo,
    cx: &Context,
) -> Outcome {
    let observer = Observer::new(request, client, cx);
    let outcome = match connect(request, connection, &observer, cx).await {
        Ok(Established { hop, connection: mut upstream, first }) => {
            let _active = observer.established(hop);
            let end = relay::run(&mut upstream, first, connection, &observer.relay_context()).await;
            if matches!(end, EndReason::Finished) {
                upstream.close();
            }
            Outcome::Ended(end)
        }
        Err(outcome) => outcome,
    };
    observer.finish(&outcome);
    outcome
}

/// Connects to the first hop that has the log, unless the client leaves or the gateway stops meanwhile.
async fn connect<'r>(
    request: &'r BuildRequest,
    connection: &mut Connection,
    observer: &Observer<'_>,
    cx: &Context,
) -> Result<Established<'r>, Outcome> {
    let BuildRequest { build, sent_hops, hops, .. } = request;
    let executor_is_gateway = match hops.last() {
        Some(Hop::Executor(executor)) => cx.router.is_gateway(executor),
        _ => false,
    };
    let connect = ConnectRequest {
        build,
        sent_hops: *sent_hops,
        executor_is_gateway,
        client_is_tls: connection.is_tls(),
        limits: &cx.limits,
        observer,
    };
    let established = tokio::select! {
        biased;
        () = cx.cut.cancelled() => return Err(Outcome::Ended(EndReason::Stopped)),
        // Boxed: an idle stream should not have room for what it needs to connect.
        established = Box::pin(cx.connector.connect_any(hops, &connect)) => established,
        error = connection.wait_closed() => {
            return Err(Outcome::Ended(EndReason::ClientLeft(error)));
        }
    };
    established.map_err(|error| Outcome::NotConnected(Box::new(error)))
}

/// Closes the client's connection in the way that shows how its stream ended: gracefully after a whole
/// log or a reply, with a reset otherwise.
async fn close(connection: Connection, outcome: &Outcome, client: &ClientInfo, cx: &Context) {
    let counted = client.counted();
    let deadline = || cx.stalled_clients.write_deadline(&cx.limits, counted);
    match outcome {
        Outcome::Ended(EndReason::Finished) => connection.close_gracefully(deadline).await,
        Outcome::Ended(EndReason::UpstreamFailed(_) | EndReason::Idle | EndReason::TooLong) => {
            connection.abort(deadline).await;
        }
        // No byte of a log has been sent, so the line cannot be mistaken for a part of it.
        Outcome::NotConnected(error) => send_reply(connection, error.line(), cx).await,
        Outcome::Refused(reply) => send_reply(connection, reply.line().as_bytes(), cx).await,
        Outcome::Ended(_) => connection.abort(|| ready(())).await,
        // The client has left already.
        _ => {}
    }
}

/// Sends the `line` that stands for a log, and closes.
pub(crate) async fn send_reply(mut connection: Connection, line: &[u8], cx: &Context) {
    // If the client does not read one line in time, close.
    if let Ok(Ok(())) = timeout(cx.limits.request_timeout, connection.write_all(line)).await {
        connection.close_gracefully(|| sleep(cx.limits.request_timeout)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What bounds the number of idle streams is what each of their tasks holds.
    #[test]
    fn future_of_a_session_is_small() {
        fn size<F>(_: impl Fn(TcpStream, &'static mut ClientInfo, &'static Context) -> F) -> usize {
            size_of::<F>()
        }
        let bytes = size(run);
        assert!(bytes <= 1808, "{bytes} bytes: box what an idle stream does not need");
    }
}
