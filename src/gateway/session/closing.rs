//! Closes a client's connection after the log, or with a reply in its place.

use std::future::ready;

use tokio::io::AsyncWriteExt;
use tokio::time::{sleep, timeout};

use super::client_info::ClientInfo;
use super::outcome::Outcome;
use crate::gateway::context::Context;
use crate::gateway::relay::EndReason;
use crate::gateway::transport::connection::Connection;

/// Closes the client's connection so that the client sees how the stream ended: gracefully after a
/// complete log or a reply, with a reset otherwise.
pub(super) async fn close(
    connection: Connection,
    outcome: &Outcome,
    client: &ClientInfo,
    cx: &Context,
) {
    let counted = client.counted();
    let deadline = || cx.client_waits.wait_for_client(&cx.limits, counted);
    match outcome {
        Outcome::Ended(EndReason::Finished) => connection.close_gracefully(deadline).await,
        Outcome::Ended(EndReason::UpstreamFailed(_) | EndReason::Idle | EndReason::TooLong) => {
            connection.abort(deadline).await;
        }
        // No byte of a log has been sent, so the line cannot be mistaken for a part of it.
        Outcome::NotConnected(error) => send_reply(connection, error.line(), cx).await,
        Outcome::Refused(reply) => send_reply(connection, reply.line().as_bytes(), cx).await,
        Outcome::Ended(_) => connection.abort(|| ready(())).await,
        // `run` has closed the connection before it returned these, or the client has left.
        Outcome::Rejected | Outcome::NoProxyHeader | Outcome::NoHandshake | Outcome::Probe => {}
    }
}

/// Sends `line`, a reply, and closes the connection.
pub(crate) async fn send_reply(mut connection: Connection, line: &[u8], cx: &Context) {
    // If the client does not read one line in time, the connection is closed without waiting.
    if let Ok(Ok(())) = timeout(cx.limits.request_timeout, connection.write_all(line)).await {
        connection.close_gracefully(|| sleep(cx.limits.request_timeout)).await;
    }
}
