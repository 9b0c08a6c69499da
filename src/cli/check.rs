//! `zuul-fingergw check`: everything that is wrong with a configuration, what it makes of the
//! gateway, and with `--connect` what ZooKeeper has.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, anyhow};

use super::{ParsedConfig, ValidatedConfig, load, refuse};
use crate::config;
use crate::config::Config;
use crate::control::socket_file;
use crate::daemon;
use crate::registry::zookeeper::survey::{Survey, survey};
use crate::telemetry::log;
use crate::tls::Identity;

/// Checks the configuration in `path`; with `connect` looks into its ZooKeeper as well.
pub(crate) fn run(path: Option<&Path>, connect: bool) -> ExitCode {
    let usable = match load(path).and_then(ParsedConfig::usable).and_then(checked) {
        Ok(usable) => usable,
        Err(error) => return refuse(&error),
    };
    for warning in warnings(&usable) {
        eprintln!("{warning}");
    }
    println!("{}: OK", usable.path.display());
    for (key, value) in summary(&usable) {
        println!("  {key}: {value}");
    }
    if !connect {
        return ExitCode::SUCCESS;
    }
    match survey_zookeeper(&usable) {
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

/// Refuses what a start or peers would refuse.
fn checked(usable: ValidatedConfig) -> Result<ValidatedConfig> {
    let ValidatedConfig { config, identities, account, .. } = &usable;
    log::check(&config.log, account.as_ref())?;
    if let Some(socket) = config.explicit_command_socket() {
        socket_file::check_directory(socket)?;
    }
    if let Some(account) = account {
        account.impersonate(|| account.check_readable(config.files()))??;
    }
    if identities.findings().any(|finding| finding.is_error()) {
        let lines: Vec<_> = identities.findings().map(|finding| finding.to_string()).collect();
        return Err(anyhow!(lines.join("\n")));
    }
    Ok(usable)
}

/// What works and is most likely a mistake.
fn warnings(usable: &ValidatedConfig) -> Vec<String> {
    let ValidatedConfig { path, config, identities, account } = usable;
    let mut warnings: Vec<_> = identities.findings().map(|finding| finding.to_string()).collect();
    warnings.extend(config.warnings());
    warnings.extend(config.log.ignored());
    if let (Some(account), Some(socket)) = (account, config.explicit_command_socket())
        && let Ok(Err(unfit)) = account.impersonate(|| socket_file::check_writable(socket))
    {
        let user = config.user.as_deref().unwrap_or_default();
        warnings.push(format!("{unfit} (as user {user}); stop, reload and status need it"));
    }
    if account.is_none()
        && let Some(socket) = config.explicit_command_socket()
        && let Err(unfit) = socket_file::check_creatable(socket)
    {
        warnings.push(format!("{unfit}; a start as this user would fail"));
    }
    let log_config = config.log.log_config.iter().map(|log_config| Path::new(&log_config.file));
    let read_again = log_config.chain([path.as_path()]);
    if let Some(account) = account
        && let Ok(Err(unreadable)) = account.impersonate(|| account.check_readable(read_again))
    {
        warnings.push(format!("{unreadable}; the gateway starts, but cannot reload"));
    }
    warnings
}

/// What a gateway with this configuration is, in pairs of a key and a value.
fn summary(usable: &ValidatedConfig) -> Vec<(&'static str, String)> {
    let ValidatedConfig { config, identities, account, .. } = usable;
    let program = format!("zuul-fingergw {}, features: {}", env!("CARGO_PKG_VERSION"), features());
    let mut lines = vec![("program", program), ("registers as", registration(config))];
    for listener in &config.listeners {
        let tls = if listener.tls.is_some() { "TLS" } else { "plain" };
        lines.push(("listens on", format!("{}, {tls}", listener.address())));
    }
    if let (Some(files), Some(identity)) = (&config.tls, &identities.gateway) {
        lines.push(("certificate", certificate(&files.cert, identity)));
    }
    let zookeeper = &config.zookeeper;
    let names = if zookeeper.verify_hostnames { "verified" } else { "not verified" };
    lines.push(("ZooKeeper", format!("{}, host names {names}", zookeeper.hosts)));
    let own = certificate(&zookeeper.tls.cert, &identities.zookeeper);
    lines.push(("certificate for ZooKeeper", own));
    if let Some((host, port)) = &config.admin {
        lines.push(("health and metrics", config::display_address(host, *port)));
    }
    if let Some(socket) = &config.control {
        lines.push(("command socket", socket.display().to_string()));
    }
    let user = match (account, &config.user) {
        (Some(_), Some(user)) => user.clone(),
        (None, Some(user)) => format!("{user}, if started as root"),
        (_, None) => return lines,
    };
    lines.push(("user", user));
    lines
}

/// The optional parts that this program was built with.
fn features() -> String {
    let features = [("demo", cfg!(feature = "demo")), ("otlp", cfg!(feature = "otlp"))];
    let built: Vec<_> =
        features.iter().filter(|(_, built)| *built).map(|(name, _)| *name).collect();
    if built.is_empty() { "none".to_owned() } else { built.join(", ") }
}

/// The entry that the gateway makes in Zuul's component registry.
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

/// Looks into ZooKeeper once; writes nothing there.
fn survey_zookeeper(usable: &ValidatedConfig) -> Result<Survey> {
    let ValidatedConfig { config, identities, .. } = usable;
    let tls = daemon::zookeeper_tls(config, &identities.zookeeper)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let zookeeper = &config.zookeeper;
    runtime.block_on(survey(&zookeeper.hosts, tls, zookeeper.session_timeout))
}
