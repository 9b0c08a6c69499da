//! Zuul's own `zuul.conf`: the sections `[fingergw]`, `[zookeeper]` and `[tracing]`, with the
//! options and defaults of Zuul (`zuul/lib/fingergw.py`, `zuul/cmd/fingergw.py`,
//! `zuul/zk/__init__.py`, `zuul/lib/tracing.py`).
//!
//! The file is shared with the other services of a Zuul system, so other sections are not looked
//! at.

mod configparser;
pub(super) mod python_logging;
mod reader;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::User;

use self::configparser::Ini;
use self::reader::Reader;
use super::error::{ConfigError, ConfigErrors, excerpt};
use super::otlp::{self, OtlpOptions, PROTOCOLS};
use super::parse::{self, Parsed};
use super::{
    ClientCertificate, Config, DEFAULT_HOST, DEFAULT_PORT, Hosts, Limits, Listener, Log, LogFormat,
    NameCheck, Tracing, ZooKeeper, check_address_is_free,
};
use crate::os::file;

const FINGERGW: &str = "fingergw";
const ZOOKEEPER: &str = "zookeeper";
const TRACING: &str = "tracing";

/// The options of `[fingergw]`: those of Zuul, and `state_dir`, which sf-config writes into every
/// section.
const FINGERGW_OPTIONS: [&str; 17] = [
    "command_socket",
    "hostname",
    "listen_address",
    "log_config",
    "pidfile",
    "port",
    "prometheus_addr",
    "prometheus_port",
    "public_port",
    "state_dir",
    "tls_ca",
    "tls_cert",
    "tls_client_only",
    "tls_key",
    "tls_verify_hostnames",
    "user",
    "zone",
];
const ZOOKEEPER_OPTIONS: [&str; 5] = ["hosts", "session_timeout", "tls_ca", "tls_cert", "tls_key"];

pub(super) const PID_FILE: &str = "/var/run/zuul/fingergw.pid";
pub(super) const COMMAND_SOCKET: &str = "/var/lib/zuul/fingergw.socket";

/// The port of ZooKeeper servers without one: that of kazoo, with which Zuul's services read the
/// same option. A file that works for them must work here.
const KAZOO_PORT: u16 = 2181;

/// Reads the file called `file` with content `text`. The variables of `environment` are options of
/// every section.
///
/// # Errors
/// All errors in it.
pub(super) fn read(
    file: &str,
    text: &str,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Config, ConfigErrors> {
    let (ini, errors) = Ini::parse_recoverable(text, environment);
    let syntax = errors.into_iter();
    let syntax = syntax.map(|error| ConfigError::of_file(file, Some(error.line), error.reason));
    ConfigErrors::ok_or_errors((), syntax.collect())?;
    let mut reader = Reader::new(file, ini);
    let config = config(&mut reader);
    ConfigErrors::ok_or_errors(config, reader.errors)
}

/// Returns the command socket that `text` sets, or else the default one, even if there are errors
/// in it. `None` if a syntax error may hide the section: the default could be another gateway's.
pub(super) fn command_socket(
    text: &str,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Option<PathBuf> {
    let (ini, errors) = Ini::parse_recoverable(text, environment);
    if !errors.is_empty() && !ini.has_section(FINGERGW) {
        return None;
    }
    Reader::new("", ini).path(FINGERGW, "command_socket", COMMAND_SOCKET)
}

fn config(reader: &mut Reader<'_>) -> Config {
    let listen_address = reader.read(FINGERGW, "listen_address", parse::hostname);
    let listen_port = reader.read(FINGERGW, "port", port).unwrap_or(DEFAULT_PORT);
    let tls = reader.files(FINGERGW, false);
    let client_only = reader.boolean(FINGERGW, "tls_client_only", false);
    let listener = Listener {
        tls: (tls.is_some() && !client_only).then_some(ClientCertificate::Required),
        advertised: true,
        ..Listener::plain(listen_address.as_deref().unwrap_or(DEFAULT_HOST), listen_port)
    };
    let mut file_warnings = unknown_options(reader);
    let (zookeeper, warning) = zookeeper(reader);
    file_warnings.extend(warning);
    Config {
        hostname: reader.read(FINGERGW, "hostname", parse::hostname),
        zone: reader.read(FINGERGW, "zone", zone),
        public_port: reader.read(FINGERGW, "public_port", port).filter(|port| *port != 0),
        admin: admin(reader, &listener),
        listeners: vec![listener],
        tls,
        name_check: match reader.boolean(FINGERGW, "tls_verify_hostnames", true) {
            true => NameCheck::SanOrCommonName,
            false => NameCheck::Off,
        },
        zookeeper,
        // An empty one is none, as in Zuul.
        user: reader.non_empty(FINGERGW, "user"),
        pid_file: reader.path(FINGERGW, "pidfile", PID_FILE).map(|path| expand_user(&path)),
        control: reader.path(FINGERGW, "command_socket", COMMAND_SOCKET),
        limits: Limits::default(),
        log: log(reader),
        tracing: tracing(reader),
        file_warnings,
    }
}

/// Returns warnings about options that neither this program nor Zuul has, in the sections that only
/// gateways and ZooKeeper clients read, and about a section that was most likely meant to be one of
/// them.
fn unknown_options(reader: &Reader<'_>) -> Vec<String> {
    let Reader { file, ini, .. } = reader;
    let mut warnings = Vec::new();
    for (section, known) in [(FINGERGW, &FINGERGW_OPTIONS[..]), (ZOOKEEPER, &ZOOKEEPER_OPTIONS)] {
        for (option, line) in ini.options(section) {
            // An option that another value refers to is used by that value.
            if known.contains(&option) || ini.is_referenced(section, option) {
                continue;
            }
            let meant = parse::closest(option, known.iter().copied());
            let meant = meant.map_or(String::new(), |meant| format!("; did you mean {meant}?"));
            let option = excerpt(option);
            warnings.push(format!(
                "{file}:{line}: [{section}] {option}: unknown option, ignored{meant}"
            ));
        }
        if !ini.has_section(section)
            && let Some(name) = parse::closest(section, ini.sections())
        {
            let name = excerpt(name);
            warnings.push(format!(
                "{file}: [{name}]: unknown section, ignored; did you mean [{section}]?"
            ));
        }
    }
    warnings
}

/// The address of Zuul's monitoring server, which is off unless a port is set.
fn admin(reader: &mut Reader<'_>, listener: &Listener) -> Option<(String, u16)> {
    let host = reader.read(FINGERGW, "prometheus_addr", parse::hostname);
    let host = host.unwrap_or_else(|| "0.0.0.0".to_owned());
    let port = reader.read(FINGERGW, "prometheus_port", |text| {
        let port = port(text)?;
        check_address_is_free(&host, port, std::slice::from_ref(listener))?;
        Ok(port)
    })?;
    Some((host, port))
}

fn log(reader: &mut Reader<'_>) -> Log {
    let default = Log { format: LogFormat::Zuul, ..Log::default() };
    let Some(value) = reader.value(FINGERGW, "log_config") else { return default };
    let path = expand_user(Path::new(&value.text));
    let text = file::read(&path)
        .map_err(|error| error.to_string())
        .and_then(|bytes| String::from_utf8(bytes).map_err(|_| "it is not UTF-8 text".to_owned()));
    match text.map(|text| python_logging::read(&path.to_string_lossy(), &text)) {
        Ok(Ok(log)) => return log,
        Ok(Err(error)) => reader.errors.push(error),
        Err(reason) => {
            reader.invalid(FINGERGW, "log_config", &value, format!("cannot be read: {reason}"));
        }
    }
    default
}

/// Returns the settings, and a warning about the port.
fn zookeeper(reader: &mut Reader<'_>) -> (ZooKeeper, Option<String>) {
    let value = reader.value(ZOOKEEPER, "hosts");
    if matches!(reader.ini.get(ZOOKEEPER, "hosts"), Ok(None)) {
        reader.missing(ZOOKEEPER, "hosts", "missing: the servers of Zuul's ZooKeeper");
    }
    let mut hosts = Hosts::default();
    let mut warning = None;
    if let Some(value) = value {
        match parse::hosts(&value.text, KAZOO_PORT) {
            Ok(parsed) => hosts = parsed,
            Err(reason) => reader.invalid(ZOOKEEPER, "hosts", &value, reason),
        }
        warning = hosts.plain_port_warning(&reader.location(ZOOKEEPER, "hosts", &value));
    }
    let zookeeper = ZooKeeper {
        hosts,
        tls: reader.files(ZOOKEEPER, true).unwrap_or_default(),
        session_timeout: reader
            .read(ZOOKEEPER, "session_timeout", seconds)
            .unwrap_or(Duration::from_secs(120)),
        // kazoo, and so Zuul's services, do not verify names.
        verify_hostnames: false,
    };
    (zookeeper, warning)
}

/// Reads `[tracing]` as Zuul does: nothing else of it while it is off, and whatever is not a yes is
/// a no. Zuul's gateway does not trace, so a program that cannot trace either ignores errors here.
fn tracing(reader: &mut Reader<'_>) -> Option<Tracing> {
    let is_yes = |text: String| ["1", "on", "yes", "true"].contains(&text.to_lowercase().as_str());
    if !reader.string(TRACING, "enabled").is_some_and(is_yes) {
        return None;
    }
    if !cfg!(feature = "otlp") {
        return OtlpOptions::default().build().ok();
    }
    let errors = reader.errors.len();
    let protocol = |text: &str| {
        let known = PROTOCOLS.iter().find(|(name, _)| *name == text);
        known.map(|(_, protocol)| *protocol).ok_or("must be grpc or http/protobuf".to_owned())
    };
    let options = OtlpOptions {
        protocol: reader.read(TRACING, "protocol", protocol),
        endpoint: reader.non_empty(TRACING, "endpoint"),
        service_name: reader.string(TRACING, "service_name"),
        tls_key: reader.non_empty(TRACING, "tls_key").map(PathBuf::from),
        tls_cert: reader.non_empty(TRACING, "tls_cert").map(PathBuf::from),
        tls_ca: reader.non_empty(TRACING, "tls_ca").map(PathBuf::from),
        insecure: reader.string(TRACING, "insecure").map(is_yes),
        certificate_file: reader.non_empty(TRACING, "certificate_file").map(PathBuf::from),
        timeout: reader.read(TRACING, "timeout", otlp::timeout).flatten(),
        gzip: reader.read(TRACING, "compression", otlp::compression),
    };
    if reader.errors.len() > errors {
        return None;
    }
    let invalid = match options.build() {
        Ok(tracing) => return Some(tracing),
        Err(invalid) => invalid,
    };
    for (option, reason) in invalid {
        match reader.value(TRACING, option) {
            Some(value) => reader.invalid(TRACING, option, &value, reason),
            None => reader.missing(TRACING, option, &reason),
        }
    }
    None
}

/// A port as of Python's `int()`: with white space around, a plus sign, `_` between digits.
fn port(text: &str) -> Parsed<u16> {
    let digits = text.trim();
    let digits = digits.strip_prefix('+').unwrap_or(digits);
    let well_formed = !digits.starts_with('_') && !digits.ends_with('_') && !digits.contains("__");
    let port =
        digits.replace('_', "").parse().ok().filter(|_| well_formed && !digits.starts_with('+'));
    port.ok_or_else(|| "must be a whole number from 0 to 65535".to_owned())
}

/// A duration as of Python's `float()`.
fn seconds(text: &str) -> Parsed<Duration> {
    text.trim()
        .parse()
        .ok()
        .filter(|seconds| (0.001..=86_400.0).contains(seconds))
        .map(Duration::from_secs_f64)
        .ok_or_else(|| "must be a number of seconds from 0.001 to 86400".to_owned())
}

/// A zone, which may be empty: Zuul registers an empty `zone =` as a zone of that name.
fn zone(text: &str) -> Parsed<String> {
    if text.is_empty() { Ok(String::new()) } else { parse::zone(text) }
}

/// Python's `os.path.expanduser`: a leading `~` or `~user` becomes that user's home, if it is
/// known.
pub(super) fn expand_user(path: &Path) -> PathBuf {
    expand_home(path, home_of)
}

fn expand_home(path: &Path, home: impl Fn(&OsStr) -> Option<PathBuf>) -> PathBuf {
    let mut parts = path.components();
    let user = parts.next().map(|first| first.as_os_str().as_bytes());
    match user.and_then(|first| first.strip_prefix(b"~")).and_then(|u| home(OsStr::from_bytes(u))) {
        Some(home) => home.join(parts.as_path()),
        None => path.to_owned(),
    }
}

/// The home of `user`; of the current user if that is empty.
fn home_of(user: &OsStr) -> Option<PathBuf> {
    if user.is_empty() {
        return std::env::home_dir().filter(|home| !home.as_os_str().is_empty());
    }
    Some(User::from_name(user.to_str()?).ok()??.dir)
}

#[cfg(test)]
mod tests;
