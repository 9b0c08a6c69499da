//! The listening side.

use std::io;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs::Ticketer;
use rustls::pki_types::CertificateDer;
use rustls::server::{Acceptor as HelloReader, NoServerSessionStorage, WebPkiClientVerifier};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use super::certificate::{self, is_constrained};
use super::{ELSEWHERE_PROTOCOL, GATEWAY_PROTOCOL, Identity, Names, ZONE_PREFIX, provider};

/// The most plaintext in one record, in bytes.
///
/// zuul-web polls the socket and then reads 1024 bytes once: what a record holds beyond that stays
/// invisible in its TLS library until more arrives (`zuul/web/__init__.py`).
const PLAINTEXT_MAX: usize = 1024;

/// rustls counts a record's header into its limit.
const RECORD_HEADER: usize = 5;

/// Whether a TLS listener wants to see the client's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClientCertificate {
    /// None, no connection: what Zuul's own gateway does.
    Required,
    /// Checked if shown.
    Optional,
    /// Not asked for.
    None,
}

/// Shakes hands with clients.
#[derive(Clone)]
pub(crate) struct Acceptor {
    /// For zuul-web, whose consoles freeze on larger records and on session tickets, which make the
    /// socket readable without any log to read; and for everybody we do not know better.
    cautious: Arc<ServerConfig>,
    /// For gateways of our own kind, told by ALPN: full records, and resumption.
    own_kind: Arc<ServerConfig>,
    /// For those of them that wanted a gateway of another zone.
    elsewhere: Arc<ServerConfig>,
    zone: Option<Arc<str>>,
    /// Whether a client's common name counts.
    common_names: bool,
}

/// A TLS server with `identity`, in `zone`, that wants to see `client`. As `names` has it for gateways
/// that are dialed, a client's common name counts or not; never where an authority is bound to
/// certain names.
///
/// # Errors
/// The identity cannot be used by a server.
pub(crate) fn acceptor(
    identity: &Identity,
    client: ClientCertificate,
    names: Names,
    zone: Option<&str>,
) -> Result<Acceptor> {
    let mut cautious = config(identity, client)?;
    cautious.max_fragment_size = Some(PLAINTEXT_MAX + RECORD_HEADER);
    cautious.send_tls13_tickets = 0;
    cautious.session_storage = Arc::new(NoServerSessionStorage {});
    let mut own_kind = config(identity, client)?;
    own_kind.alpn_protocols = vec![GATEWAY_PROTOCOL.to_vec()];
    own_kind.ticketer = Ticketer::new().context("no key for session tickets")?;
    let mut elsewhere = config(identity, client)?;
    elsewhere.alpn_protocols = vec![ELSEWHERE_PROTOCOL.to_vec()];
    elsewhere.send_tls13_tickets = 0;
    let constrained = identity.authorities.are_constrained();
    let common_names = names != Names::DialedStrictly && !constrained;
    Ok(Acceptor {
        cautious: Arc::new(cautious),
        own_kind: Arc::new(own_kind),
        elsewhere: Arc::new(elsewhere),
        zone: zone.map(Arc::from),
        common_names,
    })
}

fn config(identity: &Identity, client: ClientCertificate) -> Result<ServerConfig> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .context("TLS versions")?;
    let verifier =
        || WebPkiClientVerifier::builder_with_provider(identity.authorities.roots(), provider());
    let builder = match client {
        ClientCertificate::Required => builder.with_client_cert_verifier(verifier().build()?),
        ClientCertificate::Optional => {
            builder.with_client_cert_verifier(verifier().allow_unauthenticated().build()?)
        }
        ClientCertificate::None => builder.with_no_client_auth(),
    };
    builder
        .with_single_cert(identity.chain.clone(), identity.key.clone_key())
        .context("the certificate cannot be used by a server")
}

impl Acceptor {
    /// The names of a client that has shown `chain`, which has been verified.
    pub(crate) fn names_of(&self, chain: &[CertificateDer<'_>]) -> Vec<String> {
        let Some((own, authorities)) = chain.split_first() else { return Vec::new() };
        let common = self.common_names && !authorities.iter().any(is_constrained);
        certificate::names(own, common)
    }

    fn zone_bytes(&self) -> Option<&[u8]> {
        self.zone.as_deref().map(str::as_bytes)
    }

    /// Shakes hands on `stream`. The caller sets the deadline.
    pub(crate) async fn accept<IO>(&self, stream: IO) -> io::Result<TlsStream<IO>>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let start = LazyConfigAcceptor::new(HelloReader::default(), stream).await?;
        let (mut own_kind, mut elsewhere) = (false, false);
        for protocol in start.client_hello().alpn().into_iter().flatten() {
            own_kind |= protocol == GATEWAY_PROTOCOL;
            let wanted = protocol.strip_prefix(ZONE_PREFIX);
            elsewhere |= wanted.is_some_and(|zone| self.zone_bytes() != Some(zone));
        }
        let config = match own_kind {
            true if elsewhere => &self.elsewhere,
            true => &self.own_kind,
            false => &self.cautious,
        };
        start.into_stream(Arc::clone(config)).await
    }
}
