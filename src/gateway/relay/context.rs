//! What a relay needs from outside: settings, shared state and counters.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tokio_util::sync::CancellationToken;

use super::client_waits::ClientWaits;
use crate::config::Limits;
use crate::gateway::limits::CountedClient;
use crate::telemetry::metrics::Metrics;

/// What a relay needs of the gateway and of its stream.
pub(crate) struct RelayContext<'a> {
    pub(crate) limits: &'a Limits,
    pub(crate) client_waits: &'a ClientWaits,
    pub(crate) metrics: &'a Metrics,
    /// Cancelled when the gateway aborts all streams.
    pub(crate) abort: &'a CancellationToken,
    /// The client, if limits count it by its address.
    pub(crate) client: Option<CountedClient>,
    /// When the stream began; `limits.stream_total` counts from here.
    pub(crate) began: Instant,
    /// The number of bytes written to the client.
    pub(crate) bytes: &'a AtomicU64,
}

impl RelayContext<'_> {
    /// Returns the number of bytes written to the client.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}
