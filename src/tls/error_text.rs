//! Errors of TLS in words. The library shows many of its own in Rust's debug form.

use std::io;

use rustls::{AlertDescription, CertificateError, Error};
use x509_parser::asn1_rs::{FromDer, Oid};
use x509_parser::time::ASN1Time;

use super::handshake_error::rustls_error;

/// Returns the text for `error`, which may be one of TLS.
pub(crate) fn describe(error: &io::Error) -> String {
    rustls_error(error).map_or_else(|| error.to_string(), describe_tls)
}

/// Returns the text for an error of the TLS library.
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
            format!("what the peer sent is not TLS ({})", words(&format!("{why:?}"), ' '))
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
        AlertDescription::UnknownCA => "the peer does not trust the authority of our certificate",
        AlertDescription::AccessDenied => "the peer does not let our certificate in",
        AlertDescription::NoApplicationProtocol => {
            "what answers knows other protocols only (ALPN); if it was a gateway before and something \
             ends TLS in front of it now, reload this gateway"
        }
        AlertDescription::UnrecognisedName => "the peer does not know the name that was dialed",
        AlertDescription::HandshakeFailure | AlertDescription::ProtocolVersion => {
            "the peer and we have no version or algorithm in common"
        }
        _ => return None,
    })
}

/// Returns what is wrong with a certificate.
pub(crate) fn describe_certificate(error: &CertificateError) -> String {
    match error {
        CertificateError::BadEncoding => "it cannot be parsed".to_owned(),
        CertificateError::UnknownIssuer => {
            "unknown issuer: no authority in the file has signed it, or an intermediate is missing"
                .to_owned()
        }
        CertificateError::ExpiredContext { not_after, .. } => {
            format!("it, or one that it needs, has expired: valid until {}", date(not_after))
        }
        CertificateError::Expired => "it, or one that it needs, has expired".to_owned(),
        CertificateError::NotValidYetContext { not_before, .. } => {
            format!("it, or one that it needs, is not valid yet: valid from {}", date(not_before))
        }
        CertificateError::BadSignature => {
            "bad signature: an authority in the file has the name of its issuer, but another key has \
             signed it"
                .to_owned()
        }
        CertificateError::UnsupportedSignatureAlgorithmContext {
            signature_algorithm_id: id,
            ..
        } => format!(
            "it, or one that it needs, is signed with an algorithm that is not supported{}",
            algorithm(id)
        ),
        CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext {
            signature_algorithm_id: id,
            ..
        } => format!("the algorithm of its signature{} does not fit the key", algorithm(id)),
        CertificateError::Other(other) => describe_webpki(&other.to_string()),
        // The library has words for these.
        CertificateError::NotValidForNameContext { .. }
        | CertificateError::InvalidPurposeContext { .. }
        | CertificateError::ExpiredRevocationListContext { .. } => error.to_string(),
        other => words(&format!("{other:?}"), ' '),
    }
}

/// Returns the text for an error of webpki, whose own is its debug form.
fn describe_webpki(debug: &str) -> String {
    let name = debug.split(['(', '{']).next().unwrap_or_default().trim();
    let text = match name {
        "CaUsedAsEndEntity" => {
            "it is an authority's (CA:TRUE), which cannot be a peer's own: issue one with CA:FALSE"
        }
        "EndEntityUsedAsCa" => {
            "the certificate that has signed it is not an authority's (CA:FALSE)"
        }
        "UnsupportedCriticalExtension" => {
            "it, or one that it needs, has a critical extension that is not supported, such as \
             certificatePolicies or nsCertType: issue it with that extension not critical"
        }
        "UnsupportedCertVersion" => "it is not an X.509 version 3 certificate",
        "NameConstraintViolation" => "its authority may not issue for its names",
        "PathLenConstraintViolated" => "its chain is longer than an authority in it allows",
        "MaximumSignatureChecksExceeded"
        | "MaximumPathBuildCallsExceeded"
        | "MaximumPathDepthExceeded"
        | "MaximumNameConstraintComparisonsExceeded" => {
            "too many certificates have to be tried: too long a chain, or too many authorities of \
             one name"
        }
        // Not a name but a text.
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

/// Returns the name of a variant as words: `UnknownCA` becomes `unknown ca`. What it holds is left
/// out.
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
    fn errors_are_words() {
        let certificate = |error| described(Error::InvalidCertificate(error));
        let webpki = |name: &str| {
            certificate(CertificateError::Other(OtherError(Arc::new(io::Error::other(
                name.to_owned(),
            )))))
        };
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let sha1 = vec![6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 5, 5, 0];
        for (text, expected) in [
            (webpki("CaUsedAsEndEntity"), "is an authority's (CA:TRUE)"),
            (webpki("UnsupportedCriticalExtension"), "critical extension that is not supported"),
            (webpki("MaximumSignatureChecksExceeded"), "too many certificates"),
            (webpki("SomethingNew { with: 1 }"), "invalid peer certificate: something new"),
            (certificate(CertificateError::UnknownIssuer), "unknown issuer: no authority"),
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
                "not TLS (invalid content type)",
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
