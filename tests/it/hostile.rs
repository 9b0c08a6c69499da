//! Peers that mean no good, by the thousand, from addresses of their own: one that is served as
//! always stands for everybody else.

use std::net::SocketAddr;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpStream;

use crate::admin::metric;
use crate::support::certificates::Identity;
use crate::support::client::Client;
use crate::support::executor::{Executor, Stream};
use crate::support::flow::Flow;
use crate::support::gateway::{Builder, Gateway};
use crate::support::system::System;
use crate::support::within;

/// As many as one address may have.
const MANY: usize = 1000;

/// More than a gateway's and a narrow client's buffers hold together.
const TOO_MUCH: usize = 256 * 1024;

/// A gateway with the limits that everybody has, but for deadlines that would end the siege.
struct Besieged {
    system: System,
    gateway: Gateway,
    identity: Identity,
    /// Streams that run all the time.
    plain: Flow<TcpStream>,
    tls: Flow<tokio_rustls::client::TlsStream<TcpStream>>,
}

impl Besieged {
    async fn new() -> Self {
        // Both ends of all connections are in this process.
        let files = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files }).expect("files");
        let system = System::new().await;
        let identity = system.zookeeper.authority.identity("gateway");
        let deadlines =
            "handshake_timeout = \"1h\"\nrequest_timeout = \"1h\"\nwrite_timeout = \"1h\"";
        let mut builder = Builder::new(&system).tls(&identity).limits(deadlines);
        builder.admin = true;
        let gateway = builder.listeners(&["", "tls = true"]).ready().await;
        let plain = Flow::start(&system, gateway.addresses[0]).await;
        let tls = Flow::start_tls(&system, gateway.addresses[1], &identity).await;
        Self { system, gateway, identity, plain, tls }
    }

    fn plain(&self) -> SocketAddr {
        self.gateway.addresses[0]
    }

    fn secure(&self) -> SocketAddr {
        self.gateway.addresses[1]
    }

    /// Sees streams begin, go on and end, byte for byte.
    async fn serves(&mut self) {
        self.plain.goes_on("a line\n").await;
        self.tls.goes_on("a line\n").await;
        Flow::start(&self.system, self.plain()).await.ends().await;
        Flow::start_tls(&self.system, self.secure(), &self.identity).await.ends().await;
    }

    async fn active(&self, listener: &str) -> usize {
        let series = format!("zuul_fingergw_connections_active{{listener=\"{listener}\"}}");
        metric(&self.gateway, &series).await as usize
    }

    async fn rejected(&self, reason: &str) -> usize {
        let series = format!("zuul_fingergw_connections_rejected_total{{reason=\"{reason}\"}}");
        metric(&self.gateway, &series).await as usize
    }

    /// Waits until so many connections are open, those of [`Self::new`] not counted.
    async fn until_open(&self, plain: usize, tls: usize) {
        let open = async || (self.active("plain").await - 1, self.active("tls").await - 1);
        within("the connections", async { while open().await != (plain, tls) {} }).await;
    }

    /// Sees the siege through: the streams that ran all the time are whole, all is given back, and
    /// the log was not flooded.
    async fn ends(self, sockets: usize) {
        self.gateway.until_sockets(sockets).await;
        self.until_open(0, 0).await;
        let warnings = self.gateway.log().iter().filter(|line| line.contains("WARN")).count();
        assert!(warnings <= 4, "{warnings} warnings");
        self.plain.ends().await;
        self.tls.ends().await;
    }
}

async fn connect_many(local: &str, address: SocketAddr, count: usize) -> Vec<Client<TcpStream>> {
    let mut clients = Vec::new();
    for _ in 0..count {
        clients.push(Client::connect_from(local, address).await);
    }
    clients
}

#[tokio::test]
async fn they_connect_and_say_nothing() {
    let mut besieged = Besieged::new().await;
    let sockets = besieged.gateway.sockets();
    let plain = connect_many("127.0.0.2", besieged.plain(), MANY).await;
    let tls = connect_many("127.0.0.3", besieged.secure(), MANY).await;
    besieged.until_open(MANY, MANY).await;
    besieged.serves().await;
    // More from those addresses are turned away, and nobody else.
    let more = [
        connect_many("127.0.0.2", besieged.plain(), 200).await,
        connect_many("127.0.0.3", besieged.secure(), 200).await,
    ];
    within("them to be turned away", async { while besieged.rejected("address").await < 400 {} })
        .await;
    besieged.serves().await;
    besieged.until_open(MANY, MANY).await;
    assert_eq!(besieged.rejected("handshakes").await, 0);
    drop((plain, tls, more));
    besieged.ends(sockets).await;
}

/// A byte now and then, of a request and of a ClientHello that never end.
#[tokio::test]
async fn slow_lorises() {
    let mut besieged = Besieged::new().await;
    let sockets = besieged.gateway.sockets();
    let mut plain = connect_many("127.0.0.2", besieged.plain(), MANY).await;
    let mut tls = connect_many("127.0.0.3", besieged.secure(), MANY).await;
    // The header of a record of 256 bytes, and a ClientHello in it that is as long.
    let hello = [0x16, 3, 1, 1, 0, 1, 0, 0, 252, 3, 3];
    for byte in hello {
        for client in &mut plain {
            client.send(b"a").await;
        }
        for client in &mut tls {
            client.send(&[byte]).await;
        }
        besieged.serves().await;
    }
    besieged.until_open(MANY, MANY).await;
    besieged.serves().await;
    drop((plain, tls));
    besieged.ends(sockets).await;
}

/// They ask for logs, which pour, and never read a byte.
#[tokio::test]
async fn clients_that_never_read() {
    let mut besieged = Besieged::new().await;
    let sockets = besieged.gateway.sockets();
    let executor = Executor::start().await;
    let build = besieged.system.put_build(None, Some(&executor.worker(None))).await;
    let log = vec![b'x'; TOO_MUCH];
    let mut clients: Vec<Client<TcpStream>> = Vec::new();
    let mut streams: Vec<Stream<TcpStream>> = Vec::new();
    for _ in 0..MANY {
        let mut client = Client::connect_narrow_from("127.0.0.2", besieged.plain()).await;
        client.send(format!("{build}\n").as_bytes()).await;
        clients.push(client);
        streams.push(executor.accept().await);
    }
    let mut pouring = tokio::task::JoinSet::new();
    for mut stream in streams {
        let log = log.clone();
        pouring.spawn(async move {
            stream.try_write(&log).await;
            stream
        });
    }
    besieged.serves().await;
    besieged.until_open(MANY, 0).await;
    besieged.serves().await;
    drop(clients);
    drop(pouring);
    besieged.ends(sockets).await;
}

/// Port scanners reset what they have opened, health checkers close it.
#[tokio::test]
async fn they_connect_and_leave() {
    let mut besieged = Besieged::new().await;
    let sockets = besieged.gateway.sockets();
    for _ in 0..MANY / 50 {
        for address in [besieged.plain(), besieged.secure()] {
            for _ in 0..50 {
                Client::connect_from("127.0.0.2", address).await.reset();
                drop(Client::connect_from("127.0.0.3", address).await);
            }
        }
        besieged.serves().await;
    }
    let probes = "zuul_fingergw_requests_total{result=\"probe\"}";
    assert!(metric(&besieged.gateway, probes).await > 0.0);
    besieged.ends(sockets).await;
}
