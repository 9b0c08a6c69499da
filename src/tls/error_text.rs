//! Texts of TLS errors for log and messages. rustls displays many of its own in Rust's debug form.

use std::io;

use rustls::{AlertDescription, CertificateError, Error};
use x509_parser::asn1_rs::{FromDer, Oid};
use x509_parser::time::ASN1Time;

use super::handshake_error::rustls_error;

/// Returns the text for `error`, which may come from rustls.
pub(crate) fn describe(error: &io::Error) -> String {
    rustls_error(error).map_or_else(|| error.to_string(), describe_tls)
}

/// Returns the text for an error of rustls.
pub(crate) fn describe_tls(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(error) => {
            format!("invalid peer certificate: {}", describe_certificate(error))
        }
        Error::AlertReceived(alert) => {
            let name = words(&format!("{alert:?}"), '_');
            let meaning = describe_alert(*alert).map(|text| format!(": {text}"));
            format!("received fatal alert {name}{}", meaning.unwrap_or_default())
        }
        Error::InvalidMessage(why) => {
            format!("the peer does not speak TLS ({})", words(&format!("{why:?}"), ' '))
        }
        Error::PeerIncompatible(why) => {
            format!("the peer's TLS is not compatible: {}", words(&format!("{why:?}"), ' '))
        }
        Error::PeerMisbehaved(why) => {
            format!("the peer violates TLS: {}", words(&format!("{why:?}"), ' '))
        }
        Error::InvalidCertRevocationList(why) => {
            format!("invalid certificate revocation list: {}", words(&format!("{why:?}"), ' '))
        }
        Error::General(text) => text.clone(),
        other => other.to_string(),
    }
}

fn describe_alert(alert: AlertDescription) -> Option<&'static str> {
    Some(match alert {
        AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::UnsupportedCertificate => "the peer refuses our certificate",
        AlertDescription::CertificateExpired => "our certificate has expired, or is not valid yet",
        AlertDescription::CertificateRevoked => "our certificate is revoked",
        AlertDescription::CertificateRequired => "the peer requires a certificate of ours",
        AlertDescription::UnknownCA => "the peer does not trust the CA of our certificate",
        AlertDescription::AccessDenied => "the peer does not admit our certificate",
        AlertDescription::NoApplicationProtocol => {
            "the peer speaks other protocols only (ALPN); if a proxy terminates TLS in front of the \
             gateway since a short time, reload this gateway"
        }
        AlertDescription::UnrecognisedName => "the peer does not know the name that was dialed",
        AlertDescription::HandshakeFailure | AlertDescription::ProtocolVersion => {
            "there is no TLS version or algorithm that both ends support"
        }
        _ => return None,
    })
}

/// Returns what is wrong with a certificate.
pub(crate) fn describe_certificate(error: &CertificateError) -> String {
    match error {
        CertificateError::BadEncoding => "it cannot be parsed".to_owned(),
        CertificateError::UnknownIssuer => {
            "unknown issuer: no CA in the file has signed it, or an intermediate is missing"
                .to_owned()
        }
        CertificateError::ExpiredContext { not_after, .. } => {
            format!("it, or a certificate of its chain, has expired: valid until {}", date(not_after))
        }
        CertificateError::Expired => "it, or a certificate of its chain, has expired".to_owned(),
        CertificateError::NotValidYetContext { not_before, .. } => {
            format!(
                "it, or a certificate of its chain, is not valid yet: valid from {}",
                date(not_before)
            )
        }
        CertificateError::BadSignature => {
            "bad signature: a CA in the file has the name of its issuer, but another key has signed it"
                .to_owned()
        }
        CertificateError::UnsupportedSignatureAlgorithmContext {
            signature_algorithm_id: id,
            ..
        } => format!(
            "it, or a certificate of its chain, is signed with an algorithm that is not supported{}",
            algorithm(id)
        ),
        CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext {
            signature_algorithm_id: id,
            ..
        } => format!("the algorithm of its signature{} does not fit the key", algorithm(id)),
        CertificateError::Other(other) => describe_webpki(&other.to_string()),
        // rustls displays these well.
        CertificateError::NotValidForNameContext { .. }
        | CertificateError::InvalidPurposeContext { .. }
        | CertificateError::ExpiredRevocationListContext { .. } => error.to_string(),
        other => words(&format!("{other:?}"), ' '),
    }
}

/// Returns the text for an error of webpki, which displays only its debug form.
fn describe_webpki(debug: &str) -> String {
    let name = debug.split(['(', '{']).next().unwrap_or_default().trim();
    let text = match name {
        "CaUsedAsEndEntity" => {
            "it is a CA certificate (CA:TRUE), which a peer must not present as its own; issue one with \
             CA:FALSE"
        }
        "EndEntityUsedAsCa" => {
            "the certificate that has signed it is not a CA certificate (CA:FALSE)"
        }
        "UnsupportedCriticalExtension" => {
            "it, or a certificate of its chain, has a critical extension that is not supported, such as \
             certificatePolicies or nsCertType; issue it with that extension not critical"
        }
        "UnsupportedCertVersion" => "it is not an X.509 version 3 certificate",
        "NameConstraintViolation" => "its CA may not issue certificates for its names",
        "PathLenConstraintViolated" => "its chain is longer than a CA in it allows",
        "MaximumSignatureChecksExceeded"
        | "MaximumPathBuildCallsExceeded"
        | "MaximumPathDepthExceeded"
        | "MaximumNameConstraintComparisonsExceeded" => {
            "the chain is too long, or too many CAs have the same name"
        }
        // A text, not the name of a variant.
        text if text.contains(' ') => text,
        name => return words(name, ' '),
    };
    text.to_owned()
}

/// Returns the object identifier of a signature algorithm in parentheses, if it can be read.
fn algorithm(id: &[u8]) -> String {
    let Ok((_, oid)) = Oid::from_der(id) else { return String::new() };
    match oid.to_id_string().as_str() {
        "1.2.840.113549.1.1.5" | "1.2.840.10045.4.1" => " (SHA-1)".to_owned(),
        "1.2.840.113549.1.1.4" => " (MD5)".to_owned(),
        other => format!(" ({other})"),
    }
}

fn date(time: &rustls::pki_types::UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    ASN1Time::from_timestamp(seconds).map_or_else(|_| seconds.to_string(), |time| time.to_string())
}

/// Returns the name of an enum variant as lower-case words, without its fields: `UnknownCA` becomes
/// `unknown ca`.
fn words(debug: &str, between: char) -> String {
    let mut text = String::new();
    let mut before = None;
    for char in debug.chars().take_while(|char| char.is_ascii_alphanumeric()) {
        if char.is_ascii_uppercase() && before.is_some_and(|c: char| c.is_ascii_lowercase()) {
            text.push(between);
        }
        text.push(char.to_ascii_lowercase());
        before = Some(char);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use rustls::pki_types::UnixTime;
    use rustls::{InvalidMessage, OtherError, PeerIncompatible};

    use super::*;

    fn described(error: Error) -> String {
        describe(&io::Error::new(io::ErrorKind::InvalidData, error))
    }

    #[test]
    fn errors_are_described_without_debug_forms() {
        let certificate = |error| described(Error::InvalidCertificate(error));
        let webpki = |name: &str| {
            certificate(CertificateError::Other(OtherError(Arc::new(io::Error::other(
                name.to_owned(),
            )))))
        };
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let sha1 = vec![6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 5, 5, 0];
        for (text, expected) in [
            (webpki("CaUsedAsEndEntity"), "is a CA certificate (CA:TRUE)"),
            (webpki("UnsupportedCriticalExtension"), "critical extension that is not supported"),
            (webpki("MaximumSignatureChecksExceeded"), "chain is too long"),
            (webpki("SomethingNew { with: 1 }"), "invalid peer certificate: something new"),
            (certificate(CertificateError::UnknownIssuer), "unknown issuer: no CA"),
            (
                certificate(CertificateError::ExpiredContext { time: at(9), not_after: at(0) }),
                "has expired: valid until Jan  1 00:00:00 1970",
            ),
            (
                certificate(CertificateError::UnsupportedSignatureAlgorithmContext {
                    signature_algorithm_id: sha1,
                    supported_algorithms: Vec::new(),
                }),
                "not supported (SHA-1)",
            ),
            (described(Error::AlertReceived(AlertDescription::UnknownCA)), "alert unknown_ca: the"),
            (
                described(Error::AlertReceived(AlertDescription::DecodeError)),
                "received fatal alert decode_error",
            ),
            (
                described(Error::InvalidMessage(InvalidMessage::InvalidContentType)),
                "not speak TLS (invalid content type)",
            ),
            (
                described(Error::PeerIncompatible(PeerIncompatible::NoKxGroupsInCommon)),
                "not compatible: no kx groups in common",
            ),
            (describe(&io::ErrorKind::UnexpectedEof.into()), "unexpected end of file"),
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
            let debug = ["Other(", "Context", "::", "{", "["];
            assert!(!debug.iter().any(|debug| text.contains(debug)), "{text}");
        }
    }
}
