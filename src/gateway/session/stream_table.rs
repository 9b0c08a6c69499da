//! The streams that run now, for whoever asks.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::gateway::upstream::Upstream;
use crate::model::build_id::BuildId;

/// All running streams, in the order in which they began.
#[derive(Clone, Default)]
pub(crate) struct Streams(Arc<Mutex<Running>>);

#[derive(Default)]
struct Running {
    begun: u64,
    streams: BTreeMap<u64, Arc<Stream>>,
}

/// One stream, from the moment its next hop is dialed.
pub(crate) struct Stream {
    pub(crate) peer: SocketAddr,
    pub(crate) build: BuildId,
    pub(crate) hop: Upstream,
    pub(crate) began: Instant,
    bytes: AtomicU64,
}

impl Stream {
    /// Handed to the client's connection so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// A stream's place in the list; dropping it takes the stream out.
pub(crate) struct Listed {
    streams: Streams,
    number: u64,
    stream: Arc<Stream>,
}

impl Streams {
    /// Puts a stream into the list.
    pub(crate) fn begin(
        &self,
        peer: SocketAddr,
        build: &BuildId,
        hop: Upstream,
        began: Instant,
    ) -> Listed {
        let (build, bytes) = (build.clone(), AtomicU64::new(0));
        let stream = Arc::new(Stream { peer, build, hop, began, bytes });
        let mut running = self.lock();
        let number = running.begun;
        running.begun += 1;
        running.streams.insert(number, Arc::clone(&stream));
        Listed { streams: self.clone(), number, stream }
    }

    /// Those that run now.
    pub(crate) fn list(&self) -> Vec<Arc<Stream>> {
        self.lock().streams.values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Running> {
        // Nothing panics while it is locked, and the list would be whole even then.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Listed {
    /// How long ago its request came.
    pub(crate) fn age(&self) -> Duration {
        self.stream.began.elapsed()
    }

    /// The number of bytes written to the client.
    pub(crate) fn byte_counter(&self) -> &AtomicU64 {
        &self.stream.bytes
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.streams.lock().streams.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::build_request::Executor;

    #[test]
    fn a_stream_is_listed_as_long_as_it_runs() {
        let streams = Streams::default();
        let peer = SocketAddr::from(([127, 0, 0, 1], 1));
        let build = BuildId::new("ab").expect("a build id");
        let hop = |hostname: &str| {
            let hostname = hostname.to_owned();
            Upstream::Executor(Executor { hostname, port: 7900, zone: None })
        };
        let begin = |hostname: &str| streams.begin(peer, &build, hop(hostname), Instant::now());
        let (first, second) = (begin("first"), begin("second"));
        second.byte_counter().store(5, Ordering::Relaxed);
        let listed = || -> Vec<_> {
            streams.list().iter().map(|stream| (stream.hop.clone(), stream.bytes())).collect()
        };
        assert_eq!(listed(), [(hop("first"), 0), (hop("second"), 5)]);
        drop(first);
        assert_eq!(listed(), [(hop("second"), 5)]);
        drop(second);
        assert_eq!(listed(), []);
    }
}
