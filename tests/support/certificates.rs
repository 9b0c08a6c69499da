//! A certificate authority and its certificates, as files, made at run time.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, DnValue,
    ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, KeyPair, KeyUsagePurpose, NameConstraints,
    PKCS_RSA_SHA256, RsaKeySize, SanType,
};
use tempfile::TempDir;

pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    directory: TempDir,
}

/// The PEM files of one identity.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) ca: PathBuf,
    /// Certificate and key in one file, as ZooKeeper wants its key store.
    pub(crate) both: PathBuf,
}

impl Identity {
    /// The three lines of a `zuul.conf` that name its files.
    pub(crate) fn zuul_conf(&self) -> String {
        let Self { cert, key, ca, .. } = self;
        format!(
            "tls_cert = {}\ntls_key = {}\ntls_ca = {}\n",
            cert.display(),
            key.display(),
            ca.display()
        )
    }
}

impl Authority {
    pub(crate) fn new() -> Self {
        Self::with_params(|_| {})
    }

    /// One that may issue for names below `domain` only (RFC 5280, section 4.2.1.10).
    pub(crate) fn constrained(domain: &str) -> Self {
        Self::with_params(|params| {
            params.name_constraints = Some(NameConstraints {
                permitted_subtrees: vec![GeneralSubtree::DnsName(domain.to_owned())],
                excluded_subtrees: Vec::new(),
            });
        })
    }

    /// One whose certificate is for `name` as well, as plain `openssl req -x509` makes them.
    pub(crate) fn self_signed_for(name: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        Self::with_params(|params| {
            params.subject_alt_names =
                vec![SanType::DnsName(name.try_into().expect("a host name"))];
            change(params);
        })
    }

    /// Its own certificate and key, shown as a gateway's.
    pub(crate) fn as_identity(&self) -> Identity {
        let file = |name: &str| self.directory.path().join(name);
        let both = file("both.pem");
        let text = Identity::text(&file("CA.key")) + &Identity::text(&self.ca());
        let private = Permissions::from_mode(0o600);
        fs::set_permissions(file("CA.key"), private).expect("permissions");
        fs::write(&both, text).expect("a PEM file");
        Identity { cert: self.ca(), key: file("CA.key"), ca: self.ca(), both }
    }

    /// A certificate for the same key under another name, as PEM.
    pub(crate) fn renamed(&self, name: DnValue) -> String {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.self_signed(self.issuer.key()).expect("a CA certificate").pem()
    }

    /// An intermediate that this one has signed; its own `ca.pem` is the root's.
    pub(crate) fn intermediate(&self) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "intermediate CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::signed_by(params, key(), &self.issuer).expect("a CA");
        let directory = TempDir::new().expect("a directory for certificates");
        fs::copy(self.ca(), directory.path().join("ca.pem")).expect("ca.pem");
        Self { issuer, directory }
    }

    /// Its certificate, as PEM.
    pub(crate) fn pem(&self) -> String {
        self.issuer.pem()
    }

    fn with_params(change: impl FnOnce(&mut CertificateParams)) -> Self {
        let mut params = CertificateParams::default();
        change(&mut params);
        params.distinguished_name.push(DnType::CommonName, "test CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer = CertifiedIssuer::self_signed(params, key()).expect("a CA certificate");
        let directory = TempDir::new().expect("a directory for certificates");
        fs::write(directory.path().join("ca.pem"), issuer.pem()).expect("ca.pem");
        fs::write(directory.path().join("CA.key"), issuer.key().serialize_pem()).expect("CA.key");
        Self { issuer, directory }
    }

    /// An identity for `name` alone, good for both sides of a connection.
    pub(crate) fn identity_only_for(&self, name: &str) -> Identity {
        self.sign(name, params(&[name]))
    }

    /// An identity for `name`, localhost and 127.0.0.1, good for both sides of a connection.
    pub(crate) fn identity(&self, name: &str) -> Identity {
        self.sign(name, params(&[name, "localhost", "127.0.0.1"]))
    }

    /// As [`Self::identity`], with a key of the kind and size that Zuul's own tools make.
    pub(crate) fn identity_rsa(&self, name: &str) -> Identity {
        let key = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).expect("a key");
        self.sign_key(name, params(&[name, "localhost", "127.0.0.1"]), &key)
    }

    /// An identity whose name is its common name and nothing else, as Zuul's own tools make them.
    pub(crate) fn common_name_only(&self, name: &str) -> Identity {
        self.sign(name, params(&[]))
    }

    /// As [`Self::identity`], but its time is over.
    pub(crate) fn expired(&self, name: &str) -> Identity {
        let mut params = params(&[name, "localhost", "127.0.0.1"]);
        params.not_after = rcgen::date_time_ymd(2021, 7, 1);
        self.sign(name, params)
    }

    /// As [`Self::identity_only_for`], but with something amiss.
    pub(crate) fn identity_with(
        &self,
        name: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Identity {
        let mut params = params(&[name]);
        change(&mut params);
        self.sign(name, params)
    }

    fn sign(&self, common_name: &str, params: CertificateParams) -> Identity {
        self.sign_key(common_name, params, &key())
    }

    fn sign_key(
        &self,
        common_name: &str,
        mut params: CertificateParams,
        key: &KeyPair,
    ) -> Identity {
        params.distinguished_name.push(DnType::CommonName, common_name);
        let certificate = params.signed_by(key, &self.issuer).expect("a certificate").pem();
        let directory = tempfile::tempdir_in(self.directory.path()).expect("a directory").keep();
        let write = |name: &str, text: &str| {
            let path = directory.join(name);
            fs::write(&path, text).expect("a PEM file");
            if name != "cert.pem" {
                let private = Permissions::from_mode(0o600);
                fs::set_permissions(&path, private).expect("permissions");
            }
            path
        };
        Identity {
            cert: write("cert.pem", &certificate),
            key: write("key.pem", &key.serialize_pem()),
            both: write("both.pem", &format!("{}{certificate}", key.serialize_pem())),
            ca: self.ca(),
        }
    }

    /// Where `ca.pem` is, and its key as `CA.key`.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }
}

fn params(names: &[&str]) -> CertificateParams {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let mut params = CertificateParams::new(names).expect("names of a certificate");
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params
}

fn key() -> KeyPair {
    KeyPair::generate().expect("a key")
}

impl Identity {
    pub(crate) fn text(path: &Path) -> String {
        fs::read_to_string(path).expect("a PEM file that was just written")
    }
}
