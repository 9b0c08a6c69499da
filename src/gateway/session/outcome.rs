//! The outcome of a connection, which decides what is counted, logged and sent to the client.

use std::fmt;

use crate::gateway::protocol::reply::{ErrorReason, Reply};
use crate::gateway::relay::EndReason;
use crate::gateway::upstream::FailoverError;

/// How one accepted connection ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The relay ended, or the client or this gateway ended the wait for the first byte.
    Ended(EndReason),
    /// No hop sent the log. The client gets the reply of a gateway, or our own.
    NotConnected(Box<FailoverError>),
    /// The client gets this reply. No hop was tried.
    Refused(Reply),
    /// Rejected at the limit of an address or of TLS handshakes, or closed for a newer connection.
    /// The reply, if any, has been sent.
    Rejected,
    /// A trusted proxy sent no valid PROXY header.
    NoProxyHeader,
    /// The TLS handshake failed or took too long.
    NoHandshake,
    /// The peer left before it sent a request, as health checks and port scans do.
    Probe,
}

impl Outcome {
    /// The value of the metric label `result`.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Ended(EndReason::Finished) => "ok",
            Self::Ended(EndReason::UpstreamFailed(_)) => "upstream_failed",
            Self::Ended(EndReason::ClientLeft(_)) => "client_closed",
            Self::Ended(EndReason::ClientStalled) => "client_stalled",
            Self::Ended(EndReason::ClientEvicted) => "client_evicted",
            Self::Ended(EndReason::Stopped) => "stopped",
            Self::Ended(EndReason::Idle) => "stream_idle",
            Self::Ended(EndReason::TooLong) => "stream_total",
            Self::NotConnected(error) => reply_label(error.reply),
            Self::Refused(reply) => reply_label(*reply),
            Self::Rejected => "rejected",
            Self::NoProxyHeader => "proxy_header",
            Self::NoHandshake => "tls",
            Self::Probe => "probe",
        }
    }

    /// Returns the error status for the span of a stream. It is no error that a client leaves or
    /// stops reading.
    pub(crate) fn error(&self) -> Option<String> {
        match self {
            Self::Ended(
                EndReason::Finished | EndReason::ClientLeft(_) | EndReason::ClientStalled,
            ) => None,
            Self::NotConnected(error) => Some(error.reply.line().trim_ascii_end().to_owned()),
            _ => Some(self.to_string()),
        }
    }
}

/// Formats the value of `end` in the log line of a stream.
impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended(end) => write!(f, "{end}"),
            Self::NotConnected(error) => write!(f, "{error}"),
            _ => f.write_str(self.label()),
        }
    }
}

fn reply_label(reply: Reply) -> &'static str {
    match reply {
        Reply::NotFound => "not_found",
        Reply::NotStarted => "not_started",
        Reply::Denied => "denied",
        Reply::Error(error) => match error {
            ErrorReason::RequestTooLong => "bad_request",
            ErrorReason::NoRequest => "timeout",
            ErrorReason::TooManyConnections
            | ErrorReason::TooManyFromAddress
            | ErrorReason::TooManyLookups
            | ErrorReason::TooManyForBuild => "rejected",
            ErrorReason::RegistryUnavailable => "zookeeper",
            ErrorReason::MalformedEntry => "malformed",
            ErrorReason::ExecutorUnreachable => "upstream_unreachable",
            ErrorReason::ZoneUnreachable => "zone_unreachable",
            ErrorReason::ExecutorSilent => "upstream_silent",
            ErrorReason::WrongZone => "wrong_zone",
            ErrorReason::Loop => "loop",
        },
    }
}
