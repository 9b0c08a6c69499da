//! What is written in a certificate for a name. Verifies nothing.

use rustls::pki_types::{CertificateDer, ServerName};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::oid_registry::OID_X509_EXT_NAME_CONSTRAINTS;
use x509_parser::parse_x509_certificate;

/// The names in a certificate, for people.
pub(super) fn told_names(certificate: &CertificateDer<'_>) -> String {
    names(certificate, true).join(" ").escape_default().take(200).collect()
}

/// Whether `certificate` has no alternative names at all and its common name is `name`.
///
/// RFC 6125, section 6.4.4, allows it as a last resort, OpenSSL and with it Python do it, and the
/// certificates that Zuul's own tools make have nothing else (`tools/zk-ca.sh`).
pub(super) fn is_commonly_named(certificate: &CertificateDer<'_>, name: &ServerName<'_>) -> bool {
    let Ok((_, certificate)) = parse_x509_certificate(certificate) else { return false };
    if !matches!(certificate.subject_alternative_name(), Ok(None)) {
        return false;
    }
    let name = name.to_str();
    common_name(&certificate).is_some_and(|common| matches(common, &name))
}

/// The DNS names in `certificate`: its alternative names; where it has none of any kind and
/// `common` names count, its common name.
pub(super) fn names(certificate: &CertificateDer<'_>, common: bool) -> Vec<String> {
    let Ok((_, certificate)) = parse_x509_certificate(certificate) else { return Vec::new() };
    match certificate.subject_alternative_name() {
        Ok(Some(extension)) => {
            let names = extension.value.general_names.iter();
            names
                .filter_map(|name| match name {
                    GeneralName::DNSName(name) => Some((*name).to_owned()),
                    _ => None,
                })
                .collect()
        }
        Ok(None) if common => common_name(&certificate).into_iter().map(str::to_owned).collect(),
        _ => Vec::new(),
    }
}

/// The common name; of several the last, the most specific.
pub(super) fn common_name<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a str> {
    certificate.subject().iter_common_name().last()?.as_str().ok()
}

/// Compares names without case; `*` stands for one whole label, the first (RFC 6125, section 6.4.3).
fn matches(pattern: &str, name: &str) -> bool {
    match (pattern.strip_prefix("*."), name.split_once('.')) {
        (Some(rest), Some((label, domain))) => {
            !label.is_empty() && rest.contains('.') && rest.eq_ignore_ascii_case(domain)
        }
        (Some(_), None) => false,
        (None, _) => pattern.eq_ignore_ascii_case(name),
    }
}

/// Whether `certificate`, an authority's, may issue for certain names only, or cannot be read.
pub(super) fn is_constrained(certificate: &CertificateDer<'_>) -> bool {
    let constraints = |certificate: &X509Certificate<'_>| {
        certificate.extensions().iter().any(|e| e.oid == OID_X509_EXT_NAME_CONSTRAINTS)
    };
    parse_x509_certificate(certificate).map_or(true, |(_, certificate)| constraints(&certificate))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    fn certificate(change: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "gw.example.org");
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().clone()
    }

    #[test]
    fn common_names() {
        let named = |certificate: &CertificateDer<'_>, name: &str| {
            is_commonly_named(certificate, &ServerName::try_from(name).unwrap())
        };
        let plain = certificate(|_| {});
        assert!(named(&plain, "gw.example.org") && named(&plain, "GW.example.ORG"));
        assert!(!named(&plain, "example.org") && !named(&plain, "192.0.2.1"));
        let other = certificate(|params| {
            params.subject_alt_names = vec![rcgen::SanType::DnsName("x.org".try_into().unwrap())];
        });
        assert!(!named(&other, "gw.example.org"), "alternative names count alone");
    }

    #[test]
    fn all_names() {
        let plain = certificate(|_| {});
        assert_eq!(names(&plain, true), ["gw.example.org"]);
        assert_eq!(names(&plain, false), [""; 0]);
        let dns = |name: &str| rcgen::SanType::DnsName(name.try_into().unwrap());
        let others = certificate(|params| {
            params.subject_alt_names = vec![
                dns("a.org"),
                rcgen::SanType::IpAddress([192, 0, 2, 1].into()),
                dns("*.b.org"),
            ];
        });
        assert_eq!(names(&others, true), ["a.org", "*.b.org"]);
        let address = certificate(|params| {
            params.subject_alt_names = vec![rcgen::SanType::IpAddress([192, 0, 2, 1].into())];
        });
        assert_eq!(names(&address, true), [""; 0], "alternative names count alone");
        assert_eq!(names(&CertificateDer::from(vec![0x30]), true), [""; 0]);
    }

    #[test]
    fn constraints() {
        use rcgen::{BasicConstraints, GeneralSubtree, IsCa, NameConstraints};
        let authority = |names: Option<&str>| {
            certificate(|params| {
                params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
                params.name_constraints = names.map(|name| NameConstraints {
                    permitted_subtrees: vec![GeneralSubtree::DnsName(name.to_owned())],
                    excluded_subtrees: Vec::new(),
                });
            })
        };
        assert!(is_constrained(&authority(Some("example.org"))));
        assert!(!is_constrained(&authority(None)));
        assert!(is_constrained(&CertificateDer::from(vec![0x30])), "who knows");
    }

    #[test]
    fn wildcards_stand_for_one_label() {
        assert!(matches("*.example.org", "gw.example.org"));
        assert!(!matches("*.example.org", "a.gw.example.org"));
        assert!(!matches("*.example.org", "example.org"));
        assert!(!matches("*.org", "example.org"), "not for whole domains");
        assert!(!matches("*", "localhost"));
    }
}
