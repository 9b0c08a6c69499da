//! Zones behind one address: a router that passes TLS through and routes by server name, as an
//! OpenShift Route and a TLSRoute do. The router is a real haproxy with OpenShift's settings.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use nix::sched::CloneFlags;
use rustls::pki_types::ServerName;
use serde_json::json;
use tempfile::NamedTempFile;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::support::admin;
use crate::support::certificates::{Authority, Identity};
use crate::support::client::{Client, Ending, connector};
use crate::support::executor::{Executor, unreachable};
use crate::support::gateway::{Builder, Gateway};
use crate::support::haproxy::{Haproxy, reserve};
use crate::support::namespace::{in_namespaces, resolve_locally};
use crate::support::system::{GATEWAYS, System};
use crate::support::within;
use crate::support::zookeeper::ZooKeeper;

const WEST: &str = "fingergw.west.example.org";
const EAST: &str = "fingergw.east.example.org";

/// The default of OpenShift's router.
const HOUR: &str = "1h";

/// Two zones behind one router, and a gateway outside of both zones.
struct Zones {
    system: System,
    router: Haproxy,
    outer: Gateway,
    zones: [Zone; 2],
    /// CA of the gateways; the router's own certificate has a different one.
    identity: Identity,
    _routers: Authority,
    _names: NamedTempFile,
}

struct Zone {
    name: &'static str,
    gateway: Gateway,
    executor: Executor,
}

impl Zone {
    /// Starts the gateway of a zone, which registers the router's address.
    async fn start(
        system: &System,
        name: &'static str,
        hostname: &str,
        router: SocketAddr,
    ) -> Self {
        let identity = system.zookeeper.authority.identity_only_for(hostname);
        let mut builder = Builder::new(system).zone(name).tls(&identity).listeners(&["tls = true"]);
        builder.hostname = hostname.to_owned();
        builder.root = format!("public_port = {}", router.port());
        builder.admin = true;
        Self { name, gateway: builder.ready().await, executor: Executor::start().await }
    }
}

impl Zones {
    async fn start(tunnel: &str) -> Self {
        let names = resolve_locally(&[WEST, EAST]);
        let system = System::on(ZooKeeper::start().await).await;
        let place = reserve();
        let west = Zone::start(&system, "west", WEST, place.0).await;
        let east = Zone::start(&system, "east", EAST, place.0).await;
        let routers = Authority::new();
        let routes = [(WEST, west.gateway.address()), (EAST, east.gateway.address())];
        let router = Haproxy::router(place, &routes, &routers.identity("router"), tunnel).await;
        let identity = system.zookeeper.authority.identity_only_for("outer.example.org");
        let outer = Builder::new(&system).tls(&identity).ready().await;
        let zones = [west, east];
        Self { system, router, outer, zones, identity, _routers: routers, _names: names }
    }

    /// Creates a build in a zone, and a client that requests it from the outer gateway.
    async fn ask(&self, zone: usize) -> Client<TcpStream> {
        let Zone { name, executor, .. } = &self.zones[zone];
        let build = self.system.put_build(Some(name), Some(&executor.worker(Some(name)))).await;
        Client::ask(self.outer.address(), &build).await
    }
}

/// Concurrent streams of both zones through one address: each log comes from its own zone and is
/// complete.
#[test]
fn two_zones_share_one_address() {
    in_namespaces(CloneFlags::CLONE_NEWNS, async || {
        let mut all = Zones::start(HOUR).await;
        let [mut from_west, mut from_east] = [all.ask(0).await, all.ask(1).await];
        let mut west = all.zones[0].executor.begin(&mut from_west).await;
        let mut east = all.zones[1].executor.begin(&mut from_east).await;
        for round in 0..100 {
            let (to_west, to_east) = (format!("west {round}\n"), format!("east {round}\n"));
            west.write(to_west.as_bytes()).await;
            east.write(to_east.as_bytes()).await;
            from_east.expect(to_east.as_bytes()).await;
            from_west.expect(to_west.as_bytes()).await;
        }
        // A reset passes the router in both directions.
        west.finish().await;
        east.reset();
        assert_eq!(from_west.rest().await, (Vec::new(), Ending::Clean));
        assert_eq!(from_east.rest().await, (Vec::new(), Ending::Reset));
        let port = all.router.address.port();
        for (hostname, zone, end) in
            [(WEST, "west", "finished"), (EAST, "east", "\"connection to the hop failed")]
        {
            let route = format!("gateway {hostname}:{port} of zone {zone} (TLS)");
            let line = all.outer.logged(&route, |line| line.contains(&route)).await;
            assert!(line.contains(&format!(" end={end}")), "{line}");
        }

        // A large log, and a client that disconnects.
        let mut client = all.ask(0).await;
        let log = vec![b'x'; 3_000_000];
        let (_, received) = tokio::join!(all.zones[0].executor.serve(&log), client.rest());
        assert!(received == (log, Ending::Clean));
        let mut client = all.ask(1).await;
        let mut stream = all.zones[1].executor.begin(&mut client).await;
        client.reset();
        stream.closed().await;
    });
}

/// Writes the first `left` bytes one by one, each as a packet.
struct Trickle {
    stream: TcpStream,
    left: usize,
}

impl AsyncRead for Trickle {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Trickle {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let piece = if self.left == 0 { bytes } else { &bytes[..bytes.len().min(1)] };
        let written = Pin::new(&mut self.stream).poll_write(context, piece);
        if let Poll::Ready(Ok(count)) = written {
            self.left = self.left.saturating_sub(count);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// The router waits for the whole ClientHello.
#[test]
fn client_hello_in_pieces_reaches_its_zone() {
    in_namespaces(CloneFlags::CLONE_NEWNS, async || {
        let all = Zones::start(HOUR).await;
        let Zone { name, executor, .. } = &all.zones[1];
        let build = all.system.put_build(Some(name), Some(&executor.worker(Some(name)))).await;
        let stream = TcpStream::connect(all.router.address).await.expect("a connection");
        stream.set_nodelay(true).expect("TCP_NODELAY");
        let name = ServerName::try_from(EAST).expect("a host name");
        let connector = connector(&all.identity, Some(&all.identity));
        let shaken = connector.connect(name, Trickle { stream, left: 250 });
        let stream = within("a TLS handshake", shaken).await.expect("a TLS session");
        assert_eq!(stream.get_ref().0.left, 0);
        let mut client = Client { stream };
        client.send(format!("{build}\n").as_bytes()).await;
        executor.serve(b"log\n").await;
        assert_eq!(client.text().await, "log\n");
    });
}

/// A name without a Route, and no name: the router answers with its own certificate. The client
/// gets a reply, and the log explains the misconfiguration.
#[test]
fn connection_without_a_zones_name_is_rejected() {
    in_namespaces(CloneFlags::CLONE_NEWNS, async || {
        let mut all = Zones::start(HOUR).await;
        let port = all.router.address.port();
        // A client never sends an address as server name.
        for (hostname, zone) in [("localhost", "north"), ("127.0.0.1", "south")] {
            let entry = json!({
                "hostname": hostname, "kind": "fingergw", "model_api": 38, "public_port": port,
                "state": "running", "use_ssl": true, "version": "14.3.0", "zone": zone,
            });
            let path = format!("{GATEWAYS}/{zone}0000000000");
            all.system.put(&path, entry.to_string().as_bytes()).await;
            // The executor is the last hop; it cannot be reached from here.
            let worker = unreachable(Some(zone)).await;
            let build = all.system.put_build(Some(zone), Some(&worker)).await;
            let reply = Client::ask(all.outer.address(), &build).await.text().await;
            assert_eq!(
                reply,
                "Internal streaming error: the zone's gateways cannot be reached\r\n"
            );
            let line = all.outer.logged("the reason", |line| line.contains(&build)).await;
            let why =
                format!("gateway {hostname}:{port} of zone {zone} (TLS)\" end=\"TLS: invalid peer");
            assert!(line.contains(&why), "{line}");
        }
        for Zone { gateway, .. } in &all.zones {
            let log = gateway.log();
            assert!(!log.iter().any(|line| line.contains("gateway::session")), "{log:?}");
        }
    });
}

/// The router resets the stream of a build that is idle for longer than `timeout tunnel`.
#[test]
fn router_aborts_a_stream_that_is_idle_for_its_timeout() {
    in_namespaces(CloneFlags::CLONE_NEWNS, async || {
        let mut all = Zones::start("300ms").await;
        let mut client = all.ask(0).await;
        let mut stream = all.zones[0].executor.begin(&mut client).await;
        assert_eq!(client.rest().await, (Vec::new(), Ending::Reset));
        stream.closed().await;
        let line = all.outer.logged("the reason", |line| line.contains("stream ended")).await;
        assert!(line.contains(" end=\"connection to the hop failed"), "{line}");
    });
}

/// The router checks every few seconds whether a pod listens, and so does a kubelet with a TCP
/// probe.
#[test]
fn health_checks_of_the_router_are_not_logged() {
    in_namespaces(CloneFlags::CLONE_NEWNS, async || {
        let all = Zones::start(HOUR).await;
        let [west, east] = &all.zones;
        let before = [west.gateway.log(), east.gateway.log()];
        let so_far = admin::metric(&east.gateway, PROBES).await;
        within("the router to look", async {
            while admin::metric(&east.gateway, PROBES).await < so_far + 10.0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        assert_eq!([west.gateway.log(), east.gateway.log()], before);
    });
}

/// Connections that were closed without a request.
const PROBES: &str = "zuul_fingergw_requests_total{result=\"probe\"}";
