//! Certificates and keys: read from PEM, checked, and refused with words that say what to mend.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context, Result, anyhow, bail};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use zookeeper_client::TlsOptions;

use super::certificate::date_fault;
use super::provider;

/// The PEM files of one identity. All three are needed: every TLS peer in a Zuul system shows a
/// certificate and checks the other's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Files {
    /// Our certificate, its intermediates behind it.
    pub(crate) cert: PathBuf,
    /// Its private key.
    pub(crate) key: PathBuf,
    /// The authorities that peers' certificates must come from.
    pub(crate) ca: PathBuf,
}

impl Files {
    /// All three.
    pub(crate) fn paths(&self) -> [&Path; 3] {
        [&self.cert, &self.key, &self.ca]
    }
}

/// Who we are and whom we trust.
pub(crate) struct Identity {
    /// What the certificate is called in errors.
    name: String,
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
    pub(super) roots: Arc<RootCertStore>,
}

impl fmt::Debug for Identity {
    /// Leaves the key out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("chain", &self.chain.len()).finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads `files` and checks that they belong together.
    ///
    /// # Errors
    /// Every file that cannot be used, each with its fault and what to do.
    pub(crate) fn load(files: &Files) -> Result<Self> {
        let [cert, key, ca] =
            [&files.cert, &files.key, &files.ca].map(|path| path.to_string_lossy());
        Self::of(
            (&cert, read(&files.cert).and_then(|text| certificates(&cert, &text))),
            (&key, read(&files.key).and_then(|text| private_key(&key, &text))),
            read(&files.ca).and_then(|text| authorities(&ca, &text)),
        )
    }

    /// An identity made in this process.
    pub(crate) fn from_pem(cert: &str, key: &str, ca: &str) -> Result<Self> {
        Self::of(
            ("certificate", certificates("certificate", cert)),
            ("key", private_key("key", key)),
            authorities("CA", ca),
        )
    }

    /// Why every peer refuses us now although all fits together: the certificate's dates.
    pub(crate) fn date_fault(&self) -> Option<String> {
        let fault = date_fault(self.chain.first()?, SystemTime::now())?;
        let name = &self.name;
        Some(format!("{name}: {fault}; renew it (openssl x509 -noout -dates -in {name})"))
    }

    /// Of its parts, the first two with the names to use for them in errors.
    fn of(
        (name, chain): (&str, Result<Vec<CertificateDer<'static>>>),
        (key_name, key): (&str, Result<PrivateKeyDer<'static>>),
        roots: Result<RootCertStore>,
    ) -> Result<Self> {
        let (chain, key, roots) = match (chain, key, roots) {
            (Ok(chain), Ok(key), Ok(roots)) => (chain, key, roots),
            (chain, key, roots) => {
                let faults = [chain.err(), key.err(), roots.err()];
                let faults: Vec<_> = faults.iter().flatten().map(|e| format!("{e:#}")).collect();
                bail!(faults.join("\n"));
            }
        };
        CertifiedKey::from_der(chain.clone(), key.clone_key(), &provider()).map_err(|error| {
            use rustls::{CertificateError, Error, InconsistentKeys};
            match error {
                Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                    anyhow!("{key_name}: is not the key of the certificate in {name}")
                }
                Error::InvalidCertificate(CertificateError::Other(ref other))
                    if other.to_string().contains("UnsupportedCertVersion") =>
                {
                    anyhow!(
                        "{name}: is an X.509 version 1 certificate, which TLS libraries refuse; \
                         make one with extensions (openssl x509 -req -extfile ...)"
                    )
                }
                Error::InvalidCertificate(_) => anyhow!("{name}: cannot be used: {error}"),
                _ => anyhow!("{key_name}: cannot be used: {error}"),
            }
        })?;
        Ok(Self { name: name.to_owned(), chain, key, roots: Arc::new(roots) })
    }
}

fn read(path: &Path) -> Result<String> {
    let bytes =
        std::fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    String::from_utf8(bytes).map_err(|_| anyhow!("{}: is not PEM (binary data)", path.display()))
}

/// The certificates in `text`, at least one.
fn certificates(name: &str, text: &str) -> Result<Vec<CertificateDer<'static>>> {
    let chain = rustls_pemfile::certs(&mut text.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .with_context(|| format!("{name}: not valid PEM"))?;
    if chain.is_empty() {
        bail!("{name}: holds no certificate (-----BEGIN CERTIFICATE-----)");
    }
    Ok(chain)
}

/// The first private key in `text`.
fn private_key(name: &str, text: &str) -> Result<PrivateKeyDer<'static>> {
    rustls_pemfile::private_key(&mut text.as_bytes())
        .with_context(|| format!("{name}: not valid PEM"))?
        .ok_or_else(|| anyhow!("{name}: holds no private key (-----BEGIN PRIVATE KEY-----)"))
}

/// The certificates in `text` as those to trust.
fn authorities(name: &str, text: &str) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(name, text)? {
        roots.add(certificate).map_err(|error| anyhow!("{name}: cannot be used: {error}"))?;
    }
    Ok(roots)
}

/// What the ZooKeeper client needs of `files`, which [`Identity::load`] has checked.
pub(crate) fn zookeeper(files: &Files, verify_hostnames: bool) -> Result<TlsOptions> {
    let options = TlsOptions::new()
        .with_pem_ca(&read(&files.ca)?)
        .with_context(|| format!("{}: cannot be used", files.ca.display()))?
        .with_pem_identity(&read(&files.cert)?, &read(&files.key)?)
        .with_context(|| format!("{}: cannot be used", files.cert.display()))?;
    Ok(if verify_hostnames { options } else { without_hostname_verification(options) })
}

#[expect(unsafe_code, reason = "the client marks the missing name check, not memory, as unsafe")]
fn without_hostname_verification(options: TlsOptions) -> TlsOptions {
    // SAFETY: touches no memory. The chain is still checked against the CA of the configuration;
    // Zuul's own services check no more (kazoo's default), and the certificates that its tools
    // make carry no names to check.
    unsafe { options.with_no_hostname_verification() }
}
