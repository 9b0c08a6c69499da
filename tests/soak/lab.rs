//! What is under load: a real ZooKeeper, two zones with two gateways and an executor each, and a
//! gateway without a zone in front of them; a proxy in each way that can be broken.
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

/// Those that live from the beginning to the end, and are measured.
pub(crate) const SURVIVORS: [usize; 2] = [0, 3];

/// The clients that do not read for longer are cut.
pub(crate) const WRITE_TIMEOUT: Duration = Duration::from_secs(12);

/// Until all must be well again behind a fault.
const HEALING: Duration = Duration::from_secs(90);

/// Between two looks at whether it is.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Where a gateway can be reached.
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
    /// The way to each zone's executor.
    pub(crate) executor_links: Vec<Proxy>,
    /// Each gateway's way to ZooKeeper.
    pub(crate) registry_links: Vec<Proxy>,
    /// The way from other gateways to each gateway.
    pub(crate) links: Vec<Proxy>,
    gateways: Vec<tokio::sync::Mutex<Option<Gateway>>>,
    addresses: Mutex<Vec<Option<Addresses>>>,
    identity: Identity,
    /// Of all TLS clients; gateways resume their sessions.
    pub(crate) connector: TlsConnector,
    logs: std::path::PathBuf,
}

impl Lab {
    /// Starts everything; the gateways log into `logs`.
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
            // Leads nowhere until the gateway has a port.
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
            panic!("{name} has told {:?}", gateway.addresses)
        };
        self.links[number].lead_to(tls.port());
        self.addresses()[number] = Some(Addresses { plain, tls, admin });
        *slot = Some(gateway);
    }

    fn addresses(&self) -> std::sync::MutexGuard<'_, Vec<Option<Addresses>>> {
        self.addresses.lock().expect("nobody panics with it")
    }

    /// Where a gateway is, or was before it was killed.
    pub(crate) fn address(&self, number: usize) -> Addresses {
        self.addresses()[number].expect("it has run")
    }

    /// The gateway itself, for one fault at a time.
    pub(crate) async fn gateway(
        &self,
        number: usize,
    ) -> tokio::sync::MutexGuard<'_, Option<Gateway>> {
        self.gateways[number].lock().await
    }

    /// What a build request says of a zone's executor.
    pub(crate) fn worker(&self, zone: usize) -> Worker {
        Worker {
            hostname: "127.0.0.1".to_owned(),
            port: self.executor_links[zone].address.port(),
            zone: Some(ZONES[zone].to_owned()),
        }
    }

    /// New certificates for a gateway that runs: one file, then the other, then the order to
    /// reload. In between it is ordered as well, and has to refuse. Returns what went wrong.
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
        ensure!(!reload(&directory).await?, "half a renewal was taken");
        replace(&fresh.key, "tls-key.pem")?;
        ensure!(reload(&directory).await?, "a renewal was refused");
        Ok(())
    }

    /// Waits until all is well: every gateway says so, and answers about builds of every zone.
    /// What does not heal by itself is a violation.
    pub(crate) async fn heals(&self, after: &str, probes: &[String; 2]) {
        let deadline = Instant::now() + HEALING;
        loop {
            let Err(sick) = self.is_well(probes).await else { return };
            if Instant::now() > deadline {
                self.journal.violation(format!("not healed within {HEALING:?} of {after}: {sick}"));
                return;
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    async fn is_well(&self, probes: &[String; 2]) -> Result<()> {
        for (number, (name, _)) in GATEWAYS.iter().enumerate() {
            let Addresses { plain, admin, .. } = self.address(number);
            let health = get(admin, "/health/ready").await?;
            ensure!(health.starts_with("HTTP/1.1 200 "), "{name} is not ready");
            // Not one that is known from before.
            let nobody = format!("{:032x}", fastrand::u128(..));
            let answer = ask(plain, &nobody).await?;
            ensure!(answer == b"Build not found\r\n", "{name}: {}", answer.escape_ascii());
            for build in probes {
                let log = crate::log::Log::of(build).context("a build of ours")?;
                let answer = ask(plain, build).await?;
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

/// Orders the gateway in `directory` to reload; whether it did.
async fn reload(directory: &Path) -> Result<bool> {
    let status = tokio::process::Command::new(crate::support::gateway::BINARY)
        .args(["reload", "-c"])
        .arg(directory.join("gateway.toml"))
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .status();
    Ok(timeout(HEALING, status).await??.success())
}

/// Everything that comes in answer to one line.
async fn ask(address: SocketAddr, line: &str) -> Result<Vec<u8>> {
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
    let request = format!("GET {path} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n");
    Ok(String::from_utf8_lossy(&ask(address, &request).await?).into_owned())
}

impl Parts {
    /// All that a request for a build of `zone` needs that comes in at gateway `entry`: on its
    /// way, and to find out about it.
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
