//! Broken gateways of a zone: what a client sees, and how the gateway recovers.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::support::admin::metric;
use crate::support::client::Client;
use crate::support::executor::{Executor, acceptor, unreachable};
use crate::support::gateway::{Builder, Gateway};
use crate::support::program::resolve;
use crate::support::program::{Outcome, program};
use crate::support::proxy::Proxy;
use crate::support::system::{System, request_path};
use crate::support::within;
use crate::support::zones::{assert_log_comes_from, east_of};

/// Starts a gateway `east` with metrics, in a system whose zone west has gateway entries with these
/// ports.
async fn counted(ports: &[u16], limits: &str) -> (System, Gateway) {
    let system = System::new().await;
    for port in ports {
        system.put_gateway(Some("west"), Some(*port), false, "running").await;
    }
    let mut builder = Builder::new(&system).zone("east").limits(limits);
    builder.admin = true;
    (system, builder.ready().await)
}

fn failovers(reason: &str) -> String {
    format!("zuul_fingergw_failovers_total{{reason=\"{reason}\"}}")
}

const UNHEALTHY: &str = "zuul_fingergw_zone_gateways_unhealthy{zone=\"west\"}";

/// Returns a port to which connections time out, with the listener that causes it: its backlog is
/// full and is never emptied.
async fn blackhole() -> (u16, impl Sized) {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).expect("a port");
    let listener = socket.listen(1).expect("a listener");
    let address: SocketAddr = listener.local_addr().expect("its address");
    let mut queued = Vec::new();
    while let Ok(stream) = timeout(Duration::from_millis(100), TcpStream::connect(address)).await {
        queued.push(stream.expect("a place in the queue"));
    }
    (address.port(), (listener, queued))
}

/// Thirty gateways accept connections and stay silent: too many to try each with its hedge delay
/// within the time limit of the request. The executor, the last hop, is tried nevertheless.
#[tokio::test]
async fn many_silent_gateways_delay_a_client_little() {
    let mut silent = Vec::new();
    for _ in 0..30 {
        silent.push(Executor::start().await);
    }
    let ports: Vec<_> = silent.iter().map(|silent| silent.address.port()).collect();
    let limits = "lookup_timeout = \"2s\"\nconnect_timeout = \"2s\"\nfirst_byte_timeout = \"2s\"";
    let (system, gateway) = counted(&ports, limits).await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    assert_log_comes_from(&executor, gateway.address(), &build).await;
    assert!(metric(&gateway, &failovers("slower")).await >= 1.0);
}

/// Each zone has ten gateways, of which all but one drop packets. All attempts together have four
/// connect timeouts, so the log arrives in time only if the working gateway is tried before most of
/// the others have timed out. It may be among the first by chance, but hardly in all zones.
#[tokio::test]
async fn many_blackholed_gateways_delay_a_client_little() {
    let system = System::new().await;
    let limits = "lookup_timeout = \"2s\"\nconnect_timeout = \"2s\"\nfirst_byte_timeout = \"2s\"";
    let mut zones = JoinSet::new();
    let mut builds = Vec::new();
    for number in 0..6 {
        let zone = format!("west{number}");
        let alive = Executor::start().await;
        let holes = futures_util::future::join_all((0..10).map(|_| blackhole())).await;
        let ports = holes.iter().map(|(port, _)| *port).chain([alive.address.port()]);
        for port in ports {
            system.put_gateway(Some(&zone), Some(port), false, "running").await;
        }
        let build = system.put_build(Some(&zone), Some(&unreachable(Some(&zone)).await)).await;
        builds.push((build, alive, holes));
    }
    let gateway = Builder::new(&system).zone("east").limits(limits).ready().await;
    let address = gateway.address();
    for (build, alive, holes) in builds {
        zones.spawn(async move {
            assert_log_comes_from(&alive, address, &build).await;
            drop(holes);
        });
    }
    while let Some(zone) = zones.join_next().await {
        zone.expect("this zone");
    }
}

/// All gateways of the zone and the executor are silent: one reply, within a bounded time for any
/// number of gateways.
#[tokio::test]
async fn silent_zone_ends_with_one_reply() {
    let (one, two, executor) =
        (Executor::start().await, Executor::start().await, Executor::start().await);
    let ports = [one.address.port(), two.address.port()];
    let limits =
        "lookup_timeout = \"500ms\"\nconnect_timeout = \"200ms\"\nfirst_byte_timeout = \"500ms\"";
    let (system, gateway) = counted(&ports, limits).await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    let answer = Client::ask(gateway.address(), &build).await.text().await;
    assert_eq!(answer, "Internal streaming error: the executor does not answer\r\n");
    assert_eq!(metric(&gateway, &failovers("silent")).await, 2.0);
}

/// However many hops are tried, one request is one stream in `status`, one log line and one count. The first
/// gateway stays silent while the others fail one after the other, and fails last, so that the executor
/// is the last hop.
#[tokio::test]
async fn request_with_many_attempts_is_one_stream() {
    let mut west = Vec::new();
    for _ in 0..6 {
        west.push(Executor::start().await);
    }
    let system = System::new().await;
    for gateway in &west {
        system.put_gateway(Some("west"), Some(gateway.address.port()), false, "running").await;
    }
    let mut builder = Builder::new(&system).zone("east").control();
    builder.admin = true;
    let config = builder.write();
    let mut gateway = builder.ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut attempts: FuturesUnordered<_> = west.iter().map(Executor::accept).collect();
    let first = attempts.next().await.expect("a gateway is tried");
    for _ in 1..west.len() {
        attempts.next().await.expect("the next gateway is tried").finish().await;
    }
    first.finish().await;
    let mut last = executor.accept().await;
    let Outcome { stdout, .. } = program(&["status", "--json"], &config).await;
    let status: Value = serde_json::from_str(&stdout).expect("JSON");
    let streams = status["streams"].as_array().expect("a list");
    assert_eq!(streams.len(), 1, "{status}");
    assert_eq!(
        (&streams[0]["build"], &streams[0]["hop"]["kind"]),
        (&json!(build), &json!("executor"))
    );
    last.write(b"log\n").await;
    last.finish().await;
    assert_eq!(client.text().await, "log\n");
    gateway.logged("the stream to end", |line| line.contains("stream ended")).await;
    assert_eq!(metric(&gateway, "zuul_fingergw_stream_seconds_count").await, 1.0);
    let routes = ["direct", "zone", "fallback"].map(|route| {
        let series = format!("zuul_fingergw_routes_total{{route=\"{route}\"}}");
        let gateway = &gateway;
        async move { metric(gateway, &series).await }
    });
    let routes = futures_util::future::join_all(routes).await;
    assert_eq!(routes.iter().sum::<f64>(), 1.0, "{routes:?}");
    let count = |event| gateway.log().iter().filter(|line| line.contains(event)).count();
    assert_eq!((count("hop failed"), count("stream ended")), (west.len(), 1));
}

/// A peer gateway's reply reaches the client and is counted by its reason, not as a log.
#[tokio::test]
async fn replies_of_gateways_are_counted_by_their_reasons() {
    let west = Executor::start().await;
    let (system, gateway) = counted(&[west.address.port()], "").await;
    let build = system.put_build(Some("west"), Some(&unreachable(Some("west")).await)).await;
    let result = |result: &str| format!("zuul_fingergw_requests_total{{result=\"{result}\"}}");
    for (reply, label) in [
        ("Internal streaming error: the executor cannot be reached\r\n", "upstream_unreachable"),
        ("Internal streaming error: ZooKeeper cannot be reached\r\n", "zookeeper"),
        ("Build not found\r\n", "not_found"),
        ("Internal streaming error", "zone_unreachable"),
    ] {
        let mut client = Client::ask(gateway.address(), &build).await;
        west.serve(reply.as_bytes()).await;
        assert_eq!(client.text().await, reply);
        within("the count", async { while metric(&gateway, &result(label)).await < 1.0 {} }).await;
    }

    // In two segments.
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut peer = west.accept().await;
    peer.write(b"Build not").await;
    client.expect(b"Build not").await;
    peer.write(b" found\r\n").await;
    peer.finish().await;
    assert_eq!(client.text().await, " found\r\n");
    let not_found = result("not_found");
    within("the count", async { while metric(&gateway, &not_found).await < 2.0 {} }).await;
    assert_eq!(metric(&gateway, &result("ok")).await, 0.0);
}

/// More requests than a hanging executor has slots for, through the gateway of its zone. The last
/// requests get their slot there after four seconds, which count towards their limit of six seconds
/// for the first byte: the reply arrives before the nine seconds of the requesting gateway are
/// over.
#[tokio::test]
async fn waiting_for_an_executor_slot_leaves_time_for_the_reply() {
    const CLIENTS: usize = 15;
    let limits = "lookup_timeout = \"1s\"\nconnect_timeout = \"1s\"\nfirst_byte_timeout = \"6s\"";
    let system = System::new().await;
    let [west, east] = ["west", "east"].map(async |zone| {
        let mut builder = Builder::new(&system).zone(zone).limits(limits);
        builder.admin = true;
        builder.ready().await
    });
    let (west, east) = (west.await, east.await);
    let hanging = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&hanging.worker(Some("west")))).await;
    let mut answers = JoinSet::new();
    for _ in 0..CLIENTS {
        let mut client = Client::ask(east.address(), &build).await;
        answers.spawn(async move { client.text().await });
    }
    for answer in answers.join_all().await {
        assert_eq!(answer, "Internal streaming error: the executor does not answer\r\n");
    }
    assert_eq!(metric(&east, &failovers("silent")).await, 0.0, "the gateway answered in time");
    let accepted = "zuul_fingergw_connections_accepted_total{listener=\"plain\"}";
    assert_eq!(metric(&west, accepted).await, CLIENTS as f64);
}

/// A gateway that was down for a while: tried and failed, backing off, tried again, used again.
#[tokio::test]
async fn gateway_that_failed_backs_off_and_is_used_again() {
    let (steady, shaky) = (Executor::start().await, Executor::start().await);
    let forward = Proxy::start(shaky.address.port()).await;
    let ports = [steady.address.port(), forward.address.port()];
    let (system, mut gateway) = counted(&ports, "").await;
    let build = system.put_build(Some("west"), Some(&unreachable(Some("west")).await)).await;
    forward.refuse();
    // The order is random, and the back-off after each failure grows.
    within("the gateway to be unhealthy", async {
        while metric(&gateway, UNHEALTHY).await < 1.0 {
            assert_log_comes_from(&steady, gateway.address(), &build).await;
        }
    })
    .await;
    // Closed before its first byte.
    let silent = metric(&gateway, &failovers("silent")).await;
    let reset = metric(&gateway, &failovers("reset")).await;
    assert!(silent + reset >= 1.0, "{silent} {reset}");

    forward.release();
    within("the other gateway to be used again", async {
        loop {
            let mut client = Client::ask(gateway.address(), &build).await;
            let (mut stream, back) = tokio::select! {
                stream = steady.accept() => (stream, false),
                stream = shaky.accept() => (stream, true),
            };
            stream.write(b"log\n").await;
            stream.finish().await;
            assert_eq!(client.text().await, "log\n");
            if back {
                return;
            }
        }
    })
    .await;
    assert_eq!(metric(&gateway, UNHEALTHY).await, 0.0, "a log clears the failure");
    gateway.logged("the failure", |line| line.contains("hop failed")).await;
}

/// Two gateways of a zone have been tried for one request, and neither has replied yet.
#[tokio::test]
async fn status_lists_a_request_once_while_two_hops_are_asked() {
    let system = System::new().await;
    let (one, two) = (Executor::start().await, Executor::start().await);
    for hop in [&one, &two] {
        system.put_gateway(Some("west"), Some(hop.address.port()), false, "running").await;
    }
    let builder = Builder::new(&system).zone("east").control();
    let config = builder.write();
    let gateway = builder.ready().await;
    let build = system.put_build(Some("west"), Some(&unreachable(Some("west")).await)).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let (mut first, _second) = tokio::join!(one.accept(), two.accept());

    let Outcome { stdout, .. } = program(&["status", "--json"], &config).await;
    let status: Value = serde_json::from_str(&stdout).expect("JSON");
    let streams = status["streams"].as_array().expect("streams");
    assert_eq!(streams.len(), 1, "{streams:?}");
    assert_eq!(streams[0]["build"], build);

    first.write(b"log\n").await;
    first.finish().await;
    assert_eq!(client.text().await, "log\n");
}

/// The only gateway of a zone has failed: the executor is used; the gateway is tried first again,
/// whether it is backing off or not.
#[tokio::test]
async fn gateways_that_back_off_are_tried_before_the_executor() {
    let west = Executor::start().await;
    let forward = Proxy::start(west.address.port()).await;
    let (system, gateway) = counted(&[forward.address.port()], "").await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    forward.refuse();
    for _ in 0..3 {
        assert_log_comes_from(&executor, gateway.address(), &build).await;
    }
    forward.release();
    assert_log_comes_from(&west, gateway.address(), &build).await;
    assert_eq!(metric(&gateway, UNHEALTHY).await, 0.0);
}

/// One gateway presents a certificate of another CA, the other a valid one.
#[tokio::test]
async fn gateway_with_a_wrong_certificate_fails_over_to_the_next() {
    let system = System::new().await;
    let (good, bad) = (Executor::start().await, Executor::start().await);
    for gateway in [&good, &bad] {
        let port = Some(gateway.address.port());
        system.put_gateway(Some("west"), port, true, "running").await;
    }
    let identity = system.zookeeper.authority.identity("gateway");
    let foreign = crate::support::certificates::Authority::new();
    let (ours, theirs) = (acceptor(&identity), acceptor(&foreign.identity("other")));
    let mut builder = Builder::new(&system).zone("east").tls(&identity);
    builder.admin = true;
    let gateway = builder.ready().await;
    let trouble = tokio::spawn(async move {
        while let Ok((stream, _)) = bad.listener.accept().await {
            let _ = theirs.accept(stream).await;
        }
    });
    let build = system.put_build(Some("west"), Some(&unreachable(Some("west")).await)).await;
    within("the disconnected gateway to be tried", async {
        while metric(&gateway, &failovers("tls")).await < 1.0 {
            let mut client = Client::ask(gateway.address(), &build).await;
            let mut stream = good.accept_tls(&ours).await;
            stream.write(b"log\n").await;
            stream.finish().await;
            assert_eq!(client.text().await, "log\n");
        }
    })
    .await;
    trouble.abort();
}

/// A gateway that replies that it cannot serve the log because it has lost ZooKeeper is given up
/// for another gateway; if no gateway can serve it, that reply goes to the client.
#[tokio::test]
async fn gateway_that_refuses_fails_over_to_the_next() {
    let refusal = "Internal streaming error: ZooKeeper cannot be reached\r\n";
    let (good, lost) = (Executor::start().await, Executor::start().await);
    let (system, gateway) = east_of(&[lost.address.port()], "").await;
    let build = system.put_build(Some("west"), Some(&good.worker(Some("west")))).await;
    let serve = async |log: &[u8]| lost.serve(log).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    serve(refusal.as_bytes()).await;
    good.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");

    let nowhere = system.put_build(Some("west"), Some(&unreachable(Some("west")).await)).await;
    let mut client = Client::ask(gateway.address(), &nowhere).await;
    serve(refusal.as_bytes()).await;
    assert_eq!(client.text().await, refusal);
    // Another gateway could not do better about the executor.
    let silent = "Internal streaming error: the executor does not answer\r\n";
    let mut client = Client::ask(gateway.address(), &build).await;
    serve(silent.as_bytes()).await;
    assert_eq!(client.text().await, silent);
}

/// The members of `hop` that identify it.
fn address(hop: &Value) -> Value {
    let keys = ["kind", "host", "port", "zone", "tls"];
    keys.iter().map(|key| (key.to_owned(), hop[*key].clone())).collect()
}

#[tokio::test]
async fn resolve_reports_the_hops_their_health_and_the_attempts() {
    let system = System::new().await;
    let west = Executor::start().await;
    let forward = Proxy::start(west.address.port()).await;
    let entry = system.put_gateway(Some("west"), Some(forward.address.port()), false, "running");
    let entry = entry.await;
    let builder = Builder::new(&system).zone("east").control();
    let config = builder.write();
    let gateway = builder.ready().await;
    let executor = Executor::start().await;
    let worker = executor.worker(Some("west"));
    let build = system.put_build(Some("west"), Some(&worker)).await;
    let place = executor.address.to_string();
    let hop = format!("gateway localhost:{} of zone west (plain)", forward.address.port());

    let mut now = resolve(&config, &build).await;
    let own = format!("localhost:{} of zone east", gateway.port());
    let hops = json!([
        {"kind": "gateway", "host": "localhost", "port": forward.address.port(), "zone": "west",
         "tls": false, "state": "untried", "failures": 0, "retry_seconds": null,
         "last_failure": null},
        {"kind": "executor", "host": executor.address.ip().to_string(),
         "port": executor.address.port(), "zone": "west", "tls": false, "state": null,
         "failures": 0, "retry_seconds": null, "last_failure": null},
    ]);
    let expected = json!({
        "status": "ok", "state": "running", "build": build, "error": null, "executor": address(&hops[1]),
        "executor_zone": "west", "own_zone": "east", "gateway": own, "hops": hops, "attempts": [],
    });
    let zones = now.as_object_mut().expect("an object").remove("zones_with_gateways");
    let zones = zones.expect("the zones");
    // Its own entry is known as soon as the gateway has read it.
    assert!(zones == json!(["west"]) || zones == json!(["east", "west"]), "{zones}");
    assert_eq!(now, expected);

    // The gateway is down, and the executor is used.
    forward.refuse();
    assert_log_comes_from(&executor, gateway.address(), &build).await;
    let now = resolve(&config, &build).await;
    let state = &now["hops"][0];
    // The back-off is one second, which may be over.
    assert!(state["state"] == "backing_off" || state["state"] == "retry_due", "{now}");
    assert!(state["failures"] == 1 && state["last_failure"].is_string(), "{now}");
    let [failed, brought] = &now["attempts"].as_array().expect("a list")[..] else {
        panic!("{now}");
    };
    assert_eq!(failed["build"], json!(build));
    assert_eq!(failed["failure"], state["last_failure"]);
    assert_eq!(brought["failure"], Value::Null);
    let asked = [address(failed), address(brought)];
    assert_eq!(asked, [address(&hops[0]), address(&hops[1])]);
    let Outcome { code, stdout, .. } = program(&["resolve", &build], &config).await;
    assert_eq!(code, Some(0));
    let lines: Vec<_> = stdout.lines().collect();
    assert_eq!(lines[0], format!("running: {build} on executor {place} of zone west"));
    assert_eq!(lines[1], format!("gateway: {own}"));
    assert!(
        lines[2].starts_with(&format!("1. {hop}: ")) && lines[2].contains("failed once; last: ")
    );
    assert_eq!(lines[3..5], [format!("2. executor {place}"), "recent attempts:".to_owned()]);
    assert!(lines[6].ends_with(&format!("{build} from executor {place}: answered")));

    forward.release();
    assert_log_comes_from(&west, gateway.address(), &build).await;
    assert_eq!(resolve(&config, &build).await["hops"][0]["state"], "healthy");
    // Removed from the registry and registered again, which makes it a new gateway.
    system.remove(&entry).await;
    let hops = async |count: usize| {
        within("the gateway to read the registry", async {
            loop {
                let now = resolve(&config, &build).await;
                if now["hops"].as_array().is_some_and(|hops| hops.len() == count) {
                    return now;
                }
            }
        })
        .await
    };
    hops(1).await;
    let Outcome { stdout, .. } = program(&["resolve", &build], &config).await;
    assert!(
        stdout.contains("\nno gateway of zone west is registered; zones with gateways: east\n"),
        "{stdout}"
    );
    system.put_gateway(Some("west"), Some(forward.address.port()), false, "running").await;
    assert_eq!(hops(2).await["hops"][0]["state"], "untried");
}

#[tokio::test]
async fn resolve_accepts_a_uuid_with_dashes_and_reports_a_truncated_one() {
    let system = System::new().await;
    let builder = Builder::new(&system).control();
    let config = builder.write();
    let _gateway = builder.ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let dashed = format!("{}-{}", build[..8].to_uppercase(), &build[8..]);
    let Outcome { code, stdout, .. } = program(&["resolve", &dashed], &config).await;
    assert!(code == Some(0) && stdout.starts_with(&format!("running: {build} ")), "{stdout}");
    let Outcome { code, stderr, .. } = program(&["resolve", &build[..6]], &config).await;
    let hint = format!("{} has 6 of the 32 digits of a UUID; ", &build[..6]);
    assert!(code == Some(1) && stderr.starts_with(&hint), "{stderr}");
}

/// Builds that do not exist, and no gateway to ask: exit status 1 and advice.
#[tokio::test]
async fn resolve_reports_why_there_is_no_route() {
    let system = System::new().await;
    let builder = Builder::new(&system).control();
    let config = builder.write();
    let mut gateway = builder.ready().await;
    let waiting = system.put_build(Some("west"), None).await;
    let broken = "0123456789abcdef0123456789abcdef";
    system.put(&request_path(None, broken), b"{\"worker_info\": 1}").await;
    let nowhere = "abcdef0123456789abcdef0123456789";
    for (build, state) in [(nowhere, "unknown"), (&waiting, "queued"), (broken, "error")] {
        let Outcome { code, stdout, stderr } = program(&["resolve", build], &config).await;
        assert_eq!((code, stderr.as_str()), (Some(1), ""), "{stdout}");
        assert!(stdout.starts_with(&format!("{state}: ")), "{stdout}");
        let Outcome { code, .. } = program(&["resolve", "--json", build], &config).await;
        assert_eq!(code, Some(1));
    }
    let Outcome { code, stderr, .. } = program(&["resolve", "no-build"], &config).await;
    assert_eq!(code, Some(2));
    assert!(stderr.contains("1 to 64 hexadecimal digits"), "{stderr}");
    gateway.signal(Signal::TERM);
    gateway.exit().await;
    let Outcome { code, stderr, .. } = program(&["resolve", "abc"], &config).await;
    assert!(code == Some(1) && stderr.contains("no gateway answers"), "{stderr}");
    let config = Builder::new(&system);
    let Outcome { code, stderr, .. } = program(&["resolve", "abc"], &config.write()).await;
    assert!(code == Some(1) && stderr.contains("set control.socket"), "{stderr}");
}
