//! `zuul-fingergw check`: reports all errors of a configuration, a summary of the gateway that it
//! makes, and with `--connect` what is in ZooKeeper.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, anyhow};

use super::load::{ValidatedConfig, load, report_config_error};
use crate::config;
use crate::config::Config;
use crate::control::socket_file;
use crate::daemon;
use crate::os::file::check_writable;
use crate::os::privileges::RunAsUser;
use crate::registry::zookeeper::survey::{Survey, survey};
use crate::telemetry::log;
use crate::tls::Identity;

/// Checks the configuration in `path`, and with `connect` its ZooKeeper.
pub(crate) fn run(path: Option<&Path>, connect: bool) -> ExitCode {
    let config = match load(path).and_then(check) {
        Ok(config) => config,
        Err(error) => return report_config_error(&error),
    };
    for warning in warnings(&config) {
        eprintln!("{warning}");
    }
    println!("{}: OK", config.path.display());
    for (key, value) in summary(&config) {
        println!("  {key}: {value}");
    }
    if !connect {
        return ExitCode::SUCCESS;
    }
    match survey_zookeeper(&config) {
        Ok(survey) => {
            print!("{}", survey.text());
            if survey.is_zuul() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("cannot get a session with ZooKeeper: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Checks for errors that would prevent a start, or make peers refuse our certificates.
fn check(validated: ValidatedConfig) -> Result<ValidatedConfig> {
    let ValidatedConfig { config, certificates, user, .. } = &validated;
    log::check(&config.log, user.as_ref())?;
    if let Some(socket) = config.explicit_command_socket() {
        socket_file::missing_directory(socket)?;
    }
    if let Some(user) = user {
        user.impersonate(|| user.check_readable(config.files()))??;
    }
    if certificates.findings().any(|finding| finding.is_error()) {
        let lines: Vec<_> = certificates.findings().map(|finding| finding.to_string()).collect();
        return Err(anyhow!(lines.join("\n")));
    }
    Ok(validated)
}

/// Returns warnings: what works and is most likely a mistake.
fn warnings(validated: &ValidatedConfig) -> Vec<String> {
    let ValidatedConfig { path, config, certificates, user } = validated;
    let mut warnings: Vec<_> = certificates.findings().map(|finding| finding.to_string()).collect();
    warnings.extend(config.warnings());
    warnings.extend(config.log.ignored());
    if let Some(socket) = config.explicit_command_socket() {
        warnings.extend(command_socket_warning(socket, user.as_ref()));
    }
    if let Some(pid_file) = config.explicit_pid_file()
        && let Some(directory) = pid_file.parent().filter(|directory| !directory.exists())
    {
        warnings.push(format!(
            "pid file {}: the directory {} does not exist; a start without -f would fail",
            pid_file.display(),
            directory.display()
        ));
    }
    let log_config = config.log.log_config.iter().map(|log_config| Path::new(&log_config.file));
    let read_by_reload = log_config.chain([path.as_path()]);
    if let Some(user) = user
        && let Ok(Err(error)) = user.impersonate(|| user.check_readable(read_by_reload))
    {
        warnings.push(format!("{error}; the gateway starts, but cannot reload"));
    }
    warnings
}

/// Returns a warning if the gateway could not create its command socket. As root it creates a
/// missing directory.
fn command_socket_warning(socket: &Path, user: Option<&RunAsUser>) -> Option<String> {
    let directory = socket.parent()?;
    match (user, directory.exists()) {
        (Some(user), true) => {
            let error = user.impersonate(|| check_writable(directory)).ok()?.err()?;
            Some(format!(
                "cannot create the command socket {}: its directory: {error} (as user {}); stop, \
                 reload, status and resolve need it",
                socket.display(),
                user.name()
            ))
        }
        (None, false) => {
            let error = check_writable(directory.parent()?).err()?;
            Some(format!(
                "cannot create the command socket {}: the directory {} does not exist and cannot \
                 be created: {error}; a start as this user would fail",
                socket.display(),
                directory.display()
            ))
        }
        _ => None,
    }
}

/// Returns a summary of a gateway with this configuration, as pairs of a key and a value.
fn summary(validated: &ValidatedConfig) -> Vec<(&'static str, String)> {
    let ValidatedConfig { config, certificates, user, .. } = validated;
    let program = format!("zuul-fingergw {}, features: {}", env!("CARGO_PKG_VERSION"), features());
    let mut lines = vec![("program", program), ("registers as", registration(config))];
    for listener in &config.listeners {
        let tls = if listener.tls.is_some() { "TLS" } else { "plain" };
        lines.push(("listens on", format!("{}, {tls}", listener.address())));
    }
    if let (Some(files), Some(identity)) = (&config.tls, &certificates.gateway) {
        lines.push(("certificate", certificate(&files.cert, identity)));
    }
    let zookeeper = &config.zookeeper;
    let names = if zookeeper.verify_hostnames { "verified" } else { "not verified" };
    lines.push(("ZooKeeper", format!("{}, host names {names}", zookeeper.hosts)));
    let own = certificate(&zookeeper.tls.cert, &certificates.zookeeper);
    lines.push(("certificate for ZooKeeper", own));
    if let Some((host, port)) = &config.admin {
        lines.push(("health and metrics", config::display_address(host, *port)));
    }
    if let Some(socket) = &config.control {
        lines.push(("command socket", socket.display().to_string()));
    }
    let user = match (user, &config.user) {
        (Some(_), Some(user)) => user.clone(),
        (None, Some(user)) => format!("{user}, if started as root"),
        (_, None) => return lines,
    };
    lines.push(("user", user));
    lines
}

/// Returns the optional features that this program was built with.
fn features() -> String {
    let features = [("demo", cfg!(feature = "demo")), ("otlp", cfg!(feature = "otlp"))];
    let built: Vec<_> =
        features.iter().filter(|(_, built)| *built).map(|(name, _)| *name).collect();
    if built.is_empty() { "none".to_owned() } else { built.join(", ") }
}

/// Returns the entry that the gateway registers in Zuul's component registry.
fn registration(config: &Config) -> String {
    let hostname = match &config.hostname {
        Some(hostname) => hostname.clone(),
        None => format!("{} (this machine's name, as no hostname is set)", config::own_hostname()),
    };
    let Some(zone) = &config.zone else {
        return format!("{hostname}, without a zone: other gateways do not ask it");
    };
    let zone = zone.escape_default();
    let Some(listener) = config.listeners.iter().find(|listener| listener.advertised) else {
        return format!("{hostname}, zone {zone}");
    };
    let port = match config.public_port.unwrap_or(listener.port) {
        0 => "any free port".to_owned(),
        port => format!("port {port}"),
    };
    let tls = if listener.tls.is_some() { "TLS" } else { "plain" };
    format!("{hostname}, {port}, {tls}, zone {zone}")
}

fn certificate(path: &Path, identity: &Identity) -> String {
    let subject = identity.subject().unwrap_or_default();
    let until = identity.valid_until().map(|end| format!(", valid until {end}"));
    let until = until.unwrap_or_default();
    format!("{}, subject \"{subject}\"{until}", path.display())
}

/// Reads from ZooKeeper; writes nothing there.
fn survey_zookeeper(validated: &ValidatedConfig) -> Result<Survey> {
    let ValidatedConfig { config, certificates, .. } = validated;
    let tls = daemon::zookeeper_tls(config, &certificates.zookeeper)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let zookeeper = &config.zookeeper;
    runtime.block_on(survey(&zookeeper.hosts, tls, zookeeper.session_timeout))
}
