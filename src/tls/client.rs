//! The client side of TLS: connections to other gateways.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
#[cfg(test)]
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::certificate_names::{Validity, is_commonly_named, is_constrained};
use super::session_cache::SessionCache;
use super::trust_anchors::TrustAnchors;
use super::{Identity, PEER_PROTOCOL, is_peer_gateway, provider};
use crate::config::NameCheck;

/// The most ports with cached sessions. One more clears the cache, which costs each server one full
/// handshake.
const PORTS: usize = 64;

/// Connects to TLS servers. Presents our certificate, sends the dialed name as SNI, and verifies
/// the server's chain and, as configured, its name.
#[derive(Clone)]
pub(crate) struct Connector(Arc<Inner>);

struct Inner {
    /// The configuration from which those of the ports are made.
    config: ClientConfig,
    trust_anchors: Arc<TrustAnchors>,
    names: NameCheck,
    /// The validity of our own certificate.
    own: Validity,
    /// Sessions by port: rustls distinguishes servers only by name, and several servers may share
    /// one.
    ports: Mutex<HashMap<u16, Port>>,
}

#[derive(Clone)]
pub(crate) struct Port {
    connector: TlsConnector,
    pub(crate) sessions: Arc<SessionCache>,
}

/// Returns a connector that presents `identity`.
///
/// # Errors
/// The identity cannot be used for a client.
pub(crate) fn connector(identity: &Identity, names: NameCheck) -> Result<Connector> {
    let trust_anchors = Arc::clone(&identity.trust_anchors);
    let verifier = Verifier::new(Arc::clone(&trust_anchors), names, None);
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .context("TLS versions")?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())
        .context("the certificate cannot be used by a client")?;
    let own = identity.chain.first().and_then(Validity::of).unwrap_or_default();
    let ports = Mutex::default();
    Ok(Connector(Arc::new(Inner { config, trust_anchors, names, own, ports })))
}

impl Connector {
    /// Performs the handshake on `stream`, a connection to the gateway at `name` and `port`, and
    /// offers the peer protocol. The caller sets the deadline.
    ///
    /// # Errors
    /// The reason why the handshake failed, and the stream without TLS.
    pub(crate) async fn connect<IO>(
        &self,
        name: &ServerName<'static>,
        port: u16,
        stream: IO,
    ) -> Result<TlsStream<IO>, (io::Error, IO)>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let Port { connector, sessions } = self.at(port);
        let omit = sessions.omits_protocols(name);
        let protocols = if omit { Vec::new() } else { vec![PEER_PROTOCOL.to_vec()] };
        let connector = connector.with_alpn(protocols);
        let stream = connector.connect(name.clone(), stream).into_fallible().await?;
        if is_peer_gateway(stream.get_ref().1) {
            sessions.set_peer_gateway(name);
        }
        Ok(stream)
    }

    /// Stops offering protocols to the gateway at `name` and `port` for an hour. Returns `false` if
    /// none were offered, or if the gateway has selected ours before: then the refusal is final,
    /// because it may come from an attacker on the path.
    pub(crate) fn omit_protocols(&self, name: &ServerName<'_>, port: u16) -> bool {
        self.at(port).sessions.omit_protocols(name)
    }

    /// Performs the handshake on `stream`, a connection to a server that is not a gateway, without
    /// ALPN.
    pub(crate) async fn connect_plainly<IO>(
        &self,
        name: ServerName<'static>,
        port: u16,
        stream: IO,
    ) -> io::Result<TlsStream<IO>>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        self.at(port).connector.connect(name, stream).await
    }

    /// Removes all TLS sessions from memory, up to 512 KiB for each gateway.
    pub(crate) fn forget_sessions(&self) {
        let mut ports = self.0.ports.lock().unwrap_or_else(PoisonError::into_inner);
        // Open connections refer to them as well.
        for (_, port) in ports.drain() {
            port.sessions.clear();
        }
    }

    #[cfg(test)]
    pub(crate) fn with_clock(self, clock: &Arc<dyn TimeProvider>) -> Self {
        let mut inner = Arc::into_inner(self.0).expect("nothing else uses it yet");
        inner.config.time_provider = Arc::clone(clock);
        Self(Arc::new(inner))
    }

    /// Returns the configuration and the session cache for servers at `port`.
    pub(crate) fn at(&self, port: u16) -> Port {
        let Inner { config, trust_anchors, names, own, ports } = &*self.0;
        // Consistent between any two statements, so poisoning does no harm.
        let mut ports = ports.lock().unwrap_or_else(PoisonError::into_inner);
        if ports.len() >= PORTS && !ports.contains_key(&port) {
            ports.clear();
        }
        let at_port = ports.entry(port).or_insert_with(|| {
            let sessions = Arc::new(SessionCache::new(*own, Arc::clone(&config.time_provider)));
            let verifier =
                Verifier::new(Arc::clone(trust_anchors), *names, Some(Arc::clone(&sessions)));
            let mut config = config.clone();
            config.dangerous().set_certificate_verifier(Arc::new(verifier));
            config.resumption = Resumption::store(Arc::clone(&sessions) as Arc<_>);
            Port { connector: TlsConnector::from(Arc::new(config)), sessions }
        });
        at_port.clone()
    }
}

/// Verifies the chain of a server's certificate and then, in a separate step, its name as far as
/// [`NameCheck`] requires. Because the steps are separate, a disabled name check cannot weaken the
/// verification of the chain.
#[derive(Debug)]
pub(crate) struct Verifier {
    pub(crate) trust_anchors: Arc<TrustAnchors>,
    pub(crate) names: NameCheck,
    algorithms: WebPkiSupportedAlgorithms,
    /// The cache for sessions of verified servers.
    sessions: Option<Arc<SessionCache>>,
}

impl Verifier {
    pub(crate) fn new(
        trust_anchors: Arc<TrustAnchors>,
        names: NameCheck,
        sessions: Option<Arc<SessionCache>>,
    ) -> Self {
        let algorithms = provider().signature_verification_algorithms;
        Self { trust_anchors, names, algorithms, sessions }
    }

    fn verify_name(
        &self,
        end_entity: &CertificateDer<'_>,
        parsed: &ParsedCertificate<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
    ) -> Result<(), Error> {
        if self.names == NameCheck::Off {
            return Ok(());
        }
        let error = match verify_server_name(parsed, name) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        // webpki applies name constraints only to alternative names, so a common name would bypass
        // them.
        let constrained =
            || self.trust_anchors.are_constrained() || intermediates.iter().any(is_constrained);
        if self.names == NameCheck::SanOrCommonName
            && is_commonly_named(end_entity, name)
            && !constrained()
        {
            return Ok(());
        }
        Err(error)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        self.trust_anchors.verify(end_entity, intermediates, now, |roots| {
            let algorithms = self.algorithms.all;
            verify_server_cert_signed_by_trust_anchor(
                &parsed,
                &roots,
                intermediates,
                now,
                algorithms,
            )
        })?;
        self.verify_name(end_entity, &parsed, intermediates, server_name)?;
        if let Some(sessions) = &self.sessions {
            let chain = [end_entity].into_iter().chain(intermediates);
            sessions.limit(server_name, Validity::of_chain(chain, now));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
