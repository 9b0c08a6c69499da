//! Copies a log from the next hop to the client.
//!
//! Bytes go one way only. The client's end of input is never passed on: an executor takes it for
//! the client's leaving and cuts the stream (`zuul/lib/log_streamer.py`). A build may be silent
//! for hours, so the one wait without a deadline is the one for the next byte of a log that has
//! begun; keepalive probes find peers that vanished meanwhile.

use std::fmt;
use std::io;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::Context;
use super::connection::Connection;
use super::streams::Listed;

/// Read from the next hop at once, in bytes.
const BUFFER: usize = 16 * 1024;

/// How a relay went.
pub(crate) struct Relayed {
    /// Handed to the client's connection.
    pub(crate) bytes: u64,
    pub(crate) end: End,
}

/// Why a relay ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The next hop closed behind a log: it is whole, as far as anybody can tell.
    Finished,
    /// The next hop's connection failed.
    UpstreamFailed(io::Error),
    /// Not one byte came within the deadline, or before the next hop closed. A log has at least its
    /// first line before anybody can ask for it.
    UpstreamSilent,
    /// The client closed (TLS), reset, or vanished.
    ClientLeft(Option<io::Error>),
    /// The client did not take one buffer within the write deadline.
    ClientStalled,
    /// This gateway stops and the grace period is over.
    Stopped,
}

impl End {
    /// Whether the next hop is at fault.
    pub(crate) fn is_upstreams_fault(&self) -> bool {
        matches!(self, Self::UpstreamFailed(_) | Self::UpstreamSilent)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Finished => f.write_str("finished"),
            Self::UpstreamFailed(error) => write!(f, "cut by the next hop: {error}"),
            Self::UpstreamSilent => f.write_str("the next hop said nothing"),
            Self::ClientLeft(None) => f.write_str("client left"),
            Self::ClientLeft(Some(error)) => write!(f, "client left: {error}"),
            Self::ClientStalled => f.write_str("client stopped reading"),
            Self::Stopped => f.write_str("stopped"),
        }
    }
}

/// Copies until one side ends or the gateway cuts its streams. Closes neither. Calls `first_byte`
/// when there is one; counts in the list what it has handed on.
pub(crate) async fn run(
    upstream: &mut Connection,
    client: &mut Connection,
    cx: &Context,
    first_byte: impl FnOnce(),
    listed: &Listed,
) -> Relayed {
    let Context { limits, cut, metrics, .. } = cx;
    let mut buffer = vec![0; BUFFER];
    let (mut bytes, mut discarded) = (0, 0);
    let mut first_byte = Some(first_byte);
    let end = loop {
        let patience = (bytes == 0).then_some(limits.first_byte_timeout);
        let read = tokio::select! {
            biased;
            () = cut.cancelled() => break End::Stopped,
            read = within(patience, upstream.read_log(&mut buffer)) => read,
            reason = client.departed(&mut discarded) => break End::ClientLeft(reason),
        };
        let count = match read {
            None => break End::UpstreamSilent,
            Some(Err(error)) => break End::UpstreamFailed(error),
            Some(Ok(0)) if bytes == 0 => break End::UpstreamSilent,
            Some(Ok(0)) => break End::Finished,
            Some(Ok(count)) => count,
        };
        if let Some(first_byte) = first_byte.take() {
            first_byte();
        }
        let write = timeout(limits.write_timeout, write(client, &buffer[..count]));
        tokio::select! {
            biased;
            written = write => match written {
                Err(_) => break End::ClientStalled,
                Ok(Err(error)) => break End::ClientLeft(Some(error)),
                Ok(Ok(())) => {
                    bytes += count as u64;
                    metrics.sent(count as u64);
                    listed.add(count as u64);
                }
            },
            () = cut.cancelled() => break End::Stopped,
        }
    };
    Relayed { bytes, end }
}

/// Writes and flushes: TLS would keep the bytes otherwise.
async fn write(client: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    client.write_all(bytes).await?;
    client.flush().await
}

/// `future`, or `None` when `patience`, if there is any, is over.
async fn within<T>(
    patience: Option<std::time::Duration>,
    future: impl Future<Output = T>,
) -> Option<T> {
    match patience {
        Some(patience) => timeout(patience, future).await.ok(),
        None => Some(future.await),
    }
}
