//! Shutdown of a gateway: it removes its registry entry first, then closes its listeners, then
//! waits for running streams, then exits.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::process::ExitStatus;

use rustix::process::Signal;
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::support::client::{Client, Ending};
use crate::support::executor::{self, Executor, serves};
use crate::support::gateway::{Builder, Gateway};
use crate::support::proxy::Proxy;
use crate::support::system::{Entry, System};
use crate::support::within;

/// Starts a gateway with a plain listener, a TLS listener, and `limits`.
async fn two_doors(system: &System, limits: &str) -> Gateway {
    let identity = system.zookeeper.authority.identity("localhost");
    let builder = Builder::new(system).tls(&identity).listeners(&["", "tls = true"]);
    builder.limits(limits).ready().await
}

/// The log of one build, requested through each of the two listeners.
struct Two {
    executor: Executor,
    build: String,
    plain: Client<TcpStream>,
    plain_log: executor::Stream<TcpStream>,
    tls: Client<TlsStream<TcpStream>>,
    tls_log: executor::Stream<TcpStream>,
}

impl Two {
    /// Starts streams that have relayed a line.
    async fn streams(system: &System, gateway: &Gateway) -> Self {
        let executor = Executor::start().await;
        let build = system.put_build(None, Some(&executor.worker(None))).await;
        let mut plain = Client::ask(gateway.addresses[0], &build).await;
        let plain_log = executor.begin(&mut plain).await;
        let identity = &system.zookeeper.identity;
        let mut tls = Client::ask_tls(gateway.addresses[1], identity, &build).await;
        let tls_log = executor.begin(&mut tls).await;
        Self { executor, build, plain, plain_log, tls, tls_log }
    }
}

/// Waits until the gateway's port is closed. The kernel sends no notification of that, so this
/// polls.
async fn refuses(address: SocketAddr) {
    let closed = async {
        loop {
            match TcpStream::connect(address).await {
                Ok(_) => tokio::task::yield_now().await,
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => return,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
                Err(error) => panic!("{error}"),
            }
        }
    };
    within("new connections to be refused", closed).await;
}

async fn until_gone(system: &System) {
    system.until("the entry to be removed", <[Entry]>::is_empty).await;
}

/// Returns the logged end of each stream.
fn ends(gateway: &Gateway) -> Vec<String> {
    let log = gateway.log().into_iter();
    log.filter(|line| line.contains("stream ended"))
        .map(|line| line.split_once(" end=").expect("why it ended").1.trim_matches('"').to_owned())
        .collect()
}

async fn exits_0(gateway: &mut Gateway) {
    let status: ExitStatus = gateway.exit().await;
    assert!(status.success(), "{status}");
    assert!(gateway.log().last().is_some_and(|line| line.ends_with(" stopped")));
}

#[tokio::test]
async fn stop_waits_for_streams_to_end() {
    for signal in [Signal::TERM, Signal::INT] {
        let system = System::new().await;
        let mut gateway = two_doors(&system, "").await;
        let Two { mut plain, mut plain_log, mut tls, mut tls_log, .. } =
            Two::streams(&system, &gateway).await;

        gateway.signal(signal);
        gateway.notice("STOPPING=1", |notices| notices.stopping).await;
        until_gone(&system).await;
        for address in gateway.addresses.clone() {
            refuses(address).await;
        }
        plain_log.write(b"after\n").await;
        plain.expect(b"after\n").await;
        tls_log.write(b"after\n").await;
        tls.expect(b"after\n").await;
        assert_eq!(ends(&gateway), [""; 0], "both are still running");

        // More than the buffers on the way can hold.
        let rest: Vec<u8> = (0..8_000_000_u32).map(|n| (n % 251) as u8).collect();
        let write = async {
            plain_log.write(&rest).await;
            plain_log.finish().await;
            tls_log.write(&rest).await;
            tls_log.finish().await;
        };
        let read = async {
            let (read, ending) = plain.rest().await;
            assert!(read == rest && ending == Ending::Clean, "{} bytes {ending:?}", read.len());
            drop(plain);
            let (read, ending) = tls.rest().await;
            assert!(read == rest && ending == Ending::Clean, "{} bytes {ending:?}", read.len());
            drop(tls);
        };
        tokio::join!(write, read);
        exits_0(&mut gateway).await;
        assert_eq!(ends(&gateway), ["finished"; 2], "{signal:?}");
        assert!(gateway.log().iter().any(|line| line.contains("all streams have ended")));
    }
}

#[tokio::test]
async fn stop_without_streams() {
    for signal in [Signal::TERM, Signal::INT] {
        let system = System::new().await;
        let mut gateway = two_doors(&system, "").await;
        gateway.signal(signal);
        exits_0(&mut gateway).await;
        assert_eq!(system.entries().await.len(), 0);
        gateway.notice("STOPPING=1", |notices| notices.stopping).await;
    }
}

/// A reset stream must not look like a finished one.
#[tokio::test]
async fn stop_aborts_streams_after_the_grace() {
    let system = System::new().await;
    let mut gateway = two_doors(&system, "grace = \"1s\"").await;
    let Two { executor, build, mut plain, mut plain_log, mut tls, mut tls_log } =
        Two::streams(&system, &gateway).await;
    // One stream without data, and one whose client does not read and which fills all buffers.
    let mut silent = Client::ask(gateway.addresses[0], &build).await;
    let mut silent_log = executor.accept().await;
    let stalled = Client::ask(gateway.addresses[0], &build).await;
    let mut stalled_log = executor.accept().await;
    let filling = tokio::spawn(async move {
        let piece = vec![b'x'; 1 << 20];
        while stalled_log.try_write(&piece).await {}
    });
    gateway.signal(Signal::TERM);
    assert_eq!(plain.rest().await, (Vec::new(), Ending::Reset));
    assert_eq!(tls.rest().await, (Vec::new(), Ending::Reset));
    assert_eq!(silent.rest().await, (Vec::new(), Ending::Reset));
    // The executor sees the reset as well.
    plain_log.closed().await;
    tls_log.closed().await;
    silent_log.closed().await;
    within("the filling to be refused", filling).await.expect("no panic");
    exits_0(&mut gateway).await;
    drop(stalled);
    assert_eq!(ends(&gateway), ["gateway stopped"; 4]);
    let cut = |line: &&String| line.contains("streams aborted after the grace period");
    let log = gateway.log();
    let line = log.iter().find(cut).expect("a line of the reset streams");
    assert!(line.contains("streams=4"), "{line}");
}

#[tokio::test]
async fn second_signal_stops_immediately() {
    for (first, second) in [(Signal::TERM, Signal::INT), (Signal::INT, Signal::TERM)] {
        let system = System::new().await;
        let mut gateway = two_doors(&system, "grace = \"1h\"").await;
        let executor = Executor::start().await;
        let build = system.put_build(None, Some(&executor.worker(None))).await;
        let mut client = Client::ask(gateway.address(), &build).await;
        let mut log = executor.begin(&mut client).await;
        gateway.signal(first);
        until_gone(&system).await;
        log.write(b"between\n").await;
        client.expect(b"between\n").await;
        gateway.signal(second);
        assert_eq!(gateway.exit().await.code(), Some(1));
        assert!(gateway.log().iter().any(|line| line.contains("second signal")));
        assert_eq!(client.rest().await, (Vec::new(), Ending::Reset), "reset, not finished");
    }
}

/// The entry cannot be removed: it disappears with the session. Streams must not be affected.
#[tokio::test]
async fn stop_while_zookeeper_hangs() {
    let system = System::new().await;
    let proxy = Proxy::start(system.zookeeper.port).await;
    let mut builder = Builder::new(&system).zookeeper("session_timeout = \"5s\"");
    builder.hosts = system.hosts_via(&proxy);
    let mut gateway = builder.ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut log = executor.accept().await;
    proxy.hold();
    gateway.signal(Signal::TERM);
    gateway.logged("that it stays", |line| line.contains("cannot delete our registry entry")).await;
    refuses(gateway.address()).await;
    log.write(b"after\n").await;
    log.finish().await;
    assert_eq!(client.text().await, "after\n");
    drop(client);
    exits_0(&mut gateway).await;
    drop(proxy);
    until_gone(&system).await;
}

#[tokio::test]
async fn stop_while_zookeeper_is_down() {
    let system = System::new().await;
    let proxy = Proxy::start(system.zookeeper.port).await;
    let mut builder = Builder::new(&system).zookeeper("session_timeout = \"5s\"");
    builder.hosts = system.hosts_via(&proxy);
    let mut gateway = builder.ready().await;
    drop(proxy);
    gateway.status("the loss", |line| line.ends_with("connection lost")).await;
    gateway.signal(Signal::TERM);
    exits_0(&mut gateway).await;
    until_gone(&system).await;
}

/// The gateway retries the removal for a while, in which ZooKeeper may return.
#[tokio::test]
async fn stop_removes_the_entry_when_zookeeper_returns_in_time() {
    let system = System::new().await;
    let proxy = Proxy::start(system.zookeeper.port).await;
    let mut builder = Builder::new(&system);
    builder.hosts = system.hosts_via(&proxy);
    let mut gateway = builder.ready().await;
    proxy.hold();
    gateway.signal(Signal::TERM);
    gateway.notice("STOPPING=1", |notices| notices.stopping).await;
    assert_eq!(system.entries().await.len(), 1, "still registered");
    proxy.release();
    exits_0(&mut gateway).await;
    assert_eq!(system.entries().await.len(), 0);
}

#[tokio::test]
async fn stop_before_the_first_connection_to_zookeeper() {
    let system = System::new().await;
    for hanging in [true, false] {
        let proxy = Proxy::start(system.zookeeper.port).await;
        proxy.hold();
        let mut builder = Builder::new(&system);
        builder.hosts = system.hosts_via(&proxy);
        if !hanging {
            builder.hosts = format!("127.0.0.1:{}", executor::refusing_port().await);
        }
        let mut gateway = builder.start().await;
        if !hanging {
            gateway
                .logged("the reason", |line| line.contains("cannot register in ZooKeeper"))
                .await;
        }
        gateway.signal(Signal::TERM);
        exits_0(&mut gateway).await;
        gateway.notice("STOPPING=1", |notices| notices.stopping && !notices.ready).await;
        assert_eq!(system.entries().await.len(), 0);
    }
}

/// Clients that had connected before are served: they could not know of the shutdown.
#[tokio::test]
async fn stop_serves_connections_that_have_not_asked_yet() {
    let system = System::new().await;
    let mut gateway = two_doors(&system, "").await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut silent = Client::connect(gateway.addresses[0]).await;
    let shaking = Client::connect(gateway.addresses[1]).await;
    // Connections are accepted in order, so those before this one have been accepted.
    serves(&system, gateway.addresses[0]).await;
    let identity = system.zookeeper.identity.clone();
    drop(Client::ask_tls(gateway.addresses[1], &identity, "no build").await);

    gateway.signal(Signal::TERM);
    until_gone(&system).await;
    for address in gateway.addresses.clone() {
        refuses(address).await;
    }
    silent.send(format!("{build}\n").as_bytes()).await;
    let mut log = executor.accept().await;
    log.write(b"late\n").await;
    log.finish().await;
    assert_eq!(silent.text().await, "late\n");
    drop(silent);
    let mut shaken = Client::handshake(shaking, &identity).await;
    shaken.send(format!("{build}\n").as_bytes()).await;
    let mut log = executor.accept().await;
    log.write(b"late\n").await;
    log.finish().await;
    assert_eq!(shaken.text().await, "late\n");
    drop(shaken);
    exits_0(&mut gateway).await;
}

/// Silent connections do not delay the exit beyond the grace period.
#[tokio::test]
async fn stop_closes_silent_connections() {
    let system = System::new().await;
    let mut gateway = two_doors(&system, "grace = \"200ms\"").await;
    let mut silent = Client::connect(gateway.addresses[0]).await;
    let mut shaking = Client::connect(gateway.addresses[1]).await;
    serves(&system, gateway.addresses[0]).await;
    gateway.signal(Signal::TERM);
    exits_0(&mut gateway).await;
    assert_eq!(silent.rest().await.0, b"");
    assert_eq!(shaking.rest().await.0, b"");
}
