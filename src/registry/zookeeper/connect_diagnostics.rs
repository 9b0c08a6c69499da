//! Finds out why no session with ZooKeeper can be established, in words that help an operator.
//!
//! The ZooKeeper client reports "no available hosts" for any cause. So after a failed attempt each
//! server is tried once more: name resolution, TCP connection, TLS handshake.

use std::io;
use std::path::Path;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_rustls::rustls::pki_types::ServerName;

use super::connect::Tls;
use crate::tls;

/// Time for the TCP connection to a server, and again for its TLS handshake.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Time for a server to refuse our certificate. In TLS 1.3 it does so after the handshake is
/// complete for the client (RFC 8446, section 4.4.2.4). A server that accepts the certificate sends
/// nothing.
const REFUSAL_TIMEOUT: Duration = Duration::from_millis(500);

/// The most names of a certificate that are listed.
const NAMES_MAX: usize = 5;

/// Appended when the server ends TLS: nearly always because of our certificate, though Java sends
/// the unspecific alert `certificate_unknown`.
const CHECK_OUR_CERTIFICATE: &str = "; does it trust our certificate?";

/// The cause for a server that accepts TLS connections.
const NO_SESSION: &str = "answers, but gives no session (no quorum?)";

/// Why no server grants a session.
pub(super) struct Causes {
    /// One phrase per server, or one phrase for all if the causes are the same.
    pub(super) text: String,
    /// Whether a server accepts TLS connections, and may still grant a session.
    pub(super) any_reachable: bool,
}

/// Diagnoses the servers of one ZooKeeper.
pub(super) struct ConnectDiagnostics {
    servers: Vec<(String, u16)>,
    tls: watch::Receiver<Tls>,
}

impl ConnectDiagnostics {
    pub(super) fn new(servers: Vec<(String, u16)>, tls: watch::Receiver<Tls>) -> Self {
        Self { servers, tls }
    }

    /// Tries all servers concurrently.
    pub(super) async fn run(&self) -> Causes {
        let results =
            join_all(self.servers.iter().map(|(host, port)| self.try_server(host, *port)));
        let results = results.await;
        let any_reachable = results.iter().any(Result::is_ok);
        let causes: Vec<_> = results
            .into_iter()
            .map(|result| result.err().unwrap_or_else(|| NO_SESSION.to_owned()))
            .collect();
        Causes { text: self.text(&causes), any_reachable }
    }

    fn text(&self, causes: &[String]) -> String {
        let servers = self.servers.iter().map(|(host, port)| format!("{host}:{port}"));
        match causes.first() {
            Some(first) if causes.iter().all(|cause| cause == first) => {
                let servers: Vec<_> = servers.collect();
                format!("{}: {first}", servers.join(", "))
            }
            _ => {
                let phrases: Vec<_> = servers
                    .zip(causes)
                    .map(|(server, cause)| format!("{server}: {cause}"))
                    .collect();
                phrases.join("; ")
            }
        }
    }

    /// Connects to one server.
    ///
    /// # Errors
    /// Why no TLS connection can be established.
    async fn try_server(&self, host: &str, port: u16) -> Result<(), String> {
        let stream = match timeout(TIMEOUT, TcpStream::connect((host, port))).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => {
                return Err(format!("no connection within {TIMEOUT:?}: is a firewall between?"));
            }
        };
        let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
        let Tls { connector, ca_file, .. } = self.tls.borrow().clone();
        let handshake = connector.connect_plainly(name, port, stream);
        let mut stream = match timeout(TIMEOUT, handshake).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(handshake_failure(&error, host, &ca_file)),
            Err(_) => {
                return Err(format!(
                    "no response to the TLS handshake within {TIMEOUT:?}: does ZooKeeper listen there?"
                ));
            }
        };
        match timeout(REFUSAL_TIMEOUT, stream.read_u8()).await {
            Ok(Err(error)) => Err(format!(
                "TLS: closed by the server ({}){CHECK_OUR_CERTIFICATE}",
                tls::describe(&error)
            )),
            Ok(Ok(_)) | Err(_) => Ok(()),
        }
    }
}

/// Describes why the handshake with `host` failed, and what the operator can change.
fn handshake_failure(error: &io::Error, host: &str, ca_file: &Path) -> String {
    use rustls::CertificateError::{
        BadSignature, NotValidForName, NotValidForNameContext, UnknownIssuer,
    };
    use rustls::Error::{AlertReceived, InvalidCertificate};
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref());
    match tls {
        // `BadSignature`: signed by a CA of the same name with another key.
        Some(InvalidCertificate(UnknownIssuer | BadSignature)) => format!(
            "TLS: no CA in zookeeper.tls_ca ({}) has signed its certificate",
            ca_file.display()
        ),
        Some(InvalidCertificate(NotValidForNameContext { presented, .. })) => {
            let names = presented.iter().take(NAMES_MAX).map(|name| name_in(name));
            let names: Vec<_> = names.collect();
            let names = match names[..] {
                [] => "it has no names".to_owned(),
                _ => format!("it is for {}", names.join(", ")),
            };
            not_valid_for(host, &names)
        }
        Some(InvalidCertificate(NotValidForName)) => not_valid_for(host, "it is for other names"),
        // The server ends the handshake.
        Some(AlertReceived(_)) => format!("TLS: {}{CHECK_OUR_CERTIFICATE}", tls::describe(error)),
        Some(_) => format!("TLS: {}", tls::describe(error)),
        None => format!(
            "closed during the TLS handshake ({error}): is this its port without TLS? \
             Set the port with TLS, usually 2281, in zookeeper hosts"
        ),
    }
}

/// Returns the name in `presented`, which rustls writes as `DnsName("zk1")` or
/// `IpAddress(192.0.2.1)`.
fn name_in(presented: &str) -> &str {
    let inner = presented.split_once('(').and_then(|(_, inner)| inner.strip_suffix(')'));
    inner.map_or(presented, |inner| inner.trim_matches('"'))
}

fn not_valid_for(host: &str, names: &str) -> String {
    format!(
        "TLS: its certificate is not for {host} ({names}): use a name of the certificate in \
         zookeeper.hosts, or set zookeeper.verify_hostnames to false"
    )
}

#[cfg(test)]
mod tests {
    use rustls::CertificateError::{NotValidForNameContext, UnknownIssuer};
    use rustls::Error::InvalidCertificate;
    use rustls::pki_types::ServerName;

    use super::*;

    #[test]
    fn cause_names_what_the_operator_can_change() {
        let expected = ServerName::try_from("zk1").expect("a name").to_owned();
        let presented = ["DnsName(\"zk2.example.org\")", "IpAddress(192.0.2.1)"];
        let presented = presented.map(str::to_owned).to_vec();
        let failures: [(io::Error, &[&str]); 4] = [
            (
                io::Error::other(InvalidCertificate(NotValidForNameContext {
                    expected,
                    presented,
                })),
                &["not for zk1", "for zk2.example.org, 192.0.2.1)", "zookeeper.verify_hostnames"],
            ),
            (
                io::Error::other(InvalidCertificate(UnknownIssuer)),
                &["zookeeper.tls_ca", "/etc/zuul/ca.pem"],
            ),
            (io::ErrorKind::UnexpectedEof.into(), &["without TLS", "2281"]),
            (
                io::Error::other(rustls::Error::AlertReceived(
                    rustls::AlertDescription::CertificateUnknown,
                )),
                &["trust our certificate"],
            ),
        ];
        for (error, words) in failures {
            let cause = handshake_failure(&error, "zk1", Path::new("/etc/zuul/ca.pem"));
            assert!(words.iter().all(|word| cause.contains(word)), "{cause}");
        }
    }
}
