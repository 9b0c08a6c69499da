//! Clients that stop reading during a log: how much the gateway and its kernel buffer for them, and
//! which streams are reset when too many clients stall.

use std::io::ErrorKind;
use std::process::Command;

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;

use crate::support::admin::ended;
use crate::support::client::{Client, Ending};
use crate::support::executor::{Executor, Stream};
use crate::support::gateway::{Builder, Gateway};
use crate::support::system::System;
use crate::support::{tool, within};

struct Site {
    _system: System,
    gateway: Gateway,
    executor: Executor,
    build: String,
}

impl Site {
    async fn start(limits: &str) -> Self {
        let system = System::new().await;
        let mut builder = Builder::new(&system).limits(limits);
        builder.admin = true;
        let gateway = builder.ready().await;
        let executor = Executor::start().await;
        let build = system.put_build(None, Some(&executor.worker(None))).await;
        Self { _system: system, gateway, executor, build }
    }

    /// Returns a client at `local` that has sent a request and reads nothing, and the executor's
    /// side of its stream.
    async fn ask_from(&self, local: &str) -> (Client<TcpStream>, Stream<TcpStream>) {
        let mut client = Client::connect_narrow_from(local, self.gateway.address()).await;
        client.send(format!("{}\n", self.build).as_bytes()).await;
        (client, self.executor.accept().await)
    }
}

/// The kernel must not hold for a stalled stream what it grants to an active one. What was sent and
/// not read is in the gateway, except for the executor's send buffer and the client's receive
/// buffer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn little_memory_is_held_for_a_stalled_client() {
    const READ: usize = 32 << 20;
    for (limits, at_most) in [("", 5 << 20), ("stream_buffer = 65536\n", 2 << 20)] {
        let site = Site::start(&format!("{limits}write_timeout = \"500ms\"")).await;
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_recv_buffer_size(256 << 10).expect("SO_RCVBUF");
        let stream = socket.connect(site.gateway.address()).await.expect("connected");
        let mut client = Client { stream };
        client.send(format!("{}\n", site.build).as_bytes()).await;
        let socket = site.executor.accept().await.into_inner();
        SockRef::from(&socket).set_send_buffer_size(256 << 10).expect("SO_SNDBUF");
        let pouring = tokio::spawn(async move {
            let mut taken = 0;
            while socket.writable().await.is_ok() {
                match socket.try_write(&[b'x'; 65536]) {
                    Ok(count) => taken += count,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(_) => break,
                }
            }
            taken
        });
        client.expect(&vec![b'x'; READ]).await;
        ended(&site.gateway, "client_stalled", 1).await;
        let held = pouring.await.expect("the executor") - READ;
        assert!(held <= at_most, "{limits:?}: {held} bytes, {at_most} allowed");
        assert_eq!(client.rest().await.1, Ending::Reset);
    }
}

/// Returns the sizes of the receive buffers of the gateway's connections to clients, which `ss`
/// shows as `rb`.
fn receive_buffers(gateway: &Gateway) -> Vec<u64> {
    let filter = format!("sport = :{}", gateway.port());
    let arguments = ["--tcp", "--memory", "--numeric", "--no-header", "state", "established"];
    let sockets = tool(Command::new("ss").args(arguments).arg(filter));
    let bound = |socket: &str| {
        let bound = socket.split(',').find_map(|field| field.strip_prefix("rb"));
        bound.and_then(|bound| bound.parse().ok()).expect("rb")
    };
    sockets.split("skmem:(").skip(1).map(bound).collect()
}

/// The gateway reads what a client sends after its request up to a limit; the kernel must not
/// buffer much of the rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn little_memory_is_held_of_what_a_client_sends() {
    let site = Site::start("").await;
    let (mut client, mut stream) = site.ask_from("127.0.0.1").await;
    stream.write(b"a line\n").await;
    client.expect(b"a line\n").await;
    client.send(&[b'x'; 128 * 1024]).await;
    assert_eq!(receive_buffers(&site.gateway), [128 * 1024]);
    let sending = tokio::spawn(async move {
        client.send(&[b'x'; 64 << 20]).await;
        client
    });
    within("a small receive buffer", async {
        while receive_buffers(&site.gateway).iter().any(|bound| *bound > 8 * 1024) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    sending.abort();
}

/// An eighth of the connections of one address may stall. Further streams of this address are
/// reset; other addresses are not affected.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_clients_are_limited_per_address() {
    const MAY_WAIT: usize = 8;
    const TOO_MANY: usize = 12;
    let site = Site::start("connections_per_address = 64\nwrite_timeout = \"1h\"").await;
    let (mut other, mut stream) = site.ask_from("127.0.0.3").await;
    let log: Vec<u8> = (0..8_000_000_u32).map(|index| (index % 251) as u8).collect();
    let sent = log.clone();
    let sending = tokio::spawn(async move {
        stream.write(&sent).await;
        stream.finish().await;
    });
    let (mut clients, mut logs) = (Vec::new(), JoinSet::new());
    for _ in 0..MAY_WAIT + TOO_MANY {
        let (client, mut stream) = site.ask_from("127.0.0.2").await;
        clients.push(client);
        logs.spawn(async move { while stream.try_write(&[b'x'; 65536]).await {} });
    }
    ended(&site.gateway, "client_evicted", TOO_MANY).await;
    let (received, ending) = other.rest().await;
    assert!(received == log && ending == Ending::Clean, "{} bytes", received.len());
    sending.await.expect("the executor");
}

/// A log that is smaller than the buffers never makes the gateway wait for the client. While the
/// log is idle, the kernel holds all of it nevertheless.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_clients_of_idle_logs_are_limited() {
    const MAY_WAIT: usize = 8;
    const TOO_MANY: usize = 4;
    let site = Site::start("connections_per_address = 64\nwrite_timeout = \"1h\"").await;
    let mut streams = Vec::new();
    for _ in 0..MAY_WAIT + TOO_MANY {
        let (client, mut stream) = site.ask_from("127.0.0.2").await;
        stream.write(&[b'x'; 256 * 1024]).await;
        streams.push((client, stream));
    }
    ended(&site.gateway, "client_evicted", TOO_MANY).await;
    let mut whole = 0;
    for (mut client, mut stream) in streams {
        // The gateway has reset the executor's connections of the streams that it has reset.
        if stream.try_write(b"x").await {
            stream.finish().await;
            let (received, ending) = client.rest().await;
            assert!(received == [b'x'; 256 * 1024 + 1], "{} bytes", received.len());
            assert_eq!(ending, Ending::Clean);
            whole += 1;
        }
    }
    assert_eq!(whole, MAY_WAIT);
}

#[tokio::test]
async fn stalled_client_of_an_idle_log_is_reset() {
    let site = Site::start("write_timeout = \"500ms\"").await;
    let (_client, mut stream) = site.ask_from("127.0.0.1").await;
    stream.write(&[b'x'; 256 * 1024]).await;
    ended(&site.gateway, "client_stalled", 1).await;
}

/// The kernel would continue to hold a finished log for a client that does not read it.
#[tokio::test]
async fn stalled_client_of_an_ended_log_is_reset() {
    let site = Site::start("write_timeout = \"500ms\"").await;
    for half_closes in [false, true] {
        let (mut client, mut stream) = site.ask_from("127.0.0.1").await;
        if half_closes {
            client.half_close().await;
        }
        stream.write(&[b'x'; 256 * 1024]).await;
        stream.finish().await;
        let reset = client.stream.ready(Interest::ERROR);
        within("a reset", reset).await.expect("a socket");
    }
}
