//! Reasons why a TLS handshake failed, as metrics count them.

use std::io;

use rustls::{AlertDescription, CertificateError, Error};

/// Why a handshake failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HandshakeFailure {
    /// It did not complete in time.
    Timeout,
    /// The peer closed or reset the connection.
    Closed,
    /// The peer does not speak TLS.
    NotTls,
    /// The peer presented no certificate, or requires one from us.
    NoCertificate,
    /// No CA that we trust has issued the peer's certificate.
    UnknownAuthority,
    /// The peer's certificate has expired or is not valid yet.
    Dates,
    /// The peer's certificate is for other names.
    Name,
    /// The peer's certificate is invalid for another reason.
    Certificate,
    /// The peer sent an alert, mostly about our certificate.
    RefusedByPeer,
    /// Anything else.
    Protocol,
}

impl HandshakeFailure {
    /// All reasons.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 10] = [
        Self::Timeout,
        Self::Closed,
        Self::NotTls,
        Self::NoCertificate,
        Self::UnknownAuthority,
        Self::Dates,
        Self::Name,
        Self::Certificate,
        Self::RefusedByPeer,
        Self::Protocol,
    ];

    /// Returns the reason for the error of a handshake.
    pub(crate) fn from_error(error: &io::Error) -> Self {
        match rustls_error(error) {
            Some(error) => Self::from_rustls(error),
            None => match error.kind() {
                io::ErrorKind::TimedOut => Self::Timeout,
                io::ErrorKind::BrokenPipe
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::UnexpectedEof => Self::Closed,
                _ => Self::Protocol,
            },
        }
    }

    /// Returns the reason for an error after the handshake, if TLS is the cause. In TLS 1.3 the
    /// server refuses the client's certificate after the client has completed its handshake (RFC
    /// 8446, section 4.4.2.4).
    pub(crate) fn after_handshake(error: &io::Error) -> Option<Self> {
        rustls_error(error).map(Self::from_rustls)
    }

    /// Whether the peer has refused all protocols that were offered by ALPN (RFC 7301, section
    /// 3.2).
    pub(crate) fn refuses_protocols(error: &io::Error) -> bool {
        let alert = Error::AlertReceived(AlertDescription::NoApplicationProtocol);
        rustls_error(error) == Some(&alert)
    }

    fn from_rustls(error: &Error) -> Self {
        match error {
            Error::NoCertificatesPresented
            | Error::AlertReceived(AlertDescription::CertificateRequired) => Self::NoCertificate,
            Error::InvalidCertificate(error) => match error {
                CertificateError::UnknownIssuer => Self::UnknownAuthority,
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. } => Self::Dates,
                CertificateError::NotValidForName
                | CertificateError::NotValidForNameContext { .. } => Self::Name,
                _ => Self::Certificate,
            },
            Error::AlertReceived(_) => Self::RefusedByPeer,
            Error::InvalidMessage(_) => Self::NotTls,
            _ => Self::Protocol,
        }
    }

    /// Returns the value of the metric label `result`.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Closed => "closed",
            Self::NotTls => "not_tls",
            Self::NoCertificate => "no_certificate",
            Self::UnknownAuthority => "unknown_ca",
            Self::Dates => "dates",
            Self::Name => "name",
            Self::Certificate => "certificate",
            Self::RefusedByPeer => "refused_by_peer",
            Self::Protocol => "protocol",
        }
    }
}

/// Returns the error of rustls inside `error`, if there is one.
pub(crate) fn rustls_error(error: &io::Error) -> Option<&Error> {
    error.get_ref()?.downcast_ref()
}

#[cfg(test)]
mod tests {
    use rustls::InvalidMessage;

    use super::*;

    #[test]
    fn errors_map_to_reasons() {
        let tls = |error: Error| {
            HandshakeFailure::from_error(&io::Error::new(io::ErrorKind::InvalidData, error))
        };
        let certificate = |error| tls(Error::InvalidCertificate(error));
        assert_eq!(tls(Error::NoCertificatesPresented), HandshakeFailure::NoCertificate);
        assert_eq!(
            certificate(CertificateError::UnknownIssuer),
            HandshakeFailure::UnknownAuthority
        );
        assert_eq!(certificate(CertificateError::Expired), HandshakeFailure::Dates);
        assert_eq!(certificate(CertificateError::NotValidForName), HandshakeFailure::Name);
        assert_eq!(certificate(CertificateError::BadSignature), HandshakeFailure::Certificate);
        let alert = |alert| tls(Error::AlertReceived(alert));
        assert_eq!(alert(AlertDescription::CertificateRequired), HandshakeFailure::NoCertificate);
        assert_eq!(alert(AlertDescription::UnknownCA), HandshakeFailure::RefusedByPeer);
        assert_eq!(
            tls(Error::InvalidMessage(InvalidMessage::InvalidContentType)),
            HandshakeFailure::NotTls
        );
        assert_eq!(tls(Error::HandshakeNotComplete), HandshakeFailure::Protocol);
        assert_eq!(
            HandshakeFailure::from_error(&io::ErrorKind::UnexpectedEof.into()),
            HandshakeFailure::Closed
        );
        assert_eq!(
            HandshakeFailure::from_error(&io::ErrorKind::ConnectionReset.into()),
            HandshakeFailure::Closed
        );
        assert_eq!(
            HandshakeFailure::from_error(&io::ErrorKind::TimedOut.into()),
            HandshakeFailure::Timeout
        );
        assert_eq!(HandshakeFailure::after_handshake(&io::ErrorKind::ConnectionReset.into()), None);
    }

    #[test]
    fn labels_are_distinct() {
        let labels: std::collections::BTreeSet<_> =
            HandshakeFailure::ALL.iter().map(|failure| failure.label()).collect();
        assert_eq!(labels.len(), HandshakeFailure::ALL.len());
    }
}
