//! Reloads the configuration and its certificates while streams run: all of it or nothing.
//!
//! Everything is read, checked and built in a thread of its own; an error anywhere leaves the running
//! settings as they are. The new settings then replace the old ones in one step that cannot fail.
//! Open connections keep the settings that they began with.

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{Level, error, info, warn};

use super::Certificates;
use super::capacity;
use crate::config::{self, Config, ConfigDiff, NameCheck};
use crate::control::protocol::{ErrorReport, ReloadReport};
use crate::control::status::CertificateStatus;
use crate::control::{ReloadRequest, ReloadResult};
use crate::gateway::{Adjuster, Settings};
use crate::os::sd_notify::ServiceManager;
use crate::os::signals::ReloadSignal;
use crate::registry::zookeeper;
use crate::telemetry::metrics::Metrics;
use crate::tls::{self, Acceptor, Identity};

/// The last line of the report of a failed reload.
const NOTHING_CHANGED: &str =
    "nothing has changed; if files were being replaced just now, reload again";

const STOPPING: &str = "not reloaded: the gateway is stopping";

/// The number of reload commands that are queued while a reload is under way.
const QUEUED_COMMANDS: usize = 8;

/// Where the configuration is loaded from.
#[derive(Clone)]
pub(crate) struct ConfigSource {
    /// An absolute path, because daemonizing changes the working directory.
    pub(crate) path: PathBuf,
    /// Whether the program was started with `-d`, which overrides the log level of the file.
    pub(crate) debug: bool,
}

/// A configuration and the certificates that it names.
pub(super) struct LoadedConfig {
    pub(super) config: Config,
    pub(super) certificates: Certificates,
}

/// The settings that a running gateway uses, built from a [`LoadedConfig`].
pub(super) struct RuntimeSettings {
    pub(super) gateway: Settings,
    pub(super) zookeeper: zookeeper::Tls,
}

impl RuntimeSettings {
    /// Builds the settings. A TLS listener for which no certificate is configured any more keeps its
    /// acceptor of `running`, which has those of all listeners.
    ///
    /// # Errors
    /// A certificate cannot be used.
    pub(super) fn build(loaded: &LoadedConfig, running: &[Option<Acceptor>]) -> Result<Self> {
        let LoadedConfig { config, certificates } = loaded;
        let gateway_identity = certificates.gateway.as_ref();
        let mut acceptors = Vec::new();
        for (index, listener) in config.listeners.iter().enumerate() {
            acceptors.push(match (listener.tls, gateway_identity) {
                (Some(client), Some(identity)) => {
                    Some(tls::acceptor(identity, client, config.name_check)?)
                }
                (Some(_), None) => running.get(index).cloned().flatten(),
                (None, _) => None,
            });
        }
        let connector =
            gateway_identity.map(|identity| tls::connector(identity, config.name_check));
        let gateway = Settings {
            listeners: config.listeners.clone().into(),
            acceptors,
            connector: connector.transpose()?,
            limits: config.limits.clone(),
        };
        Ok(Self { gateway, zookeeper: zookeeper_tls(config, &certificates.zookeeper)? })
    }
}

/// Builds the TLS settings for connections to the ZooKeeper servers of `config`.
///
/// # Errors
/// The certificate cannot be used.
pub(crate) fn zookeeper_tls(config: &Config, identity: &Identity) -> Result<zookeeper::Tls> {
    let verify_hostnames = config.zookeeper.verify_hostnames;
    let names = if verify_hostnames { NameCheck::SanOnly } else { NameCheck::Off };
    Ok(zookeeper::Tls {
        certs: tls::zookeeper_certs(identity)?,
        verify_hostnames,
        connector: tls::connector(identity, names)?,
        ca_file: config.zookeeper.tls.ca.clone(),
    })
}

/// Where requests for a reload come from: SIGHUP and the command socket.
pub(super) struct ReloadRequests {
    signal: ReloadSignal,
    commands: mpsc::Receiver<ReloadRequest>,
}

impl ReloadRequests {
    /// Takes over SIGHUP, and returns the sender for commands. Must be called within a runtime.
    pub(super) fn new() -> io::Result<(mpsc::Sender<ReloadRequest>, Self)> {
        let (sender, commands) = mpsc::channel(QUEUED_COMMANDS);
        Ok((sender, Self { signal: ReloadSignal::new()?, commands }))
    }

    /// Waits for the next request, and returns where its result is sent to. A signal has no such
    /// place.
    async fn next(&mut self) -> Option<ReloadRequest> {
        tokio::select! {
            () = self.signal.next() => None,
            Some(request) = self.commands.recv() => Some(request),
        }
    }

    /// Refuses all requests, because the gateway is stopping.
    pub(super) async fn refuse(&mut self) -> Infallible {
        loop {
            let request = self.next().await;
            warn!("{STOPPING}");
            send_result(request, Err(STOPPING.to_owned().into()));
        }
    }
}

/// Sends `result` to where `request` came from. The log has it in any case, so a client that has
/// left is not an error.
fn send_result(request: Option<ReloadRequest>, result: ReloadResult) {
    if let Some(request) = request {
        let _ = request.send(result);
    }
}

/// Replaces the settings of a running gateway.
pub(super) struct Reloader {
    pub(super) source: ConfigSource,
    /// The registered host name, which changes only with a restart.
    pub(super) hostname: String,
    pub(super) running: Arc<LoadedConfig>,
    pub(super) gateway: Adjuster,
    pub(super) zookeeper: watch::Sender<zookeeper::Tls>,
    pub(super) set_log_level: Box<dyn Fn(Level) + Send + Sync>,
    pub(super) metrics: Metrics,
    /// The certificates in use, for `status`.
    pub(super) certificates: watch::Sender<Vec<CertificateStatus>>,
}

/// A complete and valid new configuration, and the settings built from it.
struct PreparedReload {
    loaded: LoadedConfig,
    settings: RuntimeSettings,
    changed: Vec<&'static str>,
    needs_restart: Vec<&'static str>,
}

impl Reloader {
    /// Serves `requests`, one after the other.
    pub(super) async fn serve(
        &mut self,
        requests: &mut ReloadRequests,
        manager: &ServiceManager,
    ) -> Infallible {
        loop {
            let request = requests.next().await;
            manager.reloading().await;
            let result = self.reload().await;
            manager.reloaded().await;
            send_result(request, result);
        }
    }

    /// Reloads, or leaves everything as it is. Logs the result.
    async fn reload(&mut self) -> ReloadResult {
        let path = self.source.path.display().to_string();
        let prepared = self.prepare_in_thread().await;
        self.metrics.reloaded(prepared.is_ok());
        match prepared {
            Ok(prepared) => Ok(self.apply(prepared)),
            Err(error) => {
                let error = format!("{error:#}");
                error!("{path} not reloaded: {}; {NOTHING_CHANGED}", error.replace('\n', "; "));
                Err(format!("not reloaded {path}:\n{error}\n{NOTHING_CHANGED}").into())
            }
        }
    }

    /// Runs [`prepare`] in a thread of its own, because disks may be slow. A panic there only fails
    /// the reload.
    async fn prepare_in_thread(&self) -> Result<PreparedReload> {
        let source = self.source.clone();
        let hostname = self.hostname.clone();
        let running = Arc::clone(&self.running);
        let acceptors = self.gateway.settings().acceptors;
        let (sender, result) = oneshot::channel();
        let work = move || {
            // The receiver is gone if the gateway is stopping.
            let _ = sender.send(prepare(&source, hostname, &running, &acceptors));
        };
        let thread = thread::Builder::new().name("reload".to_owned());
        thread.spawn(work).context("cannot start a thread")?;
        result.await.context("the reload thread panicked; please report the log's error")?
    }

    /// Replaces the running settings by `prepared` ones.
    fn apply(&mut self, prepared: PreparedReload) -> ReloadReport {
        let PreparedReload { loaded, mut settings, changed, needs_restart } = prepared;
        let LoadedConfig { config, certificates } = &loaded;
        let connections =
            capacity::refit(&config.limits, &self.running.config.limits, &self.gateway);
        settings.gateway.limits.fit_connections(connections);
        self.gateway.adjust(settings.gateway);
        self.zookeeper.send_replace(settings.zookeeper);
        (self.set_log_level)(config.log.level);
        certificates.export_expiry(&self.metrics);
        self.certificates.send_replace(certificates.status(config));

        let path = self.source.path.display();
        match (changed.is_empty(), needs_restart.is_empty()) {
            (false, _) => info!(%path, changed = changed.join("; "), "reloaded"),
            (true, true) => info!(%path, "reloaded; nothing has changed"),
            (true, false) => info!(%path, "reloaded; all changes need a restart"),
        }
        if !needs_restart.is_empty() {
            warn!(keys = needs_restart.join("; "), "changed keys take effect after a restart");
        }
        let mut warnings: Vec<String> =
            config.log.new_warnings(&self.running.config.log).into_iter().collect();
        warnings.extend(config.warnings());
        for warning in &warnings {
            warn!("{warning}");
        }
        certificates.log_findings();
        warnings.extend(certificates.findings().map(|finding| finding.to_string()));

        let configuration = path.to_string();
        self.running = Arc::new(loaded);
        ReloadReport {
            configuration,
            changed: changed.into_iter().map(str::to_owned).collect(),
            needs_restart: needs_restart.into_iter().map(str::to_owned).collect(),
            warnings,
        }
    }
}

/// Loads and checks the configuration of `source`, and builds the settings that replace the `running`
/// ones.
///
/// # Errors
/// All errors of the configuration, or of its files, or all new reasons why peers would refuse our
/// certificates.
fn prepare(
    source: &ConfigSource,
    hostname: String,
    running: &LoadedConfig,
    acceptors: &[Option<Acceptor>],
) -> Result<PreparedReload> {
    let ConfigSource { path, debug } = source;
    let mut new = config::load(path)?;
    new.log = new.log.with_debug(*debug);
    let certificates = Certificates::load(&new, || hostname)?;
    let errors = certificates.newly_broken(&running.certificates);
    if !errors.is_empty() {
        bail!(errors.join("\n"));
    }
    let ConfigDiff { config, applied, waiting } = running.config.diff(new, config::is_toml(path));
    let mut changed = applied;
    if certificates.gateway != running.certificates.gateway {
        changed.push("certificate, key or CA of the gateway");
    }
    if certificates.zookeeper != running.certificates.zookeeper {
        // The open connection keeps the certificate that it was made with.
        changed.push("certificate, key or CA for ZooKeeper, from the next connection on");
    }
    let loaded = LoadedConfig { config, certificates };
    let settings = RuntimeSettings::build(&loaded, acceptors)?;
    Ok(PreparedReload { loaded, settings, changed, needs_restart: waiting })
}

impl From<String> for ErrorReport {
    fn from(error: String) -> Self {
        Self { error }
    }
}
