//! A ZooKeeper ensemble of three servers loses its leader, then its quorum: streams continue,
//! requests get replies, and the gateway is registered again exactly once.

use std::sync::Arc;

use crate::support::admin::readiness;
use crate::support::client::Client;
use crate::support::executor::Executor;
use crate::support::gateway::{Builder, Gateway};
use crate::support::running_stream::RunningStream;
use crate::support::system::{Entry, System};
use crate::support::within;
use crate::support::zookeeper::ZooKeeper;

const AWAY: &str = "Internal streaming error: ZooKeeper cannot be reached\r\n";
const LOG: &str = "a line\nand another\n";

/// Waits until one of `members` is in `mode` and returns it. Polls, because no notification exists.
async fn member(members: &[Arc<ZooKeeper>], mode: &str) -> usize {
    within(mode, async {
        loop {
            for (index, member) in members.iter().enumerate() {
                if member.mode().await.as_deref() == Some(mode) {
                    return index;
                }
            }
            tokio::task::yield_now().await;
        }
    })
    .await
}

async fn one_entry(system: &System) -> Entry {
    let is_it = |entries: &[Entry]| entries.len() == 1 && entries[0].content["state"] == "running";
    system.until("one entry", is_it).await.swap_remove(0)
}

/// Sends requests as a normal client until the log arrives. Only the log and one certain line are
/// allowed as replies.
async fn until_served(gateway: &Gateway, build: &str) {
    within("the log", async {
        loop {
            let text = Client::ask(gateway.address(), build).await.text().await;
            match text.as_str() {
                LOG => return,
                AWAY => {}
                _ => panic!("{text}"),
            }
        }
    })
    .await;
}

#[tokio::test]
async fn streams_survive_the_loss_of_the_leader_and_of_the_quorum() {
    let mut members: Vec<_> = ZooKeeper::ensemble().await.into();
    let system = System::on(Arc::clone(&members[0])).await;
    let mut builder = Builder::new(&system).zookeeper("session_timeout = \"60s\"");
    builder.admin = true;
    let mut gateway = builder.ready().await;
    let first = one_entry(&system).await;
    let mut stream = RunningStream::start(&system, gateway.address()).await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let serving = tokio::spawn(async move {
        loop {
            executor.serve(LOG.as_bytes()).await;
        }
    });
    until_served(&gateway, &build).await;

    // Failure: the leader. The two others elect a new one and take over the session.
    let leader = member(&members, "leader").await;
    let dead = members.swap_remove(leader);
    dead.kill().await;
    gateway.logged("the loss", |line| line.contains("connection to ZooKeeper lost")).await;
    stream.pass("while they choose\n").await;
    until_served(&gateway, &build).await;
    member(&members, "leader").await;
    gateway
        .status("the connection to be restored", |line| line.contains("ZooKeeper: registered as"))
        .await;
    assert_eq!(readiness(&gateway).await, "HTTP/1.1 200 OK");
    assert_eq!(one_entry(&system).await.name, first.name, "the same session");

    // Failure: the quorum. The remaining server gives read-only sessions, which the gateway does
    // not use: their data may be stale, and it could not register there.
    let second = members.pop().expect("two");
    second.kill().await;
    member(&members, "read-only").await;
    gateway.status("the loss", |line| line.ends_with("ZooKeeper: connection lost")).await;
    assert_eq!(readiness(&gateway).await, "HTTP/1.1 503 Service Unavailable");
    assert_eq!(Client::ask(gateway.address(), &build).await.text().await, AWAY);
    stream.pass("without a quorum\n").await;
    let mut late = Builder::new(&system).start().await;
    let why = late.logged("the reason", |line| line.contains("cannot register in ZooKeeper")).await;
    let only_left =
        format!("127.0.0.1:{}: answers, but gives no session (no quorum?", members[0].port);
    assert!(why.contains(&only_left), "{why}");
    assert_eq!(Client::ask(late.address(), &build).await.text().await, AWAY);

    // Recovery: the first server returns; the gateways need no intervention.
    dead.launch().await;
    gateway
        .status("the connection to be restored", |line| line.contains("ZooKeeper: registered as"))
        .await;
    late.ready().await;
    let both = |entries: &[Entry]| {
        entries.len() == 2 && entries.iter().all(|entry| entry.content["state"] == "running")
    };
    system.until("an entry of each", both).await;
    assert_eq!(readiness(&gateway).await, "HTTP/1.1 200 OK");
    until_served(&gateway, &build).await;
    until_served(&late, &build).await;
    stream.finish().await;
    serving.abort();
    members.push(dead);
}

/// A stopped process keeps its connections open and sends nothing. The lookup waits until the
/// client has given up that server for another: within 5 s, instead of 2/5 of the session timeout,
/// which exceeds the lookup's deadline.
#[tokio::test]
async fn lookup_is_served_by_another_member_when_a_member_hangs() {
    let members = ZooKeeper::ensemble().await;
    let leader = member(&members, "leader").await;
    let system = System::on(Arc::clone(&members[leader])).await;
    let followers: Vec<_> =
        members.iter().filter(|member| member.port != members[leader].port).collect();
    let hosts: Vec<_> =
        followers.iter().map(|member| format!("127.0.0.1:{}", member.port)).collect();
    let mut builder = Builder::new(&system)
        .zookeeper("session_timeout = \"60s\"")
        .limits("lookup_timeout = \"20s\"")
        .log("level = \"debug\"");
    builder.hosts = format!("{}{}", hosts.join(","), system.chroot());
    let mut gateway = builder.ready().await;
    let entry = one_entry(&system).await;
    let connected = |line: &str| line.contains("succeeds in connecting to");
    let line = gateway.logged("the connection", connected).await;
    let hung = followers.iter().find(|member| line.ends_with(&format!(":{}", member.port)));
    let hung = hung.unwrap_or_else(|| panic!("no member: {line}"));
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;

    hung.pause().await;
    let mut client = Client::ask(gateway.address(), &build).await;
    executor.serve(LOG.as_bytes()).await;
    assert_eq!(client.text().await, LOG);
    let registered = format!("ZooKeeper: registered as {}", entry.name);
    gateway.status("the same entry", |status| status.ends_with(&registered)).await;
    hung.resume().await;
}
