//! Bulk transfers: logs that arrive faster than the client reads, through kernel pipes and TLS
//! read-ahead, ended at every point of the way.

use rustix::process::Signal;

use crate::support::certificates::Identity;
use crate::support::client::{Client, Ending};
use crate::support::executor::{Executor, acceptor};
use crate::support::gateway::{Builder, Gateway};
use crate::support::system::System;
use crate::support::zones::TwoZones;

/// Number of pipes of the program (`src/gateway/relay/splice.rs`).
const PIPES: usize = 32;

/// More than all buffers between an executor and a client that does not read can hold.
const TOO_MUCH: usize = 32 * 1024 * 1024;

/// Returns a log of `length` bytes that never repeats within any buffer's length.
fn log(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

struct Setup {
    _system: System,
    gateway: Gateway,
    executor: Executor,
    build: String,
}

impl Setup {
    async fn new() -> Self {
        let system = System::new().await;
        let gateway = Builder::new(&system).ready().await;
        let executor = Executor::start().await;
        let build = system.put_build(None, Some(&executor.worker(None))).await;
        Self { _system: system, gateway, executor, build }
    }

    /// Returns a client with a small receive buffer that has sent its request and reads nothing
    /// yet.
    async fn stalled_client(&self) -> Client<tokio::net::TcpStream> {
        let mut client = Client::connect_narrow(self.gateway.address()).await;
        client.send(format!("{}\n", self.build).as_bytes()).await;
        client
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_reader_gets_the_whole_log() {
    let setup = Setup::new().await;
    let mut client = setup.stalled_client().await;
    let mut stream = setup.executor.accept().await;
    let sent = log(12_000_001);
    let writer = async {
        stream.write(&sent).await;
        stream.finish().await;
    };
    let reader = async {
        let (mut received, mut buffer) = (Vec::new(), vec![0; 7_001]);
        loop {
            match client.read(&mut buffer).await {
                Ok(count) => received.extend_from_slice(&buffer[..count]),
                Err(ending) => break (received, ending),
            }
        }
    };
    let ((), (received, ending)) = tokio::join!(writer, reader);
    assert!(received == sent, "{} bytes", received.len());
    assert_eq!(ending, Ending::Clean);
}

/// The executor has finished while the log is still in the gateway: in its send queue, in a pipe,
/// in its receive queue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_is_whole_although_the_executor_ended_long_before() {
    let setup = Setup::new().await;
    for length in
        [16_383, 16_384, 16_385, 32_768, 100_000, 1_048_575, 1_048_577, 2_000_000, 4_000_000]
    {
        let mut client = setup.stalled_client().await;
        let mut stream = setup.executor.accept().await;
        let sent = log(length);
        stream.write(&sent).await;
        stream.finish().await;
        let (received, ending) = client.rest().await;
        assert!(received == sent, "{} bytes of {length}", received.len());
        assert_eq!(ending, Ending::Clean, "{length}");
    }
}

/// The same with an abort: everything the gateway has received arrives, then the reset.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn aborted_log_arrives_as_far_as_it_was_received() {
    let setup = Setup::new().await;
    for length in [16_383, 16_384, 16_385, 100_000, 300_000, 1_048_577] {
        let mut client = setup.stalled_client().await;
        let mut stream = setup.executor.accept().await;
        let sent = log(length);
        stream.write(&sent).await;
        stream.reset_when_taken().await;
        let (received, ending) = client.rest().await;
        assert!(received == sent, "{} bytes of {length}", received.len());
        assert_eq!(ending, Ending::Reset, "{length}");
    }
}

/// To splice(2), an urgent data mark followed by the end looks like the end. The urgent byte itself
/// is not part of the log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn urgent_data_does_not_end_a_log() {
    let setup = Setup::new().await;
    for (before, after) in [(300_000, 50_000), (300_000, 1), (1, 300_000), (100_000, 100_000)] {
        // The client reads nothing until everything has been sent.
        let mut client = setup.stalled_client().await;
        let mut stream = setup.executor.accept().await;
        let sent = log(before + after);
        stream.write(&sent[..before]).await;
        stream.urgent().await;
        stream.write(&sent[before..]).await;
        stream.finish().await;
        let (received, ending) = client.rest().await;
        assert!(received == sent, "{} of {before}+{after} bytes", received.len());
        assert_eq!(ending, Ending::Clean);
    }
}

/// More slow readers than there are pipes: the remaining logs are copied and must be just as exact.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_streams_than_pipes_are_exact() {
    let setup = Setup::new().await;
    let sent = std::sync::Arc::new(log(2_000_000));
    let mut streams = Vec::new();
    for _ in 0..PIPES + 8 {
        let client = setup.stalled_client().await;
        let mut stream = setup.executor.accept().await;
        let sent = std::sync::Arc::clone(&sent);
        let writing = tokio::spawn(async move {
            stream.write(&sent).await;
            stream.finish().await;
        });
        streams.push((client, writing));
    }
    // All concurrently, so that a pipe that moves from one stream to another must carry nothing
    // over.
    let readers = streams.into_iter().map(|(mut client, writing)| {
        let sent = std::sync::Arc::clone(&sent);
        tokio::spawn(async move {
            let (received, ending) = client.rest().await;
            assert!(received == *sent, "{} bytes", received.len());
            assert_eq!(ending, Ending::Clean);
            writing.await.expect("the executor");
        })
    });
    for reader in readers.collect::<Vec<_>>() {
        reader.await.expect("an exact log");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn client_reset_during_a_bulk_transfer_ends_both_sides() {
    let mut setup = Setup::new().await;
    let client = setup.stalled_client().await;
    let mut stream = setup.executor.accept().await;
    let writing = tokio::spawn(async move { stream.try_write(&log(TOO_MUCH)).await });
    client.reset();
    setup.gateway.logged("the stream to end", |line| line.contains("end=\"client left")).await;
    assert!(!writing.await.expect("the executor"), "the gateway has closed that side as well");
}

/// The grace period ends with a full pipe and a client that does not read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stop_aborts_a_stalled_bulk_transfer_after_the_grace() {
    let system = System::new().await;
    let mut gateway = Builder::new(&system).limits("grace = \"50ms\"").ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut client = Client::connect_narrow(gateway.address()).await;
    client.send(format!("{build}\n").as_bytes()).await;
    let mut stream = executor.accept().await;
    let writing = tokio::spawn(async move { stream.try_write(&log(TOO_MUCH)).await });
    gateway.signal(Signal::TERM);
    assert!(gateway.exit().await.success());
    assert_eq!(client.rest().await.1, Ending::Reset);
    assert!(!writing.await.expect("the executor"));
}

/// Between zones: full TLS records, read ahead, to a slow client.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_reader_gets_the_whole_log_through_two_zones() {
    let zones = TwoZones::start(true).await;
    let TwoZones { east, executor, build, .. } = &zones;
    for length in [4095, 4096, 4097, 16_384, 65_536, 65_537, 1_000_000, 9_000_001] {
        let mut client = Client::connect_narrow(east.address()).await;
        client.send(format!("{build}\n").as_bytes()).await;
        let mut stream = executor.accept().await;
        let sent = log(length);
        let writer = async {
            stream.write(&sent).await;
            stream.finish().await;
        };
        let ((), (received, ending)) = tokio::join!(writer, client.rest());
        assert!(received == sent, "{} bytes of {length}", received.len());
        assert_eq!(ending, Ending::Clean, "{length}");
    }
}

/// A peer gateway resets after bytes that can still be read: all of them arrive, and the stream
/// ends with a reset.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reset_after_tls_records_delivers_them_and_aborts() {
    let system = System::new().await;
    let identity: Identity = system.zookeeper.authority.identity("gateway");
    let other = Executor::start().await;
    system.put_gateway(Some("west"), Some(other.address.port()), true, "running").await;
    let mut east = Builder::new(&system).zone("east").tls(&identity).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    for length in [1, 16_384, 300_000] {
        let mut client = Client::ask(east.address(), &build).await;
        let mut stream = other.accept_tls(&acceptor(&identity)).await;
        let sent = log(length);
        stream.write(&sent).await;
        client.expect(&sent).await;
        let (socket, _) = stream.into_inner().into_inner();
        crate::support::executor::reset(&socket);
        drop(socket);
        assert_eq!(client.rest().await, (Vec::new(), Ending::Reset), "{length}");
    }
    east.logged_times("each cut", 3, |line| line.contains("connection to the hop failed")).await;
}

/// Returns for each connection from or to `port` on loopback whether keepalive is active: the timer
/// of /proc/net/tcp is 02 (proc(5) calls it `tr`).
fn probed(port: u16) -> Vec<bool> {
    let table = std::fs::read_to_string("/proc/net/tcp").expect("the table of connections");
    let port = format!(":{port:04X}");
    let fields = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    // Of the two ends of each connection, only the gateway's.
    let ours = |fields: &Vec<&str>| fields[1].ends_with(&port) && fields[3] == "01";
    fields.filter(ours).map(|fields| fields[5].starts_with("02:")).collect()
}

/// A peer that vanishes is detected on a stream that is idle after its first line and on one that
/// is idle after a bulk transfer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_streams_are_probed_by_keepalive() {
    let setup = Setup::new().await;
    for length in [100, 300_000, 1_000_000] {
        let mut client = Client::ask(setup.gateway.address(), &setup.build).await;
        let mut stream = setup.executor.accept().await;
        let sent = log(length);
        stream.write(&sent).await;
        client.expect(&sent).await;
        let gateways = setup.gateway.port();
        let dialed = stream.peer_port();
        // The kernel does not report when a timer starts, so poll.
        let both = async {
            while probed(gateways) != [true] || probed(dialed) != [true] {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        crate::support::within("both sides to be probed", both).await;
        stream.finish().await;
        assert_eq!(client.rest().await, (Vec::new(), Ending::Clean), "{length}");
    }
}
