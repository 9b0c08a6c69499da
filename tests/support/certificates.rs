//! Certificate authorities and certificates, created at run time as PEM files.

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

/// PEM files of one identity.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) ca: PathBuf,
    /// Certificate and key in one file, the format of ZooKeeper's key store.
    pub(crate) both: PathBuf,
}

impl Identity {
    /// Returns the three lines of a `zuul.conf` that name these files.
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

    /// Creates a CA that may issue only for names below `domain` (RFC 5280, section 4.2.1.10).
    pub(crate) fn constrained(domain: &str) -> Self {
        Self::with_params(|params| {
            params.name_constraints = Some(NameConstraints {
                permitted_subtrees: vec![GeneralSubtree::DnsName(domain.to_owned())],
                excluded_subtrees: Vec::new(),
            });
        })
    }

    /// Creates a CA whose own certificate also has the name `name`, as plain `openssl req -x509`
    /// does.
    pub(crate) fn self_signed_for(name: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        Self::with_params(|params| {
            params.subject_alt_names =
                vec![SanType::DnsName(name.try_into().expect("a host name"))];
            change(params);
        })
    }

    /// Returns the CA's own certificate and key as the identity of a gateway.
    pub(crate) fn as_identity(&self) -> Identity {
        let file = |name: &str| self.directory.path().join(name);
        let both = file("both.pem");
        let text = Identity::text(&file("CA.key")) + &Identity::text(&self.ca());
        let private = Permissions::from_mode(0o600);
        fs::set_permissions(file("CA.key"), private).expect("permissions");
        fs::write(&both, text).expect("a PEM file");
        Identity { cert: self.ca(), key: file("CA.key"), ca: self.ca(), both }
    }

    /// Returns a certificate for the same key with another subject, as PEM.
    pub(crate) fn renamed(&self, name: DnValue) -> String {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.self_signed(self.issuer.key()).expect("a CA certificate").pem()
    }

    /// Creates an intermediate CA signed by this CA; its `ca.pem` is the root's.
    pub(crate) fn intermediate(&self) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "intermediate CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::signed_by(params, key(), &self.issuer).expect("a CA");
        let directory = TempDir::new().expect("a directory for certificates");
        fs::copy(self.ca(), directory.path().join("ca.pem")).expect("ca.pem");
        Self { issuer, directory }
    }

    /// Returns the CA's certificate as PEM.
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

    /// Issues an identity for `name` only, valid for client and server authentication.
    pub(crate) fn identity_only_for(&self, name: &str) -> Identity {
        self.sign(name, params(&[name]))
    }

    /// Issues an identity for `name`, localhost and 127.0.0.1, valid for client and server
    /// authentication.
    pub(crate) fn identity(&self, name: &str) -> Identity {
        self.sign(name, params(&[name, "localhost", "127.0.0.1"]))
    }

    /// Like [`Self::identity`], with a key of the type and size that Zuul's own tools create.
    pub(crate) fn identity_rsa(&self, name: &str) -> Identity {
        let key = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).expect("a key");
        self.sign_key(name, params(&[name, "localhost", "127.0.0.1"]), &key)
    }

    /// Issues an identity that has its name only as common name, as Zuul's own tools do.
    pub(crate) fn common_name_only(&self, name: &str) -> Identity {
        self.sign(name, params(&[]))
    }

    /// Like [`Self::identity`], but expired.
    pub(crate) fn expired(&self, name: &str) -> Identity {
        let mut params = params(&[name, "localhost", "127.0.0.1"]);
        params.not_after = rcgen::date_time_ymd(2021, 7, 1);
        self.sign(name, params)
    }

    /// Like [`Self::identity_only_for`], with certificate parameters modified by `change`.
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

    /// Directory that contains `ca.pem` and the CA's key, `CA.key`.
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
