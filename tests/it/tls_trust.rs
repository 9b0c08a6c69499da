//! Which certificates of peers are trusted.

use std::fs;

use rcgen::{DnValue, SanType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::support::certificates::{Authority, Identity};
use crate::support::client::Client;
use crate::support::executor::{Executor, acceptor, acceptor_with_protocols};
use crate::support::registration_failures::{debug_logging, registration_warning};
use crate::support::system::System;
use crate::support::tls::{Served, east_of, reply_through_peer, served_with};
use crate::support::within;

const REFUSED: &str = "Internal streaming error: the zone's gateways cannot be reached\r\n";

/// Starts a gateway that trusts `more` and the system's CA.
async fn trusting(more: &str) -> Served {
    let system = System::new().await;
    let mut identity = system.zookeeper.authority.identity("gateway");
    let both = identity.cert.with_file_name("both-authorities.pem");
    fs::write(&both, Identity::text(&identity.ca) + more).expect("a CA file");
    identity.ca = both;
    served_with(system, identity, "", "").await
}

/// A second CA in `tls.ca`, in each format that OpenSSL reads. It must not be skipped silently.
#[tokio::test]
async fn every_ca_of_the_file_is_trusted() {
    let second = Authority::new();
    let text = Identity::text(&second.ca());
    let marked = format!("\u{feff}{text}");
    let labelled = text.replace(" CERTIFICATE", " X509 CERTIFICATE");
    let trusted = text.replace(" CERTIFICATE", " TRUSTED CERTIFICATE");
    for (how, text) in [("marked", marked), ("X509", labelled), ("TRUSTED", trusted)] {
        let served = trusting(&text).await;
        let client = second.identity("client");
        assert!(served.serves(Some(&client)).await, "{how}");
        assert!(!served.serves(Some(&Authority::new().identity("client"))).await, "{how}");
    }
}

/// OpenSSL uses the common name if there is no alternative name of type DNS.
#[tokio::test]
async fn common_name_counts_beside_names_that_are_not_dns_names() {
    let authority = Authority::new();
    let named = |common: &str, name: SanType| {
        authority.identity_with(common, |params| params.subject_alt_names = vec![name])
    };
    let address = || SanType::IpAddress([127, 0, 0, 9].into());
    let mail = SanType::Rfc822Name("someone@example.org".try_into().expect("an address"));
    let uri = SanType::URI("spiffe://example.org/gateway".try_into().expect("a URI"));
    let dns = SanType::DnsName("elsewhere.example.org".try_into().expect("a name"));
    for (theirs, expected) in [
        (named("localhost", address()), "log\n"),
        (named("localhost", mail), "log\n"),
        (named("localhost", uri), "log\n"),
        (named("localhost", dns), REFUSED),
        (named("elsewhere", address()), REFUSED),
    ] {
        assert_eq!(reply_through_peer(&theirs, &authority, true).await, expected, "{theirs:?}");
    }
}

/// A certificate that is itself in `tls.ca` is trusted, although it is a CA's, while it is valid
/// and contains the requested name.
#[tokio::test]
async fn certificate_in_the_ca_file_is_trusted() {
    let theirs = Authority::self_signed_for("localhost", |_| {});
    let expired = Authority::self_signed_for("localhost", |params| {
        params.not_after = rcgen::date_time_ymd(2021, 7, 1);
    });
    let elsewhere = Authority::self_signed_for("elsewhere.example.org", |_| {});
    let all = [&theirs, &expired, &elsewhere].map(|authority| Identity::text(&authority.ca()));
    let all = all.concat();
    for (theirs, expected) in [(&theirs, "log\n"), (&expired, REFUSED), (&elsewhere, REFUSED)] {
        let ours = Authority::new();
        fs::write(ours.ca(), Identity::text(&ours.ca()) + &all).expect("a CA file");
        assert_eq!(reply_through_peer(&theirs.as_identity(), &ours, true).await, expected);
    }
    let served = trusting(&all).await;
    assert!(served.serves(Some(&theirs.as_identity())).await);
    assert!(!served.serves(Some(&expired.as_identity())).await, "it has expired");
    let unknown = Authority::self_signed_for("localhost", |_| {});
    assert!(!served.serves(Some(&unknown.as_identity())).await, "it is not in the file");
}

/// A CA certificate that was renewed with its name in another string type, case or white space.
#[tokio::test]
async fn ca_name_in_another_encoding_matches() {
    let authority = Authority::new();
    let printable = |name: &str| DnValue::PrintableString(name.try_into().expect("letters"));
    for (name, known) in [
        (printable("test CA"), true),
        (DnValue::Utf8String("Test  ca".to_owned()), true),
        (printable("test CAs"), false),
    ] {
        let served = trusting(&authority.renamed(name.clone())).await;
        let client = authority.identity("client");
        assert_eq!(served.serves(Some(&client)).await, known, "{name:?}");
        let other = Authority::new();
        let untrusted = other.identity("client");
        assert!(!served.serves(Some(&untrusted)).await, "of the same name, with another key");
    }
}

/// CA names that would fill more than one message are not sent: no client could read it.
#[tokio::test]
async fn many_cas_do_not_break_the_handshake() {
    let authority = Authority::new();
    let named = |number: usize| authority.renamed(DnValue::Utf8String(format!("{number:0350}")));
    let served = trusting(&(0..200).map(named).collect::<String>()).await;
    assert!(served.serves(Some(&served.identity)).await);
}

/// Returns what a gateway logs about a ZooKeeper that presents `theirs`, with the CAs in `ca`.
async fn zookeeper_error(theirs: &Identity, ca: &str) -> String {
    let system = System::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("its address").port();
    let acceptor = acceptor(theirs);
    let serving = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // The ZooKeeper client rejects this certificate.
            let _ = acceptor.accept(stream).await;
        }
    });
    let mut builder = debug_logging(&system);
    builder.zookeeper_identity.ca = builder.directory().join("zookeeper-ca.pem");
    fs::write(&builder.zookeeper_identity.ca, ca).expect("a CA file");
    builder.hosts = format!("localhost:{port}");
    let mut gateway = builder.start().await;
    let warning = registration_warning(&mut gateway).await;
    serving.abort();
    warning
}

/// The message explains what the ZooKeeper client does not support.
#[tokio::test]
async fn error_of_zookeepers_certificate_is_explained() {
    let own = Authority::self_signed_for("localhost", |_| {});
    let output = zookeeper_error(&own.as_identity(), &Identity::text(&own.ca())).await;
    assert!(output.contains("it is a CA certificate (CA:TRUE)"), "{output}");
    let authority = Authority::new();
    let renamed = authority.renamed(DnValue::Utf8String("Test CA".to_owned()));
    let output = zookeeper_error(&authority.identity("localhost"), &renamed).await;
    assert!(output.contains("the name is written differently"), "{output}");
}

/// A TLS terminator in front of a peer that rejects ALPN: the gateway connects again without ALPN,
/// and from then on without it from the start.
#[tokio::test]
async fn peer_that_rejects_our_protocol_is_dialed_without_it() {
    let other = Executor::start().await;
    let (_system, gateway, build, identity) = east_of(&other, "localhost").await;
    let acceptor = acceptor_with_protocols(&identity, &["h2", "http/1.1"]);
    for attempts in [2, 1] {
        let mut client = Client::ask(gateway.address(), &build).await;
        let serve = async {
            for attempt in 1..=attempts {
                let (stream, _) =
                    within("a hello", other.listener.accept()).await.expect("a connection");
                let shaken = within("a handshake", acceptor.accept(stream)).await;
                assert_eq!(shaken.is_ok(), attempt == attempts, "{attempt} of {attempts}");
                let Ok(mut stream) = shaken else { continue };
                stream.write_all(b"log\n").await.expect("a log");
                stream.shutdown().await.expect("a shutdown");
            }
        };
        let ((), text) = tokio::join!(serve, client.text());
        assert_eq!(text, "log\n");
    }
}

/// The alert arrives before the handshake has authenticated the peer. An attacker on the path could
/// send it and then truncate a log, which is undetectable without our peer protocol.
#[tokio::test]
async fn peer_that_chose_our_protocol_is_never_dialed_without_it() {
    let other = Executor::start().await;
    let (_system, gateway, build, identity) = east_of(&other, "localhost").await;
    let acceptor = acceptor_with_protocols(&identity, &["zuul-fingergw/1"]);
    let mut client = Client::ask(gateway.address(), &build).await;
    let serve = async {
        let (stream, _) = within("a hello", other.listener.accept()).await.expect("a connection");
        let mut stream = within("a handshake", acceptor.accept(stream)).await.expect("TLS");
        stream.write_all(b"log\n").await.expect("a log");
        stream.shutdown().await.expect("a shutdown");
    };
    let ((), text) = tokio::join!(serve, client.text());
    assert_eq!(text, "log\n");

    let mut client = Client::ask(gateway.address(), &build).await;
    let (mut stream, _) = within("a hello", other.listener.accept()).await.expect("a connection");
    within("a hello", stream.read_exact(&mut [0; 64])).await.expect("a hello");
    // A fatal no_application_protocol in plain text (RFC 8446, sections 5.1 and 6).
    stream.write_all(&[21, 3, 3, 0, 2, 2, 120]).await.expect("an alert");
    tokio::select! {
        text = client.text() => assert_eq!(text, REFUSED),
        again = other.listener.accept() => panic!("dialed again: {again:?}"),
    }
}
