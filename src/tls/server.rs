//! The listening side.

use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::ServerConfig;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use tokio_rustls::TlsAcceptor;

use super::{Identity, provider};

/// The most plaintext in one record, in bytes.
///
/// zuul-web polls the socket and then reads 1024 bytes once: what a record holds beyond that stays
/// invisible in its TLS library until more arrives (`zuul/web/__init__.py`).
const PLAINTEXT_MAX: usize = 1024;

/// rustls counts a record's header into its limit.
const RECORD_HEADER: usize = 5;

/// Whether a TLS listener wants to see the client's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClientCertificate {
    /// None, no connection: what Zuul's own gateway does.
    Required,
    /// Checked if shown.
    Optional,
    /// Not asked for.
    None,
}

/// A TLS server that zuul-web can read from without its consoles freezing: small records, and no
/// session tickets, which would make the socket readable without any log to read.
pub(crate) fn acceptor(identity: &Identity, client: ClientCertificate) -> Result<TlsAcceptor> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .context("TLS versions")?;
    let verifier =
        || WebPkiClientVerifier::builder_with_provider(identity.roots.clone(), provider());
    let builder = match client {
        ClientCertificate::Required => builder.with_client_cert_verifier(verifier().build()?),
        ClientCertificate::Optional => {
            builder.with_client_cert_verifier(verifier().allow_unauthenticated().build()?)
        }
        ClientCertificate::None => builder.with_no_client_auth(),
    };
    let mut config = builder
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())
        .context("the certificate cannot be used by a server")?;
    config.max_fragment_size = Some(PLAINTEXT_MAX + RECORD_HEADER);
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(TlsAcceptor::from(Arc::new(config)))
}
