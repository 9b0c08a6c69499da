//! Health checks and metrics over HTTP.

use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::admin::{admin, ask, get, metric, until_metric, with_admin};
use crate::support::client::Client;
use crate::support::executor::Executor;
use crate::support::system::System;
use crate::support::within;
use crate::support::zookeeper::ZooKeeper;

#[tokio::test]
async fn paths_status_codes_and_bodies_are_those_of_zuuls_gateway() {
    let system = System::new().await;
    let mut gateway = with_admin(&system).ready().await;
    gateway.until_running(&system).await;
    let address = admin(&gateway);
    for (path, status, body) in [
        ("/health/live", "HTTP/1.1 200 OK", "live\n"),
        ("/health/ready", "HTTP/1.1 200 OK", "ready\n"),
        ("/health/status", "HTTP/1.1 200 OK", "RUNNING"),
        ("/health", "HTTP/1.1 404 Not Found", ""),
        ("/nothing", "HTTP/1.1 404 Not Found", ""),
    ] {
        let answer = get(address, path).await;
        assert_eq!((answer.status.as_str(), answer.body.as_str()), (status, body), "{path}");
        let typed = answer.headers.contains("content-type: text/plain");
        assert_eq!(typed, !body.is_empty(), "{path}: {}", answer.headers);
    }
    for path in ["/", "/metrics"] {
        let answer = get(address, path).await;
        assert_eq!(answer.status, "HTTP/1.1 200 OK");
        assert!(
            answer.headers.contains("content-type: application/openmetrics-text; version=1.0.0")
        );
        assert!(answer.body.ends_with("# EOF\n"), "{path}: {}", answer.body);
    }
    let answer =
        ask(address, "POST /metrics HTTP/1.1\r\nHost: g\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(answer.status, "HTTP/1.1 405 Method Not Allowed");
}

#[tokio::test]
async fn readiness_follows_the_registration() {
    let zookeeper = ZooKeeper::start().await;
    let system = System::on(zookeeper.clone()).await;
    zookeeper.kill().await;
    let mut gateway = with_admin(&system).start().await;
    let address = admin(&gateway);
    let unready = "HTTP/1.1 503 Service Unavailable";
    let ready = async || {
        let answer = get(address, "/health/ready").await;
        (answer.status, answer.body)
    };
    let not = |reason: &str| (unready.to_owned(), format!("not ready: {reason}\n"));
    assert_eq!(ready().await, not("ZooKeeper: connecting"));
    assert_eq!(get(address, "/health/live").await.status, "HTTP/1.1 200 OK");
    assert_eq!(get(address, "/health/status").await.body, "INITIALIZING");
    assert!(metric(&gateway, "zuul_fingergw_zookeeper_connected").await < 1.0);
    assert_eq!(metric(&gateway, "zuul_fingergw_ready").await, 0.0);

    zookeeper.run().await;
    gateway.ready().await;
    gateway.until_running(&system).await;
    assert_eq!(get(address, "/health/ready").await.status, "HTTP/1.1 200 OK");
    assert!(metric(&gateway, "zuul_fingergw_zookeeper_connected").await > 0.0);
    assert_eq!(metric(&gateway, "zuul_fingergw_ready").await, 1.0);
    until_metric(&gateway, "zuul_fingergw_zone_gateways{zone=\"west\"}", 1.0).await;
    assert_eq!(metric(&gateway, "zuul_fingergw_zone_info{zone=\"west\"}").await, 1.0);

    zookeeper.kill().await;
    gateway.status("the loss", |status| status.ends_with("lost")).await;
    assert_eq!(ready().await, not("ZooKeeper: connection lost"));
    zookeeper.run().await;
    gateway
        .status("the connection to be restored", |status| status.contains("registered as"))
        .await;

    // A running stream delays the shutdown.
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let _client = Client::ask(gateway.address(), &build).await;
    let _stream = executor.accept().await;
    gateway.signal(Signal::TERM);
    system.until("the entry to be removed", <[_]>::is_empty).await;
    assert_eq!(ready().await, not("stopping"));
    assert_eq!(get(address, "/health/status").await.body, "STOPPED");
    assert!(metric(&gateway, "zuul_fingergw_draining").await > 0.0);
}

#[tokio::test]
async fn metrics_count_what_happened() {
    let system = System::new().await;
    let gateway = with_admin(&system).ready().await;
    let result = |label: &str| format!("zuul_fingergw_requests_total{{result=\"{label}\"}}");
    // All series exist from the start.
    for label in ["ok", "not_found", "upstream_failed", "probe", "tls"] {
        assert!(metric(&gateway, &result(label)).await < 0.5, "{label}");
    }
    for series in [
        "zuul_fingergw_connections_rejected_total{reason=\"limit\"}",
        "zuul_fingergw_tls_handshakes_total{direction=\"outbound\",result=\"unknown_ca\"}",
        "zuul_fingergw_routes_total{route=\"fallback\"}",
        "zuul_fingergw_first_byte_seconds_count",
    ] {
        assert!(metric(&gateway, series).await < 0.5, "{series}");
    }
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut stream = executor.accept().await;
    stream.write(b"12345").await;
    client.expect(b"12345").await;
    assert_eq!(metric(&gateway, "zuul_fingergw_streams_active").await, 1.0);
    stream.finish().await;
    assert_eq!(client.text().await, "");
    drop(client);
    assert_eq!(Client::ask(gateway.address(), "abc").await.text().await, "Build not found\r\n");
    drop(Client::connect(gateway.address()).await);

    // The gateway counts a stream shortly after the client has seen its end.
    within("the counts", async {
        for label in ["ok", "not_found", "probe"] {
            while metric(&gateway, &result(label)).await < 1.0 {}
        }
    })
    .await;
    for (series, value) in [
        ("zuul_fingergw_streamed_bytes_total", 5.0),
        ("zuul_fingergw_streams_active", 0.0),
        ("zuul_fingergw_routes_total{route=\"direct\"}", 1.0),
        ("zuul_fingergw_lookup_seconds_count", 2.0),
        ("zuul_fingergw_first_byte_seconds_count", 1.0),
        ("zuul_fingergw_connections_accepted_total{listener=\"plain\"}", 3.0),
        ("zuul_fingergw_zookeeper_sessions_total", 1.0),
    ] {
        assert_eq!(metric(&gateway, series).await, value, "{series}");
    }
}

#[tokio::test]
async fn process_metrics_are_those_that_zuul_documents() {
    let system = System::new().await;
    let gateway = with_admin(&system).ready().await;
    for name in [
        "process_virtual_memory_bytes",
        "process_resident_memory_bytes",
        "process_start_time_seconds",
        "process_cpu_seconds_total",
        "process_open_fds",
        "process_max_fds",
    ] {
        let value = metric(&gateway, name).await;
        assert!(value > 0.0 || name.contains("cpu"), "{name} {value}");
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let started = metric(&gateway, "process_start_time_seconds").await;
    let age = now.expect("after 1970").as_secs_f64() - started;
    assert!((-5.0..3600.0).contains(&age), "started {age} s ago");
}

/// Silent connections and partial requests up to the limits, from other addresses and from the
/// health checker's, and responses that are not read.
#[tokio::test]
async fn health_checks_are_answered_when_all_other_connections_are_taken() {
    let system = System::new().await;
    let mut gateway = with_admin(&system).ready().await;
    gateway.until_running(&system).await;
    let address = admin(&gateway);
    let mut held = Vec::new();
    for sent in ["GET /health/live HTT", "GET /metrics HTTP/1.1\r\nHost: g\r\n\r\n"] {
        for local in ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"] {
            let mut silent = Vec::new();
            for _ in 0..400 {
                silent.push(Client::connect_narrow_from(local, address).await);
            }
            assert_eq!(get(address, "/health/live").await.status, "HTTP/1.1 200 OK", "{local}");
            for _ in 0..20 {
                let mut client = Client::connect_narrow_from(local, address).await;
                // It may have been closed already to make room.
                let _ = client.stream.write_all(sent.as_bytes()).await;
                held.push(client);
            }
            for path in ["/health/live", "/health/ready", "/health/status"] {
                assert_eq!(get(address, path).await.status, "HTTP/1.1 200 OK", "{local}, {path}");
            }
        }
    }
}

/// Silent and slow scrapers up to the connection limit must not affect streams.
#[tokio::test]
async fn slow_scrapers_do_not_disturb_streams() {
    let system = System::new().await;
    let gateway = with_admin(&system).ready().await;
    let address = admin(&gateway);
    let mut silent = Vec::new();
    for _ in 0..10 {
        let mut stream = TcpStream::connect(address).await.expect("a connection");
        stream.write_all(b"GET /metrics HTT").await.expect("half a request");
        silent.push(stream);
    }
    assert_eq!(get(address, "/health/live").await.status, "HTTP/1.1 200 OK");
    for _ in 0..60 {
        silent.push(TcpStream::connect(address).await.expect("a connection"));
    }
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");
    // Each is closed in the end, without a response.
    for mut stream in silent {
        let mut rest = Vec::new();
        let _ = within("the close", stream.read_to_end(&mut rest)).await;
    }
    assert_eq!(get(address, "/health/live").await.status, "HTTP/1.1 200 OK");
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(100_000));
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    let _ = stream.write_all(long.as_bytes()).await;
    let _ = within("the close", stream.read_to_end(&mut Vec::new())).await;
    assert_eq!(get(address, "/health/live").await.status, "HTTP/1.1 200 OK");
}
