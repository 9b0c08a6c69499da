//! Port forwards that lead to the wrong place: what a client sees, what is said of it and how often,
//! and that it heals when the forward is mended. Forwards are proxies before the real gateways.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use crate::support::admin::metric;
use crate::support::client::Client;
use crate::support::executor::{Executor, unreachable};
use crate::support::gateway::{Builder, Gateway};
use crate::support::proxy::Proxy;
use crate::support::system::{System, Worker};
use crate::support::within;
use crate::support::zones::comes_from;

fn faults(kind: &str) -> String {
    format!("zuul_fingergw_wiring_faults_total{{kind=\"{kind}\"}}")
}

fn warnings(gateway: &Gateway) -> Vec<String> {
    let all = gateway.log();
    all.into_iter()
        .filter(|line| line.contains(" WARN ") && line.contains("port forwards"))
        .collect()
}

/// What stands at a gateway's address and is none.
#[derive(Clone, Copy, Debug)]
enum Stranger {
    Http,
    Ssh,
    Mail,
    Echo,
    Tls,
}

/// Talks to one connection as the stranger does.
async fn talk(stranger: Stranger, mut stream: tokio::net::TcpStream) {
    let mut request = [0; 1024];
    let _ = match stranger {
        Stranger::Ssh => stream.write_all(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n").await,
        Stranger::Mail => stream.write_all(b"220 mx.example.org ESMTP\r\n").await,
        Stranger::Http => {
            let _ = stream.read(&mut request).await;
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n").await
        }
        Stranger::Echo => match stream.read(&mut request).await {
            Ok(count) => stream.write_all(&request[..count]).await,
            Err(error) => Err(error),
        },
        // An alert: unexpected_message.
        Stranger::Tls => {
            let _ = stream.read(&mut request).await;
            stream.write_all(&[21, 3, 3, 0, 2, 2, 10]).await
        }
    };
    // The other side closes when it has seen enough.
    while matches!(stream.read(&mut request).await, Ok(1..)) {}
}

/// Servers of other kinds: none is shown to a client as a log, each is named once with both ends,
/// and counted for each request. The gateway behind the mended forward is used again.
#[tokio::test]
async fn what_is_no_gateway_is_not_shown_as_a_log() {
    for (stranger, found) in [
        (Stranger::Http, "found=\"an HTTP server\""),
        (Stranger::Ssh, "found=\"an SSH server\""),
        (Stranger::Mail, "found=\"a mail or FTP server\""),
        (Stranger::Echo, "found=\"it sends back what it is sent\""),
        (Stranger::Tls, "found=\"a TLS server, and the registry says plain\""),
    ] {
        let system = System::new().await;
        let (wrong, executor) = (Executor::start().await, Executor::start().await);
        let port = wrong.address.port();
        system.put_gateway(Some("west"), Some(port), false, "running").await;
        let mut builder = Builder::new(&system).zone("east");
        builder.admin = true;
        let mut gateway = builder.ready().await;
        let worker = executor.worker(Some("west"));
        let build = system.put_build(Some("west"), Some(&worker)).await;
        for _ in 0..3 {
            let mut client = Client::ask(gateway.address(), &build).await;
            let connection = within("a connection", wrong.listener.accept()).await;
            let (stream, _) = connection.expect("a connection");
            let talking = tokio::spawn(talk(stranger, stream));
            executor.serve(b"log\n").await;
            assert_eq!(client.text().await, "log\n", "{stranger:?}");
            talking.await.expect("the stranger");
        }
        assert_eq!(metric(&gateway, &faults("foreign")).await, 3.0, "{stranger:?}");
        gateway.logged("who it is", |line| line.contains(found)).await;
        let warnings = warnings(&gateway);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains(&format!("zone=\"west\" gateway=\"localhost:{port}\"")));
        // Mended: now a gateway is there.
        comes_from(&wrong, gateway.address(), &build).await;
    }
}

/// A forward to something that takes everything and never says a word, and one to something that
/// closes: the log comes from the executor each time, and one warning names the address once that has
/// happened a few times. The gateway behind the mended forward is used again.
#[tokio::test]
async fn what_never_says_anything_is_named_once() {
    for closes in [false, true] {
        let system = System::new().await;
        let (wrong, executor) = (Executor::start().await, Executor::start().await);
        let port = wrong.address.port();
        system.put_gateway(Some("west"), Some(port), false, "running").await;
        let limits = "connect_timeout = \"500ms\"";
        let mut builder = Builder::new(&system).zone("east").limits(limits);
        builder.admin = true;
        let mut gateway = builder.ready().await;
        let worker = executor.worker(Some("west"));
        let build = system.put_build(Some("west"), Some(&worker)).await;
        let (address, build) = (gateway.address(), &build);
        let served = async || {
            let mut client = Client::ask(address, build).await;
            let mute = wrong.accept().await;
            let mute = (!closes).then_some(mute);
            executor.serve(b"log\n").await;
            assert_eq!(client.text().await, "log\n");
            drop(mute);
        };
        served().await;
        assert!(warnings(&gateway).is_empty(), "it may have been busy");
        let met = async || metric(&gateway, &faults("silent")).await;
        within("it to be found", async {
            while met().await < 3.0 {
                served().await;
            }
        })
        .await;
        gateway.logged("the warning", |line| line.contains("says nothing")).await;
        let warnings = warnings(&gateway);
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].contains(&format!("zone=\"west\" gateway=\"localhost:{port}\"")));
        comes_from(&wrong, address, build).await;
    }
}

/// Entries that name this gateway as an executor: by an address that it listens on, by another
/// address of this host, by its registered name, and by a forward that leads to it. One request stays
/// one, or becomes few, and ends with a line.
#[tokio::test]
async fn an_executor_that_is_this_gateway() {
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
        // Three in a second, and the three that wait when the first of them gives up.
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
    assert_eq!(metric(&gateway, &faults("circle")).await, 3.0);
}

/// An executor that has the address of another gateway: that one refuses to ask itself.
#[tokio::test]
async fn an_executor_that_is_another_gateway() {
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

/// The forward of zone west leads to the gateway of zone north, over TLS: it says so before it is asked,
/// the executor helps out, and one warning names the forward's address and who was found there.
#[tokio::test]
async fn a_forward_to_the_wrong_zone() {
    let system = System::new().await;
    let north = forwarded(&system, "north", 1, true).await;
    let forward = Proxy::start(north.port()).await;
    let port = forward.address.port();
    system.put_gateway(Some("west"), Some(port), true, "running").await;
    let mut east = forwarded(&system, "east", 2, true).await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    for _ in 0..3 {
        comes_from(&executor, east.addresses[1], &build).await;
    }
    assert_eq!(metric(&east, &faults("zone")).await, 3.0);
    let wanted = format!("zone=\"west\" gateway=\"localhost:{port}\" found=\"north localhost\"");
    east.logged("both ends", |line| line.contains(&wanted)).await;
    assert_eq!(warnings(&east).len(), 1);
    let nowhere = system.put_build(Some("west"), Some(&unreachable(Some("west")).await)).await;
    let answer = Client::ask(east.addresses[1], &nowhere).await.text().await;
    assert_eq!(answer, "Internal streaming error: the zone's gateways cannot be reached\r\n");
}

/// Forwards in a circle of one, two and three gateways, plain and with TLS: one line within seconds,
/// while others are served, with few warnings; and a log, where the executor can be reached.
#[tokio::test]
async fn circles() {
    let mut all = JoinSet::new();
    for (length, tls) in [(1, false), (2, false), (3, false), (1, true), (3, true)] {
        all.spawn(circle(length, tls));
    }
    while let Some(circle) = all.join_next().await {
        circle.expect("this circle");
    }
}

async fn circle(length: usize, tls: bool) {
    let system = System::new().await;
    let mut gateways = Vec::new();
    for number in 0..length {
        gateways.push(forwarded(&system, &format!("zone{number}"), 1, tls).await);
    }
    // Each request goes to any of them: circles of all lengths up to this.
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
    // Until it has seen the entries.
    let went_round = |line: &String| line.contains("trying the next hop");
    within("the entries to be seen", async {
        while !gateways[0].log().iter().any(went_round) {
            let answer = Client::ask(address, &build).await.text().await;
            assert!(answer.starts_with("Internal streaming error: "), "{answer}");
        }
    })
    .await;
    let executor = Executor::start().await;
    let other = system.put_build(None, Some(&executor.worker(None))).await;
    comes_from(&executor, address, &other).await;
    let kind = faults(if tls { "zone" } else { "circle" });
    let mut counted = 0.0;
    for gateway in &gateways {
        counted += metric(gateway, &kind).await;
        let warnings = warnings(gateway);
        assert!(warnings.len() <= length, "one for each address: {warnings:?}");
    }
    assert!(counted > 0.0);
    let reachable = executor.worker(Some("west"));
    let build = system.put_build(Some("west"), Some(&reachable)).await;
    let mut client = Client::ask(address, &build).await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");
}
