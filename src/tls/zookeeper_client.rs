//! Converts an identity to the TLS settings of the ZooKeeper client.

use anyhow::{Context, Result};
use rustls::pki_types::PrivateKeyDer;
use zookeeper_client::{TlsCa, TlsCerts, TlsDynamicCerts, TlsIdentity, TlsOptions};

use super::Identity;

/// Returns the certificates, key and CAs of `identity` for the ZooKeeper client.
///
/// # Errors
/// The client refuses something that [`Identity::load`] accepted.
pub(crate) fn zookeeper_certs(identity: &Identity) -> Result<TlsCerts> {
    let Identity { chain, key, trust_anchors, .. } = identity;
    // The client takes only PEM and skips blocks that it cannot read. It gets exactly the blocks
    // that this program has read.
    let blocks = |label: &str, blocks: &mut dyn Iterator<Item = &[u8]>| -> String {
        blocks.map(|der| ::pem::encode(&::pem::Pem::new(label, der))).collect()
    };
    let certificates = &mut trust_anchors.certificates().iter().map(AsRef::as_ref);
    let revoked = &mut trust_anchors.revocation_lists().iter().map(AsRef::as_ref);
    let ca = blocks("CERTIFICATE", certificates) + &blocks("X509 CRL", revoked);
    let cert = blocks("CERTIFICATE", &mut chain.iter().map(AsRef::as_ref));
    let label = match key {
        PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
        PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
        _ => "PRIVATE KEY",
    };
    let key = blocks(label, &mut std::iter::once(key.secret_der()));
    let ca = TlsCa::from_pem(&ca).context("the ZooKeeper client cannot use the CA file")?;
    let own = TlsIdentity::from_pem(&cert, &key)
        .context("the ZooKeeper client cannot use the certificate and key")?;
    let certs = TlsCerts::builder().with_ca(ca).with_identity(own).build();
    certs.context("the ZooKeeper client cannot use the certificate and key")
}

/// Returns TLS options that take the current `certs` at each connection.
pub(crate) fn zookeeper_options(certs: TlsDynamicCerts, verify_hostnames: bool) -> TlsOptions {
    let options = TlsOptions::new().with_certs(certs);
    if verify_hostnames { options } else { without_hostname_verification(options) }
}

#[expect(unsafe_code, reason = "the client marks the missing name check, not memory, as unsafe")]
fn without_hostname_verification(options: TlsOptions) -> TlsOptions {
    // SAFETY: touches no memory. The chain is still verified against the configured CA. Zuul's own
    // services verify no more (kazoo's default), and the certificates that its tools make have no
    // names to verify.
    unsafe { options.with_no_hostname_verification() }
}
