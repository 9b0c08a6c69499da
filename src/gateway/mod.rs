//! The way of a connection, in the order it takes it: [`listener`] accepts, [`session`] leads it
//! through, [`finger`] reads the request, [`router`] says where to, [`upstream`] dials, [`relay`]
//! copies; [`streams`] lists what runs.

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
use self::relay::stalled_clients::StalledClients;
use self::routing::Router;
use self::routing::explain::RouteReport;
use self::stream_table::StreamTable;
use self::upstream::OwnAddresses;
use crate::model::build_id::BuildId;
use crate::os::heap::HeapTrimmer;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::otlp::Tracer;

/// A gateway that takes connections.
pub(crate) struct Server {
    cx: watch::Sender<Arc<Context>>,
    abort: CancellationToken,
    stop: CancellationToken,
    streams: StreamTable,
    sessions: TaskTracker,
    accept_loops: JoinSet<()>,
}

/// Changes the settings of a running gateway.
pub(crate) struct SettingsHandle(watch::Sender<Arc<Context>>);

impl SettingsHandle {
    /// The settings that connections get now.
    pub(crate) fn settings(&self) -> Settings {
        self.0.borrow().settings()
    }

    /// Gives connections these settings from the next one on.
    pub(crate) fn replace(&self, settings: Settings) {
        let old = self.settings();
        self.0.send_modify(|cx| *cx = Arc::new(cx.with_settings(settings)));
        // Streams keep the old settings until they end, which may take days, but not their TLS sessions.
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

/// How the streams that ran at the end of a gateway ended.
pub(crate) enum DrainResult {
    /// By themselves.
    Completed,
    /// This many were cut when the grace period was over.
    Aborted(usize),
}

/// What the kernel may hold of what a client sends and nobody reads, in bytes; it takes twice as much
/// with its bookkeeping (socket(7)). Clients send a request of one line, and before it a PROXY header
/// and a certificate chain, which rustls takes up to 64 KiB of.
const CLIENT_RECEIVE_BUFFER: usize = 64 * 1024;

/// How long sessions that have been cut may take to notice; and when nobody wants to wait.
const ABORT_TIMEOUT: Duration = Duration::from_secs(2);
const FORCED_ABORT_TIMEOUT: Duration = Duration::from_millis(200);

/// Cuts a gateway's streams while it is drained.
pub(crate) struct AbortHandle {
    abort: CancellationToken,
    sessions: TaskTracker,
}

impl AbortHandle {
    /// Cuts all streams. The process may end behind this: their clients see that they were cut.
    pub(crate) async fn abort(self) {
        self.abort.cancel();
        self.sessions.close();
        let _ = tokio::time::timeout(FORCED_ABORT_TIMEOUT, self.sessions.wait()).await;
    }
}

/// How much of its limits a gateway uses.
pub(crate) struct Usage {
    sessions: TaskTracker,
    cx: watch::Receiver<Arc<Context>>,
}

impl Usage {
    /// The connections that are open, and as many as may be.
    pub(crate) fn connections(&self) -> (usize, usize) {
        (self.sessions.len(), self.cx.borrow().limits.connections)
    }
}

impl Server {
    /// Takes connections from `sockets`, which are bound, as `settings` say.
    ///
    /// # Errors
    /// A listener cannot be handed to the runtime.
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
            stalled_clients: StalledClients::default(),
            heap: HeapTrimmer::default(),
            tracer,
            abort: abort.clone(),
        }));
        let (sessions, mut accept_loops) = (TaskTracker::new(), JoinSet::new());
        for (index, socket) in (0..).zip(sockets) {
            // Each accepted connection takes it over. Without it the kernel has its own bound.
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

    /// What changes the settings of this gateway.
    pub(crate) fn settings_handle(&self) -> SettingsHandle {
        SettingsHandle(self.cx.clone())
    }

    /// Returns what explains how builds are routed.
    pub(crate) fn explainer(&self) -> RouteExplainer {
        RouteExplainer(self.cx.subscribe())
    }

    /// Waits until an accept loop has ended by itself, which only a fault of this program can
    /// bring about.
    pub(crate) async fn failed(&mut self) {
        self.accept_loops.join_next().await;
    }

    /// The connections open now.
    pub(crate) fn connections(&self) -> usize {
        self.sessions.len()
    }

    /// How many connections there are, and may be, to be looked at at any time.
    pub(crate) fn usage(&self) -> Usage {
        Usage { sessions: self.sessions.clone(), cx: self.cx.subscribe() }
    }

    /// The streams that run, to be looked at at any time.
    pub(crate) fn streams(&self) -> StreamTable {
        self.streams.clone()
    }

    /// What cuts the streams of this gateway before their time.
    pub(crate) fn abort_handle(&self) -> AbortHandle {
        AbortHandle { abort: self.abort.clone(), sessions: self.sessions.clone() }
    }

    /// How long connections are taken on when the gateway is told to stop.
    pub(crate) fn lame_duck(&self) -> Duration {
        self.cx.borrow().limits.lame_duck
    }

    /// How long running streams have when the gateway is told to stop.
    pub(crate) fn grace(&self) -> Duration {
        self.cx.borrow().limits.grace
    }

    /// Stops accepting, gives the open connections `grace` to end, and cuts the rest.
    pub(crate) async fn drain(mut self, grace: Duration) -> DrainResult {
        self.stop.cancel();
        while self.accept_loops.join_next().await.is_some() {}
        self.sessions.close();
        if tokio::time::timeout(grace, self.sessions.wait()).await.is_ok() {
            return DrainResult::Completed;
        }
        let rest = self.sessions.len();
        self.abort.cancel();
        // What does not notice in time ends with the process.
        let _ = tokio::time::timeout(ABORT_TIMEOUT, self.sessions.wait()).await;
        DrainResult::Aborted(rest)
    }
}
