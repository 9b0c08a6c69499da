//! How a connection ended, as it is counted.

use crate::gateway::protocol::reply::{Reply, ReplyError};
use crate::gateway::relay::EndReason;

/// The end of one accepted connection.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// A log was relayed, at least its first byte.
    Streamed(EndReason),
    /// One line of ours stood for it.
    Refused(Reply),
    /// Closed without a line at a limit of TLS handshakes, or for a newer connection.
    Rejected,
    /// A balancer whose word counts did not say for whom it came.
    NoHeader,
    /// The TLS handshake failed, or took too long.
    NoHandshake,
    /// The peer left before it had asked: health checkers, port scans.
    Probe,
}

impl Outcome {
    /// Returns why the stream failed; `None` for a complete log and for a client that left or stalled.
    pub(crate) fn error(&self) -> Option<String> {
        match self {
            Self::Streamed(
                EndReason::Finished | EndReason::ClientLeft(_) | EndReason::ClientStalled,
            ) => None,
            Self::Streamed(end) => Some(end.to_string()),
            Self::Refused(reply) => Some(reply.line().trim_end().to_owned()),
            _ => Some(self.label().to_owned()),
        }
    }

    /// The value of the metric label `result`.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Streamed(EndReason::Finished) => "ok",
            Self::Streamed(EndReason::UpstreamFailed(_)) => "upstream_cut",
            Self::Streamed(EndReason::ClientLeft(_)) => "client_left",
            Self::Streamed(EndReason::ClientStalled) => "client_stalled",
            Self::Streamed(EndReason::ClientEvicted) => "client_evicted",
            Self::Streamed(EndReason::Stopped) => "stopped",
            Self::Streamed(EndReason::Idle) => "stream_idle",
            Self::Streamed(EndReason::TooLong) => "stream_total",
            Self::Refused(Reply::NotFound) => "not_found",
            Self::Refused(Reply::NotStarted) => "not_started",
            Self::Refused(Reply::Denied) => "denied",
            Self::Refused(Reply::Error(fault)) => match fault {
                ReplyError::RequestTooLong => "bad_request",
                ReplyError::NoRequest => "timeout",
                ReplyError::TooManyConnections
                | ReplyError::TooManyFromAddress
                | ReplyError::TooManyLookups
                | ReplyError::TooManyForBuild => "rejected",
                ReplyError::RegistryUnavailable => "zookeeper",
                ReplyError::MalformedEntry => "unreadable",
                ReplyError::ExecutorUnreachable => "upstream_unreachable",
                ReplyError::ZoneUnreachable => "zone_unreachable",
                ReplyError::ExecutorSilent => "upstream_silent",
                ReplyError::WrongZone => "wrong_zone",
                ReplyError::Loop => "loop",
            },
            Self::Rejected => "rejected",
            Self::NoHeader => "proxy_header",
            Self::NoHandshake => "tls",
            Self::Probe => "probe",
        }
    }
}
