//! `zuul-fingergw demo`: a small system in one process, on loopback.
//!
//! Zone `east` has a gateway that speaks plain finger; zone `west` has one that speaks mutual TLS,
//! and an executor. A build's log crosses from west to east. The gateways are the real ones; only
//! the registry ([`Embedded`]) and the executor ([`executor`]) are stand-ins.

mod certificates;
mod executor;
mod job;

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
use crate::admin::metrics::Metrics;
use crate::config::{Limits, Listener, Log, LogOutput};
use crate::gateway::listener::bind;
use crate::gateway::resolver::Resolver;
use crate::gateway::{Gateway, Settings};
use crate::log;
use crate::otlp::{Origin, Tracer};
use crate::registry::build::{Build, BuildId, Executor, Place};
use crate::registry::component::Announcement;
use crate::registry::embedded::Embedded;
use crate::registry::{Registration, Registry};
use crate::service::runtime;
use crate::service::signals::StopSignals;
use crate::tls::{self, ClientCertificate, Identity, Names};

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
        logging.begin()?;
        let runtime = runtime::start()?;
        let shown = runtime.block_on(show(options));
        // A write to a reader that has stalled is not waited for.
        runtime.shutdown_background();
        shown
    };
    match shown() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn show(options: &Options) -> Result<()> {
    let mut signals = StopSignals::new().context("cannot take signals")?;
    let directory = private_directory().context("no temporary directory")?;
    let build = BuildId::new(&format!("{:032x}", fastrand::u128(..))).context("hexadecimal")?;
    let mut job = Job::prepare(directory.path(), &build, options)?;
    if options.once && job.length() == Some(0) {
        eprintln!("the log is empty");
        return Ok(());
    }
    let system = System::start(directory.path(), &build).await?;
    system.introduce(&build, directory.path());

    tokio::select! {
        received = receive(system.east.address, &build, &mut job) => {
            let received = received?;
            match job.length() {
                Some(length) if length != received.bytes && !received.enough => {
                    bail!("the log has {length} bytes, {} came through", received.bytes)
                }
                _ => eprintln!("the log has ended: {} bytes", received.bytes),
            }
        }
        signal = signals.next() => eprintln!("{signal}: the demo ends"),
    }
    system.stop().await;
    Ok(())
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
        let registry = Arc::new(Embedded::default());
        let authority = Authority::new()?;

        let streamer = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let executor = streamer.local_addr()?;
        tokio::spawn(executor::serve(streamer, directory.join("builds")));
        registry.add_build(
            build.clone(),
            Build {
                tenant: None,
                origin: Origin::default(),
                place: Place::On(Executor {
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
        registry.until_gateways(2).await;
        Ok(Self { east, west, executor, finger })
    }

    /// Says what there is, and how to ask for it from another terminal.
    fn introduce(&self, build: &BuildId, directory: &Path) {
        let (east, west, executor) = (self.east.address, self.west.address, self.executor);
        let directory = directory.display();
        eprintln!(
            "zone east: gateway on {east}, plain\n\
             zone west: gateway on {west}, mutual TLS; executor's log streamer on {executor}\n\
             build {build} runs in zone west. Its log's way:\n\
             \x20   client <- gateway east {east} <- TLS <- gateway west {WEST_HOST}:{port} <- executor {executor}\n\
             Ask for it from another terminal:\n\
             \x20   printf '{build}\\r\\n' | nc {ip} {east_port}\n\
             \x20   printf '{build}\\r\\n' | openssl s_client -quiet -connect {west} -servername {WEST_HOST} \\\n\
             \x20       -CAfile {directory}/ca.pem -cert {directory}/client.pem -key {directory}/client.pem",
            port = west.port(),
            ip = east.ip(),
            east_port = east.port(),
        );
        if self.finger {
            eprintln!("    finger {build}@127.0.0.1");
        } else {
            eprintln!("(finger itself always asks port 79, which is taken or not allowed here)");
        }
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
        registry: &Arc<Embedded>,
    ) -> Result<Self> {
        let address = sockets.first().context("a gateway has a socket")?.local_addr()?;
        let acceptor = use_ssl.then(|| {
            let (client, names) = (ClientCertificate::Required, Names::DialedStrictly);
            tls::acceptor(identity, client, names, Some(zone))
        });
        // Open to everybody: of what else there is to say of a listener nothing counts here.
        let listener = Listener::plain("127.0.0.1", address.port());
        let settings = Settings {
            listeners: vec![listener; sockets.len()].into(),
            acceptors: vec![acceptor.transpose()?; sockets.len()],
            connector: Some(tls::connector(identity, Names::DialedStrictly)?),
            limits: Limits::default(),
        };
        let announcement = Announcement {
            hostname: hostname.to_owned(),
            public_port: Some(address.port()),
            zone: Some(zone.to_owned()),
            use_ssl,
        };
        let registration = registry.register(announcement.clone());
        registration.running();
        let resolver = Resolver::new(Registry::Embedded(Arc::clone(registry)), announcement);
        let gateway =
            Gateway::open(sockets, resolver, settings, Metrics::default(), Tracer::default())?;
        Ok(Self { address, gateway, registration })
    }
}

/// What came through.
struct Received {
    bytes: u64,
    /// Whoever reads our output has closed it.
    enough: bool,
}

/// Asks `gateway` for `build` and copies the log to stdout while `job` goes on.
async fn receive(gateway: SocketAddr, build: &BuildId, job: &mut Job) -> Result<Received> {
    let mut stream = TcpStream::connect(gateway).await.context("the east gateway")?;
    stream.write_all(format!("{build}\r\n").as_bytes()).await?;
    let mut buffer = vec![0; 16 * 1024];
    let mut bytes = 0;
    loop {
        let count = tokio::select! {
            read = stream.read(&mut buffer) => read.context("the log was cut")?,
            grown = job.go_on(bytes > 0) => {
                grown.context("the job's log")?;
                continue;
            }
        };
        if count == 0 {
            return Ok(Received { bytes, enough: false });
        }
        let piece = buffer[..count].to_vec();
        match spawn_blocking(move || print(&piece)).await? {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                return Ok(Received { bytes, enough: true });
            }
            printed => printed.context("stdout")?,
        }
        bytes += count as u64;
    }
}

fn print(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes)?;
    stdout.flush()
}
