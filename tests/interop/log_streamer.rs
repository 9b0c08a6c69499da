//! The real executor's log streamer as the next hop.

use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::Barrier;
use tokio::task::JoinSet;

use crate::executor::{Executor, new_build, pieces};
use crate::support::admin::metric;
use crate::support::client::{Client, Ending};
use crate::support::executor::refusing_port;
use crate::support::gateway::Builder;
use crate::support::system::System;

#[tokio::test]
async fn growing_log_is_exact() {
    let system = System::new().await;
    let mut gateway = Builder::new(&system).ready().await;
    let mut executor = Executor::start(&system, None).await;
    let (build, log) = executor.run(None).await;

    let mut client = Client::ask(gateway.address(), &build).await;
    assert_eq!(log.grow(&pieces(), &mut client).await, Ending::Clean);
    let bytes: usize = pieces().iter().map(Vec::len).sum();
    let line = gateway.logged("the stream's line", |line| line.contains("stream ended")).await;
    for field in
        [&format!("build={build}"), &executor.route(), &format!("bytes={bytes} "), "end=finished"]
    {
        assert!(line.contains(field), "no {field:?} in {line:?}");
    }
}

/// The streamer sends the present content of the file in pieces of its own size.
#[tokio::test]
async fn long_log_is_exact() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    let mut executor = Executor::start(&system, None).await;
    let (build, mut log) = executor.run(None).await;
    let long: Vec<u8> =
        (0..20_000_000_u32).flat_map(|i| [b"0123456789\n"[i as usize % 11]]).collect();
    log.write(&long);

    let mut client = Client::ask(gateway.address(), &build).await;
    client.expect(&long).await;
    assert_eq!(log.grow(&pieces(), &mut client).await, Ending::Clean);
}

/// The executor takes a half-closed connection for a disconnect, so the gateway must not
/// half-close.
#[tokio::test]
async fn half_closed_client_keeps_its_stream() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    let mut executor = Executor::start(&system, None).await;
    let (build, log) = executor.run(None).await;

    let mut client = Client::ask(gateway.address(), &build).await;
    client.half_close().await;
    // Each piece is sent in another iteration of the streamer, and in each it checks for the
    // client's EOF.
    assert_eq!(log.grow(&pieces(), &mut client).await, Ending::Clean);
}

/// When a client resets, the gateway resets its connection to the executor, so that no local port
/// stays in TIME_WAIT. The streamer logs one line and serves the next client.
#[tokio::test]
async fn client_reset_is_one_line_in_the_log_of_the_executor() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    let mut executor = Executor::start(&system, None).await;
    let (build, mut log) = executor.run(None).await;
    log.write(b"a line\n");

    let mut client = Client::ask(gateway.address(), &build).await;
    client.expect(b"a line\n").await;
    client.reset();
    let line = format!("Streaming failure for build UUID {build}: [Errno 104]");
    let output = executor.logs(&line).await;
    assert!(!output.contains("Traceback"), "{output}");

    let mut next = Client::ask(gateway.address(), &build).await;
    next.expect(b"a line\n").await;
    assert_eq!(log.grow(&pieces(), &mut next).await, Ending::Clean);
}

#[tokio::test]
async fn replies_of_the_executor_are_not_changed() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    let mut executor = Executor::start(&system, None).await;
    let build = new_build();
    executor.submit(&build, None).await;
    executor.take(&build).await;
    let reply = async || Client::ask(gateway.address(), &build).await.text().await;

    assert_eq!(reply().await, format!("Build ID {build} not found"));
    fs::create_dir(executor.job(&build)).expect("the job's directory");
    assert_eq!(reply().await, format!("Log not found for build ID {build}"));
}

/// Has `count` clients request `build` concurrently, and returns what each of them reads, up to the
/// length of its log.
async fn concurrent_logs(
    address: SocketAddr,
    build: &str,
    count: usize,
    length: usize,
) -> Vec<Vec<u8>> {
    let mut clients = Vec::new();
    for _ in 0..count {
        clients.push(Client::connect(address).await);
    }
    let start = Arc::new(Barrier::new(count));
    let mut reading = JoinSet::new();
    for mut client in clients {
        let (request, start) = (format!("{build}\n"), Arc::clone(&start));
        reading.spawn(async move {
            start.wait().await;
            client.send(request.as_bytes()).await;
            let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
            while bytes.len() < length
                && let Ok(count) = client.read(&mut buffer).await
            {
                bytes.extend_from_slice(&buffer[..count]);
            }
            bytes
        });
    }
    reading.join_all().await
}

/// The streamer's listen backlog is five. In the second run, all clients reach the executor after
/// the only gateway of its zone has refused them.
#[tokio::test]
async fn two_hundred_concurrent_clients_get_the_log() {
    for zone in [None, Some("west")] {
        let system = System::new().await;
        system.put_gateway(Some("west"), Some(refusing_port().await), false, "running").await;
        let mut builder = Builder::new(&system);
        builder.admin = true;
        let mut gateway = builder.ready().await;
        let mut executor = Executor::start(&system, zone).await;
        let (build, mut log) = executor.run(zone).await;
        let text = b"0123456789\n".repeat(2000);
        log.write(&text);
        let logs = concurrent_logs(gateway.address(), &build, 200, text.len()).await;
        let broken: Vec<_> = logs.iter().filter(|log| **log != text).collect();
        let first = broken.first().map(|log| log[..log.len().min(100)].escape_ascii().to_string());
        assert!(broken.is_empty(), "{zone:?}: {} of 200 logs: {first:?}", broken.len());
        assert!(metric(&gateway, "zuul_fingergw_executor_wait_seconds_count").await > 0.0);
        // Ends the streams.
        log.remove();
        gateway.logged_times("the ends", 200, |line| line.contains("end=finished")).await;
    }
}

/// Two gateways do not know of each other's connections: together these fit into the streamer's
/// listen backlog.
#[tokio::test]
async fn hundred_concurrent_clients_of_each_of_two_gateways_get_the_log() {
    let system = System::new().await;
    let gateways = [Builder::new(&system).ready().await, Builder::new(&system).ready().await];
    let mut executor = Executor::start(&system, None).await;
    let (build, mut log) = executor.run(None).await;
    let text = b"0123456789\n".repeat(2000);
    log.write(&text);
    let crowds = gateways
        .each_ref()
        .map(|gateway| concurrent_logs(gateway.address(), &build, 100, text.len()));
    let [first, second] = crowds;
    let (first, second) = tokio::join!(first, second);
    let broken = first.iter().chain(&second).filter(|log| **log != text).count();
    assert_eq!(broken, 0, "of 200 logs");
    // Ends the streams.
    log.remove();
    for mut gateway in gateways {
        gateway.logged_times("the ends", 100, |line| line.contains("end=finished")).await;
    }
}
