//! TLS for both sides of the gateway: one provider, certificates from PEM, a server and a client
//! configuration.

pub(crate) mod certificate_lint;
pub(crate) mod certificate_names;
pub(crate) mod client;
pub(crate) mod error_text;
pub(crate) mod file_format;
pub(crate) mod handshake_error;
pub(crate) mod identity;
pub(crate) mod identity_lint;
#[cfg(feature = "otlp")]
pub(crate) mod otlp_client;
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
#[cfg(feature = "otlp")]
pub(crate) use self::otlp_client::collector_connector;
pub(crate) use self::server::{Acceptor, acceptor};
pub(crate) use self::zookeeper_client::{zookeeper_certs, zookeeper_options};

/// The ALPN name of the protocol between gateways of this kind (`gateway::protocol`). Zuul's gateway
/// ignores ALPN.
pub(crate) const PEER_PROTOCOL: &[u8] = b"zuul-fingergw/1";

/// The names in the certificate of a peer that has shown `chain`, for messages.
pub(crate) fn names_of_peer(chain: Option<&[CertificateDer<'_>]>) -> String {
    chain.and_then(<[_]>::first).map(certificate_names::display_names).unwrap_or_default()
}

/// Returns whether `connection` has negotiated the peer protocol.
pub(crate) fn is_peer_gateway(connection: &CommonState) -> bool {
    connection.alpn_protocol() == Some(PEER_PROTOCOL)
}

/// The cryptography of every connection, ZooKeeper's included.
///
/// X25519 first and without a post-quantum share: such a ClientHello is longer than one TCP
/// segment, and proxies that look for the SNI in their first read miss it. To which AES with 128
/// bits is an equal, and SHA-256 the one that processors have instructions for.
fn provider() -> Arc<CryptoProvider> {
    use aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
    use aws_lc_rs::kx_group::{SECP256R1, SECP384R1, X25519};
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![X25519, SECP256R1, SECP384R1];
    // The others in their order behind it.
    provider.cipher_suites.sort_by_key(|suite| *suite != TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// Makes [`provider`], with the signature algorithms for ZooKeeper, the process's default, which
/// only the ZooKeeper client uses. Call before anything else uses TLS; later calls change nothing.
pub(crate) fn install_provider() {
    let provider = CryptoProvider {
        signature_verification_algorithms: *signatures::ALGORITHMS,
        ..Arc::unwrap_or_clone(provider())
    };
    // An error says that a default is there already: this one, from an earlier call.
    let _ = provider.install_default();
}
