//! What the ZooKeeper client needs of an identity.

use anyhow::{Context, Result};
use zookeeper_client::{TlsCa, TlsCerts, TlsDynamicCerts, TlsIdentity, TlsOptions};

use super::Identity;
use super::identity::Pem;

/// Who we are for ZooKeeper, and whom we trust, in its client's terms.
///
/// # Errors
/// The client finds something amiss that [`Identity::load`] did not.
pub(crate) fn zookeeper_certs(identity: &Identity) -> Result<TlsCerts> {
    let Pem { cert, key, ca } = &identity.pem;
    let authority = TlsCa::from_pem(ca).context("ZooKeeper's authority cannot be used")?;
    let own = TlsIdentity::from_pem(cert, key).context("ZooKeeper's client cannot use these")?;
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
