//! Tests of session resumption after a certificate has expired, in memory and with a test clock.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use rustls::client::ClientSessionStore;
use rustls::pki_types::{ServerName, UnixTime};
use rustls::time_provider::TimeProvider;
use rustls::{AlertDescription, CertificateError, ClientConfig, Error, HandshakeKind, NamedGroup};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio_rustls::TlsConnector;

use super::{Acceptor, Connector, Identity, PEER_PROTOCOL, acceptor, connector, provider};
use crate::config::{ClientCertificate, NameCheck};

const PORT: u16 = 7979;

/// The first second of 2030, in seconds since the epoch, when some certificates expire.
const END: u64 = 1_893_456_000;

/// A clock that shows half a minute before [`END`], and after `advance` half a minute after it.
#[derive(Debug)]
struct Clock(Mutex<u64>);

impl Clock {
    fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(END - 30)))
    }

    fn advance(&self) {
        *self.0.lock().unwrap() += 60;
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(*self.0.lock().unwrap())))
    }
}

/// Returns two identities from one CA whose certificates expire at the start of the years `ends`.
fn identities(ends: (i32, i32)) -> (Identity, Identity) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let authority = CertifiedIssuer::self_signed(params, key).unwrap();
    let identity = |year| {
        let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        params.not_after = date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &authority).unwrap().pem();
        Identity::from_pem(&cert, &key.serialize_pem(), &authority.pem()).unwrap()
    };
    (identity(ends.0), identity(ends.1))
}

/// The result of a handshake for the client and for the server. If it is a success, both have also
/// exchanged data.
type Outcome = (io::Result<HandshakeKind>, io::Result<HandshakeKind>);

/// Connects `dial` to `server` in memory.
async fn handshake<C, F>(server: &Acceptor, dial: C) -> Outcome
where
    C: FnOnce(tokio::io::DuplexStream) -> F,
    F: Future<Output = io::Result<tokio_rustls::client::TlsStream<tokio::io::DuplexStream>>>,
{
    let (near, far) = duplex(1 << 16);
    let client = async {
        let mut stream = dial(near).await?;
        stream.write_all(b"?").await?;
        // Tickets arrive before the response.
        let mut response = [0];
        stream.read_exact(&mut response).await?;
        Ok(stream.get_ref().1.handshake_kind().expect("a completed handshake"))
    };
    let server = async {
        let mut stream = server.accept(far).await?;
        let mut request = [0];
        stream.read_exact(&mut request).await?;
        stream.write_all(b"!").await?;
        stream.flush().await?;
        Ok(stream.get_ref().1.handshake_kind().expect("a completed handshake"))
    };
    tokio::join!(client, server)
}

fn name() -> ServerName<'static> {
    ServerName::try_from("localhost").unwrap()
}

fn server(identity: &Identity, clock: &Arc<dyn TimeProvider>) -> Acceptor {
    let acceptor = acceptor(identity, ClientCertificate::Required, NameCheck::SanOrCommonName);
    acceptor.unwrap().with_clock(clock)
}

/// Returns a client that offers sessions regardless of certificates, like those of other programs.
fn standard_client(
    identity: &Identity,
    clock: &Arc<dyn TimeProvider>,
    version: &'static rustls::SupportedProtocolVersion,
) -> TlsConnector {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(identity.trust_anchors.roots())
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())
        .unwrap();
    config.time_provider = Arc::clone(clock);
    config.alpn_protocols = vec![PEER_PROTOCOL.to_vec()];
    TlsConnector::from(Arc::new(config))
}

fn rustls_error(error: &io::Error) -> &Error {
    error.get_ref().and_then(|error| error.downcast_ref()).expect("an error of rustls")
}

fn is_expiry(error: &io::Error) -> bool {
    matches!(
        rustls_error(error),
        Error::InvalidCertificate(CertificateError::ExpiredContext { .. })
    )
}

#[tokio::test]
async fn client_with_an_expired_certificate_cannot_resume() {
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        let clock = Clock::new();
        let time: Arc<dyn TimeProvider> = clock.clone();
        let (ending, lasting) = identities((2030, 2040));
        let server = server(&lasting, &time);
        let client = standard_client(&ending, &time, version);
        let dial = |stream| client.connect(name(), stream);
        for expected in [HandshakeKind::Full, HandshakeKind::Resumed] {
            assert_eq!(
                handshake(&server, dial).await.1.expect("the certificate is valid"),
                expected
            );
        }
        clock.advance();
        let (_, refused) = handshake(&server, dial).await;
        assert!(is_expiry(&refused.expect_err("the certificate has expired")), "{version:?}");
    }
}

/// A chain may contain expired certificates that its verification does not use. Resumption must
/// accept such a chain because a full handshake does.
#[tokio::test]
async fn expired_certificate_that_is_not_used_does_not_prevent_resumption() {
    let clock = Clock::new();
    let time: Arc<dyn TimeProvider> = clock.clone();
    let (ending, lasting) = identities((2030, 2040));
    let (mut chained, server) = (identities((2040, 2040)).0, server(&lasting, &time));
    chained.chain = lasting.chain.iter().chain(&ending.chain).cloned().collect();
    chained.key = lasting.key.clone_key();
    chained.trust_anchors = Arc::clone(&lasting.trust_anchors);
    let client = standard_client(&chained, &time, &rustls::version::TLS13);
    let dial = |stream| client.connect(name(), stream);
    handshake(&server, dial).await.1.expect("the certificate is valid");
    clock.advance();
    assert_eq!(
        handshake(&server, dial).await.1.expect("the certificate is valid"),
        HandshakeKind::Resumed
    );
}

/// Connects `dialing` to a server with `serving` twice before [`END`], and returns the result of a
/// third connection after it.
async fn before_and_after(dialing: &Identity, serving: &Identity) -> Outcome {
    let clock = Clock::new();
    let time: Arc<dyn TimeProvider> = clock.clone();
    let server = server(serving, &time);
    let client = connector(dialing, NameCheck::SanOrCommonName).unwrap().with_clock(&time);
    let dial = |stream| {
        let client: Connector = client.clone();
        async move { client.connect(&name(), PORT, stream).await.map_err(|(error, _)| error) }
    };
    for expected in [HandshakeKind::Full, HandshakeKind::Resumed] {
        assert_eq!(handshake(&server, dial).await.0.expect("both are valid"), expected);
    }
    clock.advance();
    handshake(&server, dial).await
}

/// The handshake is then a full one and reports the expired certificate.
#[tokio::test]
async fn sessions_are_not_offered_after_a_certificate_has_expired() {
    let (ending, lasting) = identities((2030, 2040));
    let (theirs, _) = before_and_after(&lasting, &ending).await;
    assert!(is_expiry(&theirs.expect_err("the server's has expired")));
    let (ours, _) = before_and_after(&ending, &lasting).await;
    let alert = Error::AlertReceived(AlertDescription::CertificateExpired);
    assert_eq!(rustls_error(&ours.expect_err("the client's has expired")), &alert);
    let (first, second) = identities((2040, 2040));
    let (resumed, _) = before_and_after(&first, &second).await;
    assert_eq!(resumed.expect("both are valid"), HandshakeKind::Resumed);
}

/// Dials more servers than the cache holds. A session that arrives after its server's validity was
/// evicted is not cached, even if the server has a new entry without validity.
#[tokio::test]
async fn sessions_of_an_evicted_server_are_not_cached() {
    let (ending, lasting) = identities((2030, 2040));
    let clock = Clock::new();
    let time: Arc<dyn TimeProvider> = clock.clone();
    let server = server(&ending, &time);
    let client = connector(&lasting, NameCheck::SanOrCommonName).unwrap().with_clock(&time);
    let dial = async |stream| {
        let stream = client.connect(&name(), PORT, stream).await.map_err(|(error, _)| error);
        let sessions = client.at(PORT).sessions;
        for number in 0..300 {
            let other = ServerName::try_from(format!("gw{number}.example.org")).unwrap();
            sessions.set_kx_hint(other, NamedGroup::X25519);
        }
        sessions.set_kx_hint(name(), NamedGroup::X25519);
        stream
    };
    for _ in 0..2 {
        assert_eq!(handshake(&server, dial).await.0.expect("both are valid"), HandshakeKind::Full);
    }
    clock.advance();
    assert!(is_expiry(&handshake(&server, dial).await.0.expect_err("the server's has expired")));
}

/// Port forwards can make several gateways reachable under one name.
#[tokio::test]
async fn sessions_are_cached_by_port() {
    let (one, other) = identities((2040, 2040));
    let clock: Arc<dyn TimeProvider> = Clock::new();
    let servers = [server(&one, &clock), server(&other, &clock)];
    let client = connector(&one, NameCheck::SanOrCommonName).unwrap().with_clock(&clock);
    for expected in [HandshakeKind::Full, HandshakeKind::Resumed] {
        for (server, port) in servers.iter().zip([PORT, PORT + 1]) {
            let dial = async |stream| {
                client.connect(&name(), port, stream).await.map_err(|(error, _)| error)
            };
            assert_eq!(handshake(server, dial).await.0.expect("both are valid"), expected);
        }
    }
}
