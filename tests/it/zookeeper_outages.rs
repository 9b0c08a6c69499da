//! ZooKeeper down, restarted, hanging or refusing, and lost sessions: what the gateway reports,
//! which functions continue, and that exactly one entry exists afterwards.

use std::net::Ipv4Addr;
use std::time::Duration;

use rustix::process::Signal;

use crate::support::admin::readiness;
use crate::support::certificates::{Authority, Identity};
use crate::support::client::Client;
use crate::support::executor::Executor;
use crate::support::gateway::{Builder, Gateway};
use crate::support::proxy::{Answers, Proxy};
use crate::support::registration_failures::{CANNOT_REGISTER, debug_logging, registration_warning};
use crate::support::running_stream::RunningStream;
use crate::support::system::{Entry, GATEWAYS, System, request_path};
use crate::support::within;
use crate::support::zookeeper::ZooKeeper;

const AWAY: &str = "Internal streaming error: ZooKeeper cannot be reached\r\n";

fn is_running(entry: &Entry) -> bool {
    entry.content["state"] == "running"
}

/// Waits until there is exactly one entry, which is running and satisfies `wanted`.
async fn one(system: &System, what: &str, wanted: impl Fn(&Entry) -> bool) -> Entry {
    let is_it = |entries: &[Entry]| match entries {
        [entry] => is_running(entry) && wanted(entry),
        _ => false,
    };
    system.until(what, is_it).await.swap_remove(0)
}

/// Checks that a log passes through the gateway.
async fn serves(system: &System, gateway: &Gateway) {
    RunningStream::start(system, gateway.address()).await.finish().await;
}

/// The gateway's reply for a build that it cannot look up.
async fn answer(gateway: &Gateway) -> String {
    Client::ask(gateway.address(), "0123abcd").await.text().await
}

async fn says_registered(gateway: &mut Gateway, name: &str) {
    let status = format!("ZooKeeper: registered as {name}");
    gateway.status(&status, |line| line.ends_with(&status)).await;
}

#[tokio::test]
async fn gateway_registers_when_zookeeper_starts_later() {
    let zookeeper = ZooKeeper::start().await;
    let system = System::on(zookeeper).await;
    system.zookeeper.kill().await;
    let mut gateway = Builder::new(&system).log("level = \"debug\"").start().await;
    let warning = registration_warning(&mut gateway).await;
    assert!(warning.contains("Connection refused"), "{warning}");
    assert!(warning.contains(&system.zookeeper.port.to_string()), "{warning}");
    assert_eq!(answer(&gateway).await, AWAY);
    assert_eq!(answer(&gateway).await, AWAY);

    system.zookeeper.run().await;
    gateway.ready().await;
    let entry = one(&system, "our entry", |_| true).await;
    says_registered(&mut gateway, &entry.name).await;
    serves(&system, &gateway).await;
    let warnings = gateway.log().into_iter().filter(|line| line.contains(CANNOT_REGISTER));
    assert_eq!(warnings.count(), 1);
}

#[tokio::test]
async fn zookeeper_restart_does_not_affect_streams() {
    let zookeeper = ZooKeeper::start().await;
    let system = System::on(zookeeper).await;
    let mut gateway = Builder::new(&system).ready().await;
    let first = one(&system, "our entry", |_| true).await;
    let mut flows = Vec::new();
    for _ in 0..3 {
        flows.push(RunningStream::start(&system, gateway.address()).await);
    }

    system.zookeeper.kill().await;
    gateway.status("the loss", |line| line.ends_with("ZooKeeper: connection lost")).await;
    for stream in &mut flows {
        stream.pass("while ZooKeeper is away\n").await;
    }
    system.zookeeper.run().await;
    gateway
        .status("the connection to be restored", |line| line.contains("ZooKeeper: registered as"))
        .await;
    let entry = one(&system, "one entry", |_| true).await;
    says_registered(&mut gateway, &entry.name).await;
    assert_eq!(entry.name, first.name, "the session outlives a restart");
    for stream in flows {
        stream.finish().await;
    }
    serves(&system, &gateway).await;
    // The watches are set again as well.
    system.put_component("scheduler", 40).await;
    one(&system, "model_api 40", |entry| entry.content["model_api"] == 40).await;
}

/// The gateway's process is stopped while its session expires.
#[tokio::test]
async fn session_that_expired_while_the_gateway_was_stopped_is_replaced() {
    let system = System::new().await;
    let builder = Builder::new(&system).zookeeper("session_timeout = \"1s\"");
    let mut gateway = builder.ready().await;
    one(&system, "our entry", |_| true).await;
    let mut stream = RunningStream::start(&system, gateway.address()).await;

    gateway.signal(Signal::STOP);
    system.until("the entry to be removed with its session", <[Entry]>::is_empty).await;
    gateway.signal(Signal::CONT);

    let entry = one(&system, "a new entry", |_| true).await;
    says_registered(&mut gateway, &entry.name).await;
    gateway.logged("the loss", |line| line.contains("session with ZooKeeper lost")).await;
    stream.pass("after the loss\n").await;
    stream.finish().await;
    serves(&system, &gateway).await;
}

/// The gateway itself concludes that its session has expired, since ZooKeeper does not respond.
#[tokio::test]
async fn session_that_expired_while_zookeeper_hung_is_replaced() {
    let zookeeper = ZooKeeper::start().await;
    let system = System::on(zookeeper).await;
    let builder = Builder::new(&system).zookeeper("session_timeout = \"1s\"");
    let mut gateway = builder.ready().await;
    let first = one(&system, "our entry", |_| true).await;
    let mut stream = RunningStream::start(&system, gateway.address()).await;

    system.zookeeper.pause().await;
    gateway.status("the loss", |line| line.ends_with("ZooKeeper: session lost")).await;
    stream.pass("while ZooKeeper hangs\n").await;
    assert_eq!(answer(&gateway).await, AWAY);
    system.zookeeper.resume().await;

    let fresh = |entry: &Entry| entry.name != first.name;
    let second = one(&system, "a new entry alone", fresh).await;
    assert_ne!(second.stat.ephemeral_owner, first.stat.ephemeral_owner);
    gateway.status("the new entry", |line| line.contains("ZooKeeper: registered as")).await;
    stream.finish().await;
    serves(&system, &gateway).await;
}

#[tokio::test]
async fn disconnection_within_the_session_keeps_the_entry() {
    let system = System::new().await;
    let proxy = Proxy::start(system.zookeeper.port).await;
    let mut builder = Builder::new(&system);
    builder.hosts = system.hosts_via(&proxy);
    let mut gateway = builder.ready().await;
    let first = one(&system, "our entry", |_| true).await;
    let mut stream = RunningStream::start(&system, gateway.address()).await;
    for times in 1..=3 {
        proxy.cut();
        let back = |line: &str| line.contains("connection to ZooKeeper restored");
        gateway.logged_times("the connection to be back", times, back).await;
        says_registered(&mut gateway, &first.name).await;
        stream.pass("all the time\n").await;
        serves(&system, &gateway).await;
    }
    let log = gateway.log();
    let count = |what: &str| log.iter().filter(|line| line.contains(what)).count();
    assert_eq!(count("connection to ZooKeeper lost"), 3);
    assert_eq!(count("connection to ZooKeeper restored"), 3);

    // The same entry, neither created again nor rewritten. And the watches are set.
    let entry = one(&system, "our entry", |_| true).await;
    assert_eq!((&entry.name, entry.stat), (&first.name, first.stat));
    system.put_component("scheduler", 40).await;
    let entry = one(&system, "model_api 40", |entry| entry.content["model_api"] == 40).await;
    assert_eq!(entry.name, first.name);
    stream.finish().await;
}

/// Drops ZooKeeper's response to the change after which the entries satisfy `wanted`.
async fn lose(
    what: &str,
    system: &System,
    answers: &mut Answers,
    wanted: impl Fn(&[Entry]) -> bool,
) -> Vec<Entry> {
    let (answer, entries) = answers.until(what, system, wanted).await;
    answer.lose();
    entries
}

/// The change was made, and the connection broke before the gateway got the response.
#[tokio::test]
async fn lost_responses_are_asked_for_again() {
    let version =
        |wanted| move |entries: &[Entry]| entries.iter().any(|entry| entry.stat.version == wanted);
    for lost in ["created", "running", "stopped", "gone"] {
        let system = System::new().await;
        let (proxy, mut answers) = Proxy::stepping(system.zookeeper.port).await;
        let mut builder = Builder::new(&system);
        builder.hosts = system.hosts_via(&proxy);
        let mut gateway = builder.start().await;
        match lost {
            "created" => {
                let there = |entries: &[Entry]| !entries.is_empty();
                lose(lost, &system, &mut answers, there).await;
            }
            "running" => {
                lose(lost, &system, &mut answers, version(1)).await;
            }
            _ => answers.until("running", &system, version(1)).await.0.pass(),
        }
        if lost == "stopped" || lost == "gone" {
            gateway.ready().await;
            gateway.signal(Signal::TERM);
            let seen = |entries: &[Entry]| match lost {
                "stopped" => version(2)(entries),
                _ => entries.is_empty(),
            };
            lose(lost, &system, &mut answers, seen).await;
            drop(answers);
            system.until("no entry", <[Entry]>::is_empty).await;
            assert!(gateway.exit().await.success(), "{lost}");
            continue;
        }
        drop(answers);
        gateway.ready().await;
        let entry = one(&system, "one entry", |_| true).await;
        assert_eq!(entry.name, "localhost0000000000", "created once, after {lost}");
        says_registered(&mut gateway, &entry.name).await;
        gateway.signal(Signal::TERM);
        assert!(gateway.exit().await.success(), "{lost}");
        assert_eq!(system.entries().await.len(), 0, "{lost}");
    }
}

#[tokio::test]
async fn requests_while_zookeeper_hangs_get_a_reply() {
    let zookeeper = ZooKeeper::start().await;
    let system = System::on(zookeeper).await;
    let mut gateway = Builder::new(&system).limits("lookup_timeout = \"200ms\"").ready().await;
    let first = one(&system, "our entry", |_| true).await;
    let mut stream = RunningStream::start(&system, gateway.address()).await;

    system.zookeeper.pause().await;
    for _ in 0..3 {
        assert_eq!(answer(&gateway).await, AWAY);
    }
    stream.pass("while ZooKeeper hangs\n").await;
    system.zookeeper.resume().await;

    let build = system.put_build(None, None).await;
    let reply = Client::ask(gateway.address(), &build).await.text().await;
    assert_eq!(reply, "Build did not start yet\r\n");
    serves(&system, &gateway).await;
    stream.finish().await;
    says_registered(&mut gateway, &first.name).await;
}

#[tokio::test]
async fn zookeeper_that_rejects_our_certificate_is_reported() {
    let system = System::new().await;
    let others = Authority::new();
    let other = others.identity("client");
    let mut builder = debug_logging(&system);
    builder.zookeeper_identity = Identity { ca: system.zookeeper.identity.ca.clone(), ..other };
    let mut gateway = builder.start().await;
    let warning = registration_warning(&mut gateway).await;
    assert!(warning.contains("does it trust our certificate?"), "{warning}");
    assert_eq!(answer(&gateway).await, AWAY);
}

#[tokio::test]
async fn zookeeper_certificate_of_another_ca_is_reported() {
    let system = System::new().await;
    let other = Authority::new();
    let mut builder = debug_logging(&system);
    builder.zookeeper_identity.ca = other.ca();
    let mut gateway = builder.start().await;
    let warning = registration_warning(&mut gateway).await;
    let ca = format!("no CA in zookeeper.tls_ca ({})", other.ca().display());
    assert!(warning.contains(&ca), "{warning}");
    assert_eq!(answer(&gateway).await, AWAY);
}

/// ZooKeeper's certificate is for localhost and 127.0.0.1.
#[tokio::test]
async fn zookeeper_with_another_name_in_its_certificate_is_reported() {
    let system = System::new().await;
    let proxy = Proxy::start_on(Ipv4Addr::new(127, 0, 0, 2).into(), system.zookeeper.port).await;
    let mut builder = debug_logging(&system);
    builder.hosts = system.hosts_via(&proxy);
    let mut gateway = builder.start().await;
    let warning = registration_warning(&mut gateway).await;
    for words in ["not for 127.0.0.2", "localhost", "set zookeeper.verify_hostnames to false"] {
        assert!(warning.contains(words), "{words}: {warning}");
    }

    let mut builder = Builder::new(&system).zookeeper("verify_hostnames = false");
    builder.hosts = system.hosts_via(&proxy);
    let careless = builder.ready().await;
    serves(&system, &careless).await;
}

/// Without verification of the name, the certificate is still verified.
#[tokio::test]
async fn ca_of_zookeeper_is_checked_without_the_name_check() {
    let system = System::new().await;
    let other = Authority::new();
    let mut builder = debug_logging(&system).zookeeper("verify_hostnames = false");
    builder.zookeeper_identity.ca = other.ca();
    let mut gateway = builder.start().await;
    let warning = registration_warning(&mut gateway).await;
    let ca = format!("no CA in zookeeper.tls_ca ({})", other.ca().display());
    assert!(warning.contains(&ca), "{warning}");
}

/// Servers that are not a ZooKeeper with TLS: one closes when it receives a handshake, as
/// ZooKeeper's plain port does, one reads it and stays silent. The warning does not wait for the
/// client's timeout.
#[tokio::test]
async fn server_that_does_not_speak_tls_is_reported() {
    let system = System::new().await;
    let mut builder = debug_logging(&system);
    let [closing, silent] = [Executor::start().await, Executor::start().await];
    builder.hosts = format!("{},{}", closing.address, silent.address);
    let closed = tokio::spawn(async move {
        loop {
            let (stream, _) = closing.listener.accept().await.expect("a connection");
            let _ = stream.readable().await;
        }
    });
    let mut gateway = builder.start().await;
    let warning = gateway.logged("the warning", |line| line.contains(CANNOT_REGISTER)).await;
    for words in ["closed during the TLS handshake", "does ZooKeeper listen there?"] {
        assert!(warning.contains(words), "{words}: {warning}");
    }
    assert_eq!(answer(&gateway).await, AWAY);
    closed.abort();
}

/// A path in `hosts` that does not exist, one that wrongly includes Zuul's own `/zuul`, and one in
/// which only gateways have been: not registered, not ready, a warning with the path, and no node
/// created there. After Zuul has been started there the gateway registers by itself.
#[tokio::test]
async fn chroot_without_a_zuul_is_reported() {
    let system = System::new().await;
    system.put("/gateways/zuul/components/fingergw", b"").await;
    for path in ["/later", "/zuul", "/gateways"] {
        let mut builder = Builder::new(&system);
        builder.hosts.push_str(path);
        builder.admin = true;
        let mut gateway = builder.start().await;
        let below = format!("{}{path}/zuul/components", system.chroot());
        let hint = "check the path after the last server in zookeeper.hosts";
        let warned =
            |line: &str| line.contains(" WARN ") && line.contains(&below) && line.contains(hint);
        gateway.logged("the warning", warned).await;
        let hint = format!("registered below {below}: check the path");
        gateway.status("the problem", |status| status.contains(&hint)).await;
        assert!(readiness(&gateway).await.contains(" 503 "), "{path}");
        let node = format!("{path}/zuul/components");
        let children = system.client.list_children(&node).await.unwrap_or_default();
        let expected: &[&str] = if path == "/gateways" { &["fingergw"] } else { &[] };
        assert_eq!(children, expected, "{path}");

        system.put(&format!("{node}/scheduler"), b"").await;
        gateway.ready().await;
        assert_eq!(answer(&gateway).await, "Build not found\r\n");
        assert_eq!(gateway.log().iter().filter(|line| warned(line)).count(), 1);
    }
}

#[tokio::test]
async fn missing_queues_are_no_error() {
    const NOT_FOUND: &str = "Build not found\r\n";
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    assert_eq!(answer(&gateway).await, NOT_FOUND, "neither zones nor an unzoned queue");
    system.put("/zuul/executor/zones", b"").await;
    assert_eq!(answer(&gateway).await, NOT_FOUND, "no zone");
    system.put("/zuul/executor/zones/empty", b"").await;
    system.put("/zuul/executor/zones/file/requests", b"").await;
    system.put("/zuul/executor/unzoned", b"").await;
    assert_eq!(answer(&gateway).await, NOT_FOUND, "no requests");
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(None))).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut stream = executor.accept().await;
    stream.write(b"found in a zone beside broken ones").await;
    stream.finish().await;
    assert_eq!(client.text().await, "found in a zone beside broken ones");
    // The zone's queue is deleted and created again.
    let path = request_path(Some("west"), &build);
    system.remove(&path).await;
    system.remove("/zuul/executor/zones/west/requests").await;
    system.remove("/zuul/executor/zones/west").await;
    let reply = Client::ask(gateway.address(), &build).await.text().await;
    assert_eq!(reply, NOT_FOUND);
    let build = system.put_build(Some("west"), None).await;
    let reply = Client::ask(gateway.address(), &build).await.text().await;
    assert_eq!(reply, "Build did not start yet\r\n");
    assert_eq!(system.entries().await.len(), 1, "{GATEWAYS}");
}

/// The client's retry delays have grown long when ZooKeeper returns; the gateway does not wait for
/// them.
#[tokio::test]
async fn gateway_reconnects_after_a_long_outage() {
    let system = System::new().await;
    let proxy = Proxy::start(system.zookeeper.port).await;
    let mut builder = debug_logging(&system).zookeeper("session_timeout = \"60s\"");
    builder.hosts = system.hosts_via(&proxy);
    let mut gateway = builder.ready().await;
    let first = one(&system, "our entry", |_| true).await;

    proxy.refuse();
    // The client doubles its delay from 0.1 s on: the delay after its eighth attempt is several
    // times as long as the gateway needs to notice that ZooKeeper is back, which is immediately.
    let failed = |line: &str| line.contains(" serve{") && line.contains("fails in connecting");
    gateway.logged_times("the client's attempts", 8, failed).await;
    proxy.release();

    gateway.logged("the decision", |line| line.contains("starting a new one")).await;
    let second = one(&system, "another entry", |entry| entry.name != first.name).await;
    says_registered(&mut gateway, &second.name).await;
    serves(&system, &gateway).await;
}

/// Failure: the connection to ZooKeeper, during a lookup. Waiting clients get a reply when the
/// session is given up, and do not delay clients that request the same build in the next session.
#[tokio::test]
async fn lookup_survives_the_end_of_the_session() {
    let system = System::new().await;
    let proxy = Proxy::start(system.zookeeper.port).await;
    let mut builder = debug_logging(&system).zookeeper("session_timeout = \"60s\"");
    builder.hosts = system.hosts_via(&proxy);
    let mut gateway = builder.limits("lookups = 1\nlookup_timeout = \"1h\"").ready().await;
    one(&system, "our entry", |_| true).await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;

    // Two requests for one permit: when the first is rejected, the second gets it.
    proxy.hold();
    let mut first = Client::ask(gateway.address(), &build).await;
    let mut second = Client::ask(gateway.address(), &build).await;
    let (reply, waiting) = tokio::select! {
        reply = first.text() => (reply, &mut second),
        reply = second.text() => (reply, &mut first),
    };
    assert_eq!(reply, "Internal streaming error: too many requests at this moment\r\n");
    proxy.refuse();
    let failed = |line: &str| line.contains(" serve{") && line.contains("fails in connecting");
    gateway.logged_times("the client's attempts", 8, failed).await;
    proxy.release();

    gateway.logged("the decision", |line| line.contains("starting a new one")).await;
    assert_eq!(waiting.text().await, AWAY);
    gateway
        .status("the connection to be restored", |line| line.contains("ZooKeeper: registered as"))
        .await;
    let mut next = Client::ask(gateway.address(), &build).await;
    executor.serve(b"log\n").await;
    assert_eq!(next.text().await, "log\n");
}

/// While ZooKeeper hangs, 16 reads are sent, and the other lookups wait.
#[tokio::test]
async fn hanging_zookeeper_is_sent_16_reads() {
    const LOOKUPS: usize = 40;
    let system = System::new().await;
    let proxy = Proxy::start(system.zookeeper.port).await;
    let limits =
        format!("lookups = {LOOKUPS}\nlookup_timeout = \"1h\"\nexempt_networks = [\"127.0.0.1\"]");
    let mut builder = debug_logging(&system).zookeeper("session_timeout = \"60s\"").limits(&limits);
    builder.hosts = system.hosts_via(&proxy);
    let mut gateway = builder.ready().await;
    one(&system, "our entry", |_| true).await;
    let is_read = |line: &str| line.contains("sending request: (MultiRead");
    let before = gateway.log().iter().filter(|line| is_read(line)).count();

    proxy.hold();
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..=LOOKUPS {
        let mut client = Client::ask(gateway.address(), &format!("{number:032x}")).await;
        clients.spawn(async move { client.text().await });
    }
    // One too many. When it is rejected, all others are waiting.
    let refused = within("a refusal", clients.join_next()).await.expect("a client");
    let refused = refused.expect("no panic");
    assert_eq!(refused, "Internal streaming error: too many requests at this moment\r\n");
    gateway.logged_times("the reads", before + 16, is_read).await;
    assert_eq!(gateway.log().iter().filter(|line| is_read(line)).count(), before + 16);
    proxy.release();
    for text in within("the other requests", clients.join_all()).await {
        assert_eq!(text, "Build not found\r\n");
    }
    gateway.logged_times("the other reads", before + LOOKUPS, is_read).await;
    assert_eq!(gateway.log().iter().filter(|line| is_read(line)).count(), before + LOOKUPS);
}

/// Failure: a peer gateway's connection to ZooKeeper, while its session still exists, so that other
/// gateways continue to use it. It replies with an error, and the requesting gateway tries the next
/// one.
#[tokio::test]
async fn peers_fail_over_from_a_gateway_without_zookeeper() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("localhost");
    let west = |limits: &str| {
        let builder = Builder::new(&system).zone("west").tls(&identity);
        builder.listeners(&["tls = true", ""]).limits(limits)
    };
    let proxy = Proxy::start(system.zookeeper.port).await;
    let mut builder = west("lookup_timeout = \"200ms\"").zookeeper("session_timeout = \"60s\"");
    builder.hosts = system.hosts_via(&proxy);
    let blind = builder.ready().await;
    let sighted = west("").ready().await;
    let east = Builder::new(&system).zone("east").tls(&identity).ready().await;
    system
        .until("three entries", |all| all.iter().filter(|one| is_running(one)).count() == 3)
        .await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;

    proxy.hold();
    let to = format!("localhost:{} of zone west (TLS)", blind.port());
    let cut = |line: &String| {
        line.contains("hop failed")
            && line.contains(&to)
            && line.contains("the gateway replied: Internal streaming error: ZooKeeper")
    };
    // The order is random: continue until the disconnected gateway has been tried.
    within("the disconnected gateway to be tried", async {
        while !east.log().iter().any(cut) {
            let mut client = Client::ask(east.address(), &build).await;
            executor.serve(b"log\n").await;
            assert_eq!(client.text().await, "log\n");
        }
    })
    .await;
    let client = &system.zookeeper.identity;
    let reply = Client::ask_tls(blind.address(), client, &build).await.text().await;
    assert_eq!(reply, AWAY, "a TLS client that is no gateway of ours");
    let reply = Client::ask(blind.addresses[1], &build).await.text().await;
    assert_eq!(reply, AWAY, "a plain client");

    // Recovery: the gateway serves again by itself.
    proxy.release();
    let mut client = Client::ask_tls(blind.address(), client, &build).await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");
    drop(sighted);
}

/// Failure: the connection to ZooKeeper, for longer than the session timeout. Readiness reports it
/// all the time; a stream continues; requests get a one-line reply; one new entry is created when
/// the connection is back.
#[tokio::test]
async fn outage_longer_than_the_session_makes_a_new_entry() {
    let system = System::new().await;
    let proxy = Proxy::start(system.zookeeper.port).await;
    let mut builder = Builder::new(&system).zookeeper("session_timeout = \"1s\"");
    builder.hosts = system.hosts_via(&proxy);
    builder.admin = true;
    let mut gateway = builder.ready().await;
    let first = one(&system, "our entry", |_| true).await;
    assert_eq!(readiness(&gateway).await, "HTTP/1.1 200 OK");
    let mut stream = RunningStream::start(&system, gateway.address()).await;

    proxy.refuse();
    gateway.status("the loss", |line| line.ends_with(" lost")).await;
    assert_eq!(readiness(&gateway).await, "HTTP/1.1 503 Service Unavailable");
    system.until("the entry to be removed with its session", <[Entry]>::is_empty).await;
    gateway.logged("the loss", |line| line.contains("session with ZooKeeper lost")).await;
    gateway.logged("the attempts to fail", |line| line.contains(CANNOT_REGISTER)).await;
    for _ in 0..3 {
        assert_eq!(answer(&gateway).await, AWAY);
    }
    assert_eq!(readiness(&gateway).await, "HTTP/1.1 503 Service Unavailable");
    stream.pass("while ZooKeeper is away\n").await;

    proxy.release();
    let second = one(&system, "a new entry", |_| true).await;
    assert_ne!(second.name, first.name);
    says_registered(&mut gateway, &second.name).await;
    assert_eq!(readiness(&gateway).await, "HTTP/1.1 200 OK");
    serves(&system, &gateway).await;
    stream.finish().await;
}

/// Failure: only the session is lost. A request that arrives before the next session waits for it
/// and is served.
#[tokio::test]
async fn requests_between_two_sessions_wait() {
    let zookeeper = ZooKeeper::start().await;
    let system = System::on(zookeeper).await;
    let builder = Builder::new(&system).zookeeper("session_timeout = \"1s\"");
    let mut gateway = builder.limits("lookup_timeout = \"1h\"").ready().await;
    one(&system, "our entry", |_| true).await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    gateway.signal(Signal::STOP);
    system.until("the entry to be removed with its session", <[Entry]>::is_empty).await;
    let mut waiting = Client::ask(gateway.address(), &build).await;
    gateway.signal(Signal::CONT);
    executor.serve(b"worth waiting for\n").await;
    assert_eq!(waiting.text().await, "worth waiting for\n");
    gateway.logged("the loss", |line| line.contains("session with ZooKeeper lost")).await;
}

/// Failure: ZooKeeper responds slowly. The gateway waits, within its deadlines.
#[tokio::test]
async fn slow_zookeeper_delays_requests_only() {
    let system = System::new().await;
    let proxy = Proxy::start(system.zookeeper.port).await;
    proxy.delay(Duration::from_millis(100));
    let patient = |limits: &str| {
        let mut builder = Builder::new(&system).zookeeper("session_timeout = \"60s\"");
        builder.hosts = system.hosts_via(&proxy);
        builder.limits(limits)
    };
    let mut gateway = patient("lookup_timeout = \"1h\"").ready().await;
    let entry = one(&system, "our entry", |_| true).await;
    let mut stream = RunningStream::start(&system, gateway.address()).await;
    for _ in 0..3 {
        serves(&system, &gateway).await;
    }
    let hasty = patient("lookup_timeout = \"1ms\"").ready().await;
    assert_eq!(answer(&hasty).await, AWAY);

    proxy.delay(Duration::ZERO);
    serves(&system, &gateway).await;
    stream.pass("all the time\n").await;
    stream.finish().await;
    says_registered(&mut gateway, &entry.name).await;
    assert!(!gateway.log().iter().any(|line| line.contains("lost")), "never lost");
}

/// Failure: malformed entries of a zone's gateways, of every kind. The one valid entry is used;
/// each of the others gets one warning, or leads nowhere.
#[tokio::test]
async fn invalid_gateway_entries_are_ignored() {
    let system = System::new().await;
    let entry = |keys: &str| format!("{{\"state\": \"running\", \"zone\": \"west\", {keys}}}");
    let garbage = [
        String::new(),
        "\u{0}".to_owned(),
        "null".to_owned(),
        "[]".to_owned(),
        "[".repeat(100_000),
        format!("{{\"zone\": \"west\", \"hostname\": \"{}", "x".repeat(900_000)),
        entry("\"public_port\": 0, \"hostname\": \"localhost\""),
        entry("\"public_port\": 70000, \"hostname\": \"localhost\""),
        entry("\"public_port\": -1, \"hostname\": \"localhost\""),
        entry("\"public_port\": \"79\", \"hostname\": \"localhost\""),
        entry("\"public_port\": 79, \"hostname\": \"\""),
        entry("\"public_port\": 79, \"hostname\": \"a\u{7f}\""),
        entry(&format!("\"public_port\": 79, \"hostname\": \"{}\"", "x".repeat(5000))),
        entry("\"public_port\": 79, \"hostname\": [\"localhost\"]"),
        entry("\"public_port\": 79, \"hostname\": \"localhost\", \"use_ssl\": \"yes\""),
    ];
    for (number, garbage) in garbage.iter().enumerate() {
        system.put(&format!("{GATEWAYS}/bad{number:010}"), garbage.as_bytes()).await;
    }
    system.put(&format!("{GATEWAYS}/binary"), b"\xff\xfe").await;
    // Valid JSON.
    let names = ["no name at all", "..", "-", "[::]"];
    for (number, name) in names.into_iter().enumerate() {
        let content = serde_json::json!({
            "state": "running", "zone": "west", "public_port": 79, "hostname": name,
        });
        let path = format!("{GATEWAYS}/odd{number:010}");
        system.put(&path, content.to_string().as_bytes()).await;
    }
    let good = Executor::start().await;
    system.put_gateway(Some("west"), Some(good.address.port()), false, "running").await;
    let mut gateway = Builder::new(&system).zone("east").ready().await;
    let worker = crate::support::executor::unreachable(Some("west")).await;
    let build = system.put_build(Some("west"), Some(&worker)).await;
    // Invalid data in place of zones and build requests.
    system.put("/zuul/executor/zones/no requests", b"\xff").await;
    system.put(&request_path(Some("other"), &build), b"[").await;
    for _ in 0..10 {
        let mut client = Client::ask(gateway.address(), &build).await;
        good.serve(b"log\n").await;
        assert_eq!(client.text().await, "log\n");
    }
    for number in 0..garbage.len() {
        let name = format!("bad{number:010}");
        gateway
            .logged(&name, |line| {
                line.contains("ignoring invalid component entry") && line.contains(&name)
            })
            .await;
    }
    let log = gateway.log();
    let warnings = log.iter().filter(|line| line.contains("ignoring invalid component entry"));
    assert_eq!(warnings.count(), garbage.len() + 1, "and the binary entry");
    assert!(log.iter().all(|line| line.len() < 2000), "no line is as long as the garbage");
}
