//! Why a TLS handshake failed, as it is counted.

use std::io;

use rustls::{AlertDescription, CertificateError, Error};

/// The reason, from what the handshake ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// It took longer than its deadline.
    Timeout,
    /// The peer closed or reset the connection.
    Closed,
    /// What came is no TLS.
    NotTls,
    /// The peer shows no certificate, or wants one of us.
    NoCertificate,
    /// No authority of ours has issued the peer's certificate.
    UnknownAuthority,
    /// The peer's certificate has expired or is not valid yet.
    Dates,
    /// The peer's certificate is another one's.
    Name,
    /// The peer's certificate cannot be used for another reason.
    Certificate,
    /// The peer sent an alert: most often about a certificate of ours.
    RefusedByPeer,
    /// Anything else.
    Protocol,
}

impl Failure {
    /// Every reason there is.
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

    /// Of what a handshake returned.
    pub(crate) fn of(error: &io::Error) -> Self {
        match rustls_error(error) {
            Some(error) => Self::of_rustls(error),
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

    /// Of an error met behind the handshake: in TLS 1.3 a server refuses its client's certificate
    /// only when the client holds the handshake for done (RFC 8446, section 4.4.2.4).
    pub(crate) fn late(error: &io::Error) -> Option<Self> {
        rustls_error(error).map(Self::of_rustls)
    }

    /// Whether the peer has refused all protocols that were offered by ALPN (RFC 7301, section
    /// 3.2).
    pub(crate) fn refuses_protocols(error: &io::Error) -> bool {
        let alert = Error::AlertReceived(AlertDescription::NoApplicationProtocol);
        rustls_error(error) == Some(&alert)
    }

    fn of_rustls(error: &Error) -> Self {
        match error {
            Error::NoCertificatesPresented
            | Error::AlertReceived(AlertDescription::CertificateRequired) => Self::NoCertificate,
            Error::InvalidCertificate(fault) => match fault {
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

    /// The value of the metric label `result`.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Closed => "closed",
            Self::NotTls => "not_tls",
            Self::NoCertificate => "no_certificate",
            Self::UnknownAuthority => "unknown_authority",
            Self::Dates => "dates",
            Self::Name => "name",
            Self::Certificate => "certificate",
            Self::RefusedByPeer => "refused_by_peer",
            Self::Protocol => "protocol",
        }
    }
}

pub(crate) fn rustls_error(error: &io::Error) -> Option<&Error> {
    error.get_ref()?.downcast_ref()
}

#[cfg(test)]
mod tests {
    use rustls::InvalidMessage;

    use super::*;

    #[test]
    fn reasons() {
        let tls = |error: Error| Failure::of(&io::Error::new(io::ErrorKind::InvalidData, error));
        let certificate = |fault| tls(Error::InvalidCertificate(fault));
        assert_eq!(tls(Error::NoCertificatesPresented), Failure::NoCertificate);
        assert_eq!(certificate(CertificateError::UnknownIssuer), Failure::UnknownAuthority);
        assert_eq!(certificate(CertificateError::Expired), Failure::Dates);
        assert_eq!(certificate(CertificateError::NotValidForName), Failure::Name);
        assert_eq!(certificate(CertificateError::BadSignature), Failure::Certificate);
        let alert = |alert| tls(Error::AlertReceived(alert));
        assert_eq!(alert(AlertDescription::CertificateRequired), Failure::NoCertificate);
        assert_eq!(alert(AlertDescription::UnknownCA), Failure::RefusedByPeer);
        assert_eq!(tls(Error::InvalidMessage(InvalidMessage::InvalidContentType)), Failure::NotTls);
        assert_eq!(tls(Error::HandshakeNotComplete), Failure::Protocol);
        assert_eq!(Failure::of(&io::ErrorKind::UnexpectedEof.into()), Failure::Closed);
        assert_eq!(Failure::of(&io::ErrorKind::ConnectionReset.into()), Failure::Closed);
        assert_eq!(Failure::of(&io::ErrorKind::TimedOut.into()), Failure::Timeout);
        assert_eq!(Failure::late(&io::ErrorKind::ConnectionReset.into()), None);
    }

    #[test]
    fn labels_differ() {
        let labels: std::collections::BTreeSet<_> =
            Failure::ALL.iter().map(|failure| failure.label()).collect();
        assert_eq!(labels.len(), Failure::ALL.len());
    }
}
