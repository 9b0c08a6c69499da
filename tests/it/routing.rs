//! The route of a stream. Entries of other gateways are written before the gateway starts: it is
//! ready only after it has read them.

use rustix::process::Signal;

use crate::support::admin::metric;
use crate::support::certificates::Identity;
use crate::support::client::Client;
use crate::support::executor::{Executor, acceptor, refusing_port, unreachable};
use crate::support::gateway::{Builder, Gateway};
use crate::support::program::resolve;
use crate::support::system::System;
use crate::support::within;
use crate::support::zones::{TwoZones, assert_log_comes_from, east_of};

#[tokio::test]
async fn builds_of_own_zone_and_without_zone_are_direct() {
    let system = System::new().await;
    let trap = Executor::start().await;
    let port = Some(trap.address.port());
    system.put_gateway(Some("west"), port, false, "running").await;
    system.put_gateway(None, port, false, "running").await;
    let zoned = Builder::new(&system).zone("west").ready().await;
    let unzoned = Builder::new(&system).ready().await;
    let executor = Executor::start().await;
    for (gateway, queue, worker) in [
        (&zoned, Some("west"), Some("west")),
        (&zoned, None, Some("west")),
        (&zoned, None, None),
        (&zoned, Some("east"), None),
        (&unzoned, None, None),
        (&unzoned, Some("east"), None),
    ] {
        let build = system.put_build(queue, Some(&executor.worker(worker))).await;
        assert_log_comes_from(&executor, gateway.address(), &build).await;
    }
}

/// An executor of a zone may run builds without a zone: its own zone decides, not the queue.
#[tokio::test]
async fn zone_of_the_executor_decides() {
    let system = System::new().await;
    let other = Executor::start().await;
    system.put_gateway(Some("west"), Some(other.address.port()), false, "running").await;
    let east = Builder::new(&system).zone("east").ready().await;
    let unzoned = Builder::new(&system).ready().await;
    let worker = unreachable(Some("west")).await;
    for queue in [None, Some("west"), Some("east")] {
        for gateway in [&east, &unzoned] {
            let build = system.put_build(queue, Some(&worker)).await;
            assert_log_comes_from(&other, gateway.address(), &build).await;
        }
    }
}

/// Two real gateways, plain and with mutual TLS between them.
#[tokio::test]
async fn log_is_relayed_through_two_zones() {
    for tls in [false, true] {
        let TwoZones { mut west, mut east, executor, build, .. } = TwoZones::start(tls).await;
        assert_log_comes_from(&executor, east.address(), &build).await;
        let speech = if tls { "TLS" } else { "plain" };
        let hop = format!("hop=\"gateway localhost:{} of zone west ({speech})\"", west.port());
        east.logged("the route to zone west", |line| line.contains(&hop)).await;
        let hop = format!("hop=\"executor 127.0.0.1:{}\"", executor.address.port());
        west.logged("the route to the executor", |line| line.contains(&hop)).await;
    }
}

#[tokio::test]
async fn one_dead_gateway_of_two_costs_no_stream() {
    let alive = Executor::start().await;
    let (system, gateway) = east_of(&[alive.address.port(), refusing_port().await], "").await;
    let worker = unreachable(Some("west")).await;
    let build = system.put_build(Some("west"), Some(&worker)).await;
    for _ in 0..40 {
        assert_log_comes_from(&alive, gateway.address(), &build).await;
    }
    let failed = gateway.log().iter().filter(|line| line.contains("hop failed")).count();
    assert!(failed > 0, "the dead gateway was never tried, so this test has not tested failover");
}

/// What a broken gateway does with an accepted connection.
#[derive(Clone, Copy, Debug)]
enum Bad {
    Closes,
    Resets,
    Hangs,
}

#[tokio::test]
async fn silent_gateway_fails_over() {
    for bad in [Bad::Closes, Bad::Resets, Bad::Hangs] {
        let (alive, broken) = (Executor::start().await, Executor::start().await);
        let ports = [alive.address.port(), broken.address.port()];
        let (system, gateway) = east_of(&ports, "connect_timeout = \"1s\"").await;
        let (tell, mut output) = tokio::sync::mpsc::unbounded_channel();
        let trouble = tokio::spawn(async move {
            let mut held = Vec::new();
            loop {
                let stream = broken.accept().await;
                let _ = tell.send(());
                match bad {
                    Bad::Closes => drop(stream),
                    Bad::Resets => stream.reset(),
                    Bad::Hangs => held.push(stream),
                }
            }
        });
        let build = system.put_build(Some("west"), Some(&unreachable(Some("west")).await)).await;
        // The order is random: continue until the broken gateway has been tried.
        within("the disconnected gateway to be tried", async {
            while output.try_recv().is_err() {
                assert_log_comes_from(&alive, gateway.address(), &build).await;
            }
        })
        .await;
        trouble.abort();
    }
}

/// A gateway that accepts the connection and never completes the TLS handshake.
#[tokio::test]
async fn hanging_tls_handshake_fails_over() {
    let system = System::new().await;
    let (alive, silent) = (Executor::start().await, Executor::start().await);
    system.put_gateway(Some("west"), Some(alive.address.port()), true, "running").await;
    system.put_gateway(Some("west"), Some(silent.address.port()), true, "running").await;
    let identity = system.zookeeper.authority.identity("gateway");
    let limits = "connect_timeout = \"2s\"";
    let builder = Builder::new(&system).zone("east").tls(&identity).limits(limits);
    let gateway = builder.ready().await;
    let build = system.put_build(Some("west"), Some(&unreachable(Some("west")).await)).await;
    let acceptor = acceptor(&identity);
    let late = format!("localhost:{} of zone west (TLS)", silent.address.port());
    let late = |line: &String| {
        line.contains("hop failed") && line.contains(&late) && line.contains("no data within")
    };
    // The order is random: continue until the silent gateway has been tried.
    within("the disconnected gateway to be tried", async {
        while !gateway.log().iter().any(late) {
            let mut client = Client::ask(gateway.address(), &build).await;
            let mut stream = alive.accept_tls(&acceptor).await;
            stream.write(b"log\n").await;
            stream.finish().await;
            assert_eq!(client.text().await, "log\n");
        }
    })
    .await;
}

/// Requests `build` until its log comes from `hop` instead of from `other`: there is no
/// notification that the gateway has read a change of the registry.
async fn until_served_by(hop: &Executor, other: &Executor, gateway: &Gateway, build: &str) {
    within("another route", async {
        loop {
            let mut client = Client::ask(gateway.address(), build).await;
            let (mut stream, wanted) = tokio::select! {
                stream = hop.accept() => (stream, true),
                stream = other.accept() => (stream, false),
            };
            stream.write(b"log\n").await;
            stream.finish().await;
            assert_eq!(client.text().await, "log\n");
            if wanted {
                return;
            }
        }
    })
    .await;
}

/// Routes follow the changes of a peer gateway's entry, and of its zone's name.
#[tokio::test]
async fn routes_follow_the_registry() {
    let system = System::new().await;
    let gateway = Builder::new(&system).zone("east").ready().await;
    let (executor, other) = (Executor::start().await, Executor::start().await);
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    assert_log_comes_from(&executor, gateway.address(), &build).await;

    for _ in 0..2 {
        let port = Some(other.address.port());
        let path = system.put_gateway(Some("west"), port, false, "initializing").await;
        for (state, zone, chosen) in [
            ("running", "west", true),
            ("stopped", "west", false),
            ("running", "west", true),
            ("running", "north", false),
            ("running", "west", true),
        ] {
            system.change_gateway(&path, zone, state).await;
            let (to, from) = if chosen { (&other, &executor) } else { (&executor, &other) };
            until_served_by(to, from, &gateway, &build).await;
            assert_log_comes_from(to, gateway.address(), &build).await;
        }
        system.remove(&path).await;
        until_served_by(&executor, &other, &gateway, &build).await;
        assert_log_comes_from(&executor, gateway.address(), &build).await;
    }
    assert!(!gateway.log().iter().any(|line| line.contains("hop failed")));
}

#[tokio::test]
async fn executor_of_a_zone_without_gateways_is_asked_directly() {
    let (system, gateway) = east_of(&[], "").await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    assert_log_comes_from(&executor, gateway.address(), &build).await;
}

/// Each hop is tried immediately after a failure, without its hedge delay.
#[tokio::test]
async fn executor_is_asked_when_all_gateways_of_its_zone_fail() {
    let dead = [refusing_port().await, refusing_port().await];
    let (system, gateway) = east_of(&dead, "connect_timeout = \"1h\"").await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    assert_log_comes_from(&executor, gateway.address(), &build).await;
}

#[tokio::test]
async fn unreachable_zone_gets_a_reply() {
    let (system, gateway) = east_of(&[refusing_port().await], "").await;
    let build = system.put_build(Some("west"), Some(&unreachable(Some("west")).await)).await;
    let answer = Client::ask(gateway.address(), &build).await.text().await;
    assert_eq!(answer, "Internal streaming error: the zone's gateways cannot be reached\r\n");
}

#[tokio::test]
async fn gateways_that_do_not_run_or_have_no_port_are_no_hops() {
    let system = System::new().await;
    let (good, trap) = (Executor::start().await, Executor::start().await);
    let trapped = Some(trap.address.port());
    for state in ["stopped", "initializing", "paused", "new"] {
        system.put_gateway(Some("west"), trapped, false, state).await;
    }
    system.put_gateway(Some("west"), None, false, "running").await;
    system.put_gateway(Some("north"), trapped, false, "running").await;
    system.put_gateway(Some("west"), Some(good.address.port()), false, "running").await;
    let gateway = Builder::new(&system).zone("east").ready().await;
    let build = system.put_build(Some("west"), Some(&unreachable(Some("west")).await)).await;
    for _ in 0..20 {
        assert_log_comes_from(&good, gateway.address(), &build).await;
    }
    let tried = gateway.log().iter().any(|line| line.contains("hop failed"));
    assert!(!tried, "a gateway without a port or of another zone was tried");
}

/// A gateway that stops is removed from the routes immediately.
#[tokio::test]
async fn stopped_gateway_is_not_a_hop() {
    let system = System::new().await;
    let mut west = Builder::new(&system).zone("west").ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    west.signal(Signal::TERM);
    assert!(west.exit().await.success());
    let east = Builder::new(&system).zone("east").ready().await;
    assert_log_comes_from(&executor, east.address(), &build).await;
    assert!(!east.log().iter().any(|line| line.contains("hop failed")));
}

/// A port forward that leads back to this gateway without TLS: its request arrives again and again.
/// The loop ends by itself, other clients are served meanwhile, and nothing is logged about the
/// registered gateway.
#[tokio::test]
async fn loop_of_plain_gateways_ends() {
    let system = System::new().await;
    let proxy = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = proxy.local_addr().expect("its address").port();
    system.put_gateway(Some("west"), Some(port), false, "running").await;
    let limits = "connections = 40\nconnect_timeout = \"500ms\"";
    let mut builder = Builder::new(&system).zone("east").limits(limits).control();
    builder.admin = true;
    let config = builder.write();
    let gateway = builder.ready().await;
    let address = gateway.address();
    tokio::spawn(async move {
        loop {
            let (mut inside, _) = proxy.accept().await.expect("a connection");
            tokio::spawn(async move {
                let mut outside =
                    tokio::net::TcpStream::connect(address).await.expect("the gateway");
                let _ = tokio::io::copy_bidirectional(&mut inside, &mut outside).await;
            });
        }
    });
    let build = system.put_build(Some("west"), Some(&unreachable(Some("west")).await)).await;
    let mut client = Client::ask(address, &build).await;
    let accepted = "zuul_fingergw_connections_accepted_total{listener=\"plain\"}";
    within("all requests of the loop", async { while metric(&gateway, accepted).await < 9.0 {} })
        .await;
    let executor = Executor::start().await;
    let other = system.put_build(None, Some(&executor.worker(None))).await;
    assert_log_comes_from(&executor, address, &other).await;
    let answer = client.text().await;
    assert_eq!(answer, "Internal streaming error: too many requests for this build\r\n");
    let about_gateway = |line: &String| line.contains(" WARN ") && line.contains("zone=\"west\"");
    assert!(!gateway.log().iter().any(about_gateway));
    let now = resolve(&config, &build).await;
    assert_eq!(now["hops"][0]["state"], "untried", "{now}");
}

/// An entry of another zone with our own address would lead back to us repeatedly.
#[tokio::test]
async fn own_entry_is_no_hop() {
    let system = System::new().await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    let mut builder = Builder::new(&system).zone("east");
    builder.root = "public_port = 7979".to_owned();
    system.put_gateway(Some("west"), Some(7979), false, "running").await;
    let gateway = builder.ready().await;
    assert_log_comes_from(&executor, gateway.address(), &build).await;
    assert!(!gateway.log().iter().any(|line| line.contains(":7979 of zone west")));
}

#[tokio::test]
async fn build_in_a_new_zone_is_found() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    let executor = Executor::start().await;
    for zone in ["first", "second"] {
        let build = system.put_build(Some(zone), Some(&executor.worker(None))).await;
        assert_log_comes_from(&executor, gateway.address(), &build).await;
    }
    assert_eq!(Client::ask(gateway.address(), "abc").await.text().await, "Build not found\r\n");
}

#[tokio::test]
async fn build_is_found_among_two_hundred_zones() {
    let system = System::new().await;
    let executor = Executor::start().await;
    for number in 0..199 {
        system.put(&format!("/zuul/executor/zones/zone{number}/requests"), b"").await;
    }
    let gateway = Builder::new(&system).ready().await;
    for zone in [Some("zone0"), Some("zone198"), Some("zone-new"), None] {
        let build = system.put_build(zone, Some(&executor.worker(None))).await;
        assert_log_comes_from(&executor, gateway.address(), &build).await;
    }
}

/// A zone may have any name that is valid for a znode.
#[tokio::test]
async fn zone_names_may_be_any_text() {
    let system = System::new().await;
    let executor = Executor::start().await;
    let gateway = Builder::new(&system).zone("Zone 1, \u{fc}ber").ready().await;
    let zone = Some("Zone 1, \u{fc}ber");
    let build = system.put_build(zone, Some(&executor.worker(zone))).await;
    assert_log_comes_from(&executor, gateway.address(), &build).await;
}

/// A peer gateway with TLS, for which this one has no certificate: the next hop is used.
#[tokio::test]
async fn tls_gateway_without_own_certificate_fails_over() {
    let system = System::new().await;
    let trap = Executor::start().await;
    system.put_gateway(Some("west"), Some(trap.address.port()), true, "running").await;
    let mut gateway = Builder::new(&system).zone("east").ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    assert_log_comes_from(&executor, gateway.address(), &build).await;
    gateway.logged("the advice", |line| line.contains("set tls.cert")).await;
}

/// Whether a gateway is accepted whose certificate does not contain its registered name.
async fn wrong_name(verify_hostnames: bool) -> String {
    let system = System::new().await;
    let authority = &system.zookeeper.authority;
    let untrusted: Identity = authority.identity_only_for("elsewhere.example.org");
    let other = Executor::start().await;
    system.put_gateway(Some("west"), Some(other.address.port()), true, "running").await;
    let mut builder = Builder::new(&system).zone("east").tls(&authority.identity("gateway"));
    builder.verify_hostnames = verify_hostnames;
    let gateway = builder.ready().await;
    let build = system.put_build(Some("west"), Some(&unreachable(Some("west")).await)).await;
    let acceptor = acceptor(&untrusted);
    let serving = tokio::spawn(async move {
        let (stream, _) = other.listener.accept().await.expect("a connection");
        // The gateway aborts the handshake if it verifies the name.
        if let Ok(mut stream) = acceptor.accept(stream).await {
            use tokio::io::AsyncWriteExt as _;
            let _ = stream.write_all(b"log\n").await;
            let _ = stream.shutdown().await;
        }
    });
    let text = Client::ask(gateway.address(), &build).await.text().await;
    serving.await.expect("the other gateway");
    text
}

#[tokio::test]
async fn gateway_certificate_must_have_its_name() {
    let refused = "Internal streaming error: the zone's gateways cannot be reached\r\n";
    assert_eq!(wrong_name(true).await, refused);
    assert_eq!(wrong_name(false).await, "log\n");
}
