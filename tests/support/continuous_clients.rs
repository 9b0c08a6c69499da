//! Clients that connect continuously, to detect moments in which clients are not served.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::client::Client;
use super::executor::Executor;
use super::system::System;
use super::within;

/// Several concurrent clients, each of which reads the whole log of one build and then connects
/// again.
pub(crate) struct ContinuousClients {
    pub(crate) build: String,
    clients: JoinSet<()>,
    serving: JoinHandle<()>,
    served: watch::Receiver<usize>,
    enough: watch::Sender<bool>,
}

impl ContinuousClients {
    /// The log of the build.
    pub(crate) const LOG: &str = "one line\nand another\n";

    /// Starts the clients; returns after the first ones have been served.
    pub(crate) async fn start(system: &System, gateway: SocketAddr) -> Self {
        let executor = Executor::start().await;
        let build = system.put_build(None, Some(&executor.worker(None))).await;
        let (served_now, served) = watch::channel(0_usize);
        let served_now = Arc::new(served_now);
        let (enough, enough_seen) = watch::channel(false);
        let mut clients = JoinSet::new();
        for _ in 0..4 {
            let (build, served, enough) = (build.clone(), served_now.clone(), enough_seen.clone());
            clients.spawn(async move {
                while !*enough.borrow() {
                    let log = Client::ask(gateway, &build).await.text().await;
                    assert_eq!(log, Self::LOG);
                    served.send_modify(|served| *served += 1);
                }
            });
        }
        let serving = tokio::spawn(async move {
            loop {
                executor.serve(Self::LOG.as_bytes()).await;
            }
        });
        let mut continuous_clients = Self { build, clients, serving, served, enough };
        continuous_clients.until_more_served().await;
        continuous_clients
    }

    /// Waits until more clients have been served.
    pub(crate) async fn until_more_served(&mut self) {
        let wanted = *self.served.borrow() + 20;
        within("more served clients", self.served.wait_for(|served| *served >= wanted))
            .await
            .expect("clients");
    }

    /// Stops the clients. Every client must have been served.
    pub(crate) async fn stop(mut self) {
        self.enough.send_replace(true);
        while let Some(client) = within("the clients to end", self.clients.join_next()).await {
            client.expect("every client is served");
        }
        self.serving.abort();
    }
}
