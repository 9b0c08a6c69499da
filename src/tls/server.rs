//! The server side of TLS: connections from clients and other gateways.

use std::io;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::aws_lc_rs::Ticketer;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{
    Acceptor as HelloReader, ClientCertVerifierBuilder, NoServerSessionStorage,
    WebPkiClientVerifier,
};
#[cfg(test)]
use rustls::time_provider::TimeProvider;
use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, HandshakeKind, RootCertStore, ServerConfig,
    ServerConnection, SignatureScheme,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use super::certificate_names;
use super::certificate_names::{Validity, is_constrained};
use super::trust_anchors::TrustAnchors;
use super::{Identity, PEER_PROTOCOL, provider};
use crate::config::{ClientCertificate, NameCheck};

/// The most plaintext in one record, in bytes.
///
/// zuul-web polls the socket and then reads 1024 bytes once: further bytes of a record stay in its
/// TLS library until more records arrive (`zuul/web/__init__.py`).
const PLAINTEXT_MAX: usize = 1024;

/// The length of a record header in bytes, which rustls includes in its limit.
const RECORD_HEADER: usize = 5;

/// Performs TLS handshakes with clients.
#[derive(Clone)]
pub(crate) struct Acceptor {
    /// For zuul-web and all other clients that are not peer gateways: small records and no session
    /// tickets. Consoles of zuul-web freeze on larger records, and on tickets, which make the
    /// socket readable without log data.
    compat: Arc<ServerConfig>,
    /// For peer gateways, which negotiate the peer protocol: full records and session resumption.
    peer_gateway: Arc<ServerConfig>,
    /// Whether the common name of a client's certificate is one of its names.
    common_names: bool,
    /// `None` if no client certificate is requested.
    verifier: Option<Arc<ClientVerifier>>,
}

/// Returns an acceptor that presents `identity` and requests client certificates as `client`
/// requires.
///
/// `name_check` decides, as for gateways that are dialed, whether the common name of a client's
/// certificate is one of its names. It never is if a CA has name constraints.
///
/// # Errors
/// The identity cannot be used for a server.
pub(crate) fn acceptor(
    identity: &Identity,
    client: ClientCertificate,
    name_check: NameCheck,
) -> Result<Acceptor> {
    let verifier = match client {
        ClientCertificate::Required => Some(ClientVerifier::new(&identity.trust_anchors, true)?),
        ClientCertificate::Optional => Some(ClientVerifier::new(&identity.trust_anchors, false)?),
        ClientCertificate::None => None,
    };
    let verifier = verifier.map(Arc::new);
    let mut compat = config(identity, verifier.as_ref())?;
    compat.max_fragment_size = Some(PLAINTEXT_MAX + RECORD_HEADER);
    compat.send_tls13_tickets = 0;
    compat.session_storage = Arc::new(NoServerSessionStorage {});
    let mut peer_gateway = config(identity, verifier.as_ref())?;
    peer_gateway.alpn_protocols = vec![PEER_PROTOCOL.to_vec()];
    peer_gateway.ticketer = Ticketer::new().context("no key for session tickets")?;
    let constrained = identity.trust_anchors.are_constrained();
    let common_names = name_check != NameCheck::SanOnly && !constrained;
    Ok(Acceptor {
        compat: Arc::new(compat),
        peer_gateway: Arc::new(peer_gateway),
        common_names,
        verifier,
    })
}

fn config(identity: &Identity, verifier: Option<&Arc<ClientVerifier>>) -> Result<ServerConfig> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .context("TLS versions")?;
    let builder = match verifier {
        Some(verifier) => builder.with_client_cert_verifier(Arc::clone(verifier) as Arc<_>),
        None => builder.with_no_client_auth(),
    };
    builder
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())
        .context("the certificate cannot be used by a server")
}

/// Verifies the certificates of clients.
#[derive(Debug)]
pub(crate) struct ClientVerifier {
    webpki: Arc<dyn ClientCertVerifier>,
    trust_anchors: Arc<TrustAnchors>,
}

impl ClientVerifier {
    /// Returns a verifier that requires a certificate if `mandatory`.
    pub(crate) fn new(trust_anchors: &Arc<TrustAnchors>, mandatory: bool) -> Result<Self> {
        let builder = builder(trust_anchors.roots());
        let builder = if mandatory { builder } else { builder.allow_unauthenticated() };
        Ok(Self { webpki: builder.build()?, trust_anchors: Arc::clone(trust_anchors) })
    }
}

/// Returns a builder that omits the names of the CAs, which TLS would send to each client: more
/// than 64 KiB of them make a message that no client can read, and they would disclose the trusted
/// CAs.
fn builder(roots: Arc<RootCertStore>) -> ClientCertVerifierBuilder {
    WebPkiClientVerifier::builder_with_provider(roots, provider()).clear_root_hint_subjects()
}

impl ClientCertVerifier for ClientVerifier {
    fn offer_client_auth(&self) -> bool {
        self.webpki.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.webpki.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.webpki.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.trust_anchors.verify(end_entity, intermediates, now, |roots| {
            let webpki = if Arc::ptr_eq(&roots, &self.trust_anchors.roots()) {
                Arc::clone(&self.webpki)
            } else {
                builder(roots).build().map_err(|error| Error::General(error.to_string()))?
            };
            webpki.verify_client_cert(end_entity, intermediates, now).map(drop)
        })?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls12_signature(message, cert, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls13_signature(message, cert, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

impl Acceptor {
    /// Returns the names of a client that has presented `chain`, which must have been verified.
    pub(crate) fn names_of(&self, chain: &[CertificateDer<'_>]) -> Vec<String> {
        let Some((own, intermediates)) = chain.split_first() else { return Vec::new() };
        let common = self.common_names && !intermediates.iter().any(is_constrained);
        certificate_names::names(own, common)
    }

    /// Performs the handshake on `stream`. The caller sets the deadline.
    pub(crate) async fn accept<IO>(&self, stream: IO) -> io::Result<TlsStream<IO>>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let start = LazyConfigAcceptor::new(HelloReader::default(), stream).await?;
        let is_peer_gateway = {
            let mut offered = start.client_hello().alpn().into_iter().flatten();
            offered.any(|protocol| protocol == PEER_PROTOCOL)
        };
        let config = if is_peer_gateway { &self.peer_gateway } else { &self.compat };
        let stream = start.into_stream(Arc::clone(config)).await?;
        self.verify_resumed(stream.get_ref().1)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(stream)
    }

    #[cfg(test)]
    pub(crate) fn with_clock(mut self, clock: &Arc<dyn TimeProvider>) -> Self {
        for config in [&mut self.compat, &mut self.peer_gateway] {
            Arc::make_mut(config).time_provider = Arc::clone(clock);
        }
        self
    }

    /// Verifies the certificate of a client that has resumed a session, if a certificate of its
    /// chain is no longer valid. rustls takes the chain from the session without verification.
    fn verify_resumed(&self, connection: &ServerConnection) -> Result<(), Error> {
        if connection.handshake_kind() != Some(HandshakeKind::Resumed) {
            return Ok(());
        }
        let chain = connection.peer_certificates().and_then(<[_]>::split_first);
        let (Some(verifier), Some((own, others))) = (&self.verifier, chain) else { return Ok(()) };
        let now =
            self.peer_gateway.time_provider.current_time().ok_or(Error::FailedToGetCurrentTime)?;
        let is_valid = |certificate| Validity::of(certificate).is_some_and(|v| v.contains(now));
        if [own].into_iter().chain(others).all(is_valid) {
            return Ok(());
        }
        // The chain may contain expired certificates that its verification does not use.
        verifier.verify_client_cert(own, others, now).map(drop)
    }
}
