//! `zuul-fingergw demo`: a small system in one process, on loopback.
//!
//! Zone `east` has a gateway that speaks plain finger; zone `west` has one that speaks mutual TLS,
//! and an executor. A build's log crosses from west to east. The gateways are the real ones; only
//! the registry ([`InMemoryRegistry`]) and the executor ([`executor`]) are stand-ins.

pub(crate) mod certificates;
pub(crate) mod executor;
pub(crate) mod job;

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::spawn_blocking;
use tracing::Level;

use self::certificates::Authority;
use self::job::Job;
use crate::config::{ClientCertificate, Limits, Listener, Log, LogOutput, NameCheck};
use crate::gateway::accept::socket::bind;
use crate::gateway::routing::Resolver;
use crate::gateway::{Gateway, Settings};
use crate::model::build_id::BuildId;
use crate::model::build_request::{Build, BuildLocation, Executor};
use crate::model::component::OwnComponent;
use crate::os::runtime;
use crate::os::signals::StopSignals;
use crate::registry::in_memory::InMemoryRegistry;
use crate::registry::{Registration, Registry};
use crate::telemetry::log;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::otlp::Tracer;
use crate::tls;
use crate::tls::Identity;

/// What a person may ask of the demo.
#[derive(Args)]
pub(crate) struct Options {
    /// Stream this file instead of a made-up log, and follow it as it grows
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// End with the log; with --log, after what the file holds now
    #[arg(long)]
    once: bool,
}

/// The name in the west gateway's certificate and registry entry: a DNS name, so that it is sent
/// as SNI.
const WEST_HOST: &str = "localhost";

/// Runs the demo. The log goes to stdout, byte for byte; everything else to stderr.
pub(crate) fn run(options: &Options, debug: bool) -> ExitCode {
    let level = if debug { Level::DEBUG } else { Level::INFO };
    let shown = || {
        let log = Log { level, output: LogOutput::Stderr, ..Log::default() };
        let mut logging = log::start(&log, None)?;
        logging.start_writer()?;
        let runtime = runtime::start()?;
        let shown = runtime.block_on(show(options));
        // A write to a reader that has stalled is not waited for.
        runtime.shutdown_background();
        // Writes the lines that wait, so that the result is the last one.
        drop(logging);
        shown
    };
    match shown() {
        Ok(result) => {
            if let Some(result) = result {
                eprintln!("{result}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns what came of it, to be printed as the last line.
async fn show(options: &Options) -> Result<Option<String>> {
    let mut signals = StopSignals::new().context("cannot take signals")?;
    let directory = private_directory().context("no temporary directory")?;
    let build = BuildId::new(&format!("{:032x}", fastrand::u128(..))).context("hexadecimal")?;
    let mut job = Job::prepare(directory.path(), &build, options)?;
    if options.once && job.length() == Some(0) {
        return Ok(Some("the log is empty".to_owned()));
    }
    let system = System::start(directory.path(), &build).await?;
    eprint!("{}", system.drawing(&build));
    if !options.once {
        eprint!("{}", system.commands(&build, directory.path()));
    }

    let end = tokio::select! {
        received = receive(system.east.address, &build, &mut job) => Some(received),
        signal = signals.next() => {
            eprintln!("{signal}: the demo ends");
            None
        }
    };
    // Before the result is shown: the gateways log their streams when they stop.
    system.stop().await;
    end.map(|received| report(&received?, job.length())).transpose()
}

/// Returns what came through of a log that has `length` bytes, if that is known.
///
/// # Errors
///
/// Bytes are missing although the reader of standard output wanted them all.
fn report(received: &Received, length: Option<u64>) -> Result<String> {
    let Received { bytes, enough, compared } = *received;
    match length {
        Some(length) if length != bytes && !enough => {
            bail!("the log has {length} bytes, {bytes} came through")
        }
        _ => {
            let equal = if compared { ", every byte equal" } else { "" };
            Ok(format!("the log has ended: {bytes} bytes through 2 gateways{equal}"))
        }
    }
}

/// A directory for the job and the keys, which nobody else may look into.
fn private_directory() -> io::Result<TempDir> {
    tempfile::Builder::new()
        .prefix("zuul-fingergw-demo-")
        .permissions(fs::Permissions::from_mode(0o700))
        .tempdir()
}

/// Two zones.
struct System {
    east: Zone,
    west: Zone,
    executor: SocketAddr,
    /// Whether the east gateway could have finger's own port as well.
    finger: bool,
}

/// One zone's gateway.
struct Zone {
    address: SocketAddr,
    gateway: Gateway,
    registration: Registration,
}

impl System {
    async fn start(directory: &Path, build: &BuildId) -> Result<Self> {
        let registry = Arc::new(InMemoryRegistry::default());
        let authority = Authority::new()?;

        let streamer = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let executor = streamer.local_addr()?;
        tokio::spawn(executor::serve(streamer, directory.join("builds")));
        registry.add_build(
            build.clone(),
            Build {
                tenant: None,
                trace_parent: None,
                location: BuildLocation::Executor(Executor {
                    hostname: executor.ip().to_string(),
                    port: executor.port(),
                    zone: Some("west".to_owned()),
                }),
            },
        );

        let (west_identity, _) = authority.identity(WEST_HOST)?;
        let socket = loopback(0)?;
        let west = Zone::open("west", WEST_HOST, vec![socket], &west_identity, true, &registry)?;

        let (east_identity, pem) = authority.identity("east.demo")?;
        fs::write(directory.join("ca.pem"), authority.pem())?;
        fs::write(directory.join("client.pem"), pem)?;
        let mut sockets = vec![loopback(0)?];
        let finger_port = loopback(79);
        let finger = finger_port.is_ok();
        sockets.extend(finger_port);
        let east = Zone::open("east", "127.0.0.1", sockets, &east_identity, false, &registry)?;
        registry.wait_for_gateways(2).await;
        Ok(Self { east, west, executor, finger })
    }

    /// The way of the log with all addresses, to be read from top to bottom.
    fn drawing(&self, build: &BuildId) -> String {
        let (east, west, executor) = (self.east.address, self.west.address, self.executor);
        let finger = if self.finger { " and 127.0.0.1:79" } else { "" };
        format!(
            "The log of build {build} takes this way:\n\
             \n\
             zone west   executor   {executor}\n\
             \x20              │ plain\n\
             \x20           gateway    {WEST_HOST}:{port}\n\
             \x20              ║ mutual TLS\n\
             zone east   gateway    {east}{finger}\n\
             \x20              │ plain, as finger asks\n\
             \x20           this terminal\n\
             \n",
            port = west.port(),
        )
    }

    /// The commands that ask for the same log from another terminal.
    fn commands(&self, build: &BuildId, directory: &Path) -> String {
        let (east, west) = (self.east.address, self.west.address);
        let directory = directory.display();
        let finger = if self.finger {
            format!("    finger {build}@127.0.0.1")
        } else {
            "(finger always asks port 79, which this process could not have)".to_owned()
        };
        format!(
            "Ask for it from another terminal as well; Ctrl-C ends the demo:\n\
             \x20   printf '{build}\\r\\n' | nc {ip} {east_port}\n\
             \x20   printf '{build}\\r\\n' | openssl s_client -quiet -connect {west} -servername {WEST_HOST} \\\n\
             \x20       -CAfile {directory}/ca.pem -cert {directory}/client.pem -key {directory}/client.pem\n\
             {finger}\n\
             \n",
            ip = east.ip(),
            east_port = east.port(),
        )
    }

    async fn stop(self) {
        for zone in [self.east, self.west] {
            zone.gateway.drain(Duration::ZERO).await;
            zone.registration.close(Duration::from_secs(1)).await;
        }
    }
}

fn loopback(port: u16) -> Result<TcpListener> {
    bind(SocketAddr::from(([127, 0, 0, 1], port)))
}

impl Zone {
    /// Opens a gateway as the daemon does; the first of `sockets` is the one it registers.
    fn open(
        zone: &str,
        hostname: &str,
        sockets: Vec<TcpListener>,
        identity: &Identity,
        use_ssl: bool,
        registry: &Arc<InMemoryRegistry>,
    ) -> Result<Self> {
        let address = sockets.first().context("a gateway has a socket")?.local_addr()?;
        let acceptor = use_ssl.then(|| {
            let (client, names) = (ClientCertificate::Required, NameCheck::SanOnly);
            tls::acceptor(identity, client, names)
        });
        // Open to everybody: of what else there is to say of a listener nothing counts here.
        let listener = Listener::plain("127.0.0.1", address.port());
        let settings = Settings {
            listeners: vec![listener; sockets.len()].into(),
            acceptors: vec![acceptor.transpose()?; sockets.len()],
            connector: Some(tls::connector(identity, NameCheck::SanOnly)?),
            limits: Limits::default(),
        };
        let announcement = OwnComponent {
            hostname: hostname.to_owned(),
            public_port: Some(address.port()),
            zone: Some(zone.to_owned()),
            use_ssl,
        };
        let registration = registry.register(announcement.clone());
        registration.set_running();
        let resolver = Resolver::new(Registry::InMemory(Arc::clone(registry)), announcement);
        let gateway =
            Gateway::open(sockets, resolver, settings, Metrics::default(), Tracer::default())?;
        Ok(Self { address, gateway, registration })
    }
}

/// What came through.
struct Received {
    bytes: u64,
    /// Whether the reader of standard output has closed it.
    enough: bool,
    /// Whether each byte has been compared with the executor's file.
    compared: bool,
}

/// Asks `gateway` for `build`, compares the log with that of `job` and copies it to stdout, while
/// `job` goes on.
async fn receive(gateway: SocketAddr, build: &BuildId, job: &mut Job) -> Result<Received> {
    let mut stream = TcpStream::connect(gateway).await.context("the east gateway")?;
    stream.write_all(format!("{build}\r\n").as_bytes()).await?;
    let mut buffer = vec![0; 16 * 1024];
    let mut received = Received { bytes: 0, enough: false, compared: job.is_comparable() };
    loop {
        let count = tokio::select! {
            read = stream.read(&mut buffer) => read.context("the log was cut")?,
            grown = job.go_on(received.bytes > 0) => {
                grown.context("the job's log")?;
                continue;
            }
        };
        if count == 0 {
            return Ok(received);
        }
        if received.compared && !job.contains(&buffer[..count], received.bytes)? {
            bail!("within {count} bytes at {} the log differs from the executor's", received.bytes);
        }
        let piece = buffer[..count].to_vec();
        match spawn_blocking(move || print(&piece)).await? {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                received.enough = true;
                return Ok(received);
            }
            printed => printed.context("stdout")?,
        }
        received.bytes += count as u64;
    }
}

fn print(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes)?;
    stdout.flush()
}
