//! What is known of the client of a session.

use std::net::SocketAddr;

use crate::gateway::limits::eviction_queue::Entry;
use crate::gateway::limits::{AddressPermit, CountedClient, PendingConnection};

/// The client of a session.
pub(crate) struct ClientInfo {
    /// The client's address; that of a trusted proxy until its PROXY header has been read.
    pub(crate) address: SocketAddr,
    /// The permit of the client's address; dropped after the client has presented a certificate.
    pub(crate) address_permit: Option<AddressPermit>,
    /// The connection comes from a trusted proxy, which sends a PROXY header.
    pub(crate) is_proxy: bool,
    /// The index of the listener.
    pub(crate) listener: u16,
    /// Whether its stream is logged at info level. It is logged at debug level if its address has
    /// requested too many streams.
    pub(crate) log_at_info: bool,
    /// The entry among the connections that may be closed for a newer one, until the request has
    /// been read.
    pub(crate) pending: Option<Entry<PendingConnection>>,
}

impl ClientInfo {
    /// Removes the connection from those that may be closed for a newer one. Never returns if it
    /// has been chosen already, because its task is then about to be aborted.
    pub(crate) async fn leave_pending(&mut self) {
        if self.pending.take().is_some_and(|entry| !entry.leave()) {
            std::future::pending::<()>().await;
        }
    }

    /// Returns the client if limits count it by its address.
    pub(super) fn counted(&self) -> Option<CountedClient> {
        self.address_permit.as_ref().and_then(AddressPermit::client)
    }
}
