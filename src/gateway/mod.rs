//! The gateway: listens for finger requests and streams the logs of builds.
//!
//! One request passes these modules in turn:
//!
//! 1. [`accept`] accepts the connection. [`limits`] decides whether it is served.
//! 2. [`session`] reads the PROXY header, does the TLS handshake, and reads the request in the
//!    format of [`protocol`].
//! 3. [`routing`] looks up the build and returns the hops that may have its log. [`health`] ranks
//!    gateways of other zones by their last failures.
//! 4. [`upstream`] connects to the hops until one of them sends the log.
//! 5. [`relay`] copies the log to the client. [`stream_table`] lists the request from
//!    the moment its hops are known.
//!
//! [`transport`] has the connections and buffers that all of them use. [`Context`] is the state
//! that all sessions share, together with the settings.

pub(crate) mod accept;
mod context;
pub(crate) mod health;
pub(crate) mod limits;
pub(crate) mod protocol;
pub(crate) mod relay;
pub(crate) mod routing;
pub(crate) mod session;
pub(crate) mod stream_table;
pub(crate) mod transport;
pub(crate) mod upstream;

use std::io;
use std::net::TcpListener as StdListener;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use socket2::SockRef;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::accept::Listener;
use self::context::Context;
pub(crate) use self::context::{ListenerSettings, Settings};
use self::limits::Limiter;
use self::relay::client_waits::ClientWaits;
use self::routing::Router;
use self::routing::explain::RouteReport;
use self::stream_table::StreamTable;
use self::upstream::OwnAddresses;
use crate::model::build_id::BuildId;
use crate::os::heap::HeapTrimmer;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::otlp::Tracer;

/// A running gateway.
pub(crate) struct Server {
    cx: watch::Sender<Arc<Context>>,
    abort: CancellationToken,
    stop: CancellationToken,
    streams: StreamTable,
    sessions: TaskTracker,
    accept_loops: JoinSet<()>,
}

/// Reads and replaces the settings of a running gateway.
pub(crate) struct SettingsHandle(watch::Sender<Arc<Context>>);

impl SettingsHandle {
    /// Returns the settings of new connections.
    pub(crate) fn settings(&self) -> Settings {
        self.0.borrow().settings()
    }

    /// Replaces the settings of new connections. Open connections keep theirs.
    pub(crate) fn replace(&self, settings: Settings) {
        let old = self.settings();
        self.0.send_modify(|cx| *cx = Arc::new(cx.with_settings(settings)));
        // Open streams may keep the old connector for days; its cached TLS sessions are not needed.
        if let Some(connector) = old.connector {
            connector.forget_sessions();
        }
    }
}

/// Explains how builds are routed.
pub(crate) struct RouteExplainer(watch::Receiver<Arc<Context>>);

impl RouteExplainer {
    /// Explains how a session that begins now would route a request for `build`.
    pub(crate) async fn explain(&self, build: &BuildId) -> RouteReport {
        let cx = Arc::clone(&self.0.borrow());
        RouteReport::new(build, &cx.router, cx.limits.lookup_timeout).await
    }
}

/// The result of [`Server::drain`].
pub(crate) enum DrainResult {
    /// All connections ended within the grace period.
    Completed,
    /// This many connections were aborted when the grace period was over.
    Aborted(usize),
}

/// The receive buffer of a client's connection, in bytes; the kernel doubles the number for its
/// bookkeeping (socket(7)). A client sends a request of one line, and before it a PROXY header and
/// a certificate chain, of which rustls accepts up to 64 KiB.
const CLIENT_RECEIVE_BUFFER: usize = 64 * 1024;

/// How long a drain waits for sessions that it has aborted.
const ABORT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long an immediate stop waits for the sessions that it has aborted.
const FORCED_ABORT_TIMEOUT: Duration = Duration::from_millis(200);

/// Aborts the streams of a gateway, also while it is drained.
pub(crate) struct AbortHandle {
    abort: CancellationToken,
    sessions: TaskTracker,
}

impl AbortHandle {
    /// Resets all streams and waits briefly, so that clients see a reset and not an orderly end
    /// even if the process exits next.
    pub(crate) async fn abort(self) {
        self.abort.cancel();
        self.sessions.close();
        let _ = tokio::time::timeout(FORCED_ABORT_TIMEOUT, self.sessions.wait()).await;
    }
}

/// Reads how much of its limits a running gateway uses.
pub(crate) struct Usage {
    sessions: TaskTracker,
    cx: watch::Receiver<Arc<Context>>,
}

impl Usage {
    /// Returns the number of open connections and its limit.
    pub(crate) fn connections(&self) -> (usize, usize) {
        (self.sessions.len(), self.cx.borrow().limits.connections)
    }
}

impl Server {
    /// Starts to accept connections on `sockets`, which are bound, one for each listener of
    /// `settings`.
    ///
    /// # Errors
    /// A socket cannot be registered with the runtime.
    pub(crate) fn start(
        sockets: Vec<StdListener>,
        router: Router,
        settings: Settings,
        metrics: Metrics,
        tracer: Tracer,
    ) -> Result<Self> {
        let Settings { listeners, connector, limits } = settings;
        let addresses = sockets.iter().map(StdListener::local_addr);
        let addresses = addresses.collect::<io::Result<Vec<_>>>()?;
        let own_addresses = OwnAddresses::new(addresses, router.own_address());
        let health = Arc::clone(router.health());
        let connector = upstream::Connector::new(connector, own_addresses, health);
        let streams = StreamTable::default();
        let (abort, stop) = (CancellationToken::new(), CancellationToken::new());
        let cx = watch::Sender::new(Arc::new(Context {
            router: Arc::new(router),
            listeners,
            connector,
            limits,
            limiter: Arc::new(Limiter::new(metrics.clone())),
            metrics,
            streams: streams.clone(),
            client_waits: ClientWaits::default(),
            heap: HeapTrimmer::default(),
            tracer,
            abort: abort.clone(),
        }));
        let (sessions, mut accept_loops) = (TaskTracker::new(), JoinSet::new());
        for (index, socket) in (0..).zip(sockets) {
            // Accepted connections inherit it. If it cannot be set, the kernel's default is the
            // bound.
            let _ = SockRef::from(&socket).set_recv_buffer_size(CLIENT_RECEIVE_BUFFER);
            let listener = Listener {
                socket: TcpListener::from_std(socket)?,
                index,
                cx: cx.subscribe(),
                sessions: sessions.clone(),
            };
            accept_loops.spawn(listener.serve(stop.clone()));
        }
        Ok(Self { cx, abort, stop, streams, sessions, accept_loops })
    }

    /// Returns a handle to read and replace the settings.
    pub(crate) fn settings_handle(&self) -> SettingsHandle {
        SettingsHandle(self.cx.clone())
    }

    /// Returns the explainer of routes.
    pub(crate) fn explainer(&self) -> RouteExplainer {
        RouteExplainer(self.cx.subscribe())
    }

    /// Waits until an accept loop has ended although the gateway is not stopping, which is a bug of
    /// this program.
    pub(crate) async fn failed(&mut self) {
        self.accept_loops.join_next().await;
    }

    /// Returns the number of open connections.
    pub(crate) fn connections(&self) -> usize {
        self.sessions.len()
    }

    /// Returns a reader of the usage of limits.
    pub(crate) fn usage(&self) -> Usage {
        Usage { sessions: self.sessions.clone(), cx: self.cx.subscribe() }
    }

    /// Returns the table of running streams.
    pub(crate) fn streams(&self) -> StreamTable {
        self.streams.clone()
    }

    /// Returns a handle to abort the streams of this gateway.
    pub(crate) fn abort_handle(&self) -> AbortHandle {
        AbortHandle { abort: self.abort.clone(), sessions: self.sessions.clone() }
    }

    /// Returns how long a stopping gateway still accepts connections.
    pub(crate) fn lame_duck(&self) -> Duration {
        self.cx.borrow().limits.lame_duck
    }

    /// Returns how long a stopping gateway waits for its streams to end.
    pub(crate) fn grace(&self) -> Duration {
        self.cx.borrow().limits.grace
    }

    /// Stops accepting, waits up to `grace` for the open connections to end, and aborts the rest.
    pub(crate) async fn drain(mut self, grace: Duration) -> DrainResult {
        self.stop.cancel();
        while self.accept_loops.join_next().await.is_some() {}
        self.sessions.close();
        if tokio::time::timeout(grace, self.sessions.wait()).await.is_ok() {
            return DrainResult::Completed;
        }
        let rest = self.sessions.len();
        self.abort.cancel();
        // Sessions that have not ended by then end with the process.
        let _ = tokio::time::timeout(ABORT_TIMEOUT, self.sessions.wait()).await;
        DrainResult::Aborted(rest)
    }
}
