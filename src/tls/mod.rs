//! TLS of both ends of a connection: the cryptographic provider, identities read from PEM files,
//! and the configurations of servers and clients.

pub(crate) mod certificate_lint;
pub(crate) mod certificate_names;
pub(crate) mod client;
pub(crate) mod error_text;
pub(crate) mod file_format;
pub(crate) mod handshake_error;
pub(crate) mod identity;
pub(crate) mod identity_lint;
pub(crate) mod pem;
pub(crate) mod private_key;
#[cfg(test)]
pub(crate) mod resumption;
pub(crate) mod server;
pub(crate) mod session_cache;
pub(crate) mod signatures;
pub(crate) mod trust_anchors;
pub(crate) mod zookeeper_client;

use std::sync::Arc;

use rustls::CommonState;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::CertificateDer;

pub(crate) use self::certificate_lint::{CertificatePurpose, Finding};
pub(crate) use self::client::{Connector, connector};
pub(crate) use self::error_text::describe;
pub(crate) use self::handshake_error::HandshakeFailure;
pub(crate) use self::identity::Identity;
pub(crate) use self::server::{Acceptor, acceptor};
pub(crate) use self::zookeeper_client::{zookeeper_certs, zookeeper_options};

/// The ALPN name of the protocol between peer gateways (`gateway::protocol`). Zuul's gateway
/// ignores ALPN.
pub(crate) const PEER_PROTOCOL: &[u8] = b"zuul-fingergw/1";

/// Returns the names in the certificate of a peer that has presented `chain`, for messages.
pub(crate) fn names_of_peer(chain: Option<&[CertificateDer<'_>]>) -> String {
    chain.and_then(<[_]>::first).map(certificate_names::display_names).unwrap_or_default()
}

/// Whether `connection` has negotiated the peer protocol.
pub(crate) fn is_peer_gateway(connection: &CommonState) -> bool {
    connection.alpn_protocol() == Some(PEER_PROTOCOL)
}

/// Returns the cryptographic provider of all connections, including those to ZooKeeper.
///
/// X25519 comes first, and no post-quantum key share is sent: it makes the ClientHello longer than
/// one TCP segment, and proxies that look for the SNI in their first read miss it. AES-128 with
/// SHA-256 comes first because it is as strong as X25519, and processors have instructions for
/// both.
fn provider() -> Arc<CryptoProvider> {
    use aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
    use aws_lc_rs::kx_group::{SECP256R1, SECP384R1, X25519};
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![X25519, SECP256R1, SECP384R1];
    // The sort is stable: the others keep their order.
    provider.cipher_suites.sort_by_key(|suite| *suite != TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// Installs [`provider`], with the signature algorithms for ZooKeeper, as the default of the
/// process, which only the ZooKeeper client uses. Must be called before anything else uses TLS;
/// later calls do nothing.
pub(crate) fn install_provider() {
    let provider = CryptoProvider {
        signature_verification_algorithms: *signatures::ALGORITHMS,
        ..Arc::unwrap_or_clone(provider())
    };
    // Fails only if an earlier call has installed the same provider.
    let _ = provider.install_default();
}
