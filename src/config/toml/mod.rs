//! Our TOML: its tables, keys and defaults.

mod listeners;
mod reader;

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use toml::de::DeTable;
use tracing::Level;

use self::reader::{Document, Table};
use super::error::ConfigErrors;
use super::otlp::{DEFAULT_TIMEOUT, OtlpOptions, PROTOCOLS};
use super::parse::{self, Parsed};
use super::{Config, Limits, Log, LogFormat, LogOutput, NameCheck, TlsFiles, Tracing, ZooKeeper};

/// Reads the document `text` of the file called `file`.
///
/// # Errors
/// All errors in it.
pub(super) fn read(file: &str, text: &str) -> Result<Config, ConfigErrors> {
    let document = Document::new(file, text);
    let config = config(&document);
    ConfigErrors::ok_or_errors(config, document.into_errors())
}

/// Returns the command socket that `text` sets, even if there are errors in it.
pub(super) fn command_socket(text: &str) -> Option<PathBuf> {
    let (tree, _) = DeTable::parse_recoverable(text);
    let control = tree.get_ref().get("control")?.get_ref().as_table()?;
    let path = control.get("socket")?.get_ref().as_str()?;
    path.starts_with('/').then(|| PathBuf::from(path))
}

/// Whether `text`, from a file whose name does not end in `.toml`, is most likely our TOML: a
/// `zuul.conf` has no quotes around the same value.
pub(super) fn is_likely(text: &str) -> bool {
    if text.lines().any(|line| line.starts_with("[[")) {
        return true;
    }
    let Ok(tree) = DeTable::parse(text) else { return false };
    let zookeeper = tree.get_ref().get("zookeeper").and_then(|table| table.get_ref().as_table());
    let hosts = zookeeper.and_then(|table| table.get("hosts"));
    hosts.is_some_and(|hosts| hosts.get_ref().as_str().is_some())
}

/// Reads the whole configuration. Any value stands in for one that has an error.
fn config(document: &Document<'_>) -> Config {
    let mut root = document.root();
    let (tls, name_check) = tls(root.table("tls"));
    let listeners = listeners::listeners(&mut root, tls.is_some());
    let (zookeeper, warning) = zookeeper(root.table("zookeeper"));
    let config = Config {
        hostname: root.text("hostname", parse::hostname),
        zone: root.text("zone", parse::zone),
        public_port: root.integer("public_port", 1..=65_535),
        admin: listeners::admin(root.table("admin"), &listeners),
        listeners,
        tls,
        name_check,
        zookeeper,
        user: root.text("user", parse::user),
        pid_file: None,
        control: control(root.table("control")),
        limits: limits(root.table("limits")),
        log: log(root.table("log")),
        tracing: tracing(root.table("tracing")),
        file_warnings: warning.into_iter().collect(),
    };
    root.reject_unknown_keys();
    config
}

fn tls(mut table: Table<'_>) -> (Option<TlsFiles>, NameCheck) {
    let files = table.identity(["cert", "key", "ca"], false);
    // An error in them is reported already, so listeners need not report that they are missing.
    let files = files.or_else(|| table.has("cert").then(TlsFiles::default));
    let verify = table.boolean("verify_hostnames").unwrap_or(true);
    let common_name = table.boolean("common_name_fallback").unwrap_or(true);
    let name_check = match (verify, common_name) {
        (false, _) => NameCheck::Off,
        (true, true) => NameCheck::SanOrCommonName,
        (true, false) => NameCheck::SanOnly,
    };
    table.reject_unknown_keys();
    (files, name_check)
}

/// ZooKeeper's usual port with TLS.
const TLS_PORT: u16 = 2281;

/// Returns the settings, and a warning about its port.
fn zookeeper(mut table: Table<'_>) -> (ZooKeeper, Option<String>) {
    if !table.has("hosts") {
        table.error("hosts", None, "missing: the servers of Zuul's ZooKeeper".to_owned());
    }
    let hosts = table.text("hosts", |text| parse::hosts(text, TLS_PORT)).unwrap_or_default();
    let warning = hosts.plain_port_warning(&table.location("hosts"));
    let zookeeper = ZooKeeper {
        hosts,
        tls: table.identity(["tls_cert", "tls_key", "tls_ca"], true).unwrap_or_default(),
        session_timeout: table.duration("session_timeout", Duration::from_secs(40)),
        verify_hostnames: table.boolean("verify_hostnames").unwrap_or(true),
    };
    table.reject_unknown_keys();
    (zookeeper, warning)
}

fn control(mut table: Table<'_>) -> Option<PathBuf> {
    let socket = table.path_of_file("socket");
    table.reject_unknown_keys();
    socket
}

/// The values that the kernel accepts for TCP_KEEPIDLE (tcp(7); `MAX_TCP_KEEPIDLE` in Linux).
const KEEPALIVE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(32_767);

const LAME_DUCK: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(86_400);

/// From less than one TCP segment of the loopback interface to more than any link needs.
const STREAM_BUFFER: RangeInclusive<i64> = 16 * 1024..=64 * 1024 * 1024;

fn limits(mut table: Table<'_>) -> Limits {
    let default = Limits::default();
    let mut number = |key, default: usize| table.integer(key, 1..=1_000_000).unwrap_or(default);
    let limits = Limits {
        connections: number("connections", default.connections),
        connections_per_address: number("connections_per_address", default.connections_per_address),
        handshakes: number("handshakes", default.handshakes),
        handshakes_per_minute: number("handshakes_per_minute", default.handshakes_per_minute),
        streams_logged_per_minute: number(
            "streams_logged_per_minute",
            default.streams_logged_per_minute,
        ),
        lookups: number("lookups", default.lookups),
        stream_buffer: table
            .integer("stream_buffer", STREAM_BUFFER)
            .unwrap_or(default.stream_buffer),
        ipv6_prefix: table.integer("ipv6_prefix", 1..=128).unwrap_or(default.ipv6_prefix),
        exempt_networks: table
            .list("exempt_networks", parse::network)
            .unwrap_or(default.exempt_networks),
        handshake_timeout: table.duration("handshake_timeout", default.handshake_timeout),
        request_timeout: table.duration("request_timeout", default.request_timeout),
        lookup_timeout: table.duration("lookup_timeout", default.lookup_timeout),
        connect_timeout: table.duration("connect_timeout", default.connect_timeout),
        first_byte_timeout: table.duration("first_byte_timeout", default.first_byte_timeout),
        write_timeout: table.duration("write_timeout", default.write_timeout),
        stream_idle: table.duration_or_never("stream_idle"),
        stream_total: table.duration_or_never("stream_total"),
        keepalive: table.duration_in("keepalive", default.keepalive, &KEEPALIVE),
        lame_duck: table.duration_in("lame_duck", default.lame_duck, &LAME_DUCK),
        grace: table.duration("grace", default.grace),
    };
    table.reject_unknown_keys();
    limits
}

fn log(mut table: Table<'_>) -> Log {
    let default = Log::default();
    let levels = [
        ("error", Level::ERROR),
        ("warn", Level::WARN),
        ("info", Level::INFO),
        ("debug", Level::DEBUG),
        ("trace", Level::TRACE),
    ];
    let formats = [("text", LogFormat::Text), ("json", LogFormat::Json), ("zuul", LogFormat::Zuul)];
    let log = Log {
        level: table.choice("level", &levels).unwrap_or(default.level),
        format: table.choice("format", &formats).unwrap_or(default.format),
        output: table.text("output", output).unwrap_or(default.output),
        log_config: None,
    };
    table.reject_unknown_keys();
    log
}

fn output(text: &str) -> Parsed<LogOutput> {
    match text {
        "stdout" => Ok(LogOutput::Stdout),
        "stderr" => Ok(LogOutput::Stderr),
        _ if text.starts_with('/') => Ok(LogOutput::from_path(PathBuf::from(text))),
        _ => Err("must be \"stdout\", \"stderr\" or the absolute path of a file".to_owned()),
    }
}

/// The timeout of one batch of spans.
const EXPORT_TIMEOUT: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(600);

/// Zuul's options, by their own names.
fn tracing(mut table: Table<'_>) -> Option<Tracing> {
    let enabled = table.boolean("enabled").unwrap_or(false);
    let options = OtlpOptions {
        protocol: table.choice("protocol", &PROTOCOLS),
        endpoint: table.text("endpoint", |text| Ok(text.to_owned())),
        service_name: table.text("service_name", parse::service_name),
        tls_key: table.path_of_file("tls_key"),
        tls_cert: table.path_of_file("tls_cert"),
        tls_ca: table.path_of_file("tls_ca"),
        insecure: table.boolean("insecure"),
        certificate_file: table.path_of_file("certificate_file"),
        timeout: Some(table.duration_in("timeout", DEFAULT_TIMEOUT, &EXPORT_TIMEOUT)),
        gzip: table.choice("compression", &[("none", false), ("gzip", true)]),
    };
    let mut errors = Vec::new();
    let tracing = match options.build() {
        _ if !enabled => None,
        // An error, because this file is not shared with other services, as a zuul.conf is.
        _ if !cfg!(feature = "otlp") => {
            let reason = "this program was built without it: build it with cargo's feature otlp";
            errors.push(("enabled", reason.to_owned()));
            None
        }
        Ok(tracing) => Some(tracing),
        Err(invalid) => {
            errors.extend(invalid);
            None
        }
    };
    for (key, reason) in errors {
        let found = table.find(key);
        table.error(key, found, reason);
    }
    table.reject_unknown_keys();
    tracing
}

#[cfg(test)]
mod tests;
