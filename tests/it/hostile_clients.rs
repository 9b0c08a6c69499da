//! Thousands of hostile clients with addresses of their own, while a normal client is served.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::support::admin::{ended, metric};
use crate::support::certificates::Identity;
use crate::support::client::{Client, client_hello};
use crate::support::executor::{Executor, Stream};
use crate::support::gateway::{Builder, Gateway};
use crate::support::process::raise_file_limit;
use crate::support::running_stream::RunningStream;
use crate::support::system::System;
use crate::support::within;

/// As many as one address may have.
const MANY: usize = 1000;

/// Size of a log that the kernel buffers for a client that does not read it.
const MUCH: usize = 256 * 1024;

/// Size of a log that exceeds all buffers on its way: those of the loopback interface are large, so
/// there are few such clients.
const TOO_MUCH: usize = 8 * 1024 * 1024;

/// More than there are pipes (`src/gateway/relay/splice.rs`).
const FEW: usize = 50;

/// A gateway with the default limits, except for deadlines that would close the hostile
/// connections.
struct Besieged {
    system: System,
    gateway: Gateway,
    identity: Identity,
    /// Streams that run during the whole test.
    plain: RunningStream<TcpStream>,
    tls: RunningStream<tokio_rustls::client::TlsStream<TcpStream>>,
}

impl Besieged {
    /// Starts it with deadlines that no test reaches.
    async fn new() -> Self {
        Self::with_deadlines("1h").await
    }

    async fn with_deadlines(time: &str) -> Self {
        raise_file_limit();
        let system = System::new().await;
        let identity = system.zookeeper.authority.identity("gateway");
        let deadlines = format!(
            "handshake_timeout = \"{time}\"\nrequest_timeout = \"{time}\"\nwrite_timeout = \"{time}\""
        );
        let mut builder = Builder::new(&system).tls(&identity).limits(&deadlines);
        builder.admin = true;
        let gateway = builder.listeners(&["", "tls = true"]).ready().await;
        let plain = RunningStream::start(&system, gateway.addresses[0]).await;
        let tls = RunningStream::start_tls(&system, gateway.addresses[1], &identity).await;
        Self { system, gateway, identity, plain, tls }
    }

    fn plain(&self) -> SocketAddr {
        self.gateway.addresses[0]
    }

    fn secure(&self) -> SocketAddr {
        self.gateway.addresses[1]
    }

    /// Checks that streams start, continue and end byte for byte.
    async fn serves(&mut self) {
        self.plain.pass("a line\n").await;
        self.tls.pass("a line\n").await;
        RunningStream::start(&self.system, self.plain()).await.finish().await;
        RunningStream::start_tls(&self.system, self.secure(), &self.identity).await.finish().await;
    }

    async fn active(&self, listener: &str) -> usize {
        let series = format!("zuul_fingergw_connections_active{{listener=\"{listener}\"}}");
        metric(&self.gateway, &series).await as usize
    }

    async fn rejected(&self, reason: &str) -> usize {
        let series = format!("zuul_fingergw_connections_rejected_total{{reason=\"{reason}\"}}");
        metric(&self.gateway, &series).await as usize
    }

    /// Waits until `count` connections are open, not counting those of [`Self::new`].
    async fn until_open(&self, plain: usize, tls: usize) {
        let open = async || (self.active("plain").await - 1, self.active("tls").await - 1);
        within("the connections", async { while open().await != (plain, tls) {} }).await;
    }

    /// Checks after the attack that the long-running streams are complete, that all connections and
    /// descriptors have been released, and that the log has not been flooded.
    async fn ends(self, sockets: usize) {
        self.gateway.until_sockets(sockets).await;
        self.until_open(0, 0).await;
        let warnings = self.gateway.log().iter().filter(|line| line.contains("WARN")).count();
        assert!(warnings <= 4, "{warnings} warnings");
        self.plain.finish().await;
        self.tls.finish().await;
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
async fn silent_connections_do_not_disturb_others() {
    let mut besieged = Besieged::new().await;
    let sockets = besieged.gateway.sockets();
    let plain = connect_many("127.0.0.2", besieged.plain(), MANY).await;
    let tls = connect_many("127.0.0.3", besieged.secure(), MANY).await;
    besieged.until_open(MANY, MANY).await;
    besieged.serves().await;
    // Further connections from those addresses are rejected, those from others are not.
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

/// Single bytes at intervals, of a request and of a ClientHello that never end.
#[tokio::test]
async fn slow_requests_do_not_disturb_others() {
    let mut besieged = Besieged::new().await;
    let sockets = besieged.gateway.sockets();
    let mut plain = connect_many("127.0.0.2", besieged.plain(), MANY).await;
    let mut tls = connect_many("127.0.0.3", besieged.secure(), MANY).await;
    // The header of a record of 256 bytes, and a ClientHello of that length in it.
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

/// More handshakes than the limit, from three addresses, none of which continues: some after their
/// first byte, some after a whole ClientHello.
#[tokio::test]
async fn unfinished_handshakes_do_not_disturb_others() {
    const EACH: usize = 700;
    let mut besieged = Besieged::new().await;
    let sockets = besieged.gateway.sockets();
    let hello = client_hello(&besieged.identity);
    for (sent, kept) in [(&hello[..1], 3 * EACH), (&hello, 2048)] {
        let mut clients = Vec::new();
        for local in ["127.0.0.2", "127.0.0.3", "127.0.0.4"] {
            let mut begun = connect_many(local, besieged.secure(), EACH).await;
            for client in &mut begun {
                client.send(sent).await;
            }
            clients.extend(begun);
        }
        besieged.until_open(0, kept).await;
        let closed = 3 * EACH - kept;
        assert_eq!(besieged.rejected("handshakes").await, closed);
        for _ in 0..20 {
            besieged.serves().await;
        }
        drop(clients);
        besieged.gateway.until_sockets(sockets).await;
    }
    besieged.ends(sockets).await;
}

/// Clients that have requested a log and never read, with the executor's tasks that write it.
async fn never_read(
    besieged: &Besieged,
    count: usize,
    length: usize,
) -> (Vec<Client<TcpStream>>, JoinSet<Stream<TcpStream>>) {
    let executor = Executor::start().await;
    let build = besieged.system.put_build(None, Some(&executor.worker(None))).await;
    let log: Arc<[u8]> = vec![b'x'; length].into();
    let (mut clients, mut pouring) = (Vec::new(), JoinSet::new());
    for _ in 0..count {
        let mut client = Client::connect_narrow_from("127.0.0.2", besieged.plain()).await;
        client.send(format!("{build}\n").as_bytes()).await;
        clients.push(client);
        let (mut stream, log) = (executor.accept().await, Arc::clone(&log));
        pouring.spawn(async move {
            stream.try_write(&log).await;
            stream
        });
    }
    (clients, pouring)
}

/// Clients request logs that are larger or smaller than the kernel's buffers, and never read a
/// byte. Of each address, as many stay connected as may stall for more than a second
/// (`src/gateway/relay/client_waits.rs`).
#[tokio::test]
async fn clients_that_never_read_do_not_disturb_others() {
    let mut besieged = Besieged::new().await;
    let sockets = besieged.gateway.sockets();
    let (clients, pouring) = never_read(&besieged, MANY - FEW, MUCH).await;
    let (stalled, stalling) = never_read(&besieged, FEW, TOO_MUCH).await;
    besieged.serves().await;
    besieged.until_open(MANY / 16, 0).await;
    besieged.serves().await;
    drop((clients, pouring, stalled, stalling));
    besieged.ends(sockets).await;
}

/// Returns the resident memory of the process, in KiB.
fn resident(gateway: &Gateway) -> u64 {
    let path = format!("/proc/{}/status", gateway.pid().as_raw_nonzero());
    let status = std::fs::read_to_string(path).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// After the burst the memory is returned to the system.
#[tokio::test]
async fn memory_is_returned_after_a_burst() {
    let besieged = Besieged::new().await;
    let sockets = besieged.gateway.sockets();
    let before = resident(&besieged.gateway);
    let plain = connect_many("127.0.0.2", besieged.secure(), MANY).await;
    let mut shaken = Vec::new();
    for client in plain {
        shaken.push(Client::handshake(client, &besieged.identity).await);
    }
    let taken = resident(&besieged.gateway) - before;
    drop(shaken);
    within("most of it to be given back", async {
        while resident(&besieged.gateway).saturating_sub(before) > taken / 3 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    besieged.ends(sockets).await;
}

/// Port scanners reset their connections, health checkers close them.
#[tokio::test]
async fn connections_without_a_request_do_not_disturb_others() {
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
    ended(&besieged.gateway, "probe", 4 * MANY).await;
    besieged.ends(sockets).await;
}

/// All kinds together, none of which closes its connections: the gateway closes them one by one,
/// and normal clients are not affected.
#[tokio::test]
async fn deadlines_end_all_hanging_connections() {
    let mut besieged = Besieged::with_deadlines("3s").await;
    let sockets = besieged.gateway.sockets();
    let (never_read, _pouring) = never_read(&besieged, FEW, TOO_MUCH).await;
    let silent = connect_many("127.0.0.3", besieged.plain(), MANY).await;
    let silent_tls = connect_many("127.0.0.4", besieged.secure(), MANY).await;
    let mut loris = connect_many("127.0.0.5", besieged.plain(), MANY).await;
    let mut loris_tls = connect_many("127.0.0.6", besieged.secure(), MANY).await;
    for client in &mut loris {
        client.send(b"a").await;
    }
    for client in &mut loris_tls {
        client.send(&[0x16]).await;
    }
    within("them to be shown out", async {
        while besieged.gateway.sockets() > sockets {
            besieged.plain.pass("a line\n").await;
            besieged.tls.pass("a line\n").await;
        }
    })
    .await;
    ended(&besieged.gateway, "client_stalled", FEW).await;
    ended(&besieged.gateway, "timeout", 2 * MANY).await;
    ended(&besieged.gateway, "tls", 2 * MANY).await;
    drop((never_read, silent, silent_tls, loris, loris_tls));
    besieged.ends(sockets).await;
}
