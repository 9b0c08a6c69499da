//! Reads certificates and keys from PEM files and checks them, with errors that name the fix.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::{fmt, io};

use anyhow::{Error, Result, anyhow, bail};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::certificate_lint;
use super::certificate_lint::{CertificatePurpose, Finding, Severity, quoted};
use super::certificate_names::Validity;
use super::error_text::describe_tls;
use super::file_format::other_format;
use super::identity_lint;
use super::pem;
use super::pem::{Block, Content};
use super::private_key;
use super::private_key::Unsupported;
use super::provider;
use super::trust_anchors::TrustAnchors;
use crate::config::{TlsFileKeys, TlsFiles};
use crate::os::file;

/// How often files that change while they are read are read again.
const READS: usize = 3;

/// Our certificate chain and key, and the CAs that we trust.
pub(crate) struct Identity {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
    pub(crate) trust_anchors: Arc<TrustAnchors>,
    findings: Vec<Finding>,
}

impl fmt::Debug for Identity {
    /// Leaves the key out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("chain", &self.chain.len()).finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads `files`, checks that they belong together, and collects the findings about the
    /// certificate for the time `now` and this `purpose`.
    ///
    /// # Errors
    /// A finding for each file that cannot be used, and all other findings.
    pub(crate) fn load(
        files: &TlsFiles,
        purpose: CertificatePurpose<'_>,
        now: UnixTime,
    ) -> Result<Self, Vec<Finding>> {
        let keys = &files.keys;
        let [cert, key, ca] =
            [&files.cert, &files.key, &files.ca].map(|path| path.to_string_lossy());
        let Some([cert_pem, key_pem, ca_pem]) = read_consistent(files.paths(), read) else {
            let text = format!(
                "{cert}: cannot be read: it, {key} or {ca} is being replaced; try again when the files \
                 have settled"
            );
            return Err(vec![Finding::new(Severity::Error, &keys.cert, text)]);
        };
        let chain = parse(&cert_pem, |pem| certificates(&cert, pem));
        let key_read = parse(&key_pem, |pem| private_key_of(&key, pem));
        let of_clients = matches!(purpose, CertificatePurpose::Listening(_));
        let trust_anchors = parse(&ca_pem, |pem| trust_anchors(&ca, pem, of_clients));
        let trust_anchors = match purpose {
            CertificatePurpose::ZooKeeper => trust_anchors.map(TrustAnchors::with_webpki_alone),
            CertificatePurpose::Dialing | CertificatePurpose::Listening(_) => trust_anchors,
        };
        let trust_anchors = trust_anchors.map(Arc::new);
        if let (Ok(cert_pem), Ok(key_pem)) = (&cert_pem, &key_pem)
            && chain.is_err()
            && key_read.is_err()
            && private_key_of(&cert, cert_pem).is_ok()
            && certificates(&key, key_pem).is_ok()
        {
            let text =
                format!("{cert}: holds the private key, and {key} the certificate: swap the two");
            return Err(vec![Finding::new(Severity::Error, &keys.cert, text)]);
        }

        let mut findings = match (&chain, &trust_anchors) {
            (Ok(chain), Ok(trust_anchors)) => {
                identity_lint::certificates(chain, trust_anchors, files, purpose, now)
            }
            (Ok(chain), Err(_)) => certificate_lint::chain(chain, false, files, purpose, now),
            (Err(_), _) => Vec::new(),
        };
        if key_read.is_ok() {
            findings.extend(identity_lint::key_mode(files));
        }
        match Self::from_parts(keys, (&cert, chain), (&key, key_read), trust_anchors) {
            Ok(identity) => Ok(Self { findings, ..identity }),
            Err(error) => {
                match error {
                    // `certificate_lint` has reported the reason in more detail.
                    IdentityError::Certificate(_) if findings.iter().any(Finding::is_error) => {}
                    error => findings.extend(error.into_findings()),
                }
                Err(findings)
            }
        }
    }

    /// Makes an identity from PEM that this process has generated.
    #[cfg(any(feature = "demo", test))]
    pub(crate) fn from_pem(cert: &str, key: &str, ca: &str) -> Result<Self> {
        let identity = Self::from_parts(
            &TlsFileKeys::default(),
            ("certificate", certificates("certificate", cert.as_bytes())),
            ("key", private_key_of("key", key.as_bytes())),
            trust_anchors("CA", ca.as_bytes(), true).map(Arc::new),
        )?;
        Ok(identity)
    }

    /// Checks that rustls accepts the parts. The names are those that errors use for the first two.
    fn from_parts(
        keys: &TlsFileKeys,
        (name, chain): (&str, Result<Vec<CertificateDer<'static>>>),
        (key_name, key): (&str, Result<PrivateKeyDer<'static>>),
        trust_anchors: Result<Arc<TrustAnchors>>,
    ) -> Result<Self, IdentityError> {
        let (chain, key, trust_anchors) = match (chain, key, trust_anchors) {
            (Ok(chain), Ok(key), Ok(trust_anchors)) => (chain, key, trust_anchors),
            (chain, key, trust_anchors) => {
                let errors = [
                    (chain.err(), &keys.cert),
                    (key.err(), &keys.key),
                    (trust_anchors.err(), &keys.ca),
                ];
                let findings = errors.into_iter().filter_map(|(error, key)| {
                    Some(Finding::new(Severity::Error, key, format!("{:#}", error?)))
                });
                return Err(IdentityError::Other(findings.collect()));
            }
        };
        CertifiedKey::from_der(chain.clone(), key.clone_key(), &provider())
            .map_err(|error| explain(&error, keys, (name, &chain[0]), (key_name, &key)))?;
        Ok(Self { chain, key, trust_anchors, findings: Vec::new() })
    }

    /// Returns the findings about files that can be used nevertheless.
    pub(crate) fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Returns the end of our certificate's validity, in seconds since the epoch.
    pub(crate) fn not_after(&self) -> Option<i64> {
        let (_, certificate) = X509Certificate::from_der(self.chain.first()?).ok()?;
        Some(certificate.validity().not_after.timestamp())
    }

    /// Returns the end of our certificate's validity in RFC 3339.
    pub(crate) fn valid_until(&self) -> Option<String> {
        let end = jiff::Timestamp::from_second(self.not_after()?).ok()?;
        Some(end.to_string())
    }

    /// Returns the subject of our certificate, printable and at most 200 characters long.
    pub(crate) fn subject(&self) -> Option<String> {
        let (_, certificate) = X509Certificate::from_der(self.chain.first()?).ok()?;
        Some(certificate.subject().to_string().escape_default().take(200).collect())
    }

    /// Returns when the first of the valid CA certificates ends, in seconds since the epoch; when
    /// none is valid, when the last one has ended.
    pub(crate) fn authority_not_after(&self) -> Option<i64> {
        let now = UnixTime::now();
        let each = self.trust_anchors.certificates().iter().filter_map(Validity::of);
        let (valid, ended): (Vec<_>, Vec<_>) = each.partition(|validity| validity.contains(now));
        let first = valid.iter().map(|validity| validity.until).min();
        first.or_else(|| ended.iter().map(|validity| validity.until).max())
    }

    /// Whether `other` presents the same chain.
    pub(crate) fn same_chain(&self, other: &Self) -> bool {
        self.chain == other.chain
    }
}

impl PartialEq for Identity {
    /// Whether both have the same certificates, key, CA certificates and revocation lists.
    fn eq(&self, other: &Self) -> bool {
        self.chain == other.chain
            && self.key == other.key
            && self.trust_anchors == other.trust_anchors
    }
}

/// Why rustls does not accept an identity.
#[derive(Debug, thiserror::Error)]
enum IdentityError {
    /// rustls cannot use our certificate.
    #[error("{0}")]
    Certificate(Finding),
    /// A file cannot be read, or rustls cannot use the key.
    #[error("{}", joined(.0))]
    Other(Vec<Finding>),
}

/// Returns one line for each of `findings`.
fn joined(findings: &[Finding]) -> String {
    let lines: Vec<_> = findings.iter().map(ToString::to_string).collect();
    lines.join("\n")
}

impl IdentityError {
    fn into_findings(self) -> Vec<Finding> {
        match self {
            Self::Certificate(finding) => vec![finding],
            Self::Other(findings) => findings,
        }
    }
}

/// Explains why rustls does not accept `certificate` with this `key`, from the files of these
/// names.
fn explain(
    error: &rustls::Error,
    keys: &TlsFileKeys,
    (name, certificate): (&str, &CertificateDer<'_>),
    (key_name, key): (&str, &PrivateKeyDer<'_>),
) -> IdentityError {
    use rustls::{Error, InconsistentKeys};
    let (cert, shown) = (quoted(name), quoted(key_name));
    let public =
        X509Certificate::from_der(certificate).map(|(_, parsed)| parsed.subject_pki.clone());
    let same = || public.is_ok_and(|public| private_key::has_public_key(key, &public));
    let unsupported = private_key::unsupported(key);
    let text = match (error, unsupported) {
        (Error::InvalidCertificate(_), _) => {
            let text = format!(
                "{name}: cannot be used: {}; look at it: openssl x509 -in {cert} -noout -text",
                describe_tls(error)
            );
            return IdentityError::Certificate(Finding::new(Severity::Error, &keys.cert, text));
        }
        (_, Some(Unsupported::ExplicitParameters)) => explicit_parameters(key_name),
        (Error::InconsistentKeys(InconsistentKeys::KeyMismatch), _) if same() => {
            explicit_parameters(key_name)
        }
        (Error::InconsistentKeys(InconsistentKeys::KeyMismatch), _) => format!(
            "{key_name}: is not the key of the certificate in {name}; the same must come out of \
             both: openssl pkey -in {shown} -pubout; openssl x509 -in {cert} -noout -pubkey"
        ),
        (_, Some(Unsupported::RsaSize(bits))) => format!(
            "{key_name}: an RSA key of {bits} bits is not supported, which must have 2048 to 8192; \
             make another, and a certificate for it: openssl genpkey -algorithm RSA -pkeyopt \
             rsa_keygen_bits:2048 -out {}",
            quoted(format!("{key_name}.new"))
        ),
        (_, Some(Unsupported::Kind(kind))) => format!(
            "{key_name}: this kind of key is not supported ({}): RSA of 2048 to 8192 bits, ECDSA on \
             P-256, P-384 or P-521, and Ed25519 are; look at it: openssl pkey -in {shown} -noout \
             -text_pub",
            kind.unwrap_or("unknown")
        ),
        (_, None) => format!(
            "{key_name}: cannot be used: {}; look at it: openssl pkey -in {shown} -noout -text_pub",
            describe_tls(error)
        ),
    };
    IdentityError::Other(vec![Finding::new(Severity::Error, &keys.key, text)])
}

fn explicit_parameters(key_name: &str) -> String {
    let (key, named) = (quoted(key_name), quoted(format!("{key_name}.named")));
    format!(
        "{key_name}: an EC key with explicit parameters is not supported, nor a certificate for \
         one; name its curve, and have the certificate issued again for that: openssl ec -in {key} \
         -param_enc named_curve -out {named}"
    )
}

/// Calls `read` for each file and returns the results if no file has changed meanwhile; `None` if
/// the files keep changing. A renewal replaces them one after the other, and a Kubernetes secret as
/// a whole, but possibly between two of our reads.
fn read_consistent<T>(paths: [&Path; 3], mut read: impl FnMut(&Path) -> T) -> Option<[T; 3]> {
    let mut before = paths.map(file_version);
    for _ in 0..READS {
        let contents = paths.map(&mut read);
        let after = paths.map(file_version);
        if before == after {
            return Some(contents);
        }
        before = after;
    }
    None
}

/// Returns what distinguishes versions of a file: device, inode, size and times of change.
fn file_version(path: &Path) -> Option<[i128; 7]> {
    let of = |file: Metadata| {
        let changes = [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()];
        let [modified, modified_ns, changed, changed_ns] = changes.map(i128::from);
        let [device, inode, size] = [file.dev(), file.ino(), file.size()].map(i128::from);
        [device, inode, size, modified, modified_ns, changed, changed_ns]
    };
    fs::metadata(path).ok().map(of)
}

/// Parses the content of a file, if it could be read.
fn parse<T>(pem: &Result<Vec<u8>>, parse: impl FnOnce(&[u8]) -> Result<T>) -> Result<T> {
    pem.as_ref().map_err(|error| anyhow!("{error:#}")).and_then(|pem| parse(pem))
}

/// Reads a PEM file.
///
/// # Errors
/// The file cannot be read, or has another format than PEM.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let bytes = file::read(path).map_err(|error| unreadable(path, &error))?;
    match other_format(path, &bytes) {
        None => Ok(bytes),
        Some(error) => Err(error),
    }
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    let (name, shown) = (path.display(), quoted(path));
    if error.kind() == io::ErrorKind::PermissionDenied {
        let user = rustix::process::geteuid().as_raw();
        anyhow!(
            "{name}: cannot be read by user id {user}: {error}; check its owner and mode: ls -l {shown}"
        )
    } else {
        anyhow!("{name}: cannot be read: {error}")
    }
}

/// Returns an error about a PEM file or its block that begins in `line`, with the command that
/// shows its content.
fn pem_error(line: Option<usize>, problem: &str, name: &str) -> Error {
    let line = line.map(|line| format!(":{line}")).unwrap_or_default();
    let shown = quoted(name);
    anyhow!("{name}{line}: {problem}; show its content: openssl storeutl -noout {shown}")
}

fn blocks(name: &str, pem: &[u8]) -> Result<Vec<Block>> {
    pem::read(pem).map_err(|error| {
        pem_error(Some(error.line), &format!("not valid PEM: {}", error.problem), name)
    })
}

/// Returns the certificates in `pem`, at least one.
pub(crate) fn certificates(name: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>> {
    let mut chain = Vec::new();
    for Block { line, content } in blocks(name, pem)? {
        let (Content::Certificate(certificate) | Content::Trusted(certificate, _)) = content else {
            continue;
        };
        // rustls parses the first one and reports more detail.
        if !chain.is_empty() && X509Certificate::from_der(&certificate).is_err() {
            return Err(pem_error(Some(line), "cannot be used: this is not a certificate", name));
        }
        chain.push(certificate);
    }
    if chain.is_empty() {
        return Err(pem_error(None, "holds no certificate (-----BEGIN CERTIFICATE-----)", name));
    }
    Ok(chain)
}

/// Returns the first private key in `pem`. Like OpenSSL, ignores further ones.
pub(crate) fn private_key_of(name: &str, pem: &[u8]) -> Result<PrivateKeyDer<'static>> {
    for Block { line, content } in blocks(name, pem)? {
        match content {
            // The structure decides the format, because some tools label PKCS#8 as RSA PRIVATE KEY.
            Content::Key(der) => {
                return PrivateKeyDer::try_from(der).map_err(|_| {
                    pem_error(Some(line), "cannot be used: this is not a private key", name)
                });
            }
            Content::EncryptedKey => {
                let (key, plain) = (quoted(name), quoted(format!("{name}.plain")));
                bail!(
                    "{name}: is encrypted, and a daemon cannot ask for the passphrase; \
                     decrypt it: openssl pkey -in {key} -out {plain}"
                );
            }
            Content::OtherKey(label) => {
                let (key, plain) = (quoted(name), quoted(format!("{name}.pkcs8")));
                bail!(
                    "{name}:{line}: {label} is not supported; convert it, if it is an RSA, ECDSA \
                     or Ed25519 key: openssl pkey -in {key} -out {plain}"
                );
            }
            Content::Certificate(_)
            | Content::Trusted(..)
            | Content::RevocationList(_)
            | Content::Unused => {}
        }
    }
    Err(pem_error(None, "holds no private key (-----BEGIN PRIVATE KEY-----)", name))
}

/// Returns the certificates in `pem` as trusted CAs for servers and, with `of_clients`, for
/// clients.
pub(crate) fn trust_anchors(name: &str, pem: &[u8], of_clients: bool) -> Result<TrustAnchors> {
    let mut trust_anchors = TrustAnchors::default();
    for Block { line, content } in blocks(name, pem)? {
        let added = match content {
            Content::Certificate(certificate) => trust_anchors.add(certificate),
            Content::Trusted(certificate, uses) => {
                // OpenSSL trusts the certificate for these uses only.
                if !uses.servers || (of_clients && !uses.clients) {
                    let lacking = if uses.servers { "clientAuth" } else { "serverAuth" };
                    let problem = format!(
                        "cannot be used: the certificate has trusted uses (openssl x509 -addtrust), \
                         and {lacking} is not among them; add it, or remove them: openssl x509 -clrtrust"
                    );
                    return Err(pem_error(Some(line), &problem, name));
                }
                trust_anchors.add(certificate)
            }
            Content::RevocationList(list) => trust_anchors.add_revocation_list(list),
            Content::Key(_) | Content::EncryptedKey | Content::OtherKey(_) | Content::Unused => {
                continue;
            }
        };
        added.map_err(|error| {
            pem_error(Some(line), &format!("cannot be used: {}", describe_tls(&error)), name)
        })?;
    }
    if trust_anchors.is_empty() {
        return Err(pem_error(None, "holds no certificate (-----BEGIN CERTIFICATE-----)", name));
    }
    Ok(trust_anchors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    /// OpenSSL trusts a certificate with trusted uses for nothing else.
    #[test]
    fn ca_with_trusted_uses_is_refused_for_other_uses() {
        let params = rcgen::CertificateParams::new(["ca.example.org".to_owned()]).unwrap();
        let root = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
        for (purpose, servers, clients) in [(1, true, false), (2, false, true), (4, false, false)] {
            let uses = [0x30, 12, 0x30, 10, 0x06, 8, 0x2b, 6, 1, 5, 5, 7, 3, purpose];
            let der = [&root.der()[..], &uses].concat();
            let pem = ::pem::encode(&::pem::Pem::new("TRUSTED CERTIFICATE", der));
            let refused = |of_clients| {
                trust_anchors("ca.pem", pem.as_bytes(), of_clients).err().map(|e| e.to_string())
            };
            assert_eq!(refused(false).is_none(), servers, "{purpose}");
            assert_eq!(refused(true).is_none(), servers && clients, "{purpose}");
            let lacking = if servers { "clientAuth is not" } else { "serverAuth is not" };
            assert!(refused(true).is_some_and(|error| error.contains(lacking)), "{purpose}");
            assert_eq!(certificates("gw.pem", pem.as_bytes()).unwrap(), [root.der().clone()]);
        }
    }

    /// A secret that is replaced while it is read is read as one consistent version.
    #[test]
    fn files_replaced_while_they_are_read_come_from_one_version() {
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
        let contents = read_consistent(paths, |path| {
            let text = fs::read_to_string(path).unwrap();
            reads += 1;
            if reads == 2 {
                std::os::unix::fs::symlink("new", at("swap")).unwrap();
                fs::rename(at("swap"), at("data")).unwrap();
            }
            text
        });
        assert_eq!(contents.unwrap(), ["new"; 3]);
        assert_eq!(reads, 6, "the first read saw both versions");

        let mut size = 0;
        let restless = read_consistent(paths, |path| {
            size += 1;
            fs::write(path, " ".repeat(size)).unwrap();
        });
        assert_eq!((restless, size), (None, 3 * READS));
    }

    /// Tests often run as root, which may read files of any mode.
    #[test]
    fn file_without_read_permission_is_an_error_with_the_user() {
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let message = unreadable(Path::new("/a b/gw.key"), &denied).to_string();
        let user = rustix::process::geteuid().as_raw();
        let start = format!("/a b/gw.key: cannot be read by user id {user}: permission denied; ");
        assert!(message.starts_with(&start), "{message}");
        let missing = io::Error::from(io::ErrorKind::NotFound);
        let message = unreadable(Path::new("/gw.key"), &missing).to_string();
        assert_eq!(message, "/gw.key: cannot be read: entity not found");
    }
}
