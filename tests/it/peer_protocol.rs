//! The protocol between peer gateways over TLS, and what they do with plain gateways instead:
//! requested zone, number of hops, replies, and many clients that request one build.

use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::client::TlsStream;

use crate::support::admin::metric;
use crate::support::certificates::Identity;
use crate::support::client::{Client, connector};
use crate::support::executor::{Executor, acceptor_with_protocols, unreachable};
use crate::support::gateway::{Builder, Gateway};
use crate::support::program::resolve;
use crate::support::system::System;
use crate::support::within;

/// The ALPN name of the peer protocol.
const PROTOCOL: &str = "zuul-fingergw/1";

const WRONG_ZONE: &str = "Internal streaming error: this gateway serves another zone\r\n";
const LOOP: &str = "Internal streaming error: too many gateways have forwarded the request\r\n";
const NOT_FOUND: &str = "Build not found\r\n";

/// Connects to `gateway` as a peer gateway that presents the certificate `shown`.
async fn connect_as_peer(
    gateway: &Gateway,
    ca: &Identity,
    shown: Option<&Identity>,
) -> Client<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(gateway.address()).await.expect("the gateway");
    let name = ServerName::try_from("localhost").expect("a name");
    let connector = connector(ca, shown);
    let protocols = vec![PROTOCOL.as_bytes().to_vec()];
    let handshake = connector.with_alpn(protocols).connect(name, stream);
    let stream = within("a handshake", handshake).await.expect("a TLS session");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(PROTOCOL.as_bytes()));
    Client { stream }
}

/// Sends `request` as a peer gateway and returns the reply.
async fn ask_as_peer(
    gateway: &Gateway,
    ca: &Identity,
    shown: Option<&Identity>,
    request: &str,
) -> String {
    let mut client = connect_as_peer(gateway, ca, shown).await;
    client.send(request.as_bytes()).await;
    client.text().await
}

#[tokio::test]
async fn gateway_checks_zone_and_hops_of_a_request() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let listener = "tls = true\nclient_certificate = \"optional\"";
    let west = Builder::new(&system).zone("west (1)").tls(&identity).listeners(&[listener]);
    let west = west.ready().await;
    for (parameters, expected) in [
        ("", NOT_FOUND),
        (" zone=west%20%281%29 hops=1", NOT_FOUND),
        (" hops=2 later=added zone=west%20%281%29", NOT_FOUND),
        (" zone=north hops=1", WRONG_ZONE),
        (" zone=west hops=1", WRONG_ZONE),
        (" zone= hops=1", WRONG_ZONE),
        (" zone=west%20%281%29 hops=3", LOOP),
        (" zone=west%20%281%29 hops=256", NOT_FOUND),
        (" hops=3 hops=1", NOT_FOUND),
    ] {
        let request = format!("abcdef{parameters}\r\n");
        let reply = ask_as_peer(&west, &identity, Some(&identity), &request).await;
        assert_eq!(reply, expected, "{request}");
    }
    // A client without a certificate cannot find out the zone.
    for zone in ["west%20%281%29", "north"] {
        let request = format!("abcdef zone={zone} hops=1\r\n");
        assert_eq!(ask_as_peer(&west, &identity, None, &request).await, NOT_FOUND);
    }
    // Without the peer protocol, parameters make the line malformed.
    let mut client = Client::ask_tls(west.address(), &identity, "abcdef hops=3").await;
    assert_eq!(client.text().await, NOT_FOUND);
}

/// Creates a build of zone north, requested at the gateway of zone east, which has `identity`.
struct North {
    system: System,
    identity: Identity,
    north: Executor,
    build: String,
}

impl North {
    async fn start() -> Self {
        let system = System::new().await;
        let identity = system.zookeeper.authority.identity("gateway");
        let north = Executor::start().await;
        let port = Some(north.address.port());
        system.put_gateway(Some("north & co"), port, true, "running").await;
        let worker = unreachable(Some("north & co")).await;
        let build = system.put_build(Some("north & co"), Some(&worker)).await;
        Self { system, identity, north, build }
    }

    fn east(&self) -> Builder {
        Builder::new(&self.system).zone("east").tls(&self.identity)
    }

    /// Returns the request that the gateway of zone north receives if it selects `protocols`.
    async fn received(
        &self,
        client: &mut Client<impl crate::support::Duplex>,
        protocols: &[&str],
    ) -> String {
        let acceptor = acceptor_with_protocols(&self.identity, protocols);
        let mut stream = self.north.accept_tls(&acceptor).await;
        let request = stream.request.clone();
        stream.write(b"log\n").await;
        stream.finish().await;
        assert_eq!(client.text().await, "log\n");
        request
    }
}

#[tokio::test]
async fn peer_is_sent_the_wanted_zone_and_the_number_of_hops() {
    let site = North::start().await;
    let east = site.east().listeners(&["", "tls = true"]).ready().await;
    let build = &site.build;
    let mut client = Client::ask(east.addresses[0], build).await;
    let request = site.received(&mut client, &[]).await;
    assert_eq!(request, format!("{build}\n"), "without the peer protocol");
    let mut client = Client::ask(east.addresses[0], build).await;
    let request = site.received(&mut client, &[PROTOCOL]).await;
    assert_eq!(request, format!("{build} zone=north%20%26%20co hops=1\r\n"));

    let stream = TcpStream::connect(east.addresses[1]).await.expect("the gateway");
    let name = ServerName::try_from("localhost").expect("a name");
    let connector = connector(&site.identity, Some(&site.identity));
    let protocols = vec![PROTOCOL.as_bytes().to_vec()];
    let handshake = connector.with_alpn(protocols).connect(name, stream);
    let stream = within("a handshake", handshake).await.expect("a TLS session");
    let mut client = Client { stream };
    client.send(format!("{build} zone=east hops=1\r\n").as_bytes()).await;
    let request = site.received(&mut client, &[PROTOCOL]).await;
    assert_eq!(request, format!("{build} zone=north%20%26%20co hops=2\r\n"));
}

/// A peer replies that the request is in a loop: one warning names the peer, the metrics count each
/// request, and the peer backs off for a while.
#[tokio::test]
async fn peer_that_reports_a_loop_is_not_asked_for_a_while() {
    let site = North::start().await;
    let mut builder = site.east().control();
    builder.admin = true;
    let config = builder.write();
    let mut east = builder.ready().await;
    let mut client = Client::ask(east.address(), &site.build).await;
    let acceptor = acceptor_with_protocols(&site.identity, &[PROTOCOL]);
    let mut stream = site.north.accept_tls(&acceptor).await;
    stream.write(LOOP.as_bytes()).await;
    stream.finish().await;
    let answer = client.text().await;
    assert_eq!(answer, "Internal streaming error: the zone's gateways cannot be reached\r\n");
    let port = site.north.address.port();
    let wanted =
        format!("zone=\"north & co\" gateway=\"localhost:{port}\" found=\"gateway localhost\"");
    east.logged("the warning", |line| line.contains("in a loop") && line.contains(&wanted)).await;
    let kind = "zuul_fingergw_misrouted_requests_total{kind=\"loop\"}";
    assert_eq!(metric(&east, kind).await, 1.0);
    let now = resolve(&config, &site.build).await;
    assert_eq!(now["hops"][1]["state"], "loop", "{now}");
}

/// A refusal that arrives in two parts is recognized: the next hop is tried.
#[tokio::test]
async fn refusal_in_two_parts_fails_over_to_the_next_hop() {
    let (refusing, executor) = (Executor::start().await, Executor::start().await);
    let system = System::new().await;
    let port = Some(refusing.address.port());
    system.put_gateway(Some("west"), port, false, "running").await;
    let gateway = Builder::new(&system).zone("east").log("level = \"debug\"");
    let mut gateway = gateway.ready().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut stream = refusing.accept().await;
    stream.write(b"Inter").await;
    gateway.logged("the first part", |line| line.contains("first bytes")).await;
    stream.write(b"nal streaming error: something that a later version says\r\n").await;
    stream.finish().await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");
}

/// How the gateway of a zone is connected.
#[derive(Clone, Copy, Debug)]
enum Wire {
    Plain,
    /// As Zuul's own gateway.
    Tls,
    Peer,
}

/// Two hundred clients request one build of another zone whose first byte takes longer than every
/// hedge delay of the gateway: all get the whole log, and nothing is logged about the zone's
/// gateway.
#[tokio::test]
async fn many_viewers_of_one_slow_build_get_their_logs() {
    let mut all = JoinSet::new();
    for wire in [Wire::Plain, Wire::Tls, Wire::Peer] {
        all.spawn(many_viewers(wire));
    }
    while let Some(viewers) = all.join_next().await {
        viewers.expect("these viewers");
    }
}

async fn many_viewers(wire: Wire) {
    const VIEWERS: usize = 200;
    const FIRST_BYTE: Duration = Duration::from_millis(2500);
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let west = Executor::start().await;
    let tls = !matches!(wire, Wire::Plain);
    system.put_gateway(Some("west"), Some(west.address.port()), tls, "running").await;
    let mut builder = Builder::new(&system).zone("east").tls(&identity);
    builder.admin = true;
    let east = builder.ready().await;
    let at_start = warnings(&east);
    let build = system.put_build(Some("west"), Some(&unreachable(Some("west")).await)).await;
    let log = "line\n".repeat(2000);

    let protocols: &[&str] = if matches!(wire, Wire::Peer) { &[PROTOCOL] } else { &[] };
    let acceptor = acceptor_with_protocols(&identity, protocols);
    let served = log.clone();
    let serving = tokio::spawn(async move {
        let mut streams = JoinSet::new();
        for _ in 0..VIEWERS {
            let (stream, _) = west.listener.accept().await.expect("a connection");
            let (acceptor, log) = (acceptor.clone(), served.clone());
            streams.spawn(async move {
                if tls {
                    let stream = acceptor.accept(stream).await.expect("a TLS session");
                    crate::support::executor::answer_after(stream, FIRST_BYTE, log.as_bytes())
                        .await;
                } else {
                    crate::support::executor::answer_after(stream, FIRST_BYTE, log.as_bytes())
                        .await;
                }
            });
        }
        streams.join_all().await;
    });
    let mut clients = JoinSet::new();
    for _ in 0..VIEWERS {
        let (address, build) = (east.address(), build.clone());
        clients.spawn(async move { Client::ask(address, &build).await.text().await });
    }
    for received in clients.join_all().await {
        assert!(received == log, "{wire:?}: {} bytes: {received:.100}", received.len());
    }
    within("the server to end", serving).await.expect("the server");
    let unhealthy = "zuul_fingergw_zone_gateways_unhealthy{zone=\"west\"}";
    assert_eq!(metric(&east, unhealthy).await, 0.0, "{wire:?}");
    assert_eq!(warnings(&east), at_start, "{wire:?}");
}

fn warnings(gateway: &Gateway) -> Vec<String> {
    gateway.log().into_iter().filter(|line| line.contains(" WARN ")).collect()
}
