//! Zuul's own `zuul.conf`: sections `[fingergw]`, `[zookeeper]` and `[tracing]`, with upstream's
//! options and defaults (`zuul/lib/fingergw.py`, `zuul/cmd/fingergw.py`, `zuul/zk/__init__.py`,
//! `zuul/lib/tracing.py`).
//!
//! The file is shared with the other services of a system: sections and options that are not ours
//! are none of our business.

pub(crate) mod configparser;
pub(crate) mod python_logging;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::User;

use self::configparser::{Ini, IniError, Value};
use self::python_logging::Unusable;
use super::error::{ConfigError, ConfigErrors, excerpt};
use super::otlp;
use super::otlp::{OtlpOptions, PROTOCOLS, Tracing};
use super::parse;
use super::parse::Parsed;
use super::{
    ClientCertificate, Config, DEFAULT_HOST, DEFAULT_PORT, Hosts, Limits, Listener, Log, LogFormat,
    NameCheck, TlsFileKeys, TlsFiles, ZooKeeper, refuse_taken,
};

const FINGERGW: &str = "fingergw";
const ZOOKEEPER: &str = "zookeeper";
const TRACING: &str = "tracing";

/// The options of `[fingergw]`: Zuul's, and `state_dir`, which sf-config writes into every section.
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

const PID_FILE: &str = "/var/run/zuul/fingergw.pid";
pub(crate) const COMMAND_SOCKET: &str = "/var/lib/zuul/fingergw.socket";

/// The port of ZooKeeper where the file names none: that of kazoo, with which Zuul's own services
/// read the same option.
const KAZOO_PORT: u16 = 2181;

/// Reads the file called `file` with content `text`; the variables of `environment` are options of
/// every section.
///
/// # Errors
/// Every fault in it.
pub(crate) fn read(
    file: &str,
    text: &str,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Config, ConfigErrors> {
    let mut reader = Reader::new(file);
    match Ini::parse(text, environment) {
        Ok(ini) => reader.ini = ini,
        Err(errors) => {
            let faults = errors.into_iter().map(|error| reader.unreadable(error, "", ""));
            let faults = faults.collect();
            return Err(
                ConfigErrors::ok_or_errors((), faults).expect_err("an error came with each")
            );
        }
    }
    let config = reader.config();
    ConfigErrors::ok_or_errors(config, reader.faults)
}

/// The command socket that `text` sets, or else the default one, even if there are errors in it.
/// `None` if a syntax error may have hidden the section: the default could be another gateway's.
pub(crate) fn command_socket(
    text: &str,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Option<PathBuf> {
    let (ini, errors) = Ini::parse_recoverable(text, environment);
    if !errors.is_empty() && !ini.has_section(FINGERGW) {
        return None;
    }
    let mut reader = Reader::new("");
    reader.ini = ini;
    reader.path("command_socket", COMMAND_SOCKET)
}

struct Reader<'t> {
    file: &'t str,
    ini: Ini,
    faults: Vec<ConfigError>,
    /// What there is to read.
    #[cfg(test)]
    asked: std::collections::BTreeSet<(&'static str, &'static str)>,
}

impl<'t> Reader<'t> {
    fn new(file: &'t str) -> Self {
        Self {
            file,
            ini: Ini::default(),
            faults: Vec::new(),
            #[cfg(test)]
            asked: std::collections::BTreeSet::new(),
        }
    }
}

impl Reader<'_> {
    fn config(&mut self) -> Config {
        let host = self
            .read(FINGERGW, "listen_address", parse::hostname)
            .unwrap_or(DEFAULT_HOST.to_owned());
        let listen_port = self.read(FINGERGW, "port", port).unwrap_or(DEFAULT_PORT);
        let tls = self.files(FINGERGW, false);
        let client_only = self.boolean(FINGERGW, "tls_client_only", false);
        let listener = Listener {
            host,
            port: listen_port,
            tls: (tls.is_some() && !client_only).then_some(ClientCertificate::Required),
            advertised: true,
            proxy_protocol: Vec::new(),
            allow: Vec::new(),
        };
        let admin = self.admin(&listener);
        Config {
            hostname: self.read(FINGERGW, "hostname", parse::hostname),
            zone: self.read(FINGERGW, "zone", zone),
            public_port: self.read(FINGERGW, "public_port", port).filter(|port| *port != 0),
            listeners: vec![listener],
            tls,
            name_check: match self.boolean(FINGERGW, "tls_verify_hostnames", true) {
                true => NameCheck::SanOrCommonName,
                false => NameCheck::Off,
            },
            zookeeper: self.zookeeper(),
            admin,
            // Upstream takes an empty one for none.
            user: self.string(FINGERGW, "user").filter(|user| !user.is_empty()),
            pid_file: self.path("pidfile", PID_FILE).map(|path| expand_user(&path)),
            control: self.path("command_socket", COMMAND_SOCKET),
            limits: Limits::default(),
            log: self.log(),
            tracing: self.tracing(),
            file_warnings: self.unknown_options(),
        }
    }

    /// Warns of options that neither this program nor Zuul knows, in the sections that only a gateway
    /// and ZooKeeper's clients read, and of a section that was most likely meant to be one of them.
    fn unknown_options(&self) -> Vec<String> {
        let file = self.file;
        let mut warnings = Vec::new();
        for (section, known) in [(FINGERGW, &FINGERGW_OPTIONS[..]), (ZOOKEEPER, &ZOOKEEPER_OPTIONS)]
        {
            for (option, line) in self.ini.options(section) {
                // Others may be there for the values that refer to them.
                if !known.contains(&option) && !self.ini.is_referenced(section, option) {
                    let meant = parse::closest(option, known.iter().copied());
                    let meant = meant.map_or(String::new(), |m| format!("; did you mean {m}?"));
                    let option = excerpt(option);
                    warnings.push(format!(
                        "{file}:{line}: [{section}] {option}: unknown option, ignored{meant}"
                    ));
                }
            }
            if !self.ini.has_section(section)
                && let Some(name) = parse::closest(section, self.ini.sections())
            {
                let name = excerpt(name);
                warnings.push(format!(
                    "{file}: [{name}]: unknown section, ignored; did you mean [{section}]?"
                ));
            }
        }
        warnings
    }

    /// Upstream's monitoring server, off unless it is given a port.
    fn admin(&mut self, listener: &Listener) -> Option<(String, u16)> {
        let host = self.read(FINGERGW, "prometheus_addr", parse::hostname);
        let host = host.unwrap_or_else(|| "0.0.0.0".to_owned());
        let port = self.read(FINGERGW, "prometheus_port", |text| {
            let port = port(text)?;
            refuse_taken(&host, port, std::slice::from_ref(listener))?;
            Ok(port)
        })?;
        Some((host, port))
    }

    fn log(&mut self) -> Log {
        let default = Log { format: LogFormat::Zuul, ..Log::default() };
        let Some(Value { line, text }) = self.value(FINGERGW, "log_config") else {
            return default;
        };
        let path = expand_user(Path::new(&text));
        match python_logging::load(&path.to_string_lossy()) {
            Ok(log) => return log,
            Err(Unusable::Content(faults)) => self.faults.extend(faults),
            Err(Unusable::File(reason)) => self.faults.push(ConfigError {
                file: self.file.to_owned(),
                line: (line > 0).then_some(line),
                key: format!("[{FINGERGW}] log_config"),
                value: Some(excerpt(&text)),
                reason: format!("cannot be read: {reason}"),
            }),
        }
        default
    }

    fn zookeeper(&mut self) -> ZooKeeper {
        if !matches!(self.ini.get(ZOOKEEPER, "hosts"), Ok(Some(_)) | Err(_)) {
            self.missing(ZOOKEEPER, "hosts", "missing: where Zuul's ZooKeeper is");
        }
        ZooKeeper {
            hosts: self
                .read(ZOOKEEPER, "hosts", |text| parse::hosts(text, KAZOO_PORT))
                .unwrap_or(Hosts { servers: Vec::new(), chroot: String::new() }),
            tls: self.files(ZOOKEEPER, true).unwrap_or_else(|| TlsFiles {
                cert: PathBuf::new(),
                key: PathBuf::new(),
                ca: PathBuf::new(),
                keys: TlsFileKeys::default(),
            }),
            session_timeout: self
                .read(ZOOKEEPER, "session_timeout", seconds)
                .unwrap_or(Duration::from_secs(120)),
            // As Zuul's own services: kazoo does not look at names.
            verify_hostnames: false,
        }
    }

    /// Upstream looks at nothing else while it is off; whatever it does not take for a yes is a no. Its
    /// gateway does not trace, so a program that cannot takes no offence at what is wrong here.
    fn tracing(&mut self) -> Option<Tracing> {
        let is_yes =
            |text: String| ["1", "on", "yes", "true"].contains(&text.to_lowercase().as_str());
        if !self.string(TRACING, "enabled").is_some_and(is_yes) {
            return None;
        }
        if !cfg!(feature = "otlp") {
            return OtlpOptions::default().build().ok();
        }
        let faults = self.faults.len();
        let protocol = |text: &str| {
            let known = PROTOCOLS.iter().find(|(name, _)| *name == text);
            let known = known.map(|(_, protocol)| *protocol);
            known.ok_or_else(|| "must be grpc or http/protobuf".to_owned())
        };
        let given = OtlpOptions {
            protocol: self.read(TRACING, "protocol", protocol),
            endpoint: self.some(TRACING, "endpoint"),
            service_name: self.string(TRACING, "service_name"),
            tls_key: self.some(TRACING, "tls_key").map(PathBuf::from),
            tls_cert: self.some(TRACING, "tls_cert").map(PathBuf::from),
            tls_ca: self.some(TRACING, "tls_ca").map(PathBuf::from),
            insecure: self.string(TRACING, "insecure").map(is_yes),
            certificate_file: self.some(TRACING, "certificate_file").map(PathBuf::from),
            timeout: self.read(TRACING, "timeout", otlp::timeout).flatten(),
            gzip: self
                .some(TRACING, "compression")
                .and_then(|_| self.read(TRACING, "compression", otlp::compression)),
        };
        if self.faults.len() > faults {
            return None;
        }
        let misfits = match given.build() {
            Ok(tracing) => return Some(tracing),
            Err(misfits) => misfits,
        };
        for (option, reason) in misfits {
            match self.value(TRACING, option) {
                Some(value) => self.refuse(TRACING, option, &value, reason),
                None => self.missing(TRACING, option, &reason),
            }
        }
        None
    }

    /// An option that is empty is none.
    fn some(&mut self, section: &'static str, option: &'static str) -> Option<String> {
        self.string(section, option).filter(|text| !text.is_empty())
    }

    fn value(&mut self, section: &'static str, option: &'static str) -> Option<Value> {
        #[cfg(test)]
        self.asked.insert((section, option));
        match self.ini.get(section, option) {
            Ok(value) => value,
            Err(error) => {
                let fault = self.unreadable(error, section, option);
                self.faults.push(fault);
                None
            }
        }
    }

    fn string(&mut self, section: &'static str, option: &'static str) -> Option<String> {
        self.value(section, option).map(|value| value.text)
    }

    /// A path in our section; `None` if it is empty, which switches off what it is for.
    fn path(&mut self, option: &'static str, default: &str) -> Option<PathBuf> {
        let path = self.string(FINGERGW, option).unwrap_or_else(|| default.to_owned());
        (!path.is_empty()).then(|| PathBuf::from(path))
    }

    fn read<T>(
        &mut self,
        section: &'static str,
        option: &'static str,
        read: impl Fn(&str) -> Parsed<T>,
    ) -> Option<T> {
        let value = self.value(section, option)?;
        match read(&value.text) {
            Ok(read) => Some(read),
            Err(reason) => {
                self.refuse(section, option, &value, reason);
                None
            }
        }
    }

    fn refuse(&mut self, section: &str, option: &str, value: &Value, reason: String) {
        self.faults.push(ConfigError {
            file: self.file.to_owned(),
            line: (value.line > 0).then_some(value.line),
            key: format!("[{section}] {option}"),
            value: Some(excerpt(&value.text)),
            reason,
        });
    }

    fn boolean(&mut self, section: &'static str, option: &'static str, default: bool) -> bool {
        let read = |text: &str| match text.to_lowercase().as_str() {
            "1" | "yes" | "true" | "on" => Ok(true),
            "0" | "no" | "false" | "off" => Ok(false),
            _ => Err("must be yes, true, on, 1 or no, false, off, 0".to_owned()),
        };
        self.read(section, option, read).unwrap_or(default)
    }

    /// The files of one identity. Upstream takes two of the three for none, and speaks plain text
    /// where the operator asked for TLS; that is a fault here.
    fn files(&mut self, section: &'static str, required: bool) -> Option<TlsFiles> {
        let keys = ["tls_cert", "tls_key", "tls_ca"];
        let values = keys.map(|key| self.value(section, key));
        let files = values.map(|value| value.filter(|value| !value.text.is_empty()));
        if required || files.iter().any(Option::is_some) {
            for (key, file) in keys.iter().zip(&files) {
                if file.is_none() {
                    let reason = "missing; tls_cert, tls_key and tls_ca are needed together";
                    self.missing(section, key, reason);
                }
            }
        }
        let [Some(cert), Some(key), Some(ca)] = files else { return None };
        let place = |value: &Value, option: &str| match value.line {
            // Of the environment, or of DEFAULT.
            0 => format!("{}: [{section}] {option}", self.file),
            line => format!("{}:{line}: [{section}] {option}", self.file),
        };
        let [cert_key, key_key, ca_key] = keys;
        let keys = TlsFileKeys {
            cert: place(&cert, cert_key),
            key: place(&key, key_key),
            ca: place(&ca, ca_key),
        };
        let [cert, key, ca] = [cert, key, ca].map(|value| PathBuf::from(value.text));
        Some(TlsFiles { cert, key, ca, keys })
    }

    fn missing(&mut self, section: &str, option: &str, reason: &str) {
        let section_missing = if self.ini.has_section(section) { "" } else { " (no such section)" };
        self.faults.push(ConfigError {
            file: self.file.to_owned(),
            line: None,
            key: format!("[{section}] {option}"),
            value: None,
            reason: format!("{reason}{section_missing}"),
        });
    }

    fn unreadable(&self, error: IniError, section: &str, option: &str) -> ConfigError {
        ConfigError {
            file: self.file.to_owned(),
            line: (error.line > 0).then_some(error.line),
            key: if section.is_empty() { String::new() } else { format!("[{section}] {option}") },
            value: None,
            reason: error.reason,
        }
    }
}

/// Python's `int()`, as far as it makes ports: blanks around, a plus sign, `_` between digits.
fn port(text: &str) -> Parsed<u16> {
    let digits = text.trim();
    let digits = digits.strip_prefix('+').unwrap_or(digits);
    let well_formed = !digits.starts_with('_') && !digits.ends_with('_') && !digits.contains("__");
    let port =
        digits.replace('_', "").parse().ok().filter(|_| well_formed && !digits.starts_with('+'));
    port.ok_or_else(|| "must be a whole number from 0 to 65535".to_owned())
}

/// Python's `os.path.expanduser`: a leading `~` or `~user` becomes that user's home, if it is known.
pub(crate) fn expand_user(path: &Path) -> PathBuf {
    expand(path, home)
}

fn expand(path: &Path, home: impl Fn(&OsStr) -> Option<PathBuf>) -> PathBuf {
    let mut parts = path.components();
    let user = parts.next().map(|first| first.as_os_str().as_bytes());
    match user.and_then(|first| first.strip_prefix(b"~")).and_then(|u| home(OsStr::from_bytes(u))) {
        Some(home) => home.join(parts.as_path()),
        None => path.to_owned(),
    }
}

/// The home of `user`, or of whoever we are if that is empty.
fn home(user: &OsStr) -> Option<PathBuf> {
    if user.is_empty() {
        return std::env::home_dir().filter(|home| !home.as_os_str().is_empty());
    }
    Some(User::from_name(user.to_str()?).ok()??.dir)
}

/// Python's `float()`, as far as it makes times.
fn seconds(text: &str) -> Parsed<Duration> {
    text.trim()
        .parse()
        .ok()
        .filter(|seconds| (0.001..=86_400.0).contains(seconds))
        .map(Duration::from_secs_f64)
        .ok_or_else(|| "must be a number of seconds from 0.001 to 86400".to_owned())
}

/// Upstream registers an empty `zone =` as a zone of that name; so do we.
fn zone(text: &str) -> Parsed<String> {
    if text.is_empty() { Ok(String::new()) } else { parse::zone(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str =
        "[zookeeper]\nhosts = zk:2281/zuul\ntls_cert = c\ntls_key = k\ntls_ca = a\n";

    fn conf(fingergw: &str) -> Result<Config, ConfigErrors> {
        read("zuul.conf", &format!("{LEAST}[fingergw]\n{fingergw}\n"), [])
    }

    #[test]
    fn upstreams_defaults() {
        let config = read("zuul.conf", LEAST, []).unwrap();
        let listener = Listener { advertised: true, ..Listener::plain("::", 79) };
        assert_eq!(config.listeners, [listener]);
        assert_eq!(config.zookeeper.session_timeout, Duration::from_secs(120));
        assert_eq!(config.zookeeper.hosts.to_string(), "zk:2281/zuul");
        assert!(
            config.name_check == NameCheck::SanOrCommonName && !config.zookeeper.verify_hostnames
        );
        assert_eq!((config.zone, config.public_port, config.hostname), (None, None, None));
        assert_eq!(config.pid_file, Some(PathBuf::from("/var/run/zuul/fingergw.pid")));
        assert_eq!(config.control, Some(PathBuf::from("/var/lib/zuul/fingergw.socket")));
        assert_eq!(config.log, Log { format: LogFormat::Zuul, ..Log::default() });
    }

    #[test]
    fn every_option() {
        let config = conf(
            "listen_address = 127.0.0.1\nport = 9079\npublic_port = 79\nhostname = gw\nzone = w\n\
             tls_cert = /c\ntls_key = /k\ntls_ca = /a\ntls_verify_hostnames = off\nuser = zuul\n\
             command_socket = ~/s\n\
             state_dir = /x\nprometheus_port = 9090\nprometheus_addr = ::1",
        )
        .unwrap();
        assert_eq!(
            config.listeners,
            [Listener {
                tls: Some(ClientCertificate::Required),
                advertised: true,
                ..Listener::plain("127.0.0.1", 9079)
            }]
        );
        assert_eq!(config.public_port, Some(79));
        assert_eq!(config.admin, Some(("::1".to_owned(), 9090)));
        assert_eq!((config.hostname.as_deref(), config.zone.as_deref()), (Some("gw"), Some("w")));
        assert_eq!(config.name_check, NameCheck::Off);
        assert_eq!(config.tls.unwrap().ca, PathBuf::from("/a"));
        assert_eq!(config.user.as_deref(), Some("zuul"));
        assert_eq!(config.control, Some(PathBuf::from("~/s")), "upstream expands nothing here");
    }

    /// The manual page has the options that are read, and no others.
    #[test]
    fn the_page_has_every_option() {
        let (_, page) =
            include_str!("../../../docs/zuul-fingergw.8").split_once(".Sh ZUUL.CONF").unwrap();
        let (page, _) = page.split_once("\n.Sh ").unwrap();
        let (mut told, mut section) = (Vec::new(), "");
        for line in page.lines() {
            if let Some(name) = line.strip_prefix(".Ss ") {
                section = name.trim_matches(['[', ']']);
            } else if let Some(options) = line.strip_prefix(".It Ic ") {
                told.extend(options.split(" , ").map(|option| (section, option)));
            }
        }
        // What is not compiled in is not read.
        told.retain(|(section, option)| {
            cfg!(feature = "otlp") || *section != TRACING || *option == "enabled"
        });
        told.sort_unstable();
        let mut reader = Reader::new("zuul.conf");
        let known = |section, option| match section {
            FINGERGW => FINGERGW_OPTIONS.contains(&option),
            ZOOKEEPER => ZOOKEEPER_OPTIONS.contains(&option),
            _ => true,
        };
        assert!(told.iter().all(|(section, option)| known(*section, option)), "{told:?}");
        // While it is off nothing else of it is read.
        reader.ini = Ini::parse("[tracing]\nenabled = yes\n", []).unwrap();
        reader.config();
        assert_eq!(told, reader.asked.into_iter().collect::<Vec<_>>());
    }

    #[test]
    fn a_certificate_for_dialing_only() {
        let files = "tls_cert = /c\ntls_key = /k\ntls_ca = /a\ntls_client_only = Yes";
        let config = conf(files).unwrap();
        assert!(config.listeners[0].tls.is_none() && config.tls.is_some());
    }

    #[test]
    fn unknown_options_are_warned_of() {
        let text = "[finger]\nport = 79\n[zookeeper]\nhost = a\nhosts = zk:2281\ntls_cert = %(dir)s/c\n\
                    tls_key = k\ntls_ca = a\nDIR = /etc\nread_only = true\n[web]\nprot = 1\n";
        let environment = [("ZUUL_HOST".to_owned(), "x".to_owned())];
        let read = |text: &str| read("zuul.conf", text, environment.clone()).unwrap().warnings();
        assert_eq!(
            read(text),
            [
                "zuul.conf: [finger]: unknown section, ignored; did you mean [fingergw]?",
                "zuul.conf:4: [zookeeper] host: unknown option, ignored; did you mean hosts?",
                "zuul.conf:10: [zookeeper] read_only: unknown option, ignored",
            ]
        );
        let mut text = format!("{LEAST}[fingergw]\nstate_dir = /x\n");
        for section in [
            "scheduler",
            "executor",
            "merger",
            "web",
            "launcher",
            "keystore",
            "statsd",
            "database",
            "tracing",
            "webclient",
            "gearman",
            "connection fingergw",
            "auth zookeeper",
        ] {
            text.push_str(&format!("[{section}]\nlisten_adress = x\n"));
        }
        assert_eq!(read(&text), [""; 0]);
        assert_eq!(
            conf("listen_adress = ::1").unwrap().warnings(),
            ["zuul.conf:7: [fingergw] listen_adress: unknown option, ignored; did you mean \
                 listen_address?"]
        );
    }

    #[test]
    fn zookeeper_hosts_without_a_port_are_warned_of() {
        let warnings = |hosts: &str| {
            let text =
                format!("[zookeeper]\nhosts = {hosts}\ntls_cert = c\ntls_key = k\ntls_ca = a\n");
            read("zuul.conf", &text, []).unwrap().warnings()
        };
        assert_eq!(warnings("zk1:2281,zk2:2281"), [""; 0]);
        for hosts in ["zk1", "zk1:2281,zk2", "zk1:2181"] {
            let warnings = warnings(hosts);
            assert!(warnings.len() == 1 && warnings[0].contains("2281"), "{hosts}: {warnings:?}");
        }
    }

    #[test]
    fn homes() {
        let home = |user: &OsStr| match user.to_str()? {
            "" => Some(PathBuf::from("/root")),
            "zuul" => Some(PathBuf::from("/var/lib/zuul")),
            _ => None,
        };
        let cases = [
            ("~/gw.pid", "/root/gw.pid"),
            ("~zuul/run/gw.pid", "/var/lib/zuul/run/gw.pid"),
            ("~nobody-known/gw.pid", "~nobody-known/gw.pid"),
            ("/run/~/gw.pid", "/run/~/gw.pid"),
            ("gw.pid", "gw.pid"),
            ("~", "/root"),
        ];
        for (path, expanded) in cases {
            assert_eq!(expand(Path::new(path), home), Path::new(expanded), "{path}");
        }
    }

    #[test]
    fn oddities() {
        let port_alone = conf("prometheus_port = 0").unwrap();
        assert_eq!(port_alone.admin, Some(("0.0.0.0".to_owned(), 0)));
        assert_eq!(conf("prometheus_addr = ::1").unwrap().admin, None);
        assert_eq!(conf("public_port = 0").unwrap().public_port, None);
        assert_eq!(conf("user =").unwrap().user, None);
        assert_eq!(conf("command_socket =").unwrap().control, None);
        assert_eq!(conf("zone =").unwrap().zone.as_deref(), Some(""));
        assert_eq!(conf("port = +7_9").unwrap().listeners[0].port, 79);
        for bad in ["port = 0x4f", "port = _79", "port = 79 ; x", "port = ++79", "port = -1"] {
            assert!(conf(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn port_and_prometheus_port_are_two() {
        let same = conf(
            "port = 9079\nprometheus_port = 9079\nlisten_address = ::1\nprometheus_addr = ::1",
        );
        let faults = same.expect_err("a fault");
        let fault = faults.list()[0].to_string();
        let expected = "zuul.conf:8: [fingergw] prometheus_port = 9079: the listener on [::1]:9079";
        assert!(faults.list().len() == 1 && fault.starts_with(expected), "{fault}");
        let overlapping = conf("port = 9079\nprometheus_port = 9079").expect("no fault").warnings();
        let expected = "the addresses [::]:9079 and 0.0.0.0:9079 overlap: ";
        assert!(overlapping.len() == 1 && overlapping[0].starts_with(expected), "{overlapping:?}");
        assert_eq!(conf("port = 0\nprometheus_port = 0").expect("no fault").warnings(), [""; 0]);
    }

    #[test]
    fn the_command_socket_is_found_in_a_faulty_file() {
        let environment = [("ZUUL_RUN".to_owned(), "/run/z".to_owned())];
        let socket = |text: &str| command_socket(text, environment.clone());
        let path = |path: &str| Some(PathBuf::from(path));
        for faulty in ["port 79\n", "port = 1\nport = 2\n", "port = x\n", " = 5\n"] {
            let text = format!("stray\n[fingergw]\n{faulty}");
            assert_eq!(socket(&text), path(COMMAND_SOCKET), "{text}");
            assert_eq!(socket(&format!("{text}command_socket = /s\n")), path("/s"), "{text}");
            let twice = format!("[fingergw]\ncommand_socket = /s\n[fingergw]\n{faulty}");
            assert_eq!(socket(&twice), path("/s"), "{twice}");
        }
        let text = "[fingergw]\ncommand_socket = %(zuul_run)s/s\nstray\n";
        assert_eq!(socket(text), path("/run/z/s"));
        assert_eq!(socket("[fingergw]\ncommand_socket =\nstray\n"), None, "it is switched off");
        // Whose socket that is cannot be known.
        assert_eq!(socket("[web]\n[fingergw\ncommand_socket = /s\n"), None);
        assert_eq!(socket(LEAST), path(COMMAND_SOCKET));
    }

    #[test]
    fn all_faults_at_once() {
        let text = "[zookeeper]\nhosts =\ntls_cert = c\n[fingergw]\nport = x\ntls_key = k\nzone = a/b\n\
                    tls_client_only = maybe\nhostname = 5%\n[other]\nbad = 5%\n";
        let faults = read("zuul.conf", text, []).unwrap_err();
        let keys: Vec<_> =
            faults.list().iter().map(|fault| (fault.line, fault.key.as_str())).collect();
        assert_eq!(
            keys,
            [
                (Some(2), "[zookeeper] hosts"),
                (Some(5), "[fingergw] port"),
                (Some(7), "[fingergw] zone"),
                (Some(8), "[fingergw] tls_client_only"),
                (Some(9), "[fingergw] hostname"),
                (None, "[fingergw] tls_cert"),
                (None, "[fingergw] tls_ca"),
                (None, "[zookeeper] tls_key"),
                (None, "[zookeeper] tls_ca"),
            ]
        );
    }

    #[test]
    fn tracing_as_upstream_takes_it() {
        let traced =
            |lines: &str| conf(&format!("[tracing]\n{lines}")).map(|config| config.tracing);
        for off in ["", "enabled =", "enabled = maybe\nprotocol = x", "enabled = no\nbad = 5%"] {
            assert_eq!(traced(off), Ok(None), "{off}");
        }
        for on in ["1", "on", "Yes", "TRUE"] {
            let config = traced(&format!("enabled = {on}")).unwrap().unwrap();
            assert_eq!(config.endpoint.to_string(), "http://localhost:4317/");
            assert_eq!((config.service_name.as_str(), config.timeout.as_secs()), ("zuul", 10));
        }
        if !cfg!(feature = "otlp") {
            assert!(traced("enabled = true\nprotocol = x").is_ok(), "as upstream's gateway");
            return;
        }
        let empty = "endpoint =\ntls_ca =\ncertificate_file =\ncompression =\ninsecure = off\n";
        let http = traced(&format!("enabled = true\nprotocol = http/protobuf\n{empty}"));
        assert_eq!(http.unwrap().unwrap().endpoint.to_string(), "http://localhost:4318/v1/traces");
    }

    #[cfg(feature = "otlp")]
    #[test]
    fn tracing_and_all_that_is_wrong_with_it() {
        let faults = |lines: &str| -> Vec<_> {
            let read = conf(&format!("[tracing]\nenabled = true\n{lines}")).unwrap_err();
            read.list().iter().map(|fault| (fault.line, fault.key.clone())).collect()
        };
        let key = |line, key: &str| (line, format!("[tracing] {key}"));
        assert_eq!(
            faults("protocol = http\ntimeout = x\ncompression = br\nendpoint = 5%"),
            [
                key(Some(9), "protocol"),
                key(Some(10), "timeout"),
                key(Some(11), "compression"),
                key(Some(12), "endpoint"),
            ]
        );
        assert_eq!(
            faults("protocol = http/protobuf\ninsecure = yes\ntls_key = /k\nendpoint = c:1"),
            [key(Some(10), "insecure"), key(Some(11), "tls_key"), key(Some(12), "endpoint")]
        );
        assert_eq!(faults("certificate_file = /c"), [key(Some(9), "certificate_file")]);
        assert_eq!(faults("tls_key = /c"), [key(None, "tls_cert")]);
    }

    /// The file is Zuul's other services' as well.
    #[test]
    fn tracing_is_warned_of_where_it_is_not_what_it_seems() {
        let warnings =
            |lines: &str| conf(&format!("[tracing]\nenabled = true\n{lines}")).unwrap().warnings();
        let tls_in_vain = warnings("tls_ca = /a");
        if cfg!(feature = "otlp") {
            assert!(warnings("").is_empty());
            assert!(tls_in_vain[0].contains("http://localhost:4317/ is reached without it"));
            assert!(warnings("tls_ca = /a\nendpoint = https://c:1").is_empty());
        } else {
            assert!(tls_in_vain.len() == 1 && tls_in_vain[0].contains("--features otlp"));
        }
    }

    #[test]
    fn a_file_that_python_refuses() {
        let faults = read("zuul.conf", "[a]\nb\n[a]\n", []).unwrap_err();
        assert_eq!(faults.list().len(), 2);
        assert_eq!(
            faults.list()[0].to_string(),
            "zuul.conf:2: neither \"option = value\" nor a [section]"
        );
    }
}
