//! Listening sockets and their accept loops.
//!
//! The loop waits for the kernel and for nothing else: handshakes, requests and refusals happen in
//! tasks of their own, whose number is bounded.

pub(crate) mod heartbeat;
pub(crate) mod socket;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use self::heartbeat::Pulse;
use super::Context;
use super::limits::{AddressPlace, Place};
use super::protocol::reply::{Reply, ReplyError};
use super::routing::access;
use super::session;
use super::session::Caller;
use super::transport::connection::Connection;
use super::transport::socket::Socket;
use crate::telemetry::metrics::Rejection;

/// Pauses after a failed accept: descriptors do not come back sooner than somebody leaves.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How long it must go well before trouble counts as over: at the edge each peer that leaves lets
/// another one in, and must not write two lines with it.
const CALM: Duration = Duration::from_secs(10);

/// One accept loop.
pub(crate) struct Listener {
    pub(crate) socket: TcpListener,
    /// Which of the gateway's listeners this is.
    pub(crate) index: u16,
    /// For the next session.
    pub(crate) cx: watch::Receiver<Arc<Context>>,
    /// Holds every session and refusal.
    pub(crate) sessions: TaskTracker,
    /// Says that it moves.
    pub(crate) pulse: Pulse,
}

impl Listener {
    /// Accepts until `stop` is cancelled, then closes the socket.
    pub(crate) async fn serve(mut self, stop: CancellationToken) {
        let mut pause = PAUSE_MIN;
        let mut last_failure: Option<Instant> = None;
        let over = |failure: &mut Instant| failure.elapsed() > CALM;
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                accepted = self.pulse.during(self.socket.accept()) => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    if last_failure.take_if(over).is_some() {
                        info!("accepting connections again");
                    }
                    pause = PAUSE_MIN;
                    self.admit(stream, peer);
                }
                Err(error) if is_the_peers(&error) => debug!(%error, "a connection failed early"),
                Err(error) => {
                    self.cx.borrow().metrics.connection_rejected(Rejection::Accept);
                    last_failure.take_if(over);
                    if last_failure.replace(Instant::now()).is_some() {
                        debug!(%error, "still cannot accept connections");
                    } else {
                        warn!(%error, "cannot accept connections; trying on (descriptors: LimitNOFILE, limits.connections)");
                    }
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = self.pulse.during(tokio::time::sleep(pause)) => pause = (pause * 2).min(PAUSE_MAX),
                    }
                }
            }
        }
    }

    /// Starts the session, or refuses it where that would be one too many. What is spawned holds
    /// no part of the socket, which is to close with the loop, however long streams run.
    fn admit(&self, stream: TcpStream, peer: SocketAddr) {
        // On a listener for both, IPv4 clients come as `::ffff:192.0.2.7`.
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let cx = Arc::clone(&self.cx.borrow());
        let (index, tls) = (self.index, cx.acceptors[usize::from(self.index)].is_some());
        let (rejection, fault) = match places(peer, index, &cx) {
            Ok((place, of_address)) => {
                let open = (cx.heap.open(), cx.metrics.connection_accepted(tls));
                let waiting = cx.bounds.waiting();
                let number = waiting.number();
                let (of_address, waiting) = (Some(of_address), Some(waiting));
                let caller = Caller { peer, of_address, index, logged: true, waiting };
                let session = admitted(stream, caller, Arc::clone(&cx), (place, open));
                let task = self.sessions.spawn(session).abort_handle();
                cx.bounds.may_be_closed(number, task, peer);
                return;
            }
            Err(refused) => refused,
        };
        cx.turned_away(rejection, peer);
        // A refusal on TLS would need a handshake first: the costly part of what is too much.
        if !tls && let Some(permit) = cx.bounds.refusal() {
            self.sessions.spawn(async move {
                let _permit = permit;
                session::refuse(
                    Connection::Plain(Socket::from_client(stream)),
                    Reply::Error(fault),
                    &cx,
                )
                .await;
            });
        }
    }
}

/// A session's task. Makes the session's future where it is waited for: one that were handed on would
/// lie in the task twice, as what was given and as what is waited for.
#[expect(clippy::manual_async_fn, reason = "an async fn has room for each of its arguments twice")]
fn admitted<Held: Send>(
    stream: TcpStream,
    mut caller: Caller,
    cx: Arc<Context>,
    held: Held,
) -> impl Future<Output = ()> + Send {
    async move {
        let _held = held;
        let outcome = session::run(stream, &mut caller, &cx).await;
        caller.stop_waiting().await;
        cx.metrics.connection_closed(outcome.label());
    }
}

/// The places of a connection that the listener with this `index` has accepted from `peer`: in total
/// and of its address. A balancer's counts against nobody until it has said for whom it comes.
fn places(
    peer: SocketAddr,
    index: u16,
    cx: &Context,
) -> Result<(Place, AddressPlace), (Rejection, ReplyError)> {
    // The address first: a client over its own limit must not close another one's connection.
    let of_address =
        match access::contain(&cx.listeners[usize::from(index)].proxy_protocol, peer.ip()) {
            true => Some(AddressPlace::of_nobody()),
            false => cx.bounds.of_address(peer.ip(), &cx.limits),
        };
    let of_address = of_address.ok_or((Rejection::Address, ReplyError::TooManyFromAddress))?;
    let place = cx.connection_place();
    let place = place.ok_or((Rejection::Limit, ReplyError::TooManyConnections))?;
    Ok((place, of_address))
}

/// Whether a failed accept concerns only the connection that was to be accepted: aborted, refused
/// by a firewall, or an error of its network that Linux hands to accept (accept(2), "Error
/// handling" and EPERM).
fn is_the_peers(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(
            Errno::CONNABORTED
                | Errno::CONNRESET
                | Errno::HOSTDOWN
                | Errno::HOSTUNREACH
                | Errno::INTR
                | Errno::NETDOWN
                | Errno::NETUNREACH
                | Errno::NONET
                | Errno::NOPROTOOPT
                | Errno::OPNOTSUPP
                | Errno::PERM
                | Errno::PROTO
                | Errno::TIMEDOUT
        )
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What bounds the number of quiet streams is what each of their tasks holds.
    #[test]
    fn a_sessions_task_is_small() {
        fn size<A, B, C, F>(_: impl Fn(A, B, C, Held) -> F) -> usize {
            size_of::<F>()
        }
        type Held = [u64; 3];
        let bytes = size(admitted::<Held>);
        assert!(bytes <= 2016, "{bytes} bytes: is a future handed on, and lies in it twice?");
    }
}
