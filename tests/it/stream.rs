//! Logs that arrive byte for byte, and how streams end.

use rustix::process::Signal;
use tokio::net::TcpStream;

use crate::support::client::{Client, Ending};
use crate::support::executor::{Executor, acceptor, unreachable};
use crate::support::gateway::{Builder, Gateway};
use crate::support::logs::{exact, in_pieces, pattern, reset_while_it_flows};
use crate::support::system::System;
use crate::support::zones::TwoZones;

/// A gateway without a zone, an executor, and a build on it.
async fn direct(limits: &str) -> (System, Gateway, Executor, String) {
    let system = System::new().await;
    let gateway = Builder::new(&system).limits(limits).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    (system, gateway, executor, build)
}

#[tokio::test]
async fn log_arrives_while_it_grows() {
    let (_system, gateway, executor, build) = direct("").await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut stream = executor.accept().await;
    assert_eq!(stream.request, format!("{build}\n"));
    for line in ["first\n", "second\n"] {
        stream.write(line.as_bytes()).await;
        client.expect(line.as_bytes()).await;
    }
    stream.finish().await;
    assert_eq!(client.text().await, "");
}

#[tokio::test]
async fn half_closed_client_keeps_its_stream() {
    let (_system, gateway, executor, build) = direct("").await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut stream = executor.begin(&mut client).await;
    client.half_close().await;
    // Twice: when the second one arrives, the first has been relayed, long after the half-close.
    for line in [b"after\n", b"later\n"] {
        stream.write(line).await;
        client.expect(line).await;
    }
    stream.finish().await;
    assert_eq!(client.rest().await, (Vec::new(), Ending::Clean));
}

#[tokio::test]
async fn client_reset_ends_both_sides_of_an_idle_stream() {
    let (_system, mut gateway, executor, build) = direct("").await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut stream = executor.begin(&mut client).await;
    client.reset();
    stream.closed().await;
    gateway
        .logged("the reason", |line| line.contains("client left") && line.contains(&build))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn client_resets_during_streams_leave_no_sockets() {
    let (_system, mut gateway, executor, build) = direct("").await;
    let address = gateway.address();
    let ask = async || Client::ask(address, &build).await;
    reset_while_it_flows(&mut gateway, &executor, ask, Client::<TcpStream>::reset).await;
}

#[tokio::test]
async fn reset_after_a_half_close_ends_both_sides() {
    let (_system, gateway, executor, build) = direct("").await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut stream = executor.accept().await;
    client.half_close().await;
    stream.write(b"line\n").await;
    client.expect(b"line\n").await;
    client.reset();
    stream.closed().await;
}

/// A client that closes is gone, but looks like a half-close; the next bytes show the difference.
#[tokio::test]
async fn closed_client_is_noticed_by_writing() {
    let (_system, mut gateway, executor, build) = direct("").await;
    let client = Client::ask(gateway.address(), &build).await;
    let mut stream = executor.accept().await;
    drop(client);
    while stream.try_write(&[b'x'; 4096]).await {}
    gateway
        .logged("the reason", |line| line.contains("client left") && line.contains(&build))
        .await;
}

#[tokio::test]
async fn stalled_client_is_reset() {
    let (_system, mut gateway, executor, build) = direct("write_timeout = \"300ms\"").await;
    let mut client = Client::connect_narrow(gateway.address()).await;
    client.send(format!("{build}\n").as_bytes()).await;
    let mut stream = executor.accept().await;
    while stream.try_write(&[b'x'; 65536]).await {}
    gateway.logged("the reason", |line| line.contains("client stopped reading")).await;
    assert_eq!(client.rest().await.1, Ending::Reset);
}

const MORE_THAN_100_MB: usize = 101_000_003;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_100_mb_are_exact() {
    let (_system, mut gateway, executor, build) = direct("").await;
    let client = Client::ask(gateway.address(), &build).await;
    exact(MORE_THAN_100_MB, &executor, client).await;
    let bytes = format!("bytes={MORE_THAN_100_MB}");
    gateway.logged("the count", |line| line.contains(&bytes)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_100_mb_are_exact_through_two_zones() {
    let zones = TwoZones::start(true).await;
    let TwoZones { east, executor, build, .. } = &zones;
    let client = Client::ask(east.address(), build).await;
    exact(MORE_THAN_100_MB, executor, client).await;
}

#[tokio::test]
async fn pieces_of_every_size_split_no_character() {
    let (_system, gateway, executor, build) = direct("").await;
    in_pieces(&executor, Client::ask(gateway.address(), &build).await).await;
}

#[tokio::test]
async fn refusing_executor_gets_a_reply() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    let build = system.put_build(None, Some(&unreachable(None).await)).await;
    let answer = Client::ask(gateway.address(), &build).await.text().await;
    assert_eq!(answer, "Internal streaming error: the executor cannot be reached\r\n");
}

#[tokio::test]
async fn hanging_executor_gets_a_reply() {
    let (_system, gateway, executor, build) = direct("first_byte_timeout = \"200ms\"").await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut stream = executor.accept().await;
    assert_eq!(client.text().await, "Internal streaming error: the executor does not answer\r\n");
    stream.closed().await;
}

/// After its first byte a log may be idle for any time: the first-byte deadline passes many times
/// while the second byte waits for something that takes longer.
#[tokio::test]
async fn started_log_may_be_idle() {
    let (_system, gateway, executor, build) = direct("first_byte_timeout = \"20ms\"").await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut stream = executor.begin(&mut client).await;
    // Another client runs into that deadline ten times meanwhile.
    for _ in 0..10 {
        let mut other = Client::ask(gateway.address(), &build).await;
        let silent = executor.accept().await;
        assert!(other.text().await.contains("does not answer"));
        drop(silent);
    }
    stream.write(b"second\n").await;
    client.expect(b"second\n").await;
}

#[tokio::test]
async fn executor_that_resets_before_the_first_byte_gets_a_reply() {
    let (_system, gateway, executor, build) = direct("").await;
    let mut client = Client::ask(gateway.address(), &build).await;
    executor.accept().await.reset();
    let answer = client.text().await;
    assert_eq!(answer, "Internal streaming error: the executor cannot be reached\r\n");
}

#[tokio::test]
async fn aborted_log_ends_with_a_reset() {
    let (_system, gateway, executor, build) = direct("").await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut stream = executor.accept().await;
    stream.write(b"half a li").await;
    client.expect(b"half a li").await;
    stream.reset();
    assert_eq!(client.rest().await, (Vec::new(), Ending::Reset), "no reply of the gateway");
}

/// A reset by one gateway must not look like an end to the next one.
#[tokio::test]
async fn abort_crosses_two_zones() {
    for tls in [false, true] {
        let zones = TwoZones::start(tls).await;
        let TwoZones { east, executor, build, .. } = &zones;
        let mut client = Client::ask(east.address(), build).await;
        let mut stream = executor.accept().await;
        stream.write(b"half a li").await;
        client.expect(b"half a li").await;
        stream.reset();
        assert_eq!(client.rest().await, (Vec::new(), Ending::Reset), "TLS between them: {tls}");
    }
}

#[tokio::test]
async fn executor_that_closes_without_data_gets_a_reply() {
    let (_system, gateway, executor, build) = direct("").await;
    let mut client = Client::ask(gateway.address(), &build).await;
    executor.accept().await.finish().await;
    let answer = client.text().await;
    assert_eq!(answer, "Internal streaming error: the executor does not answer\r\n");
}

/// Zuul's own gateways close TLS without close_notify; that is a clean end.
#[tokio::test]
async fn end_without_close_notify_ends_the_log() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let other = Executor::start().await;
    system.put_gateway(Some("west"), Some(other.address.port()), true, "running").await;
    let gateway = Builder::new(&system).zone("east").tls(&identity).ready().await;
    let build = system.put_build(Some("west"), Some(&unreachable(Some("west")).await)).await;
    let acceptor = acceptor(&identity);
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut stream = other.accept_tls(&acceptor).await;
    stream.write(b"all of it\n").await;
    stream.abandon();
    assert_eq!(client.text().await, "all of it\n");
}

/// What a client sends after its request is discarded, and closing its connection must not cause a
/// reset that overtakes the end of the log.
#[tokio::test]
async fn bytes_after_the_request_are_ignored() {
    let (_system, gateway, executor, build) = direct("").await;
    let mut client = Client::connect(gateway.address()).await;
    client.send(format!("{build}\r\nand more\r\n").as_bytes()).await;
    let mut stream = executor.accept().await;
    for _ in 0..20 {
        client.send(&[b'y'; 10_000]).await;
    }
    let log: Vec<u8> = (0..300_000).map(pattern).collect();
    stream.write(&log).await;
    client.send(b"still here").await;
    stream.finish().await;
    let (received, ending) = client.rest().await;
    assert!(received == log, "{} of {}", received.len(), log.len());
    assert_eq!(ending, Ending::Clean);
}

/// The client reads nothing until the gateway is about to reset: the bytes wait in the client's
/// socket.
#[tokio::test]
async fn aborted_log_arrives_as_far_as_it_was_sent() {
    let (_system, mut gateway, executor, build) = direct("").await;
    let mut client = Client::connect_narrow(gateway.address()).await;
    client.send(format!("{build}\n").as_bytes()).await;
    let mut stream = executor.accept().await;
    // More than the client's side buffers, less than both sides do.
    let log: Vec<u8> = (0..200_000).map(pattern).collect();
    stream.write(&log).await;
    stream.reset_when_taken().await;
    gateway.logged("the cut", |line| line.contains("connection to the hop failed")).await;
    let (received, ending) = client.rest().await;
    assert!(received == log, "{} of {} bytes", received.len(), log.len());
    assert_eq!(ending, Ending::Reset);
}

/// A gateway that is stopped and continued loses nothing.
#[tokio::test]
async fn stopped_gateway_continues_its_streams() {
    let (_system, gateway, executor, build) = direct("").await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut stream = executor.accept().await;
    stream.write(b"before\n").await;
    gateway.signal(Signal::STOP);
    stream.write(b"meanwhile\n").await;
    gateway.signal(Signal::CONT);
    client.expect(b"before\nmeanwhile\n").await;
}
