//! The CA certificates of a `tls.ca` file, and verification against them that accepts two cases
//! that webpki refuses.

use std::io;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor, UnixTime};
use rustls::{CertificateError, Error, OtherError, RootCertStore};
use x509_parser::asn1_rs::Any;
use x509_parser::prelude::{FromDer, X509Certificate, X509Name};

use super::certificate_names::Validity;
use super::provider;

/// How many certificates of a peer's chain have their issuers compared with the names of the CAs.
const CHAIN_MAX: usize = 8;

/// The most CAs that are tried with another spelling of their names. Bounded because
/// unauthenticated peers choose the names.
const RESPELLED_MAX: usize = 16;

const RESPELLED: &str = "its issuer is a CA in the file, but the name is written differently there \
                         (string type, case or spaces); issue one of the two again";

/// The CA certificates that must have issued the certificates of peers.
#[derive(Debug)]
pub(crate) struct TrustAnchors {
    certificates: Vec<CertificateDer<'static>>,
    revocation_lists: Vec<CertificateRevocationListDer<'static>>,
    roots: Arc<RootCertStore>,
    /// The subject of each certificate; empty where it cannot be read.
    subjects: Vec<Subject>,
    /// Accepts nothing that webpki refuses. The ZooKeeper client verifies with webpki, and our own
    /// diagnostics of its connections must come to the same result.
    webpki_alone: bool,
}

#[derive(Debug, Default)]
struct Subject {
    der: Vec<u8>,
    comparable: Vec<Rdn>,
}

/// The attributes of a relative distinguished name: type and comparable value.
type Rdn = Vec<(Vec<u8>, Vec<u8>)>;

impl Default for TrustAnchors {
    fn default() -> Self {
        let roots = Arc::new(RootCertStore::empty());
        let (certificates, subjects) = (Vec::new(), Vec::new());
        let revocation_lists = Vec::new();
        Self { certificates, revocation_lists, roots, subjects, webpki_alone: false }
    }
}

impl PartialEq for TrustAnchors {
    fn eq(&self, other: &Self) -> bool {
        self.certificates == other.certificates && self.revocation_lists == other.revocation_lists
    }
}

impl TrustAnchors {
    /// Adds a certificate.
    ///
    /// # Errors
    /// rustls cannot read it.
    pub(crate) fn add(&mut self, certificate: CertificateDer<'static>) -> Result<(), Error> {
        Arc::make_mut(&mut self.roots).add(certificate.clone())?;
        let subject = X509Certificate::from_der(&certificate).map(|(_, parsed)| Subject {
            der: parsed.subject().as_raw().to_vec(),
            comparable: comparable(parsed.subject()),
        });
        self.subjects.push(subject.unwrap_or_default());
        self.certificates.push(certificate);
        Ok(())
    }

    /// Adds a revocation list. Only the ZooKeeper client uses revocation lists.
    ///
    /// # Errors
    /// rustls cannot read it; the ZooKeeper client would panic on it.
    pub(crate) fn add_revocation_list(
        &mut self,
        list: CertificateRevocationListDer<'static>,
    ) -> Result<(), Error> {
        // The builder parses the lists only if there is a CA.
        let roots = RootCertStore {
            roots: vec![TrustAnchor {
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

    /// Returns these trust anchors in the mode that accepts nothing that webpki refuses.
    pub(crate) fn with_webpki_alone(self) -> Self {
        Self { webpki_alone: true, ..self }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.certificates.is_empty()
    }

    pub(crate) fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    pub(crate) fn revocation_lists(&self) -> &[CertificateRevocationListDer<'static>] {
        &self.revocation_lists
    }

    /// Returns the certificates in the form that rustls takes.
    pub(crate) fn roots(&self) -> Arc<RootCertStore> {
        Arc::clone(&self.roots)
    }

    /// Whether a CA has name constraints (RFC 5280, section 4.2.1.10).
    pub(crate) fn are_constrained(&self) -> bool {
        self.roots.roots.iter().any(|root| root.name_constraints.is_some())
    }

    /// Verifies the certificate `own` and its `intermediates` with `verify`, which is passed the
    /// CAs to use. Accepts two kinds of certificates that `verify` refuses:
    ///
    /// - A certificate whose issuer is a CA of the file with its name written differently (RFC
    ///   5280, section 7.1): in another string type, case or white space. webpki compares bytes.
    /// - A certificate that is itself in the file, while it is valid. The operator has configured
    ///   exactly that certificate; webpki refuses a CA certificate as a peer's own.
    ///
    /// # Errors
    /// The error of `verify`.
    pub(crate) fn verify(
        &self,
        own: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        verify: impl Fn(Arc<RootCertStore>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let error = match verify(self.roots()) {
            Err(error @ Error::InvalidCertificate(_)) => error,
            other => return other,
        };
        if self.webpki_alone {
            return Err(match self.respelled(own, intermediates) {
                Some(_) => Error::InvalidCertificate(CertificateError::Other(OtherError(
                    Arc::new(io::Error::other(RESPELLED)),
                ))),
                None => error,
            });
        }
        if self.certificates.contains(own) {
            return Validity::of(own).map_or(Err(error), |validity| validity.check(now));
        }
        // Any error may have this cause, because another CA may have the name in the issuer's
        // spelling.
        match self.respelled(own, intermediates) {
            Some(roots) => verify(Arc::new(roots)).map_err(|_| error),
            None => Err(error),
        }
    }

    /// Returns the CAs that are an issuer in this chain, with the issuer's spelling of their names;
    /// `None` if no spelling differs. At most [`RESPELLED_MAX`].
    fn respelled(
        &self,
        own: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Option<RootCertStore> {
        let mut roots: Vec<TrustAnchor<'static>> = Vec::new();
        for certificate in [own].into_iter().chain(intermediates).take(CHAIN_MAX) {
            let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { continue };
            let issuer = certificate.issuer();
            // The subject of a trust anchor has no sequence header.
            let Ok((_, name)) = Any::from_der(issuer.as_raw()) else { continue };
            if roots.iter().any(|root| root.subject.as_ref() == name.data) {
                continue;
            }
            let wanted = comparable(issuer);
            let anchors = self.subjects.iter().zip(&self.roots.roots);
            let same = anchors.filter(|(subject, _)| {
                subject.comparable == wanted && subject.der != issuer.as_raw()
            });
            let room = RESPELLED_MAX - roots.len();
            roots.extend(same.take(room).map(|(_, anchor)| TrustAnchor {
                subject: name.data.to_vec().into(),
                ..anchor.clone()
            }));
        }
        (!roots.is_empty()).then_some(RootCertStore { roots })
    }
}

/// Returns a name in its comparable form: lower case, single spaces (RFC 5280, section 7.1).
fn comparable(name: &X509Name<'_>) -> Vec<Rdn> {
    let of = |rdn: &x509_parser::x509::RelativeDistinguishedName<'_>| {
        let attributes = rdn.iter().map(|attribute| {
            let value = attribute.as_str().map_or_else(
                |_| attribute.attr_value().data.to_vec(),
                |text| {
                    let words: Vec<_> = text.split_whitespace().collect();
                    words.join(" ").to_lowercase().into_bytes()
                },
            );
            (attribute.attr_type().as_bytes().to_vec(), value)
        });
        let mut attributes: Rdn = attributes.collect();
        attributes.sort();
        attributes
    };
    name.iter_rdn().map(of).collect()
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, DnValue,
        IsCa, KeyPair,
    };
    use rustls::server::ParsedCertificate;

    use super::*;

    fn params(name: DnValue) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
    }

    /// Peers choose how many CAs are respelled, and how often.
    #[test]
    fn respelled_cas_are_bounded_and_unique() {
        let authority = |name: &str| params(DnValue::Utf8String(name.to_owned()));
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(authority("test CA"), key).expect("an issuer");
        let leaf = CertificateParams::new(["gw.example.org".to_owned()]).expect("a name");
        let key = KeyPair::generate().expect("a key");
        let leaf = leaf.signed_by(&key, &issuer).expect("a leaf").der().clone();
        let chain = vec![leaf.clone(); CHAIN_MAX];
        let mut trust_anchors = TrustAnchors::default();
        for count in 1..=2 * RESPELLED_MAX {
            let root = authority("Test CA").self_signed(&key).expect("a root").der().clone();
            trust_anchors.add(root).expect("a root");
            let respelled = trust_anchors.respelled(&leaf, &chain).expect("another spelling");
            assert_eq!(respelled.len(), count.min(RESPELLED_MAX));
        }
    }

    /// Cases: the issuer's name in the leaf, the CA's name, and whether they are the same name.
    #[test]
    fn names_that_differ_in_type_case_and_space_are_equal() {
        let utf8 = |name: &str| DnValue::Utf8String(name.to_owned());
        let printable = |name: &str| DnValue::PrintableString(name.try_into().expect("letters"));
        for (issuer, subject, same) in [
            (utf8("test CA"), utf8("test CA"), true),
            (utf8("test CA"), printable("test CA"), true),
            (printable("test CA"), utf8("Test  ca "), true),
            (printable("test CA"), utf8("testCA"), false),
        ] {
            let issuer = params(issuer);
            let key = KeyPair::generate().expect("a key");
            let root = params(subject).self_signed(&key).expect("a root").der().clone();
            let issuer = CertifiedIssuer::self_signed(issuer, key).expect("an issuer");
            let leaf = CertificateParams::new(["gw.example.org".to_owned()]).expect("a name");
            let key = KeyPair::generate().expect("a key");
            let leaf = leaf.signed_by(&key, &issuer).expect("a leaf").der().clone();
            let mut trust_anchors = TrustAnchors::default();
            trust_anchors.add(root).expect("a root");
            let now = UnixTime::now();
            let verified = trust_anchors.verify(&leaf, &[], now, |roots| {
                let algorithms = provider().signature_verification_algorithms.all;
                let parsed = ParsedCertificate::try_from(&leaf)?;
                let verify = rustls::client::verify_server_cert_signed_by_trust_anchor;
                verify(&parsed, &roots, &[], now, algorithms)
            });
            assert_eq!(verified.is_ok(), same, "{verified:?}");
        }
    }
}
