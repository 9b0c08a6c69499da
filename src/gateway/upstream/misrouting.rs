//! Mistakes in the wiring of zones: what answers at a gateway's address is none.
//!
//! Finger has no greeting, so only the first bytes can tell. A log of Zuul's begins with a time, and
//! a gateway's own words are known; what begins as other protocols do is not shown to anybody as a
//! log. A gateway of the registry that is found to be something else is named once, and counted.

use std::fmt;

use tracing::warn;

use crate::gateway::Context;
use crate::gateway::protocol::request::{Fault, Reply};
use crate::model::build_id::BuildId;
use crate::model::component::Gateway;

/// How every gateway begins to say that it cannot serve a log, upstream's among them.
const REFUSAL: &[u8] = b"Internal streaming error";

/// A hop that was mute so often in a row is taken to be no gateway. Each time was behind a longer
/// while, so one that is busy for a moment is not.
pub(crate) const MUTE: u32 = 3;

/// Something that speaks another protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Foreign {
    Http,
    Ssh,
    Greeting,
    Tls,
    Echo,
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http => "an HTTP server",
            Self::Ssh => "an SSH server",
            Self::Greeting => "a mail or FTP server",
            Self::Tls => "a TLS server, and the registry says plain",
            Self::Echo => "it sends back what it is sent",
        })
    }
}

/// What begins with `first`, asked for `build`, if that is certainly no log.
pub(crate) fn foreign(first: &[u8], build: &BuildId) -> Option<Foreign> {
    let echo = |rest: &[u8]| rest.is_empty() || rest.starts_with(b"\n") || rest.starts_with(b"\r");
    match first {
        [b'H', b'T', b'T', b'P', b'/', b'0'..=b'9', ..] => Some(Foreign::Http),
        [b'S', b'S', b'H', b'-', b'1' | b'2', b'.', ..] => Some(Foreign::Ssh),
        // A greeting (RFC 5321, RFC 959); a year has four digits.
        [b'2', b'2', b'0', b' ' | b'-', ..] => Some(Foreign::Greeting),
        // An alert's record (RFC 8446, section 5.1).
        [21, 3, 0..=4, ..] => Some(Foreign::Tls),
        _ => {
            let rest = first.strip_prefix(build.as_str().as_bytes())?;
            echo(rest).then_some(Foreign::Echo)
        }
    }
}

/// Whether `first` begins the line of a gateway that cannot serve the log where another one may. What
/// it says of the executor no other can mend.
pub(crate) fn is_refusal(first: &[u8]) -> bool {
    let executor = [Fault::ExecutorUnreachable, Fault::ExecutorSilent];
    first.starts_with(REFUSAL)
        && !executor.iter().any(|fault| first == Reply::Error(*fault).to_string().as_bytes())
}

/// Whether `first` is what a gateway of our own kind answers that serves another zone than the one
/// wanted.
pub(crate) fn is_of_other_zone(first: &[u8]) -> bool {
    first == Reply::Error(Fault::OtherZone).to_string().as_bytes()
}

/// Counts that `gateway` is none, and says so once.
pub(crate) fn found_foreign(gateway: &Gateway, foreign: Foreign, cx: &Context) {
    cx.metrics.miswired("foreign");
    if cx.resolver.memory().is_news(gateway, "foreign") {
        let (zone, gateway) = ends(gateway);
        warn!(
            zone, gateway, found = %foreign,
            "what answers at this gateway's address is no gateway: compare its hostname and \
             public_port with the port forwards"
        );
    }
}

/// Counts that a request for `build` comes back from `gateway`, and says so once.
pub(crate) fn found_circle(gateway: &Gateway, build: &BuildId, cx: &Context) {
    cx.metrics.miswired("circle");
    if cx.resolver.memory().is_news(gateway, "circle") {
        let (zone, gateway) = ends(gateway);
        warn!(
            zone, gateway, found = %cx.resolver.own(), %build,
            "requests to this gateway seem to lead back to us: compare its hostname and public_port \
             with the port forwards"
        );
    }
}

/// Counts that `gateway` is one of another zone, known by the names in its certificate, and says so
/// once.
pub(crate) fn found_elsewhere(gateway: &Gateway, names: &str, cx: &Context) {
    cx.metrics.miswired("zone");
    if cx.resolver.memory().is_news(gateway, "zone") {
        let (zone, gateway) = ends(gateway);
        warn!(
            zone,
            gateway,
            found = names,
            "what answers at this gateway's address is a gateway of another zone: compare its \
             hostname and public_port with the port forwards"
        );
    }
}

/// Counts that `gateway` takes requests and never says anything, so often in a row, and says so once.
pub(crate) fn found_mute(gateway: &Gateway, times: u32, cx: &Context) {
    cx.metrics.miswired("silent");
    if cx.resolver.memory().is_news(gateway, "silent") {
        let (zone, gateway) = ends(gateway);
        warn!(
            zone,
            gateway,
            times,
            "what answers at this gateway's address takes requests and says nothing: does the gateway \
             run, and do its hostname and public_port match the port forwards?"
        );
    }
}

/// Zone, and host and port, as the registry has them.
fn ends(gateway: &Gateway) -> (String, String) {
    let Gateway { hostname, port, zone, .. } = gateway;
    let zone = zone.as_deref().unwrap_or_default().escape_default().to_string();
    (zone, format!("{}:{port}", hostname.escape_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_and_logs() {
        let build = BuildId::new("2200").expect("a build id");
        for (first, expected) in [
            (&b"HTTP/1.1 400 Bad Request\r\n"[..], Some(Foreign::Http)),
            (b"SSH-2.0-OpenSSH_9.2\r\n", Some(Foreign::Ssh)),
            (b"220 mx.example.org ESMTP\r\n", Some(Foreign::Greeting)),
            (b"220-Welcome\r\n", Some(Foreign::Greeting)),
            (&[21, 3, 3, 0, 2, 2, 10], Some(Foreign::Tls)),
            (b"2200\n", Some(Foreign::Echo)),
            (b"2200", Some(Foreign::Echo)),
            (b"2200-01-01 00:00:00.000000 | Job console starting\n", None),
            (b"2025-01-01 00:00:00.000000 | HTTP/1.1\n", None),
            (b"Build ID 2200 not found", None),
            (b"HTTP", None),
            (b"220", None),
            (b"2", None),
        ] {
            assert_eq!(foreign(first, &build), expected, "{}", first.escape_ascii());
        }
    }
}
