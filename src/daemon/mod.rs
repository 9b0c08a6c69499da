//! The life of the gateway process: this file starts it, [`run`](mod@run) serves, [`reload`]
//! replaces its settings, and [`shutdown`] stops it.

mod capacity;
mod certificates;
mod reload;
mod run;
mod shutdown;
mod supervisor;

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use tracing::{info, warn};

pub(crate) use self::certificates::Certificates;
pub(crate) use self::reload::{ConfigSource, LoadedConfig, zookeeper_tls};

use self::run::Sockets;
use crate::config::{self, Config};
use crate::control::socket_file::{self, SocketFile};
use crate::gateway::accept::socket::bind;
use crate::os::daemonize::daemonize;
use crate::os::pid_file::PidFile;
use crate::os::privileges::{self, RunAsUser};
use crate::os::runtime;
use crate::os::socket_activation::InheritedSockets;
use crate::telemetry::log::LogGuard;

/// Starts the gateway, and returns when it has stopped. As root it runs as `user` once its sockets
/// are bound. With a `pid_file` it daemonizes: this returns in another process than it was called
/// in.
///
/// # Errors
/// Why the gateway cannot start.
pub(crate) fn start(
    source: ConfigSource,
    loaded: LoadedConfig,
    user: Option<&RunAsUser>,
    mut pid_file: Option<PidFile>,
    logging: &mut LogGuard,
) -> Result<ExitCode> {
    let LoadedConfig { config, certificates } = loaded;

    // 1. Harden the process, and start the log's thread unless a fork or a change of user follows,
    //    which needs a single thread.
    privileges::harden();
    if user.is_none() && pid_file.is_none() {
        logging.start_writer()?;
    }

    // 2. Log what starts, and what the configuration warns of. The lookup of our own name can take
    //    as long as name servers do, so it comes before SIGTERM loses its default action.
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
    certificates.log_findings();
    for warning in config.warnings() {
        warn!("{warning}");
    }

    // 3. As root, if we are: bind the listeners and create the directory of the command socket.
    let (listeners, admin) = bind_listeners(&config)?;
    if let Some(path) = config.explicit_command_socket() {
        socket_file::create_directory(path, user)?;
    }

    // 4. Drop root privileges. Files that are read again later must be readable afterwards: an
    //    error now is better than a failing reload or stream.
    match (user, &config.user) {
        (Some(user), _) => {
            user.drop_privileges()?;
            user.check_readable(config.files())?;
        }
        (None, Some(user)) => info!(user, "not started as root: user is ignored"),
        (None, None) => {}
    }

    // 5. As the user who owns it: bind the command socket.
    let (control, _socket_file) = bind_command_socket(config.control.as_deref()).unzip();

    // 6. Daemonize. Relative paths may lead elsewhere from then on, so the certificates are loaded
    //    once more as a check.
    let guard = match &mut pid_file {
        None => None,
        Some(pid_file) => {
            let guard = daemonize()?;
            pid_file.write(std::process::id())?;
            Certificates::load(&config, || hostname.clone())?;
            Some(guard)
        }
    };
    if user.is_some() || guard.is_some() {
        warn_if_not_reloadable(&source);
    }

    // 7. Start threads, and run.
    logging.start_writer()?;
    let runtime = runtime::start()?;
    let sockets = Sockets { listeners, admin, control };
    let loaded = LoadedConfig { config, certificates };
    // The guard is dropped with an error, and notifies the parent when nothing can fail any more.
    let status = runtime.block_on(async {
        let running = run::start(source, loaded, hostname, sockets, logging)?;
        if let Some(guard) = guard {
            guard.notify_parent().context("cannot close the terminal's standard streams")?;
        }
        Ok(running.until_stopped().await)
    });
    // Does not wait for tasks that a second signal has left running.
    runtime.shutdown_background();
    status
}

/// Returns the name that will be registered, and its port if one will be and is known before the
/// sockets are bound.
fn registered_address(config: &Config, hostname: &str) -> String {
    let advertised = config.listeners.iter().find(|listener| listener.advertised);
    let port = config.public_port.or(advertised.map(|listener| listener.port));
    match port {
        Some(port) if port != 0 && config.zone.is_some() => format!("{hostname}:{port}"),
        _ => hostname.to_owned(),
    }
}

/// Returns the sockets of all listeners, and that for health and metrics: those from the service
/// manager, and all others bound here.
fn bind_listeners(config: &Config) -> Result<(Vec<TcpListener>, Option<TcpListener>)> {
    let mut inherited = InheritedSockets::from_environment()?;
    let mut open = |host: &str, port| {
        let address = resolve(host, port)?;
        inherited.take(address)?.map_or_else(|| bind(address), Ok)
    };
    let listeners = config.listeners.iter().map(|listener| open(&listener.host, listener.port));
    let listeners = listeners.collect::<Result<_>>()?;
    let admin = config.admin.as_ref().map(|(host, port)| open(host, *port)).transpose()?;
    inherited.ensure_all_used()?;
    Ok((listeners, admin))
}

/// Returns the address to listen on. IPv6 addresses are preferred, as by Zuul's program.
fn resolve(host: &str, port: u16) -> Result<SocketAddr> {
    let addresses: Vec<_> = (host, port)
        .to_socket_addrs()
        .with_context(|| format!("cannot resolve {host}, which is configured to listen on"))?
        .collect();
    let ipv6 = addresses.iter().find(|address| address.is_ipv6());
    ipv6.or(addresses.first()).copied().with_context(|| format!("{host} has no address"))
}

/// Binds the command socket, if there is one. A failure is only a warning, because signals do
/// without it.
fn bind_command_socket(path: Option<&Path>) -> Option<(UnixListener, SocketFile)> {
    let path = path?;
    socket_file::bind(path)
        .inspect_err(|error| {
            warn!(
                path = %path.display(), %error,
                "cannot create the command socket: stop, reload, status and resolve do not reach this gateway"
            );
        })
        .ok()
}

/// Warns if the configuration cannot be loaded again: as another user or in another directory, it
/// or a file that it names by a relative path may be out of reach. Only a reload needs it.
fn warn_if_not_reloadable(source: &ConfigSource) {
    if let Err(error) = config::load(&source.path) {
        let error = format!("{error:#}").replace('\n', "; ");
        warn!("configuration cannot be reloaded until this is fixed: {error}");
    }
}
