//! Towards a collector of spans: a server like others, which need not be of the system.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use rustls::{ClientConfig, RootCertStore};
use tokio_rustls::TlsConnector;

use super::identity::{certificates, check_pair, private_key_of, read, trust_anchors};
use super::provider;

/// A TLS client that trusts `roots`, or whom the system trusts, and shows `identity`, a certificate
/// and its key; for `protocol` alone.
///
/// # Errors
/// What is wrong with the files, or that the system trusts nobody.
pub(crate) fn collector_connector(
    identity: Option<(&Path, &Path)>,
    roots: Option<&Path>,
    protocol: &[u8],
) -> Result<TlsConnector> {
    let roots = match roots {
        Some(path) => trust_anchors(&path.to_string_lossy(), &read(path)?, false)?.roots(),
        None => Arc::new(system()?),
    };
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .context("TLS versions")?
        .with_root_certificates(roots);
    let mut config = match identity {
        Some((cert, key)) => {
            let (name, key_name) = (cert.to_string_lossy(), key.to_string_lossy());
            let chain = certificates(&name, &read(cert)?)?;
            let key = private_key_of(&key_name, &read(key)?)?;
            check_pair((&name, &chain), (&key_name, &key))?;
            builder.with_client_auth_cert(chain, key).context("the client certificate")?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Whom this system trusts.
fn system() -> Result<RootCertStore> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        return Err(anyhow!(
            "tracing: this system has no CA certificates to verify the collector's with; \
             name a file with them: tls_ca, or certificate_file with protocol http/protobuf"
        ));
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    #[test]
    fn a_key_of_another_certificate_is_refused_in_words() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        let params = CertificateParams::new(["gw.example.org".to_owned()]).expect("a name");
        let cert = params.self_signed(&KeyPair::generate().expect("a key")).expect("a certificate");
        fs::write(at("cert.pem"), cert.pem()).expect("a file");
        let other = KeyPair::generate().expect("a key");
        fs::write(at("key.pem"), other.serialize_pem()).expect("a file");
        let (cert, key) = (at("cert.pem"), at("key.pem"));
        let made = collector_connector(Some((&cert, &key)), Some(&cert), b"h2");
        let error = format!("{:#}", made.err().expect("a refusal"));
        let expected =
            format!("{}: is not the key of the certificate in {}", key.display(), cert.display());
        assert!(error.starts_with(&expected), "{error}");
    }
}
