//! The dialing side.

use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use tokio_rustls::TlsConnector;

use super::certificate::{is_commonly_named, is_constrained};
use super::sessions::Sessions;
use super::{GATEWAY_PROTOCOL, Identity, provider};

/// Which name a peer's certificate must carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Names {
    /// Any: `verify_hostnames = false`.
    Any,
    /// The one that was dialed, as an alternative name; or, where there are none, as the common name.
    Dialed,
    /// The one that was dialed, as an alternative name.
    DialedStrictly,
}

/// A TLS client that shows our certificate, sends the name it dials as SNI and checks the peer's
/// chain; and of its name as much as `names` says.
pub(crate) fn connector(identity: &Identity, names: Names) -> Result<TlsConnector> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .context("TLS versions")?;
    let webpki =
        WebPkiServerVerifier::builder_with_provider(identity.authorities.roots(), provider())
            .build()?;
    let constrained = identity.authorities.are_constrained();
    let verifier = Arc::new(Verifier { webpki, names, constrained });
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let mut config = builder
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())
        .context("the certificate cannot be used by a client")?;
    // Only gateways of our own kind hand out tickets, and they may be many.
    config.resumption = Resumption::store(Arc::new(Sessions::default()));
    config.alpn_protocols = vec![GATEWAY_PROTOCOL.to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Checks everything that [`WebPkiServerVerifier`] does, but may be content with another name. That
/// verifier looks at the name last, so its complaint about the name says that all else is well.
#[derive(Debug)]
struct Verifier {
    webpki: Arc<WebPkiServerVerifier>,
    names: Names,
    /// Some authority may issue for certain names only. Its word on a common name would get around
    /// that: webpki holds constraints against alternative names alone.
    constrained: bool,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.webpki.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        match verified {
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if match self.names {
                Names::Any => true,
                Names::Dialed => {
                    !self.constrained
                        && !intermediates.iter().any(is_constrained)
                        && is_commonly_named(end_entity, server_name)
                }
                Names::DialedStrictly => false,
            } =>
            {
                Ok(ServerCertVerified::assertion())
            }
            verified => verified,
        }
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
