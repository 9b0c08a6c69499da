//! Listening sockets and their accept loops.
//!
//! The loop waits for the kernel and for nothing else: handshakes, requests and refusals happen in
//! tasks of their own, whose number is bounded.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::connection::Connection;
use super::finger::{Fault, Reply};
use super::{Context, session};
use crate::admin::metrics::Rejection;

/// Connections the kernel keeps for us between two looks; it cuts this to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Pauses after a failed accept: descriptors do not come back sooner than somebody leaves.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How long it must go well before trouble counts as over: at the edge each peer that leaves lets
/// another one in, and must not write two lines with it.
const CALM: Duration = Duration::from_secs(10);

/// Refusals under way at once. What comes on top is closed without a word.
const REFUSALS: usize = 64;

/// Binds `address`.
///
/// An unspecified IPv6 address takes IPv4 connections too, whatever the system's default is; where
/// IPv6 is switched off it stands for the unspecified IPv4 address.
pub(crate) fn bind(address: SocketAddr) -> Result<StdListener> {
    let bound = match open(address) {
        Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED && is_without_ipv6(&error) => {
            open(SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port())))
        }
        bound => bound,
    };
    bound.with_context(|| match address.port() {
        1..1024 => format!(
            "cannot listen on {address} (ports below 1024 need root, CAP_NET_BIND_SERVICE or \
             sysctl net.ipv4.ip_unprivileged_port_start)"
        ),
        _ => format!("cannot listen on {address}"),
    })
}

fn is_without_ipv6(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL))
}

fn open(address: SocketAddr) -> io::Result<StdListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    // For the lines that trickle; each accepted socket takes it over.
    socket.set_tcp_nodelay(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Bounds on the connections of all listeners together.
pub(crate) struct Bounds {
    /// Those that are open. Counted and not held as permits: the limit may change.
    connections: Arc<AtomicUsize>,
    refusals: Arc<Semaphore>,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { connections: Arc::default(), refusals: Arc::new(Semaphore::new(REFUSALS)) }
    }
}

impl Bounds {
    /// A place for one more connection, if fewer than `limit` are open.
    fn place(&self, limit: usize) -> Option<Place> {
        let more = |open: usize| (open < limit).then_some(open + 1);
        let taken = self.connections.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.ok().map(|_| Place(Arc::clone(&self.connections)))
    }
}

/// A place among the connections; free again when dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One accept loop.
pub(crate) struct Listener {
    pub(crate) socket: TcpListener,
    /// Which of the gateway's listeners this is.
    pub(crate) index: usize,
    /// For the next session.
    pub(crate) cx: watch::Receiver<Arc<Context>>,
    pub(crate) bounds: Arc<Bounds>,
    /// Holds every session and refusal.
    pub(crate) sessions: TaskTracker,
}

impl Listener {
    /// Accepts until `stop` is cancelled, then closes the socket.
    pub(crate) async fn serve(self, stop: CancellationToken) {
        let mut pause = PAUSE_MIN;
        let mut last_failure: Option<Instant> = None;
        let over = |failure: &mut Instant| failure.elapsed() > CALM;
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                accepted = self.socket.accept() => accepted,
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
                    self.cx.borrow().metrics.rejected(Rejection::Accept);
                    last_failure.take_if(over);
                    if last_failure.replace(Instant::now()).is_some() {
                        debug!(%error, "still cannot accept connections");
                    } else {
                        warn!(%error, "cannot accept connections; trying on (descriptors: LimitNOFILE, limits.connections)");
                    }
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(pause) => pause = (pause * 2).min(PAUSE_MAX),
                    }
                }
            }
        }
    }

    /// Starts the session, or refuses it where that would be one too many. What is spawned holds
    /// no part of the socket, which is to close with the loop, however long streams run.
    fn admit(&self, stream: TcpStream, peer: SocketAddr) {
        let cx = Arc::clone(&self.cx.borrow());
        let (index, tls) = (self.index, cx.acceptors[self.index].is_some());
        if let Some(place) = self.bounds.place(cx.limits.connections) {
            let open = cx.metrics.connection(tls);
            self.spawn(place, async move {
                let _open = open;
                let outcome = session::run(stream, peer, index, &cx).await;
                cx.metrics.ended(&outcome);
            });
            return;
        }
        debug!(%peer, "too many connections");
        cx.metrics.rejected(Rejection::Limit);
        // A refusal on TLS would need a handshake first: the costly part of what is too much.
        let refusal = Arc::clone(&self.bounds.refusals).try_acquire_owned();
        if let (Ok(permit), false) = (refusal, tls) {
            self.spawn(permit, async move {
                let reply = Reply::Error(Fault::TooManyConnections);
                session::refuse(Connection::Plain(stream), reply, &cx).await;
            });
        }
    }

    /// Runs `work` with `place`, which is free again when it is done, whatever happens.
    fn spawn(&self, place: impl Send + 'static, work: impl Future<Output = ()> + Send + 'static) {
        self.sessions.spawn(async move {
            let _place = place;
            work.await;
        });
    }
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
