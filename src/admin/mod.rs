//! HTTP server for health and metrics, with the paths and status codes of Zuul's services
//! (`zuul/lib/monitoring.py`).
//!
//! | path | response |
//! |---|---|
//! | `/health/live` | 200, `live` |
//! | `/health/ready` | 200 and `ready` if new streams can be served, else 503 and the reason |
//! | `/health/status` | 200, the registered state in capitals |
//! | `/metrics`, `/` | 200, OpenMetrics |
//!
//! Zuul's services send empty bodies for the first two.
//!
//! Slow or numerous scrapers must affect neither streams nor health checks: a failed health check
//! would have a healthy gateway restarted. So an incomplete request is closed in favor of a newer
//! connection, only metrics have a limit of concurrent responses, and one address gets at most a
//! quarter of each limit.

mod encoding;
mod process_collector;
mod state_collector;

use std::convert::Infallible;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::registry::Registry;
use rustix::net::{RecvFlags, recv};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use self::process_collector::ProcessCollector;
pub(crate) use self::state_collector::StateCollector;
use self::state_collector::is_ready;
use crate::gateway::limits::eviction_queue::{Entry, EvictionQueue};
use crate::model::component::State;
use crate::registry::RegistrationStatus;
use crate::telemetry::metrics::Metrics;

// `daemon::capacity` reserves a file descriptor for each of these connections.
/// Connections whose first segment is awaited, and how long. Clients that send their request
/// immediately, as most do, can then not be evicted by those that send nothing.
const MAX_NEW: usize = 32;
const NEW_TIMEOUT: Duration = Duration::from_millis(50);

/// Connections whose request is incomplete.
const MAX_INCOMPLETE: usize = 32;

/// Concurrent responses with metrics.
const MAX_EXPOSITIONS: usize = 16;

/// Time limits of a request's head, and of a whole connection, which serves one request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest request head in bytes.
const HEAD_MAX: usize = 8 * 1024;

/// Pause after a failed accept.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(500);

const PLAIN_TEXT: &str = "text/plain";
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves health and metrics.
pub(crate) struct Admin {
    metrics: Metrics,
    collectors: Registry,
    registration: watch::Receiver<RegistrationStatus>,
    state: watch::Receiver<State>,
    /// The clients that are being sent metrics.
    expositions: EvictionQueue<IpAddr>,
}

/// A connection whose request is incomplete.
struct Incomplete {
    client: IpAddr,
    evicted: CancellationToken,
}

/// The queue entries of a connection.
struct Entries {
    /// Until the request's head is complete.
    incomplete: Option<Entry<Incomplete>>,
    /// From then on, if metrics are requested.
    exposition: Option<Entry<IpAddr>>,
}

impl Admin {
    pub(crate) fn new(metrics: &Metrics, state_collector: StateCollector) -> Self {
        let state = state_collector.state.clone();
        let registration = state_collector.registration.clone();
        let mut collectors = Registry::default();
        collectors.register_collector(Box::new(state_collector));
        collectors.register_collector(Box::new(ProcessCollector::new()));
        let expositions = EvictionQueue::default();
        Self { metrics: metrics.clone(), collectors, registration, state, expositions }
    }

    /// Serves `listener` forever.
    pub(crate) async fn serve(self: Arc<Self>, listener: Arc<TcpListener>) -> Infallible {
        let new_queue = EvictionQueue::default();
        let incomplete_queue = EvictionQueue::default();
        loop {
            match listener.accept().await {
                Ok((stream, client)) => {
                    let client = client.ip().to_canonical();
                    let new = enqueue(&new_queue, client, MAX_NEW);
                    let this = Arc::clone(&self);
                    let incomplete_queue = incomplete_queue.clone();
                    tokio::spawn(async move {
                        this.serve_connection(stream, client, new, &incomplete_queue).await;
                    });
                }
                Err(error) => {
                    debug!(%error, "admin: cannot accept a connection");
                    sleep(ACCEPT_RETRY_DELAY).await;
                }
            }
        }
    }

    /// Serves a connection to its end. It can be evicted until its request is complete: at first
    /// from the queue of new connections, which has `new`, then from `incomplete_queue`.
    async fn serve_connection(
        &self,
        stream: TcpStream,
        client: IpAddr,
        (new, new_evicted): (Entry<Incomplete>, CancellationToken),
        incomplete_queue: &EvictionQueue<Incomplete>,
    ) {
        let mut byte = [0];
        let first_segment = timeout(NEW_TIMEOUT, stream.peek(&mut byte));
        let _ = new_evicted.run_until_cancelled(first_segment).await;
        let (incomplete, evicted) = if has_complete_head(&stream) {
            (None, CancellationToken::new())
        } else {
            let (entry, evicted) = enqueue(incomplete_queue, client, MAX_INCOMPLETE);
            (Some(entry), evicted)
        };
        drop(new);
        tokio::select! {
            biased;
            () = self.serve_http(stream, client, incomplete) => {}
            () = evicted.cancelled() => debug!(%client, "admin: closed for a newer connection"),
        }
    }

    async fn serve_http(
        &self,
        stream: TcpStream,
        client: IpAddr,
        incomplete: Option<Entry<Incomplete>>,
    ) {
        let entries = Mutex::new(Entries { incomplete, exposition: None });
        let service = service_fn(|request| {
            let mut entries = entries.lock().unwrap_or_else(PoisonError::into_inner);
            entries.incomplete = None;
            std::future::ready(Ok::<_, Infallible>(self.respond(&request, client, &mut entries)))
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(HEAD_MAX)
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), service);
        match timeout(CONNECTION_TIMEOUT, connection).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(%client, %error, "admin: connection failed"),
            Err(_) => debug!(%client, "admin: connection timed out"),
        }
    }

    fn respond(
        &self,
        request: &Request<Incoming>,
        client: IpAddr,
        entries: &mut Entries,
    ) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = empty_response(StatusCode::METHOD_NOT_ALLOWED);
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match request.uri().path() {
            "/health/live" => response(StatusCode::OK, PLAIN_TEXT, "live\n"),
            "/health/ready" => match self.why_not_ready() {
                None => response(StatusCode::OK, PLAIN_TEXT, "ready\n"),
                Some(reason) => {
                    let text = format!("not ready: {reason}\n");
                    response(StatusCode::SERVICE_UNAVAILABLE, PLAIN_TEXT, text)
                }
            },
            "/health/status" => {
                let state = self.state.borrow().as_str().to_uppercase();
                response(StatusCode::OK, PLAIN_TEXT, state)
            }
            "/metrics" | "/" => {
                entries.exposition = acquire_exposition(&self.expositions, client);
                match (&entries.exposition, self.exposition()) {
                    (Some(_), Ok(text)) => response(StatusCode::OK, OPENMETRICS, text),
                    _ => {
                        let text = "too many requests for metrics, or too many from this client\n";
                        response(StatusCode::SERVICE_UNAVAILABLE, PLAIN_TEXT, text)
                    }
                }
            }
            _ => empty_response(StatusCode::NOT_FOUND),
        }
    }

    /// Returns why new streams cannot be served; `None` if they can.
    fn why_not_ready(&self) -> Option<String> {
        let state = *self.state.borrow();
        let registration = &*self.registration.borrow();
        match (state, registration) {
            _ if is_ready(state, registration) => None,
            (State::Stopped, _) => Some("stopping".to_owned()),
            (_, RegistrationStatus::Registered(_)) => Some("starting".to_owned()),
            _ => Some(format!("ZooKeeper: {registration}")),
        }
    }

    /// Encodes all metrics in the OpenMetrics format, which Prometheus reads since version 2.5.
    fn exposition(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode_registry(&mut text, self.metrics.registry())?;
        encode_registry(&mut text, &self.collectors)?;
        encode_eof(&mut text)?;
        Ok(text)
    }
}

/// Returns whether a complete request head has arrived on `stream`.
fn has_complete_head(stream: &TcpStream) -> bool {
    let mut head = [0; HEAD_MAX];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let Ok((_, count)) = recv(stream, &mut head, flags) else { return false };
    // hyper skips empty lines before a request and waits for the request itself.
    head[0].is_ascii_alphabetic() && head[..count].windows(4).any(|end| end == b"\r\n\r\n")
}

/// Adds a connection of `client` to a queue of at most `max` connections, of which one address gets
/// a quarter. The oldest connection, of `client` or of all, is evicted for it. Returns the
/// connection's entry, and the token that is cancelled when it is evicted itself.
fn enqueue(
    queue: &EvictionQueue<Incomplete>,
    client: IpAddr,
    max: usize,
) -> (Entry<Incomplete>, CancellationToken) {
    let is_of_client = |other: &Incomplete| other.client == client;
    let oldest = if queue.count(is_of_client) >= max / 4 {
        queue.evict(is_of_client)
    } else if queue.len() >= max {
        queue.evict(|_| true)
    } else {
        None
    };
    if let Some(Incomplete { evicted, .. }) = oldest {
        evicted.cancel();
    }
    let evicted = CancellationToken::new();
    (queue.insert(Incomplete { client, evicted: evicted.clone() }), evicted)
}

/// Allows a response with metrics, unless [`MAX_EXPOSITIONS`] or a quarter of them to `client` are
/// being sent.
fn acquire_exposition(
    expositions: &EvictionQueue<IpAddr>,
    client: IpAddr,
) -> Option<Entry<IpAddr>> {
    let of_client = expositions.count(|other| *other == client);
    let is_free = of_client < MAX_EXPOSITIONS / 4 && expositions.len() < MAX_EXPOSITIONS;
    is_free.then(|| expositions.insert(client))
}

fn response(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

fn empty_response(status: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::default();
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;

    use super::*;
    use crate::gateway::routing::Router;
    use crate::model::component::OwnComponent;
    use crate::registry::Registry as Components;
    use crate::registry::in_memory::InMemoryRegistry;
    use crate::telemetry::log::LostLines;
    use crate::telemetry::metrics::CertificateRole;

    #[test]
    fn address_with_a_quarter_of_a_queue_evicts_its_own_connections() {
        let queue = EvictionQueue::default();
        let mut connections = Vec::new();
        let mut connect = |client: &str, times: usize| {
            for _ in 0..times {
                connections.push((client.to_owned(), enqueue(&queue, client.parse().unwrap(), 16)));
            }
            let open = connections.iter().filter(|(_, (_, evicted))| !evicted.is_cancelled());
            open.map(|(client, _)| client.chars().last().unwrap()).collect::<String>()
        };
        assert_eq!(connect("192.0.2.1", 1), "1");
        assert_eq!(connect("192.0.2.2", 300), "12222");
        assert_eq!(connect("192.0.2.3", 4), "122223333");
        assert_eq!(connect("192.0.2.4", 4), "1222233334444");
        assert_eq!(connect("192.0.2.5", 4), "2222333344445555", "the oldest of all is evicted");
        assert_eq!(queue.len(), 16);
    }

    #[test]
    fn address_gets_a_quarter_of_the_expositions() {
        let expositions = EvictionQueue::default();
        let acquire_all = |client: [u8; 4]| -> Vec<_> {
            (0..MAX_EXPOSITIONS)
                .map_while(|_| acquire_exposition(&expositions, client.into()))
                .collect()
        };
        let held = [1, 2, 3, 4, 5].map(|last| acquire_all([192, 0, 2, last]));
        assert_eq!(held.each_ref().map(Vec::len), [4, 4, 4, 4, 0]);
        drop(held);
        assert_eq!(acquire_all([192, 0, 2, 5]).len(), 4);
    }

    /// Returns what a registered gateway of zone west with all certificates exports.
    async fn exposition() -> String {
        let metrics = Metrics::default();
        for role in [
            CertificateRole::Gateway,
            CertificateRole::ZooKeeper,
            CertificateRole::GatewayCa,
            CertificateRole::ZooKeeperCa,
        ] {
            metrics.certificate(role, Some(1));
        }
        let in_memory = Arc::new(InMemoryRegistry::default());
        let own = OwnComponent {
            hostname: "localhost".to_owned(),
            public_port: Some(79),
            zone: Some("west".to_owned()),
            use_ssl: false,
        };
        let registration = in_memory.register(own.clone());
        registration.set_running();
        in_memory.wait_for_gateways(1).await;
        let registry = Components::InMemory(in_memory);
        let router = Router::new(registry.clone(), own);
        let lost_lines = LostLines::default();
        let collector = StateCollector::new(&registration, registry, &router, lost_lines);
        Admin::new(&metrics, collector).exposition().unwrap()
    }

    /// The page has a section for each metric, with its type and each value of its labels, and no
    /// other section.
    #[tokio::test]
    async fn metrics_page_documents_every_metric_and_label_value() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
        let page = fs::read_to_string(page).unwrap();
        let sections = page.split("\n### `").skip(1);
        let mut documented: BTreeSet<&str> =
            sections.clone().filter_map(|section| section.split('`').next()).collect();
        let section =
            |name: &str| sections.clone().find(|section| section.split('`').next() == Some(name));
        let exposition = exposition().await;
        let mut current = None;
        for line in exposition.lines() {
            if let Some((name, kind)) =
                line.strip_prefix("# TYPE ").and_then(|line| line.split_once(' '))
            {
                let name =
                    if kind == "counter" { format!("{name}_total") } else { name.to_owned() };
                let text = section(&name).unwrap_or_else(|| panic!("{name} has no section"));
                let article = format!("\n\nA {kind}");
                assert!(text.contains(&article), "{name} is not described as {kind}");
                documented.remove(name.as_str());
                current = Some((name, text));
            } else if let (false, Some((name, text)), Some((labels, _))) = (
                line.starts_with('#'),
                &current,
                line.split_once('{').and_then(|(_, labels)| labels.split_once('}')),
            ) {
                for label in labels.split(',') {
                    let (label, value) = label.split_once('=').unwrap();
                    let value = value.trim_matches('"');
                    let is_open = ["le", "zone", "version"].contains(&label);
                    assert!(
                        is_open || text.contains(&format!("`{value}`")),
                        "{name}: {label}={value} is not documented"
                    );
                    assert!(
                        label == "le" || text.contains(&format!("`{label}`")),
                        "{name} {label}"
                    );
                }
            }
        }
        assert!(documented.is_empty(), "not exported: {documented:?}");
    }
}
