//! The system under load: a real ZooKeeper, two zones with two gateways and an executor each, and a
//! gateway without a zone in front of them, with a proxy in each link that can fail.
//!
//! ```text
//!                     ┌─▶ west-1 ─┐
//!  clients ──▶ outer ─┤  west-2  ─┴▶ executor of west        all gateways ──▶ ZooKeeper
//!     │               ├─▶ east-1 ─┐
//!     └─ (also) ──────┴─▶ east-2 ─┴▶ executor of east
//! ```

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;

use crate::executor::Executor;
use crate::journal::{Journal, Parts};
use crate::support::certificates::Identity;
use crate::support::client::connector;
use crate::support::gateway::{Builder, Gateway};
use crate::support::proxy::Proxy;
use crate::support::system::{System, Worker};
use crate::support::zookeeper::ZooKeeper;

pub(crate) const ZONES: [&str; 2] = ["west", "east"];

/// Name and zone of each gateway.
pub(crate) const GATEWAYS: [(&str, Option<usize>); 5] = [
    ("outer", None),
    ("west-1", Some(0)),
    ("west-2", Some(0)),
    ("east-1", Some(1)),
    ("east-2", Some(1)),
];

/// The gateways that run the whole time, and are measured.
pub(crate) const SURVIVORS: [usize; 2] = [0, 3];

/// Clients that do not read for this long are reset.
pub(crate) const WRITE_TIMEOUT: Duration = Duration::from_secs(12);

/// The time limit of the recovery from a failure.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(90);

/// The interval of checks for recovery.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// The addresses of a gateway.
#[derive(Clone, Copy)]
pub(crate) struct Addresses {
    pub(crate) plain: SocketAddr,
    pub(crate) tls: SocketAddr,
    admin: SocketAddr,
}

pub(crate) struct Lab {
    pub(crate) journal: Journal,
    pub(crate) system: System,
    pub(crate) zookeeper: Arc<ZooKeeper>,
    pub(crate) executors: Vec<Executor>,
    /// The link to each zone's executor.
    pub(crate) executor_links: Vec<Proxy>,
    /// Each gateway's link to ZooKeeper.
    pub(crate) registry_links: Vec<Proxy>,
    /// The link from other gateways to each gateway.
    pub(crate) links: Vec<Proxy>,
    gateways: Vec<tokio::sync::Mutex<Option<Gateway>>>,
    addresses: Mutex<Vec<Option<Addresses>>>,
    identity: Identity,
    /// The connector of all TLS clients, so that sessions are resumed.
    pub(crate) connector: TlsConnector,
    logs: std::path::PathBuf,
}

impl Lab {
    /// Starts everything. Logs of the gateways go into the directory `logs`.
    pub(crate) async fn start(logs: &Path) -> Result<Arc<Self>> {
        let zookeeper = ZooKeeper::start().await;
        let system = System::on(Arc::clone(&zookeeper)).await;
        let (mut executors, mut executor_links) = (Vec::new(), Vec::new());
        for _ in ZONES {
            let executor = Executor::start().await?;
            executor_links.push(Proxy::start(executor.port).await);
            executors.push(executor);
        }
        let (mut registry_links, mut links) = (Vec::new(), Vec::new());
        for _ in GATEWAYS {
            registry_links.push(Proxy::start(zookeeper.port).await);
            // The gateway has no port yet.
            links.push(Proxy::start(1).await);
        }
        let identity = zookeeper.authority.identity("gateway");
        let lab = Arc::new(Self {
            journal: Journal::default(),
            connector: connector(&identity, Some(&identity)),
            identity,
            system,
            zookeeper,
            executors,
            executor_links,
            registry_links,
            links,
            gateways: GATEWAYS.iter().map(|_| tokio::sync::Mutex::new(None)).collect(),
            addresses: Mutex::new(vec![None; GATEWAYS.len()]),
            logs: logs.to_owned(),
        });
        for number in 0..GATEWAYS.len() {
            lab.start_gateway(number).await;
        }
        Ok(lab)
    }

    /// Starts a gateway that does not run.
    pub(crate) async fn start_gateway(&self, number: usize) {
        let (name, zone) = GATEWAYS[number];
        let mut slot = self.gateways[number].lock().await;
        let log = self.logs.join(format!("{name}.log"));
        let mut builder = Builder::new(&self.system)
            .tls(&self.identity)
            .listeners(&["", "tls = true"])
            .limits(&format!(
                "request_timeout = \"2s\"\nhandshake_timeout = \"3s\"\ngrace = \"2s\"\n\
                 write_timeout = \"{}s\"",
                WRITE_TIMEOUT.as_secs()
            ))
            .zookeeper("session_timeout = \"4s\"")
            .log(&format!("output = {log:?}"))
            .control()
            .readable_by_all();
        builder.zone = zone.map(|zone| ZONES[zone].to_owned());
        builder.admin = true;
        builder.hosts = self.system.hosts_via(&self.registry_links[number]);
        builder.root = format!("public_port = {}", self.links[number].address.port());
        let gateway = builder.ready().await;
        let [plain, tls, admin] = gateway.addresses[..] else {
            panic!("{name} has reported the addresses {:?}", gateway.addresses)
        };
        self.links[number].lead_to(tls.port());
        self.addresses()[number] = Some(Addresses { plain, tls, admin });
        *slot = Some(gateway);
    }

    fn addresses(&self) -> std::sync::MutexGuard<'_, Vec<Option<Addresses>>> {
        self.addresses.lock().expect("no panic while it is locked")
    }

    /// The addresses of a gateway, or those that it had before it was killed.
    pub(crate) fn address(&self, number: usize) -> Addresses {
        self.addresses()[number].expect("it was started")
    }

    /// Locks a gateway for one failure at a time.
    pub(crate) async fn gateway(
        &self,
        number: usize,
    ) -> tokio::sync::MutexGuard<'_, Option<Gateway>> {
        self.gateways[number].lock().await
    }

    /// The worker information of a zone's executor in build requests.
    pub(crate) fn worker(&self, zone: usize) -> Worker {
        Worker {
            hostname: "127.0.0.1".to_owned(),
            port: self.executor_links[zone].address.port(),
            zone: Some(ZONES[zone].to_owned()),
        }
    }

    /// Replaces the certificate and key of a running gateway, one after the other, with a reload
    /// after each.
    ///
    /// # Errors
    /// The first reload succeeded, or the second one failed.
    pub(crate) async fn renew_certificates(&self, number: usize) -> Result<()> {
        let directory = {
            let gateway = self.gateway(number).await;
            gateway.as_ref().context("the gateway runs")?.directory().to_owned()
        };
        let fresh = self.zookeeper.authority.identity("gateway");
        let replace = |from: &Path, name: &str| {
            let aside = directory.join("aside.pem");
            fs::copy(from, &aside)?;
            fs::rename(&aside, directory.join(name))
        };
        replace(&fresh.cert, "tls-cert.pem")?;
        ensure!(!reload(&directory).await?, "a certificate without its key was loaded");
        replace(&fresh.key, "tls-key.pem")?;
        ensure!(reload(&directory).await?, "a renewed certificate was not loaded");
        Ok(())
    }

    /// Waits until every gateway is ready and serves a build of every zone. It is a violation if
    /// that takes too long.
    pub(crate) async fn wait_recovered(&self, after: &str, probes: &[String; 2]) {
        let deadline = Instant::now() + RECOVERY_TIMEOUT;
        loop {
            let Err(error) = self.check(probes).await else { return };
            if Instant::now() > deadline {
                self.journal.violation(format!(
                    "not recovered within {RECOVERY_TIMEOUT:?} of {after}: {error}"
                ));
                return;
            }
            sleep(CHECK_INTERVAL).await;
        }
    }

    async fn check(&self, probes: &[String; 2]) -> Result<()> {
        for (number, (name, _)) in GATEWAYS.iter().enumerate() {
            let Addresses { plain, admin, .. } = self.address(number);
            let health = get(admin, "/health/ready").await?;
            ensure!(health.starts_with("HTTP/1.1 200 "), "{name} is not ready");
            // A new UUID, which is not cached.
            let unknown = format!("{:032x}", fastrand::u128(..));
            let answer = request(plain, &unknown).await?;
            ensure!(answer == b"Build not found\r\n", "{name}: {}", answer.escape_ascii());
            for build in probes {
                let log = crate::log::Log::of(build).context("a build of this test")?;
                let answer = request(plain, build).await?;
                ensure!(
                    answer == log.bytes(),
                    "{name}: {}",
                    answer[..answer.len().min(80)].escape_ascii()
                );
            }
        }
        Ok(())
    }

    /// The sum of a gateway's metric over its labels.
    pub(crate) async fn metric(&self, number: usize, name: &str) -> Result<f64> {
        let page = get(self.address(number).admin, "/metrics").await?;
        let mut values = page
            .lines()
            .filter(|line| line.split(['{', ' ']).next() == Some(name))
            .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
            .peekable();
        ensure!(values.peek().is_some(), "no metric {name}");
        Ok(values.sum())
    }
}

/// Reloads the gateway in `directory`. Returns whether it succeeded.
async fn reload(directory: &Path) -> Result<bool> {
    let status = tokio::process::Command::new(crate::support::gateway::BINARY)
        .args(["reload", "-c"])
        .arg(directory.join("gateway.toml"))
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .status();
    Ok(timeout(RECOVERY_TIMEOUT, status).await??.success())
}

/// Sends a line and returns everything that is received.
async fn request(address: SocketAddr, line: &str) -> Result<Vec<u8>> {
    let answer = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(format!("{line}\r\n").as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        anyhow::Ok(answer)
    };
    timeout(Duration::from_secs(10), answer).await.context("no answer")?
}

async fn get(address: SocketAddr, path: &str) -> Result<String> {
    let head = format!("GET {path} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n");
    Ok(String::from_utf8_lossy(&request(address, &head).await?).into_owned())
}

impl Parts {
    /// The parts that a request to gateway `entry` for a build of `zone` needs: those of its path,
    /// and those of its lookup.
    pub(crate) fn of(entry: usize, zone: usize) -> (Self, Self) {
        let mut path = Self::gateway(entry).and(Self::executor(zone));
        let mut registry = Self::ZOOKEEPER.and(Self::registry(entry));
        if GATEWAYS[entry].1 != Some(zone) {
            for (number, (_, theirs)) in GATEWAYS.iter().enumerate() {
                if *theirs == Some(zone) {
                    path = path.and(Self::gateway(number)).and(Self::link(number));
                    registry = registry.and(Self::registry(number));
                }
            }
        }
        (path, registry)
    }
}
