//! What is amiss with a certificate of ours, told before peers refuse it in words of their own.
//!
//! Pure: certificates, the time and what they are for in, findings out. Verifies nothing: rustls
//! does, and has the last word where this parser understands nothing.

use std::fmt::{self, Write as _};
use std::net::IpAddr;
use std::path::Path;

use rustls::client::verify_server_name;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate, X509Version};

use super::Files;
use super::certificate_names::{common_name, dns_names, is_commonly_named};

pub(crate) const DAY: i64 = 24 * 60 * 60;

/// How long before its end a certificate is worth a warning.
pub(crate) const SOON: i64 = 14 * DAY;

/// What a certificate is for. Zuul uses one for both sides of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use<'c> {
    /// As a client of ZooKeeper, which looks at no name.
    ZooKeeper,
    /// To dial other gateways.
    Dialing,
    /// The same, and on listeners; others dial this name, where the configuration says one.
    Listening(Option<&'c str>),
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Severity {
    /// For one of its uses peers refuse it: `check` does, too.
    Error,
    /// Some peers do, or will.
    Warning,
}

/// One thing that is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) severity: Severity,
    /// The keys of the configuration that name the file.
    pub(crate) keys: Vec<String>,
    /// File, fault and the command that shows or fixes it.
    pub(crate) text: String,
}

impl Finding {
    pub(crate) fn new(severity: Severity, key: &str, text: String) -> Self {
        let key = (!key.is_empty()).then(|| key.to_owned());
        Self { severity, keys: key.into_iter().collect(), text }
    }

    pub(crate) fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }

    /// Key, file, fault and command, without the severity.
    pub(crate) fn message(&self) -> String {
        match self.keys.join(" and ") {
            keys if keys.is_empty() => self.text.clone(),
            keys => format!("{keys} = {}", self.text),
        }
    }

    /// All of `findings`, each once: what two keys name is reported with both.
    pub(crate) fn merged(findings: impl IntoIterator<Item = Self>) -> Vec<Self> {
        let mut merged: Vec<Self> = Vec::new();
        for mut finding in findings {
            let same = |other: &&mut Self| {
                (other.severity, &other.text) == (finding.severity, &finding.text)
            };
            match merged.iter_mut().find(same) {
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

/// The longest chain that peers take, in bytes: a handshake message of TLS has at most 64 KiB in
/// most libraries, and there is more in it than the chain.
const CHAIN_MAX: usize = 60 * 1024;

/// Returns what is wrong with `chain`, read from `files`, its first certificate ours. With `is_pinned`
/// peers trust that very certificate, and accept it although it is an authority's.
pub(crate) fn chain(
    chain: &[CertificateDer<'_>],
    is_pinned: bool,
    files: &Files,
    purpose: Use<'_>,
    now: UnixTime,
) -> Vec<Finding> {
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    let mut findings = Vec::new();
    let length: usize = chain.iter().map(|certificate| certificate.len()).sum();
    if length > CHAIN_MAX {
        let text = format!(
            "{}: holds {} certificates of {length} bytes together; peers take no more than 64 KiB: \
             only the own one and its intermediates belong there: openssl storeutl -noout -certs {}",
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
        let mut own = Own { der, certificate: &certificate, files, purpose, findings: Vec::new() };
        own.dates(now);
        // Version 1 knows no extensions: nothing else can be right.
        if certificate.version() == X509Version::V1 {
            own.version_1();
        } else {
            if !is_pinned {
                own.authority();
            }
            own.purposes();
            own.names();
        }
        findings.append(&mut own.findings);
    }
    findings
}

/// One that has ended may be there for nothing: chains often carry a path that nobody takes.
fn intermediate(
    certificate: &X509Certificate<'_>,
    number: usize,
    files: &Files,
    now: i64,
) -> Option<Finding> {
    let validity = certificate.validity();
    let (from, to) = (validity.not_before, validity.not_after);
    let text = format!(
        "{}: certificate {number} in it is valid only from {from} until {to}; look at it: openssl \
         storeutl -noout -text -certs {}",
        files.cert.display(),
        quoted(&files.cert)
    );
    let valid = (from.timestamp()..=to.timestamp()).contains(&now);
    (!valid).then(|| Finding::new(Severity::Warning, &files.keys.cert, text))
}

/// The certificate that is ours.
struct Own<'c> {
    der: &'c CertificateDer<'c>,
    certificate: &'c X509Certificate<'c>,
    files: &'c Files,
    purpose: Use<'c>,
    findings: Vec<Finding>,
}

impl Own<'_> {
    fn find(&mut self, severity: Severity, fault: &str, command: &str) {
        let text = format!("{}: {fault}: {command}", self.files.cert.display());
        self.findings.push(Finding::new(severity, &self.files.keys.cert, text));
    }

    fn dates(&mut self, now: i64) {
        let validity = self.certificate.validity();
        let (from, to) = (validity.not_before, validity.not_after);
        let left = to.timestamp() - now;
        if left < 0 {
            let fault = format!("has expired: valid until {to}; issue it anew");
            self.find(Severity::Error, &fault, &self.issue());
        } else if from.timestamp() > now {
            let fault = format!("is not valid yet: valid from {from}; is the clock right? See");
            let command = format!("openssl x509 -noout -dates -in {}", quoted(&self.files.cert));
            self.find(Severity::Error, &fault, &command);
        } else if left < SOON {
            let fault = format!("expires soon, in {} days: on {to}; issue it anew", left / DAY);
            self.find(Severity::Warning, &fault, &self.issue());
        }
    }

    /// What the recipe in Zuul's `tests/fixtures/fingergw/README.rst` makes.
    fn version_1(&mut self) {
        let fault = "is an X.509 version 1 certificate, which TLS libraries refuse; issue one with \
                     extensions";
        self.find(Severity::Error, fault, &self.issue());
    }

    /// rustls refuses it (`CaUsedAsEndEntity`), and with it every gateway of our own kind; OpenSSL
    /// and Java do not, so ZooKeeper has no part in this.
    fn authority(&mut self) {
        if self.certificate.is_ca() && self.purpose != Use::ZooKeeper {
            let fault = "is an authority's (CA:TRUE), which gateways of this kind refuse as a peer's \
                         own; issue one that is none";
            self.find(Severity::Error, fault, &self.issue());
        }
    }

    /// Without the extension it is good for everything (RFC 5280, section 4.2.1.12). `any` in it
    /// helps nobody: neither rustls nor OpenSSL takes it for one of the two.
    fn purposes(&mut self) {
        let Ok(Some(usage)) = self.certificate.extended_key_usage() else { return };
        let (server, client) = (usage.value.server_auth, usage.value.client_auth);
        let listening = matches!(self.purpose, Use::Listening(_));
        if listening && !server {
            let fault = "is not for servers (extendedKeyUsage lacks serverAuth): who dials the TLS \
                         listeners will refuse it; issue one for both sides";
            self.find(Severity::Error, fault, &self.issue());
        }
        if !client {
            // What listens is of use all the same; upstream's program served with it.
            let severity = if listening { Severity::Warning } else { Severity::Error };
            let zookeeper = self.purpose == Use::ZooKeeper;
            let peers = if zookeeper { "ZooKeeper" } else { "other gateways" };
            let fault = format!(
                "is not for clients (extendedKeyUsage lacks clientAuth): {peers} will refuse it \
                 when dialed; issue one for both sides"
            );
            self.find(severity, &fault, &self.issue());
        }
    }

    /// Names matter only to those who dial us.
    fn names(&mut self) {
        let Use::Listening(hostname) = self.purpose else { return };
        let common = common_name(self.certificate).unwrap_or_default().escape_default();
        if matches!(self.certificate.subject_alternative_name(), Ok(None)) {
            let fault = format!(
                "has no subjectAltName, only the common name \"{common}\": gateways take that, other \
                 TLS software does not; issue one with it"
            );
            self.find(Severity::Warning, &fault, &self.issue());
        } else if dns_names(self.certificate).is_some_and(|names| names.is_empty())
            && hostname.is_some_and(|hostname| self.covers(hostname) && !self.carries(hostname))
        {
            let fault = format!(
                "has the name \"{common}\" only as its common name, as no name in its \
                 subjectAltName is a DNS name: gateways take that, other TLS software does not; \
                 issue one with it there"
            );
            self.find(Severity::Warning, &fault, &self.issue());
        }
        let Some(hostname) = hostname.filter(|hostname| !self.covers(hostname)) else { return };
        let fault = format!(
            "does not carry the hostname {hostname}, by which others dial this gateway; those that \
             verify names refuse it; set hostname to a name that it carries, or issue \
             one that does"
        );
        self.find(Severity::Warning, &fault, &self.issue());
    }

    /// Whether gateways take the certificate for `hostname`.
    fn covers(&self, hostname: &str) -> bool {
        let Ok(name) = ServerName::try_from(hostname.trim_end_matches('.')) else { return true };
        self.carries(hostname) || is_commonly_named(self.der, &name)
    }

    /// Whether `hostname` is among the alternative names. One that rustls cannot read is refused in
    /// its own words.
    fn carries(&self, hostname: &str) -> bool {
        let Ok(name) = ServerName::try_from(hostname.trim_end_matches('.')) else { return true };
        let Ok(parsed) = ParsedCertificate::try_from(self.der) else { return true };
        verify_server_name(&parsed, &name).is_ok()
    }

    /// The command that makes this certificate again beside the old one: for the same key, with
    /// the names it has and should have, good for both sides. `CA.key` stands for the authority's
    /// key, which is hardly on this machine.
    fn issue(&self) -> String {
        let Files { cert, key, ca, .. } = self.files;
        let subject = common_name(self.certificate).filter(|name| is_plain(name));
        let mut command = format!(
            "openssl req -x509 -new -key {} -subj {} -CA {} -CAkey CA.key -days 365 -addext \
             basicConstraints=critical,CA:FALSE",
            quoted(key),
            quoted(format!("/CN={}", subject.unwrap_or("HOSTNAME"))),
            quoted(ca),
        );
        let names = self.alternative_names();
        if !names.is_empty() {
            let names = quoted(format!("subjectAltName={}", names.join(",")));
            let _ = write!(command, " -addext {names}");
        }
        let new = quoted(format!("{}.new", cert.display()));
        let _ = write!(command, " -out {new}");
        command
    }

    /// In openssl's notation: those there are, the configured one, else the common name.
    fn alternative_names(&self) -> Vec<String> {
        let mut names = Vec::new();
        if let Ok(Some(extension)) = self.certificate.subject_alternative_name() {
            for name in &extension.value.general_names {
                match name {
                    GeneralName::DNSName(name) if is_plain(name) => {
                        names.push(format!("DNS:{name}"))
                    }
                    GeneralName::IPAddress(bytes) => names.extend(address(bytes)),
                    _ => {}
                }
            }
        }
        match self.purpose {
            Use::Listening(Some(hostname)) if names.is_empty() || !self.carries(hostname) => {
                names.extend(notation(hostname));
            }
            _ => {}
        }
        if names.is_empty() && self.purpose != Use::ZooKeeper {
            let common = common_name(self.certificate).and_then(notation);
            names.push(common.unwrap_or_else(|| "DNS:HOSTNAME".to_owned()));
        }
        names
    }
}

fn notation(name: &str) -> Option<String> {
    let name = name.trim_end_matches('.');
    let wild = name.strip_prefix("*.").unwrap_or(name);
    match ServerName::try_from(wild).ok()? {
        ServerName::IpAddress(_) => Some(format!("IP:{name}")),
        _ => Some(format!("DNS:{name}")),
    }
}

fn address(bytes: &[u8]) -> Option<String> {
    let address = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        _ => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
    };
    Some(format!("IP:{address}"))
}

/// Whether openssl's `-subj` and `-addext` take `text` for one name.
fn is_plain(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || " .-_*".contains(c);
    !text.is_empty() && text.chars().all(plain)
}

/// `text` as one word of a shell.
pub(crate) fn quoted(text: impl AsRef<Path>) -> String {
    let text = text.as_ref().display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/.,:=_-@+%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
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

    const LISTENING: Use<'_> = Use::Listening(Some("gw.example.org"));

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

    fn files() -> Files {
        Files::of("/gw.crt", "/gw.key", "/ca.crt")
    }

    /// What is said, without the file in front.
    fn said(der: &[CertificateDer<'_>], purpose: Use<'_>, now: UnixTime) -> Vec<String> {
        let findings = chain(der, false, &files(), purpose, now);
        findings.iter().map(|finding| finding.to_string().replacen("/gw.crt: ", "", 1)).collect()
    }

    fn said_of(purpose: Use<'_>, change: impl FnOnce(&mut CertificateParams)) -> Vec<String> {
        said(&[certificate(change)], purpose, at(2025, 1, 1))
    }

    #[track_caller]
    fn assert_one(said: &[String], start: &str) {
        assert!(said.len() == 1 && said[0].starts_with(start), "{start}: {said:#?}");
    }

    #[test]
    fn nothing_is_amiss() {
        for purpose in [LISTENING, Use::Listening(None), Use::Dialing, Use::ZooKeeper] {
            assert_eq!(said_of(purpose, |_| {}), [""; 0]);
            let both = vec![ClientAuth, ServerAuth];
            assert_eq!(said_of(purpose, |params| params.extended_key_usages = both), [""; 0]);
        }
        let garbage = CertificateDer::from(vec![0x30, 0x01, 0xff]);
        assert_eq!(said(&[garbage], LISTENING, at(2025, 1, 1)), [""; 0], "rustls speaks of it");
    }

    #[test]
    fn dates() {
        let der = [certificate(|_| {})];
        let when = |year, month, day| said(&der, Use::ZooKeeper, at(year, month, day));
        assert_one(&when(2019, 12, 31), "is not valid yet: valid from Jan  1");
        assert_eq!(when(2020, 1, 1), [""; 0]);
        assert_eq!(when(2029, 12, 18), [""; 0], "14 days before");
        assert_one(&when(2029, 12, 19), "warning: expires soon, in 13 days: on Jan  1");
        assert_one(&when(2030, 1, 1), "warning: expires soon, in 0 days: on Jan  1");
        assert_one(&when(2030, 1, 2), "has expired: valid until Jan  1");
        let whole =
            [certificate(|params| params.not_after = date_time_ymd(2040, 1, 1)), der[0].clone()];
        let of_whole = said(&whole, LISTENING, at(2035, 1, 1));
        assert_one(&of_whole, "warning: certificate 2 in it is valid only from Jan  1");
    }

    #[test]
    fn purposes() {
        let of = |purpose, usages: &[rcgen::ExtendedKeyUsagePurpose]| {
            said_of(purpose, |params| params.extended_key_usages = usages.to_vec())
        };
        assert_one(&of(LISTENING, &[ClientAuth]), "is not for servers");
        assert_one(&of(LISTENING, &[ServerAuth]), "warning: is not for clients");
        assert_one(&of(Use::Dialing, &[ServerAuth]), "is not for clients");
        assert_one(&of(Use::ZooKeeper, &[ServerAuth]), "is not for clients");
        assert_one(&of(Use::Dialing, &[Any]), "is not for clients");
        assert_eq!(of(LISTENING, &[Any]).len(), 2);
    }

    #[test]
    fn an_authoritys_certificate() {
        let of = |purpose| {
            said_of(purpose, |params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained))
        };
        assert_one(&of(LISTENING), "is an authority's (CA:TRUE)");
        assert_one(&of(Use::Dialing), "is an authority's (CA:TRUE)");
        assert_eq!(of(Use::ZooKeeper), [""; 0]);
    }

    #[test]
    fn names() {
        let nameless = |purpose| said_of(purpose, |params| params.subject_alt_names.clear());
        assert_one(&nameless(LISTENING), "warning: has no subjectAltName, only the common name");
        assert_eq!(nameless(Use::Dialing), [""; 0]);
        let dialed_by = |name| said_of(Use::Listening(Some(name)), |_| {});
        assert_eq!(dialed_by("GW.example.org."), [""; 0]);
        for other in ["example.org", "192.0.2.1"] {
            assert_one(&dialed_by(other), "warning: does not carry the hostname");
        }
        let both =
            said_of(Use::Listening(Some("x.org")), |params| params.subject_alt_names.clear());
        assert_eq!(both.len(), 2, "{both:#?}");
    }

    /// Names that are there stay, the missing one is added; nothing gets out of its quotes.
    #[test]
    fn the_command_that_issues_it_anew() {
        let said = said_of(Use::Listening(Some("192.0.2.1")), |_| {});
        let (_, command) = said[0].split_once(": openssl ").unwrap();
        assert_eq!(
            command,
            "req -x509 -new -key /gw.key -subj /CN=gw.example.org -CA /ca.crt -CAkey CA.key -days \
             365 -addext basicConstraints=critical,CA:FALSE -addext \
             subjectAltName=DNS:gw.example.org,IP:192.0.2.1 -out /gw.crt.new"
        );
        let hostile = said_of(Use::Listening(None), |params| {
            params.subject_alt_names.clear();
            params.distinguished_name.push(DnType::CommonName, "$(id)';\n/CN=x");
        });
        assert!(hostile[0].contains("-subj /CN=HOSTNAME "), "{hostile:#?}");
        assert!(hostile[0].contains("subjectAltName=DNS:HOSTNAME "), "{hostile:#?}");
        assert!(!hostile[0].contains('\n'), "{hostile:#?}");
        assert_eq!(quoted("/a b/it's"), r"'/a b/it'\''s'");
        assert_eq!(quoted(""), "''");
    }

    proptest::proptest! {
        /// Certificates come from peers and from files: whatever they hold, reading them ends.
        #[test]
        fn damaged_certificates_are_read_or_refused(
            changes in proptest::collection::vec((0_usize..600, 0_u8..), 1..6)
        ) {
            use crate::tls::certificate_names::{Validity, is_constrained, names, told_names};
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
            let _ = (Validity::of(&der), is_constrained(&der), names(&der, true), told_names(&der));
            let _ = said(std::slice::from_ref(&der), LISTENING, at(2025, 1, 1));
            let mut authorities = crate::tls::authorities::Authorities::default();
            if authorities.add(der.clone()).is_ok() {
                let authorities = std::sync::Arc::new(authorities);
                let now = at(2025, 1, 1);
                let lint = crate::tls::identity_lint::certificates;
                let _ = lint(&[der], &authorities, &files(), LISTENING, now);
            }
        }
    }
}
