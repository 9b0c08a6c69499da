//! A next hop that behaves as a test requires: refuses, stays silent, resets, ends without
//! close_notify. A fake, because a real executor cannot be made to do any of this on command;
//! `tests/interop` uses the real one.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use socket2::SockRef;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::certificates::Identity;
use super::client::Client;
use super::system::{System, Worker};
use super::{Duplex, within};

/// Listens as an executor or as a gateway of another zone.
pub(crate) struct Executor {
    pub(crate) listener: TcpListener,
    pub(crate) address: SocketAddr,
}

impl Executor {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let address = listener.local_addr().expect("its address");
        Self { listener, address }
    }

    /// Returns the worker of a build request that runs here.
    pub(crate) fn worker(&self, zone: Option<&str>) -> Worker {
        Worker {
            hostname: "127.0.0.1".to_owned(),
            port: self.address.port(),
            zone: zone.map(str::to_owned),
        }
    }

    /// Accepts one connection and reads its request.
    pub(crate) async fn accept(&self) -> Stream<TcpStream> {
        within("a connection to the executor", async {
            let (stream, _) = self.listener.accept().await.expect("a connection");
            Stream::greet(stream).await
        })
        .await
    }

    /// Accepts the stream that `client` has requested, which must be the only pending one, and
    /// sends a first line that the client must receive.
    pub(crate) async fn begin(&self, client: &mut Client<impl Duplex>) -> Stream<TcpStream> {
        let mut stream = self.accept().await;
        stream.write(b"before\n").await;
        client.expect(b"before\n").await;
        stream
    }

    /// Accepts one connection and serves a whole log on it.
    pub(crate) async fn serve(&self, log: &[u8]) {
        let mut stream = self.accept().await;
        stream.write(log).await;
        stream.finish().await;
    }

    /// Accepts one TLS connection and reads its request.
    pub(crate) async fn accept_tls(&self, acceptor: &TlsAcceptor) -> Stream<TlsStream<TcpStream>> {
        within("a TLS connection to the gateway", async {
            let (stream, _) = self.listener.accept().await.expect("a connection");
            Stream::greet(acceptor.accept(stream).await.expect("a TLS handshake")).await
        })
        .await
    }
}

/// Serves a whole log on an accepted connection, for any request.
pub(crate) async fn answer(stream: TcpStream, log: &[u8]) {
    let mut stream = Stream::greet(stream).await;
    if stream.try_write(log).await {
        stream.finish().await;
    }
}

/// Reads a request from `stream` and serves a whole log, with its first byte delayed by
/// `first_byte`.
pub(crate) async fn answer_after(stream: impl Duplex, first_byte: Duration, log: &[u8]) {
    let mut stream = Stream::greet(stream).await;
    tokio::time::sleep(first_byte).await;
    stream.write(log).await;
    stream.finish().await;
}

/// Checks that the gateway at `address` serves the log of a new build.
pub(crate) async fn serves(system: &System, address: SocketAddr) {
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut client = Client::ask(address, &build).await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");
}

/// Returns a port that refuses connections for the life of the test process: bound, so that no
/// other socket gets it, but not listening.
pub(crate) async fn refusing_port() -> u16 {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).expect("a port");
    let port = socket.local_addr().expect("its address").port();
    std::mem::forget(socket);
    port
}

/// Returns a listener that accepts no connection but the returned one: the kernel keeps one for a
/// backlog of 0, and drops the next SYN.
pub(crate) async fn full_listener() -> (TcpListener, Client<TcpStream>) {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).expect("a port");
    let listener = socket.listen(0).expect("a listener");
    let first = Client::connect(listener.local_addr().expect("its address")).await;
    (listener, first)
}

/// Returns a worker in `zone` that cannot be reached.
pub(crate) async fn unreachable(zone: Option<&str>) -> Worker {
    let hostname = "127.0.0.1".to_owned();
    Worker { hostname, port: refusing_port().await, zone: zone.map(str::to_owned) }
}

/// Returns a TLS server with `identity` that requires a client certificate, as gateways do.
pub(crate) fn acceptor(identity: &Identity) -> TlsAcceptor {
    acceptor_with_protocols(identity, &[])
}

/// Like [`acceptor`], offering these protocols (ALPN).
pub(crate) fn acceptor_with_protocols(identity: &Identity, protocols: &[&str]) -> TlsAcceptor {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(&identity.ca).expect("a CA");
    roots.add(ca).expect("a usable CA");
    let certificate = CertificateDer::from_pem_file(&identity.cert).expect("a certificate");
    let key = PrivateKeyDer::from_pem_file(&identity.key).expect("a key");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("TLS versions")
        .with_client_cert_verifier(verifier.build().expect("a verifier"))
        .with_single_cert(vec![certificate], key)
        .expect("a TLS server");
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    TlsAcceptor::from(Arc::new(config))
}

/// One connection that has requested a build.
pub(crate) struct Stream<S> {
    /// The request as received, with its newline.
    pub(crate) request: String,
    stream: BufReader<S>,
}

impl<S: Duplex> Stream<S> {
    async fn greet(stream: S) -> Self {
        let mut stream = BufReader::new(stream);
        let mut request = String::new();
        stream.read_line(&mut request).await.expect("a request");
        Self { request, stream }
    }

    /// Sends a piece of the log.
    pub(crate) async fn write(&mut self, log: &[u8]) {
        let sent = async {
            self.stream.write_all(log).await?;
            self.stream.flush().await
        };
        within("the log to be written", sent).await.expect("a piece of the log");
    }

    /// Sends a piece of the log; returns false if the other side has closed.
    pub(crate) async fn try_write(&mut self, log: &[u8]) -> bool {
        let sent = async {
            self.stream.write_all(log).await?;
            self.stream.flush().await
        };
        within("the log to be written or refused", sent).await.is_ok()
    }

    /// Ends the log cleanly, with close_notify on TLS.
    pub(crate) async fn finish(mut self) {
        within("the shutdown", self.stream.shutdown()).await.expect("an orderly end");
    }

    /// Waits until the other side has closed or reset.
    pub(crate) async fn closed(&mut self) {
        within("the gateway to close its side", async {
            let mut byte = [0];
            while matches!(self.stream.read(&mut byte).await, Ok(1)) {}
        })
        .await;
    }

    /// Returns the connection itself.
    pub(crate) fn into_inner(self) -> S {
        self.stream.into_inner()
    }
}

impl Stream<TcpStream> {
    /// Sends a byte of urgent data (tcp(7), MSG_OOB).
    pub(crate) async fn urgent(&mut self) {
        let stream = self.stream.get_ref();
        let send = || SockRef::from(stream).send_out_of_band(b"!").map(|_| ());
        let sent = stream.async_io(tokio::io::Interest::WRITABLE, send);
        within("an urgent byte to be written", sent).await.expect("an urgent byte");
    }

    /// Returns the port that the other side connected from.
    pub(crate) fn peer_port(&self) -> u16 {
        self.stream.get_ref().peer_addr().expect("its address").port()
    }

    /// Resets the connection.
    pub(crate) fn reset(self) {
        reset(&self.into_inner());
    }

    /// Resets the connection after the other side's kernel has received what was written. (With the
    /// smallest send buffer a socket is writable only when its send queue is almost empty.)
    pub(crate) async fn reset_when_taken(self) {
        let stream = self.into_inner();
        SockRef::from(&stream).set_send_buffer_size(1).expect("SO_SNDBUF");
        let stream = stream.into_std().and_then(TcpStream::from_std).expect("the same socket");
        within("the log to be received", stream.writable()).await.expect("a socket");
        reset(&stream);
    }
}

impl Stream<TlsStream<TcpStream>> {
    /// Closes the connection without close_notify, as Zuul's own gateways do.
    pub(crate) fn abandon(self) {
        drop(self.into_inner());
    }
}

/// Makes closing `stream` send a reset.
pub(crate) fn reset(stream: &TcpStream) {
    SockRef::from(stream).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
}
