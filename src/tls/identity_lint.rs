//! What is wrong with the files of an identity together: the own chain is verified against the own
//! authorities with what verifies peers, since all gateways of a Zuul have the same authorities.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::{CertificateError, Error};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::authorities::Authorities;
use super::certificate_lint::{DAY, Finding, SOON, Severity, Use, chain, quoted};
use super::certificate_names::common_name;
use super::client::Verifier;
use super::error_text::describe_certificate;
use super::server::ClientVerifier;
use super::{Files, Names};

/// Returns what is wrong with `chain`, read from `files`, its first certificate ours: alone, and
/// with the `authorities` that it is checked against by peers of the same configuration.
pub(crate) fn certificates(
    certificates: &[CertificateDer<'_>],
    authorities: &Arc<Authorities>,
    files: &Files,
    purpose: Use<'_>,
    now: UnixTime,
) -> Vec<Finding> {
    let is_pinned = authorities.certificates().contains(&certificates[0]);
    let mut findings = chain(certificates, is_pinned, files, purpose, now);
    findings.extend(path(certificates, authorities, files, purpose, now));
    findings.extend(self::authorities(authorities, files, now));
    if !authorities.revocation_lists().is_empty() && purpose != Use::ZooKeeper {
        let text = format!(
            "{}: holds a revocation list, which is not looked at for gateways and clients; what \
             shuts out a certificate is another authority",
            files.ca.display()
        );
        findings.push(Finding::new(Severity::Warning, &files.keys.ca, text));
    }
    findings
}

/// Verifies our chain as a peer would that trusts the same authorities.
fn path(
    chain: &[CertificateDer<'_>],
    authorities: &Arc<Authorities>,
    files: &Files,
    purpose: Use<'_>,
    now: UnixTime,
) -> Option<Finding> {
    let (own, others) = chain.split_first()?;
    let as_client = ClientVerifier::new(authorities, true).ok()?;
    let as_client = as_client.verify_client_cert(own, others, now).map(drop);
    let as_server = match purpose {
        Use::Listening(_) => {
            // Names are looked at separately.
            let name = ServerName::IpAddress(IpAddr::from([0; 4]).into());
            let verifier = Verifier::new(Arc::clone(authorities), Names::Any, None);
            verifier.verify_server_cert(own, others, &name, &[], now).map(drop)
        }
        Use::Dialing | Use::ZooKeeper => Ok(()),
    };
    let Err(Error::InvalidCertificate(error)) = as_server.and(as_client) else { return None };
    let (cert, ca) = (quoted(&files.cert), quoted(&files.ca));
    let why = match &error {
        // Found without the authorities, and said better.
        CertificateError::Expired
        | CertificateError::ExpiredContext { .. }
        | CertificateError::NotValidYet
        | CertificateError::NotValidYetContext { .. }
        | CertificateError::InvalidPurpose
        | CertificateError::InvalidPurposeContext { .. }
        | CertificateError::BadEncoding => return None,
        CertificateError::Other(other) => match other.to_string().as_str() {
            "CaUsedAsEndEntity" | "UnsupportedCertVersion" => return None,
            _ => describe_certificate(&error),
        },
        CertificateError::UnknownIssuer => {
            format!(
                "is not signed by an authority in {ca}, and no intermediate in {cert} leads to one"
            )
        }
        error => describe_certificate(error),
    };
    let text = format!(
        "{}: peers that trust the same authorities refuse it: {why}; verify it: openssl verify \
         -CAfile {ca} -untrusted {cert} {cert}",
        files.cert.display()
    );
    Some(Finding::new(Severity::Warning, &files.keys.cert, text))
}

/// The dates of the authorities, which rustls does not look at, but OpenSSL does, and with it
/// Zuul's own services.
fn authorities(authorities: &Authorities, files: &Files, now: UnixTime) -> Vec<Finding> {
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    let mut findings = Vec::new();
    for (der, number) in authorities.certificates().iter().zip(1..) {
        let Ok((_, certificate)) = X509Certificate::from_der(der) else { continue };
        let validity = certificate.validity();
        let (from, to) = (validity.not_before, validity.not_after);
        let left = to.timestamp() - now;
        let fault = if left < 0 {
            format!("has expired: valid until {to}")
        } else if from.timestamp() > now {
            format!("is not valid yet: valid from {from}")
        } else if left < SOON {
            format!("expires soon, in {} days: on {to}", left / DAY)
        } else {
            continue;
        };
        let name: String =
            common_name(&certificate).unwrap_or_default().escape_default().take(80).collect();
        let text = format!(
            "{}: the authority in certificate {number} of it (\"{name}\") {fault}; OpenSSL, and with \
             it Zuul's own services, refuses all that it has issued; replace it, or remove it if \
             nothing needs it: openssl storeutl -noout -text -certs {}",
            files.ca.display(),
            quoted(&files.ca)
        );
        findings.push(Finding::new(Severity::Warning, &files.keys.ca, text));
    }
    findings
}

/// Whether every user of this host can read the private key. In a container that is this program's
/// own there is nobody else, and orchestrators mount secrets so.
pub(crate) fn key_mode(files: &Files) -> Option<Finding> {
    let key = &files.key;
    let mode = fs::metadata(key).ok()?.mode();
    if mode & 0o004 == 0 || std::process::id() == 1 {
        return None;
    }
    let text = format!(
        "{}: the private key can be read by every user of this host (mode {:04o}): chmod o= {}",
        key.display(),
        mode & 0o7777,
        quoted(key)
    );
    Some(Finding::new(Severity::Warning, &files.keys.key, text))
}
