//! What happens when there is too much of something.

use rustix::process::{Resource, Rlimit, getrlimit, prlimit};

use crate::support::client::Client;
use crate::support::executor::Executor;
use crate::support::gateway::{Builder, Gateway};
use crate::support::system::System;
use crate::support::within;
use crate::support::zookeeper::ZooKeeper;

#[tokio::test]
async fn one_connection_too_many_is_told_so() {
    let system = System::new().await;
    let gateway = Builder::new(&system).limits("connections = 2").ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut first = Client::ask(gateway.address(), &build).await;
    let mut stream = executor.accept().await;
    let second = Client::ask(gateway.address(), &build).await;
    let other = executor.accept().await;

    let answer = Client::ask(gateway.address(), &build).await.text().await;
    assert_eq!(answer, "Internal streaming error: too many connections\r\n");

    stream.write(b"log\n").await;
    first.expect(b"log\n").await;
    drop((second, other));
    stream.finish().await;
    assert_eq!(first.text().await, "");
    drop(first);
    // Nothing tells when the places are free again: whoever is refused asks again.
    let accepting = tokio::spawn(async move { executor.serve(b"log\n").await });
    within("a free place", async {
        while Client::ask(gateway.address(), &build).await.text().await != "log\n" {}
    })
    .await;
    accepting.await.expect("the executor");
}

#[tokio::test]
async fn too_many_over_tls_concern_nobody_else() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let builder = Builder::new(&system).tls(&identity).limits("connections = 1");
    let gateway = builder.listeners(&["tls = true"]).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut first = Client::ask_tls(gateway.address(), &identity, &build).await;
    let mut stream = executor.accept().await;
    for _ in 0..20 {
        let mut extra = Client::connect(gateway.address()).await;
        assert!(extra.rest().await.0.is_empty());
    }
    stream.write(b"log\n").await;
    first.expect(b"log\n").await;
}

/// Lowers the limit of open files of a running gateway, or gives it all back.
fn limit_files(gateway: &Gateway, files: Option<u64>) {
    // The gateway has raised its own to the hard limit, which it has from us.
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit { current: files.or(maximum), maximum };
    prlimit(Some(gateway.pid()), Resource::Nofile, limit).expect("a limit for our own child");
}

fn open_files(gateway: &Gateway) -> u64 {
    let directory = format!("/proc/{}/fd", gateway.pid().as_raw_nonzero());
    std::fs::read_dir(directory).expect("proc").count() as u64
}

#[tokio::test]
async fn out_of_descriptors_and_back() {
    let system = System::new().await;
    let mut gateway = Builder::new(&system).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    serves(&gateway, &executor, &build).await;
    let warning = |line: &str| line.contains("cannot accept connections");
    for episode in 1..=2 {
        limit_files(&gateway, Some(0));
        let mut waiting = Client::ask(gateway.address(), &build).await;
        gateway.logged_times("the warning", episode, warning).await;
        limit_files(&gateway, None);
        // Who waited is served, and so is everybody after.
        executor.serve(b"log\n").await;
        assert_eq!(waiting.text().await, "log\n");
        serves(&gateway, &executor, &build).await;
        let warnings = gateway.log().iter().filter(|line| warning(line)).count();
        assert_eq!(warnings, episode, "one warning an episode");
    }
}

/// Sees one stream through.
async fn serves(gateway: &Gateway, executor: &Executor, build: &str) {
    let mut client = Client::ask(gateway.address(), build).await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");
}

/// Upstream never recovers from this: its ZooKeeper client dies of the missing descriptor.
#[tokio::test]
async fn zookeeper_lost_while_out_of_descriptors() {
    let zookeeper = ZooKeeper::start().await;
    let system = System::on(zookeeper.clone()).await;
    let mut gateway = Builder::new(&system).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    limit_files(&gateway, Some(open_files(&gateway)));
    // A client takes the descriptor that ZooKeeper's connection leaves behind.
    let clients =
        [Client::connect(gateway.address()).await, Client::connect(gateway.address()).await];
    zookeeper.kill().await;
    gateway.status("the loss", |status| status.ends_with("connection lost")).await;
    zookeeper.run().await;
    gateway.logged("exhaustion", |line| line.contains("cannot accept")).await;
    limit_files(&gateway, None);
    drop(clients);
    gateway.status("the way back", |status| status.contains("registered")).await;
    serves(&gateway, &executor, &build).await;
}

/// Connections that the descriptors cannot carry are not promised.
#[tokio::test]
async fn connections_fit_below_the_limit_of_open_files() {
    let system = System::new().await;
    let config = Builder::new(&system).limits("connections = 1000000");
    let mut gateway = config.ready().await;
    gateway
        .logged("it", |line| line.contains("limit of open files") && line.contains("WARN"))
        .await;
}
