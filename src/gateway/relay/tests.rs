//! Tests of the relay over connections in memory, with paused time.

use std::sync::atomic::AtomicU64;
use std::time::Instant;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::client_waits::ClientWaits;
use super::*;
use crate::config::Limits;
use crate::gateway::transport::buffer_pool::PooledBuffer;
use crate::gateway::transport::in_memory::{self, Peer};
use crate::gateway::transport::socket::Socket;
use crate::telemetry::metrics::Metrics;

/// A stream with a client and an upstream in memory, and what its relay shares with others.
struct Setup {
    limits: Limits,
    client_waits: ClientWaits,
    metrics: Metrics,
    abort: CancellationToken,
    bytes: AtomicU64,
}

const FIRST: &[u8] = b"first\n";

impl Setup {
    fn new(change: impl FnOnce(&mut Limits)) -> Self {
        let mut limits = Limits::default();
        change(&mut limits);
        Self {
            limits,
            client_waits: ClientWaits::default(),
            metrics: Metrics::default(),
            abort: CancellationToken::new(),
            bytes: AtomicU64::new(0),
        }
    }

    async fn run(
        &self,
        mut upstream: Connection,
        first: &[u8],
        mut client: Connection,
    ) -> EndReason {
        let cx = RelayContext {
            limits: &self.limits,
            client_waits: &self.client_waits,
            metrics: &self.metrics,
            abort: &self.abort,
            client: None,
            began: Instant::now(),
            bytes: &self.bytes,
        };
        let mut buffer = PooledBuffer::acquire();
        buffer[..first.len()].copy_from_slice(first);
        run(&mut upstream, Chunk::new(buffer, first.len()), &mut client, &cx).await
    }
}

/// A connection whose peer takes everything.
fn connection() -> (Connection, Peer) {
    in_memory::connection(1 << 20)
}

/// Waits for `bytes` of a log at the client.
async fn expect(client: &mut Peer, bytes: &[u8]) {
    let mut received = vec![0; bytes.len()];
    client.stream.read_exact(&mut received).await.expect("the log");
    assert_eq!(received, bytes);
}

#[tokio::test(start_paused = true)]
async fn log_that_ends_is_relayed_to_its_last_byte() {
    let setup = Setup::new(|_| {});
    let (upstream, mut hop) = connection();
    let (client, mut client_peer) = connection();
    let log = async {
        expect(&mut client_peer, FIRST).await;
        hop.stream.write_all(b"second\n").await.expect("sent");
        expect(&mut client_peer, b"second\n").await;
        hop.stream.write_all(&[b'x'; 200_000]).await.expect("sent");
        drop(hop);
        expect(&mut client_peer, &[b'x'; 200_000]).await;
    };
    let (end, ()) = tokio::join!(setup.run(upstream, FIRST, client), log);
    assert!(matches!(end, EndReason::Finished), "{end}");
    assert_eq!(setup.bytes.load(Ordering::Relaxed), 200_013);
}

#[tokio::test(start_paused = true)]
async fn upstream_that_fails_after_some_bytes_is_not_a_finished_log() {
    let setup = Setup::new(|_| {});
    let (upstream, hop) = connection();
    let (client, mut client_peer) = connection();
    let log = async {
        expect(&mut client_peer, FIRST).await;
        hop.reset();
    };
    let (end, ()) = tokio::join!(setup.run(upstream, FIRST, client), log);
    assert!(matches!(end, EndReason::UpstreamFailed(_)), "{end}");
    assert_eq!(setup.bytes.load(Ordering::Relaxed), FIRST.len() as u64);
}

#[tokio::test(start_paused = true)]
async fn client_that_resets_ends_an_idle_stream() {
    let setup = Setup::new(|_| {});
    let (upstream, _hop) = connection();
    let (client, mut client_peer) = connection();
    let leave = async {
        expect(&mut client_peer, FIRST).await;
        client_peer.reset();
    };
    let (end, ()) = tokio::join!(setup.run(upstream, FIRST, client), leave);
    assert!(matches!(end, EndReason::ClientLeft(Some(_))), "{end}");
}

#[tokio::test(start_paused = true)]
async fn client_that_half_closes_gets_the_rest_of_the_log() {
    let setup = Setup::new(|_| {});
    let (upstream, mut hop) = connection();
    let (client, mut client_peer) = connection();
    let log = async {
        client_peer.stream.shutdown().await.expect("half closed");
        expect(&mut client_peer, FIRST).await;
        sleep(Duration::from_secs(3600)).await;
        hop.stream.write_all(b"second\n").await.expect("sent");
        drop(hop);
        expect(&mut client_peer, b"second\n").await;
    };
    let (end, ()) = tokio::join!(setup.run(upstream, FIRST, client), log);
    assert!(matches!(end, EndReason::Finished), "{end}");
}

#[tokio::test(start_paused = true)]
async fn write_to_a_client_that_is_gone_ends_the_stream() {
    let setup = Setup::new(|_| {});
    let (upstream, mut hop) = connection();
    let (client, mut client_peer) = connection();
    let log = async {
        expect(&mut client_peer, FIRST).await;
        drop(client_peer);
        hop.stream.write_all(b"second\n").await.expect("sent");
    };
    let (end, ()) = tokio::join!(setup.run(upstream, FIRST, client), log);
    assert!(matches!(end, EndReason::ClientLeft(Some(_))), "{end}");
    assert_eq!(setup.bytes.load(Ordering::Relaxed), FIRST.len() as u64);
}

#[tokio::test(start_paused = true)]
async fn client_that_reads_nothing_ends_the_stream_at_the_write_deadline() {
    let setup = Setup::new(|limits| limits.write_timeout = Duration::from_secs(300));
    let (upstream, _hop) = connection();
    let (client, _client_peer) = in_memory::connection(4);
    let began = time::Instant::now();
    let end = setup.run(upstream, FIRST, client).await;
    assert!(matches!(end, EndReason::ClientStalled), "{end}");
    assert_eq!(setup.bytes.load(Ordering::Relaxed), 4);
    assert_eq!(began.elapsed().as_secs(), 300);
}

#[tokio::test(start_paused = true)]
async fn client_that_reads_slowly_keeps_its_stream() {
    let setup = Setup::new(|limits| limits.write_timeout = Duration::from_secs(300));
    let (upstream, hop) = connection();
    let (client, mut client_peer) = in_memory::connection(1);
    let log = async {
        drop(hop);
        for byte in FIRST {
            sleep(Duration::from_secs(299)).await;
            expect(&mut client_peer, &[*byte]).await;
        }
    };
    let (end, ()) = tokio::join!(setup.run(upstream, FIRST, client), log);
    assert!(matches!(end, EndReason::Finished), "{end}");
}

/// A log smaller than the kernel's buffers never makes a write wait.
#[tokio::test(start_paused = true)]
async fn client_that_acknowledges_nothing_of_an_idle_log_is_stalled() {
    let setup = Setup::new(|limits| limits.write_timeout = Duration::from_secs(300));
    let (upstream, _hop) = connection();
    let (client, client_peer) = connection();
    client_peer.set_unacked_bytes(20_000);
    let began = time::Instant::now();
    let end = setup.run(upstream, &[b'x'; 20_000], client).await;
    assert!(matches!(end, EndReason::ClientStalled), "{end}");
    assert_eq!(began.elapsed().as_secs(), 300);
}

#[tokio::test(start_paused = true)]
async fn client_that_acknowledges_an_idle_log_late_is_not_stalled() {
    let setup = Setup::new(|limits| limits.write_timeout = Duration::from_secs(300));
    let (upstream, hop) = connection();
    let (client, client_peer) = connection();
    client_peer.set_unacked_bytes(20_000);
    let log = async {
        sleep(Duration::from_secs(299)).await;
        client_peer.set_unacked_bytes(0);
        sleep(Duration::from_secs(299)).await;
        drop(hop);
    };
    let (end, ()) = tokio::join!(setup.run(upstream, &[b'x'; 20_000], client), log);
    assert!(matches!(end, EndReason::Finished), "{end}");
}

#[tokio::test(start_paused = true)]
async fn too_many_stalled_clients_evict_the_one_that_waits_longest() {
    let setup = Setup::new(|limits| {
        limits.connections = 1;
        limits.write_timeout = Duration::from_secs(300);
    });
    let mut relays = FuturesUnordered::new();
    let mut peers = Vec::new();
    for index in 0..9 {
        let (upstream, hop) = connection();
        let (client, client_peer) = in_memory::connection(1);
        peers.push((hop, client_peer));
        let relay = setup.run(upstream, FIRST, client);
        relays.push(async move {
            // In order, so that the first one waits longest.
            sleep(Duration::from_millis(index)).await;
            (index, relay.await)
        });
    }
    let (index, end) = relays.next().await.expect("a relay");
    assert!(matches!(end, EndReason::ClientEvicted), "{end}");
    assert_eq!(index, 0);
    let others = timeout(Duration::from_secs(60), relays.next()).await;
    assert!(others.is_err(), "eight clients may stall");
}

#[tokio::test(start_paused = true)]
async fn idle_stream_ends_at_the_idle_timeout() {
    let idle = Duration::from_secs(160);
    let setup = Setup::new(|limits| limits.stream_idle = Some(idle));
    let (upstream, mut hop) = connection();
    let (client, _client_peer) = connection();
    let began = time::Instant::now();
    let log = async {
        for _ in 0..3 {
            sleep(Duration::from_secs(150)).await;
            hop.stream.write_all(b"more\n").await.expect("sent");
        }
        // Keeps the upstream open.
        std::future::pending::<()>().await;
    };
    let end = tokio::select! {
        end = setup.run(upstream, FIRST, client) => end,
        () = log => unreachable!(),
    };
    assert!(matches!(end, EndReason::Idle), "{end}");
    // The timeout and up to one check interval after the last byte.
    let elapsed = began.elapsed().as_secs();
    assert!((450 + 160..=450 + 170).contains(&elapsed), "{elapsed} s");
}

#[tokio::test(start_paused = true)]
async fn stream_that_flows_ends_at_the_total_timeout() {
    let setup = Setup::new(|limits| limits.stream_total = Some(Duration::from_secs(3600)));
    let (upstream, mut hop) = connection();
    let (client, _client_peer) = connection();
    let began = time::Instant::now();
    let log = async {
        loop {
            sleep(Duration::from_secs(7)).await;
            hop.stream.write_all(b"more\n").await.expect("sent");
        }
    };
    let end = tokio::select! {
        end = setup.run(upstream, FIRST, client) => end,
        () = log => unreachable!(),
    };
    assert!(matches!(end, EndReason::TooLong), "{end}");
    // The stream began by the other clock.
    assert!(began.elapsed().as_secs().abs_diff(3600) <= 1);
}

#[tokio::test(start_paused = true)]
async fn abort_ends_a_stream_even_while_its_client_is_stalled() {
    for buffer in [4, 1 << 20] {
        let setup = Setup::new(|_| {});
        let (upstream, _hop) = connection();
        let (client, _client_peer) = in_memory::connection(buffer);
        let abort = async {
            sleep(Duration::from_secs(1)).await;
            setup.abort.cancel();
        };
        let (end, ()) = tokio::join!(setup.run(upstream, FIRST, client), abort);
        assert!(matches!(end, EndReason::Stopped), "{end}");
    }
}

#[tokio::test(start_paused = true)]
async fn keepalive_is_enabled_only_on_streams_that_last() {
    let setup = Setup::new(|_| {});
    for (lasts, has_keepalive) in [(KEEPALIVE_DELAY / 2, false), (KEEPALIVE_DELAY * 2, true)] {
        let (upstream, hop) = connection();
        let (client, client_peer) = connection();
        let relay = setup.run(upstream, FIRST, client);
        assert!(timeout(lasts, relay).await.is_err());
        assert_eq!(hop.has_keepalive(), has_keepalive, "{lasts:?}");
        assert_eq!(client_peer.has_keepalive(), has_keepalive, "{lasts:?}");
    }
}

/// A pair of connected TCP sockets.
async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("its address");
    let near = TcpStream::connect(address).await.expect("connected");
    (near, listener.accept().await.expect("accepted").0)
}

/// Waits until `count` pipes are in use.
async fn pipes_in_use(count: usize) {
    let reached = async {
        while splice::pipes_in_use() != count {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(30), reached).await.expect("as many pipes in use");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_client_gives_its_pipe_back_and_gets_the_whole_log() {
    let _serial = splice::SERIAL.lock().await;
    // With these in use the stream gets a pipe that may be copied.
    let in_use: Vec<_> =
        std::iter::from_fn(PooledPipe::acquire).take(splice::LARGE_PIPES).collect();
    let (mut hop, upstream) = tcp_pair().await;
    let (mut client_peer, client) = tcp_pair().await;
    let log: Vec<u8> = (0..30_000_000_u32).map(|index| (index % 251) as u8).collect();
    let (first, rest) = (log[..BULK_READ].to_vec(), log[BULK_READ..].to_vec());
    let relay = tokio::spawn(async move {
        let setup = Setup::new(|_| {});
        let upstream = Connection::Plain(Socket::from_hop(upstream));
        let client = Connection::Plain(Socket::from_client(client));
        setup.run(upstream, &first, client).await
    });
    let hop = tokio::spawn(async move {
        hop.write_all(&rest).await.expect("sent");
    });
    pipes_in_use(in_use.len() + 1).await;
    pipes_in_use(in_use.len()).await;
    let mut received = vec![0; log.len()];
    client_peer.read_exact(&mut received).await.expect("the log");
    assert!(received == log);
    hop.await.expect("sent");
    let end = relay.await.expect("no panic");
    assert!(matches!(end, EndReason::Finished), "{end}");
}
