//! Builds that are requested more than once: what the gateway caches of them, and when it must not
//! use the cache.

use crate::support::client::Client;
use crate::support::executor::{Executor, unreachable};
use crate::support::gateway::{Builder, Gateway};
use crate::support::proxy::Proxy;
use crate::support::system::{System, request_path};
use crate::support::zookeeper::ZooKeeper;

const AWAY: &str = "Internal streaming error: ZooKeeper cannot be reached\r\n";

/// Requests `build`, which `executor` serves.
async fn served(gateway: &Gateway, executor: &Executor, build: &str) {
    let mut client = Client::ask(gateway.address(), build).await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");
}

async fn reply_to(gateway: &Gateway, build: &str) -> String {
    Client::ask(gateway.address(), build).await.text().await
}

/// Requests `build` twice, after which it is cached.
async fn request_until_cached(gateway: &mut Gateway, executor: &Executor, build: &str) {
    served(gateway, executor, build).await;
    served(gateway, executor, build).await;
    gateway.logged("the build to be cached", |line| line.contains("build cached")).await;
}

#[tokio::test]
async fn cached_build_follows_changes_until_it_is_deleted() {
    let system = System::new().await;
    let mut gateway = Builder::new(&system).log("level = \"debug\"").ready().await;
    let (first, second) = (Executor::start().await, Executor::start().await);
    // In a queue that did not exist when the gateway listed the zones.
    let queue = Some("west");
    let build = system.put_build(queue, Some(&first.worker(None))).await;
    request_until_cached(&mut gateway, &first, &build).await;
    served(&gateway, &first, &build).await;

    system.place_build(queue, &build, Some(&second.worker(None))).await;
    gateway
        .logged_times("the build to be cached again", 2, |line| line.contains("build cached"))
        .await;
    served(&gateway, &second, &build).await;

    system.place_build(queue, &build, None).await;
    gateway
        .logged_times("the change", 2, |line| line.contains("build removed from the cache"))
        .await;
    assert_eq!(reply_to(&gateway, &build).await, "Build did not start yet\r\n");

    system.place_build(queue, &build, Some(&first.worker(None))).await;
    served(&gateway, &first, &build).await;
    gateway
        .logged_times("the build to be cached again", 3, |line| line.contains("build cached"))
        .await;
    system.remove(&request_path(queue, &build)).await;
    gateway.logged_times("the end", 3, |line| line.contains("build removed from the cache")).await;
    assert_eq!(reply_to(&gateway, &build).await, "Build not found\r\n");
}

/// A cached build is found without a request to ZooKeeper.
#[tokio::test]
async fn cached_build_is_found_while_zookeeper_hangs() {
    let system = System::on(ZooKeeper::start().await).await;
    let limits = "lookup_timeout = \"2s\"";
    let builder = Builder::new(&system).limits(limits).log("level = \"debug\"");
    let mut gateway = builder.ready().await;
    let executor = Executor::start().await;
    let known = system.put_build(None, Some(&executor.worker(None))).await;
    let other = system.put_build(None, Some(&executor.worker(None))).await;
    request_until_cached(&mut gateway, &executor, &known).await;
    system.zookeeper.pause().await;
    served(&gateway, &executor, &known).await;
    assert_eq!(reply_to(&gateway, &other).await, AWAY);
    system.zookeeper.resume().await;
}

/// Without a connection the gateway is not notified of changes.
#[tokio::test]
async fn cached_build_is_not_used_without_a_connection_to_zookeeper() {
    let system = System::new().await;
    let proxy = Proxy::start(system.zookeeper.port).await;
    let limits = "lookup_timeout = \"2s\"";
    let mut builder = Builder::new(&system).limits(limits).log("level = \"debug\"");
    builder.hosts = system.hosts_via(&proxy);
    let mut gateway = builder.ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    request_until_cached(&mut gateway, &executor, &build).await;

    proxy.refuse();
    gateway.logged("the loss", |line| line.contains("connection to ZooKeeper lost")).await;
    assert_eq!(reply_to(&gateway, &build).await, AWAY);
    // Move the build while no watch can fire.
    let gone = unreachable(None).await;
    system.place_build(None, &build, Some(&gone)).await;
    proxy.release();
    gateway.logged("the change", |line| line.contains("build removed from the cache")).await;
    gateway
        .status("the connection to be restored", |status| status.contains("registered as"))
        .await;
    let answer = reply_to(&gateway, &build).await;
    assert_eq!(answer, "Internal streaming error: the executor cannot be reached\r\n");
}
