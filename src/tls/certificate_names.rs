//! Reads names and dates of certificates. Verifies no signature.

use std::time::Duration;

use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, Error};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry::{OID_X509_EXT_NAME_CONSTRAINTS, OID_X509_EXT_SUBJECT_ALT_NAME};
use x509_parser::parse_x509_certificate;

/// Returns the names in a certificate for a message: printable, at most 200 characters.
pub(crate) fn display_names(certificate: &CertificateDer<'_>) -> String {
    names(certificate, true).join(" ").escape_default().take(200).collect()
}

/// Whether `certificate` is valid for `name` by its common name. The common name is used only if
/// there is no alternative name of type DNS or, when `name` is an address, no alternative name at
/// all.
///
/// RFC 6125, section 6.4.4, allows this as a last resort. OpenSSL, and with it Python, does the
/// same, and the certificates that Zuul's own tools make have only a common name
/// (`tools/zk-ca.sh`).
pub(crate) fn is_commonly_named(certificate: &CertificateDer<'_>, name: &ServerName<'_>) -> bool {
    let Ok((_, certificate)) = parse_x509_certificate(certificate) else { return false };
    let names = certificate.subject_alternative_name();
    let counts = match name {
        ServerName::DnsName(_) => dns_names(&certificate).is_some_and(|names| names.is_empty()),
        _ => matches!(names, Ok(None)),
    };
    let name = name.to_str();
    counts && common_name(&certificate).is_some_and(|common| matches(common, &name))
}

/// Returns the DNS names in `certificate`: its alternative names or, with `common` and if none of
/// them is a DNS name, its common name.
pub(crate) fn names(certificate: &CertificateDer<'_>, common: bool) -> Vec<String> {
    let Ok((_, certificate)) = parse_x509_certificate(certificate) else { return Vec::new() };
    match dns_names(&certificate) {
        Some(names) if names.is_empty() && common => {
            common_name(&certificate).into_iter().map(str::to_owned).collect()
        }
        names => names.unwrap_or_default().into_iter().map(str::to_owned).collect(),
    }
}

/// Returns the alternative names of type DNS; `None` if the extension cannot be read.
pub(crate) fn dns_names<'a>(certificate: &X509Certificate<'a>) -> Option<Vec<&'a str>> {
    let extensions = certificate.extensions().iter();
    let mut names = Vec::new();
    for extension in extensions.filter(|e| e.oid == OID_X509_EXT_SUBJECT_ALT_NAME) {
        let ParsedExtension::SubjectAlternativeName(alternative) = extension.parsed_extension()
        else {
            return None;
        };
        names.extend(alternative.general_names.iter().filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(*name),
            _ => None,
        }));
    }
    Some(names)
}

/// The validity period of a certificate, in seconds since the epoch, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Validity {
    pub(crate) from: i64,
    pub(crate) until: i64,
}

impl Default for Validity {
    /// Returns a period without bounds.
    fn default() -> Self {
        Self { from: i64::MIN, until: i64::MAX }
    }
}

impl Validity {
    /// Returns the period of `certificate`; `None` if it cannot be read.
    pub(crate) fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, certificate) = parse_x509_certificate(certificate).ok()?;
        let validity = certificate.validity();
        let (from, until) = (validity.not_before.timestamp(), validity.not_after.timestamp());
        Some(Self { from, until })
    }

    /// Returns the period in which all certificates of `chain` that are valid `now` stay valid. For
    /// a chain that was verified `now`, these include all that the verification used.
    pub(crate) fn of_chain<'c>(
        chain: impl IntoIterator<Item = &'c CertificateDer<'c>>,
        now: UnixTime,
    ) -> Self {
        let each = chain.into_iter().filter_map(Self::of);
        let valid = each.filter(|validity| validity.contains(now));
        valid.fold(Self::default(), Self::and)
    }

    /// Returns the intersection of both periods.
    pub(crate) fn and(self, other: Self) -> Self {
        Self { from: self.from.max(other.from), until: self.until.min(other.until) }
    }

    pub(crate) fn contains(self, now: UnixTime) -> bool {
        let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        (self.from..=self.until).contains(&now)
    }

    /// Checks that `now` is in the period.
    ///
    /// # Errors
    /// The error of rustls for a certificate that has expired or is not valid yet.
    pub(crate) fn check(self, now: UnixTime) -> Result<(), Error> {
        let at = |seconds: i64| {
            let seconds = u64::try_from(seconds).unwrap_or_default();
            UnixTime::since_unix_epoch(Duration::from_secs(seconds))
        };
        if self.contains(now) {
            return Ok(());
        }
        let (time, not_before, not_after) = (now, at(self.from), at(self.until));
        Err(Error::InvalidCertificate(if now < not_before {
            CertificateError::NotValidYetContext { time, not_before }
        } else {
            CertificateError::ExpiredContext { time, not_after }
        }))
    }
}

/// Returns the common name. If there are several, returns the last, which is the most specific.
pub(crate) fn common_name<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a str> {
    certificate.subject().iter_common_name().last()?.as_str().ok()
}

/// Compares names case-insensitively. `*` matches exactly one label, the first (RFC 6125, section
/// 6.4.3).
fn matches(pattern: &str, name: &str) -> bool {
    match (pattern.strip_prefix("*."), name.split_once('.')) {
        (Some(rest), Some((label, domain))) => {
            !label.is_empty() && rest.contains('.') && rest.eq_ignore_ascii_case(domain)
        }
        (Some(_), None) => false,
        (None, _) => pattern.eq_ignore_ascii_case(name),
    }
}

/// Whether the CA certificate `certificate` has name constraints, or cannot be read.
pub(crate) fn is_constrained(certificate: &CertificateDer<'_>) -> bool {
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
        let with =
            |name: rcgen::SanType| certificate(|params| params.subject_alt_names = vec![name]);
        let other = with(rcgen::SanType::DnsName("x.org".try_into().unwrap()));
        assert!(!named(&other, "gw.example.org"), "a DNS name counts alone");
        let text = || "someone@example.org".try_into().unwrap();
        for name in [
            rcgen::SanType::IpAddress([192, 0, 2, 1].into()),
            rcgen::SanType::Rfc822Name(text()),
            rcgen::SanType::URI("spiffe://example.org/gw".try_into().unwrap()),
            rcgen::SanType::OtherName((
                vec![1, 3, 6, 1],
                rcgen::OtherNameValue::Utf8String("x".into()),
            )),
        ] {
            assert!(named(&with(name.clone()), "gw.example.org"), "{name:?} is not a DNS name");
        }
        let address = certificate(|params| {
            params.subject_alt_names = vec![rcgen::SanType::IpAddress([192, 0, 2, 9].into())];
            params.distinguished_name = rcgen::DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, "192.0.2.1");
        });
        assert!(!named(&address, "192.0.2.1"), "addresses among the alternative names count alone");
    }

    #[test]
    fn names_are_dns_names_or_else_the_common_name() {
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
        assert_eq!(names(&address, true), ["gw.example.org"], "an address is not a DNS name");
        assert_eq!(names(&address, false), [""; 0]);
        assert_eq!(names(&CertificateDer::from(vec![0x30]), true), [""; 0]);
    }

    #[test]
    fn name_constraints_are_found() {
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
        assert!(
            is_constrained(&CertificateDer::from(vec![0x30])),
            "unreadable counts as constrained"
        );
    }

    #[test]
    fn wildcard_matches_one_label() {
        assert!(matches("*.example.org", "gw.example.org"));
        assert!(!matches("*.example.org", "a.gw.example.org"));
        assert!(!matches("*.example.org", "example.org"));
        assert!(!matches("*.org", "example.org"), "not for whole domains");
        assert!(!matches("*", "localhost"));
    }
}
