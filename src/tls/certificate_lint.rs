//! Finds problems of our own certificates before peers refuse them with less helpful messages.
//!
//! Pure: takes certificates, the time and their purpose, and returns findings. Verifies no
//! signature; rustls does, and it has the last word on certificates that this parser cannot read.

use std::fmt;
use std::path::Path;

use rustls::client::verify_server_name;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use x509_parser::prelude::{FromDer, X509Certificate, X509Version};

use super::certificate_names::{common_name, dns_names, is_commonly_named};
use crate::config::TlsFiles;

/// One day in seconds.
pub(crate) const DAY: i64 = 24 * 60 * 60;

/// How long before its end a certificate causes a warning, in seconds.
pub(crate) const SOON: i64 = 14 * DAY;

/// The longest chain that peers accept, in bytes: most libraries limit a TLS handshake message to
/// 64 KiB, and the message holds more than the chain.
const CHAIN_MAX: usize = 60 * 1024;

/// Where operators find the commands that issue a certificate.
const COMMANDS: &str = "docs/zones.md shows the commands";

/// What a certificate is used for. Zuul uses one certificate for both sides of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CertificatePurpose<'c> {
    /// As a client of ZooKeeper, which checks no name.
    ZooKeeper,
    /// To dial other gateways.
    Dialing,
    /// To dial other gateways and on listeners. Holds the name that peers dial, if one is
    /// configured.
    Listening(Option<&'c str>),
}

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Severity {
    /// Peers refuse the certificate for one of its purposes, and `check` fails.
    Error,
    /// Some peers refuse the certificate, or will do so soon.
    Warning,
}

/// One problem of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) severity: Severity,
    /// The configuration keys that name the file.
    pub(crate) keys: Vec<String>,
    /// The file, the problem, and how to see or fix it.
    pub(crate) text: String,
}

impl Finding {
    pub(crate) fn new(severity: Severity, key: &str, text: String) -> Self {
        let keys = if key.is_empty() { Vec::new() } else { vec![key.to_owned()] };
        Self { severity, keys, text }
    }

    pub(crate) fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }

    /// The keys and the text, without the severity.
    pub(crate) fn message(&self) -> String {
        if self.keys.is_empty() {
            return self.text.clone();
        }
        format!("{} = {}", self.keys.join(" and "), self.text)
    }

    /// Removes duplicates from `findings`. A problem of a file that two keys name is reported once,
    /// with both keys.
    pub(crate) fn merged(findings: impl IntoIterator<Item = Self>) -> Vec<Self> {
        let mut merged: Vec<Self> = Vec::new();
        for mut finding in findings {
            let same = merged
                .iter_mut()
                .find(|other| other.severity == finding.severity && other.text == finding.text);
            match same {
                Some(other) => {
                    finding.keys.retain(|key| !other.keys.contains(key));
                    other.keys.append(&mut finding.keys);
                }
                None => merged.push(finding),
            }
        }
        merged
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = if self.is_error() { "" } else { "warning: " };
        write!(f, "{severity}{}", self.message())
    }
}

/// Returns the problems of `chain`, which was read from `files` and begins with our certificate.
/// With `is_pinned`, peers have that certificate itself in their CA file and accept it although it
/// is a CA certificate.
pub(crate) fn chain(
    chain: &[CertificateDer<'_>],
    is_pinned: bool,
    files: &TlsFiles,
    purpose: CertificatePurpose<'_>,
    now: UnixTime,
) -> Vec<Finding> {
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    let mut findings = Vec::new();
    let length: usize = chain.iter().map(|certificate| certificate.len()).sum();
    if length > CHAIN_MAX {
        let text = format!(
            "{}: holds {} certificates with a total of {length} bytes, but peers accept at most \
             64 KiB; keep only our certificate and its intermediates: openssl storeutl -noout \
             -certs {}",
            files.cert.display(),
            chain.len(),
            quoted(&files.cert)
        );
        findings.push(Finding::new(Severity::Error, &files.keys.cert, text));
    }
    for (index, der) in chain.iter().enumerate() {
        let Ok((_, certificate)) = X509Certificate::from_der(der) else { continue };
        if index > 0 {
            findings.extend(intermediate(&certificate, index + 1, files, now));
            continue;
        }
        let certificate = &certificate;
        let mut leaf = LeafLint { der, certificate, files, purpose, findings: &mut findings };
        leaf.check_dates(now);
        // Version 1 has no extensions, so all other checks would fail, too.
        if certificate.version() == X509Version::V1 {
            // Such a certificate comes from the recipe in Zuul's
            // `tests/fixtures/fingergw/README.rst`.
            leaf.add(
                Severity::Error,
                "is an X.509 version 1 certificate, which TLS libraries refuse; issue one with \
                 extensions",
            );
        } else {
            leaf.check_basic_constraints(is_pinned);
            leaf.check_extended_key_usage();
            leaf.check_names();
        }
    }
    findings
}

/// Checks the dates of the certificate at position `number` of the chain. Only a warning: chains
/// often contain an expired cross-signed certificate that is not used.
fn intermediate(
    certificate: &X509Certificate<'_>,
    number: usize,
    files: &TlsFiles,
    now: i64,
) -> Option<Finding> {
    let validity = certificate.validity();
    let (from, to) = (validity.not_before, validity.not_after);
    if (from.timestamp()..=to.timestamp()).contains(&now) {
        return None;
    }
    let text = format!(
        "{}: certificate {number} of the file is valid only from {from} until {to}; show it with: \
         openssl storeutl -noout -text -certs {}",
        files.cert.display(),
        quoted(&files.cert)
    );
    Some(Finding::new(Severity::Warning, &files.keys.cert, text))
}

/// The checks of our own certificate.
struct LeafLint<'c> {
    der: &'c CertificateDer<'c>,
    certificate: &'c X509Certificate<'c>,
    files: &'c TlsFiles,
    purpose: CertificatePurpose<'c>,
    findings: &'c mut Vec<Finding>,
}

impl LeafLint<'_> {
    /// Adds a finding that a new certificate fixes.
    fn add(&mut self, severity: Severity, problem: &str) {
        let text = format!("{}: {problem} ({COMMANDS})", self.files.cert.display());
        self.findings.push(Finding::new(severity, &self.files.keys.cert, text));
    }

    fn check_dates(&mut self, now: i64) {
        let validity = self.certificate.validity();
        let (from, to) = (validity.not_before, validity.not_after);
        let left = to.timestamp() - now;
        if left < 0 {
            let problem = format!("has expired: valid until {to}; issue it again");
            self.add(Severity::Error, &problem);
        } else if from.timestamp() > now {
            let text = format!(
                "{}: is not valid yet: valid from {from}; check the clock of this host and: openssl \
                 x509 -noout -dates -in {}",
                self.files.cert.display(),
                quoted(&self.files.cert)
            );
            self.findings.push(Finding::new(Severity::Error, &self.files.keys.cert, text));
        } else if left < SOON {
            let problem = format!("expires soon, in {} days: on {to}; issue it again", left / DAY);
            self.add(Severity::Warning, &problem);
        }
    }

    /// rustls, and therefore every peer gateway, refuses a CA certificate as a peer's own
    /// certificate (`CaUsedAsEndEntity`). OpenSSL and Java accept it, so the check does not apply
    /// to ZooKeeper.
    fn check_basic_constraints(&mut self, is_pinned: bool) {
        if self.certificate.is_ca() && !is_pinned && self.purpose != CertificatePurpose::ZooKeeper {
            self.add(
                Severity::Error,
                "is a CA certificate (CA:TRUE), which peer gateways refuse as a gateway's own; \
                 issue one with CA:FALSE",
            );
        }
    }

    /// A certificate without the extension may be used for everything (RFC 5280, section 4.2.1.12).
    /// `anyExtendedKeyUsage` does not help: neither rustls nor OpenSSL accepts it in place of
    /// serverAuth or clientAuth.
    fn check_extended_key_usage(&mut self) {
        let Ok(Some(usage)) = self.certificate.extended_key_usage() else { return };
        let is_listening = matches!(self.purpose, CertificatePurpose::Listening(_));
        if is_listening && !usage.value.server_auth {
            self.add(
                Severity::Error,
                "is not for servers (extendedKeyUsage lacks serverAuth): clients of the TLS \
                 listeners refuse it; issue one for both sides",
            );
        }
        if !usage.value.client_auth {
            // Listeners work without it, as they do in Zuul's gateway.
            let severity = if is_listening { Severity::Warning } else { Severity::Error };
            let peers = match self.purpose {
                CertificatePurpose::ZooKeeper => "ZooKeeper",
                _ => "other gateways",
            };
            let problem = format!(
                "is not for clients (extendedKeyUsage lacks clientAuth): {peers} will refuse it \
                 when this gateway connects; issue one for both sides"
            );
            self.add(severity, &problem);
        }
    }

    /// Checks the names, which matter only to peers that dial us.
    fn check_names(&mut self) {
        let CertificatePurpose::Listening(hostname) = self.purpose else { return };
        let common = common_name(self.certificate).unwrap_or_default().escape_default();
        let has_no_dns_name = dns_names(self.certificate).is_some_and(|names| names.is_empty());
        if matches!(self.certificate.subject_alternative_name(), Ok(None)) {
            let problem = format!(
                "has no subjectAltName, only the common name \"{common}\": gateways accept that, \
                 other TLS software does not; issue one with a subjectAltName"
            );
            self.add(Severity::Warning, &problem);
        } else if has_no_dns_name
            && hostname.is_some_and(|hostname| self.covers(hostname) && !self.carries(hostname))
        {
            let problem = format!(
                "has the name \"{common}\" only as its common name, because its subjectAltName \
                 holds no DNS name: gateways accept that, other TLS software does not; issue one \
                 with a DNS name in the subjectAltName"
            );
            self.add(Severity::Warning, &problem);
        }
        if let Some(hostname) = hostname.filter(|hostname| !self.covers(hostname)) {
            let problem = format!(
                "does not carry the hostname {hostname}, by which others dial this gateway; peers \
                 that verify names refuse it; set hostname to a name in the certificate, or issue \
                 one with this name"
            );
            self.add(Severity::Warning, &problem);
        }
    }

    /// Whether gateways accept the certificate for `hostname`.
    fn covers(&self, hostname: &str) -> bool {
        let Ok(name) = ServerName::try_from(hostname.trim_end_matches('.')) else { return true };
        self.carries(hostname) || is_commonly_named(self.der, &name)
    }

    /// Whether `hostname` is among the alternative names. True for certificates that rustls cannot
    /// read, which it reports itself.
    fn carries(&self, hostname: &str) -> bool {
        let Ok(name) = ServerName::try_from(hostname.trim_end_matches('.')) else { return true };
        let Ok(parsed) = ParsedCertificate::try_from(self.der) else { return true };
        verify_server_name(&parsed, &name).is_ok()
    }
}

/// Quotes `text` as one word of a shell command.
pub(crate) fn quoted(text: impl AsRef<Path>) -> String {
    let text = text.as_ref().display().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/.,:=_-@+%".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rcgen::ExtendedKeyUsagePurpose::{Any, ClientAuth, ServerAuth};
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, date_time_ymd};

    use super::*;

    const LISTENING: CertificatePurpose<'_> = CertificatePurpose::Listening(Some("gw.example.org"));

    fn certificate(change: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(["gw.example.org".to_owned()]).unwrap();
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2030, 1, 1);
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "gw.example.org");
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().clone()
    }

    fn at(year: i32, month: u8, day: u8) -> UnixTime {
        let seconds = date_time_ymd(year, month, day).unix_timestamp();
        UnixTime::since_unix_epoch(Duration::from_secs(seconds.try_into().unwrap()))
    }

    fn files() -> TlsFiles {
        TlsFiles::of("/gw.crt", "/gw.key", "/ca.crt")
    }

    /// Returns the texts of the findings without the file name.
    fn findings(
        der: &[CertificateDer<'_>],
        purpose: CertificatePurpose<'_>,
        now: UnixTime,
    ) -> Vec<String> {
        let found = chain(der, false, &files(), purpose, now);
        found.iter().map(|finding| finding.to_string().replacen("/gw.crt: ", "", 1)).collect()
    }

    fn findings_of(
        purpose: CertificatePurpose<'_>,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Vec<String> {
        findings(&[certificate(change)], purpose, at(2025, 1, 1))
    }

    #[track_caller]
    fn assert_one(found: &[String], start: &str) {
        assert!(found.len() == 1 && found[0].starts_with(start), "{start}: {found:#?}");
    }

    #[test]
    fn good_certificate_has_no_findings() {
        for purpose in [
            LISTENING,
            CertificatePurpose::Listening(None),
            CertificatePurpose::Dialing,
            CertificatePurpose::ZooKeeper,
        ] {
            assert_eq!(findings_of(purpose, |_| {}), [""; 0]);
            let both = vec![ClientAuth, ServerAuth];
            assert_eq!(findings_of(purpose, |params| params.extended_key_usages = both), [""; 0]);
        }
        let garbage = CertificateDer::from(vec![0x30, 0x01, 0xff]);
        assert_eq!(findings(&[garbage], LISTENING, at(2025, 1, 1)), [""; 0], "rustls reports it");
    }

    #[test]
    fn expired_and_not_yet_valid_certificates_are_found() {
        let der = [certificate(|_| {})];
        let when =
            |year, month, day| findings(&der, CertificatePurpose::ZooKeeper, at(year, month, day));
        assert_one(&when(2019, 12, 31), "is not valid yet: valid from Jan  1");
        assert_eq!(when(2020, 1, 1), [""; 0]);
        assert_eq!(when(2029, 12, 18), [""; 0], "14 days before");
        assert_one(&when(2029, 12, 19), "warning: expires soon, in 13 days: on Jan  1");
        assert_one(&when(2030, 1, 1), "warning: expires soon, in 0 days: on Jan  1");
        assert_one(&when(2030, 1, 2), "has expired: valid until Jan  1");
        let whole =
            [certificate(|params| params.not_after = date_time_ymd(2040, 1, 1)), der[0].clone()];
        let of_whole = findings(&whole, LISTENING, at(2035, 1, 1));
        assert_one(&of_whole, "warning: certificate 2 of the file is valid only from Jan  1");
    }

    #[test]
    fn missing_key_usages_are_found_for_their_purpose() {
        let of = |purpose, usages: &[rcgen::ExtendedKeyUsagePurpose]| {
            findings_of(purpose, |params| params.extended_key_usages = usages.to_vec())
        };
        assert_one(&of(LISTENING, &[ClientAuth]), "is not for servers");
        assert_one(&of(LISTENING, &[ServerAuth]), "warning: is not for clients");
        assert_one(&of(CertificatePurpose::Dialing, &[ServerAuth]), "is not for clients");
        assert_one(&of(CertificatePurpose::ZooKeeper, &[ServerAuth]), "is not for clients");
        assert_one(&of(CertificatePurpose::Dialing, &[Any]), "is not for clients");
        assert_eq!(of(LISTENING, &[Any]).len(), 2);
    }

    #[test]
    fn ca_certificate_is_an_error_except_for_zookeeper() {
        let of = |purpose| {
            findings_of(purpose, |params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained))
        };
        assert_one(&of(LISTENING), "is a CA certificate (CA:TRUE)");
        assert_one(&of(CertificatePurpose::Dialing), "is a CA certificate (CA:TRUE)");
        assert_eq!(of(CertificatePurpose::ZooKeeper), [""; 0]);
    }

    #[test]
    fn missing_names_are_warnings_on_listeners() {
        let nameless = |purpose| findings_of(purpose, |params| params.subject_alt_names.clear());
        assert_one(&nameless(LISTENING), "warning: has no subjectAltName, only the common name");
        assert_eq!(nameless(CertificatePurpose::Dialing), [""; 0]);
        let dialed_by = |name| findings_of(CertificatePurpose::Listening(Some(name)), |_| {});
        assert_eq!(dialed_by("GW.example.org."), [""; 0]);
        for other in ["example.org", "192.0.2.1"] {
            assert_one(&dialed_by(other), "warning: does not carry the hostname");
        }
        let both = findings_of(CertificatePurpose::Listening(Some("x.org")), |params| {
            params.subject_alt_names.clear()
        });
        assert_eq!(both.len(), 2, "{both:#?}");
    }

    #[test]
    fn hostile_common_name_is_escaped() {
        let hostile = findings_of(CertificatePurpose::Listening(None), |params| {
            params.subject_alt_names.clear();
            params.distinguished_name.push(DnType::CommonName, "gw\n\u{1b}[2J");
        });
        assert!(!hostile[0].contains(char::is_control), "{hostile:#?}");
    }

    #[test]
    fn paths_are_quoted_for_a_shell() {
        assert_eq!(quoted("/a/b.pem"), "/a/b.pem");
        assert_eq!(quoted("/a b/it's"), r"'/a b/it'\''s'");
        assert_eq!(quoted(""), "''");
    }

    proptest::proptest! {
        /// Certificates come from peers and from files, so any content must be read or refused.
        #[test]
        fn damaged_certificates_are_read_or_refused(
            changes in proptest::collection::vec((0_usize..600, 0_u8..), 1..6)
        ) {
            use crate::tls::certificate_names::{Validity, is_constrained, names, display_names};
            let mut der = certificate(|params| {
                params.subject_alt_names.push(rcgen::SanType::IpAddress([192, 0, 2, 1].into()));
                params.extended_key_usages = vec![ServerAuth];
            })
            .to_vec();
            for (at, byte) in changes {
                let at = at % der.len();
                der[at] = byte;
            }
            let der = CertificateDer::from(der);
            let _ = (Validity::of(&der), is_constrained(&der), names(&der, true), display_names(&der));
            let _ = findings(std::slice::from_ref(&der), LISTENING, at(2025, 1, 1));
            let mut trust_anchors = crate::tls::trust_anchors::TrustAnchors::default();
            if trust_anchors.add(der.clone()).is_ok() {
                let trust_anchors = std::sync::Arc::new(trust_anchors);
                let now = at(2025, 1, 1);
                let lint = crate::tls::identity_lint::certificates;
                let _ = lint(&[der], &trust_anchors, &files(), LISTENING, now);
            }
        }
    }
}
