//! Towards a collector of spans: a server like others, which need not be of the system.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use rustls::{ClientConfig, RootCertStore};
use tokio_rustls::TlsConnector;

use super::identity::{authorities, certificates, private_key_of, read};
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
        Some(path) => authorities(&path.to_string_lossy(), &read(path)?)?.roots(),
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
            let shown = builder.with_client_auth_cert(chain, key);
            shown.with_context(|| format!("{name}: cannot be used with {key_name}"))?
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
            "tracing: this system has no certificates of authorities to check the collector's with; \
             name a file with them: tls_ca, or certificate_file with protocol http/protobuf"
        ));
    }
    Ok(roots)
}
