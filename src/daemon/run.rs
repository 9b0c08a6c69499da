//! Runs the gateway within the runtime, until it has stopped.

use std::net::{SocketAddr, TcpListener};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use super::reload::{ConfigSource, LoadedConfig, ReloadRequests, Reloader, RuntimeSettings};
use super::shutdown::{ExitMode, shut_down};
use super::supervisor::Supervisor;
use super::{Sockets, capacity};
use crate::admin::{Admin, StateCollector};
use crate::config::Config;
use crate::control::status::{BoundListener, StatusSource};
use crate::control::{self, CommandHandler, text};
use crate::gateway::Gateway;
use crate::gateway::routing::Resolver;
use crate::model::component::OwnComponent;
use crate::os::daemonize::DaemonizeGuard;
use crate::os::sd_notify::ServiceManager;
use crate::os::signals::{StatusSignal, StopSignals};
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

/// Runs the gateway and returns the exit status of the program. `guard` is dropped with an error, or
/// notified once nothing can fail any more.
///
/// # Errors
/// Why the gateway cannot start.
pub(super) async fn run(
    source: ConfigSource,
    loaded: LoadedConfig,
    hostname: String,
    sockets: Sockets,
    logging: &LogGuard,
    guard: Option<DaemonizeGuard>,
) -> Result<ExitCode> {
    let manager = Arc::new(ServiceManager::from_environment());
    let mut signals = StopSignals::new().context("cannot handle signals")?;
    let (reload, mut reload_requests) = ReloadRequests::new().context("cannot handle signals")?;
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
    let registry_settings = zookeeper::Settings {
        hosts: config.zookeeper.hosts.clone(),
        tls: zookeeper_tls_receiver,
        session_timeout: config.zookeeper.session_timeout,
        metrics: metrics.clone(),
    };
    let (registry, registration) = zookeeper::register(registry_settings, bound.component.clone());
    let router = Resolver::new(registry.clone(), bound.component.clone());
    let health = Arc::clone(router.memory());
    let collector =
        StateCollector::new(&registration, registry.clone(), &router, logging.lost_lines());

    // The gateway.
    let mut gateway = Gateway::open(
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
        usage: gateway.usage(),
        streams: gateway.streams(),
    });
    let mut supervisor = Supervisor::new(metrics.clone());
    if let Some(socket) = sockets.admin {
        let listener = Arc::new(tokio::net::TcpListener::from_std(socket)?);
        let admin = Arc::new(Admin::new(&metrics, collector));
        supervisor.spawn("admin server", move || Arc::clone(&admin).serve(Arc::clone(&listener)));
    }
    if let Some(socket) = sockets.control {
        let listener = UnixListener::from_std(socket).context("cannot use the command socket")?;
        let listener = Arc::new(listener);
        let handler = Arc::new(CommandHandler {
            status: Arc::clone(&status),
            stop: stop_requested.clone(),
            reload,
            routes: gateway.explainer(),
        });
        supervisor.spawn("command socket", move || {
            control::serve(Arc::clone(&listener), Arc::clone(&handler))
        });
    }
    if let Some(timeout) = manager.watchdog_timeout() {
        let manager = Arc::clone(&manager);
        supervisor.spawn("watchdog", move || {
            let manager = Arc::clone(&manager);
            async move { watchdog::run(&manager, timeout).await }
        });
    }
    // Taken over here: before that, the signal would end the process.
    let status_signal =
        Arc::new(tokio::sync::Mutex::new(StatusSignal::new().context("cannot handle signals")?));
    supervisor.spawn("status signal", move || {
        let (signal, status) = (Arc::clone(&status_signal), Arc::clone(&status));
        async move {
            loop {
                signal.lock().await.next().await;
                for line in text::status(&status.report()).lines() {
                    info!("{line}");
                }
            }
        }
    });
    let log_level = logging.level();
    let mut reloader = Reloader {
        source,
        hostname: bound.component.hostname,
        running: Arc::new(loaded),
        gateway: gateway.adjuster(),
        zookeeper: zookeeper_tls,
        set_log_level: Box::new(move |level| log_level.set(level)),
        metrics,
        certificates,
    };
    if let Some(guard) = guard {
        guard.notify_parent().context("cannot close the terminal's standard streams")?;
    }

    let task_failed = tokio::select! {
        signal = signals.next() => {
            info!(signal, connections = gateway.connections(), "stopping");
            false
        }
        () = stop_requested.cancelled() => {
            info!(command = "stop", connections = gateway.connections(), "stopping");
            false
        }
        () = publish_status(&bound.summary, &registration, &manager) => {
            error!("the registry task has ended; stopping");
            true
        }
        () = gateway.failed() => {
            error!("an accept loop has ended; stopping");
            true
        }
        // A reload that another branch interrupts has not changed anything yet.
        never = reloader.serve(&mut reload_requests, &manager) => match never {},
    };
    // The supervised tasks go on: `status`, health and metrics show how the gateway drains.
    let mode =
        shut_down(gateway, registration, tracer, &manager, &mut signals, &mut reload_requests)
            .await;
    Ok(match mode {
        ExitMode::Interrupted => ExitCode::from(EXIT_INTERRUPTED),
        ExitMode::Graceful if task_failed => ExitCode::from(EXIT_SOFTWARE),
        ExitMode::Graceful => ExitCode::SUCCESS,
    })
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
                // Without a zone no gateway connects to us. Zuul's program registers a port then only
                // if the kernel has chosen it.
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

/// Reports the status of the registration to the service manager, and tells the registry once that
/// the gateway is running. Returns only if the registry's task has ended.
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
