//! Connections of a load balancer with a PROXY protocol header, which is accepted only from trusted
//! proxies.

use crate::support::admin::rejected;
use crate::support::admin::{metric, until_metric};
use crate::support::client::{Client, Ending};
use crate::support::executor::Executor;
use crate::support::gateway::{Builder, Gateway};
use crate::support::program::program;
use crate::support::proxy_header::{raw_v2, v2};
use crate::support::system::System;

const TRUSTED: &str = "proxy_protocol = [\"127.0.0.0/8\"]";
const BROKEN: &str = "zuul_fingergw_requests_total{result=\"proxy_header\"}";
const PROBES: &str = "zuul_fingergw_requests_total{result=\"probe\"}";

/// Returns a TLV of `length` bytes in total.
fn long_tlv(length: usize) -> Vec<u8> {
    let [high, low] = u16::try_from(length - 3).expect("not that long").to_be_bytes();
    [&[0x28, high, low], vec![b'x'; length - 3].as_slice()].concat()
}

async fn gateway(system: &System, listener: &str, limits: &str) -> Gateway {
    let identity = system.zookeeper.authority.identity("gateway");
    let builder = Builder::new(system).tls(&identity).listeners(&[listener]).limits(limits);
    let mut builder = builder.log("level = \"debug\"");
    builder.admin = true;
    builder.ready().await
}

/// Waits for the log line of a stream to `peer`.
async fn streamed_to(gateway: &mut Gateway, peer: &str) {
    let peer = format!("peer={peer} ");
    let what = format!("a stream to {peer}");
    gateway.logged(&what, |line| line.contains("stream ended") && line.contains(&peer)).await;
}

/// Sends `header` and a request in one piece, and checks that the log arrives.
async fn served(gateway: &Gateway, executor: &Executor, header: &[u8], build: &str) {
    let mut client = Client::connect(gateway.address()).await;
    client.send(&[header, build.as_bytes(), b"\r\n"].concat()).await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n", "{}", header.escape_ascii());
}

#[tokio::test]
async fn client_is_the_announced_address() {
    let system = System::new().await;
    let mut gateway = gateway(&system, TRUSTED, "").await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let v1 = |line: &str| format!("PROXY {line}\r\n").into_bytes();
    let ip = |text: &str| text.parse().expect("an address");
    for (header, peer) in [
        (v1("TCP4 192.0.2.1 198.51.100.1 12345 79"), "192.0.2.1:12345"),
        (v1("TCP6 2001:db8::2 2001:db8::1 12345 79"), "[2001:db8::2]:12345"),
        (v2(ip("192.0.2.3"), b""), "192.0.2.3:12345"),
        (v2(ip("2001:db8::4"), b""), "[2001:db8::4]:12345"),
        // A TLV with a client's certificate, of the maximum length.
        (v2(ip("192.0.2.6"), &long_tlv(16 * 1024 - 16 - 12)), "192.0.2.6:12345"),
        // What a TLS load balancer adds: ALPN, authority, unique ID.
        (v2(ip("192.0.2.5"), b"\x01\0\x02h2\x02\0\x03a.b\x05\0\x04abcd"), "192.0.2.5:12345"),
    ] {
        served(&gateway, &executor, &header, &build).await;
        streamed_to(&mut gateway, peer).await;
    }
    assert_eq!(metric(&gateway, BROKEN).await, 0.0);
}

#[tokio::test]
async fn local_and_unknown_headers_count_as_the_proxy() {
    let system = System::new().await;
    let mut gateway = gateway(&system, TRUSTED, "").await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    for header in [
        b"PROXY UNKNOWN\r\n".to_vec(),
        b"PROXY UNKNOWN 192.0.2.1 192.0.2.2 1 2\r\n".to_vec(),
        raw_v2(0x20, 0x00, b""),
        raw_v2(0x20, 0x11, &[192, 0, 2, 1, 192, 0, 2, 2, 0, 1, 0, 2]),
        raw_v2(0x21, 0x00, b""),
        raw_v2(0x21, 0x31, &[b'/'; 216]),
    ] {
        let mut client = Client::connect(gateway.address()).await;
        let own = client.stream.local_addr().expect("an address").to_string();
        client.send(&[&header, build.as_bytes(), b"\n"].concat()).await;
        executor.serve(b"log\n").await;
        assert_eq!(client.text().await, "log\n", "{}", header.escape_ascii());
        streamed_to(&mut gateway, &own).await;
    }
}

/// However the bytes are split, only the header is consumed: what follows is the request.
#[tokio::test]
async fn header_in_pieces_is_read() {
    let system = System::new().await;
    let gateway = gateway(&system, TRUSTED, "").await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    for header in
        [b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n".to_vec(), v2([192, 0, 2, 1].into(), b"")]
    {
        let mut client = Client::connect(gateway.address()).await;
        client.stream.set_nodelay(true).expect("TCP_NODELAY");
        let all = [&header, build.as_bytes(), b"\r\n"].concat();
        for byte in all {
            client.send(&[byte]).await;
        }
        executor.serve(b"log\n").await;
        assert_eq!(client.text().await, "log\n");
    }
}

/// Limits count the client in the header, not the proxy, however the header encodes an address.
#[tokio::test]
async fn limits_per_address_count_the_announced_client() {
    let system = System::new().await;
    let gateway = gateway(&system, TRUSTED, "connections_per_address = 1").await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let ip = |text: &str| text.parse().expect("an address");
    let mut streams = Vec::new();
    for client in ["192.0.2.1", "192.0.2.2", "2001:db8:0:1::1", "2001:db8:0:2::1"] {
        let mut proxy = Client::connect(gateway.address()).await;
        proxy.send(&[&v2(ip(client), b""), build.as_bytes(), b"\r\n"].concat()).await;
        let stream = executor.begin(&mut proxy).await;
        streams.push((proxy, stream));
    }
    let refused = "Internal streaming error: too many connections from this address\r\n";
    for client in ["192.0.2.1", "::ffff:192.0.2.2", "2001:db8:0:2::2"] {
        let mut proxy = Client::connect(gateway.address()).await;
        proxy.send(&[&v2(ip(client), b""), build.as_bytes(), b"\r\n"].concat()).await;
        assert_eq!(proxy.text().await, refused, "{client}");
    }
    assert_eq!(rejected(&gateway, "address").await, 3.0);
    served(&gateway, &executor, &v2(ip("192.0.2.3"), b""), &build).await;
    for (client, stream) in &mut streams {
        stream.write(b"meanwhile\n").await;
        client.expect(b"meanwhile\n").await;
    }
}

/// `status` and its list of streams use the client's address as well.
#[tokio::test]
async fn status_lists_the_announced_client() {
    let system = System::new().await;
    let builder = Builder::new(&system).listeners(&[TRUSTED]).control();
    let config = builder.write();
    let gateway = builder.ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut client = Client::connect(gateway.address()).await;
    client.send(&[&v2([192, 0, 2, 9].into(), b""), build.as_bytes(), b"\n"].concat()).await;
    let _stream = executor.begin(&mut client).await;
    let status = program(&["status"], &config).await.stdout;
    assert!(status.contains("192.0.2.9:12345") && !status.contains("from 127.0.0.1"), "{status}");
}

#[tokio::test]
async fn header_comes_before_the_tls_handshake() {
    let system = System::new().await;
    let mut gateway = gateway(&system, &format!("tls = true\n{TRUSTED}"), "").await;
    let identity = system.zookeeper.authority.identity("client");
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut plain = Client::connect(gateway.address()).await;
    plain.send(b"PROXY TCP4 192.0.2.7 192.0.2.8 12345 79\r\n").await;
    let mut client = Client::handshake(plain, &identity).await;
    client.send(format!("{build}\r\n").as_bytes()).await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");
    streamed_to(&mut gateway, "192.0.2.7:12345").await;
    // Without a header the gateway does not wait for a ClientHello.
    let plain = Client::connect(gateway.address()).await;
    assert!(Client::try_handshake(plain, &identity).await.is_err());
    until_metric(&gateway, BROKEN, 1.0).await;
}

/// Invalid headers: closed without a reply, counted, and without effect on other connections.
#[tokio::test]
async fn invalid_and_missing_headers_are_rejected() {
    let system = System::new().await;
    let gateway = gateway(&system, TRUSTED, "").await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut broken = 0.0;
    for bytes in [
        format!("{build}\r\n").into_bytes(),
        b"PROXY TCP4 192.0.2.1 198.51.100.1 12345\r\n".to_vec(),
        [b"PROXY UNKNOWN ".as_slice(), &[b'x'; 200]].concat(),
        raw_v2(0x21, 0x11, b"short"),
        raw_v2(0x20, 0x00, &[0; 17_000]),
        raw_v2(0x31, 0x11, &[0; 12]),
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03".to_vec(),
    ] {
        let mut client = Client::connect(gateway.address()).await;
        client.send(&bytes).await;
        let (answer, ending) = client.rest().await;
        // A reset if bytes were left unread.
        assert!(answer.is_empty(), "{} {ending:?}", answer.escape_ascii());
        broken += 1.0;
        until_metric(&gateway, BROKEN, broken).await;
    }
    // Truncated headers.
    let mut client = Client::connect(gateway.address()).await;
    client.send(b"PROXY TCP4 192.0.2.1").await;
    client.half_close().await;
    assert_eq!(client.rest().await, (Vec::new(), Ending::Clean));
    until_metric(&gateway, BROKEN, broken + 1.0).await;
    // A health check of the load balancer.
    let mut client = Client::connect(gateway.address()).await;
    client.half_close().await;
    assert_eq!(client.rest().await, (Vec::new(), Ending::Clean));
    until_metric(&gateway, PROBES, 1.0).await;
    assert_eq!(metric(&gateway, BROKEN).await, broken + 1.0);
    served(&gateway, &executor, b"PROXY UNKNOWN\r\n", &build).await;
}

#[tokio::test]
async fn header_must_arrive_within_a_deadline() {
    let system = System::new().await;
    for (listener, limits) in
        [("", "request_timeout = \"100ms\""), ("tls = true", "handshake_timeout = \"100ms\"")]
    {
        let mut gateway = gateway(&system, &format!("{listener}\n{TRUSTED}"), limits).await;
        let mut silent = Client::connect(gateway.address()).await;
        let mut slow = Client::connect(gateway.address()).await;
        slow.send(b"PROXY TCP4 ").await;
        assert_eq!(silent.rest().await, (Vec::new(), Ending::Clean));
        assert_eq!(slow.rest().await, (Vec::new(), Ending::Clean));
        let late = |line: &str| line.contains("PROXY header timed out") && line.contains("DEBUG");
        gateway.logged_times("both", 2, late).await;
        until_metric(&gateway, BROKEN, 2.0).await;
    }
}

/// From other addresses no header is expected: a header is a malformed request.
#[tokio::test]
async fn header_of_an_untrusted_peer_is_a_request() {
    let system = System::new().await;
    let mut gateway = gateway(&system, "proxy_protocol = [\"127.0.0.2\"]", "").await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    for header in
        [b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n".to_vec(), v2([192, 0, 2, 1].into(), b"")]
    {
        let mut client = Client::connect(gateway.address()).await;
        client.send(&[&header, build.as_bytes(), b"\n"].concat()).await;
        assert_eq!(client.text().await, "Build not found\r\n");
    }
    served(&gateway, &executor, b"", &build).await;
    let mut trusted = Client::connect_from("127.0.0.2", gateway.address()).await;
    trusted.send(&[&v2([192, 0, 2, 1].into(), b""), build.as_bytes(), b"\n"].concat()).await;
    executor.serve(b"log\n").await;
    assert_eq!(trusted.text().await, "log\n");
    streamed_to(&mut gateway, "192.0.2.1:12345").await;
    assert_eq!(metric(&gateway, BROKEN).await, 0.0);
}
