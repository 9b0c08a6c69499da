//! The configuration: one validated [`Config`], from our TOML or from Zuul's own `zuul.conf`.
//!
//! The only place that knows keys and defaults. Whatever is wrong with a file is reported together,
//! each [`fault::ConfigError`] with file, line, key, value and what is allowed.

pub(crate) mod diff;
pub(crate) mod domain;
pub(crate) mod error;
pub(crate) mod fqdn;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
pub(crate) mod otlp;
pub(crate) mod parse;
mod tls;
pub(crate) mod toml;
pub(crate) mod zuul_conf;

use std::fmt;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use ipnet::IpNet;

pub(crate) use self::diff::ConfigDiff;
pub(crate) use self::domain::to_ascii;
pub(crate) use self::fqdn::fully_qualified as own_hostname;
#[cfg(feature = "otlp")]
pub(crate) use self::otlp::Protocol;
pub(crate) use self::otlp::Tracing;
pub(crate) use self::tls::{ClientCertificate, NameCheck, TlsFileKeys, TlsFiles};

use crate::os::file;

/// Everything an operator can say. Complete: what was not said has its default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    /// The name others dial and send as SNI; `None` is this machine's fully qualified name.
    pub(crate) hostname: Option<String>,
    /// The zone served.
    pub(crate) zone: Option<String>,
    /// The port others dial; `None` is the one the advertised listener got.
    pub(crate) public_port: Option<u16>,
    /// At least one.
    pub(crate) listeners: Vec<Listener>,
    /// The identity towards clients and other gateways; there if any listener speaks TLS.
    pub(crate) tls: Option<TlsFiles>,
    /// Which name a gateway's certificate must carry.
    pub(crate) name_check: NameCheck,
    pub(crate) zookeeper: ZooKeeper,
    /// Where health and metrics are told, host and port; placeholder if `None`.
    pub(crate) admin: Option<(String, u16)>,
    /// Who to be once the sockets are bound, if started as root.
    pub(crate) user: Option<String>,
    /// Where a process that detaches says who it is; `None` where it never does.
    pub(crate) pid_file: Option<PathBuf>,
    /// Where the command socket is to be.
    pub(crate) control: Option<PathBuf>,
    pub(crate) limits: Limits,
    pub(crate) log: Log,
    /// Where spans of streams go; placeholder if `None`.
    pub(crate) tracing: Option<Tracing>,
    /// What the file has that is ignored and most likely a mistake, each with its line.
    pub(crate) file_warnings: Vec<String>,
}

/// An access rule of a listener: what a request must match to be allowed. `None` matches everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    /// Networks of the client's address.
    pub(crate) networks: Option<Vec<IpNet>>,
    /// Tenants of the build, as its build request names them.
    pub(crate) tenants: Option<Vec<String>>,
    /// Names in the client's verified certificate; `*.` stands for one label in front.
    pub(crate) clients: Option<Vec<String>>,
}

/// One listening socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listener {
    /// Host name or address, without brackets.
    pub(crate) host: String,
    /// 0 takes any free port.
    pub(crate) port: u16,
    /// Speaks TLS, and wants to see this of the client.
    pub(crate) tls: Option<ClientCertificate>,
    /// The one that the registry entry describes; exactly one is.
    pub(crate) advertised: bool,
    /// Whose connections begin with a PROXY protocol header.
    pub(crate) proxy_protocol: Vec<IpNet>,
    /// Who may see what; without a rule everybody everything.
    pub(crate) allow: Vec<Rule>,
}

impl Listener {
    /// A plain one, open to everybody.
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

    /// The address as it is configured.
    pub(crate) fn address(&self) -> String {
        display_address(&self.host, self.port)
    }
}

/// `HOST:PORT`, IPv6 addresses in brackets.
pub(crate) fn display_address(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Refuses an address that one of `listeners` has.
fn refuse_taken(host: &str, port: u16, listeners: &[Listener]) -> parse::Parsed<()> {
    match listeners.iter().find(|other| parse::is_same((host, port), (&other.host, other.port))) {
        Some(other) => Err(format!(
            "the listener on {} takes this address; give each another address or port",
            other.address()
        )),
        None => Ok(()),
    }
}

impl Config {
    /// The command socket, unless it is where a `zuul.conf` has it that says nothing of one: such a
    /// configuration also runs where that directory does not exist.
    pub(crate) fn explicit_command_socket(&self) -> Option<&Path> {
        let path = self.control.as_deref();
        path.filter(|path| *path != Path::new(zuul_conf::COMMAND_SOCKET))
    }

    /// The certificates, keys and CA files that are read while the gateway runs.
    pub(crate) fn files(&self) -> Vec<&Path> {
        let identities = self.tls.iter().chain([&self.zookeeper.tls]);
        let collector = self.tracing.iter().flat_map(Tracing::files);
        identities.flat_map(|files| files.paths()).chain(collector).collect()
    }

    /// What is allowed and most likely a mistake.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let mut warnings = self.file_warnings.clone();
        if let (Some(zone), Some(_)) = (&self.zone, &self.tls)
            && let Some(plain) = self.listeners.iter().find(|listener| listener.advertised)
            && plain.tls.is_none()
        {
            warnings.push(format!(
                "the listener on {}, at which other gateways ask for the logs of zone {}, is without \
                 TLS although there are certificates for it: logs cross the network in clear text \
                 (set tls = true, or tls_client_only = false in a zuul.conf)",
                plain.address(),
                zone.escape_default(),
            ));
        }
        warnings.extend(self.overlaps());
        if let Some((host, port)) =
            self.zookeeper.hosts.servers.iter().find(|(_, port)| *port == 2181)
        {
            warnings.push(format!(
                "ZooKeeper at {}: 2181 is usually its port without TLS, which Zuul's services and \
                 this gateway do not speak (write the port with TLS, usually 2281, in zookeeper hosts)",
                display_address(host, *port),
            ));
        }
        let ruled = self.listeners.iter().find(|listener| !listener.allow.is_empty());
        for listener in &self.listeners {
            let address = listener.address();
            // Who gets through TLS has a certificate of ours, as the gateways of other zones.
            let anybody = listener.tls != Some(ClientCertificate::Required);
            if let Some(ruled) = ruled.filter(|_| anybody && listener.allow.is_empty()) {
                warnings.push(format!(
                    "the listener on {} has rules and the one on {address} has none: whoever \
                     reaches that sees every log (give it listener.allow tables as well)",
                    ruled.address(),
                ));
            }
            if listener.proxy_protocol.iter().any(|network| network.prefix_len() == 0) {
                warnings.push(format!(
                    "the listener on {address} believes everybody's PROXY header: any client can \
                     say that it is another (name your balancers in listener.proxy_protocol)"
                ));
            }
        }
        match &self.tracing {
            // Zuul's other services read the same section, so it is no fault of the file.
            Some(_) if !cfg!(feature = "otlp") => warnings.push(
                "[tracing] is enabled, but this program was built without it, so nothing is traced \
                 (cargo build --features otlp makes one that can)"
                    .to_owned(),
            ),
            Some(tracing) if tracing.tls_files_unused() => warnings.push(format!(
                "[tracing] names files of TLS, and {} is reached without it, as Zuul's services \
                 do: say https:// in endpoint",
                tracing.endpoint
            )),
            _ => {}
        }
        warnings
    }

    /// A warning of each pair of addresses of which one covers the other.
    fn overlaps(&self) -> Vec<String> {
        let listeners =
            self.listeners.iter().map(|listener| (listener.host.as_str(), listener.port));
        let admin = self.admin.iter().map(|(host, port)| (host.as_str(), *port));
        let addresses: Vec<_> = listeners.chain(admin).collect();
        let mut warnings = Vec::new();
        for (index, one) in addresses.iter().enumerate() {
            for other in &addresses[index + 1..] {
                if parse::overlap(*one, *other) {
                    let [one, other] =
                        [one, other].map(|(host, port)| display_address(host, *port));
                    warnings.push(format!(
                        "the addresses {one} and {other} overlap: unless the service manager passes \
                         sockets for both, only one of them can be bound ([::] is IPv4 as well; use \
                         another port)"
                    ));
                }
            }
        }
        warnings
    }
}

/// Zuul's ZooKeeper, always over TLS, as Zuul demands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ZooKeeper {
    pub(crate) hosts: Hosts,
    pub(crate) tls: TlsFiles,
    pub(crate) session_timeout: Duration,
    pub(crate) verify_hostnames: bool,
}

/// The servers of one ZooKeeper and the node below which Zuul lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hosts {
    /// At least one.
    pub(crate) servers: Vec<(String, u16)>,
    /// `/a/b`, or empty for none.
    pub(crate) chroot: String,
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

/// Bounds on what peers may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Connections at once, over all listeners.
    pub(crate) connections: usize,
    /// Connections at once from one client address, over all listeners.
    pub(crate) connections_per_address: usize,
    /// The bits of an IPv6 address that tell one client address from another, 1 to 128.
    pub(crate) ipv6_prefix: u8,
    /// Whose connections do not count against their addresses.
    pub(crate) exempt_networks: Vec<IpNet>,
    /// Clients' TLS handshakes at once, over all listeners.
    pub(crate) handshakes: usize,
    /// TLS handshakes a minute from one client address that has shown no certificate.
    pub(crate) handshakes_per_minute: usize,
    /// Streams a minute from one client address that are logged at info.
    pub(crate) streams_logged_per_minute: usize,
    /// Look-ups at once.
    pub(crate) lookups: usize,
    /// For a client's TLS handshake.
    pub(crate) handshake_timeout: Duration,
    /// For a client's request, once connected.
    pub(crate) request_timeout: Duration,
    /// For asking ZooKeeper where a build is.
    pub(crate) lookup_timeout: Duration,
    /// For reaching a next hop, TLS included.
    pub(crate) connect_timeout: Duration,
    /// For a next hop's first byte.
    pub(crate) first_byte_timeout: Duration,
    /// For a client to take one buffer of what it is sent.
    pub(crate) write_timeout: Duration,
    /// Bytes that the kernel may hold for a stream in each direction, its bookkeeping included: what
    /// has come from the next hop, and what the client has not acknowledged.
    pub(crate) stream_buffer: usize,
    /// Without a byte of the log, once there was one; `None` is for ever.
    pub(crate) stream_idle: Option<Duration>,
    /// From a request to the end of its stream; `None` is for ever.
    pub(crate) stream_total: Option<Duration>,
    /// Silence before the first keepalive probe.
    pub(crate) keepalive: Duration,
    /// How long connections are taken on, once our entry is out, when the gateway stops; 0 is allowed.
    pub(crate) lame_duck: Duration,
    /// For running streams when the gateway stops.
    pub(crate) grace: Duration,
}

impl Limits {
    /// Of the connections, one in so many may wait for its client to take something.
    pub(crate) const WAITING: usize = 8;

    /// Lowers the connections to as many as are `fitting`. Where these are fewer than wanted, one
    /// address has at most half of them.
    pub(crate) fn fit_connections(&mut self, fitting: usize) {
        if fitting < self.connections {
            self.connections = fitting;
            self.connections_per_address = self.connections_per_address.min(fitting.div_ceil(2));
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 10_000,
            connections_per_address: 1000,
            ipv6_prefix: 64,
            exempt_networks: Vec::new(),
            handshakes: 2048,
            handshakes_per_minute: 3000,
            streams_logged_per_minute: 1200,
            lookups: 4096,
            handshake_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(10),
            lookup_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
            first_byte_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(60),
            stream_buffer: 1024 * 1024,
            stream_idle: None,
            stream_total: None,
            keepalive: Duration::from_secs(60),
            lame_duck: Duration::from_secs(2),
            grace: Duration::from_secs(30),
        }
    }
}

/// How much is logged, how, and where to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Log {
    pub(crate) level: ::tracing::Level,
    pub(crate) format: LogFormat,
    pub(crate) output: LogOutput,
    /// Where the above comes from, if not from the configuration itself.
    pub(crate) log_config: Option<LogConfig>,
}

/// The `log_config` of a `zuul.conf`. Its level counts whatever `-d` says, as with upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogConfig {
    pub(crate) file: String,
    /// Parts of it that have no effect.
    pub(crate) ignored: Vec<String>,
}

/// The shape of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogFormat {
    Text,
    Json,
    /// That of Zuul's own services.
    Zuul,
}

/// Where log lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LogOutput {
    Stdout,
    Stderr,
    /// Appended to; opened anew when it was rotated.
    File(PathBuf),
}

impl LogOutput {
    /// The output called `path`. The usual names of the standard streams are links, which root does
    /// not follow, and which cannot be opened where a stream is a socket, as under systemd.
    fn at(path: PathBuf) -> Self {
        match path.to_str() {
            Some("/dev/stdout" | "/dev/fd/1" | "/proc/self/fd/1") => Self::Stdout,
            Some("/dev/stderr" | "/dev/fd/2" | "/proc/self/fd/2") => Self::Stderr,
            _ => Self::File(path),
        }
    }
}

impl fmt::Display for LogOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => f.write_str("standard output"),
            Self::Stderr => f.write_str("standard error"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

impl Log {
    /// With `-d`, which counts only without a log_config, as with upstream.
    pub(crate) fn with_debug(self, debug: bool) -> Self {
        match self.log_config {
            None if debug => Self { level: self.level.max(::tracing::Level::DEBUG), ..self },
            _ => self,
        }
    }

    /// A warning of the parts of its `log_config` that have no effect, if there are any, which says
    /// where lines go instead.
    pub(crate) fn ignored(&self) -> Option<String> {
        let LogConfig { file, ignored } = self.log_config.as_ref()?;
        if ignored.is_empty() {
            return None;
        }
        let (level, output) = (self.level.as_str().to_lowercase(), &self.output);
        Some(format!(
            "{file}: level and output are taken, these are not: {}; lines go to {output} from level \
             {level} on",
            ignored.join(", ")
        ))
    }

    /// The warning of [`Self::ignored`], if it is not the one that there was `before`.
    pub(crate) fn new_warnings(&self, before: &Self) -> Option<String> {
        self.ignored().filter(|warning| before.ignored().as_ref() != Some(warning))
    }

    /// For a process that has left its terminal: what would have gone there goes to a file.
    pub(crate) fn for_daemon(self) -> Self {
        let output = match self.output {
            LogOutput::File(path) => path,
            LogOutput::Stdout | LogOutput::Stderr => PathBuf::from(DETACHED_LOG),
        };
        Self { output: LogOutput::File(output), ..self }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: ::tracing::Level::INFO,
            format: LogFormat::Text,
            output: LogOutput::Stdout,
            log_config: None,
        }
    }
}

/// Where upstream's gateway logs when it has detached.
const DETACHED_LOG: &str = "/var/log/zuul/fingergw.log";

/// Where people go with port 79: upstream's default address.
const DEFAULT_HOST: &str = "::";
const DEFAULT_PORT: u16 = 79;

/// Where a configuration is looked for when none is named, the first that exists.
const PLACES: [&str; 2] = ["/etc/zuul/zuul-fingergw.toml", "/etc/zuul/zuul.conf"];

/// The configuration file to read: `named`, where `~` is a home even if no shell has looked at it, or
/// the first of the usual places.
///
/// # Errors
/// There is none.
pub(crate) fn locate(named: Option<&Path>) -> Result<PathBuf> {
    if let Some(named) = named {
        return Ok(zuul_conf::expand_user(named));
    }
    let home = std::env::home_dir().map(|home| home.join("zuul.conf"));
    let mut places = PLACES.iter().map(PathBuf::from).chain(home);
    let found = places.clone().find(|place| place.exists());
    found.with_context(|| {
        let places: Vec<_> = places.by_ref().map(|place| place.display().to_string()).collect();
        format!("no configuration: none of {} exists; name one with -c FILE", places.join(", "))
    })
}

/// Whether `path` holds our TOML; anything else is a `zuul.conf`.
pub(crate) fn is_toml(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("toml"))
}

/// Reads and checks the configuration in `path`.
///
/// # Errors
/// All [`fault::ConfigErrors`] of the file, or why it cannot be read.
pub(crate) fn load(path: &Path) -> Result<Config> {
    let bytes = file::read(path).map_err(|error| unreadable(path, &error))?;
    let Ok(text) = String::from_utf8(bytes) else {
        bail!("{}: is not UTF-8 text", path.display());
    };
    // Some editors put a byte order mark there.
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let name = path.display().to_string();
    if is_toml(path) {
        Ok(toml::read(&name, text)?)
    } else {
        let read = zuul_conf::read(&name, text, environment());
        read.map_err(|faults| match toml::is_likely(text) {
            true => anyhow!(
                "{name}: is TOML, and was read as a zuul.conf, because its name does not end in \
                 .toml; rename it"
            ),
            false => faults.into(),
        })
    }
}

/// The command socket that the configuration in `path` sets, whatever else is wrong with it: the
/// gateway that runs was started with an earlier version of it.
pub(crate) fn command_socket(path: &Path) -> Option<PathBuf> {
    let bytes = file::read(path).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    match is_toml(path) {
        true => toml::command_socket(text),
        false => zuul_conf::command_socket(text, environment()),
    }
}

/// The variables that Zuul's services take as options of every section of a `zuul.conf`.
fn environment() -> impl Iterator<Item = (String, String)> {
    // Other variables need not be UTF-8, and are not ours.
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| name.starts_with("ZUUL_"))
}

/// Why the configuration in `path` cannot be read, and what to do.
fn unreadable(path: &Path, error: &io::Error) -> anyhow::Error {
    let name = path.display();
    match error.kind() {
        ErrorKind::PermissionDenied => {
            let user = rustix::process::geteuid().as_raw();
            anyhow!(
                "{name}: cannot be read by user id {user}: {error}; run this as root or as the \
                 gateway's user, or change its owner or mode"
            )
        }
        _ => anyhow!("{name}: cannot be read: {error}"),
    }
}
