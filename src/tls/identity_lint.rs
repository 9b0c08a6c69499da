//! Finds problems of the files of an identity together: verifies our own chain against our own CA
//! file with the code that verifies peers, because all gateways of a Zuul system share their CAs.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::{CertificateError, Error};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::certificate_lint::{CertificatePurpose, DAY, Finding, SOON, Severity, chain, quoted};
use super::certificate_names::common_name;
use super::client::Verifier;
use super::error_text::describe_certificate;
use super::server::ClientVerifier;
use super::trust_anchors::TrustAnchors;
use crate::config::{NameCheck, TlsFiles};

/// Returns the problems of `certificates`, a chain that begins with our own, read from `files`:
/// alone, and as peers with the same `trust_anchors` will verify it.
pub(crate) fn certificates(
    certificates: &[CertificateDer<'_>],
    trust_anchors: &Arc<TrustAnchors>,
    files: &TlsFiles,
    purpose: CertificatePurpose<'_>,
    now: UnixTime,
) -> Vec<Finding> {
    let is_pinned = trust_anchors.certificates().contains(&certificates[0]);
    let mut findings = chain(certificates, is_pinned, files, purpose, now);
    findings.extend(path(certificates, trust_anchors, files, purpose, now));
    findings.extend(self::trust_anchors(trust_anchors, files, now));
    if !trust_anchors.revocation_lists().is_empty() && purpose != CertificatePurpose::ZooKeeper {
        let text = format!(
            "{}: holds a revocation list, which is used only for ZooKeeper servers; to shut out a \
             gateway or client, issue the other certificates from another CA",
            files.ca.display()
        );
        findings.push(Finding::new(Severity::Warning, &files.keys.ca, text));
    }
    findings
}

/// Verifies our chain as a peer with the same CA file does.
fn path(
    chain: &[CertificateDer<'_>],
    trust_anchors: &Arc<TrustAnchors>,
    files: &TlsFiles,
    purpose: CertificatePurpose<'_>,
    now: UnixTime,
) -> Option<Finding> {
    let (own, others) = chain.split_first()?;
    let as_client = ClientVerifier::new(trust_anchors, true).ok()?;
    let as_client = as_client.verify_client_cert(own, others, now).map(drop);
    let as_server = match purpose {
        CertificatePurpose::Listening(_) => {
            // Names are checked separately.
            let name = ServerName::IpAddress(IpAddr::from([0; 4]).into());
            let verifier = Verifier::new(Arc::clone(trust_anchors), NameCheck::Off, None);
            verifier.verify_server_cert(own, others, &name, &[], now).map(drop)
        }
        CertificatePurpose::Dialing | CertificatePurpose::ZooKeeper => Ok(()),
    };
    let Err(Error::InvalidCertificate(error)) = as_server.and(as_client) else { return None };
    let (cert, ca) = (quoted(&files.cert), quoted(&files.ca));
    let why = match &error {
        // Reported by `certificate_lint` with more detail.
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
            format!("is not signed by a CA in {ca}, and no intermediate in {cert} leads to one")
        }
        error => describe_certificate(error),
    };
    let text = format!(
        "{}: peers with the same CA file refuse it: {why}; verify it: openssl verify \
         -CAfile {ca} -untrusted {cert} {cert}",
        files.cert.display()
    );
    Some(Finding::new(Severity::Warning, &files.keys.cert, text))
}

/// Checks the dates of the CA certificates. rustls ignores them; OpenSSL, and with it Zuul's own
/// services, does not.
fn trust_anchors(trust_anchors: &TrustAnchors, files: &TlsFiles, now: UnixTime) -> Vec<Finding> {
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    let mut findings = Vec::new();
    for (der, number) in trust_anchors.certificates().iter().zip(1..) {
        let Ok((_, certificate)) = X509Certificate::from_der(der) else { continue };
        let validity = certificate.validity();
        let (from, to) = (validity.not_before, validity.not_after);
        let left = to.timestamp() - now;
        let problem = if left < 0 {
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
            "{}: the CA certificate {number} of the file (\"{name}\") {problem}; OpenSSL, and with it \
             Zuul's own services, refuses all certificates that it has issued; replace it, or remove \
             it if it is not needed: openssl storeutl -noout -text -certs {}",
            files.ca.display(),
            quoted(&files.ca)
        );
        findings.push(Finding::new(Severity::Warning, &files.keys.ca, text));
    }
    findings
}

/// Reports a private key that every user of this host can read. Not in a container whose first
/// process is this program: it has no other users, and orchestrators mount secrets with such modes.
pub(crate) fn key_mode(files: &TlsFiles) -> Option<Finding> {
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
