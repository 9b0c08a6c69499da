//! Spans of streams: traces started by Zuul's own classes, and a collector built of OpenTelemetry's
//! own messages (`collector.py`). Only in builds with the cargo feature `otlp`.

use std::fs;
use std::path::Path;

use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::process::Command;

use crate::executor::{Executor, Log, new_build, pieces};
use crate::script::{Script, parse_exposition};
use crate::support::admin::{exposition, until_metric, with_admin};
use crate::support::certificates::Authority;
use crate::support::client::{Client, Ending};
use crate::support::gateway::{Builder, Gateway};
use crate::support::proxy::Proxy;
use crate::support::system::System;
use crate::support::within;
use crate::zuul_conf::ZuulConf;

/// A collector, ended when this is dropped.
struct Collector {
    script: Script,
    port: u16,
}

impl Collector {
    /// Starts a collector for `grpc` or `http`, optionally with a certificate, a key and a CA for
    /// client certificates.
    async fn start(protocol: &str, files: &[&Path]) -> Self {
        let args = [Path::new(protocol)].into_iter().chain(files.iter().copied());
        let mut script = Script::start("collector.py", args);
        let port = script.next().await["port"].as_u64().expect("a port");
        Self { script, port: u16::try_from(port).expect("a port") }
    }

    async fn grpc() -> Self {
        Self::start("grpc", &[]).await
    }

    /// Returns the lines of `[tracing]` for this collector in our TOML.
    fn toml(&self) -> String {
        format!("enabled = true\nendpoint = \"http://127.0.0.1:{}\"\n", self.port)
    }

    /// Returns the next span.
    async fn span(&mut self) -> Value {
        self.script.next().await["span"].take()
    }
}

/// Whether ended spans are exported immediately, or not before the gateway stops.
fn every(milliseconds: &str) -> impl FnOnce(&mut Command) {
    move |command| {
        command.env("OTEL_BSP_SCHEDULE_DELAY", milliseconds);
    }
}

const AT_ONCE: &str = "10";
const AT_THE_END: &str = "86400000";

async fn started(builder: Builder, delay: &'static str) -> Gateway {
    let mut gateway = builder.start_changed(every(delay)).await;
    gateway.ready().await;
    gateway
}

/// Stops the gateway as a service manager does.
async fn stop(mut gateway: Gateway) -> Vec<String> {
    gateway.signal(Signal::TERM);
    assert!(gateway.exit().await.success());
    gateway.log()
}

/// Creates a build that runs at `executor`, with a trace.
async fn run(executor: &mut Executor, queue: Option<&str>) -> (String, Value, Log) {
    let build = new_build();
    let log = executor.log(&build);
    let trace = executor.submit(&build, queue).await;
    executor.take(&build).await;
    (build, trace, log)
}

/// Whether `span` is a child of the span that requested the build.
fn joins(span: &Value, trace: &Value) -> bool {
    span["trace_id"] == trace["trace_id"] && span["parent_span_id"] == trace["span_id"]
}

fn names(span: &Value) -> Vec<&str> {
    let events = span["events"].as_array().expect("events");
    events.iter().filter_map(|event| event[0].as_str()).collect()
}

#[tokio::test]
async fn spans_of_both_zones_join_the_trace_of_the_build() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let mut collector = Collector::grpc().await;
    let builder = |zone: &str, listener: &str| {
        let builder = with_admin(&system).zone(zone).tls(&identity).listeners(&[listener]);
        started(builder.tracing(&collector.toml()), AT_ONCE)
    };
    let west = builder("west", "tls = true").await;
    let mut east = builder("east", "").await;
    let mut executor = Executor::start(&system, Some("west")).await;
    let (build, trace, log) = run(&mut executor, Some("west")).await;
    let mut client = Client::ask(east.address(), &build).await;
    assert_eq!(log.grow(&pieces(), &mut client).await, Ending::Clean);

    let spans = [collector.span().await, collector.span().await];
    let of = |zone: &str| {
        let span = spans.iter().find(|span| span["attributes"]["zuul.zone"] == zone);
        span.expect("a span of each zone")
    };
    for span in &spans {
        assert!(joins(span, &trace), "{span} {trace}");
        assert_eq!(span["name"], "LogStream");
        assert_eq!(span["kind"], "SPAN_KIND_SERVER");
        assert_eq!(span["status"], "STATUS_CODE_UNSET");
        assert_eq!(span["scope"], "zuul-fingergw");
        assert_eq!(names(span), ["looked up", "connected", "first byte"]);
        assert!(span["start"].as_u64() < span["end"].as_u64(), "{span}");
        assert_eq!(span["resource"]["service.name"], "zuul");
        assert_eq!(span["resource"]["host.name"], "localhost");
    }
    let bytes = pieces().iter().map(Vec::len).sum::<usize>();
    let about = |zone: &str, route: &str| {
        json!({
            "zuul.build.uuid": build, "zuul.event.id": trace["event_id"], "zuul.zone": zone,
            "zuul.route": route, "zuul.stream.bytes": bytes, "zuul.stream.result": "ok",
        })
    };
    let (mut at_east, mut at_west) = (about("east", "zone"), about("west", "direct"));
    at_east["server.address"] = "localhost".into();
    at_east["server.port"] = west.port().into();
    at_west["server.address"] = "127.0.0.1".into();
    let route = executor.route();
    let (_, port) = route.rsplit_once(':').expect("an address");
    at_west["server.port"] = port.parse::<u16>().expect("a port").into();
    // The span names the other gateway, a machine of the system, but not the client, which may be a
    // person.
    at_west["network.peer.address"] = "127.0.0.1".into();
    assert_eq!(of("east")["attributes"], at_east);
    assert_eq!(of("west")["attributes"], at_west);

    let id = |key: &str| trace[key].as_str().expect("an id").to_owned();
    let ended = east.logged("the end", |line| line.contains("stream ended")).await;
    assert!(
        ended.contains(&format!(" event_id={} trace_id={}", id("event_id"), id("trace_id"))),
        "{ended}"
    );

    // From a slow stream in the metrics to its trace.
    let exemplar = format!("_bucket {{'trace_id': '{}'}}", id("trace_id"));
    for gateway in [&east, &west] {
        let families = parse_exposition(&exposition(gateway).await).await;
        let found: Vec<_> = families.lines().filter(|line| line.ends_with(&exemplar)).collect();
        assert_eq!(found.len(), 1, "{families}");
    }
}

/// Pending spans are exported when the gateway stops, and only those of sampled traces.
#[tokio::test]
async fn spans_are_exported_at_exit() {
    let system = System::new().await;
    let mut collector = Collector::grpc().await;
    let gateway = started(Builder::new(&system).tracing(&collector.toml()), AT_THE_END).await;
    let mut executor = Executor::start(&system, None).await;
    let mut traces = Vec::new();
    for sampled in [true, false, true] {
        executor.sampled(sampled).await;
        let (build, trace, log) = run(&mut executor, None).await;
        let mut client = Client::ask(gateway.address(), &build).await;
        assert_eq!(log.grow(&pieces()[..1], &mut client).await, Ending::Clean);
        traces.push(trace);
    }
    // Without a trace.
    assert_eq!(
        Client::ask(gateway.address(), &new_build()).await.text().await,
        "Build not found\r\n"
    );
    let log = stop(gateway).await;
    let output: Vec<_> = log.iter().filter(|line| line.contains("tracing: ")).collect();
    assert!(output.len() == 1 && output[0].contains("exporting spans"), "{output:?}");
    for trace in [&traces[0], &traces[2]] {
        let span = collector.span().await;
        assert!(joins(&span, trace), "{span} {trace}");
    }
}

/// Every kind of end has its attribute.
#[tokio::test]
async fn failed_streams_have_an_error_status() {
    let system = System::new().await;
    let mut collector = Collector::grpc().await;
    let gateway = started(Builder::new(&system).tracing(&collector.toml()), AT_ONCE).await;
    let mut executor = Executor::start(&system, None).await;

    let (build, trace, mut log) = run(&mut executor, None).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    log.write(b"line\n");
    client.expect(b"line\n").await;
    client.reset();
    let left = collector.span().await;
    assert!(joins(&left, &trace), "{left}");
    assert_eq!(left["attributes"]["zuul.stream.result"], "client_closed");
    assert_eq!(left["status"], "STATUS_CODE_UNSET", "a client that disconnects is not an error");

    let (build, trace, _log) = run(&mut executor, None).await;
    executor.kill().await;
    let reply = Client::ask(gateway.address(), &build).await.text().await;
    let span = collector.span().await;
    assert!(joins(&span, &trace), "{span}");
    assert_eq!(span["status"], "STATUS_CODE_ERROR");
    assert_eq!(span["message"], reply.trim_end());
    assert_eq!(span["attributes"]["error.type"], "upstream_unreachable");
    assert_eq!(span["attributes"]["zuul.stream.bytes"], 0);
    assert_eq!(names(&span), ["looked up", "attempt failed"]);
}

/// Failed hops are recorded as well.
#[tokio::test]
async fn failed_hops_are_events_of_the_span() {
    let system = System::new().await;
    let mut collector = Collector::grpc().await;
    let gateway = Builder::new(&system).zone("east").tracing(&collector.toml());
    let gateway = started(gateway, AT_ONCE).await;
    let dead = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = dead.local_addr().expect("its address").port();
    drop(dead);
    system.put_gateway(Some("west"), Some(port), false, "running").await;
    let mut executor = Executor::start(&system, Some("west")).await;
    let (build, trace, log) = run(&mut executor, Some("west")).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    assert_eq!(log.grow(&pieces()[..1], &mut client).await, Ending::Clean);
    let span = collector.span().await;
    assert!(joins(&span, &trace), "{span}");
    assert_eq!(names(&span), ["looked up", "attempt failed", "connected", "first byte"]);
    assert_eq!(span["events"][1][1]["server.port"], port);
    assert_eq!(span["attributes"]["zuul.route"], "fallback");
}

/// Streams a log whose span must arrive.
async fn traced_through(gateway: &Gateway, system: &System, collector: &mut Collector) -> Value {
    let mut executor = Executor::start(system, None).await;
    let (build, trace, log) = run(&mut executor, None).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    assert_eq!(log.grow(&pieces()[..1], &mut client).await, Ending::Clean);
    let span = collector.span().await;
    assert!(joins(&span, &trace), "{span}");
    span
}

/// The collector requires a client certificate, and has a certificate of another CA.
#[tokio::test]
async fn spans_are_exported_by_grpc_over_tls() {
    let system = System::new().await;
    let authority = Authority::new();
    let (theirs, ours) = (authority.identity("collector"), authority.identity("gateway"));
    let mut collector = Collector::start("grpc", &[&theirs.cert, &theirs.key, &theirs.ca]).await;
    let tracing = format!(
        "enabled = true\nendpoint = \"https://localhost:{}\"\ntls_cert = {:?}\ntls_key = {:?}\n\
         tls_ca = {:?}\ncompression = \"gzip\"\nservice_name = \"zuul-two\"",
        collector.port, ours.cert, ours.key, ours.ca
    );
    let builder = Builder::new(&system).tracing(&tracing);
    let mut gateway = builder
        .start_changed(|command| {
            every(AT_ONCE)(command);
            command.env("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20secret");
        })
        .await;
    gateway.ready().await;
    let span = traced_through(&gateway, &system, &mut collector).await;
    assert_eq!(span["wire"]["authorization"], "Bearer secret");
    assert_eq!(span["resource"]["service.name"], "zuul-two");
    assert_ne!(span["wire"]["peer"], Value::Null, "our certificate was presented: {span}");
}

/// The same from a `zuul.conf`, over HTTP.
#[tokio::test]
async fn spans_are_exported_by_http_over_tls() {
    let system = System::new().await;
    let authority = Authority::new();
    let theirs = authority.identity("collector");
    let mut collector = Collector::start("http", &[&theirs.cert, &theirs.key]).await;
    let lines = format!(
        "[tracing]\nenabled = true\nprotocol = http/protobuf\ncertificate_file = {}\n\
         endpoint = https://localhost:{}/v1/traces?a=b\ncompression = gzip\n",
        theirs.ca.display(),
        collector.port
    );
    let conf = ZuulConf::gateway(&system, "west", &lines);
    let gateway = conf.ours().await;
    let mut executor = Executor::start(&system, Some("west")).await;
    let (build, trace, log) = run(&mut executor, Some("west")).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    assert_eq!(log.grow(&pieces()[..1], &mut client).await, Ending::Clean);
    stop(gateway).await;
    let span = collector.span().await;
    assert!(joins(&span, &trace), "{span}");
    let host = format!("localhost:{}", collector.port);
    let wire = json!({
        "encoding": "gzip", "path": "/v1/traces?a=b", "host": host,
        "type": "application/x-protobuf",
    });
    assert_eq!(span["wire"], wire);
}

/// A failed export is retried with the current files, so that renewed certificates need no restart.
#[tokio::test]
async fn replaced_ca_file_is_read_after_a_failed_export() {
    let system = System::new().await;
    let (authority, other) = (Authority::new(), Authority::new());
    let theirs = authority.identity("collector");
    for protocol in ["grpc", "http"] {
        let mut collector = Collector::start(protocol, &[&theirs.cert, &theirs.key]).await;
        let builder = Builder::new(&system);
        let ca = builder.directory().join("ca.pem");
        fs::copy(other.ca(), &ca).expect("a copy");
        let tracing = match protocol {
            "grpc" => format!("endpoint = \"https://localhost:{}\"\ntls_ca", collector.port),
            _ => format!(
                "protocol = \"http/protobuf\"\ncertificate_file = {ca:?}\n\
                 endpoint = \"https://localhost:{}/v1/traces\"\n#",
                collector.port
            ),
        };
        let tracing = format!("enabled = true\n{tracing} = {ca:?}");
        let mut gateway = started(builder.tracing(&tracing), AT_ONCE).await;
        let mut executor = Executor::start(&system, None).await;
        let (build, _, log) = run(&mut executor, None).await;
        let mut client = Client::ask(gateway.address(), &build).await;
        assert_eq!(log.grow(&pieces()[..1], &mut client).await, Ending::Clean);
        let warned = gateway.logged("a warning", |line| line.contains("cannot export spans")).await;
        // opentelemetry-otlp reports only "network error" for HTTP.
        let reason = if protocol == "grpc" { "invalid peer certificate" } else { "network error" };
        assert!(warned.contains("WARN") && warned.contains(reason), "{warned}");
        fs::copy(theirs.ca.as_path(), &ca).expect("a copy");
        traced_through(&gateway, &system, &mut collector).await;
        let back = gateway.logged("recovery", |line| line.contains("accepts spans again")).await;
        assert!(back.contains("lost=1"), "{back}");
    }
}

/// The collector is down and returns: one warning with the number of lost spans, and streams are
/// not affected.
#[tokio::test]
async fn spans_are_exported_when_the_collector_returns() {
    let system = System::new().await;
    let mut collector = Collector::grpc().await;
    let proxy = Proxy::start(collector.port).await;
    proxy.refuse();
    let builder = with_admin(&system)
        .tracing(&format!("enabled = true\nendpoint = \"http://{}\"\n", proxy.address));
    let mut gateway = started(builder, AT_ONCE).await;
    let mut executor = Executor::start(&system, None).await;
    let mut traces = Vec::new();
    for round in 0..3 {
        let (build, trace, log) = run(&mut executor, None).await;
        let mut client = Client::ask(gateway.address(), &build).await;
        assert_eq!(log.grow(&pieces(), &mut client).await, Ending::Clean);
        traces.push(trace);
        if round == 0 {
            gateway.logged("a warning", |line| line.contains("cannot export spans")).await;
        }
        if round == 1 {
            until_metric(&gateway, "zuul_fingergw_spans_total{state=\"failed\"}", 2.0).await;
            proxy.release();
        }
    }
    let span = collector.span().await;
    assert!(joins(&span, &traces[2]), "{span}");
    let back =
        gateway.logged("the end of the stream", |line| line.contains("accepts spans again")).await;
    assert!(back.contains("lost=2"), "{back}");
    let log = stop(gateway).await;
    assert_eq!(
        log.iter().filter(|line| line.contains("cannot export spans")).count(),
        1,
        "{log:?}"
    );
}

/// The collector accepts connections and stays silent: neither streams nor the shutdown wait for
/// it.
#[tokio::test]
async fn hanging_collector_does_not_delay_streams() {
    for protocol in ["grpc", "http/protobuf"] {
        let system = System::new().await;
        let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = silent.local_addr().expect("its address");
        let builder = with_admin(&system).tracing(&format!(
            "enabled = true\nprotocol = \"{protocol}\"\nendpoint = \"http://{address}\"\ntimeout = \"600s\""
        ));
        let mut gateway = builder
            .start_changed(|command| {
                every(AT_ONCE)(command);
                command.env("OTEL_BSP_MAX_QUEUE_SIZE", "1");
            })
            .await;
        gateway.ready().await;
        let mut executor = Executor::start(&system, None).await;
        for _ in 0..3 {
            let (build, _, log) = run(&mut executor, None).await;
            let mut client = Client::ask(gateway.address(), &build).await;
            assert_eq!(log.grow(&pieces(), &mut client).await, Ending::Clean);
        }
        let held =
            within("the gateway to be registered", silent.accept()).await.expect("a connection");
        until_metric(&gateway, "zuul_fingergw_spans_total{state=\"ended\"}", 3.0).await;
        let log = stop(gateway).await;
        let warned = log.iter().filter(|line| line.contains("cannot export the last spans"));
        assert_eq!(warned.count(), 1, "{log:?}");
        drop(held);
    }
}

/// Files are checked before the gateway starts anything.
#[tokio::test]
async fn unusable_certificate_files_are_errors() {
    let system = System::new().await;
    let builder = Builder::new(&system)
        .tracing("enabled = true\nendpoint = \"https://c:1\"\ntls_ca = \"/no/such/ca.pem\"");
    let mut check = Command::new(crate::support::gateway::BINARY);
    let check = check.args(["check", "-c"]).arg(builder.write()).output();
    let output = within("the check", check).await.expect("the built binary");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(78));
    assert!(text.starts_with("/no/such/ca.pem: cannot be read: "), "{text}");
}
