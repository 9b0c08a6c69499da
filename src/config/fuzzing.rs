//! The fuzz targets of configuration files. An error must be printable and name a line that exists;
//! a configuration that is accepted must be the same when it is written to a file and read again.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::json;

use super::error::{ConfigError, ConfigErrors};
use super::zuul_conf::python_logging;
use super::{
    ClientCertificate, Config, Limits, Listener, Log, LogFormat, LogOutput, NameCheck, Rule,
    TlsFiles, ZooKeeper, toml, zuul_conf,
};
use crate::fuzzing::presentable;

/// Our TOML.
pub fn toml(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    match toml::read("f.toml", text) {
        Ok(config) => {
            let config = without_warnings(config);
            let written = write_toml(&config);
            let read = toml::read("f.toml", &written).map(without_warnings);
            assert_eq!(read, Ok(config), "{written}");
        }
        Err(errors) => check_errors(&errors, text),
    }
}

/// A `zuul.conf`.
pub fn zuul_conf(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    // The file that it names would be read.
    if text.to_lowercase().contains("log_config") {
        return;
    }
    let environment = [("ZUUL_A".to_owned(), "a%(b)s".to_owned())];
    match zuul_conf::read("zuul.conf", text, environment) {
        Ok(config) => {
            let config = without_warnings(config);
            if let Some(written) = write_zuul_conf(&config) {
                let read = zuul_conf::read("zuul.conf", &written, []).map(without_warnings);
                assert_eq!(read, Ok(config), "{written}");
            }
        }
        Err(errors) => check_errors(&errors, text),
    }
}

/// A `log_config`: YAML if the first byte is odd, else Python's `fileConfig`.
pub fn log_config(data: &[u8]) {
    let Some((&first, text)) = data.split_first() else { return };
    let Ok(text) = str::from_utf8(text) else { return };
    let path = if first % 2 == 1 { "log.yaml" } else { "log.conf" };
    match python_logging::read(path, text) {
        Ok(log) => {
            let log_config = log.log_config.expect("the file that it is from");
            for part in &log_config.ignored {
                assert!(!part.contains(char::is_control), "control characters: {part:?}");
            }
            assert_ne!(log.output, LogOutput::File("".into()));
        }
        Err(error) => check_error(&error, text),
    }
}

/// Checks the warnings, whose lines differ after writing, and removes them.
fn without_warnings(config: Config) -> Config {
    for warning in &config.file_warnings {
        presentable(warning);
    }
    Config { file_warnings: Vec::new(), ..config }
}

fn check_errors(errors: &ConfigErrors, text: &str) {
    assert!(!errors.list().is_empty());
    assert!(errors.list().is_sorted_by_key(|error| error.line.unwrap_or(usize::MAX)));
    for error in errors.list() {
        check_error(error, text);
    }
}

fn check_error(error: &ConfigError, text: &str) {
    // As editors count them, with any of the three line ends.
    let lines = text.replace("\r\n", "\n").split(['\n', '\r']).count();
    presentable(&error.to_string());
    assert!(error.line.is_none_or(|line| (1..=lines).contains(&line)), "{error}: {lines} lines");
}

/// A TOML string. It differs from that of JSON in one character.
fn text(text: &str) -> String {
    json!(text).to_string().replace('\x7f', "\\u007f")
}

fn path(path: &Path) -> String {
    text(utf8(path))
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("from UTF-8")
}

/// Writes `config` as TOML.
fn write_toml(config: &Config) -> String {
    let address = |host: &str, port: u16| match host.contains(':') {
        true => text(&format!("[{host}]:{port}")),
        false => text(&format!("{host}:{port}")),
    };
    let files = |TlsFiles { cert, key, ca, .. }: &TlsFiles, prefix: &str| {
        let (cert, key, ca) = (path(cert), path(key), path(ca));
        format!("{prefix}cert = {cert}\n{prefix}key = {key}\n{prefix}ca = {ca}\n")
    };
    let mut toml = String::new();
    for (key, value) in
        [("hostname", &config.hostname), ("zone", &config.zone), ("user", &config.user)]
    {
        if let Some(value) = value {
            let _ = writeln!(toml, "{key} = {}", text(value));
        }
    }
    if let Some(port) = config.public_port {
        let _ = writeln!(toml, "public_port = {port}");
    }
    for listener in &config.listeners {
        let client = match listener.tls {
            Some(ClientCertificate::Optional) => "optional",
            Some(ClientCertificate::None) => "none",
            Some(ClientCertificate::Required) | None => "required",
        };
        let _ = writeln!(
            toml,
            "[[listener]]\naddress = {}\ntls = {}\nclient_certificate = \"{client}\"\nadvertised = {}",
            address(&listener.host, listener.port),
            listener.tls.is_some(),
            listener.advertised,
        );
        write_access(listener, &mut toml);
    }
    let (verify, fallback) = match config.name_check {
        NameCheck::Off => (false, true),
        NameCheck::SanOrCommonName => (true, true),
        NameCheck::SanOnly => (true, false),
    };
    let identity = config.tls.as_ref().map(|tls| files(tls, "")).unwrap_or_default();
    let _ = writeln!(
        toml,
        "[tls]\n{identity}verify_hostnames = {verify}\ncommon_name_fallback = {fallback}"
    );
    let ZooKeeper { hosts, tls, session_timeout, verify_hostnames } = &config.zookeeper;
    let _ = writeln!(
        toml,
        "[zookeeper]\nhosts = {}\n{}session_timeout = \"{}ms\"\nverify_hostnames = {verify_hostnames}",
        text(&hosts.to_string()),
        files(tls, "tls_"),
        session_timeout.as_millis(),
    );
    if let Some((host, port)) = &config.admin {
        let _ = writeln!(toml, "[admin]\naddress = {}", address(host, *port));
    }
    if let Some(socket) = &config.control {
        let _ = writeln!(toml, "[control]\nsocket = {}", path(socket));
    }
    write_limits(&config.limits, &mut toml);
    write_log(&config.log, &mut toml);
    toml
}

fn write_access(listener: &Listener, toml: &mut String) {
    fn list<T: ToString>(items: &[T]) -> String {
        let items: Vec<_> = items.iter().map(|item| text(&item.to_string())).collect();
        format!("[{}]", items.join(", "))
    }
    if !listener.proxy_protocol.is_empty() {
        let _ = writeln!(toml, "proxy_protocol = {}", list(&listener.proxy_protocol));
    }
    for Rule { networks, tenants, clients } in &listener.allow {
        let _ = writeln!(toml, "[[listener.allow]]");
        for (key, items) in [
            ("networks", networks.as_deref().map(list)),
            ("tenants", tenants.as_deref().map(list)),
            ("clients", clients.as_deref().map(list)),
        ] {
            if let Some(items) = items {
                let _ = writeln!(toml, "{key} = {items}");
            }
        }
    }
}

fn write_limits(limits: &Limits, toml: &mut String) {
    let _ = writeln!(toml, "[limits]\nconnections = {}", limits.connections);
    let _ = writeln!(toml, "stream_buffer = {}", limits.stream_buffer);
    for (key, time) in [
        ("handshake_timeout", limits.handshake_timeout),
        ("request_timeout", limits.request_timeout),
        ("lookup_timeout", limits.lookup_timeout),
        ("connect_timeout", limits.connect_timeout),
        ("first_byte_timeout", limits.first_byte_timeout),
        ("write_timeout", limits.write_timeout),
        ("keepalive", limits.keepalive),
        ("lame_duck", limits.lame_duck),
        ("grace", limits.grace),
    ] {
        let _ = writeln!(toml, "{key} = \"{}ms\"", time.as_millis());
    }
}

fn write_log(log: &Log, toml: &mut String) {
    let format = match log.format {
        LogFormat::Text => "text",
        LogFormat::Json => "json",
        LogFormat::Zuul => "zuul",
    };
    let output = match &log.output {
        LogOutput::Stdout => text("stdout"),
        LogOutput::Stderr => text("stderr"),
        LogOutput::File(file) => path(file),
    };
    let level = log.level.to_string().to_lowercase();
    let _ = writeln!(toml, "[log]\nlevel = \"{level}\"\nformat = \"{format}\"\noutput = {output}");
}

/// Writes `config` as a `zuul.conf`; `None` if a value has several lines.
fn write_zuul_conf(config: &Config) -> Option<String> {
    let mut options = Vec::new();
    let mut set = |option: &str, value: String| options.push((option.to_owned(), value));
    let path = |path: &Path| utf8(path).to_owned();
    for (option, value) in
        [("hostname", &config.hostname), ("zone", &config.zone), ("user", &config.user)]
    {
        if let Some(value) = value {
            set(option, value.clone());
        }
    }
    let [listener] = config.listeners.as_slice() else { panic!("always one listener") };
    set("listen_address", listener.host.clone());
    set("port", listener.port.to_string());
    set("public_port", config.public_port.unwrap_or(0).to_string());
    set("tls_verify_hostnames", (config.name_check != NameCheck::Off).to_string());
    set("tls_client_only", listener.tls.is_none().to_string());
    for (option, value) in [("pidfile", &config.pid_file), ("command_socket", &config.control)] {
        set(option, value.as_deref().map(path).unwrap_or_default());
    }
    if let Some((host, port)) = &config.admin {
        set("prometheus_addr", host.clone());
        set("prometheus_port", port.to_string());
    }
    let mut files = |TlsFiles { cert, key, ca, .. }: &TlsFiles| {
        for (option, file) in [("tls_cert", cert), ("tls_key", key), ("tls_ca", ca)] {
            set(option, path(file));
        }
    };
    if let Some(tls) = &config.tls {
        files(tls);
    }
    let own = options.len();
    let ZooKeeper { hosts, tls, session_timeout, .. } = &config.zookeeper;
    options.push(("hosts".to_owned(), hosts.to_string()));
    options.push(("session_timeout".to_owned(), session_timeout.as_secs_f64().to_string()));
    for (option, file) in [("tls_cert", &tls.cert), ("tls_key", &tls.key), ("tls_ca", &tls.ca)] {
        options.push((option.to_owned(), path(file)));
    }

    let mut conf = "[DEFAULT]\nnothing =\n[fingergw]\n".to_owned();
    for (index, (option, value)) in options.iter().enumerate() {
        if index == own {
            conf.push_str("[zookeeper]\n");
        }
        if value.contains(['\n', '\r']) {
            return None;
        }
        // White space at either end would be removed.
        let _ = writeln!(conf, "{option} = %(nothing)s{}%(nothing)s", value.replace('%', "%%"));
    }
    Some(conf)
}
