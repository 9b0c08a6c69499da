//! Behind a real haproxy: whom it says to have connected for is who the gateway knows.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;

use socket2::{Domain, Socket, Type};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use crate::support::client::Client;
use crate::support::executor::Executor;
use crate::support::gateway::Builder;
use crate::support::system::System;
use crate::support::within;

/// Where clients come from that haproxy stands before.
const CLIENT: Ipv4Addr = Ipv4Addr::new(127, 7, 7, 7);

/// One haproxy with a listener; dies with the test.
struct Haproxy {
    address: SocketAddr,
    _child: Child,
    _reservation: Socket,
    _directory: TempDir,
}

impl Haproxy {
    /// In front of `gateway`, to which it says by `send` for whom it connects.
    async fn start(gateway: SocketAddr, send: &str) -> Self {
        let (address, reservation) = reserve();
        let directory = TempDir::new().expect("a directory for haproxy");
        let config = directory.path().join("haproxy.cfg");
        let text = format!(
            "defaults\n    mode tcp\n    timeout connect 60s\n    timeout client 60s\n    \
             timeout server 60s\nlisten finger\n    bind {address}\n    \
             server gateway {gateway} {send}\n"
        );
        std::fs::write(&config, text).expect("haproxy.cfg");
        let child = Command::new("haproxy")
            .args(["-db", "-f"])
            .arg(&config)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("haproxy (tests/run installs it)");
        let haproxy =
            Self { address, _child: child, _reservation: reservation, _directory: directory };
        // It tells nobody when it listens. What connects here leaves without a request.
        within("haproxy to listen", async {
            while TcpStream::connect(address).await.is_err() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        haproxy
    }
}

/// An address that nobody else is given: sockets that both allow it may share one as long as only
/// one of them listens (socket(7), SO_REUSEADDR).
fn reserve() -> (SocketAddr, Socket) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.set_reuse_address(true).expect("SO_REUSEADDR");
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a port");
    let address = socket.local_addr().expect("its address").as_socket();
    (address.expect("an IP address"), socket)
}

#[tokio::test]
async fn plain_and_tls_in_both_versions() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    // The address that haproxy connects from, and what it may ask for: what its client may.
    let access = "proxy_protocol = [\"127.0.0.1\"]\n\
                  [[listener.allow]]\nnetworks = [\"127.7.7.7\"]";
    let listeners = [access, &format!("tls = true\n{access}")];
    let mut gateway = Builder::new(&system).tls(&identity).listeners(&listeners).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    for send in ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c,unique-id"] {
        let plain = Haproxy::start(gateway.addresses[0], send).await;
        let mut client = Client::connect_from(&CLIENT.to_string(), plain.address).await;
        let from_plain = client.stream.local_addr().expect("an address");
        client.send(format!("{build}\r\n").as_bytes()).await;
        executor.serve(b"log\n").await;
        assert_eq!(client.text().await, "log\n", "{send}");
        // Somebody else behind it.
        let mut other = Client::connect(plain.address).await;
        other.send(format!("{build}\r\n").as_bytes()).await;
        assert_eq!(other.text().await, "Build not found\r\n", "{send}");

        let tls = Haproxy::start(gateway.addresses[1], send).await;
        let client = Client::connect_from(&CLIENT.to_string(), tls.address).await;
        let from_tls = client.stream.local_addr().expect("an address");
        let mut client = Client::shake(client, &identity).await;
        client.send(format!("{build}\r\n").as_bytes()).await;
        executor.serve(b"log\n").await;
        assert_eq!(client.text().await, "log\n", "{send}, TLS");
        for client in [from_plain, from_tls] {
            let peer = format!("peer={client} ");
            let ended = |line: &str| line.contains("stream ended") && line.contains(&peer);
            gateway.logged("the stream", ended).await;
        }
    }
}
