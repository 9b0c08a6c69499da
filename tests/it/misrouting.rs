//! Registered addresses that lead to another host: what clients receive, and what the gateway
//! reports. Port forwards are proxies in front of real gateways.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::task::JoinSet;

use crate::support::admin::metric;
use crate::support::client::Client;
use crate::support::executor::{Executor, unreachable};
use crate::support::gateway::{Builder, Gateway};
use crate::support::proxy::Proxy;
use crate::support::system::{System, Worker};
use crate::support::within;
use crate::support::zones::assert_log_comes_from;

fn misrouted(kind: &str) -> String {
    format!("zuul_fingergw_misrouted_requests_total{{kind=\"{kind}\"}}")
}

fn warnings(gateway: &Gateway) -> Vec<String> {
    let all = gateway.log();
    all.into_iter()
        .filter(|line| line.contains(" WARN ") && line.contains("port forwards"))
        .collect()
}

/// The executor of a build has an address on which this gateway listens, another address of this
/// host, the registered name of this gateway, or the address of a forward to this gateway. One
/// request causes only few others, and the client receives a reply.
#[tokio::test]
async fn executor_with_the_address_of_this_gateway() {
    let system = System::new().await;
    let mut builder = Builder::new(&system).zone("east").listeners(&["address = \"0.0.0.0:0\""]);
    builder.root = "public_port = 7979".to_owned();
    builder.limits = "first_byte_timeout = \"1500ms\"".to_owned();
    builder.admin = true;
    let gateway = builder.ready().await;
    let port = gateway.port();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let forward = Proxy::start(port).await;
    let idle = gateway.sockets();
    for (hostname, port, most) in [
        ("127.0.0.1", port, 2.0),
        ("127.0.0.2", port, 2.0),
        ("localhost", 7979, 1.0),
        // Three per second, and the three that wait when the first of them is given up.
        ("127.0.0.1", forward.address.port(), 12.0),
    ] {
        let zone = Some("east".to_owned());
        let worker = Worker { hostname: hostname.to_owned(), port, zone };
        let build = system.put_build(None, Some(&worker)).await;
        let accepted = "zuul_fingergw_connections_accepted_total{listener=\"plain\"}";
        let before = metric(&gateway, accepted).await;
        let answer = Client::ask(address, &build).await.text().await;
        assert!(answer.starts_with("Internal streaming error: the executor "), "{answer}");
        gateway.until_sockets(idle).await;
        let connections = metric(&gateway, accepted).await - before;
        assert!(connections <= most, "{hostname}:{port}: {connections} connections");
    }
    assert_eq!(metric(&gateway, &misrouted("loop")).await, 3.0);
}

/// The executor of a build has the address of another gateway, which does not send the request to itself.
#[tokio::test]
async fn executor_with_the_address_of_another_gateway() {
    let system = System::new().await;
    let mut gateways = Vec::new();
    for zone in ["east", "west"] {
        let mut builder = Builder::new(&system).zone(zone);
        builder.admin = true;
        gateways.push(builder.ready().await);
    }
    let [east, west] = &gateways[..] else { unreachable!("two") };
    let zone = Some("north".to_owned());
    let worker = Worker { hostname: "localhost".to_owned(), port: west.port(), zone };
    let build = system.put_build(None, Some(&worker)).await;
    let answer = Client::ask(east.address(), &build).await.text().await;
    assert_eq!(answer, "Internal streaming error: the executor cannot be reached\r\n");
    let accepted = "zuul_fingergw_connections_accepted_total{listener=\"plain\"}";
    assert_eq!(metric(east, accepted).await, 1.0);
    assert_eq!(metric(west, accepted).await, 1.0);
}

/// A gateway of ours in `zone`, behind TLS, whose registered port is that of a forward.
async fn forwarded(system: &System, zone: &str, forward: u16, tls: bool) -> Gateway {
    let identity = system.zookeeper.authority.identity(zone);
    let listener = if tls { "tls = true" } else { "" };
    let mut builder = Builder::new(system).zone(zone).tls(&identity).listeners(&[listener, ""]);
    builder.root = format!("public_port = {forward}");
    builder.limits = "connect_timeout = \"500ms\"\nconnections = 200".to_owned();
    builder.admin = true;
    builder.ready().await
}

/// The forward of zone west leads to the gateway of zone north, over TLS. The log comes from the executor,
/// and one warning has the address of the forward and the names of the gateway behind it.
#[tokio::test]
async fn forward_to_the_wrong_zone_is_reported() {
    let system = System::new().await;
    let north = forwarded(&system, "north", 1, true).await;
    let forward = Proxy::start(north.port()).await;
    let port = forward.address.port();
    system.put_gateway(Some("west"), Some(port), true, "running").await;
    let mut east = forwarded(&system, "east", 2, true).await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    for _ in 0..3 {
        assert_log_comes_from(&executor, east.addresses[1], &build).await;
    }
    assert_eq!(metric(&east, &misrouted("wrong_zone")).await, 3.0);
    let wanted = format!("zone=\"west\" gateway=\"localhost:{port}\" found=\"north localhost\"");
    east.logged("both ends", |line| line.contains(&wanted)).await;
    assert_eq!(warnings(&east).len(), 1);
    let nowhere = system.put_build(Some("west"), Some(&unreachable(Some("west")).await)).await;
    let answer = Client::ask(east.addresses[1], &nowhere).await.text().await;
    assert_eq!(answer, "Internal streaming error: the zone's gateways cannot be reached\r\n");
}

/// Loops of one, two and three gateways, plain and over TLS. A client receives a reply within seconds,
/// or the log if the executor can be reached, and other clients are served meanwhile. Warnings are few,
/// and there are none about plain gateways.
#[tokio::test]
async fn loops_end() {
    let mut all = JoinSet::new();
    for (length, tls) in [(1, false), (2, false), (3, false), (1, true), (3, true)] {
        all.spawn(a_loop_ends(length, tls));
    }
    while let Some(ended) = all.join_next().await {
        ended.expect("this loop");
    }
}

async fn a_loop_ends(length: usize, tls: bool) {
    let system = System::new().await;
    let mut gateways = Vec::new();
    for number in 0..length {
        gateways.push(forwarded(&system, &format!("zone{number}"), 1, tls).await);
    }
    // Each request goes to a random gateway, so there are loops of all lengths up to this.
    let forwards = gateways.iter().map(|gateway| Proxy::start(gateway.port()));
    let mut proxies = Vec::new();
    for forward in forwards {
        proxies.push(forward.await);
    }
    for proxy in &proxies {
        system.put_gateway(Some("west"), Some(proxy.address.port()), tls, "running").await;
    }
    let address = gateways[0].addresses[1];
    let build = system.put_build(Some("west"), Some(&unreachable(Some("west")).await)).await;
    // Until the gateway has read the entries.
    let went_round = |line: &String| line.contains("hop failed");
    within("the entries to be seen", async {
        while !gateways[0].log().iter().any(went_round) {
            let answer = Client::ask(address, &build).await.text().await;
            assert!(answer.starts_with("Internal streaming error: "), "{answer}");
        }
    })
    .await;
    let executor = Executor::start().await;
    let other = system.put_build(None, Some(&executor.worker(None))).await;
    assert_log_comes_from(&executor, address, &other).await;
    let mut counted = 0.0;
    let mut reported = 0;
    for gateway in &gateways {
        counted += metric(gateway, &misrouted("wrong_zone")).await;
        counted += metric(gateway, &misrouted("loop")).await;
        let warnings = warnings(gateway);
        assert!(warnings.len() <= length, "one per address: {warnings:?}");
        reported += warnings.len();
    }
    // Over plain connections a loop is indistinguishable from many clients.
    assert_eq!(counted > 0.0, tls, "{counted}");
    assert_eq!(reported > 0, tls, "{reported} warnings");
    let reachable = executor.worker(Some("west"));
    let build = system.put_build(Some("west"), Some(&reachable)).await;
    let mut client = Client::ask(address, &build).await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");
}
