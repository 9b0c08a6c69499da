//! What happens when there is too much of something.

use nix::sched::CloneFlags;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, prlimit};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;

use crate::support::admin::rejected;
use crate::support::admin::{ended, until_metric};
use crate::support::client::Client;
use crate::support::executor::Executor;
use crate::support::gateway::{Builder, Gateway};
use crate::support::namespace::{apart, command};
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
    // Nothing tells when the places are free again: whoever is refused asks again.
    let accepting = tokio::spawn(async move { executor.serve(b"log\n").await });
    within("a free place", async {
        while Client::ask(gateway.address(), &build).await.text().await != "log\n" {}
    })
    .await;
    accepting.await.expect("the executor");
}

/// More at once than are told so: the rest is closed without a word, and costs no more.
#[tokio::test]
async fn number_of_concurrent_rejections_is_bounded() {
    let system = System::new().await;
    let gateway = Builder::new(&system).limits("connections = 1").ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut first = Client::ask(gateway.address(), &build).await;
    let mut stream = executor.begin(&mut first).await;
    let sockets = gateway.sockets();

    // Stopped, so that all of them are there when it looks; none of them closes until the last
    // has been answered, so that none makes room for another one's refusal.
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
    // 64 at a time; on a slow machine those after them begin when the first have been closed.
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

/// Connections that have not asked yet make room, the oldest first; streams never do.
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
    // Silent ones, half a request and half a handshake.
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
        let mut oldest = silent.pop_front().expect("one for each");
        let end = within("the oldest to be closed", oldest.stream.read_u8()).await;
        end.expect_err("closed without a line");
        assert_eq!(rejected(&gateway, "limit").await, evicted as f64);
    }
    let refused = Client::ask(gateway.address(), &build).await.text().await;
    assert_eq!(refused, TOO_MANY, "a stream makes room for nobody");
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

/// Gives it back all that it may have.
fn relieve(gateway: &Gateway) {
    // The gateway has raised its own limit to the hard one, which it has from us.
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
        gateway.logged_times("several tries", logged + 5, trouble).await;
        relieve(&gateway);
        // Who waited is served, and so is everybody after.
        executor.serve(b"log\n").await;
        assert_eq!(waiting.text().await, "log\n");
        serves(&gateway, &executor, &build).await;
        let log = gateway.log();
        let warnings = log.iter().filter(|line| trouble(line) && line.contains("WARN")).count();
        assert!((1..=episode).contains(&warnings), "one warning an episode");
    }
    assert!(rejected(&gateway, "accept").await >= 10.0);
}

/// Sees one stream through.
async fn serves(gateway: &Gateway, executor: &Executor, build: &str) {
    let mut client = Client::ask(gateway.address(), build).await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");
}

/// Upstream never recovers from this: its ZooKeeper client dies of the missing descriptor.
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

    relieve(&gateway);
    drop(waiting);
    gateway.status("the way back", |status| status.contains("registered as")).await;
    serves(&gateway, &executor, &build).await;
    log.finish().await;
    assert_eq!(running.text().await, "");
}

/// A status is no less true for being told without a descriptor to spare.
#[tokio::test]
async fn service_manager_is_notified_without_descriptors() {
    let zookeeper = ZooKeeper::start().await;
    let system = System::on(zookeeper.clone()).await;
    let mut gateway = Builder::new(&system).ready().await;
    exhaust(&gateway);
    zookeeper.kill().await;
    gateway.status("the loss", |status| status.ends_with("ZooKeeper: connection lost")).await;
}

/// A client that was accepted just in time gets an answer, though not the log.
#[tokio::test]
async fn hop_without_a_descriptor_gets_a_reply() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut client = Client::connect(gateway.address()).await;
    // Connections are accepted in order: `client` was when this one is answered.
    let other = Client::ask(gateway.address(), "..").await.text().await;
    assert_eq!(other, "Build not found\r\n");
    exhaust(&gateway);
    client.send(format!("{build}\n").as_bytes()).await;
    let reply = client.text().await;
    assert_eq!(reply, "Internal streaming error: the executor cannot be reached\r\n");
    relieve(&gateway);
    serves(&gateway, &executor, &build).await;
}

/// Connections that the descriptors cannot carry are not promised.
#[tokio::test]
async fn connection_limit_follows_the_limit_of_open_files() {
    let system = System::new().await;
    let config = Builder::new(&system).limits("connections = 1000000");
    let mut gateway = config.ready().await;
    gateway
        .logged("it", |line| line.contains("limit of open files") && line.contains("WARN"))
        .await;
}

/// Connections that the memory of a pod cannot carry are not promised. A directory stands in for the
/// cgroups of a container, of both versions, whose path on the host is not there.
#[test]
fn connection_limit_follows_the_memory_limit() {
    apart(CloneFlags::CLONE_NEWNS, async || {
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

/// With as many streams as the limit of open files carries, everything else has descriptors left.
#[tokio::test]
async fn descriptors_are_reserved_for_other_uses_than_streams() {
    /// As `src/daemon/capacity.rs` has it: two each, and the reserve.
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
    // They stay until all have come, so that all are refused at the same time.
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
    served.gateway.status("the way back", |status| status.contains("registered as")).await;
    let output = program(&["status"], &served.config).await;
    assert_eq!(output.stdout.matches(&build).count() as u64, FITTING, "{}", output.stdout);
    assert_eq!(rejected(&served.gateway, "accept").await, 0.0);
    for (client, stream) in &mut streams {
        stream.write(b"line\n").await;
        client.expect(b"line\n").await;
    }
}
