//! Certificates and keys: read from PEM, checked, and refused with words that say what to mend.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fmt, io};

use anyhow::{Error, Result, anyhow, bail};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::lint::{self, Finding, Use, quoted};
use super::provider;
use crate::small_file;

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

/// How often files are read that change meanwhile.
const LOOKS: usize = 3;

/// Who we are and whom we trust.
pub(crate) struct Identity {
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
    pub(super) roots: Arc<RootCertStore>,
    findings: Vec<Finding>,
    /// What all of it was made of.
    pub(super) pem: Pem,
}

/// Certificate, key and authorities, as text.
#[derive(Default, PartialEq, Eq)]
pub(super) struct Pem {
    pub(super) cert: String,
    pub(super) key: String,
    pub(super) ca: String,
}

impl fmt::Debug for Identity {
    /// Leaves the key out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("chain", &self.chain.len()).finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads `files`, checks that they belong together, and looks for what is amiss with the
    /// certificate `now` and for this `purpose`.
    ///
    /// # Errors
    /// Every file that cannot be used, each with its fault and what to do.
    pub(crate) fn load(files: &Files, purpose: Use<'_>, now: UnixTime) -> Result<Self> {
        let [cert, key, ca] =
            [&files.cert, &files.key, &files.ca].map(|path| path.to_string_lossy());
        let Some([cert_pem, key_pem, ca_pem]) = together(files.paths(), read) else {
            bail!("{cert}: this file, {key} or {ca} changes while it is read");
        };
        let chain = parse(&cert_pem, |text| certificates(&cert, text));
        let key_read = parse(&key_pem, |text| private_key(&key, text));
        let roots = parse(&ca_pem, |text| authorities(&ca, text));

        let found = chain.as_ref().map(|chain| lint::chain(chain, files, purpose, now));
        let found = found.unwrap_or_default();
        Self::of((&cert, chain), (&key, key_read), roots)
            .map(|identity| {
                // All of them are there, or nothing could have been made of them.
                let [cert, key, ca] = [cert_pem, key_pem, ca_pem].map(Result::unwrap_or_default);
                Self { findings: found.clone(), pem: Pem { cert, key, ca }, ..identity }
            })
            .map_err(|refusal| {
                let mut faults: Vec<_> = found.iter().map(ToString::to_string).collect();
                match refusal {
                    // Said already, and better.
                    Refusal::Certificate(_) if found.iter().any(Finding::is_error) => {}
                    refusal => faults.push(refusal.into_text()),
                }
                anyhow!(faults.join("\n"))
            })
    }

    /// An identity made in this process.
    pub(crate) fn from_pem(cert: &str, key: &str, ca: &str) -> Result<Self> {
        let identity = Self::of(
            ("certificate", certificates("certificate", cert)),
            ("key", private_key("key", key)),
            authorities("CA", ca),
        );
        identity.map_err(|refusal| anyhow!(refusal.into_text()))
    }

    /// Of its parts, the first two with the names to use for them in errors.
    fn of(
        (name, chain): (&str, Result<Vec<CertificateDer<'static>>>),
        (key_name, key): (&str, Result<PrivateKeyDer<'static>>),
        roots: Result<RootCertStore>,
    ) -> Result<Self, Refusal> {
        let (chain, key, roots) = match (chain, key, roots) {
            (Ok(chain), Ok(key), Ok(roots)) => (chain, key, roots),
            (chain, key, roots) => {
                let faults = [chain.err(), key.err(), roots.err()];
                let faults: Vec<_> = faults.iter().flatten().map(|e| format!("{e:#}")).collect();
                return Err(Refusal::Other(faults.join("\n")));
            }
        };
        CertifiedKey::from_der(chain.clone(), key.clone_key(), &provider()).map_err(|error| {
            use rustls::{Error, InconsistentKeys};
            let (cert, key) = (quoted(name), quoted(key_name));
            match error {
                Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => Refusal::Other(format!(
                    "{key_name}: is not the key of the certificate in {name}; the same must come \
                     out of both: openssl pkey -in {key} -pubout; openssl x509 -in {cert} -noout \
                     -pubkey"
                )),
                Error::InvalidCertificate(_) => Refusal::Certificate(format!(
                    "{name}: cannot be used: {error}; look at it: openssl x509 -in {cert} -noout \
                     -text"
                )),
                _ => Refusal::Other(format!(
                    "{key_name}: cannot be used: {error}; look at it: openssl pkey -in {key} \
                     -noout -text_pub"
                )),
            }
        })?;
        let (findings, pem) = (Vec::new(), Pem::default());
        Ok(Self { chain, key, roots: Arc::new(roots), findings, pem })
    }

    /// What is amiss with the certificate, although it can be used.
    pub(crate) fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Until when our certificate is good, in seconds since the epoch.
    pub(crate) fn not_after(&self) -> Option<i64> {
        let (_, certificate) = X509Certificate::from_der(self.chain.first()?).ok()?;
        Some(certificate.validity().not_after.timestamp())
    }

    /// The subject of our certificate, printable and at most 200 characters long.
    pub(crate) fn subject(&self) -> Option<String> {
        let (_, certificate) = X509Certificate::from_der(self.chain.first()?).ok()?;
        Some(certificate.subject().to_string().escape_default().take(200).collect())
    }

    /// Whether `other` shows the same certificate.
    pub(crate) fn shows_what(&self, other: &Self) -> bool {
        self.chain == other.chain
    }
}

impl PartialEq for Identity {
    /// Whether both were made of the same files' contents.
    fn eq(&self, other: &Self) -> bool {
        self.pem == other.pem
    }
}

/// Why rustls takes no identity.
enum Refusal {
    /// It cannot read our certificate.
    Certificate(String),
    Other(String),
}

impl Refusal {
    fn into_text(self) -> String {
        match self {
            Self::Certificate(text) | Self::Other(text) => text,
        }
    }
}

/// What `read` makes of each file, all of them as they are at one moment; `None` if they change all
/// the time. A renewal replaces them one by one, and a Kubernetes secret is swapped as a whole, but
/// perhaps between two of our looks.
fn together<T>(paths: [&Path; 3], mut read: impl FnMut(&Path) -> T) -> Option<[T; 3]> {
    let mut before = paths.map(version);
    for _ in 0..LOOKS {
        let contents = paths.map(&mut read);
        let after = paths.map(version);
        if before == after {
            return Some(contents);
        }
        before = after;
    }
    None
}

/// What tells one version of a file from another: which file, how long, last changed when.
fn version(path: &Path) -> Option<[i128; 7]> {
    let of = |file: Metadata| {
        let changes = [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()];
        let [modified, modified_ns, changed, changed_ns] = changes.map(i128::from);
        let [device, inode, size] = [file.dev(), file.ino(), file.size()].map(i128::from);
        [device, inode, size, modified, modified_ns, changed, changed_ns]
    };
    fs::metadata(path).ok().map(of)
}

/// What `parse` makes of a file's text.
fn parse<T>(text: &Result<String>, parse: impl FnOnce(&str) -> Result<T>) -> Result<T> {
    text.as_ref().map_err(|error| anyhow!("{error:#}")).and_then(|text| parse(text))
}

pub(super) fn read(path: &Path) -> Result<String> {
    let bytes = small_file::read(path).map_err(|error| unreadable(path, &error))?;
    String::from_utf8(bytes).map_err(|error| binary(path, error.as_bytes()))
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    let (name, shown) = (path.display(), quoted(path));
    if error.kind() == io::ErrorKind::PermissionDenied {
        let user = rustix::process::geteuid().as_raw();
        anyhow!(
            "{name}: cannot be read by user id {user}: {error}; look at its mode: ls -l {shown}"
        )
    } else {
        anyhow!("{name}: cannot be read: {error}")
    }
}

/// Most often the right thing in the wrong clothes.
fn binary(path: &Path, bytes: &[u8]) -> Error {
    let (name, shown) = (path.display(), quoted(path));
    let pem = quoted(format!("{name}.pem"));
    let advice = if X509Certificate::from_der(bytes).is_ok() {
        format!("DER, not PEM; turn it into PEM: openssl x509 -inform DER -in {shown} -out {pem}")
    } else if PrivateKeyDer::try_from(bytes).is_ok() {
        format!("DER, not PEM; turn it into PEM: openssl pkey -inform DER -in {shown} -out {pem}")
    } else {
        return anyhow!(
            "{name}: is not PEM (binary data); see what is in it: openssl storeutl -noout {shown}"
        );
    };
    anyhow!("{name}: is {advice}")
}

/// A fault of a file that is text, with the command that shows what is in it.
fn not(fault: &str, name: &str) -> Error {
    let shown = quoted(name);
    anyhow!("{name}: {fault}; see what is in it: openssl storeutl -noout {shown}")
}

/// The certificates in `text`, at least one.
pub(super) fn certificates(name: &str, text: &str) -> Result<Vec<CertificateDer<'static>>> {
    let chain = rustls_pemfile::certs(&mut text.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| not(&format!("not valid PEM: {error}"), name))?;
    if chain.is_empty() {
        return Err(not("holds no certificate (-----BEGIN CERTIFICATE-----)", name));
    }
    Ok(chain)
}

/// The first private key in `text`.
pub(super) fn private_key(name: &str, text: &str) -> Result<PrivateKeyDer<'static>> {
    // PKCS #8, and what OpenSSL wrote before (RFC 1421, section 4.6.1.1).
    if text.contains("-----BEGIN ENCRYPTED PRIVATE KEY-----")
        || text.contains("Proc-Type: 4,ENCRYPTED")
    {
        let (key, plain) = (quoted(name), quoted(format!("{name}.plain")));
        bail!(
            "{name}: is encrypted, and a daemon has nobody to ask for the passphrase; decrypt it: \
             openssl pkey -in {key} -out {plain}"
        );
    }
    rustls_pemfile::private_key(&mut text.as_bytes())
        .map_err(|error| not(&format!("not valid PEM: {error}"), name))?
        .ok_or_else(|| not("holds no private key (-----BEGIN PRIVATE KEY-----)", name))
}

/// The certificates in `text` as those to trust.
pub(super) fn authorities(name: &str, text: &str) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(name, text)? {
        let added = roots.add(certificate);
        added.map_err(|error| not(&format!("cannot be used: {error}"), name))?;
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A secret that is swapped while it is read comes out as one whole, whichever.
    #[test]
    fn files_that_are_swapped_while_they_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let names = ["cert", "key", "ca"];
        for set in ["old", "new"] {
            fs::create_dir(at(set)).unwrap();
            for name in names {
                fs::write(at(set).join(name), set).unwrap();
            }
        }
        std::os::unix::fs::symlink("old", at("data")).unwrap();
        let paths = names.map(|name| at("data").join(name));
        let paths = paths.each_ref().map(PathBuf::as_path);
        let mut reads = 0;
        let contents = together(paths, |path| {
            let text = fs::read_to_string(path).unwrap();
            reads += 1;
            if reads == 2 {
                std::os::unix::fs::symlink("new", at("swap")).unwrap();
                fs::rename(at("swap"), at("data")).unwrap();
            }
            text
        });
        assert_eq!(contents.unwrap(), ["new"; 3]);
        assert_eq!(reads, 6, "the first look saw both");

        let mut size = 0;
        let restless = together(paths, |path| {
            size += 1;
            fs::write(path, " ".repeat(size)).unwrap();
        });
        assert_eq!((restless, size), (None, 3 * LOOKS));
    }

    /// Tests often run as root, whom no mode keeps out.
    #[test]
    fn a_file_that_may_not_be_read() {
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let said = unreadable(Path::new("/a b/gw.key"), &denied).to_string();
        let user = rustix::process::geteuid().as_raw();
        let start = format!("/a b/gw.key: cannot be read by user id {user}: permission denied; ");
        assert!(said.starts_with(&start) && said.ends_with(": ls -l '/a b/gw.key'"), "{said}");
        let missing = io::Error::from(io::ErrorKind::NotFound);
        let said = unreadable(Path::new("/gw.key"), &missing).to_string();
        assert_eq!(said, "/gw.key: cannot be read: entity not found");
    }
}
