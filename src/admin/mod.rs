//! Health and metrics over HTTP: upstream's paths, codes and bodies (`zuul/lib/monitoring.py`).
//!
//! | path | answer |
//! |---|---|
//! | `/health/live` | 200, `live` |
//! | `/health/ready` | 200 and `ready` while new streams can be served, else 503 and the reason |
//! | `/health/status` | 200, the registry state in capitals |
//! | `/metrics`, `/` | 200, Prometheus' text format, or OpenMetrics where it is asked for |
//!
//! Upstream's bodies of the first two are empty.
//!
//! Bounded: a scraper that is slow, or many of them, cost nobody else anything. Half a request
//! makes room for a newer connection, and only metrics have a limit on answers: health checks that
//! fail because of other clients would have a healthy gateway restarted. One address has a quarter
//! of each kind of place.

pub(crate) mod process_collector;
pub(crate) mod state_collector;

use std::convert::Infallible;
use std::fmt::Write;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use rustix::net::{RecvFlags, recv};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use self::process_collector::Process;
pub(crate) use self::state_collector::System;
use self::state_collector::is_ready;
use crate::gateway::limits::eviction_queue::{Entry, EvictionQueue};
use crate::model::component::State;
use crate::registry::RegistrationStatus;
use crate::telemetry::metrics::Metrics;

// `service::descriptors` keeps a descriptor for each of these places.
/// Connections at once whose first segment is waited for, and for how long. A client that sends its
/// request with its connection is not in the queue of those that may be closed.
const NEW: usize = 32;
const NEW_FOR: Duration = Duration::from_millis(50);

/// Connections at once that have not sent their request's head.
const READING: usize = 32;

/// Expositions of metrics under way at once.
const EXPOSITIONS: usize = 16;

/// For a request's head, and for a whole connection: each serves one request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(2);
const TIMEOUT: Duration = Duration::from_secs(10);

/// The longest head, in bytes.
const HEAD_MAX: usize = 8 * 1024;

/// After a failed accept.
const PAUSE: Duration = Duration::from_millis(500);

const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What there is to tell.
pub(crate) struct Admin {
    registry: Registry,
    standing: watch::Receiver<RegistrationStatus>,
    state: watch::Receiver<State>,
    /// The clients that read metrics.
    expositions: EvictionQueue<IpAddr>,
}

/// A connection that has not sent its request's head, or not even its first segment.
struct Reading {
    client: IpAddr,
    evicted: CancellationToken,
}

/// What a connection holds.
struct Held {
    /// Until its request's head has been read.
    reading: Option<Entry<Reading>>,
    /// From then on, for metrics.
    exposition: Option<Entry<IpAddr>>,
}

impl Admin {
    /// Tells of `metrics` and of `system`.
    pub(crate) fn new(metrics: &Metrics, system: System) -> Self {
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        let (state, standing) = (system.state.clone(), system.standing.clone());
        registry.register_collector(Box::new(system));
        registry.register_collector(Box::new(Process::new()));
        Self { registry, standing, state, expositions: EvictionQueue::default() }
    }

    /// Answers on `listener` for as long as it is polled.
    pub(crate) async fn serve(self, listener: TcpListener) -> Infallible {
        let this = Arc::new(self);
        let (new, reading) = (EvictionQueue::default(), EvictionQueue::default());
        loop {
            match listener.accept().await {
                Ok((stream, client)) => {
                    let client = client.ip().to_canonical();
                    let new = queue(&new, client, NEW);
                    let (this, reading) = (Arc::clone(&this), reading.clone());
                    tokio::spawn(async move { this.begin(stream, client, new, &reading).await });
                }
                Err(error) => {
                    debug!(%error, "admin: cannot accept");
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// Answers a connection whose request is there, as those of health checkers and scrapers most
    /// often are. Any other may be closed for a newer one until its request has been read. `new` is
    /// evicted when the first segment may be waited for no longer.
    async fn begin(
        &self,
        stream: TcpStream,
        client: IpAddr,
        (new, newer): (Entry<Reading>, CancellationToken),
        reading: &EvictionQueue<Reading>,
    ) {
        let mut byte = [0];
        let first_segment = timeout(NEW_FOR, stream.peek(&mut byte));
        let _ = newer.run_until_cancelled(first_segment).await;
        let (entry, evicted) = match has_head(&stream) {
            true => (None, CancellationToken::new()),
            false => {
                let (entry, evicted) = queue(reading, client, READING);
                (Some(entry), evicted)
            }
        };
        drop(new);
        tokio::select! {
            biased;
            () = self.converse(stream, client, entry) => {}
            () = evicted.cancelled() => debug!(%client, "admin: closed for a newer connection"),
        }
    }

    async fn converse(&self, stream: TcpStream, client: IpAddr, reading: Option<Entry<Reading>>) {
        let held = Mutex::new(Held { reading, exposition: None });
        let answer = service_fn(|request| {
            let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
            held.reading = None;
            std::future::ready(Ok::<_, Infallible>(self.answer(&request, client, &mut held)))
        });
        let conversation = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(HEAD_MAX)
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), answer);
        match timeout(TIMEOUT, conversation).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(%error, "admin: connection failed"),
            Err(_) => debug!("admin: connection too slow"),
        }
    }

    fn answer(
        &self,
        request: &Request<Incoming>,
        client: IpAddr,
        held: &mut Held,
    ) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = respond(StatusCode::METHOD_NOT_ALLOWED, None, String::new());
            response
                .headers_mut()
                .insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match request.uri().path() {
            "/health/live" => respond(StatusCode::OK, Some("text/plain"), "live\n".to_owned()),
            "/health/ready" => match self.why_not_ready() {
                None => respond(StatusCode::OK, Some("text/plain"), "ready\n".to_owned()),
                Some(reason) => {
                    let text = format!("not ready: {reason}\n");
                    respond(StatusCode::SERVICE_UNAVAILABLE, Some("text/plain"), text)
                }
            },
            "/health/status" => {
                let state = self.state.borrow().as_str().to_uppercase();
                respond(StatusCode::OK, Some("text/plain"), state)
            }
            "/metrics" | "/" => {
                let Some(place) = exposition_place(&self.expositions, client) else {
                    let text = "too many clients, or this one too often, are reading metrics\n";
                    let unavailable = StatusCode::SERVICE_UNAVAILABLE;
                    return respond(unavailable, Some("text/plain"), text.to_owned());
                };
                held.exposition = Some(place);
                let accept = request.headers().get(ACCEPT).and_then(|accept| accept.to_str().ok());
                let openmetrics =
                    accept.is_some_and(|accept| accept.contains("application/openmetrics-text"));
                let content_type = if openmetrics { OPENMETRICS } else { TEXT };
                respond(StatusCode::OK, Some(content_type), self.exposition(openmetrics))
            }
            _ => respond(StatusCode::NOT_FOUND, None, String::new()),
        }
    }

    /// Why new streams cannot be served; `None` if they can.
    fn why_not_ready(&self) -> Option<String> {
        let (state, standing) = (*self.state.borrow(), &*self.standing.borrow());
        match (state, standing) {
            _ if is_ready(state, standing) => None,
            (State::Stopped, _) => Some("stopping".to_owned()),
            (_, RegistrationStatus::Registered(_)) => Some("starting".to_owned()),
            (_, standing) => Some(format!("ZooKeeper: {standing}")),
        }
    }

    fn exposition(&self, openmetrics: bool) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("a String takes everything");
        if openmetrics { text } else { prometheus_text(&text) }
    }
}

/// Whether a whole request has arrived on `stream`.
fn has_head(stream: &TcpStream) -> bool {
    let mut head = [0; HEAD_MAX];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let Ok((_, count)) = recv(stream, &mut head, flags) else { return false };
    // Empty lines before a request are skipped by the HTTP library, which then waits for it.
    head[0].is_ascii_alphabetic() && head[..count].windows(4).any(|end| end == b"\r\n\r\n")
}

/// Adds a connection of `client` to `queue`, which has so many `places`, a quarter of them for one
/// address; the oldest one makes room. Returns its entry, and what is cancelled when it has to make
/// room itself.
fn queue(
    queue: &EvictionQueue<Reading>,
    client: IpAddr,
    places: usize,
) -> (Entry<Reading>, CancellationToken) {
    let of_client = |other: &Reading| other.client == client;
    let oldest = if queue.count(of_client) >= places / 4 {
        queue.evict(of_client)
    } else if queue.len() >= places {
        queue.evict(|_| true)
    } else {
        None
    };
    if let Some(Reading { evicted, .. }) = oldest {
        evicted.cancel();
    }
    let evicted = CancellationToken::new();
    (queue.insert(Reading { client, evicted: evicted.clone() }), evicted)
}

/// A place among the clients that read metrics, unless all are taken or a quarter of them by `client`.
fn exposition_place(reading: &EvictionQueue<IpAddr>, client: IpAddr) -> Option<Entry<IpAddr>> {
    let of_client = reading.count(|other| *other == client);
    let is_free = of_client < EXPOSITIONS / 4 && reading.len() < EXPOSITIONS;
    is_free.then(|| reading.insert(client))
}

fn respond(
    status: StatusCode,
    content_type: Option<&'static str>,
    body: String,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    if let Some(content_type) = content_type {
        let value = hyper::header::HeaderValue::from_static(content_type);
        response.headers_mut().insert(CONTENT_TYPE, value);
    }
    response
}

/// OpenMetrics as Prometheus' older text format: there a counter's type is told of the name with
/// its `_total`, units are part of names only, there are no exemplars, and nothing marks the end.
fn prometheus_text(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len());
    let mut help = None;
    for line in openmetrics.lines() {
        let words: Vec<_> = line.splitn(4, ' ').collect();
        match words[..] {
            ["#", "HELP", ..] => help = Some(words),
            ["#", "TYPE", name, kind] => {
                let total = if kind == "counter" { "_total" } else { "" };
                if let Some([_, _, _, words]) = help.take().as_deref() {
                    let _ = writeln!(text, "# HELP {name}{total} {words}");
                }
                let _ = writeln!(text, "# TYPE {name}{total} {kind}");
            }
            ["#", ..] => {}
            _ => {
                text.push_str(without_exemplar(line));
                text.push('\n');
            }
        }
    }
    text
}

/// Only buckets have them, and nobody else chooses the values of a bucket's labels.
fn without_exemplar(sample: &str) -> &str {
    let name = sample.split('{').next().unwrap_or_default();
    match sample.split_once(" # {") {
        Some((bare, _)) if name.ends_with("_bucket") => bare,
        _ => sample,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::gateway::routing::Resolver;
    use crate::model::component::OwnComponent;
    use crate::registry::Registry as Components;
    use crate::registry::in_memory::InMemoryRegistry;
    use crate::telemetry::log::LostLines;
    use crate::telemetry::metrics::definitions::PAGE;
    use crate::telemetry::metrics::descriptor::Values;
    use crate::telemetry::metrics::{self, definitions};
    use crate::tls::Failure;

    /// A quarter of the places is one address's, in whichever queue.
    #[test]
    fn an_address_makes_room_for_itself_before_others_do() {
        let waiting = EvictionQueue::default();
        let mut all = Vec::new();
        let mut come = |client: &str, times: usize| {
            for _ in 0..times {
                all.push((client.to_owned(), queue(&waiting, client.parse().unwrap(), 16)));
            }
            let left = all.iter().filter(|(_, (_, evicted))| !evicted.is_cancelled());
            left.map(|(client, _)| client.chars().last().unwrap()).collect::<String>()
        };
        assert_eq!(come("192.0.2.1", 1), "1");
        assert_eq!(come("192.0.2.2", 300), "12222");
        assert_eq!(come("192.0.2.3", 4), "122223333");
        assert_eq!(come("192.0.2.4", 4), "1222233334444");
        assert_eq!(come("192.0.2.5", 4), "2222333344445555", "the oldest of all");
        assert_eq!(waiting.len(), 16);
    }

    #[test]
    fn an_address_reads_metrics_in_a_quarter_of_the_places() {
        let reading = EvictionQueue::default();
        let fitting = |client: [u8; 4]| -> Vec<_> {
            (0..EXPOSITIONS).map_while(|_| exposition_place(&reading, client.into())).collect()
        };
        let held = [1, 2, 3, 4, 5].map(|last| fitting([192, 0, 2, last]));
        assert_eq!(held.each_ref().map(Vec::len), [4, 4, 4, 4, 0]);
        drop(held);
        assert_eq!(fitting([192, 0, 2, 5]).len(), 4);
    }

    /// What a gateway of zone west exports, that is registered in a registry of this process.
    async fn exported() -> String {
        let metrics = Metrics::default();
        metrics.certificate(metrics::Role::Gateway, Some(1));
        let embedded = Arc::new(InMemoryRegistry::default());
        let (hostname, zone) = ("localhost".to_owned(), Some("west".to_owned()));
        let own = OwnComponent { hostname, public_port: Some(79), zone, use_ssl: false };
        let registration = embedded.register(own.clone());
        registration.set_running();
        embedded.wait_for_gateways(1).await;
        let components = Components::InMemory(embedded);
        let resolver = Resolver::new(components.clone(), own);
        let system = System::new(&registration, components, &resolver, LostLines::default());
        Admin::new(&metrics, system).exposition(true)
    }

    /// Everything that is exported is in the catalogue, with these words, this type and these values
    /// of labels, and nothing else is there.
    #[tokio::test]
    async fn the_catalogue_is_what_is_exported() {
        let text = exported().await;
        let mut families: BTreeMap<&str, [String; 2]> = BTreeMap::new();
        let mut series: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for line in text.lines() {
            match line.splitn(4, ' ').collect::<Vec<_>>()[..] {
                ["#", "HELP", name, help] => {
                    families.insert(name, [help.to_owned(), String::new()]);
                }
                ["#", "TYPE", name, kind] => families.get_mut(name).unwrap()[1] = kind.to_owned(),
                ["#", ..] => {}
                _ => {
                    let (name, rest) = line.split_at(line.find(['{', ' ']).unwrap());
                    let labels = rest.strip_prefix('{').and_then(|rest| rest.split_once('}'));
                    series.entry(name).or_default().push(labels.map_or("", |(labels, _)| labels));
                }
            }
        }
        for descriptor in PAGE.iter().flat_map(|(_, descriptors)| *descriptors) {
            let [help, kind] = families.remove(descriptor.name).expect(descriptor.name);
            let known = descriptor.kind.as_str();
            assert_eq!((help.trim_end_matches('.'), kind.as_str()), (descriptor.help, known));
            let suffix = match known {
                "counter" => "_total",
                "histogram" => "_count",
                _ => "",
            };
            let name = format!("{}{suffix}", descriptor.name);
            let found = series.get(name.as_str()).expect(&name);
            let mut expected = vec![String::new()];
            for label in descriptor.labels {
                let extended = |values: &str| match label.values {
                    Values::These(these) => these
                        .iter()
                        .map(|(value, _)| format!("{values},{}=\"{value}\"", label.name))
                        .collect(),
                    Values::Any(_) => vec![format!("{values},{}=", label.name)],
                };
                expected = expected.iter().flat_map(|values| extended(values)).collect();
            }
            assert_eq!(found.len(), expected.len(), "{name}: {found:?}");
            for labels in expected {
                let labels = labels.trim_start_matches(',');
                let there = found.iter().any(|found| {
                    found.starts_with(labels)
                        && (found.len() == labels.len() || labels.ends_with('='))
                });
                assert!(there, "{name}: no {labels} in {found:?}");
            }
        }
        assert!(families.is_empty(), "not in the catalogue: {families:?}");
    }

    /// Streams that are traced tell where, in the one format that has room for it.
    #[test]
    fn exemplars_are_in_openmetrics_alone() {
        let (metrics, mut registry) = (Metrics::default(), Registry::default());
        metrics.register(&mut registry);
        metrics.first_byte(Duration::from_millis(20), Some("abc"));
        metrics.first_byte(Duration::from_millis(20), None);
        let mut openmetrics = String::new();
        encode(&mut openmetrics, &registry).unwrap();
        let bucket = "zuul_fingergw_first_byte_seconds_bucket{le=\"0.025\"} 2";
        let exemplar = format!("{bucket} # {{trace_id=\"abc\"}} 0.02 ");
        assert!(openmetrics.contains(&exemplar), "{openmetrics}");
        let text = prometheus_text(&openmetrics);
        assert!(text.contains(&format!("{bucket}\n")) && !text.contains("trace_id"), "{text}");
        let zone = "zone_info{zone=\"a # {b\"} 1";
        assert_eq!(without_exemplar(zone), zone);
    }

    /// What cannot be counted without being in the catalogue, because the types know its values.
    #[test]
    fn the_catalogue_has_the_values_of_the_types() {
        use crate::telemetry::metrics::{Rejection, Route};
        for failure in Failure::ALL {
            assert!(definitions::HANDSHAKES.has(1, failure.label()), "{failure:?}");
        }
        assert_eq!(definitions::HANDSHAKES.values(1).count(), Failure::ALL.len() + 1);
        for reason in [
            Rejection::Limit,
            Rejection::Address,
            Rejection::Handshakes,
            Rejection::HandshakeRate,
            Rejection::Lookups,
            Rejection::Accept,
        ] {
            assert!(definitions::REJECTED.has(0, reason.as_str()), "{reason:?}");
        }
        for route in [Route::Direct, Route::Zone, Route::Fallback] {
            assert!(definitions::ROUTES.has(0, route.as_str()), "{route:?}");
        }
        assert!(!definitions::ROUTES.has(0, "detour"));
    }
}
