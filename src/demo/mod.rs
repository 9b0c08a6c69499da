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

use self::certificates::CertificateAuthority;
use self::job::Job;
use crate::config::{ClientCertificate, Limits, Listener, Log, LogOutput, NameCheck};
use crate::gateway::accept::socket::bind;
use crate::gateway::routing::Router;
use crate::gateway::{ListenerSettings, Server, Settings};
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

/// The options of the command line.
#[derive(Args)]
pub(crate) struct Options {
    /// Stream this file instead of a generated log, and follow it as it grows
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// End when the log has ended; with --log, at the present end of the file
    #[arg(long)]
    once: bool,
}

/// The name in the certificate and the registry entry of the west gateway: a DNS name, so that
/// clients send it as SNI.
const WEST_HOST: &str = "localhost";

/// Runs the demo. The streamed log goes to standard output, everything else to standard error.
pub(crate) fn run(options: &Options, debug: bool) -> ExitCode {
    let level = if debug { Level::DEBUG } else { Level::INFO };
    let run = || {
        let log = Log { level, output: LogOutput::Stderr, ..Log::default() };
        let mut logging = log::start(&log, None)?;
        logging.start_writer()?;
        let runtime = runtime::start()?;
        let result = runtime.block_on(show(options));
        // Does not wait for a write to a reader that has stalled.
        runtime.shutdown_background();
        // Writes the queued lines, so that the result comes last.
        drop(logging);
        result
    };
    match run() {
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

/// Streams the log, and returns the line that is printed last.
async fn show(options: &Options) -> Result<Option<String>> {
    let mut signals = StopSignals::new().context("cannot handle signals")?;
    let directory = private_directory().context("cannot create a temporary directory")?;
    let build = BuildId::new(&format!("{:032x}", fastrand::u128(..))).context("hexadecimal")?;
    let mut job = Job::prepare(directory.path(), &build, options.log.as_deref(), options.once)?;
    if options.once && job.length() == Some(0) {
        return Ok(Some("the log is empty".to_owned()));
    }
    let system = DemoZones::start(directory.path(), &build).await?;
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
    // The gateways log their streams when they stop, and the result should come last.
    system.stop().await;
    end.map(|received| report(&received?, job.length())).transpose()
}

/// Describes what was received of a log with `length` bytes, if that is known.
///
/// # Errors
/// Bytes are missing although standard output was open to the end.
fn report(received: &Received, length: Option<u64>) -> Result<String> {
    let Received { bytes, output_closed, compared } = *received;
    match length {
        Some(length) if length != bytes && !output_closed => {
            bail!("the log has {length} bytes, {bytes} came through")
        }
        _ => {
            let equal = if compared { ", every byte equal" } else { "" };
            Ok(format!("the log has ended: {bytes} bytes through 2 gateways{equal}"))
        }
    }
}

/// Creates a directory for the job and the keys, to which other users have no access.
fn private_directory() -> io::Result<TempDir> {
    tempfile::Builder::new()
        .prefix("zuul-fingergw-demo-")
        .permissions(fs::Permissions::from_mode(0o700))
        .tempdir()
}

/// The gateways of two zones, and an executor.
struct DemoZones {
    east: Zone,
    west: Zone,
    executor: SocketAddr,
    /// Whether the east gateway listens on the finger port as well.
    finger: bool,
}

/// The gateway of one zone.
struct Zone {
    address: SocketAddr,
    gateway: Server,
    registration: Registration,
}

impl DemoZones {
    async fn start(directory: &Path, build: &BuildId) -> Result<Self> {
        let registry = Arc::new(InMemoryRegistry::default());
        let authority = CertificateAuthority::new()?;

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

    /// Draws the route of the log with all addresses, from top to bottom.
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

    /// Returns commands that request the same log from another terminal.
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
    /// Opens a gateway as the daemon does, and registers the first of `sockets`.
    fn open(
        zone: &str,
        hostname: &str,
        sockets: Vec<TcpListener>,
        identity: &Identity,
        use_ssl: bool,
        registry: &Arc<InMemoryRegistry>,
    ) -> Result<Self> {
        let address = sockets.first().context("a gateway has a socket")?.local_addr()?;
        let acceptor = use_ssl
            .then(|| tls::acceptor(identity, ClientCertificate::Required, NameCheck::SanOnly));
        let listener = ListenerSettings {
            // Without rules or a PROXY header. The address is not used, because the socket is
            // bound.
            config: Listener::plain("127.0.0.1", address.port()),
            acceptor: acceptor.transpose()?,
        };
        let settings = Settings {
            listeners: vec![listener; sockets.len()].into(),
            connector: Some(tls::connector(identity, NameCheck::SanOnly)?),
            limits: Limits::default(),
        };
        let component = OwnComponent {
            hostname: hostname.to_owned(),
            public_port: Some(address.port()),
            zone: Some(zone.to_owned()),
            use_ssl,
        };
        let registration = registry.register(component.clone());
        registration.set_running();
        let router = Router::new(Registry::InMemory(Arc::clone(registry)), component);
        let gateway =
            Server::start(sockets, router, settings, Metrics::default(), Tracer::default())?;
        Ok(Self { address, gateway, registration })
    }
}

/// What was received of the log.
struct Received {
    bytes: u64,
    /// Whether the reader of standard output has closed it.
    output_closed: bool,
    /// Whether each byte was compared with the executor's file.
    compared: bool,
}

/// Requests `build` from `gateway`, compares its log with that of `job` and copies it to standard
/// output, while `job` advances.
async fn receive(gateway: SocketAddr, build: &BuildId, job: &mut Job) -> Result<Received> {
    let mut stream = TcpStream::connect(gateway).await.context("the east gateway")?;
    stream.write_all(format!("{build}\r\n").as_bytes()).await?;
    let mut buffer = vec![0; 16 * 1024];
    let mut received = Received { bytes: 0, output_closed: false, compared: job.is_comparable() };
    loop {
        let count = tokio::select! {
            read = stream.read(&mut buffer) => read.context("the log was aborted")?,
            grown = job.advance(received.bytes > 0) => {
                grown.context("the job's log")?;
                continue;
            }
        };
        if count == 0 {
            return Ok(received);
        }
        if received.compared && !job.contains(&buffer[..count], received.bytes)? {
            bail!("the log differs from the executor's within {count} bytes at {}", received.bytes);
        }
        let piece = buffer[..count].to_vec();
        match spawn_blocking(move || print(&piece)).await? {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                received.output_closed = true;
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
