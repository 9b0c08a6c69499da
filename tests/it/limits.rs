//! Limits: connections, descriptors, memory, and what happens at each.

use nix::sched::CloneFlags;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, prlimit};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;

use crate::support::admin::rejected;
use crate::support::admin::{ended, until_metric};
use crate::support::client::Client;
use crate::support::executor::Executor;
use crate::support::gateway::{Builder, Gateway};
use crate::support::namespace::{command, in_namespaces};
use crate::support::program::program;
use crate::support::reloadable::Reloadable;
use crate::support::system::System;
use crate::support::within;
use crate::support::zookeeper::ZooKeeper;

const TOO_MANY: &str = "Internal streaming error: too many connections\r\n";

#[tokio::test]
async fn connection_above_the_limit_gets_a_reply() {
    let system = System::new().await;
    let mut builder = Builder::new(&system).limits("connections = 2");
    builder.admin = true;
    let gateway = builder.ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut first = Client::ask(gateway.address(), &build).await;
    let mut stream = executor.accept().await;
    let second = Client::ask(gateway.address(), &build).await;
    let other = executor.accept().await;

    for _ in 0..2 {
        let answer = Client::ask(gateway.address(), &build).await.text().await;
        assert_eq!(answer, TOO_MANY);
    }
    assert_eq!(rejected(&gateway, "limit").await, 2.0);
    let warned = |line: &str| line.contains("WARN") && line.contains("(see limits.connections)");
    assert_eq!(gateway.count_logged("a warning", warned).await, 1, "once");

    stream.write(b"log\n").await;
    first.expect(b"log\n").await;
    drop((second, other));
    stream.finish().await;
    assert_eq!(first.text().await, "");
    drop(first);
    // No notification exists for freed permits, so a rejected client tries again.
    let accepting = tokio::spawn(async move { executor.serve(b"log\n").await });
    within("a free permit", async {
        while Client::ask(gateway.address(), &build).await.text().await != "log\n" {}
    })
    .await;
    accepting.await.expect("the executor");
}

/// More concurrent rejections than get a reply: further connections are closed without one, to save
/// work.
#[tokio::test]
async fn number_of_concurrent_rejections_is_bounded() {
    let system = System::new().await;
    let gateway = Builder::new(&system).limits("connections = 1").ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut first = Client::ask(gateway.address(), &build).await;
    let mut stream = executor.begin(&mut first).await;
    let sockets = gateway.sockets();

    // Stopped, so that all connections are pending when the gateway continues; no client closes
    // before the last reply, so that no closed connection makes room for another reply.
    gateway.signal(Signal::STOP);
    let mut extra = Vec::new();
    for _ in 0..400 {
        extra.push(Client::connect(gateway.address()).await);
    }
    gateway.signal(Signal::CONT);
    let mut refused = 0;
    for client in &mut extra {
        match client.rest().await.0.as_slice() {
            b"" => {}
            line => {
                assert_eq!(line, TOO_MANY.as_bytes());
                refused += 1;
            }
        }
    }
    // 64 concurrent replies; on a slow machine more are sent after the first connections have
    // closed.
    assert!((64..=128).contains(&refused), "{refused} replies");
    stream.write(b"still here\n").await;
    first.expect(b"still here\n").await;

    drop(extra);
    gateway.until_sockets(sockets).await;
    assert_eq!(Client::connect(gateway.address()).await.text().await, TOO_MANY, "again");
}

#[tokio::test]
async fn tls_connections_above_the_limit_do_not_disturb_streams() {
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

/// Connections without a request are evicted, the oldest first; streams never are.
#[tokio::test]
async fn oldest_silent_connection_is_evicted() {
    const PLACES: usize = 10;
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let limits =
        format!("connections = {PLACES}\nhandshake_timeout = \"1h\"\nrequest_timeout = \"1h\"");
    let mut builder = Builder::new(&system).tls(&identity).limits(&limits);
    builder.admin = true;
    let gateway = builder.listeners(&["", "tls = true"]).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut streams = vec![(executor.begin(&mut client).await, client)];
    // Silent connections, a partial request and a partial handshake.
    let mut silent = std::collections::VecDeque::new();
    for number in 1..PLACES {
        let listener = number % 2;
        let mut client = Client::connect(gateway.addresses[listener]).await;
        client.send(&b"\x16\x03\x01"[..number % 3]).await;
        silent.push_back(client);
        // Accepted in this order, whatever the listener.
        let (name, open) = [("plain", 1 + number / 2), ("tls", number.div_ceil(2))][listener];
        let series = format!("zuul_fingergw_connections_active{{listener=\"{name}\"}}");
        until_metric(&gateway, &series, open as f64).await;
    }
    for evicted in 1..PLACES {
        let mut client = Client::ask(gateway.address(), &build).await;
        let stream = executor.begin(&mut client).await;
        streams.push((stream, client));
        let mut oldest = silent.pop_front().expect("a silent connection");
        let end = within("the oldest to be closed", oldest.stream.read_u8()).await;
        end.expect_err("closed without a line");
        assert_eq!(rejected(&gateway, "limit").await, evicted as f64);
    }
    let refused = Client::ask(gateway.address(), &build).await.text().await;
    assert_eq!(refused, TOO_MANY, "a stream is not evicted");
    for (stream, client) in &mut streams {
        stream.write(b"still here\n").await;
        client.expect(b"still here\n").await;
    }
    ended(&gateway, "rejected", PLACES - 1).await;
}

/// Leaves a running gateway no descriptor for anything new.
fn exhaust(gateway: &Gateway) {
    limit_files(gateway, Some(0));
}

/// Restores the limit.
fn restore_limit(gateway: &Gateway) {
    // The gateway has raised its soft limit to the hard limit, which it inherited from this
    // process.
    limit_files(gateway, getrlimit(Resource::Nofile).maximum);
}

fn limit_files(gateway: &Gateway, current: Option<u64>) {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let limit = Rlimit { current, maximum };
    prlimit(Some(gateway.pid()), Resource::Nofile, limit).expect("a limit for our own child");
}

#[tokio::test]
async fn accepting_continues_after_descriptors_ran_out() {
    let system = System::new().await;
    let mut builder = Builder::new(&system).log("level = \"debug\"");
    builder.admin = true;
    let mut gateway = builder.ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    serves(&gateway, &executor, &build).await;
    let trouble = |line: &str| line.contains("cannot accept connections");
    for episode in 1..=2 {
        exhaust(&gateway);
        let mut waiting = Client::ask(gateway.address(), &build).await;
        let logged = gateway.log().iter().filter(|line| trouble(line)).count();
        gateway.logged_times("several attempts", logged + 5, trouble).await;
        restore_limit(&gateway);
        // The waiting client is served, and so are the following ones.
        executor.serve(b"log\n").await;
        assert_eq!(waiting.text().await, "log\n");
        serves(&gateway, &executor, &build).await;
        let log = gateway.log();
        let warnings = log.iter().filter(|line| trouble(line) && line.contains("WARN")).count();
        assert!((1..=episode).contains(&warnings), "one warning per episode");
    }
    assert!(rejected(&gateway, "accept").await >= 10.0);
}

/// Checks that a log arrives.
async fn serves(gateway: &Gateway, executor: &Executor, build: &str) {
    let mut client = Client::ask(gateway.address(), build).await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");
}

/// Zuul's gateway never recovers from this: its ZooKeeper client fails on the missing descriptor.
#[tokio::test]
async fn zookeeper_is_reconnected_after_descriptors_ran_out() {
    let zookeeper = ZooKeeper::start().await;
    let system = System::on(zookeeper.clone()).await;
    let mut gateway = Builder::new(&system).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut running = Client::ask(gateway.address(), &build).await;
    let mut log = executor.accept().await;

    exhaust(&gateway);
    zookeeper.kill().await;
    gateway.logged("the loss", |line| line.contains("connection to ZooKeeper lost")).await;
    let waiting = Client::connect(gateway.address()).await;
    gateway.logged("exhaustion", |line| line.contains("cannot accept")).await;
    zookeeper.run().await;
    log.write(b"still here\n").await;
    running.expect(b"still here\n").await;

    restore_limit(&gateway);
    drop(waiting);
    gateway
        .status("the connection to be restored", |status| status.contains("registered as"))
        .await;
    serves(&gateway, &executor, &build).await;
    log.finish().await;
    assert_eq!(running.text().await, "");
}

/// `status` works without a free descriptor.
#[tokio::test]
async fn service_manager_is_notified_without_descriptors() {
    let zookeeper = ZooKeeper::start().await;
    let system = System::on(zookeeper.clone()).await;
    let mut gateway = Builder::new(&system).ready().await;
    exhaust(&gateway);
    zookeeper.kill().await;
    gateway.status("the loss", |status| status.ends_with("ZooKeeper: connection lost")).await;
}

/// A client that was accepted with the last descriptor gets a reply, but not the log.
#[tokio::test]
async fn hop_without_a_descriptor_gets_a_reply() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut client = Client::connect(gateway.address()).await;
    // Connections are accepted in order: `client` has been accepted when this one gets its reply.
    let other = Client::ask(gateway.address(), "..").await.text().await;
    assert_eq!(other, "Build not found\r\n");
    exhaust(&gateway);
    client.send(format!("{build}\n").as_bytes()).await;
    let reply = client.text().await;
    assert_eq!(reply, "Internal streaming error: the executor cannot be reached\r\n");
    restore_limit(&gateway);
    serves(&gateway, &executor, &build).await;
}

/// The connection limit is lowered to what the descriptors allow.
#[tokio::test]
async fn connection_limit_follows_the_limit_of_open_files() {
    let system = System::new().await;
    let config = Builder::new(&system).limits("connections = 1000000");
    let mut gateway = config.ready().await;
    gateway
        .logged("the line", |line| line.contains("limit of open files") && line.contains("WARN"))
        .await;
}

/// The connection limit is lowered to what the memory of a pod allows. A directory stands in for
/// the cgroups of a container, of both versions, which lack the host's path.
#[test]
fn connection_limit_follows_the_memory_limit() {
    in_namespaces(CloneFlags::CLONE_NEWNS, async || {
        let groups = TempDir::new().expect("a directory");
        std::fs::create_dir(groups.path().join("memory")).expect("a directory");
        for file in ["memory.max", "memory/memory.limit_in_bytes"] {
            std::fs::write(groups.path().join(file), "67108864\n").expect("a limit");
        }
        command("mount", &format!("--bind {} /sys/fs/cgroup", groups.path().display()));
        let system = System::on(ZooKeeper::start().await).await;
        let mut gateway = Builder::new(&system).limits("connections = 5000").ready().await;
        let warns = |line: &str| line.contains("memory limit of the cgroup");
        let line = gateway.logged("a warning", warns).await;
        assert!(line.contains("WARN") && line.contains("wanted=5000"), "{line}");
    });
}

/// With as many streams as the limit of open files allows, descriptors are left for everything
/// else.
#[tokio::test]
async fn descriptors_are_reserved_for_other_uses_than_streams() {
    /// As in `src/daemon/capacity.rs`: two per stream, and the reserve.
    const FITTING: u64 = 200;
    const FILES: u64 = 384 + 2 * FITTING;
    let zookeeper = ZooKeeper::start().await;
    let system = System::on(zookeeper.clone()).await;
    let limits =
        "connections = 5000\nrequest_timeout = \"1h\"\nexempt_networks = [\"127.0.0.1/32\"]";
    let mut served = Reloadable::start(Builder::new(&system).limits(limits)).await;
    let limit = Rlimit { current: Some(FILES), maximum: Some(FILES) };
    prlimit(Some(served.gateway.pid()), Resource::Nofile, limit).expect("a lower limit");
    served.edit("connections = 5000", "connections = 5001");
    served.reloads().await;
    let fits = format!("allowed={FITTING}");
    served.gateway.logged("what fits", |line| line.contains(&fits)).await;

    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut streams = Vec::new();
    for _ in 0..FITTING {
        let mut client = Client::ask(served.address(), &build).await;
        let stream = executor.begin(&mut client).await;
        streams.push((client, stream));
    }
    // The clients stay until all have connected, so that all are rejected at the same time.
    let mut refused = Vec::new();
    for _ in 0..20 {
        refused.push(Client::ask(served.address(), &build).await);
    }
    for client in &mut refused {
        assert_eq!(client.text().await, TOO_MANY);
    }
    zookeeper.kill().await;
    served.gateway.status("the loss", |status| status.ends_with("connection lost")).await;
    zookeeper.run().await;
    served
        .gateway
        .status("the connection to be restored", |status| status.contains("registered as"))
        .await;
    let output = program(&["status"], &served.config).await;
    assert_eq!(output.stdout.matches(&build).count() as u64, FITTING, "{}", output.stdout);
    assert_eq!(rejected(&served.gateway, "accept").await, 0.0);
    for (client, stream) in &mut streams {
        stream.write(b"line\n").await;
        client.expect(b"line\n").await;
    }
}
