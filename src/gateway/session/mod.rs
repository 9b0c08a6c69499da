//! The session of one accepted connection: PROXY header, TLS handshake, request, route, connect,
//! relay, close.

pub(crate) mod client_hello;
mod client_info;
mod closing;
mod observer;
mod open;
pub(crate) mod outcome;
pub(crate) mod proxy_protocol;
mod request;

use tokio::net::TcpStream;

pub(crate) use self::client_info::ClientInfo;
use self::closing::close;
pub(crate) use self::closing::send_reply;
use self::observer::Observer;
use self::open::{accept_tls, read_proxy_header};
use self::outcome::Outcome;
use self::request::{StreamRequest, find_hops, read_request};
use super::context::Context;
use super::relay;
use super::relay::EndReason;
use super::transport::connection::Connection;
use super::upstream::{ConnectParameters, Established};
use crate::model::hop::Hop;

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
    let outcome = serve(&mut connection, client, cx).await;
    close(connection, &outcome, client, cx).await;
    outcome
}

/// Reads the request, finds the hops that may have the log, and streams it.
async fn serve(connection: &mut Connection, client: &mut ClientInfo, cx: &Context) -> Outcome {
    let request = match read_request(connection, client, cx).await {
        Ok(request) => request,
        Err(outcome) => return outcome,
    };
    let request = match find_hops(request, connection, client, cx).await {
        Ok(request) => request,
        Err(outcome) => return outcome,
    };
    stream_log(&request, connection, client, cx).await
}

/// Streams the log to the client from the first hop that has it.
async fn stream_log(
    request: &StreamRequest,
    connection: &mut Connection,
    client: &ClientInfo,
    cx: &Context,
) -> Outcome {
    let observer = Observer::new(request, client, cx);
    let outcome = match connect(request, connection, &observer, cx).await {
        Ok(Established { hop, connection: mut upstream, first }) => {
            let _active = observer.established(hop);
            let end = relay::run(&mut upstream, first, connection, &observer.relay_context()).await;
            // Otherwise dropped without close(), so the connection is reset.
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

/// Connects to the first hop that has the log, unless the client leaves or the gateway stops
/// meanwhile.
async fn connect<'r>(
    request: &'r StreamRequest,
    connection: &mut Connection,
    observer: &Observer<'_>,
    cx: &Context,
) -> Result<Established<'r>, Outcome> {
    let StreamRequest { build, forwarded, hops, .. } = request;
    let executor_is_gateway = match hops.last() {
        Some(Hop::Executor(executor)) => cx.router.is_gateway(executor),
        _ => false,
    };
    let parameters = ConnectParameters {
        build,
        forwarded: *forwarded,
        executor_is_gateway,
        client_is_tls: connection.is_tls(),
        limits: &cx.limits,
        observer,
    };
    let established = tokio::select! {
        biased;
        () = cx.abort.cancelled() => return Err(Outcome::Ended(EndReason::Stopped)),
        // Boxed, to keep the state of the connect phase out of the session future.
        established = Box::pin(cx.connector.connect_any(hops, &parameters)) => established,
        error = connection.wait_closed() => {
            return Err(Outcome::Ended(EndReason::ClientLeft(error)));
        }
    };
    established.map_err(|error| Outcome::NotConnected(Box::new(error)))
}
