//! Accept loops of the listeners.
//!
//! A loop waits for the kernel and for nothing else: each connection has a task, and the number of
//! tasks is bounded.

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

use super::context::Context;
use super::limits::{AddressPermit, Limiter, Permit};
use super::protocol::reply::{ErrorReason, Reply};
use super::routing::access;
use super::session;
use super::session::ClientInfo;
use super::transport::connection::Connection;
use super::transport::socket::Socket;
use crate::os::heap::OpenConnection;
use crate::telemetry::metrics::{GaugeGuard, Rejection};

/// Pauses after a failed accept: file descriptors are free again only when a connection ends.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How long accept must succeed before a failure counts as over. At the limit each connection that
/// ends lets another one in, which must not write two log lines.
const RECOVERED_AFTER: Duration = Duration::from_secs(10);

/// The accept loop of one listener.
pub(crate) struct Listener {
    pub(crate) socket: TcpListener,
    /// The index of the listener in the configuration.
    pub(crate) index: u16,
    /// The context of the next session.
    pub(crate) cx: watch::Receiver<Arc<Context>>,
    /// The tasks of all sessions and rejections.
    pub(crate) sessions: TaskTracker,
}

impl Listener {
    /// Accepts until `stop` is cancelled, then closes the socket.
    pub(crate) async fn serve(self, stop: CancellationToken) {
        let mut pause = PAUSE_MIN;
        let mut last_failure: Option<Instant> = None;
        let has_recovered = |failure: &mut Instant| failure.elapsed() > RECOVERED_AFTER;
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                accepted = self.socket.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    if last_failure.take_if(has_recovered).is_some() {
                        info!("accepting connections again");
                    }
                    pause = PAUSE_MIN;
                    self.admit(stream, peer);
                }
                Err(error) if concerns_peer_only(&error) => {
                    debug!(%error, "a connection failed before it was accepted")
                }
                Err(error) => {
                    self.cx.borrow().metrics.connection_rejected(Rejection::Accept);
                    last_failure.take_if(has_recovered);
                    if last_failure.replace(Instant::now()).is_some() {
                        debug!(%error, "still cannot accept connections");
                    } else {
                        warn!(
                            %error,
                            "cannot accept connections, retrying; raise LimitNOFILE or lower \
                             limits.connections if file descriptors are used up"
                        );
                    }
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(pause) => pause = (pause * 2).min(PAUSE_MAX),
                    }
                }
            }
        }
    }

    /// Starts the session of a connection, or rejects it at a limit. The task does not own the
    /// listening socket, which closes with the loop even while streams run.
    fn admit(&self, stream: TcpStream, peer: SocketAddr) {
        // IPv4 clients of a listener for both families have addresses such as `::ffff:192.0.2.7`.
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let cx = Arc::clone(&self.cx.borrow());
        let listener = &cx.listeners[usize::from(self.index)];
        let is_tls = listener.acceptor.is_some();
        let is_proxy = access::any_contains(&listener.config.proxy_protocol, peer.ip());
        // A proxy's connection counts towards the limit of an address after its PROXY header.
        let address_permit = if is_proxy {
            Some(AddressPermit::uncounted())
        } else {
            cx.limiter.acquire_for_address(peer.ip(), &cx.limits)
        };
        // Taken after the address permit, because a client beyond the limit of its address must not
        // evict the connection of another client.
        let Some(address_permit) = address_permit else {
            self.reject(stream, peer, Rejection::Address, ErrorReason::TooManyFromAddress, cx);
            return;
        };
        let Some(permit) = cx.limiter.acquire_connection(&cx.limits) else {
            self.reject(stream, peer, Rejection::Limit, ErrorReason::TooManyConnections, cx);
            return;
        };
        let guards = Guards {
            _permit: permit,
            _heap: cx.heap.open(),
            _active: cx.metrics.connection_accepted(is_tls),
            peer,
        };
        let pending = cx.limiter.pending_connection();
        let number = pending.number();
        let client = ClientInfo {
            address: peer,
            address_permit: Some(address_permit),
            is_proxy,
            listener: self.index,
            log_at_info: true,
            pending: Some(pending),
        };
        let session = session_task(stream, client, Arc::clone(&cx), guards);
        let task = self.sessions.spawn(session).abort_handle();
        cx.limiter.make_evictable(number, task, peer);
    }

    /// Counts a rejected connection, and sends it one line unless that would need a TLS handshake,
    /// which costs most, or too many are being rejected.
    fn reject(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        reason: Rejection,
        error: ErrorReason,
        cx: Arc<Context>,
    ) {
        cx.limiter.record_rejection(reason, peer);
        let is_tls = cx.listeners[usize::from(self.index)].acceptor.is_some();
        if !is_tls && let Some(permit) = cx.limiter.acquire_rejection() {
            self.sessions.spawn(async move {
                let _permit = permit;
                let client = Connection::Plain(Socket::from_client(stream));
                session::send_reply(client, Reply::Error(error).line().as_bytes(), &cx).await;
            });
        }
    }
}

/// What a connection holds until it ends.
struct Guards {
    _permit: Permit,
    _heap: OpenConnection,
    _active: GaugeGuard,
    peer: SocketAddr,
}

/// The task of a session.
// Not an async fn, whose future would store each of its arguments twice.
#[expect(clippy::manual_async_fn, reason = "the comment above")]
fn session_task(
    stream: TcpStream,
    mut client: ClientInfo,
    cx: Arc<Context>,
    guards: Guards,
) -> impl Future<Output = ()> + Send {
    async move {
        let _panic_report = PanicReport { limiter: &cx.limiter, peer: guards.peer };
        let outcome = session::run(stream, &mut client, &cx).await;
        client.leave_pending().await;
        cx.metrics.connection_closed(outcome.label());
        drop(guards);
    }
}

/// Reports a panic of the task that drops this.
struct PanicReport<'a> {
    limiter: &'a Limiter,
    peer: SocketAddr,
}

impl Drop for PanicReport<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.limiter.record_panic(self.peer);
        }
    }
}

/// Whether a failed accept concerns only one connection: aborted, refused by a firewall, or an
/// error of its network that Linux returns from accept (accept(2), "Error handling" and EPERM).
fn concerns_peer_only(error: &io::Error) -> bool {
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
    use crate::telemetry::metrics::Metrics;

    /// Each idle stream holds one such task.
    #[test]
    fn session_task_is_small() {
        fn size<A, B, C, D, F>(_: impl Fn(A, B, C, D) -> F) -> usize {
            size_of::<F>()
        }
        let bytes = size(session_task);
        assert!(bytes <= 2016, "{bytes} bytes: is a future passed by value, and stored twice?");
    }

    #[tokio::test]
    async fn panic_of_a_connection_is_counted_and_ends_only_that_connection() {
        let metrics = Metrics::default();
        let limiter = Arc::new(Limiter::new(metrics.clone()));
        let sessions = TaskTracker::new();
        for panics in [true, false] {
            let limiter = Arc::clone(&limiter);
            sessions.spawn(async move {
                let peer = SocketAddr::from(([192, 0, 2, 1], 79));
                let _panic_report = PanicReport { limiter: &limiter, peer };
                tokio::task::yield_now().await;
                assert!(!panics, "provoked by this test");
            });
        }
        sessions.close();
        sessions.wait().await;
        assert_eq!(metrics.panics(), 1);
    }
}
