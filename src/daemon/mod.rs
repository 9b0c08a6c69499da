//! The gateway's life, from its configuration to its exit status.

pub(crate) mod certificates;
pub(crate) mod reload;

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

pub(crate) use self::certificates::Certificates;
pub(crate) use self::reload::{ConfigSource, zookeeper_tls};

use self::reload::{LoadedConfig, ReloadRequests, Reloader, RuntimeSettings};
use crate::admin::{Admin, StateCollector};
use crate::config;
use crate::config::Config;
use crate::control;
use crate::control::socket_file;
use crate::control::socket_file::SocketFile;
use crate::control::status;
use crate::control::status::{BoundListener, CertificateStatus, StatusSource};
use crate::gateway::accept::socket::bind;
use crate::gateway::health::Memory;
use crate::gateway::routing::Resolver;
use crate::gateway::{Drained, Gateway};
use crate::model::component::OwnComponent;
use crate::os::daemonize::{DaemonizeGuard, daemonize};
use crate::os::pid_file::PidFile;
use crate::os::privileges;
use crate::os::privileges::RunAsUser;
use crate::os::sd_notify::ServiceManager;
use crate::os::signals::{StatusSignal, StopSignals};
use crate::os::socket_activation::InheritedSockets;
use crate::os::watchdog;
use crate::os::{fd_limit, memory_limit, runtime};
use crate::registry::zookeeper;
use crate::registry::{Registration, RegistrationStatus, Registry};
use crate::telemetry::log::Logging;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::otlp::Tracer;

/// `EX_SOFTWARE` of sysexits(3): a task that must not end has ended.
const EXIT_SOFTWARE: u8 = 70;

/// Stopped a second time, before running streams had ended.
const EXIT_INTERRUPTED: u8 = 1;

/// How long ZooKeeper may take to take our entry out, and to end the session.
const WITHDRAW_PATIENCE: Duration = Duration::from_secs(3);
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

/// What a gateway is started with.
pub(crate) struct StartupConfig {
    pub(crate) source: ConfigSource,
    pub(crate) config: Config,
    pub(crate) identities: Certificates,
}

/// Runs the gateway until it is told to stop, as `account` once its sockets are bound. With a
/// `pid_file` it detaches: this returns in another process than it was called in.
///
/// # Errors
/// What keeps it from starting.
pub(crate) fn run(
    setup: StartupConfig,
    account: Option<&RunAsUser>,
    mut pid_file: Option<PidFile>,
    logging: &mut Logging,
) -> Result<ExitCode> {
    let StartupConfig { source, config, identities } = setup;
    privileges::harden();
    if account.is_none() && pid_file.is_none() {
        // No fork and no change of user follow.
        logging.begin()?;
    }
    // Here, where a signal still ends the process: it may take as long as name servers take.
    let hostname = config.hostname.clone().unwrap_or_else(config::own_hostname);
    info!(
        config = %source.path.display(),
        registers = %registered_address(&config, &hostname),
        zone = config.zone.as_deref().map(tracing::field::display),
        "zuul-fingergw {} starts",
        env!("CARGO_PKG_VERSION")
    );
    if config.hostname.is_none() && config.zone.is_some() && !hostname.contains('.') {
        warn!(
            hostname,
            "the name that this gateway registers has no domain, and hostname is not set: other \
             zones may be unable to resolve it"
        );
    }
    identities.log_findings();
    for warning in config.warnings() {
        warn!("{warning}");
    }

    // All sockets before anything else is promised to anybody.
    let (listeners, admin) = open(&config)?;
    if let Some(path) = config.explicit_command_socket() {
        socket_file::create_directory(path, account)?;
    }
    // While this is the only thread there is.
    drop_privileges(&config, account)?;
    let (control, _socket_file) = command_socket(config.control.as_deref()).unzip();
    let launch = match &mut pid_file {
        None => None,
        Some(pid_file) => {
            let launch = daemonize()?;
            pid_file.write(std::process::id())?;
            // Relative paths may lead elsewhere now.
            Certificates::load(&config, || hostname.clone())?;
            Some(launch)
        }
    };
    if account.is_some() || launch.is_some() {
        warn_if_not_reloadable(&source);
    }
    logging.begin()?;
    let runtime = runtime::start()?;
    let sockets = Sockets { listeners, admin, control };
    let configured = LoadedConfig { config, identities };
    let status = runtime.block_on(serve(source, configured, hostname, sockets, logging, launch));
    // Whatever a second signal left running is not waited for.
    runtime.shutdown_background();
    status
}

/// The name that will be registered, with its port as far as that is registered and known before the
/// sockets are bound.
fn registered_address(config: &Config, hostname: &str) -> String {
    let advertised = config.listeners.iter().find(|listener| listener.advertised);
    let port = config.public_port.or(advertised.map(|listener| listener.port));
    match port {
        Some(port) if port != 0 && config.zone.is_some() => format!("{hostname}:{port}"),
        _ => hostname.to_owned(),
    }
}

/// Becomes the configured user. What is read again later must be readable then; better to hear of
/// it now than of streams that fail.
fn drop_privileges(config: &Config, account: Option<&RunAsUser>) -> Result<()> {
    let Some(account) = account else {
        if let Some(user) = &config.user {
            info!(user, "not started as root: user is ignored");
        }
        return Ok(());
    };
    account.drop_privileges()?;
    account.check_readable(config.files())?;
    Ok(())
}

/// As another user or in another directory the configuration may be out of reach, or what it names by
/// a relative path. It is not needed again but for a reload.
fn warn_if_not_reloadable(source: &ConfigSource) {
    if let Err(fault) = config::load(&source.path) {
        let fault = format!("{fault:#}").replace('\n', "; ");
        warn!("no reload until this is mended: {fault}");
    }
}

/// The command socket, if one is wanted and can be had: signals do without it.
fn command_socket(path: Option<&Path>) -> Option<(UnixListener, SocketFile)> {
    let path = path?;
    socket_file::bind(path)
        .inspect_err(|error| {
            warn!(
                path = %path.display(), %error,
                "no command socket: stop, reload, status and resolve do not reach this gateway"
            );
        })
        .ok()
}

/// The sockets of all listeners, and that for health and metrics: those that the service manager
/// passes, the rest bound here.
fn open(config: &Config) -> Result<(Vec<TcpListener>, Option<TcpListener>)> {
    let mut passed = InheritedSockets::from_environment()?;
    let mut open = |host: &str, port| {
        let address = resolve(host, port)?;
        passed.take(address)?.map_or_else(|| bind(address), Ok)
    };
    let listeners = config.listeners.iter().map(|listener| open(&listener.host, listener.port));
    let listeners = listeners.collect::<Result<_>>()?;
    let admin = config.admin.as_ref().map(|(host, port)| open(host, *port)).transpose()?;
    passed.ensure_all_used()?;
    Ok((listeners, admin))
}

/// The address to listen on; of several an IPv6 one, as upstream chooses.
fn resolve(host: &str, port: u16) -> Result<SocketAddr> {
    let addresses: Vec<_> = (host, port)
        .to_socket_addrs()
        .with_context(|| format!("cannot find the address of {host} to listen on"))?
        .collect();
    let ipv6 = addresses.iter().find(|address| address.is_ipv6());
    ipv6.or(addresses.first()).copied().with_context(|| format!("{host} has no address"))
}

/// All that is bound.
struct Sockets {
    listeners: Vec<TcpListener>,
    admin: Option<TcpListener>,
    control: Option<UnixListener>,
}

async fn serve(
    source: ConfigSource,
    configured: LoadedConfig,
    hostname: String,
    sockets: Sockets,
    logging: &Logging,
    launch: Option<DaemonizeGuard>,
) -> Result<ExitCode> {
    let Sockets { listeners, admin, control } = sockets;
    let manager = Arc::new(ServiceManager::from_environment());
    let mut signals = StopSignals::new().context("cannot take signals")?;
    let (reload, mut orders) = ReloadRequests::new().context("cannot take signals")?;
    let status_signal = StatusSignal::new().context("cannot take signals")?;
    let metrics = Metrics::default();
    let config = &configured.config;
    let tracer = Tracer::start(config.tracing.as_ref(), &hostname, metrics.clone())?;
    let listening = BoundListeners::of(config, hostname, &listeners, admin.as_ref())?;
    info!("{}", listening.text);

    let mut live = RuntimeSettings::of(&configured, &[])?;
    let fitting = fd_limit::budget(memory_limit::budget(&config.limits));
    live.settings.limits.fit_connections(fitting);
    configured.identities.export_expiry(&metrics);
    let (zookeeper_tls, tls) = watch::channel(live.zookeeper);
    let settings = zookeeper_settings(config, tls, &metrics);

    // The entry says `initializing` until there is somebody to serve.
    let (registry, registration) = zookeeper::register(settings, listening.announcement.clone());
    let resolver = Resolver::new(registry.clone(), listening.announcement.clone());
    if let Some(socket) = admin {
        let collector =
            StateCollector::new(&registration, registry.clone(), &resolver, logging.lost_lines());
        let admin = Admin::new(&metrics, collector);
        tokio::spawn(admin.serve(tokio::net::TcpListener::from_std(socket)?));
    }
    let certificates = watch::Sender::new(configured.identities.certificates(config));
    let memory = Arc::clone(resolver.memory());
    let known = Known { registry, memory, certificates: certificates.subscribe() };
    let mut gateway =
        Gateway::open(listeners, resolver, live.settings, metrics.clone(), tracer.clone())?;

    let (watched, probes) = (Arc::clone(&manager), gateway.probes());
    tokio::spawn(async move { watchdog::feed(&watched, probes).await });

    let told_to_stop = CancellationToken::new();
    let sources = listening.sources(&registration, &gateway, &source, &configured.config, known);
    let sources = Arc::new(sources);
    tokio::spawn(status::tell(status_signal, Arc::clone(&sources)));
    let (told, decider) = (told_to_stop.clone(), gateway.decider());
    if let Some(socket) = control {
        control::spawn(socket, control::CommandHandler { sources, stop: told, reload, decider })?;
    }
    let mut reloader = Reloader {
        source,
        hostname: listening.announcement.hostname.clone(),
        running: Arc::new(configured),
        gateway: gateway.adjuster(),
        zookeeper: zookeeper_tls,
        volume: logging.volume(),
        metrics,
        certificates,
    };

    if let Some(launch) = launch {
        launch.notify_parent().context("cannot let go of the terminal")?;
    }

    let failed = tokio::select! {
        signal = signals.next() => {
            info!(signal, connections = gateway.connections(), "stopping");
            false
        }
        () = told_to_stop.cancelled() => {
            info!(command = "stop", connections = gateway.connections(), "stopping");
            false
        }
        () = follow(&listening.text, &registration, &manager) => {
            error!("the registry task has ended; stopping");
            true
        }
        () = gateway.failed() => {
            error!("an accept loop has ended; stopping");
            true
        }
        // What is under way when another arm ends is dropped before it has changed anything.
        never = reloader.serve(&mut orders, &manager) => match never {},
    };
    let ended = end(gateway, registration, tracer, &manager, &mut signals, &mut orders).await;
    Ok(match ended {
        ExitMode::AtOnce => ExitCode::from(EXIT_INTERRUPTED),
        ExitMode::InOrder if failed => ExitCode::from(EXIT_SOFTWARE),
        ExitMode::InOrder => ExitCode::SUCCESS,
    })
}

fn zookeeper_settings(
    config: &Config,
    tls: watch::Receiver<zookeeper::Tls>,
    metrics: &Metrics,
) -> zookeeper::Settings {
    zookeeper::Settings {
        hosts: config.zookeeper.hosts.clone(),
        tls,
        session_timeout: config.zookeeper.session_timeout,
        metrics: metrics.clone(),
    }
}

/// How it all ended.
enum ExitMode {
    InOrder,
    /// A second signal came meanwhile.
    AtOnce,
}

/// Ends it all in order, or at once where that takes too long for somebody.
async fn end(
    gateway: Gateway,
    registration: Registration,
    tracer: Tracer,
    manager: &ServiceManager,
    signals: &mut StopSignals,
    orders: &mut ReloadRequests,
) -> ExitMode {
    let cutter = gateway.cutter();
    tokio::select! {
        () = stop(gateway, registration, tracer, manager) => ExitMode::InOrder,
        never = orders.refuse() => match never {},
        signal = signals.next() => {
            warn!(signal, "second signal: ending at once");
            cutter.cut().await;
            ExitMode::AtOnce
        }
    }
}

/// What others know that `status` shows.
struct Known {
    registry: Registry,
    memory: Arc<Memory>,
    certificates: watch::Receiver<Vec<CertificateStatus>>,
}

/// What the listeners got, for others and for people.
struct BoundListeners {
    announcement: OwnComponent,
    doors: Vec<BoundListener>,
    admin: Option<SocketAddr>,
    text: String,
}

impl BoundListeners {
    fn of(
        config: &Config,
        hostname: String,
        sockets: &[TcpListener],
        admin: Option<&TcpListener>,
    ) -> Result<Self> {
        let mut doors = Vec::new();
        let (mut use_ssl, mut port) = (false, None);
        for (listener, socket) in config.listeners.iter().zip(sockets) {
            let address = socket.local_addr().context("a listener has no address")?;
            let (tls, advertised) = (listener.tls.is_some(), listener.advertised);
            doors.push(BoundListener { address, tls, advertised });
            if advertised {
                use_ssl = tls;
                // Without a zone nobody dials us, and upstream says no port either, but for one that
                // it was given by the kernel.
                let chosen = listener.port == 0 && config.public_port.is_none();
                let wanted = config.zone.is_some() || chosen;
                port = wanted.then(|| config.public_port.unwrap_or(address.port()));
            }
        }
        let announcement =
            OwnComponent { hostname, public_port: port, zone: config.zone.clone(), use_ssl };
        let mut text = status::listening(config.zone.as_deref(), &doors);
        let admin =
            admin.map(|admin| admin.local_addr().context("the admin listener has no address"));
        let admin = admin.transpose()?;
        if let Some(address) = admin {
            text.push_str(&format!("; health and metrics on {address}"));
        }
        Ok(Self { announcement, doors, admin, text })
    }

    /// What there is to tell of a gateway that listens so.
    fn sources(
        &self,
        registration: &Registration,
        gateway: &Gateway,
        source: &ConfigSource,
        config: &Config,
        known: Known,
    ) -> StatusSource {
        let Known { registry, memory, certificates } = known;
        StatusSource {
            hostname: self.announcement.hostname.clone(),
            zone: self.announcement.zone.clone(),
            configuration: source.path.clone(),
            started: Instant::now(),
            listeners: self.doors.clone(),
            admin: self.admin,
            zookeeper: config.zookeeper.hosts.to_string(),
            state: registration.state(),
            standing: registration.status(),
            registry,
            memory,
            certificates,
            usage: gateway.usage(),
            streams: gateway.streams(),
        }
    }
}

/// Tells the service manager how the registration stands, and the registry that we serve. Ends
/// only if the registry's task does.
async fn follow(listening: &str, registration: &Registration, manager: &ServiceManager) {
    let mut standing: watch::Receiver<RegistrationStatus> = registration.status();
    let mut ready = false;
    loop {
        let now = standing.borrow_and_update().clone();
        manager.status(&format!("{listening}; ZooKeeper: {now}")).await;
        if !ready && matches!(now, RegistrationStatus::Registered(_)) {
            ready = true;
            registration.set_running();
            manager.ready().await;
        }
        if standing.changed().await.is_err() {
            return;
        }
    }
}

/// Out of the registry first, so that nobody new is sent here; then a moment for those who were sent
/// before; then no more connections; then time for those that are open; then what there is to tell of
/// them.
async fn stop(
    gateway: Gateway,
    mut registration: Registration,
    tracer: Tracer,
    manager: &ServiceManager,
) {
    manager.stopping().await;
    let (lame_duck, grace) = (gateway.lame_duck(), gateway.grace());
    if !registration.withdraw(WITHDRAW_PATIENCE).await {
        warn!("ZooKeeper does not answer: our entry stays until the session times out");
    }
    if !lame_duck.is_zero() {
        info!(?lame_duck, "taking connections for a moment longer");
        tokio::time::sleep(lame_duck).await;
    }
    info!(?grace, connections = gateway.connections(), "taking no more connections");
    match gateway.drain(grace).await {
        Drained::Whole => info!("all streams have ended"),
        Drained::Cut(streams) => warn!(streams, ?grace, "grace period over: streams cut"),
    }
    tokio::join!(registration.close(CLOSE_PATIENCE), tracer.stop());
    info!("stopped");
}
