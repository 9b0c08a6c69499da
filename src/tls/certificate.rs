//! What is written in a certificate, for people and for names. Verifies nothing.

use std::time::{SystemTime, UNIX_EPOCH};

use rustls::pki_types::{CertificateDer, ServerName};
use x509_parser::certificate::X509Certificate;
use x509_parser::parse_x509_certificate;

/// Why peers refuse `certificate` at the moment `now`: its dates. `None` if it is valid.
pub(super) fn date_fault(certificate: &CertificateDer<'_>, now: SystemTime) -> Option<String> {
    let (_, certificate) = parse_x509_certificate(certificate).ok()?;
    let now = now.duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let now = i64::try_from(now).unwrap_or(i64::MAX);
    let validity = certificate.validity();
    if now > validity.not_after.timestamp() {
        return Some(format!("has expired: valid until {}", validity.not_after));
    }
    let early = now < validity.not_before.timestamp();
    early.then(|| format!("is not valid yet: valid from {}", validity.not_before))
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

fn common_name<'a>(certificate: &'a X509Certificate<'_>) -> Option<&'a str> {
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rcgen::{CertificateParams, DnType, KeyPair, date_time_ymd};

    use super::*;

    fn certificate(change: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2030, 1, 1);
        params.distinguished_name.push(DnType::CommonName, "gw.example.org");
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().clone()
    }

    fn fault_in(year: u64) -> Option<String> {
        let now = UNIX_EPOCH + Duration::from_secs((year - 1970) * 31_557_600);
        date_fault(&certificate(|_| {}), now)
    }

    #[test]
    fn dates() {
        assert_eq!(fault_in(2025), None);
        assert!(fault_in(2031).unwrap().starts_with("has expired: valid until Jan  1"));
        assert!(fault_in(2019).unwrap().starts_with("is not valid yet: valid from Jan  1"));
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
    fn wildcards_stand_for_one_label() {
        assert!(matches("*.example.org", "gw.example.org"));
        assert!(!matches("*.example.org", "a.gw.example.org"));
        assert!(!matches("*.example.org", "example.org"));
        assert!(!matches("*.org", "example.org"), "not for whole domains");
        assert!(!matches("*", "localhost"));
    }
}
