//! Connections to executors and gateways: the local ports that they use, and how host names are
//! resolved.

use std::fs;

use nix::sched::CloneFlags;
use tokio::net::TcpListener;

use crate::support::admin::metric;
use crate::support::client::Client;
use crate::support::executor::Executor;
use crate::support::gateway::{Builder, Gateway};
use crate::support::namespace::{command, in_namespaces, resolve_locally};
use crate::support::system::{System, Worker};
use crate::support::zookeeper::ZooKeeper;

/// Local ports of the network namespace.
const PORTS: usize = 32;

/// Limits the local ports of the namespace to `count`, and disables their reuse in TIME_WAIT.
fn narrow_ports() {
    let set = |name: &str, value: &str| {
        fs::write(format!("/proc/sys/net/ipv4/{name}"), value).expect("a namespace of our own");
    };
    set("ip_local_port_range", &format!("40000 {}", 40_000 + PORTS - 1));
    set("tcp_tw_reuse", "0");
}

/// Returns how often a connection to a next hop found no local port.
async fn without_port(gateway: &Gateway) -> f64 {
    metric(gateway, "zuul_fingergw_local_ports_exhausted_total").await
}

/// A client decides when its stream ends, so the gateway must not be the side that keeps ports in
/// TIME_WAIT.
#[test]
fn client_resets_leave_no_time_wait_towards_the_executor() {
    in_namespaces(CloneFlags::CLONE_NEWNET, async || {
        let system = System::on(ZooKeeper::start().await).await;
        let mut builder = Builder::new(&system);
        builder.admin = true;
        let gateway = builder.ready().await;
        let executor = Executor::start().await;
        let build = system.put_build(None, Some(&executor.worker(None))).await;
        narrow_ports();
        for _ in 0..2 * PORTS {
            let mut client = Client::ask(gateway.address(), &build).await;
            let mut stream = executor.begin(&mut client).await;
            client.reset();
            stream.closed().await;
        }
        let mut client = Client::ask(gateway.address(), &build).await;
        executor.serve(b"log\n").await;
        assert_eq!(client.text().await, "log\n");
        assert_eq!(without_port(&gateway).await, 0.0);
    });
}

/// Zone west has two gateways: one accepts requests and stays silent, so the other one serves the
/// log.
#[test]
fn slower_hops_leave_no_time_wait() {
    in_namespaces(CloneFlags::CLONE_NEWNET, async || {
        let system = System::on(ZooKeeper::start().await).await;
        // The silent gateway's hedge delay is a fifth of this.
        let mut builder = Builder::new(&system).zone("east").limits("connect_timeout = \"250ms\"");
        builder.admin = true;
        let east = builder.ready().await;
        let (silent, west) = (Executor::start().await, Executor::start().await);
        for gateway in [&silent, &west] {
            system.put_gateway(Some("west"), Some(gateway.address.port()), false, "running").await;
        }
        let worker = Worker { hostname: "127.0.0.1".into(), port: 1, zone: Some("west".into()) };
        narrow_ports();
        let asked_in_vain = tokio::spawn(async move {
            loop {
                let mut stream = silent.accept().await;
                stream.closed().await;
            }
        });
        for _ in 0..2 * PORTS {
            let build = system.put_build(Some("west"), Some(&worker)).await;
            let mut client = Client::ask(east.address(), &build).await;
            let mut stream = west.begin(&mut client).await;
            client.reset();
            stream.closed().await;
        }
        assert_eq!(without_port(&east).await, 0.0);
        asked_in_vain.abort();
    });
}

/// Other connections use all ports towards the executor.
#[test]
fn connection_without_a_free_local_port_is_counted_and_logged() {
    in_namespaces(CloneFlags::CLONE_NEWNET, async || {
        let system = System::on(ZooKeeper::start().await).await;
        let mut builder = Builder::new(&system);
        builder.admin = true;
        let mut gateway = builder.ready().await;
        let executor = Executor::start().await;
        let build = system.put_build(None, Some(&executor.worker(None))).await;
        narrow_ports();
        let mut taken = Vec::new();
        for _ in 0..PORTS {
            taken.push(Client::connect(executor.address).await);
        }
        let reply = Client::ask(gateway.address(), &build).await.text().await;
        assert_eq!(reply, "Internal streaming error: the executor cannot be reached\r\n");
        let line = gateway.logged("the reason", |line| line.contains("stream ended")).await;
        assert!(line.contains("net.ipv4.tcp_tw_reuse"), "{line}");
        assert_eq!(without_port(&gateway).await, 1.0);
    });
}

/// Python resolves such names with its codec `idna`, and Zuul's programs register them as they are
/// written.
#[test]
fn host_name_beyond_ascii_is_dialed_and_registered() {
    in_namespaces(CloneFlags::CLONE_NEWNS, async || {
        let _hosts = resolve_locally(&["xn--bcher-kva.test"]);
        let system = System::on(ZooKeeper::start().await).await;
        let mut builder = Builder::new(&system);
        builder.hostname = "b\u{fc}cher.test".to_owned();
        let gateway = builder.ready().await;
        assert_eq!(system.entries().await[0].content["hostname"], "xn--bcher-kva.test");
        let executor = Executor::start().await;
        let port = executor.address.port();
        let worker = Worker { hostname: "b\u{fc}cher.test".to_owned(), port, zone: None };
        let build = system.put_build(None, Some(&worker)).await;
        let mut client = Client::ask(gateway.address(), &build).await;
        executor.serve(b"log\n").await;
        assert_eq!(client.text().await, "log\n");
    });
}

/// A link-local address is valid only with its interface (RFC 4007, section 11).
#[test]
fn link_local_address_is_dialed() {
    in_namespaces(CloneFlags::CLONE_NEWNET, async || {
        command("ip", "address add fe80::1/64 dev lo");
        let system = System::on(ZooKeeper::start().await).await;
        let gateway = Builder::new(&system).ready().await;
        let listener = TcpListener::bind("[::]:0").await.expect("a port");
        let address = listener.local_addr().expect("its address");
        let executor = Executor { listener, address };
        let worker = Worker { hostname: "fe80::1%lo".into(), port: address.port(), zone: None };
        let build = system.put_build(None, Some(&worker)).await;
        let mut client = Client::ask(gateway.address(), &build).await;
        executor.serve(b"log\n").await;
        assert_eq!(client.text().await, "log\n");
    });
}
