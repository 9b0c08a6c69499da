//! TLS on the wire, with clients and with other gateways.

use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, HandshakeKind, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

use crate::support::admin::{metric, with_admin};
use crate::support::certificates::{Authority, Identity};
use crate::support::client::{Client, Ending};
use crate::support::executor::{Executor, acceptor};
use crate::support::gateway::Builder;
use crate::support::proxy::Proxy;
use crate::support::system::System;
use crate::support::tls::{Served, east_of, reply_through_peer, reply_through_peer_with, served};
use crate::support::within;

#[tokio::test]
async fn client_certificate_required_rejects_clients_without() {
    let served = served("", "").await;
    let foreign = Authority::new();
    let other = foreign.identity("other");
    assert!(served.serves(Some(&served.identity)).await);
    assert!(!served.serves(None).await, "no certificate");
    assert!(!served.serves(Some(&other)).await, "a certificate of another CA");
    let expired = served.system.zookeeper.authority.expired("gateway");
    assert!(!served.serves(Some(&expired)).await, "it has expired");
}

#[tokio::test]
async fn client_certificate_optional_accepts_clients_without() {
    let served = served("client_certificate = \"optional\"", "").await;
    let foreign = Authority::new();
    let other = foreign.identity("other");
    assert!(served.serves(Some(&served.identity)).await);
    assert!(served.serves(None).await);
    assert!(!served.serves(Some(&other)).await, "an optional certificate is verified");
}

#[tokio::test]
async fn client_certificate_none_asks_for_none() {
    let served = served("client_certificate = \"none\"", "").await;
    assert!(served.serves(None).await);
    assert!(served.serves(Some(&served.identity)).await);
}

#[tokio::test]
async fn silent_and_plain_peers_do_not_disturb_others() {
    let served = served("", "").await;
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(Client::connect(served.gateway.address()).await);
    }
    let mut plain = Client::connect(served.gateway.address()).await;
    plain.send(b"abcdef\r\n").await;
    let (answer, _) = plain.rest().await;
    assert!(!answer.starts_with(b"Build"), "plain text on a TLS port");
    assert!(served.serves(Some(&served.identity)).await);
}

#[tokio::test]
async fn handshake_has_a_deadline() {
    let served = served("", "handshake_timeout = \"100ms\"").await;
    let mut silent = Client::connect(served.gateway.address()).await;
    assert_eq!(silent.rest().await, (Vec::new(), Ending::Clean));
}

/// Its length is in its first bytes; the gateway does not read the rest or wait for it.
#[tokio::test]
async fn oversized_client_hello_is_rejected() {
    let served = served("", "handshake_timeout = \"1h\"").await;
    for hello in [
        // One record, and a message that continues in further records.
        [0x16, 3, 1, 0x40, 1, 1, 0, 0x3f, 0xfd],
        [0x16, 3, 1, 0, 100, 1, 0, 0x40, 0],
        // A first record that ends within the length, and an alert before the ClientHello.
        [0x16, 3, 1, 0, 2, 1, 0, 0x16, 3],
        [0x15, 3, 1, 0, 2, 1, 90, 0x16, 3],
    ] {
        let mut client = Client::connect(served.gateway.address()).await;
        client.send(&hello).await;
        let (answer, _) = client.rest().await;
        assert_eq!(answer, b"", "{hello:x?}");
    }
}

/// zuul-web hangs on records of more than 1024 bytes of plaintext, and on session tickets.
#[tokio::test]
async fn clients_get_small_records_and_no_tickets() {
    let served = served("", "").await;
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        // The second connection would resume the first one's session if it had got a ticket or a
        // session ID.
        let connector = connector(&served.identity, version);
        for _ in 0..2 {
            let records = records_of_a_log(&served, &connector).await;
            assert!(records.len() > 290, "{} records: the tap sees nothing", records.len());
            // Type byte and tag in TLS 1.3, explicit nonce and tag in TLS 1.2 (RFC 8446, section
            // 5.2; RFC 5288, section 3).
            let most = 1024 + if *version == rustls::version::TLS13 { 1 + 16 } else { 8 + 16 };
            assert_eq!(records.iter().filter(|length| **length > most).count(), 0, "{records:?}");
            assert!(records.contains(&most), "records are filled");
        }
    }
}

/// Reads a log over a connection of its own and returns the lengths of all the gateway's records.
async fn records_of_a_log(served: &Served, connector: &TlsConnector) -> Vec<usize> {
    let tap = Tap::bind().await;
    let talk = async {
        let stream = TcpStream::connect(tap.address).await.expect("the tap");
        let name = ServerName::try_from("localhost").expect("a name");
        let stream = connector.connect(name, stream).await.expect("a TLS connection");
        let mut client = Client { stream };
        client.send(format!("{}\n", served.build).as_bytes()).await;
        let mut stream = served.executor.accept().await;
        let log = vec![b'x'; 300_000];
        for size in [1, 1000, 1024, 1025, 5000, 292_975] {
            stream.write(&log[..size]).await;
            client.expect(&log[..size]).await;
        }
        stream.finish().await;
        assert_eq!(client.rest().await, (Vec::new(), Ending::Clean));
        let session = client.stream.get_ref().1;
        assert_eq!(session.tls13_tickets_received(), 0);
        assert_eq!(session.handshake_kind(), Some(HandshakeKind::Full));
    };
    let ((), tapped) = tokio::join!(talk, tap.pass(served.gateway.address()));
    tapped.lengths()
}

/// Returns a client of one TLS version that presents `identity`.
fn connector(
    identity: &Identity,
    version: &'static rustls::SupportedProtocolVersion,
) -> TlsConnector {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&identity.ca).expect("a CA")).expect("a CA");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .expect("a version")
        .with_root_certificates(roots)
        .with_client_auth_cert(
            vec![CertificateDer::from_pem_file(&identity.cert).expect("a certificate")],
            PrivateKeyDer::from_pem_file(&identity.key).expect("a key"),
        )
        .expect("a client certificate");
    TlsConnector::from(Arc::new(config))
}

/// A proxy that forwards connections one after the other and records their bytes.
struct Tap {
    listener: TcpListener,
    address: std::net::SocketAddr,
}

/// Recorded bytes of one connection.
struct Tapped {
    from_client: Vec<u8>,
    from_server: Vec<u8>,
}

impl Tap {
    async fn bind() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its address");
        Self { listener, address }
    }

    /// Forwards the next connection to `server` until it ends.
    async fn pass(&self, server: std::net::SocketAddr) -> Tapped {
        let (client, _) =
            within("a connection", self.listener.accept()).await.expect("a connection");
        let server = TcpStream::connect(server).await.expect("the gateway");
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        let (from_client, from_server) = within("the tapped connection to end", async {
            tokio::join!(copy(from_client, to_server), copy(from_server, to_client))
        })
        .await;
        Tapped { from_client, from_server }
    }
}

/// Copies until either side closes, and records the bytes.
async fn copy(mut from: OwnedReadHalf, mut to: OwnedWriteHalf) -> Vec<u8> {
    let (mut seen, mut buffer) = (Vec::new(), vec![0; 65536]);
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        seen.extend_from_slice(&buffer[..count]);
        if to.write_all(&buffer[..count]).await.is_err() {
            break;
        }
    }
    seen
}

/// Returns the TLS records in `bytes`, including their headers.
fn records(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut records = Vec::new();
    while let [_, _, _, high, low, ..] = bytes {
        let length = 5 + usize::from(u16::from_be_bytes([*high, *low]));
        let (record, rest) = bytes.split_at(length.min(bytes.len()));
        records.push(record);
        bytes = rest;
    }
    records
}

impl Tapped {
    /// Returns the payload lengths of the server's records.
    fn lengths(&self) -> Vec<usize> {
        records(&self.from_server).iter().map(|record| record.len() - 5).collect()
    }

    fn hello(&self) -> Hello {
        Hello::parse(records(&self.from_client)[0])
    }
}

/// Our gateways recognize each other: full records, and the second stream resumes the session.
#[tokio::test]
async fn peer_gateways_fill_records_and_resume_sessions() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let tap = Tap::bind().await;
    let mut west = Builder::new(&system).zone("west").tls(&identity).listeners(&["tls = true"]);
    west.root = format!("public_port = {}", tap.address.port());
    let mut west = west.ready().await;
    west.until_running(&system).await;
    let east = Builder::new(&system).zone("east").tls(&identity).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    let log = vec![b'x'; 300_000];
    for resumes in [false, true] {
        let talk = async {
            let mut client = Client::ask(east.address(), &build).await;
            let ((), (received, ending)) = tokio::join!(executor.serve(&log), client.rest());
            assert!(received == log && ending == Ending::Clean);
        };
        let ((), tapped) = tokio::join!(talk, tap.pass(west.address()));
        assert_eq!(tapped.hello().resumes, resumes);
        let longest = tapped.lengths().into_iter().max();
        assert!(longest > Some(4096), "{longest:?}");
    }
}

/// Many concurrent clients get a ticket each.
#[tokio::test]
async fn many_sessions_are_resumed_concurrently() {
    const STREAMS: usize = 40;
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let mut west = Builder::new(&system).zone("west").tls(&identity).listeners(&["tls = true"]);
    // Port of the proxy, whose target is known only later.
    let reserved = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = reserved.local_addr().expect("its address").port();
    west.listeners = vec![format!("tls = true\naddress = \"127.0.0.1:{port}\"")];
    let proxy = Proxy::start(port).await;
    drop(reserved);
    west.root = format!("public_port = {}", proxy.address.port());
    let mut west = west.ready().await;
    west.until_running(&system).await;
    let mut east = Builder::new(&system).zone("east").tls(&identity);
    east.admin = true;
    let east = east.ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    let series = "zuul_fingergw_tls_sessions_resumed_total{direction=\"outbound\"}";
    let mut resumed = 0.0;
    for _ in 0..2 {
        resumed = metric(&east, series).await;
        // The proxy forwards no ticket while it holds, so each stream needs an existing one.
        proxy.hold();
        let mut clients = Vec::new();
        for _ in 0..STREAMS {
            clients.push(Client::ask(east.address(), &build).await);
        }
        proxy.release();
        for _ in 0..STREAMS {
            executor.serve(b"log\n").await;
        }
        for mut client in clients {
            assert_eq!(client.text().await, "log\n");
        }
    }
    let resumed = metric(&east, series).await - resumed;
    assert!((resumed - 40.0).abs() < 0.5, "{resumed} of {STREAMS}");
}

/// Routers look for the server name in what they read first: it must be there, in one segment.
#[tokio::test]
async fn client_hello_is_short_and_has_the_server_name() {
    let other = Executor::start().await;
    let (_system, gateway, build, _) = east_of(&other, "localhost").await;
    let _client = Client::ask(gateway.address(), &build).await;
    let (mut stream, _) = within("a hello", other.listener.accept()).await.expect("a connection");
    let mut hello = vec![0; 4096];
    let length = within("a hello", stream.read(&mut hello)).await.expect("a hello");
    let hello = Hello::parse(&hello[..length]);
    assert!(length < 1200, "{length} bytes");
    assert_eq!(hello.server_name.as_deref(), Some("localhost"));
    assert_eq!(hello.first_key_share, Some(0x001d), "x25519 (RFC 8446, section 4.2.7)");
    assert!(!hello.resumes, "no session is resumed");
}

/// The checked parts of a ClientHello (RFC 8446, section 4.1.2; RFC 6066, section 3).
#[derive(Debug, Default)]
struct Hello {
    server_name: Option<String>,
    first_key_share: Option<u16>,
    resumes: bool,
}

impl Hello {
    /// Reads a ClientHello, which must be one record.
    fn parse(record: &[u8]) -> Self {
        let number = |bytes: &[u8]| usize::from(u16::from_be_bytes([bytes[0], bytes[1]]));
        assert_eq!(record[0], 22, "a handshake record");
        assert_eq!(number(&record[3..]), record.len() - 5, "the whole record in the first read");
        // After record and handshake headers, version and random.
        let mut rest = &record[5 + 4 + 2 + 32..];
        rest = &rest[1 + usize::from(rest[0])..];
        rest = &rest[2 + number(rest)..];
        rest = &rest[1 + usize::from(rest[0])..];
        rest = &rest[2..];
        let mut hello = Self::default();
        while rest.len() >= 4 {
            let (kind, length) = (number(rest), number(&rest[2..]));
            let body = &rest[4..4 + length];
            match kind {
                0 => {
                    let name = &body[5..5 + number(&body[3..])];
                    hello.server_name = Some(String::from_utf8_lossy(name).into_owned());
                }
                41 => hello.resumes = true,
                51 => hello.first_key_share = u16::try_from(number(&body[2..])).ok(),
                _ => {}
            }
            rest = &rest[4 + length..];
        }
        hello
    }
}

/// An address is not sent as server name, but the certificate must contain it.
#[tokio::test]
async fn gateway_registered_by_its_address_is_verified() {
    let other = Executor::start().await;
    let (_system, gateway, build, identity) = east_of(&other, "127.0.0.1").await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut stream = other.accept_tls(&acceptor(&identity)).await;
    stream.write(b"log\n").await;
    stream.finish().await;
    assert_eq!(client.text().await, "log\n");
}

/// The peer requires a certificate and gets ours.
#[tokio::test]
async fn own_certificate_is_sent_to_other_gateways() {
    let other = Executor::start().await;
    let (_system, gateway, build, identity) = east_of(&other, "localhost").await;
    let _client = Client::ask(gateway.address(), &build).await;
    let stream = other.accept_tls(&acceptor(&identity)).await.into_inner();
    let shown = stream.get_ref().1.peer_certificates().expect("a certificate").to_vec();
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject;
    assert_eq!(shown, [CertificateDer::from_pem_file(&identity.cert).expect("ours")]);
}

/// `verify_hostnames = false` disables only the check of the name.
#[tokio::test]
async fn gateway_certificate_must_be_valid_and_of_our_ca() {
    let (authority, elsewhere) = (Authority::new(), Authority::new());
    let refused = "Internal streaming error: the zone's gateways cannot be reached\r\n";
    for (theirs, verified, unverified) in [
        (authority.identity_only_for("localhost"), "log\n", "log\n"),
        (authority.identity_only_for("elsewhere.example.org"), refused, "log\n"),
        (authority.expired("localhost"), refused, refused),
        (elsewhere.identity("localhost"), refused, refused),
        (elsewhere.identity_only_for("elsewhere.example.org"), refused, refused),
    ] {
        assert_eq!(reply_through_peer(&theirs, &authority, true).await, verified, "{theirs:?}");
        assert_eq!(reply_through_peer(&theirs, &authority, false).await, unverified, "{theirs:?}");
    }
}

/// Certificates of Zuul's own tools contain their name only as common name.
#[tokio::test]
async fn common_name_counts_without_alternative_names() {
    let authority = Authority::new();
    let refused = "Internal streaming error: the zone's gateways cannot be reached\r\n";
    let (theirs, other) =
        (authority.common_name_only("localhost"), authority.common_name_only("elsewhere"));
    assert_eq!(reply_through_peer(&theirs, &authority, true).await, "log\n");
    assert_eq!(reply_through_peer(&other, &authority, true).await, refused);
    let strict = reply_through_peer_with(&theirs, &authority, |builder| {
        builder.common_name_fallback = false
    });
    assert_eq!(strict.await, refused);
}

/// A CA with name constraints cannot evade them with a common name: constraints apply only to
/// alternative names.
#[tokio::test]
async fn common_name_does_not_count_under_name_constraints() {
    let constrained = Authority::constrained("elsewhere.example.org");
    let theirs = constrained.common_name_only("localhost");
    let system_wide = Authority::new();
    // Trusts both CAs.
    let ours = system_wide.identity("gateway");
    let both = [&ours.ca, &theirs.ca].map(|ca| Identity::text(ca)).concat();
    std::fs::write(&ours.ca, both).expect("a CA file");
    let refused = "Internal streaming error: the zone's gateways cannot be reached\r\n";
    assert_eq!(reply_through_peer(&theirs, &system_wide, true).await, refused);
    assert_eq!(reply_through_peer(&theirs, &system_wide, false).await, "log\n");
}

/// In TLS 1.3 a peer rejects our certificate only after our handshake is complete (RFC 8446,
/// section 4.4.2.4).
#[tokio::test]
async fn outbound_handshake_that_the_peer_refuses_is_counted_once() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let other = Authority::new();
    let west = Identity { ca: other.ca(), ..identity.clone() };
    let west = Builder::new(&system).zone("west").tls(&west).listeners(&["tls = true"]);
    let mut west = west.ready().await;
    let mut east = with_admin(&system).zone("east").tls(&identity).ready().await;
    west.until_running(&system).await;
    east.until_running(&system).await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    let mut client = Client::ask(east.address(), &build).await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n", "from the executor");
    let handshakes = |result: &str| {
        format!("zuul_fingergw_tls_handshakes_total{{direction=\"outbound\",result=\"{result}\"}}")
    };
    assert_eq!(metric(&east, &handshakes("refused_by_peer")).await, 1.0);
    assert_eq!(metric(&east, &handshakes("ok")).await, 0.0);
}
