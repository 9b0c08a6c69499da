//! The authorities of a `tls.ca`.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};
use rustls::{Error, RootCertStore};

use super::provider;

/// The certificates that peers' certificates must come from.
#[derive(Debug)]
pub(super) struct Authorities {
    certificates: Vec<CertificateDer<'static>>,
    revocation_lists: Vec<CertificateRevocationListDer<'static>>,
    roots: Arc<RootCertStore>,
}

impl Default for Authorities {
    fn default() -> Self {
        let roots = Arc::new(RootCertStore::empty());
        Self { certificates: Vec::new(), revocation_lists: Vec::new(), roots }
    }
}

impl PartialEq for Authorities {
    fn eq(&self, other: &Self) -> bool {
        self.certificates == other.certificates && self.revocation_lists == other.revocation_lists
    }
}

impl Authorities {
    /// Adds a certificate.
    ///
    /// # Errors
    /// rustls cannot read it.
    pub(super) fn add(&mut self, certificate: CertificateDer<'static>) -> Result<(), Error> {
        Arc::make_mut(&mut self.roots).add(certificate.clone())?;
        self.certificates.push(certificate);
        Ok(())
    }

    /// Adds a revocation list. Only the ZooKeeper client looks at them.
    ///
    /// # Errors
    /// rustls cannot read it; the ZooKeeper client would panic on it.
    pub(super) fn add_revocation_list(
        &mut self,
        list: CertificateRevocationListDer<'static>,
    ) -> Result<(), Error> {
        // The builder wants an authority, and parses the lists only when there is one.
        let roots = RootCertStore {
            roots: vec![rustls::pki_types::TrustAnchor {
                subject: [].as_slice().into(),
                subject_public_key_info: [].as_slice().into(),
                name_constraints: None,
            }],
        };
        let verifier = WebPkiServerVerifier::builder_with_provider(roots.into(), provider());
        let built = verifier.with_crls([list.clone()]).build();
        built.map_err(|error| Error::General(error.to_string()))?;
        self.revocation_lists.push(list);
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.certificates.is_empty()
    }

    pub(super) fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    pub(super) fn revocation_lists(&self) -> &[CertificateRevocationListDer<'static>] {
        &self.revocation_lists
    }

    /// The same certificates as rustls takes them.
    pub(super) fn roots(&self) -> Arc<RootCertStore> {
        Arc::clone(&self.roots)
    }

    /// Whether an authority may issue for certain names only (RFC 5280, section 4.2.1.10).
    pub(super) fn are_constrained(&self) -> bool {
        self.roots.roots.iter().any(|root| root.name_constraints.is_some())
    }
}
