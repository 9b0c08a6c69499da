//! Streams to clients of a TLS listener: byte for byte, and how they end.

use std::net::SocketAddr;

use nix::sched::CloneFlags;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::support::certificates::Identity;
use crate::support::client::{Client, Ending};
use crate::support::executor::Executor;
use crate::support::gateway::Builder;
use crate::support::logs::{exact, in_pieces, reset_while_it_flows};
use crate::support::namespace::in_namespaces;
use crate::support::system::System;
use crate::support::tls::{Served, served};
use crate::support::within;
use crate::support::zookeeper::ZooKeeper;

/// Sizes around those of all buffers and records.
#[tokio::test]
async fn logs_of_every_size_are_exact_over_tls() {
    let Served { gateway, executor, build, identity, .. } = served("", "").await;
    let sizes = [1, 2, 1023, 1024, 1025, 2048, 4096, 16_383, 16_384, 16_385, 65_536, 1_000_001];
    for size in sizes {
        let client = Client::ask_tls(gateway.address(), &identity, &build).await;
        exact(size, &executor, client).await;
    }
}

#[tokio::test]
async fn pieces_of_every_size_split_no_character() {
    let Served { gateway, executor, build, identity, .. } = served("", "").await;
    in_pieces(&executor, Client::ask_tls(gateway.address(), &identity, &build).await).await;
}

#[tokio::test]
async fn client_can_distinguish_an_abort_from_an_end() {
    let Served { gateway, executor, build, identity, .. } = served("", "").await;
    for cut in [true, false] {
        let mut client = Client::ask_tls(gateway.address(), &identity, &build).await;
        let stream = executor.begin(&mut client).await;
        if cut {
            stream.reset();
        } else {
            stream.finish().await;
        }
        let ending = if cut { Ending::Reset } else { Ending::Clean };
        assert_eq!(client.rest().await, (Vec::new(), ending));
    }
}

/// As zuul-web disconnects: TCP ends without a close_notify, while nothing is written to the
/// client.
#[tokio::test]
async fn client_that_closes_without_close_notify_has_left() {
    let Served { mut gateway, executor, build, identity, .. } = served("", "").await;
    let before = gateway.sockets();
    let mut client = Client::ask_tls(gateway.address(), &identity, &build).await;
    let mut stream = executor.begin(&mut client).await;
    drop(client);
    stream.closed().await;
    let line = gateway.logged("the stream to end", |line| line.contains("stream ended")).await;
    assert!(line.ends_with("end=\"client left\""), "{line}");
    gateway.until_sockets(before).await;
}

/// Requests `build` and ends the sending direction with a close_notify; with `fin` also that of
/// TCP.
async fn ask_and_half_close(
    address: SocketAddr,
    identity: &Identity,
    build: &str,
    fin: bool,
) -> Client<TlsStream<TcpStream>> {
    let mut client = Client::ask_tls(address, identity, build).await;
    if fin {
        client.half_close().await;
    } else {
        client.stream.get_mut().1.send_close_notify();
        within("a close_notify", client.stream.flush()).await.expect("a close_notify");
    }
    client
}

/// A close_notify ends one direction only (RFC 8446, section 6.1).
#[tokio::test]
async fn client_that_sent_close_notify_gets_the_whole_log() {
    let Served { gateway, executor, build, identity, .. } = served("", "").await;
    for fin in [false, true] {
        let mut client = ask_and_half_close(gateway.address(), &identity, &build, fin).await;
        let mut stream = executor.begin(&mut client).await;
        // Twice: when the second one arrives, the first has been relayed, long after the
        // close_notify.
        for line in [b"after\n", b"later\n"] {
            stream.write(line).await;
            client.expect(line).await;
        }
        stream.finish().await;
        assert_eq!(client.rest().await, (Vec::new(), Ending::Clean), "FIN as well: {fin}");
    }
}

#[tokio::test]
async fn reset_after_close_notify_ends_both_sides() {
    let Served { mut gateway, executor, build, identity, .. } = served("", "").await;
    for fin in [false, true] {
        let mut client = ask_and_half_close(gateway.address(), &identity, &build, fin).await;
        let mut stream = executor.begin(&mut client).await;
        client.reset();
        stream.closed().await;
    }
    gateway
        .logged_times("both streams to end", 2, |line| line.contains("end=\"client left: "))
        .await;
}

/// As with a plain client: a closed connection looks like a half-closed one until data is sent.
#[tokio::test]
async fn client_that_closed_after_close_notify_is_noticed_by_writing() {
    let Served { mut gateway, executor, build, identity, .. } = served("", "").await;
    let before = gateway.sockets();
    let mut client = ask_and_half_close(gateway.address(), &identity, &build, true).await;
    let mut stream = executor.begin(&mut client).await;
    drop(client);
    while stream.try_write(&[b'x'; 4096]).await {}
    gateway.logged("the stream to end", |line| line.contains("end=\"client left: ")).await;
    gateway.until_sockets(before).await;
}

/// Before the log begins, while several gateways are tried concurrently.
#[tokio::test]
async fn client_that_sent_close_notify_waits_for_the_zone() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let west = Executor::start().await;
    system.put_gateway(Some("west"), Some(west.address.port()), false, "running").await;
    let east = Builder::new(&system).zone("east").tls(&identity).listeners(&["tls = true"]);
    let east = east.ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    let mut client = ask_and_half_close(east.address(), &identity, &build, false).await;
    west.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn client_resets_during_streams_leave_no_sockets() {
    let Served { mut gateway, executor, build, identity, .. } = served("", "").await;
    let address = gateway.address();
    let ask = async || Client::ask_tls(address, &identity, &build).await;
    let reset = Client::<TlsStream<TcpStream>>::reset;
    reset_while_it_flows(&mut gateway, &executor, ask, reset).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_client_is_reset() {
    let Served { mut gateway, executor, build, identity, .. } =
        served("", "write_timeout = \"300ms\"").await;
    let before = gateway.sockets();
    let plain = Client::connect_narrow(gateway.address()).await;
    let mut client = Client::handshake(plain, &identity).await;
    client.send(format!("{build}\n").as_bytes()).await;
    let mut stream = executor.accept().await;
    while stream.try_write(&[b'x'; 65536]).await {}
    gateway.logged("the reason", |line| line.ends_with("end=\"client stopped reading\"")).await;
    assert_eq!(client.rest().await.1, Ending::Reset);
    gateway.until_sockets(before).await;
}

/// Returns how many acknowledgements of this network namespace the kernel has delayed until a timer
/// expired.
fn delayed_acknowledgements() -> u64 {
    let netstat = std::fs::read_to_string("/proc/thread-self/net/netstat").expect("counters");
    let mut lines = netstat.lines().filter_map(|line| line.strip_prefix("TcpExt: "));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let mut columns = names.split(' ').zip(values.split(' '));
    let (_, value) = columns.find(|(name, _)| *name == "DelayedACKs").expect("the counter");
    value.parse().expect("a number")
}

/// A client without TCP_NODELAY delays its request until its Finished is acknowledged.
#[test]
fn end_of_a_handshake_is_acknowledged_immediately() {
    const CLIENTS: u64 = 40;
    in_namespaces(CloneFlags::CLONE_NEWNET, async || {
        let system = System::on(ZooKeeper::start().await).await;
        let identity = system.zookeeper.authority.identity("gateway");
        let gateway = Builder::new(&system).tls(&identity).listeners(&["tls = true"]);
        let gateway = gateway.ready().await;
        let before = delayed_acknowledgements();
        for _ in 0..CLIENTS {
            let mut client = Client::ask_tls(gateway.address(), &identity, "ab").await;
            assert_eq!(client.text().await, "Build not found\r\n");
        }
        // Connections to ZooKeeper use this namespace, too.
        let delayed = delayed_acknowledgements() - before;
        assert!(delayed < CLIENTS / 2, "{delayed} of {CLIENTS}");
    });
}
