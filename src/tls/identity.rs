//! Certificates and keys: read from PEM, checked, and refused with words that say what to mend.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fmt, io};

use anyhow::{Error, Result, anyhow, bail};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::authorities::Authorities;
use super::certificate_lint;
use super::certificate_lint::{Finding, Severity, Use, quoted};
use super::certificate_names::Validity;
use super::error_text::describe_tls;
use super::file_format::other_format;
use super::identity_lint;
use super::pem;
use super::pem::{Block, Content};
use super::private_key;
use super::private_key::Unsupported;
use super::provider;
use crate::os::file;

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
    /// Where the configuration names each.
    pub(crate) keys: Keys,
}

/// The keys of a configuration that name the files of an identity, as they are shown in messages:
/// `gateway.toml:8: tls.cert`. Empty where there is no configuration.
#[derive(Clone, Debug, Default)]
pub(crate) struct Keys {
    pub(crate) cert: String,
    pub(crate) key: String,
    pub(crate) ca: String,
}

impl PartialEq for Keys {
    /// Always: files that are named in another line are the same files.
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Keys {}

impl Files {
    /// Files that no configuration names.
    #[cfg(test)]
    pub(crate) fn of(cert: &str, key: &str, ca: &str) -> Self {
        Self { cert: cert.into(), key: key.into(), ca: ca.into(), keys: Keys::default() }
    }

    /// All three.
    pub(crate) fn paths(&self) -> [&Path; 3] {
        [&self.cert, &self.key, &self.ca]
    }
}

/// How often files are read that change meanwhile.
const LOOKS: usize = 3;

/// Who we are and whom we trust.
pub(crate) struct Identity {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) key: PrivateKeyDer<'static>,
    pub(crate) authorities: Arc<Authorities>,
    findings: Vec<Finding>,
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
    /// Every file that cannot be used, each with its fault and what to do, and what else was found.
    pub(crate) fn load(
        files: &Files,
        purpose: Use<'_>,
        now: UnixTime,
    ) -> Result<Self, Vec<Finding>> {
        let keys = &files.keys;
        let [cert, key, ca] =
            [&files.cert, &files.key, &files.ca].map(|path| path.to_string_lossy());
        let Some([cert_pem, key_pem, ca_pem]) = together(files.paths(), read) else {
            let text = format!("{cert}: this file, {key} or {ca} changes while it is read");
            return Err(vec![Finding::new(Severity::Error, &keys.cert, text)]);
        };
        let chain = parse(&cert_pem, |pem| certificates(&cert, pem));
        let key_read = parse(&key_pem, |pem| private_key_of(&key, pem));
        let of_clients = matches!(purpose, Use::Listening(_));
        let authorities = parse(&ca_pem, |pem| authorities(&ca, pem, of_clients));
        let authorities = match purpose {
            Use::ZooKeeper => authorities.map(Authorities::with_webpki_alone),
            Use::Dialing | Use::Listening(_) => authorities,
        };
        let authorities = authorities.map(Arc::new);
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

        let mut found = match (&chain, &authorities) {
            (Ok(chain), Ok(authorities)) => {
                identity_lint::certificates(chain, authorities, files, purpose, now)
            }
            (Ok(chain), Err(_)) => certificate_lint::chain(chain, false, files, purpose, now),
            (Err(_), _) => Vec::new(),
        };
        if key_read.is_ok() {
            found.extend(identity_lint::key_mode(files));
        }
        match Self::of(keys, (&cert, chain), (&key, key_read), authorities) {
            Ok(identity) => Ok(Self { findings: found, ..identity }),
            Err(refusal) => {
                match refusal {
                    // Said already, and better.
                    Refusal::Certificate(_) if found.iter().any(Finding::is_error) => {}
                    refusal => found.extend(refusal.into_findings()),
                }
                Err(found)
            }
        }
    }

    /// An identity made in this process.
    #[cfg(any(feature = "demo", test))]
    pub(crate) fn from_pem(cert: &str, key: &str, ca: &str) -> Result<Self> {
        let identity = Self::of(
            &Keys::default(),
            ("certificate", certificates("certificate", cert.as_bytes())),
            ("key", private_key_of("key", key.as_bytes())),
            authorities("CA", ca.as_bytes(), true).map(Arc::new),
        );
        identity.map_err(Refusal::into_error)
    }

    /// Of its parts, the first two with the names to use for them in errors.
    fn of(
        keys: &Keys,
        (name, chain): (&str, Result<Vec<CertificateDer<'static>>>),
        (key_name, key): (&str, Result<PrivateKeyDer<'static>>),
        authorities: Result<Arc<Authorities>>,
    ) -> Result<Self, Refusal> {
        let (chain, key, authorities) = match (chain, key, authorities) {
            (Ok(chain), Ok(key), Ok(authorities)) => (chain, key, authorities),
            (chain, key, authorities) => {
                let faults = [
                    (chain.err(), &keys.cert),
                    (key.err(), &keys.key),
                    (authorities.err(), &keys.ca),
                ];
                let faults = faults.into_iter().filter_map(|(error, key)| {
                    Some(Finding::new(Severity::Error, key, format!("{:#}", error?)))
                });
                return Err(Refusal::Other(faults.collect()));
            }
        };
        CertifiedKey::from_der(chain.clone(), key.clone_key(), &provider())
            .map_err(|error| refusal(&error, keys, (name, &chain[0]), (key_name, &key)))?;
        Ok(Self { chain, key, authorities, findings: Vec::new() })
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

    /// Until when our certificate is good, in RFC 3339.
    pub(crate) fn valid_until(&self) -> Option<String> {
        let end = jiff::Timestamp::from_second(self.not_after()?).ok()?;
        Some(end.to_string())
    }

    /// The subject of our certificate, printable and at most 200 characters long.
    pub(crate) fn subject(&self) -> Option<String> {
        let (_, certificate) = X509Certificate::from_der(self.chain.first()?).ok()?;
        Some(certificate.subject().to_string().escape_default().take(200).collect())
    }

    /// When the first of the authorities ends that has not ended yet, or the last one that has, in
    /// seconds since the epoch.
    pub(crate) fn authority_not_after(&self) -> Option<i64> {
        let now = UnixTime::now();
        let each = self.authorities.certificates().iter().filter_map(Validity::of);
        let (valid, ended): (Vec<_>, Vec<_>) = each.partition(|validity| validity.contains(now));
        let first = valid.iter().map(|validity| validity.until).min();
        first.or_else(|| ended.iter().map(|validity| validity.until).max())
    }

    /// Whether `other` shows the same certificate.
    pub(crate) fn shows_what(&self, other: &Self) -> bool {
        self.chain == other.chain
    }
}

impl PartialEq for Identity {
    /// Whether both have the same certificates, key, authorities and revocation lists.
    fn eq(&self, other: &Self) -> bool {
        self.chain == other.chain && self.key == other.key && self.authorities == other.authorities
    }
}

/// Why rustls takes no identity.
enum Refusal {
    /// It cannot read our certificate.
    Certificate(Finding),
    Other(Vec<Finding>),
}

impl Refusal {
    fn into_findings(self) -> Vec<Finding> {
        match self {
            Self::Certificate(finding) => vec![finding],
            Self::Other(findings) => findings,
        }
    }

    #[cfg(any(feature = "demo", feature = "otlp", test))]
    fn into_error(self) -> Error {
        let faults: Vec<_> = self.into_findings().iter().map(ToString::to_string).collect();
        anyhow!(faults.join("\n"))
    }
}

/// Checks that `chain` and `key`, each with the name of its file, can be used together.
///
/// # Errors
/// What is wrong with them and what to do.
#[cfg(feature = "otlp")]
pub(crate) fn check_pair(
    (name, chain): (&str, &[CertificateDer<'static>]),
    (key_name, key): (&str, &PrivateKeyDer<'static>),
) -> Result<()> {
    CertifiedKey::from_der(chain.to_vec(), key.clone_key(), &provider()).map(drop).map_err(
        |error| {
            let files = ((name, &chain[0]), (key_name, key));
            refusal(&error, &Keys::default(), files.0, files.1).into_error()
        },
    )
}

/// Says why rustls takes no `certificate` with this `key`, of the files with these names.
fn refusal(
    error: &rustls::Error,
    keys: &Keys,
    (name, certificate): (&str, &CertificateDer<'_>),
    (key_name, key): (&str, &PrivateKeyDer<'_>),
) -> Refusal {
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
            return Refusal::Certificate(Finding::new(Severity::Error, &keys.cert, text));
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
    Refusal::Other(vec![Finding::new(Severity::Error, &keys.key, text)])
}

fn explicit_parameters(key_name: &str) -> String {
    let (key, named) = (quoted(key_name), quoted(format!("{key_name}.named")));
    format!(
        "{key_name}: an EC key with explicit parameters is not supported, nor a certificate for \
         one; name its curve, and have the certificate issued again for that: openssl ec -in {key} \
         -param_enc named_curve -out {named}"
    )
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

/// What `parse` makes of a file's content.
fn parse<T>(pem: &Result<Vec<u8>>, parse: impl FnOnce(&[u8]) -> Result<T>) -> Result<T> {
    pem.as_ref().map_err(|error| anyhow!("{error:#}")).and_then(|pem| parse(pem))
}

/// Reads a PEM file.
///
/// # Errors
/// It cannot be read, or is of another format.
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
            "{name}: cannot be read by user id {user}: {error}; look at its mode: ls -l {shown}"
        )
    } else {
        anyhow!("{name}: cannot be read: {error}")
    }
}

/// A fault of a PEM file, with the command that shows what is in it.
fn not(fault: &str, name: &str) -> Error {
    let shown = quoted(name);
    anyhow!("{name}: {fault}; see what is in it: openssl storeutl -noout {shown}")
}

/// The same, of the block that begins in `line`.
fn not_in(line: usize, fault: &str, name: &str) -> Error {
    let shown = quoted(name);
    anyhow!("{name}:{line}: {fault}; see what is in it: openssl storeutl -noout {shown}")
}

fn blocks(name: &str, pem: &[u8]) -> Result<Vec<Block>> {
    pem::read(pem)
        .map_err(|error| not_in(error.line, &format!("not valid PEM: {}", error.problem), name))
}

/// The certificates in `pem`, at least one.
pub(crate) fn certificates(name: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>> {
    let mut chain = Vec::new();
    for Block { line, content } in blocks(name, pem)? {
        let (Content::Certificate(certificate) | Content::Trusted(certificate, _)) = content else {
            continue;
        };
        // The first one is parsed by rustls, which has more to say about it.
        if !chain.is_empty() && X509Certificate::from_der(&certificate).is_err() {
            return Err(not_in(line, "cannot be used: this is not a certificate", name));
        }
        chain.push(certificate);
    }
    if chain.is_empty() {
        return Err(not("holds no certificate (-----BEGIN CERTIFICATE-----)", name));
    }
    Ok(chain)
}

/// The first private key in `pem`; as with OpenSSL, others are not used.
pub(crate) fn private_key_of(name: &str, pem: &[u8]) -> Result<PrivateKeyDer<'static>> {
    for Block { line, content } in blocks(name, pem)? {
        match content {
            // By its structure: some tools label PKCS#8 as RSA PRIVATE KEY.
            Content::Key(der) => {
                return PrivateKeyDer::try_from(der)
                    .map_err(|_| not_in(line, "cannot be used: this is not a private key", name));
            }
            Content::EncryptedKey => {
                let (key, plain) = (quoted(name), quoted(format!("{name}.plain")));
                bail!(
                    "{name}: is encrypted, and a daemon has nobody to ask for the passphrase; \
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
    Err(not("holds no private key (-----BEGIN PRIVATE KEY-----)", name))
}

/// The certificates in `pem` as those to trust, for servers, and for clients if they are `of_clients`.
pub(crate) fn authorities(name: &str, pem: &[u8], of_clients: bool) -> Result<Authorities> {
    let mut authorities = Authorities::default();
    for Block { line, content } in blocks(name, pem)? {
        let added = match content {
            Content::Certificate(certificate) => authorities.add(certificate),
            Content::Trusted(certificate, uses) => {
                // OpenSSL trusts it for nothing else.
                if !uses.servers || (of_clients && !uses.clients) {
                    let lacking = if uses.servers { "clientAuth" } else { "serverAuth" };
                    let fault = format!(
                        "cannot be used: the certificate has trusted uses (openssl x509 -addtrust), \
                         and {lacking} is none of them; add it, or remove them: openssl x509 -clrtrust"
                    );
                    return Err(not_in(line, &fault, name));
                }
                authorities.add(certificate)
            }
            Content::RevocationList(list) => authorities.add_revocation_list(list),
            Content::Key(_) | Content::EncryptedKey | Content::OtherKey(_) | Content::Unused => {
                continue;
            }
        };
        added.map_err(|error| {
            not_in(line, &format!("cannot be used: {}", describe_tls(&error)), name)
        })?;
    }
    if authorities.is_empty() {
        return Err(not("holds no certificate (-----BEGIN CERTIFICATE-----)", name));
    }
    Ok(authorities)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// OpenSSL trusts a certificate with trusted uses for nothing else.
    #[test]
    fn authorities_must_be_trusted_for_the_use_that_there_is() {
        let params = rcgen::CertificateParams::new(["ca.example.org".to_owned()]).unwrap();
        let root = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
        for (purpose, servers, clients) in [(1, true, false), (2, false, true), (4, false, false)] {
            let uses = [0x30, 12, 0x30, 10, 0x06, 8, 0x2b, 6, 1, 5, 5, 7, 3, purpose];
            let der = [&root.der()[..], &uses].concat();
            let pem = ::pem::encode(&::pem::Pem::new("TRUSTED CERTIFICATE", der));
            let refused = |of_clients| {
                authorities("ca.pem", pem.as_bytes(), of_clients).err().map(|e| e.to_string())
            };
            assert_eq!(refused(false).is_none(), servers, "{purpose}");
            assert_eq!(refused(true).is_none(), servers && clients, "{purpose}");
            let lacking = if servers { "clientAuth is none" } else { "serverAuth is none" };
            assert!(refused(true).is_some_and(|error| error.contains(lacking)), "{purpose}");
            assert_eq!(certificates("gw.pem", pem.as_bytes()).unwrap(), [root.der().clone()]);
        }
    }

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
