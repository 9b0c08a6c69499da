//! Finger clients, plain and TLS, that report how a stream ended.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::certificates::Identity;
use super::executor;
use super::{Duplex, within};

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// FIN; on TLS after a close_notify.
    Clean,
    /// TLS closed without close_notify.
    Truncated,
    /// A reset.
    Reset,
}

pub(crate) struct Client<S> {
    pub(crate) stream: S,
}

impl Client<TcpStream> {
    /// Connects and sends nothing.
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        let stream = within("a connection", TcpStream::connect(address)).await.expect("connected");
        Self { stream }
    }

    /// Connects with the smallest possible receive buffer and sends nothing.
    pub(crate) async fn connect_narrow(address: SocketAddr) -> Self {
        Self::connect_narrow_from("127.0.0.1", address).await
    }

    /// Like [`Self::connect_narrow`], from the address `local`.
    pub(crate) async fn connect_narrow_from(local: &str, address: SocketAddr) -> Self {
        let socket = TcpSocket::new_v4().expect("a socket");
        let local = local.parse().expect("an address");
        socket.bind(SocketAddr::new(local, 0)).expect("an address of this machine");
        socket.set_recv_buffer_size(1).expect("SO_RCVBUF");
        let stream = within("a connection", socket.connect(address)).await.expect("connected");
        Self { stream }
    }

    /// Connects from `local`, any address of this machine, and sends nothing.
    pub(crate) async fn connect_from(local: &str, address: SocketAddr) -> Self {
        let local = SocketAddr::new(local.parse().expect("an address"), 0);
        let socket = if local.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
        let socket = socket.expect("a socket");
        socket.bind(local).expect("an address of this machine");
        let stream = within("a connection", socket.connect(address)).await.expect("connected");
        Self { stream }
    }

    /// Connects from `local` and asks for `build`.
    pub(crate) async fn ask_from(local: &str, address: SocketAddr, build: &str) -> Self {
        let mut client = Self::connect_from(local, address).await;
        client.send(format!("{build}\r\n").as_bytes()).await;
        client
    }

    /// Connects and asks for `build`.
    pub(crate) async fn ask(address: SocketAddr, build: &str) -> Self {
        let mut client = Self::connect(address).await;
        client.send(format!("{build}\r\n").as_bytes()).await;
        client
    }

    /// Resets the connection.
    pub(crate) fn reset(self) {
        executor::reset(&self.stream);
    }
}

impl Client<TlsStream<TcpStream>> {
    /// Connects over TLS to `name` with `identity`, or returns the handshake's error. A server that
    /// rejects the certificate reports that only in the first read (RFC 8446, section 4.4.2.4).
    pub(crate) async fn try_connect_tls(
        address: SocketAddr,
        name: &str,
        ca: &Identity,
        identity: Option<&Identity>,
    ) -> std::io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        let name = ServerName::try_from(name.to_owned()).expect("a host name");
        let stream =
            within("a TLS handshake", connector(ca, identity).connect(name, stream)).await?;
        Ok(Self { stream })
    }

    /// Starts TLS with localhost on an existing connection.
    pub(crate) async fn handshake(plain: Client<TcpStream>, identity: &Identity) -> Self {
        Self::try_handshake(plain, identity).await.expect("a TLS session")
    }

    /// Like [`Client::handshake`], but returns the handshake's error.
    pub(crate) async fn try_handshake(
        plain: Client<TcpStream>,
        identity: &Identity,
    ) -> std::io::Result<Self> {
        let name = ServerName::try_from("localhost").expect("a host name");
        let shaken = connector(identity, Some(identity)).connect(name, plain.stream);
        Ok(Self { stream: within("a TLS handshake", shaken).await? })
    }

    /// Resets the connection.
    pub(crate) fn reset(self) {
        executor::reset(self.stream.get_ref().0);
    }

    /// Connects over TLS to localhost and sends nothing.
    pub(crate) async fn connect_tls(address: SocketAddr, identity: &Identity) -> Self {
        Self::try_connect_tls(address, "localhost", identity, Some(identity))
            .await
            .expect("a TLS connection")
    }

    /// Connects over TLS to localhost and asks for `build`.
    pub(crate) async fn ask_tls(address: SocketAddr, identity: &Identity, build: &str) -> Self {
        let mut client = Self::connect_tls(address, identity).await;
        client.send(format!("{build}\r\n").as_bytes()).await;
        client
    }
}

/// Returns the first message of a TLS client, a whole ClientHello.
pub(crate) fn client_hello(ca: &Identity) -> Vec<u8> {
    let name = ServerName::try_from("localhost").expect("a host name");
    let config = Arc::clone(connector(ca, None).config());
    let mut client = rustls::ClientConnection::new(config, name).expect("a TLS client");
    let mut hello = Vec::new();
    client.write_tls(&mut hello).expect("a Vec takes everything");
    hello
}

/// Returns a TLS connector that trusts the CA of `ca` and presents `identity`, if any.
pub(crate) fn connector(ca: &Identity, identity: Option<&Identity>) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&ca.ca).expect("a CA")).expect("a usable CA");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("TLS versions")
        .with_root_certificates(roots);
    let config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let certificate = CertificateDer::from_pem_file(&identity.cert).expect("a certificate");
            let key = PrivateKeyDer::from_pem_file(&identity.key).expect("a key");
            builder.with_client_auth_cert(vec![certificate], key).expect("a client certificate")
        }
    };
    TlsConnector::from(Arc::new(config))
}

impl<S: Duplex> Client<S> {
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        let sent = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        within("the request to be written", sent).await.expect("a request");
    }

    /// Closes the sending side only: on plain TCP a half-close.
    pub(crate) async fn half_close(&mut self) {
        within("a half-close", self.stream.shutdown()).await.expect("a half-close");
    }

    /// Reads as many bytes as `bytes` has, and compares them.
    pub(crate) async fn expect(&mut self, bytes: &[u8]) {
        let mut read = vec![0; bytes.len()];
        within("the log", self.stream.read_exact(&mut read)).await.expect("more of the log");
        assert!(read == bytes, "{} instead of {}", read.escape_ascii(), bytes.escape_ascii());
    }

    /// Returns the next bytes, or how the stream ended.
    pub(crate) async fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Ending> {
        match within("the log", self.stream.read(buffer)).await {
            Ok(0) => Err(Ending::Clean),
            Ok(count) => Ok(count),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err(Ending::Truncated),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Err(Ending::Reset),
            Err(error) => panic!("reading: {error}"),
        }
    }

    /// Reads to the end; returns everything and how the stream ended.
    pub(crate) async fn rest(&mut self) -> (Vec<u8>, Ending) {
        let (mut bytes, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
        loop {
            match self.read(&mut buffer).await {
                Ok(count) => bytes.extend_from_slice(&buffer[..count]),
                Err(ending) => return (bytes, ending),
            }
        }
    }

    /// Reads to a clean end; returns everything as text.
    pub(crate) async fn text(&mut self) -> String {
        let (bytes, ending) = self.rest().await;
        let text = String::from_utf8(bytes).expect("UTF-8");
        assert_eq!(ending, Ending::Clean, "after {text:?}");
        text
    }
}
