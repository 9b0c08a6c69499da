//! The configuration: one validated [`Config`], read from our TOML or from a `zuul.conf` of Zuul.
//!
//! Keys and defaults are defined nowhere else. All errors of a file are reported together, each
//! [`error::ConfigError`] with file, line, key, value and what is allowed.

pub(crate) mod diff;
pub(crate) mod error;
pub(crate) mod fqdn;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod limits;
mod load;
mod log;
pub(crate) mod otlp;
pub(crate) mod parse;
mod tls;
pub(crate) mod toml;
mod warnings;
pub(crate) mod zuul_conf;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;

pub(crate) use self::diff::ConfigDiff;
pub(crate) use self::fqdn::fully_qualified as own_hostname;
pub(crate) use self::limits::Limits;
pub(crate) use self::load::{command_socket, is_toml, load, locate};
pub(crate) use self::log::{Log, LogConfig, LogFormat, LogOutput};
#[cfg(feature = "otlp")]
pub(crate) use self::otlp::Protocol;
pub(crate) use self::otlp::Tracing;
pub(crate) use self::parse::to_ascii;
pub(crate) use self::tls::{ClientCertificate, NameCheck, TlsFileKeys, TlsFiles};

/// All settings; those that the file leaves out have their defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    /// The name that other components dial and send as SNI. `None` is this machine's fully
    /// qualified name.
    pub(crate) hostname: Option<String>,
    /// The zone that this gateway serves.
    pub(crate) zone: Option<String>,
    /// The port that other components dial. `None` is the port of the advertised listener.
    pub(crate) public_port: Option<u16>,
    /// At least one.
    pub(crate) listeners: Vec<Listener>,
    /// The identity towards clients and other gateways; set if any listener speaks TLS.
    pub(crate) tls: Option<TlsFiles>,
    /// How the names in the certificates of other gateways are checked.
    pub(crate) name_check: NameCheck,
    pub(crate) zookeeper: ZooKeeper,
    /// Host and port of the HTTP server for health and metrics, if there is one.
    pub(crate) admin: Option<(String, u16)>,
    /// The user to run as once the sockets are bound, if started as root.
    pub(crate) user: Option<String>,
    /// The pid file of a daemonized process. `None` if it never daemonizes.
    pub(crate) pid_file: Option<PathBuf>,
    /// The path of the command socket, if there is one.
    pub(crate) control: Option<PathBuf>,
    pub(crate) limits: Limits,
    pub(crate) log: Log,
    /// Where spans are exported to, if anywhere.
    pub(crate) tracing: Option<Tracing>,
    /// Warnings about parts of the file that are ignored, each with its line.
    pub(crate) file_warnings: Vec<String>,
}

/// An access rule of a listener: what a request must match to be allowed. `None` matches
/// everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    /// Networks of the client's address.
    pub(crate) networks: Option<Vec<IpNet>>,
    /// Tenants of the build, as its build request names them.
    pub(crate) tenants: Option<Vec<String>>,
    /// Names in the client's verified certificate; `*.` stands for one label in front.
    pub(crate) clients: Option<Vec<String>>,
}

/// A listening socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listener {
    /// Host name or address, without brackets.
    pub(crate) host: String,
    /// 0 takes any free port.
    pub(crate) port: u16,
    /// Whether it requests client certificates; `None` without TLS.
    pub(crate) tls: Option<ClientCertificate>,
    /// Whether the registry entry contains its port. Exactly one listener is advertised.
    pub(crate) advertised: bool,
    /// Networks of proxies, whose connections begin with a PROXY protocol header.
    pub(crate) proxy_protocol: Vec<IpNet>,
    /// A request is allowed if one of the rules matches, or if there are none.
    pub(crate) allow: Vec<Rule>,
}

/// Port 79 on all addresses, as in Zuul.
const DEFAULT_HOST: &str = "::";
const DEFAULT_PORT: u16 = 79;

impl Listener {
    /// A listener without TLS and rules.
    pub(crate) fn plain(host: &str, port: u16) -> Self {
        Self {
            host: host.to_owned(),
            port,
            tls: None,
            advertised: false,
            proxy_protocol: Vec::new(),
            allow: Vec::new(),
        }
    }

    /// The configured address as `HOST:PORT`.
    pub(crate) fn address(&self) -> String {
        display_address(&self.host, self.port)
    }
}

/// `HOST:PORT`, IPv6 addresses in brackets.
pub(crate) fn display_address(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Returns an error if one of `listeners` has the address.
fn check_address_is_free(host: &str, port: u16, listeners: &[Listener]) -> parse::Parsed<()> {
    match listeners.iter().find(|other| parse::is_same((host, port), (&other.host, other.port))) {
        Some(other) => Err(format!(
            "the listener on {} has this address; give each another address or port",
            other.address()
        )),
        None => Ok(()),
    }
}

impl Config {
    /// The path of the command socket, unless it is the default of a `zuul.conf`, which must also
    /// work where the default's directory does not exist.
    pub(crate) fn explicit_command_socket(&self) -> Option<&Path> {
        let path = self.control.as_deref();
        path.filter(|path| *path != Path::new(zuul_conf::COMMAND_SOCKET))
    }

    /// The pid file, unless it is the default of a `zuul.conf`, whose directory is missing wherever
    /// the gateway always runs with `-f`.
    pub(crate) fn explicit_pid_file(&self) -> Option<&Path> {
        let path = self.pid_file.as_deref();
        path.filter(|path| *path != Path::new(zuul_conf::PID_FILE))
    }

    /// The certificates, keys and CA files that are read while the gateway runs.
    pub(crate) fn files(&self) -> Vec<&Path> {
        let identities = self.tls.iter().chain([&self.zookeeper.tls]);
        let collector = self.tracing.iter().flat_map(Tracing::files);
        identities.flat_map(|files| files.paths()).chain(collector).collect()
    }
}

/// The connection to Zuul's ZooKeeper, which is always over TLS, as Zuul demands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ZooKeeper {
    pub(crate) hosts: Hosts,
    pub(crate) tls: TlsFiles,
    pub(crate) session_timeout: Duration,
    pub(crate) verify_hostnames: bool,
}

/// The servers of one ZooKeeper ensemble and the node that Zuul's nodes are below.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hosts {
    /// Host and port; at least one.
    pub(crate) servers: Vec<(String, u16)>,
    /// `/a/b`, or empty.
    pub(crate) chroot: String,
}

impl Hosts {
    /// Returns a warning if a server has ZooKeeper's usual port without TLS. `location` is that of
    /// the setting in the file.
    fn plain_port_warning(&self, location: &str) -> Option<String> {
        let (host, port) = self.servers.iter().find(|(_, port)| *port == 2181)?;
        Some(format!(
            "{location}: {} is usually ZooKeeper's port without TLS, which neither Zuul nor this gateway \
             uses, and the default port in a zuul.conf: set the port with TLS, usually {}",
            display_address(host, *port),
            display_address(host, 2281),
        ))
    }
}

impl fmt::Display for Hosts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (host, port)) in self.servers.iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            write!(f, "{comma}{}", display_address(host, *port))?;
        }
        f.write_str(&self.chroot)
    }
}
