//! Establishing a session with ZooKeeper.

use std::path::PathBuf;
use std::time::Duration;

use zookeeper_client::{Client, Error, TlsCerts, TlsDynamicCerts};

use crate::config::Hosts;
use crate::tls;

/// Time that a server has to accept a connection, and to send anything over an established one.
/// After that the client tries the next server, and the session continues there. Without it the
/// client would take 2/5 of the session timeout: 48 s with Zuul's default.
///
/// With a session timeout so short that this is more than 3/5 of it, the client takes the 2/5.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(5);

/// TLS settings for connections to ZooKeeper.
#[derive(Clone)]
pub(crate) struct Tls {
    /// For the ZooKeeper client.
    pub(crate) certs: TlsCerts,
    /// Whether the certificate of a server must be valid for its name in `zookeeper.hosts`. A
    /// change takes effect with the next session.
    pub(crate) verify_hostnames: bool,
    /// For diagnostic connections of our own, with the same certificates and checks.
    pub(crate) connector: tls::Connector,
    /// The file with the CAs, for error messages.
    pub(crate) ca_file: PathBuf,
}

/// Establishes a session. Tries every server of `hosts` once.
pub(super) async fn connect(
    hosts: &Hosts,
    tls: &Tls,
    session_timeout: Duration,
    certs: TlsDynamicCerts,
) -> Result<Client, Error> {
    Client::connector()
        .with_session_timeout(session_timeout)
        .with_connection_timeout(CONNECTION_TIMEOUT)
        .with_tls(tls::zookeeper_options(certs, tls.verify_hostnames))
        .with_fail_eagerly()
        .secure_connect(&hosts.to_string())
        .await
}
