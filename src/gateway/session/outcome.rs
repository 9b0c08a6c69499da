//! How a connection ended, as it is counted.

use crate::gateway::protocol::reply::{Reply, ReplyError};
use crate::gateway::relay::End;

/// The end of one accepted connection.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// A log was relayed, at least its first byte.
    Streamed(End),
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
    /// The value of the metric label `result`.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Streamed(End::Finished) => "ok",
            Self::Streamed(End::UpstreamFailed(_)) => "upstream_cut",
            Self::Streamed(End::ClientLeft(_)) => "client_left",
            Self::Streamed(End::ClientStalled) => "client_stalled",
            Self::Streamed(End::ClientEvicted) => "client_evicted",
            Self::Streamed(End::Stopped) => "stopped",
            Self::Streamed(End::Idle) => "stream_idle",
            Self::Streamed(End::Overlong) => "stream_total",
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
            Self::Streamed(End::UpstreamSilent) => "upstream_silent",
            Self::Rejected => "rejected",
            Self::NoHeader => "proxy_header",
            Self::NoHandshake => "tls",
            Self::Probe => "probe",
        }
    }
}
