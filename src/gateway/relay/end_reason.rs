//! The reasons for which a stream ends.

use std::fmt;
use std::io;

use crate::tls;

/// Why a relay ended.
#[derive(Debug)]
pub(crate) enum EndReason {
    /// The upstream closed cleanly after sending data.
    Finished,
    /// The connection to the upstream failed.
    UpstreamFailed(io::Error),
    /// The client closed TLS without a close_notify, reset the connection, or vanished.
    ClientLeft(Option<io::Error>),
    /// The client took nothing within the write deadline.
    ClientStalled,
    /// Too many clients took nothing, this one for longest.
    ClientEvicted,
    /// The gateway stops and its grace period is over.
    Stopped,
    /// No byte was relayed for `limits.stream_idle`.
    Idle,
    /// The stream ran for `limits.stream_total`.
    TooLong,
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Finished => f.write_str("finished"),
            Self::UpstreamFailed(error) => {
                write!(f, "connection to the hop failed: {}", tls::describe(error))
            }
            Self::ClientLeft(None) => f.write_str("client left"),
            Self::ClientLeft(Some(error)) => write!(f, "client left: {}", tls::describe(error)),
            Self::ClientStalled => f.write_str("client stopped reading"),
            Self::ClientEvicted => f.write_str("client evicted: too many clients stopped reading"),
            Self::Stopped => f.write_str("gateway stopped"),
            Self::Idle => f.write_str("idle for limits.stream_idle"),
            Self::TooLong => f.write_str("open for limits.stream_total"),
        }
    }
}
