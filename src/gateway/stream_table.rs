//! The requests whose hops are known and the streams that run, for `status`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::model::build_id::BuildId;
use crate::model::hop::Hop;

/// All running streams, in the order in which they began. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct StreamTable(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    next: u64,
    streams: BTreeMap<u64, Arc<Stream>>,
}

/// One stream, from the moment when its hops are known.
pub(crate) struct Stream {
    pub(crate) peer: SocketAddr,
    pub(crate) build: BuildId,
    pub(crate) began: Instant,
    /// The hop that the log comes from; before, the one that was tried last.
    hop: Mutex<Hop>,
    bytes: AtomicU64,
}

impl Stream {
    /// The hop that the log comes from; before its first byte, the one that was tried last.
    pub(crate) fn hop(&self) -> Hop {
        self.lock_hop().clone()
    }

    /// The number of bytes written to the client.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn lock_hop(&self) -> MutexGuard<'_, Hop> {
        self.hop.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream's entry in the table; dropping it removes the stream.
pub(crate) struct StreamGuard {
    table: StreamTable,
    number: u64,
    stream: Arc<Stream>,
}

impl StreamTable {
    /// Adds a stream.
    pub(crate) fn insert(
        &self,
        peer: SocketAddr,
        build: &BuildId,
        hop: &Hop,
        began: Instant,
    ) -> StreamGuard {
        let (build, hop) = (build.clone(), Mutex::new(hop.clone()));
        let stream = Arc::new(Stream { peer, build, began, hop, bytes: AtomicU64::new(0) });
        let mut inner = self.lock();
        let number = inner.next;
        inner.next += 1;
        inner.streams.insert(number, Arc::clone(&stream));
        StreamGuard { table: self.clone(), number, stream }
    }

    /// The streams that run now.
    pub(crate) fn list(&self) -> Vec<Arc<Stream>> {
        self.lock().streams.values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it is locked, and the map would be consistent even then.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StreamGuard {
    pub(crate) fn hop(&self) -> Hop {
        self.stream.hop()
    }

    /// Replaces the hop of the stream.
    pub(crate) fn set_hop(&self, hop: &Hop) {
        self.stream.lock_hop().clone_from(hop);
    }

    /// The number of bytes written to the client.
    pub(crate) fn byte_counter(&self) -> &AtomicU64 {
        &self.stream.bytes
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.table.lock().streams.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::build_request::Executor;

    #[test]
    fn stream_is_listed_once_while_it_runs_with_its_last_hop() {
        let table = StreamTable::default();
        let peer = SocketAddr::from(([127, 0, 0, 1], 1));
        let build = BuildId::new("ab").expect("a build ID");
        let hop = |hostname: &str| {
            let hostname = hostname.to_owned();
            Hop::Executor(Executor { hostname, port: 7900, zone: None })
        };
        let insert = |hostname: &str| table.insert(peer, &build, &hop(hostname), Instant::now());
        let first = insert("first");
        let second = insert("second");
        second.byte_counter().store(5, Ordering::Relaxed);
        first.set_hop(&hop("other"));
        let listed = || -> Vec<_> {
            table.list().iter().map(|stream| (stream.hop(), stream.bytes())).collect()
        };
        assert_eq!(listed(), [(hop("other"), 0), (hop("second"), 5)]);
        drop(first);
        assert_eq!(listed(), [(hop("second"), 5)]);
        drop(second);
        assert_eq!(listed(), []);
    }
}
