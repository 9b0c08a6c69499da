//! Settings of TLS, of listeners and of connections to other gateways and to ZooKeeper.

use std::path::{Path, PathBuf};

/// The PEM files of one identity. All three are needed: every TLS peer in a Zuul system presents a
/// certificate and verifies that of the other end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TlsFiles {
    /// Our certificate, followed by its intermediates.
    pub(crate) cert: PathBuf,
    /// The private key of the certificate.
    pub(crate) key: PathBuf,
    /// The CA certificates that verify peers.
    pub(crate) ca: PathBuf,
    /// Where the configuration sets each of the files.
    pub(crate) keys: TlsFileKeys,
}

/// The keys of a configuration that name the files of an identity, for messages:
/// `gateway.toml:8: tls.cert`. Empty where there is no configuration.
#[derive(Clone, Debug, Default)]
pub(crate) struct TlsFileKeys {
    pub(crate) cert: String,
    pub(crate) key: String,
    pub(crate) ca: String,
}

impl PartialEq for TlsFileKeys {
    /// Always true: files that are named on another line are the same files.
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for TlsFileKeys {}

impl TlsFiles {
    /// Files that no configuration names.
    #[cfg(test)]
    pub(crate) fn of(cert: &str, key: &str, ca: &str) -> Self {
        Self { cert: cert.into(), key: key.into(), ca: ca.into(), keys: TlsFileKeys::default() }
    }

    /// Paths of the certificate, the key and the CA certificates.
    pub(crate) fn paths(&self) -> [&Path; 3] {
        [&self.cert, &self.key, &self.ca]
    }
}

/// Which name the certificate of a gateway must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NameCheck {
    /// Any name: `verify_hostnames = false`.
    Off,
    /// The name that was dialed, as a subject alternative name; or as the common name, where there
    /// is no alternative name of type DNS.
    SanOrCommonName,
    /// The name that was dialed, as a subject alternative name.
    SanOnly,
}

/// Whether a TLS listener requests the client's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClientCertificate {
    /// Refuses clients without one, as Zuul's own gateway does.
    Required,
    /// Verified if the client presents one.
    Optional,
    /// Not requested.
    None,
}
