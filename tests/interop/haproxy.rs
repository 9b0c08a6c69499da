//! Gateways with a real haproxy in front: the client address that haproxy announces is the client.

use std::net::{Ipv4Addr, SocketAddr};

use crate::support::client::Client;
use crate::support::executor::Executor;
use crate::support::gateway::Builder;
use crate::support::haproxy::{Haproxy, reserve};
use crate::support::system::System;

/// Addresses of clients of haproxy.
const CLIENT: Ipv4Addr = Ipv4Addr::new(127, 7, 7, 7);

/// Starts haproxy in front of `gateway`; `send` is its option for the PROXY header.
async fn before(gateway: SocketAddr, send: &str) -> Haproxy {
    Haproxy::start(reserve(), |address, _| {
        format!(
            "defaults\n    mode tcp\n    timeout connect 60s\n    timeout client 60s\n    \
             timeout server 60s\nlisten finger\n    bind {address}\n    \
             server gateway {gateway} {send}\n"
        )
    })
    .await
}

#[tokio::test]
async fn proxy_headers_of_both_versions_are_read() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    // The address from which haproxy connects has the permissions of its client.
    let access = "proxy_protocol = [\"127.0.0.1\"]\n\
                  [[listener.allow]]\nnetworks = [\"127.7.7.7\"]";
    let listeners = [access, &format!("tls = true\n{access}")];
    let mut gateway = Builder::new(&system).tls(&identity).listeners(&listeners).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    for send in ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c,unique-id"] {
        let plain = before(gateway.addresses[0], send).await;
        let mut client = Client::connect_from(&CLIENT.to_string(), plain.address).await;
        let from_plain = client.stream.local_addr().expect("an address");
        client.send(format!("{build}\r\n").as_bytes()).await;
        executor.serve(b"log\n").await;
        assert_eq!(client.text().await, "log\n", "{send}");
        // Another client of the same haproxy.
        let mut other = Client::connect(plain.address).await;
        other.send(format!("{build}\r\n").as_bytes()).await;
        assert_eq!(other.text().await, "Build not found\r\n", "{send}");

        let tls = before(gateway.addresses[1], send).await;
        let client = Client::connect_from(&CLIENT.to_string(), tls.address).await;
        let from_tls = client.stream.local_addr().expect("an address");
        let mut client = Client::handshake(client, &identity).await;
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
