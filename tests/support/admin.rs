//! HTTP client for the admin listener: health checks and metrics.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::gateway::{Builder, Gateway};
use super::system::System;
use super::within;

/// Response to one request: status line, header lines, body.
pub(crate) struct Answer {
    pub(crate) status: String,
    pub(crate) headers: String,
    pub(crate) body: String,
}

/// Sends `request` unchanged and returns the response.
pub(crate) async fn ask(address: SocketAddr, request: &str) -> Answer {
    let answer = within("an HTTP answer", async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        std::io::Result::Ok(answer)
    });
    let answer = answer.await.expect("an HTTP answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let (status, headers) = head.split_once("\r\n").unwrap_or((head, ""));
    Answer { status: status.to_owned(), headers: headers.to_lowercase(), body: body.to_owned() }
}

pub(crate) async fn get(address: SocketAddr, path: &str) -> Answer {
    ask(address, &format!("GET {path} HTTP/1.1\r\nHost: gateway\r\n\r\n")).await
}

/// Builder of a gateway with the admin listener, whose address is the last that the gateway
/// reports.
pub(crate) fn with_admin(system: &System) -> Builder {
    let mut builder = Builder::new(system).zone("west");
    builder.admin = true;
    builder
}

pub(crate) fn admin(gateway: &Gateway) -> SocketAddr {
    gateway.addresses[gateway.addresses.len() - 1]
}

/// Returns the body of `/metrics`.
pub(crate) async fn exposition(gateway: &Gateway) -> String {
    get(admin(gateway), "/metrics").await.body
}

/// Returns the value of one series.
pub(crate) async fn metric(gateway: &Gateway, series: &str) -> f64 {
    let body = exposition(gateway).await;
    value(&body, series).unwrap_or_else(|| panic!("no {series} in\n{body}"))
}

fn value(exposition: &str, series: &str) -> Option<f64> {
    let value = exposition.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    value.map(|value| value.parse().expect("a number"))
}

/// Returns how many connections the limit `reason` has rejected.
pub(crate) async fn rejected(gateway: &Gateway, reason: &str) -> f64 {
    let series = format!("zuul_fingergw_connections_rejected_total{{reason=\"{reason}\"}}");
    metric(gateway, &series).await
}

/// Waits until exactly `count` requests have ended as `result`.
pub(crate) async fn ended(gateway: &Gateway, result: &str, count: usize) {
    let series = format!("zuul_fingergw_requests_total{{result=\"{result}\"}}");
    until_metric(gateway, &series, count as f64).await;
}

/// Waits until a series exists and has this value. The gateway counts a connection shortly after
/// the client has seen its end, and sends no notification of that, so this polls.
pub(crate) async fn until_metric(gateway: &Gateway, series: &str, value: f64) {
    within(&format!("{series} {value}"), async {
        while self::value(&exposition(gateway).await, series).is_none_or(|now| now < value) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(metric(gateway, series).await, value, "{series}");
}

/// Returns the status line of `/health/ready`.
pub(crate) async fn readiness(gateway: &Gateway) -> String {
    get(admin(gateway), "/health/ready").await.status
}
