//! Why no session with ZooKeeper comes about, in words an operator can act on.
//!
//! The ZooKeeper client reports "no available hosts" whatever the cause, so a failed attempt is
//! followed by one look of our own at each server: name, connection, TLS.

use std::io;
use std::path::Path;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_rustls::rustls::pki_types::ServerName;

use super::session::Tls;
use crate::tls;

/// How long one server has for its connection, and for its TLS handshake.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a server is given to refuse our certificate: in TLS 1.3 it says so only after the
/// handshake is over for us (RFC 8446, section 4.4.2.4). One that accepts it stays silent.
const REFUSAL: Duration = Duration::from_millis(500);

/// The most names of a certificate that are listed.
const NAMES_SHOWN: usize = 5;

/// A server that ends TLS by itself has nearly always one reason; Java's alert for it is the
/// unspecific `certificate_unknown`.
const DOUBT: &str = "; does it trust our certificate?";

/// What is said of a server to which a TLS connection can be made.
const NO_SESSION: &str = "answers, but gives no session (no quorum?)";

/// Why the servers of one ZooKeeper give no session.
pub(crate) struct Causes {
    pub(crate) text: String,
    /// Whether a TLS connection can be made to one of them, which may still give a session.
    pub(crate) any_answers: bool,
}

/// Looks at the servers of one ZooKeeper.
pub(crate) struct ConnectDiagnostics {
    servers: Vec<(String, u16)>,
    tls: watch::Receiver<Tls>,
}

impl ConnectDiagnostics {
    pub(crate) fn new(servers: Vec<(String, u16)>, tls: watch::Receiver<Tls>) -> Self {
        Self { servers, tls }
    }

    /// Looks at all servers concurrently. Returns one phrase for each, or one for all where the
    /// causes are the same.
    pub(crate) async fn why(&self) -> String {
        self.causes().await.text
    }

    /// Looks at all servers concurrently.
    pub(crate) async fn causes(&self) -> Causes {
        let looks = self.servers.iter().map(|(host, port)| self.look(host, *port));
        let looks = join_all(looks).await;
        let any_answers = looks.iter().any(Result::is_ok);
        let causes: Vec<_> = looks
            .into_iter()
            .map(|look| look.map_or_else(|cause| cause, |()| NO_SESSION.to_owned()))
            .collect();
        Causes { text: self.text(&causes), any_answers }
    }

    fn text(&self, causes: &[String]) -> String {
        let places = self.servers.iter().map(|(host, port)| format!("{host}:{port}"));
        match causes.first() {
            Some(first) if causes.iter().all(|cause| cause == first) => {
                let places: Vec<_> = places.collect();
                format!("{}: {first}", places.join(", "))
            }
            _ => {
                let phrases = places.zip(causes).map(|(place, cause)| format!("{place}: {cause}"));
                phrases.collect::<Vec<_>>().join("; ")
            }
        }
    }

    /// Connects to one server.
    ///
    /// # Errors
    /// What is wrong with it, as far as a connection shows.
    async fn look(&self, host: &str, port: u16) -> Result<(), String> {
        let stream = match timeout(PATIENCE, TcpStream::connect((host, port))).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => {
                return Err(format!("no connection within {PATIENCE:?}: is a firewall between?"));
            }
        };
        let name = match ServerName::try_from(host.to_owned()) {
            Ok(name) => name,
            Err(error) => return Err(error.to_string()),
        };
        let Tls { connector, ca_file, .. } = self.tls.borrow().clone();
        let mut stream =
            match timeout(PATIENCE, connector.connect_plainly(name, port, stream)).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => return Err(handshake_failure(&error, host, &ca_file)),
                Err(_) => {
                    return Err(format!(
                        "no answer to TLS within {PATIENCE:?}: is it ZooKeeper that listens there?"
                    ));
                }
            };
        match timeout(REFUSAL, stream.read_u8()).await {
            Ok(Err(error)) => {
                Err(format!("TLS: closed by the server ({}){DOUBT}", tls::describe(&error)))
            }
            Ok(Ok(_)) | Err(_) => Ok(()),
        }
    }
}

/// Why the handshake with `host` failed, and what the operator can do.
fn handshake_failure(error: &io::Error, host: &str, ca_file: &Path) -> String {
    use rustls::CertificateError::{
        BadSignature, NotValidForName, NotValidForNameContext, UnknownIssuer,
    };
    use rustls::Error::{AlertReceived, InvalidCertificate};
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref());
    match tls {
        // The latter is of a CA of the same name with another key.
        Some(InvalidCertificate(UnknownIssuer | BadSignature)) => format!(
            "TLS: no CA in zookeeper.tls_ca ({}) has signed its certificate",
            ca_file.display()
        ),
        Some(InvalidCertificate(NotValidForNameContext { presented, .. })) => {
            let names = presented.iter().take(NAMES_SHOWN).map(|name| plain(name));
            let names: Vec<_> = names.collect();
            let names = match names[..] {
                [] => "it has no names".to_owned(),
                _ => format!("it is for {}", names.join(", ")),
            };
            not_valid_for(host, &names)
        }
        Some(InvalidCertificate(NotValidForName)) => not_valid_for(host, "it is for others"),
        // The server's word that it does not go on.
        Some(AlertReceived(_)) => format!("TLS: {}{DOUBT}", tls::describe(error)),
        Some(_) => format!("TLS: {}", tls::describe(error)),
        None => format!(
            "closed during the TLS handshake ({error}): is this its port without TLS? \
             Set the port with TLS, usually 2281, in zookeeper hosts"
        ),
    }
}

/// The name in `presented`, in which rustls has written it as `DnsName("zk1")` or
/// `IpAddress(192.0.2.1)`.
fn plain(presented: &str) -> &str {
    let inner = presented.split_once('(').and_then(|(_, inner)| inner.strip_suffix(')'));
    inner.map_or(presented, |inner| inner.trim_matches('"'))
}

fn not_valid_for(host: &str, names: &str) -> String {
    format!(
        "TLS: its certificate is not for {host} ({names}): write a name that it has into \
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
    fn each_cause_names_what_the_operator_can_change() {
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
