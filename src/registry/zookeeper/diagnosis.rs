//! Why no session with ZooKeeper comes about, in words an operator can act on.
//!
//! The ZooKeeper client reports "no available hosts" whatever the cause, so a failed attempt is
//! followed by one look of our own at each server: name, connection, TLS.

use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_rustls::rustls::pki_types::ServerName;

use super::Tls;
use crate::tls;

/// How long one server is looked at.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a server is given to refuse our certificate: in TLS 1.3 it says so only after the
/// handshake is over for us (RFC 8446, section 4.4.2.4). One that accepts it stays silent.
const REFUSAL: Duration = Duration::from_millis(500);

/// A server that ends TLS by itself has nearly always one reason; Java's alert for it is the
/// unspecific `certificate_unknown`.
const DOUBT: &str = "; does it trust our certificate?";

/// Looks at the servers of one ZooKeeper.
pub(super) struct Diagnosis {
    servers: Vec<(String, u16)>,
    tls: watch::Receiver<Tls>,
}

impl Diagnosis {
    pub(super) fn new(servers: Vec<(String, u16)>, tls: watch::Receiver<Tls>) -> Self {
        Self { servers, tls }
    }

    /// One phrase for each server.
    pub(super) async fn why(&self) -> String {
        let mut causes = Vec::new();
        for (host, port) in &self.servers {
            let cause = match timeout(PATIENCE, self.look(host, *port)).await {
                Ok(Ok(())) => {
                    "answers, but gives no session (no quorum? chroot missing?)".to_owned()
                }
                Ok(Err(cause)) => cause,
                Err(_) => format!("no answer within {PATIENCE:?}"),
            };
            causes.push(format!("{host}:{port}: {cause}"));
        }
        causes.join("; ")
    }

    async fn look(&self, host: &str, port: u16) -> Result<(), String> {
        let stream = TcpStream::connect((host, port)).await.map_err(|error| error.to_string())?;
        let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
        let connector = self.tls.borrow().connector.clone();
        let mut stream = connector.connect_plainly(name, port, stream).await.map_err(|error| {
            let doubt = if is_alert(&error) { DOUBT } else { "" };
            format!("TLS: {}{doubt}", tls::describe(&error))
        })?;
        match timeout(REFUSAL, stream.read_u8()).await {
            Ok(Err(error)) => {
                Err(format!("TLS: closed by the server ({}){DOUBT}", tls::describe(&error)))
            }
            Ok(Ok(_)) | Err(_) => Ok(()),
        }
    }
}

/// Whether `error` is the server's word that it does not go on.
fn is_alert(error: &std::io::Error) -> bool {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref());
    matches!(tls, Some(rustls::Error::AlertReceived(_)))
}
