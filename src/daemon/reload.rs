//! Reloads the configuration and its certificates while streams run: all of it or nothing.
//!
//! Everything is read, checked and built in a thread of its own; an error anywhere leaves the
//! running settings as they are. The new settings then replace the old ones in one step that cannot
//! fail. Open connections keep the settings that they began with.

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{Level, error, info, warn};

use super::capacity;
use super::certificates::Certificates;
use crate::config::{self, Config, ConfigDiff, NameCheck};
use crate::control::protocol::ReloadReport;
use crate::control::status::CertificateStatus;
use crate::control::{ReloadRequest, ReloadResult};
use crate::gateway::{ListenerSettings, Settings, SettingsHandle};
use crate::os::sd_notify::ServiceManager;
use crate::registry::zookeeper;
use crate::telemetry::metrics::Metrics;
use crate::tls::{self, Identity};

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
pub(crate) struct LoadedConfig {
    pub(crate) config: Config,
    pub(crate) certificates: Certificates,
}

/// The settings that a running gateway uses, built from a [`LoadedConfig`].
pub(super) struct RuntimeSettings {
    pub(super) gateway: Settings,
    pub(super) zookeeper: zookeeper::Tls,
}

impl RuntimeSettings {
    /// Builds the settings. A TLS listener for which no certificate is configured any more keeps
    /// its acceptor of `running`, the settings of the running listeners.
    ///
    /// # Errors
    /// A certificate cannot be used.
    pub(super) fn build(loaded: &LoadedConfig, running: &[ListenerSettings]) -> Result<Self> {
        let LoadedConfig { config, certificates } = loaded;
        let gateway_identity = certificates.gateway.as_ref();
        let mut listeners = Vec::new();
        for (index, listener) in config.listeners.iter().enumerate() {
            let acceptor = match (listener.tls, gateway_identity) {
                (Some(client), Some(identity)) => {
                    Some(tls::acceptor(identity, client, config.name_check)?)
                }
                (Some(_), None) => running.get(index).and_then(|running| running.acceptor.clone()),
                (None, _) => None,
            };
            listeners.push(ListenerSettings { config: listener.clone(), acceptor });
        }
        let connector =
            gateway_identity.map(|identity| tls::connector(identity, config.name_check));
        let gateway = Settings {
            listeners: listeners.into(),
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
    hangup: Signal,
    commands: mpsc::Receiver<ReloadRequest>,
}

impl ReloadRequests {
    /// Takes over SIGHUP, and returns the sender for commands. Must be called within a runtime.
    pub(super) fn new() -> io::Result<(mpsc::Sender<ReloadRequest>, Self)> {
        let (sender, commands) = mpsc::channel(QUEUED_COMMANDS);
        Ok((sender, Self { hangup: signal(SignalKind::hangup())?, commands }))
    }

    /// Waits for the next request, and returns where its result is sent to. A signal has no such
    /// place.
    async fn next(&mut self) -> Option<ReloadRequest> {
        tokio::select! {
            _ = self.hangup.recv() => None,
            Some(request) = self.commands.recv() => Some(request),
        }
    }

    /// Refuses all requests, because the gateway is stopping.
    pub(super) async fn refuse(&mut self) -> Infallible {
        loop {
            let request = self.next().await;
            warn!("{STOPPING}");
            send_result(request, Err(STOPPING.to_owned()));
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
    pub(super) gateway: SettingsHandle,
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
                Err(format!("not reloaded {path}:\n{error}\n{NOTHING_CHANGED}"))
            }
        }
    }

    /// Runs [`prepare`] in a thread of its own, because disks may be slow. A panic there only fails
    /// the reload.
    async fn prepare_in_thread(&self) -> Result<PreparedReload> {
        let source = self.source.clone();
        let hostname = self.hostname.clone();
        let running = Arc::clone(&self.running);
        let listeners = self.gateway.settings().listeners;
        let (sender, result) = oneshot::channel();
        let work = move || {
            // The receiver is gone if the gateway is stopping.
            let _ = sender.send(prepare(&source, hostname, &running, &listeners));
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
        self.gateway.replace(settings.gateway);
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

/// Loads and checks the configuration of `source`, and builds the settings that replace the
/// `running` ones.
///
/// # Errors
/// All errors of the configuration, or of its files, or all new reasons why peers would refuse our
/// certificates.
fn prepare(
    source: &ConfigSource,
    hostname: String,
    running: &LoadedConfig,
    listeners: &[ListenerSettings],
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
    let settings = RuntimeSettings::build(&loaded, listeners)?;
    Ok(PreparedReload { loaded, settings, changed, needs_restart: waiting })
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fs;
    use std::path::Path;
    use std::sync::Mutex;
    use std::time::Duration;

    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose,
        IsCa, KeyPair,
    };
    use tempfile::TempDir;

    use crate::gateway::Server;
    use crate::gateway::routing::Router;
    use crate::model::component::OwnComponent;
    use crate::registry::Registry;
    use crate::registry::in_memory::InMemoryRegistry;
    use crate::telemetry::otlp::Tracer;

    const CONFIG: &str = "\
hostname = \"localhost\"
zone = \"west\"

[[listener]]
address = \"127.0.0.1:0\"

[zookeeper]
hosts = \"localhost:2281\"
tls_cert = \"DIRECTORY/cert.pem\"
tls_key = \"DIRECTORY/key.pem\"
tls_ca = \"DIRECTORY/ca.pem\"

[limits]
grace = \"5s\"

[log]
level = \"info\"
";

    /// A reloader, and what it changes.
    struct Fixture {
        directory: TempDir,
        reloader: Reloader,
        /// Its settings are what connections get.
        gateway: Server,
        zookeeper: watch::Receiver<zookeeper::Tls>,
        log_levels: Arc<Mutex<Vec<Level>>>,
    }

    impl Fixture {
        fn new() -> Self {
            tls::install_provider();
            let directory = tempfile::tempdir().expect("a directory");
            write_identity(directory.path());
            let path = directory.path().join("gateway.toml");
            let text = CONFIG.replace("DIRECTORY", &directory.path().display().to_string());
            fs::write(&path, text).expect("a configuration");
            let config = config::load(&path).expect("a valid configuration");
            let certificates =
                Certificates::load(&config, || "localhost".to_owned()).expect("certificates");
            let loaded = LoadedConfig { config, certificates };
            let settings = RuntimeSettings::build(&loaded, &[]).expect("settings");
            let registry = Registry::InMemory(Arc::new(InMemoryRegistry::default()));
            let component = OwnComponent {
                hostname: "localhost".to_owned(),
                public_port: None,
                zone: Some("west".to_owned()),
                use_ssl: false,
            };
            let metrics = Metrics::default();
            let router = Router::new(registry, component);
            let gateway = Server::start(
                Vec::new(),
                router,
                settings.gateway,
                metrics.clone(),
                Tracer::default(),
            );
            let gateway = gateway.expect("a gateway");
            let (zookeeper_sender, zookeeper) = watch::channel(settings.zookeeper);
            let log_levels = Arc::new(Mutex::new(Vec::new()));
            let log_levels_sender = Arc::clone(&log_levels);
            let reloader = Reloader {
                source: ConfigSource { path, debug: false },
                hostname: "localhost".to_owned(),
                running: Arc::new(loaded),
                gateway: gateway.settings_handle(),
                zookeeper: zookeeper_sender,
                set_log_level: Box::new(move |level| {
                    log_levels_sender.lock().expect("a lock").push(level);
                }),
                metrics,
                certificates: watch::Sender::new(Vec::new()),
            };
            Self { directory, reloader, gateway, zookeeper, log_levels }
        }

        fn edit(&self, from: &str, to: &str) {
            let path = &self.reloader.source.path;
            let text = fs::read_to_string(path).expect("the configuration");
            assert!(text.contains(from), "{text}");
            fs::write(path, text.replace(from, to)).expect("the configuration");
        }

        fn grace(&self) -> Duration {
            self.gateway.grace()
        }
    }

    /// Writes a certificate for `localhost`, its key and its CA.
    fn write_identity(directory: &Path) {
        let mut ca = CertificateParams::default();
        ca.distinguished_name.push(DnType::CommonName, "test CA");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_key = KeyPair::generate().expect("a key");
        let ca = CertifiedIssuer::self_signed(ca, ca_key).expect("a CA");
        let mut params =
            CertificateParams::new(["localhost".to_owned()]).expect("a valid DNS name");
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &ca).expect("a certificate");
        for (name, pem) in [
            ("cert.pem", certificate.pem()),
            ("key.pem", key.serialize_pem()),
            ("ca.pem", ca.pem()),
        ] {
            fs::write(directory.join(name), pem).expect("a file");
        }
    }

    #[tokio::test]
    async fn changed_limit_and_log_level_take_effect_and_are_reported() {
        let mut fixture = Fixture::new();
        fixture.edit("grace = \"5s\"", "grace = \"6s\"");
        fixture.edit("level = \"info\"", "level = \"debug\"");
        let report = fixture.reloader.reload().await.expect("a reload");
        assert_eq!(report.changed, ["limits.grace", "log.level"]);
        assert!(report.needs_restart.is_empty(), "{report:?}");
        assert_eq!(report.configuration, fixture.reloader.source.path.display().to_string());
        assert_eq!(fixture.grace(), Duration::from_secs(6));
        assert_eq!(*fixture.log_levels.lock().expect("a lock"), [Level::DEBUG]);
        // The next one compares with what is in use now.
        let report = fixture.reloader.reload().await.expect("a reload");
        assert!(report.changed.is_empty(), "{report:?}");
    }

    #[tokio::test]
    async fn key_that_needs_a_restart_keeps_its_value_and_is_reported_each_time() {
        let mut fixture = Fixture::new();
        fixture.edit("zone = \"west\"", "zone = \"east\"");
        for _ in 0..2 {
            let report = fixture.reloader.reload().await.expect("a reload");
            assert_eq!(report.needs_restart, ["zone"]);
            assert!(report.changed.is_empty(), "{report:?}");
            assert_eq!(fixture.reloader.running.config.zone.as_deref(), Some("west"));
        }
    }

    #[tokio::test]
    async fn one_error_in_the_configuration_prevents_all_changes() {
        let mut fixture = Fixture::new();
        let running = Arc::clone(&fixture.reloader.running);
        fixture.edit("grace = \"5s\"", "grace = \"6s\"");
        fixture.edit("level = \"info\"", "level = \"loud\"");
        let error = fixture.reloader.reload().await.expect_err("an error");
        let lines: Vec<_> = error.lines().collect();
        assert!(lines[0].starts_with("not reloaded ") && lines[1].contains("log.level"), "{error}");
        assert_eq!(lines[2..], [NOTHING_CHANGED]);
        assert!(Arc::ptr_eq(&running, &fixture.reloader.running));
        assert_eq!(fixture.grace(), Duration::from_secs(5));
        assert!(fixture.log_levels.lock().expect("a lock").is_empty());
    }

    #[tokio::test]
    async fn unusable_certificate_prevents_all_changes() {
        let mut fixture = Fixture::new();
        fixture.edit("grace = \"5s\"", "grace = \"6s\"");
        fs::write(fixture.directory.path().join("cert.pem"), "").expect("a file");
        let error = fixture.reloader.reload().await.expect_err("an error");
        assert!(error.contains("cert.pem"), "{error}");
        assert_eq!(fixture.grace(), Duration::from_secs(5));
        assert!(!fixture.zookeeper.has_changed().expect("the reloader"));
    }

    #[tokio::test]
    async fn renewed_certificate_reaches_the_registry() {
        let mut fixture = Fixture::new();
        write_identity(fixture.directory.path());
        let report = fixture.reloader.reload().await.expect("a reload");
        let changed = "certificate, key or CA for ZooKeeper, from the next connection on";
        assert_eq!(report.changed, [changed]);
        assert!(fixture.zookeeper.has_changed().expect("the reloader"));
        assert_eq!(fixture.reloader.certificates.borrow().len(), 1);
    }

    #[tokio::test]
    async fn request_gets_the_result_of_its_reload() {
        let mut fixture = Fixture::new();
        let (sender, mut requests) = ReloadRequests::new().expect("a signal handler");
        let manager = ServiceManager::at("", None);
        let (result_sender, result) = oneshot::channel();
        sender.send(result_sender).await.expect("the receiver");
        tokio::select! {
            never = fixture.reloader.serve(&mut requests, &manager) => match never {},
            result = result => {
                let report = result.expect("a result").expect("a reload");
                assert!(report.changed.is_empty(), "{report:?}");
            }
        }
    }

    #[tokio::test]
    async fn request_is_refused_while_the_gateway_stops() {
        let (sender, mut requests) = ReloadRequests::new().expect("a signal handler");
        let (result_sender, result) = oneshot::channel();
        sender.send(result_sender).await.expect("the receiver");
        tokio::select! {
            never = requests.refuse() => match never {},
            result = result => {
                let error = result.expect("a result").expect_err("a refusal");
                assert_eq!(error, STOPPING);
            }
        }
    }
}
