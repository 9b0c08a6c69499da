//! Systems with two zones.

use std::net::SocketAddr;

use super::client::Client;
use super::executor::Executor;
use super::gateway::{Builder, Gateway};
use super::system::System;

/// Requests `build`, which `hop` has, and checks that its log arrives.
pub(crate) async fn assert_log_comes_from(hop: &Executor, gateway: SocketAddr, build: &str) {
    let mut client = Client::ask(gateway, build).await;
    let mut stream = hop.accept().await;
    assert_eq!(stream.request, format!("{build}\n"));
    stream.write(b"log\n").await;
    stream.finish().await;
    assert_eq!(client.text().await, "log\n");
}

/// Two zones with a gateway in each, and a build in zone west for clients of zone east.
pub(crate) struct TwoZones {
    _system: System,
    pub(crate) west: Gateway,
    pub(crate) east: Gateway,
    pub(crate) executor: Executor,
    pub(crate) build: String,
}

impl TwoZones {
    /// Starts the system, with or without TLS between the gateways.
    pub(crate) async fn start(tls: bool) -> Self {
        let system = System::new().await;
        let identity = system.zookeeper.authority.identity("gateway");
        let listener = if tls { "tls = true" } else { "" };
        let west = Builder::new(&system).zone("west").tls(&identity).listeners(&[listener]);
        let west = west.ready().await;
        let east = Builder::new(&system).zone("east").tls(&identity).ready().await;
        let executor = Executor::start().await;
        let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
        Self { _system: system, west, east, executor, build }
    }
}

/// Starts a gateway `east` in a system whose zone west has gateway entries with these ports.
pub(crate) async fn east_of(ports: &[u16], limits: &str) -> (System, Gateway) {
    let system = System::new().await;
    for port in ports {
        system.put_gateway(Some("west"), Some(*port), false, "running").await;
    }
    let gateway = Builder::new(&system).zone("east").limits(limits).ready().await;
    (system, gateway)
}
