//! What the ZooKeeper client needs of an identity.

use anyhow::{Context, Result};
use rustls::pki_types::PrivateKeyDer;
use zookeeper_client::{TlsCa, TlsCerts, TlsDynamicCerts, TlsIdentity, TlsOptions};

use super::Identity;

/// Who we are for ZooKeeper, and whom we trust, in its client's terms.
///
/// # Errors
/// The client finds something amiss that [`Identity::load`] did not.
pub(crate) fn zookeeper_certs(identity: &Identity) -> Result<TlsCerts> {
    let Identity { chain, key, trust_anchors, .. } = identity;
    // The client takes PEM alone, and skips what it cannot read: it gets what this program has
    // read.
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
    let authority = TlsCa::from_pem(&ca).context("ZooKeeper's authority cannot be used")?;
    let own = TlsIdentity::from_pem(&cert, &key).context("ZooKeeper's client cannot use these")?;
    let certs = TlsCerts::builder().with_ca(authority).with_identity(own).build();
    certs.context("ZooKeeper's client cannot use these")
}

/// TLS with the `certs` of the moment of each connection.
pub(crate) fn zookeeper_options(certs: TlsDynamicCerts, verify_hostnames: bool) -> TlsOptions {
    let options = TlsOptions::new().with_certs(certs);
    if verify_hostnames { options } else { without_hostname_verification(options) }
}

#[expect(unsafe_code, reason = "the client marks the missing name check, not memory, as unsafe")]
fn without_hostname_verification(options: TlsOptions) -> TlsOptions {
    // SAFETY: touches no memory. The chain is still checked against the CA of the configuration;
    // Zuul's own services check no more (kazoo's default), and the certificates that its tools
    // make carry no names to check.
    unsafe { options.with_no_hostname_verification() }
}
