//! The dialing side.

use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use tokio_rustls::TlsConnector;

use super::{GATEWAY_PROTOCOL, Identity, provider};

/// Gateways whose sessions are remembered.
const SESSIONS: usize = 256;

/// A TLS client that shows our certificate, sends the name it dials as SNI and checks the peer's
/// chain; with `verify_hostnames` its name as well.
pub(crate) fn connector(identity: &Identity, verify_hostnames: bool) -> Result<TlsConnector> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .context("TLS versions")?;
    let verifier =
        WebPkiServerVerifier::builder_with_provider(identity.roots.clone(), provider()).build()?;
    let builder = if verify_hostnames {
        builder.with_webpki_verifier(verifier)
    } else {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyName(verifier)))
    };
    let mut config = builder
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())
        .context("the certificate cannot be used by a client")?;
    // Only gateways of our own kind hand out tickets, and they may be many.
    config.resumption = Resumption::in_memory_sessions(SESSIONS);
    config.alpn_protocols = vec![GATEWAY_PROTOCOL.to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Checks everything that [`WebPkiServerVerifier`] does, but takes a valid certificate for any
/// name: `tls_verify_hostnames = false`. That verifier looks at the name last, so its complaint
/// about the name says that all else is well.
#[derive(Debug)]
struct AnyName(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified =
            self.0.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        match verified {
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, cert, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, cert, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
