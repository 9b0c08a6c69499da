//! Reading the configuration and its certificates again while streams run: all of it or nothing.
//!
//! Everything is read, checked and made ready aside; a fault anywhere leaves what runs as it is.
//! Then it takes the place of the old in one step that cannot fail. Connections that are open keep
//! what they began with.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{error, info, warn};

use super::Certificates;
use crate::config;
use crate::config::{Config, ConfigDiff, Limits, NameCheck};
use crate::control::status::CertificateStatus;
use crate::control::{RELOADED, Reload};
use crate::gateway::{Adjuster, Settings};
use crate::os::sd_notify::ServiceManager;
use crate::os::signals::ReloadSignal;
use crate::os::{fd_limit, memory_limit};
use crate::registry::zookeeper;
use crate::telemetry::log::Volume;
use crate::telemetry::metrics::Metrics;
use crate::tls;
use crate::tls::{Acceptor, Identity};

/// What people can do about a reload that failed.
const MEND: &str = "nothing has changed; if files were being replaced just now, reload again";

/// Commands that wait while a reload is under way; more wait for a place among them.
const COMMANDS_WAITING: usize = 8;

/// Where the configuration comes from.
#[derive(Clone)]
pub(crate) struct ConfigSource {
    /// Absolute: the working directory becomes another.
    pub(crate) path: PathBuf,
    /// Started with `-d`.
    pub(crate) debug: bool,
}

/// A configuration with its certificates.
pub(crate) struct LoadedConfig {
    pub(crate) config: Config,
    pub(crate) identities: Certificates,
}

/// What a running gateway takes from them, made and ready to use.
pub(crate) struct RuntimeSettings {
    pub(crate) settings: Settings,
    pub(crate) zookeeper: zookeeper::Tls,
}

impl RuntimeSettings {
    /// Makes it. `kept` are the listeners' TLS sides now, of which those stay for which no
    /// certificate is configured any more.
    ///
    /// # Errors
    /// A certificate cannot be used.
    pub(crate) fn of(configured: &LoadedConfig, kept: &[Option<Acceptor>]) -> Result<Self> {
        let LoadedConfig { config, identities } = configured;
        let Certificates { gateway, zookeeper } = identities;
        let acceptors = config.listeners.iter().enumerate().map(|(index, listener)| {
            match (listener.tls, gateway) {
                (Some(client), Some(identity)) => {
                    tls::acceptor(identity, client, config.name_check).map(Some)
                }
                (Some(_), None) => Ok(kept.get(index).cloned().flatten()),
                (None, _) => Ok(None),
            }
        });
        let connector =
            gateway.as_ref().map(|identity| tls::connector(identity, config.name_check));
        let settings = Settings {
            listeners: config.listeners.clone().into(),
            acceptors: acceptors.collect::<Result<_>>()?,
            connector: connector.transpose()?,
            limits: config.limits.clone(),
        };
        Ok(Self { settings, zookeeper: zookeeper_tls(config, zookeeper)? })
    }
}

/// TLS towards the ZooKeeper of `config`, with `identity`.
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

/// Who asks for reloads.
pub(crate) struct ReloadRequests {
    signal: ReloadSignal,
    commands: mpsc::Receiver<Reload>,
}

impl ReloadRequests {
    /// Takes the signal over, and returns what takes commands. Needs a runtime.
    pub(crate) fn new() -> io::Result<(mpsc::Sender<Reload>, Self)> {
        let (sender, commands) = mpsc::channel(COMMANDS_WAITING);
        Ok((sender, Self { signal: ReloadSignal::new()?, commands }))
    }

    /// Waits for the next order, and returns who is to be told how it went: nobody if it is a
    /// signal.
    async fn next(&mut self) -> Option<Reload> {
        tokio::select! {
            () = self.signal.next() => None,
            Some(reload) = self.commands.recv() => Some(reload),
        }
    }

    /// Refuses all orders: the gateway is stopping.
    pub(crate) async fn refuse(&mut self) -> Infallible {
        loop {
            if let Some(reload) = self.next().await {
                // Nobody listens any more: nobody wants to know.
                let _ = reload.send("not reloaded: the gateway is stopping\n".to_owned());
            }
            warn!("not reloaded: the gateway is stopping");
        }
    }
}

/// Reloads what a gateway runs with.
pub(crate) struct Reloader {
    pub(crate) source: ConfigSource,
    /// The name that is registered, which takes a restart to change.
    pub(crate) hostname: String,
    /// What runs now.
    pub(crate) running: Arc<LoadedConfig>,
    pub(crate) gateway: Adjuster,
    pub(crate) zookeeper: watch::Sender<zookeeper::Tls>,
    pub(crate) volume: Volume,
    pub(crate) metrics: Metrics,
    /// Those in use, for `status`.
    pub(crate) certificates: watch::Sender<Vec<CertificateStatus>>,
}

/// All that a reload changes.
struct PreparedReload {
    configured: LoadedConfig,
    live: RuntimeSettings,
    taken: Vec<&'static str>,
    waiting: Vec<&'static str>,
}

impl Reloader {
    /// Fulfils `orders`, one after the other.
    pub(crate) async fn serve(
        &mut self,
        orders: &mut ReloadRequests,
        manager: &ServiceManager,
    ) -> Infallible {
        loop {
            let asked = orders.next().await;
            manager.reloading().await;
            let outcome = self.reload().await;
            manager.reloaded().await;
            if let Some(asked) = asked {
                // Nobody listens any more: the log knows as well.
                let _ = asked.send(outcome);
            }
        }
    }

    /// Reloads, or leaves everything as it is, and says which, in lines.
    async fn reload(&mut self) -> String {
        let path = self.source.path.display().to_string();
        let prepared = self.prepared().await;
        self.metrics.reloaded(prepared.is_ok());
        match prepared {
            Ok(prepared) => self.apply(prepared),
            Err(fault) => {
                let faults = format!("{fault:#}");
                error!("{path} not reloaded: {}; {MEND}", faults.replace('\n', "; "));
                format!("not reloaded {path}:\n{faults}\n{MEND}\n")
            }
        }
    }

    /// Prepares in a thread of its own: disks may be slow, and a fault of this program ends nothing
    /// but that thread.
    async fn prepared(&self) -> Result<PreparedReload> {
        let (source, running) = (self.source.clone(), Arc::clone(&self.running));
        let hostname = self.hostname.clone();
        let acceptors = self.gateway.settings().acceptors;
        let (done, outcome) = oneshot::channel();
        let work = move || {
            // Whoever waits no more is stopping.
            let _ = done.send(prepare(&source, hostname, &running, &acceptors));
        };
        thread::Builder::new().name("reload".to_owned()).spawn(work).context("no thread")?;
        outcome.await.context("the program broke off; please report what it has logged")?
    }

    /// Puts what is `prepared` in the place of what runs.
    fn apply(&mut self, prepared: PreparedReload) -> String {
        let PreparedReload { configured, mut live, taken, waiting } = prepared;
        let (wanted, before) = (&configured.config.limits, &self.running.config.limits);
        let same = |of: fn(&Limits) -> usize| of(wanted) == of(before);
        let fitting = if same(|limits| limits.connections) && same(|limits| limits.stream_buffer) {
            // What the limits of open files and of memory leave of it is known, and was told.
            self.gateway.settings().limits.connections
        } else {
            fd_limit::budget(memory_limit::budget(wanted))
        };
        live.settings.limits.fit_connections(fitting);
        self.gateway.adjust(live.settings);
        self.zookeeper.send_replace(live.zookeeper);
        self.volume.set(configured.config.log.level);
        configured.identities.export_expiry(&self.metrics);
        let certificates = configured.identities.certificates(&configured.config);
        self.certificates.send_replace(certificates);

        let path = self.source.path.display();
        let (changed, restart) = (taken.join("; "), waiting.join("; "));
        let mut outcome = format!("{RELOADED}{path}\n");
        if !taken.is_empty() {
            info!(%path, changed, "reloaded");
            let _ = writeln!(outcome, "changed: {changed}");
        } else if waiting.is_empty() {
            info!(%path, "reloaded; nothing has changed");
            outcome.push_str("nothing has changed\n");
        } else {
            info!(%path, "reloaded; nothing has changed that can change without a restart");
        }
        if !waiting.is_empty() {
            warn!(keys = restart, "these differ now and wait for a restart");
            let _ = writeln!(outcome, "changes with a restart: {restart}");
        }
        let (log, before) = (&configured.config.log, &self.running.config.log);
        if let Some(log_config) = log.new_warnings(before) {
            warn!("{log_config}");
            let _ = writeln!(outcome, "{log_config}");
        }
        for warning in configured.config.warnings() {
            warn!("{warning}");
            let _ = writeln!(outcome, "{warning}");
        }
        configured.identities.log_findings();
        for finding in configured.identities.findings() {
            let _ = writeln!(outcome, "{finding}");
        }
        self.running = Arc::new(configured);
        outcome
    }
}

/// Reads everything that `source` names and makes of it what takes the place of `running`.
///
/// # Errors
/// All faults of the configuration; or of its files; or what would make peers refuse us.
fn prepare(
    source: &ConfigSource,
    hostname: String,
    running: &LoadedConfig,
    acceptors: &[Option<Acceptor>],
) -> Result<PreparedReload> {
    let ConfigSource { path, debug } = source;
    let mut wanted = config::load(path)?;
    wanted.log = wanted.log.with_debug(*debug);
    let identities = Certificates::load(&wanted, || hostname)?;
    let errors = identities.newly_broken(&running.identities);
    if !errors.is_empty() {
        bail!(errors.join("\n"));
    }
    let ConfigDiff { config, mut taken, waiting } =
        running.config.change(wanted, config::is_toml(path));
    if identities.gateway != running.identities.gateway {
        taken.push("certificate, key or authorities of the gateway");
    }
    if identities.zookeeper != running.identities.zookeeper {
        // The connection that there is goes on with the ones it began with.
        taken.push("certificate, key or authorities for ZooKeeper, from the next connection on");
    }
    let configured = LoadedConfig { config, identities };
    let live = RuntimeSettings::of(&configured, acceptors)?;
    Ok(PreparedReload { configured, live, taken, waiting })
}
