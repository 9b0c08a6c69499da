//! Runs the gateway within the runtime, until it has stopped.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use super::capacity;
use super::reload::{ConfigSource, LoadedConfig, ReloadRequests, Reloader, RuntimeSettings};
use super::shutdown::{ExitMode, shut_down};
use super::supervisor::Supervisor;
use crate::admin::{Admin, StateCollector};
use crate::config::Config;
use crate::control::status::{BoundListener, StatusSource};
use crate::control::{self, CommandHandler, text};
use crate::gateway::Server;
use crate::gateway::routing::Router;
use crate::model::component::OwnComponent;
use crate::os::sd_notify::ServiceManager;
use crate::os::signals::StopSignals;
use crate::os::watchdog;
use crate::registry::zookeeper;
use crate::registry::{Registration, RegistrationStatus};
use crate::telemetry::log::LogGuard;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::otlp::Tracer;

/// `EX_SOFTWARE` of sysexits(3): a task that must not end has ended.
const EXIT_SOFTWARE: u8 = 70;

/// A second signal came before all streams had ended.
const EXIT_INTERRUPTED: u8 = 1;

/// The sockets of the gateway.
pub(super) struct Sockets {
    pub(super) listeners: Vec<TcpListener>,
    /// For health and metrics.
    pub(super) admin: Option<TcpListener>,
    /// The command socket.
    pub(super) control: Option<StdUnixListener>,
}

/// The parts of a running gateway.
pub(super) struct Running {
    server: Server,
    registration: Registration,
    /// The addresses of the listeners in one line.
    listeners: String,
    tracer: Tracer,
    manager: Arc<ServiceManager>,
    signals: StopSignals,
    /// Cancelled by the command `stop`.
    stop_requested: CancellationToken,
    reloader: Reloader,
    reload_requests: ReloadRequests,
    /// The tasks that observe and control the gateway.
    _supervisor: Supervisor,
}

/// Registers the gateway, and starts everything.
pub(super) fn start(
    source: ConfigSource,
    loaded: LoadedConfig,
    hostname: String,
    sockets: Sockets,
    logging: &LogGuard,
) -> Result<Running> {
    let manager = Arc::new(ServiceManager::from_environment());
    let signals = StopSignals::new().context("cannot handle signals")?;
    let (reload, reload_requests) = ReloadRequests::new().context("cannot handle signals")?;
    let metrics = Metrics::default();
    let config = &loaded.config;
    let tracer = Tracer::start(config.tracing.as_ref(), &hostname, metrics.clone())?;
    let bound = BoundListeners::new(config, hostname, &sockets.listeners, sockets.admin.as_ref())?;
    info!("{}", bound.summary);

    // The settings, which a reload replaces.
    let mut settings = RuntimeSettings::build(&loaded, &[])?;
    settings.gateway.limits.fit_connections(capacity::fit(&config.limits));
    loaded.certificates.export_expiry(&metrics);
    let certificates = watch::Sender::new(loaded.certificates.status(config));
    let (zookeeper_tls, zookeeper_tls_receiver) = watch::channel(settings.zookeeper);

    // The registry. Our entry says `initializing` until the gateway accepts connections.
    let registry_settings = zookeeper::SessionSettings {
        hosts: config.zookeeper.hosts.clone(),
        tls: zookeeper_tls_receiver,
        session_timeout: config.zookeeper.session_timeout,
        metrics: metrics.clone(),
    };
    let (registry, registration) = zookeeper::register(registry_settings, bound.component.clone());
    let router = Router::new(registry.clone(), bound.component.clone());
    let health = Arc::clone(router.health());
    let collector =
        StateCollector::new(&registration, registry.clone(), &router, logging.lost_lines());

    // The gateway.
    let server = Server::start(
        sockets.listeners,
        router,
        settings.gateway,
        metrics.clone(),
        tracer.clone(),
    )?;

    // What observes and controls it.
    let stop_requested = CancellationToken::new();
    let status = Arc::new(StatusSource {
        hostname: bound.component.hostname.clone(),
        zone: bound.component.zone.clone(),
        configuration: source.path.clone(),
        started: Instant::now(),
        listeners: bound.listeners,
        admin: bound.admin,
        zookeeper: config.zookeeper.hosts.to_string(),
        state: registration.state(),
        registration: registration.status(),
        registry,
        health,
        certificates: certificates.subscribe(),
        usage: server.usage(),
        streams: server.streams(),
    });
    let admin = sockets.admin.map(|socket| (socket, Admin::new(&metrics, collector)));
    let handler = CommandHandler {
        status: Arc::clone(&status),
        stop: stop_requested.clone(),
        reload,
        routes: server.explainer(),
    };
    let commands = sockets.control.map(|socket| (socket, handler));
    let supervisor = supervise(admin, commands, status, Arc::clone(&manager), metrics.clone())?;
    let log_level = logging.level.clone();
    let reloader = Reloader {
        source,
        hostname: bound.component.hostname,
        running: Arc::new(loaded),
        gateway: server.settings_handle(),
        zookeeper: zookeeper_tls,
        set_log_level: Box::new(move |level| log_level.set(level)),
        metrics,
        certificates,
    };
    Ok(Running {
        server,
        registration,
        listeners: bound.summary,
        tracer,
        manager,
        signals,
        stop_requested,
        reloader,
        reload_requests,
        _supervisor: supervisor,
    })
}

impl Running {
    /// Waits for a reason to stop, stops, and returns the exit status of the program.
    pub(super) async fn until_stopped(mut self) -> ExitCode {
        let connections = self.server.usage();
        let connections = || connections.connections().0;
        let task_failed = tokio::select! {
            signal = self.signals.next() => {
                info!(signal, connections = connections(), "stopping");
                false
            }
            () = self.stop_requested.cancelled() => {
                info!(command = "stop", connections = connections(), "stopping");
                false
            }
            () = publish_status(&self.listeners, &self.registration, &self.manager) => {
                error!("the registry task has ended; stopping");
                true
            }
            () = self.server.failed() => {
                error!("an accept loop has ended; stopping");
                true
            }
            // A reload that another branch interrupts has not changed anything yet.
            never = self.reloader.serve(&mut self.reload_requests, &self.manager) => match never {},
        };
        // The supervised tasks go on: `status`, health and metrics show how the gateway drains.
        let mode = shut_down(
            self.server,
            self.registration,
            self.tracer,
            &self.manager,
            &mut self.signals,
            &mut self.reload_requests,
        );
        match mode.await {
            ExitMode::Interrupted => ExitCode::from(EXIT_INTERRUPTED),
            ExitMode::Graceful if task_failed => ExitCode::from(EXIT_SOFTWARE),
            ExitMode::Graceful => ExitCode::SUCCESS,
        }
    }
}

/// Starts the tasks that observe and control the gateway: health and metrics, the command socket,
/// the watchdog, and the status on SIGUSR2.
fn supervise(
    admin: Option<(TcpListener, Admin)>,
    commands: Option<(StdUnixListener, CommandHandler)>,
    status: Arc<StatusSource>,
    manager: Arc<ServiceManager>,
    metrics: Metrics,
) -> Result<Supervisor> {
    let mut supervisor = Supervisor::new(metrics);
    if let Some((socket, admin)) = admin {
        let listener = Arc::new(tokio::net::TcpListener::from_std(socket)?);
        let admin = Arc::new(admin);
        supervisor.spawn("admin server", move || Arc::clone(&admin).serve(Arc::clone(&listener)));
    }
    if let Some((socket, handler)) = commands {
        let listener = UnixListener::from_std(socket).context("cannot use the command socket")?;
        let listener = Arc::new(listener);
        let handler = Arc::new(handler);
        supervisor.spawn("command socket", move || {
            control::serve(Arc::clone(&listener), Arc::clone(&handler))
        });
    }
    if let Some(timeout) = manager.watchdog_timeout {
        supervisor.spawn("watchdog", move || {
            let manager = Arc::clone(&manager);
            async move { watchdog::run(&manager, timeout).await }
        });
    }
    // Registered here, because the default action of the signal ends the process.
    let signal = signal(SignalKind::user_defined2()).context("cannot handle signals")?;
    let signal = Arc::new(Mutex::new(signal));
    supervisor.spawn("status signal", move || {
        let signal = Arc::clone(&signal);
        let status = Arc::clone(&status);
        async move {
            loop {
                signal.lock().await.recv().await;
                for line in text::status(&status.report()).lines() {
                    info!("{line}");
                }
            }
        }
    });
    Ok(supervisor)
}

/// The listeners as they are bound, and what follows from that.
struct BoundListeners {
    listeners: Vec<BoundListener>,
    admin: Option<SocketAddr>,
    /// What is registered.
    component: OwnComponent,
    /// All addresses in one line.
    summary: String,
}

impl BoundListeners {
    fn new(
        config: &Config,
        hostname: String,
        sockets: &[TcpListener],
        admin: Option<&TcpListener>,
    ) -> Result<Self> {
        let mut listeners = Vec::new();
        let mut use_ssl = false;
        let mut public_port = None;
        for (listener, socket) in config.listeners.iter().zip(sockets) {
            let address = socket.local_addr().context("a listener has no address")?;
            let tls = listener.tls.is_some();
            let advertised = listener.advertised;
            listeners.push(BoundListener { address, tls, advertised });
            if advertised {
                use_ssl = tls;
                // Without a zone no gateway connects to us. Zuul's program registers a port then
                // only if the kernel has chosen it.
                let is_chosen = listener.port == 0 && config.public_port.is_none();
                if config.zone.is_some() || is_chosen {
                    public_port = Some(config.public_port.unwrap_or(address.port()));
                }
            }
        }
        let component = OwnComponent { hostname, public_port, zone: config.zone.clone(), use_ssl };
        let admin = admin
            .map(|admin| admin.local_addr().context("the admin listener has no address"))
            .transpose()?;
        let mut summary = text::listeners(config.zone.as_deref(), &listeners);
        if let Some(address) = admin {
            summary.push_str(&format!("; health and metrics on {address}"));
        }
        Ok(Self { listeners, admin, component, summary })
    }
}

/// Reports the status of the registration to the service manager, and notifies the registry once
/// that the gateway is running. Returns only if the registry's task has ended.
async fn publish_status(listeners: &str, registration: &Registration, manager: &ServiceManager) {
    let mut status = registration.status();
    let mut ready = false;
    loop {
        let now = status.borrow_and_update().clone();
        manager.status(&format!("{listeners}; ZooKeeper: {now}")).await;
        if !ready && matches!(now, RegistrationStatus::Registered(_)) {
            ready = true;
            registration.set_running();
            manager.ready().await;
        }
        if status.changed().await.is_err() {
            return;
        }
    }
}
