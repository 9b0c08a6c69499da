//! Limits per client address: connections and a share of the TLS handshakes; and total limits of
//! handshakes and lookups.

use std::net::SocketAddr;

use crate::support::admin::rejected;
use crate::support::admin::{ended, metric};
use crate::support::certificates::Identity;
use crate::support::client::{Client, client_hello};
use crate::support::executor::Executor;
use crate::support::gateway::{Builder, Gateway};
use crate::support::limits::{TOO_MANY, ask_while_it_hangs, begin_handshakes};
use crate::support::proxy_header::v2;
use crate::support::system::System;
use crate::support::within;
use crate::support::zookeeper::ZooKeeper;

async fn warnings(gateway: &Gateway, key: &str) -> usize {
    gateway.count_logged(key, |line| line.contains("WARN") && line.contains(key)).await
}

/// A build with an executor that serves its log.
struct Build {
    executor: Executor,
    id: String,
}

impl Build {
    async fn of(system: &System) -> Self {
        let executor = Executor::start().await;
        let id = system.put_build(None, Some(&executor.worker(None))).await;
        Self { executor, id }
    }

    /// Checks that a client from `local` is served.
    async fn reaches(&self, local: &str, gateway: SocketAddr) {
        let mut client = Client::ask_from(local, gateway, &self.id).await;
        self.executor.serve(b"log\n").await;
        assert_eq!(client.text().await, "log\n", "{local}");
    }

    /// Checks that a client from `local` is rejected.
    async fn is_refused_to(&self, local: &str, gateway: SocketAddr) {
        let mut client = Client::ask_from(local, gateway, &self.id).await;
        assert_eq!(client.text().await, TOO_MANY, "{local}");
    }

    /// Retries until a permit is free, of which there is no notification.
    async fn reaches_at_last(&self, local: &str, gateway: SocketAddr) {
        let asking = within("a free permit", async {
            while Client::ask_from(local, gateway, &self.id).await.text().await != "log\n" {}
        });
        tokio::join!(self.executor.serve(b"log\n"), asking);
    }
}

/// IPv4 clients are counted together, whichever listener they use.
#[tokio::test]
async fn connections_of_one_address_are_limited() {
    let system = System::new().await;
    let mut builder = Builder::new(&system).limits("connections_per_address = 2");
    builder.admin = true;
    let gateway = builder.listeners(&["", "address = \"[::]:0\""]).ready().await;
    let (ipv4, port) = (gateway.addresses[0], gateway.addresses[1].port());
    let mapped = SocketAddr::from(([127, 0, 0, 1], port));
    let build = Build::of(&system).await;
    let mut held = Vec::new();
    for address in [ipv4, mapped] {
        let mut client = Client::ask_from("127.0.0.2", address, &build.id).await;
        let stream = build.executor.begin(&mut client).await;
        held.push((client, stream));
    }
    for address in [ipv4, mapped, ipv4, mapped] {
        build.is_refused_to("127.0.0.2", address).await;
        build.reaches("127.0.0.1", address).await;
        build.reaches("127.0.0.3", address).await;
    }
    build.reaches("::1", SocketAddr::new("::1".parse().expect("an address"), port)).await;
    assert_eq!(rejected(&gateway, "address").await, 4.0);
    assert_eq!(rejected(&gateway, "limit").await, 0.0);
    assert_eq!(warnings(&gateway, "limits.connections_per_address").await, 1);
    assert_eq!(warnings(&gateway, "peer=127.0.0.2:").await, 1, "with the address");

    let (mut client, mut stream) = held.pop().expect("the second");
    stream.write(b"still here\n").await;
    client.expect(b"still here\n").await;
    stream.finish().await;
    assert_eq!(client.text().await, "");
    drop(client);
    build.reaches_at_last("127.0.0.2", ipv4).await;
}

/// Clients behind a proxy, from many addresses of their networks: an IPv6 network of the configured
/// size counts as one client, and so does its neighbour. The proxy is not counted.
#[tokio::test]
async fn ipv6_network_counts_as_one_client() {
    for (prefix, near, far) in [
        ("", "2001:db8::ffff:0:0:7", "2001:db8:0:1::1"),
        ("ipv6_prefix = 48", "2001:db8:0:ffff::7", "2001:db8:1::1"),
        ("ipv6_prefix = 128", "2001:db8::1", "2001:db8::2"),
    ] {
        let system = System::new().await;
        let limits = format!("connections_per_address = 2\n{prefix}");
        let mut builder = Builder::new(&system).limits(&limits);
        builder.admin = true;
        let gateway = builder.listeners(&["proxy_protocol = [\"127.0.0.1\"]"]).ready().await;
        let build = Build::of(&system).await;
        let ask = async |client: &str| {
            let header = v2(client.parse().expect("an address"), b"");
            let mut client = Client::connect(gateway.address()).await;
            client.send(&[&header, build.id.as_bytes(), b"\n"].concat()).await;
            client
        };
        // Connections from the proxy whose header has not arrived yet.
        let mut unnamed = Vec::new();
        for _ in 0..3 {
            unnamed.push(Client::connect(gateway.address()).await);
        }
        let mut held = Vec::new();
        for client in ["2001:db8::1", near, far, far] {
            let mut client = ask(client).await;
            let stream = build.executor.begin(&mut client).await;
            held.push((client, stream));
        }
        for client in ["2001:db8::1", near, far] {
            assert_eq!(ask(client).await.text().await, TOO_MANY, "{client}, {prefix}");
        }
        assert_eq!(rejected(&gateway, "address").await, 3.0);
        assert_eq!(warnings(&gateway, "peer=[2001:db8::1]:").await, 1, "with the address");
        // Any address of a network may use a permit that another one has released.
        let (mut client, stream) = held.swap_remove(0);
        stream.finish().await;
        assert_eq!(client.text().await, "");
        drop(client);
        let asking =
            within("a free permit", async { while ask(near).await.text().await != "log\n" {} });
        tokio::join!(build.executor.serve(b"log\n"), asking);
    }
}

#[tokio::test]
async fn exempt_networks_have_no_limit() {
    let system = System::new().await;
    let limits = "connections_per_address = 1\nexempt_networks = [\"127.0.0.4/30\", \"::1\"]";
    let gateway = Builder::new(&system).limits(limits).listeners(&["address = \"[::]:0\""]);
    let gateway = gateway.ready().await;
    let build = Build::of(&system).await;
    let ipv4 = SocketAddr::from(([127, 0, 0, 1], gateway.port()));
    let ipv6 = SocketAddr::new("::1".parse().expect("an address"), gateway.port());
    let mut held = Vec::new();
    for (local, address) in [("127.0.0.4", ipv4), ("127.0.0.7", ipv4), ("::1", ipv6)] {
        for _ in 0..3 {
            let mut client = Client::ask_from(local, address, &build.id).await;
            let stream = build.executor.begin(&mut client).await;
            held.push((client, stream));
        }
    }
    let mut client = Client::ask_from("127.0.0.8", ipv4, &build.id).await;
    let _stream = build.executor.begin(&mut client).await;
    build.is_refused_to("127.0.0.8", ipv4).await;
}

/// A gateway with a TLS listener, and its identity.
async fn with_tls(system: &System, limits: &str) -> (Gateway, Identity) {
    let identity = system.zookeeper.authority.identity("gateway");
    let mut builder = Builder::new(system).tls(&identity).limits(limits);
    builder.admin = true;
    let listener = "tls = true\nclient_certificate = \"optional\"";
    (builder.listeners(&[listener]).ready().await, identity)
}

/// Peer gateways and zuul-web carry many clients from one address.
#[tokio::test]
async fn client_with_a_certificate_does_not_count() {
    let system = System::new().await;
    let (gateway, identity) = with_tls(&system, "connections_per_address = 1").await;
    let build = Build::of(&system).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        let mut client = Client::ask_tls(gateway.address(), &identity, &build.id).await;
        let stream = build.executor.begin(&mut client).await;
        held.push((client, stream));
    }
    // Without a certificate the connection counts until it ends.
    let anonymous = Client::try_connect_tls(gateway.address(), "localhost", &identity, None).await;
    let mut anonymous = anonymous.expect("a TLS connection");
    anonymous.send(format!("{}\n", build.id).as_bytes()).await;
    let stream = build.executor.begin(&mut anonymous).await;
    let one_more = async || {
        let stream = Client::connect(gateway.address()).await;
        let name = "localhost".try_into().expect("a host name");
        crate::support::client::connector(&identity, Some(&identity))
            .connect(name, stream.stream)
            .await
    };
    assert!(one_more().await.is_err(), "closed before the handshake");
    assert_eq!(rejected(&gateway, "address").await, 1.0);
    drop((anonymous, stream));
    within("a free permit", async { while one_more().await.is_err() {} }).await;
    for (client, stream) in &mut held {
        stream.write(b"still here\n").await;
        client.expect(b"still here\n").await;
    }
}

#[tokio::test]
async fn handshakes_are_limited_per_address_and_in_total() {
    let system = System::new().await;
    let limits = "handshakes = 4\nhandshake_timeout = \"10m\"";
    let (gateway, identity) = with_tls(&system, limits).await;
    let build = Build::of(&system).await;
    let served = async || {
        let mut client = Client::ask_tls(gateway.address(), &identity, &build.id).await;
        build.executor.serve(b"log\n").await;
        assert_eq!(client.text().await, "log\n");
    };
    // Handshakes whose ClientHello is incomplete take no permit.
    let hello = client_hello(&identity);
    let mut silent = Vec::new();
    for sent in [0, 1, 4, 5, 9, hello.len() - 1].repeat(5) {
        let mut client = Client::connect_from("127.0.0.9", gateway.address()).await;
        client.send(&hello[..sent]).await;
        silent.push(client);
    }
    served().await;
    assert_eq!(rejected(&gateway, "handshakes").await, 0.0);
    // One address may have half of them; a further handshake closes its oldest.
    let mut half = begin_handshakes("127.0.0.2", gateway.address(), &hello, 6, 2).await;
    assert_eq!(rejected(&gateway, "handshakes").await, 4.0);
    served().await;
    let rest = begin_handshakes("127.0.0.3", gateway.address(), &hello, 6, 2).await;
    assert_eq!(rejected(&gateway, "handshakes").await, 8.0);
    assert_eq!((half.len(), rest.len()), (2, 2));
    // All permits are taken: the oldest handshake is closed.
    served().await;
    within("the oldest handshake to be closed", half.join_next())
        .await
        .expect("a handshake")
        .expect("a close");
    assert_eq!(rejected(&gateway, "handshakes").await, 9.0);
    assert_eq!(half.len(), 1);
    ended(&gateway, "rejected", 9).await;
    assert_eq!(warnings(&gateway, "limits.handshakes").await, 1);
    drop(silent);
}

/// From an address that has not presented a certificate; further handshakes are closed before any
/// computation.
#[tokio::test]
async fn handshakes_of_an_address_are_limited_in_rate() {
    let system = System::new().await;
    let (gateway, identity) = with_tls(&system, "handshakes_per_minute = 20").await;
    let build = Build::of(&system).await;
    let anonymous = async || {
        Client::try_connect_tls(gateway.address(), "localhost", &identity, None).await.is_ok()
    };
    let mut refused = 0;
    within("the rate", async {
        while refused < 5 {
            refused += usize::from(!anonymous().await);
        }
    })
    .await;
    assert_eq!(rejected(&gateway, "handshake_rate").await, 5.0);
    assert_eq!(warnings(&gateway, "limits.handshakes_per_minute").await, 1);
    // Other addresses have their own rate, and addresses that have presented a certificate have
    // none.
    let known = async || {
        let client = Client::connect_from("127.0.0.2", gateway.address()).await;
        let mut client = Client::handshake(client, &identity).await;
        client.send(format!("{}\n", build.id).as_bytes()).await;
        build.executor.serve(b"log\n").await;
        assert_eq!(client.text().await, "log\n");
    };
    for _ in 0..50 {
        known().await;
    }
    assert_eq!(rejected(&gateway, "handshake_rate").await, 5.0);
}

/// Many clients of one address are served; only their log lines are rate-limited.
#[tokio::test]
async fn log_lines_of_streams_are_limited_in_rate() {
    let system = System::new().await;
    let limits = "streams_logged_per_minute = 20\nexempt_networks = [\"127.0.0.3\"]";
    let mut builder = Builder::new(&system).limits(limits);
    builder.admin = true;
    let mut gateway = builder.ready().await;
    let build = Build::of(&system).await;
    let not_logged = "zuul_fingergw_streams_not_logged_total";
    let mut asked = 0.0;
    // The rate allows further lines while they connect, so there may be a few more than 20.
    within("the rate", async {
        while metric(&gateway, not_logged).await < 5.0 {
            build.reaches("127.0.0.2", gateway.address()).await;
            asked += 1.0;
        }
    })
    .await;
    for _ in 0..30 {
        build.reaches("127.0.0.3", gateway.address()).await;
    }
    build.reaches("127.0.0.4", gateway.address()).await;
    let of = |local: &'static str| {
        move |line: &str| line.contains("stream ended") && line.contains(&format!("peer={local}:"))
    };
    gateway.logged("another address", of("127.0.0.4")).await;
    gateway.logged_times("lines of an exempt address", 30, of("127.0.0.3")).await;
    let lines = gateway.log().iter().filter(|line| of("127.0.0.2")(line)).count();
    assert_eq!(lines as f64, asked - metric(&gateway, not_logged).await);
    assert_eq!(warnings(&gateway, "limits.streams_logged_per_minute").await, 1);
}

/// ZooKeeper hangs: a limited number of requests wait for it, the others are rejected immediately.
#[tokio::test]
async fn lookups_are_limited_in_total() {
    let zookeeper = ZooKeeper::start().await;
    let system = System::on(zookeeper.clone()).await;
    let limits = "lookups = 3\nlookup_timeout = \"10m\"";
    let builder = Builder::new(&system).zookeeper("session_timeout = \"60s\"").limits(limits);
    let mut builder = builder;
    builder.admin = true;
    let gateway = builder.ready().await;
    zookeeper.pause().await;
    let asked = ask_while_it_hangs(gateway.address(), 0..10, 3).await;
    assert_eq!(rejected(&gateway, "lookups").await, 7.0);
    ended(&gateway, "rejected", 7).await;
    assert_eq!(warnings(&gateway, "limits.lookups").await, 1);
    zookeeper.resume().await;
    for answer in asked.join_all().await {
        assert_eq!(answer, "Build not found\r\n");
    }
    let mut client = Client::ask(gateway.address(), "abc").await;
    assert_eq!(client.text().await, "Build not found\r\n", "the permits are released");
}

/// The number of concurrent requests, each for a different build, is limited however long ZooKeeper
/// takes.
#[tokio::test]
async fn many_clients_wait_while_zookeeper_hangs() {
    const CLIENTS: u32 = 2000;
    let zookeeper = ZooKeeper::start().await;
    let system = System::on(zookeeper.clone()).await;
    let limits = "lookup_timeout = \"10m\"";
    let mut builder = Builder::new(&system).zookeeper("session_timeout = \"60s\"").limits(limits);
    builder.admin = true;
    let gateway = builder.ready().await;
    zookeeper.pause().await;
    let mut clients = Vec::new();
    for number in 0..CLIENTS {
        let local = if number % 2 == 0 { "127.0.0.2" } else { "127.0.0.3" };
        let build = format!("{number:032x}");
        clients.push(Client::ask_from(local, gateway.address(), &build).await);
    }
    let open = "zuul_fingergw_connections_active{listener=\"plain\"}";
    let all = async { while metric(&gateway, open).await < f64::from(CLIENTS) {} };
    within("all requests", all).await;
    zookeeper.resume().await;
    for client in &mut clients {
        assert_eq!(client.text().await, "Build not found\r\n");
    }
    assert_eq!(rejected(&gateway, "lookups").await, 0.0);
}
