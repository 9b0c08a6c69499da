//! The gateway's life, from its configuration to its exit status.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustls::pki_types::UnixTime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::admin::Admin;
use crate::admin::metrics::Metrics;
use crate::config::{self, Config};
use crate::gateway::listener::bind;
use crate::gateway::resolver::Resolver;
use crate::gateway::{Drained, Gateway};
use crate::log::LogFile;
use crate::registry::component::Announcement;
use crate::registry::zookeeper::{self, Diagnosis, Settings};
use crate::registry::{Registration, Standing};
use crate::service::control::{self, SocketFile};
use crate::service::descriptors;
use crate::service::detach::{Launch, detach};
use crate::service::pid_file::PidFile;
use crate::service::privileges::Account;
use crate::service::signals::StopSignals;
use crate::service::status::{self, Door, Sources};
use crate::service::systemd::Manager;
use crate::tls::{self, Finding, Identity, Names, Use};

/// `EX_SOFTWARE` of sysexits(3): a task that must not end has ended.
const EXIT_SOFTWARE: u8 = 70;

/// Stopped a second time, before running streams had ended.
const EXIT_IMPATIENT: u8 = 1;

/// How long ZooKeeper may take to take our entry out, and to end the session.
const WITHDRAW_PATIENCE: Duration = Duration::from_secs(3);
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

/// The certificates and keys of a configuration, read and found usable.
pub(crate) struct Identities {
    gateway: Option<Identity>,
    zookeeper: Identity,
}

impl Identities {
    /// Reads the files that `config` names and tries each for what it is to do.
    ///
    /// # Errors
    /// Every file that cannot be used, with its fault.
    pub(crate) fn load(config: &Config) -> Result<Self> {
        let now = UnixTime::now();
        let listening = config.listeners.iter().any(|listener| listener.tls.is_some());
        let hostname = config.hostname.as_deref();
        let purpose = if listening { Use::Listening(hostname) } else { Use::Dialing };
        let gateway = config.tls.as_ref().map(|files| Identity::load(files, purpose, now));
        let gateway = gateway.transpose();
        let zookeeper = Identity::load(&config.zookeeper.tls, Use::ZooKeeper, now);
        match (gateway, zookeeper) {
            (Ok(gateway), Ok(zookeeper)) => Ok(Self { gateway, zookeeper }),
            (Err(one), Err(other)) => Err(anyhow!("{one:#}\n{other:#}")),
            (Err(error), Ok(_)) | (Ok(_), Err(error)) => Err(error),
        }
    }
}

impl Identities {
    /// What is amiss with certificates that can be used. No reason not to start, as plain listeners
    /// and executors know nothing of them; but one to act.
    pub(crate) fn findings(&self) -> impl Iterator<Item = &Finding> {
        let of_gateway = self.gateway.as_ref().map_or(&[][..], Identity::findings);
        // Both may be from the same files.
        let of_zookeeper = self.zookeeper.findings().iter();
        of_gateway.iter().chain(of_zookeeper.filter(|finding| !of_gateway.contains(finding)))
    }
}

/// Runs the gateway until it is told to stop, as `account` once its sockets are bound. With a
/// `pid_file` it detaches: this returns in another process than it was called in.
///
/// # Errors
/// What keeps it from starting.
pub(crate) fn run(
    mut config: Config,
    identities: Identities,
    account: Option<&Account>,
    mut pid_file: Option<PidFile>,
    log_file: Option<&mut LogFile>,
) -> Result<ExitCode> {
    info!("zuul-fingergw {} starts", env!("CARGO_PKG_VERSION"));
    for finding in identities.findings() {
        if finding.is_error() {
            error!("{}", finding.text);
        } else {
            warn!("{}", finding.text);
        }
    }
    // Here, where a signal still ends the process: it may take as long as name servers take.
    let hostname = config.hostname.clone().unwrap_or_else(config::own_hostname);
    config.limits.connections = descriptors::budget(config.limits.connections);

    // All sockets before anything else is promised to anybody.
    let mut sockets = Vec::new();
    for listener in &config.listeners {
        sockets.push(bind(resolve(&listener.host, listener.port)?)?);
    }
    let admin = match &config.admin {
        Some((host, port)) => Some(bind(resolve(host, *port)?)?),
        None => None,
    };
    // While this is the only thread there is.
    settle(&config, account)?;
    let (control, _socket_file) = command_socket(config.control.as_deref()).unzip();
    let launch = match &mut pid_file {
        None => None,
        Some(pid_file) => {
            let launch = detach()?;
            pid_file.write(std::process::id())?;
            Some(launch)
        }
    };
    if let Some(log_file) = log_file {
        log_file.begin().context("cannot start the log's thread")?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let status =
        runtime.block_on(serve(config, hostname, &identities, sockets, admin, control, launch));
    // Whatever a second signal left running is not waited for.
    runtime.shutdown_background();
    status
}

/// Becomes the configured user. What is read again later must be readable then; better to hear of
/// it now than of streams that fail.
fn settle(config: &Config, account: Option<&Account>) -> Result<()> {
    let Some(account) = account else {
        if let Some(user) = &config.user {
            info!(user, "not started as root: user is ignored");
        }
        return Ok(());
    };
    account.assume()?;
    let files = config.tls.iter().chain([&config.zookeeper.tls]);
    Ok(account.check_readable(files.flat_map(|files| files.paths()))?)
}

/// The command socket, if one is wanted and can be had: signals do without it.
fn command_socket(path: Option<&Path>) -> Option<(UnixListener, SocketFile)> {
    let path = path?;
    control::bind(path)
        .inspect_err(|error| {
            warn!(path = %path.display(), %error, "no command socket: stop and status are not heard");
        })
        .ok()
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

async fn serve(
    config: Config,
    hostname: String,
    identities: &Identities,
    sockets: Vec<TcpListener>,
    admin: Option<TcpListener>,
    control: Option<UnixListener>,
    launch: Option<Launch>,
) -> Result<ExitCode> {
    let manager = Manager::from_environment();
    let mut signals = StopSignals::new().context("cannot take signals")?;
    let metrics = Metrics::default();
    let listening = Listening::of(&config, hostname.clone(), &sockets, admin.as_ref())?;
    info!("{}", listening.text);

    let mut listeners = Vec::new();
    for (listener, socket) in config.listeners.iter().zip(sockets) {
        let identity = listener.tls.zip(identities.gateway.as_ref());
        let acceptor = identity.map(|(client, identity)| tls::acceptor(identity, client));
        listeners.push((socket, acceptor.transpose()?));
    }
    let connector = identities
        .gateway
        .as_ref()
        .map(|identity| tls::connector(identity, config.names))
        .transpose()?;
    let settings = zookeeper_settings(&config, identities, &metrics)?;

    // The entry says `initializing` until there is somebody to serve.
    let (registry, registration) = zookeeper::register(settings, listening.announcement.clone());
    if let Some(socket) = admin {
        let (state, standing) = (registration.state(), registration.standing());
        let admin = Admin::new(&metrics, state, standing, registry.clone());
        tokio::spawn(admin.serve(tokio::net::TcpListener::from_std(socket)?));
    }
    let resolver = Resolver::new(registry, listening.announcement);
    let mut gateway =
        Gateway::open(listeners, resolver, connector, config.limits.clone(), metrics)?;

    let told_to_stop = CancellationToken::new();
    if let Some(socket) = control {
        let sources = Sources {
            hostname,
            zone: config.zone.clone(),
            listeners: listening.doors.clone(),
            state: registration.state(),
            standing: registration.standing(),
            streams: gateway.streams(),
        };
        control::spawn(socket, sources, told_to_stop.clone())?;
    }

    if let Some(launch) = launch {
        launch.up().context("cannot let go of the terminal")?;
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
    };
    let cutter = gateway.cutter();
    tokio::select! {
        () = stop(gateway, registration, &manager, config.limits.grace) => {}
        signal = signals.next() => {
            warn!(signal, "second signal: ending at once");
            cutter.cut().await;
            return Ok(ExitCode::from(EXIT_IMPATIENT));
        }
    }
    Ok(if failed { ExitCode::from(EXIT_SOFTWARE) } else { ExitCode::SUCCESS })
}

/// What the listeners got, for others and for people.
struct Listening {
    announcement: Announcement,
    doors: Vec<Door>,
    text: String,
}

impl Listening {
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
            doors.push(Door { address, tls, advertised });
            if advertised {
                use_ssl = tls;
                // Without a zone nobody dials us, and upstream says no port either.
                let wanted = config.zone.is_some() || listener.port == 0;
                port = wanted.then(|| config.public_port.unwrap_or(address.port()));
            }
        }
        let announcement =
            Announcement { hostname, public_port: port, zone: config.zone.clone(), use_ssl };
        let mut text = status::listening(config.zone.as_deref(), &doors);
        if let Some(admin) = admin {
            let address = admin.local_addr().context("the admin listener has no address")?;
            text.push_str(&format!("; health and metrics on {address}"));
        }
        Ok(Self { announcement, doors, text })
    }
}

fn zookeeper_settings(
    config: &Config,
    identities: &Identities,
    metrics: &Metrics,
) -> Result<Settings> {
    let zookeeper = &config.zookeeper;
    let names = if zookeeper.verify_hostnames { Names::DialedStrictly } else { Names::Any };
    let connector = tls::connector(&identities.zookeeper, names)?;
    Ok(Settings {
        hosts: zookeeper.hosts.to_string(),
        tls: tls::zookeeper(&zookeeper.tls, zookeeper.verify_hostnames)?,
        diagnosis: Diagnosis::new(zookeeper.hosts.servers.clone(), connector),
        session_timeout: zookeeper.session_timeout,
        lookup_timeout: config.limits.lookup_timeout,
        metrics: metrics.clone(),
    })
}

/// Tells the service manager how the registration stands, and the registry that we serve. Ends
/// only if the registry's task does.
async fn follow(listening: &str, registration: &Registration, manager: &Manager) {
    let mut standing: watch::Receiver<Standing> = registration.standing();
    let mut ready = false;
    loop {
        let now = standing.borrow_and_update().clone();
        manager.status(&format!("{listening}; ZooKeeper: {now}"));
        if !ready && matches!(now, Standing::Registered(_)) {
            ready = true;
            registration.running();
            manager.ready();
        }
        if standing.changed().await.is_err() {
            return;
        }
    }
}

/// Out of the registry first, so that nobody new is sent here; then no more connections; then
/// time for those that are open.
async fn stop(
    gateway: Gateway,
    mut registration: Registration,
    manager: &Manager,
    grace: Duration,
) {
    manager.stopping();
    if !registration.withdraw(WITHDRAW_PATIENCE).await {
        warn!("ZooKeeper does not answer: our entry stays until the session times out");
    }
    match gateway.drain(grace).await {
        Drained::Whole => info!("all streams have ended"),
        Drained::Cut(streams) => warn!(streams, ?grace, "grace period over: streams cut"),
    }
    registration.close(CLOSE_PATIENCE).await;
    info!("stopped");
}
