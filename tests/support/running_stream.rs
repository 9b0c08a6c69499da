//! A log that a gateway relays while a test does something to the gateway.

use std::net::SocketAddr;

use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use super::Duplex;
use super::certificates::Identity;
use super::client::{Client, Ending};
use super::executor::{Executor, Stream};
use super::system::System;

/// Both ends of the stream; its first line has been relayed.
pub(crate) struct RunningStream<S> {
    pub(crate) client: Client<S>,
    stream: Stream<TcpStream>,
}

impl RunningStream<TcpStream> {
    /// Starts a stream to a plain client.
    pub(crate) async fn start(system: &System, gateway: SocketAddr) -> Self {
        let (executor, build) = executor(system).await;
        let client = Client::ask(gateway, &build).await;
        Self::begin(client, &executor).await
    }
}

impl RunningStream<TlsStream<TcpStream>> {
    /// Starts a stream to a TLS client that presents `identity`.
    pub(crate) async fn start_tls(
        system: &System,
        gateway: SocketAddr,
        identity: &Identity,
    ) -> Self {
        let (executor, build) = executor(system).await;
        let client = Client::ask_tls(gateway, identity, &build).await;
        Self::begin(client, &executor).await
    }
}

async fn executor(system: &System) -> (Executor, String) {
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    (executor, build)
}

impl<S: Duplex> RunningStream<S> {
    async fn begin(client: Client<S>, executor: &Executor) -> Self {
        let mut running = Self { client, stream: executor.accept().await };
        running.pass("the first line\n").await;
        running
    }

    /// Sends a piece of the log and waits until the client has it.
    pub(crate) async fn pass(&mut self, log: &str) {
        self.stream.write(log.as_bytes()).await;
        self.client.expect(log.as_bytes()).await;
    }

    /// Sends half a megabyte and ends the log; checks every byte and the clean end.
    pub(crate) async fn finish(mut self) {
        let log: Vec<u8> = (0..500_000u32).map(|index| (index % 251) as u8).collect();
        let sent = async {
            self.stream.write(&log).await;
            self.stream.finish().await;
        };
        let ((), (received, ending)) = tokio::join!(sent, self.client.rest());
        assert!(received == log && ending == Ending::Clean);
    }
}
