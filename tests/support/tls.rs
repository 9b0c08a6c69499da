//! Gateways that accept TLS, and gateways that dial others by TLS.

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::certificates::{Authority, Identity};
use super::client::Client;
use super::executor::{Executor, acceptor, unreachable};
use super::gateway::{Builder, Gateway};
use super::system::{GATEWAYS, System};
use super::within;

/// A gateway with one TLS listener, and an executor with a build.
pub(crate) struct Served {
    pub(crate) gateway: Gateway,
    pub(crate) executor: Executor,
    pub(crate) build: String,
    pub(crate) identity: Identity,
    pub(crate) system: System,
}

/// Starts a gateway with further lines for the listener and for `[limits]`.
pub(crate) async fn served(listener: &str, limits: &str) -> Served {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    served_with(system, identity, listener, limits).await
}

/// Like [`served`] in `system`, with the certificate, key and CA of `identity`.
pub(crate) async fn served_with(
    system: System,
    identity: Identity,
    listener: &str,
    limits: &str,
) -> Served {
    let builder = Builder::new(&system).tls(&identity).limits(limits);
    let gateway = builder.listeners(&[&format!("tls = true\n{listener}")]).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    Served { gateway, executor, build, identity, system }
}

impl Served {
    /// Returns whether a client that presents `shown` gets the log.
    pub(crate) async fn serves(&self, shown: Option<&Identity>) -> bool {
        let address = self.gateway.address();
        let connected = Client::try_connect_tls(address, "localhost", &self.identity, shown).await;
        let Ok(mut client) = connected else { return false };
        let request = format!("{}\n", self.build);
        // TLS 1.3 reports a rejected certificate only in the write or the read.
        if client.stream.write_all(request.as_bytes()).await.is_err() {
            return false;
        }
        let talk = async {
            let mut byte = [0];
            client.stream.read_exact(&mut byte).await.is_ok()
        };
        let executor = async {
            let mut stream = self.executor.accept().await;
            stream.write(b"log\n").await;
            stream.finish().await;
        };
        let mut talk = std::pin::pin!(talk);
        tokio::select! {
            refused = &mut talk => refused,
            () = executor => talk.await,
        }
    }
}

/// Starts a gateway `east` with TLS, in a system where `other` is the gateway of zone west.
pub(crate) async fn east_of(
    other: &Executor,
    hostname: &str,
) -> (System, Gateway, String, Identity) {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let entry = json!({
        "hostname": hostname, "public_port": other.address.port(), "use_ssl": true,
        "state": "running", "zone": "west", "model_api": 38, "kind": "fingergw",
    });
    let path = format!("{}/other", GATEWAYS);
    system.put(&path, entry.to_string().as_bytes()).await;
    let gateway = Builder::new(&system).zone("east").tls(&identity).ready().await;
    let build = system.put_build(Some("west"), Some(&unreachable(Some("west")).await)).await;
    (system, gateway, build, identity)
}

/// Returns the reply to a client whose build can only be reached through a peer that presents
/// `theirs`.
pub(crate) async fn reply_through_peer(
    theirs: &Identity,
    authority: &Authority,
    verify_hostnames: bool,
) -> String {
    reply_through_peer_with(theirs, authority, |builder| {
        builder.verify_hostnames = verify_hostnames
    })
    .await
}

/// Like [`reply_through_peer`], with the gateway's settings modified by `change`.
pub(crate) async fn reply_through_peer_with(
    theirs: &Identity,
    authority: &Authority,
    change: impl FnOnce(&mut Builder),
) -> String {
    let system = System::new().await;
    let ours = authority.identity("gateway");
    let other = Executor::start().await;
    system.put_gateway(Some("west"), Some(other.address.port()), true, "running").await;
    let mut builder = Builder::new(&system).zone("east").tls(&ours);
    change(&mut builder);
    let mut gateway = builder.ready().await;
    let build = system.put_build(Some("west"), Some(&unreachable(Some("west")).await)).await;
    // The peer trusts our CA, whatever CA has issued its own certificate.
    let acceptor = acceptor(&Identity { ca: ours.ca.clone(), ..theirs.clone() });
    let mut client = Client::ask(gateway.address(), &build).await;
    let serve = async {
        let (stream, _) =
            within("a connection", other.listener.accept()).await.expect("a connection");
        if let Ok(mut stream) = acceptor.accept(stream).await {
            let _ = stream.write_all(b"log\n").await;
            let _ = stream.shutdown().await;
        }
    };
    let ((), text) = tokio::join!(serve, client.text());
    if text != "log\n" {
        gateway
            .logged("the reason", |line| line.contains("end=\"TLS: invalid peer certificate"))
            .await;
    }
    text
}
