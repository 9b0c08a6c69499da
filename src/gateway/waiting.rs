//! Streams that wait for their client to take something: a bounded number, in total and for one
//! client address.
//!
//! Such a stream holds what the kernel has taken from the next hop and not delivered, and a piece
//! of the log: far more than a quiet one. The limits on connections alone would allow clients that
//! stop reading the whole memory that the host has for TCP. Beyond the bound the stream that has
//! waited longest is cut. Any bytes taken end a wait, so that is one that stopped reading, or the
//! slowest of very many.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::Notify;

use crate::config::Limits;

/// One in so many may have waited for [`STALL`].
const STALLED: usize = 16;

/// A client that takes nothing for so long is no longer one that is merely slower than its log: the
/// kernel lets a stream go on when a third of its send buffer is free, after a second at 170 kB/s.
pub(crate) const STALL: Duration = Duration::from_secs(1);

/// So many may wait where the share is smaller.
const FLOOR: usize = 8;

/// The streams that wait for their clients.
#[derive(Clone)]
pub(crate) struct Waiting {
    share: usize,
    waits: Arc<Mutex<Waits>>,
}

#[derive(Default)]
struct Waits {
    begun: u64,
    /// By number, so in the order in which they began.
    all: BTreeMap<u64, Wait>,
    /// The numbers of those that count for a client network.
    by_network: HashMap<IpNet, BTreeSet<u64>>,
}

struct Wait {
    network: Option<IpNet>,
    evicted: Arc<Notify>,
}

/// A stream's place among those that wait; free again when dropped.
pub(crate) struct WaitGuard {
    waiting: Waiting,
    number: u64,
    evicted: Arc<Notify>,
}

impl Waiting {
    /// Those that wait at all.
    pub(crate) fn all() -> Self {
        Self { share: Limits::WAITING, waits: Arc::default() }
    }

    /// Those that have waited for [`STALL`].
    pub(crate) fn stalled() -> Self {
        Self { share: STALLED, waits: Arc::default() }
    }

    /// Notes that a stream waits for a client, which counts for `network` where there is one. Evicts
    /// the stream that has waited longest, of that network or of all, where that is one too many.
    pub(crate) fn begin(&self, network: Option<IpNet>, limits: &Limits) -> WaitGuard {
        let evicted = Arc::new(Notify::new());
        let mut waits = self.lock();
        let number = waits.begun;
        waits.begun += 1;
        waits.all.insert(number, Wait { network, evicted: Arc::clone(&evicted) });
        if let Some(network) = network {
            let here = waits.by_network.entry(network).or_default();
            here.insert(number);
            if here.len() > self.bound(limits.connections_per_address)
                && let Some(oldest) = here.first().copied()
            {
                waits.evict(oldest);
            }
        }
        if waits.all.len() > self.bound(limits.connections)
            && let Some(oldest) = waits.all.keys().next().copied()
        {
            waits.evict(oldest);
        }
        drop(waits);
        WaitGuard { waiting: self.clone(), number, evicted }
    }

    /// How many of `connections` may wait.
    fn bound(&self, connections: usize) -> usize {
        (connections / self.share).max(FLOOR)
    }

    fn lock(&self) -> MutexGuard<'_, Waits> {
        // Nothing panics while it is locked.
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waits {
    fn evict(&mut self, number: u64) {
        if let Some(wait) = self.remove(number) {
            wait.evicted.notify_one();
        }
    }

    fn remove(&mut self, number: u64) -> Option<Wait> {
        let wait = self.all.remove(&number)?;
        if let Some(network) = wait.network
            && let Some(here) = self.by_network.get_mut(&network)
        {
            here.remove(&number);
            if here.is_empty() {
                self.by_network.remove(&network);
            }
        }
        Some(wait)
    }
}

impl WaitGuard {
    /// Waits until the stream has to make way for others.
    pub(crate) async fn evicted(&self) {
        self.evicted.notified().await;
    }
}

impl Drop for WaitGuard {
    fn drop(&mut self) {
        self.waiting.lock().remove(self.number);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn limits(connections: usize, per_address: usize) -> Limits {
        Limits { connections, connections_per_address: per_address, ..Limits::default() }
    }

    fn network(text: &str) -> Option<IpNet> {
        Some(text.parse().expect("a network"))
    }

    fn evicted(waits: &[WaitGuard]) -> Vec<usize> {
        let over = |wait: &WaitGuard| wait.evicted().now_or_never().is_some();
        waits.iter().enumerate().filter(|(_, wait)| over(wait)).map(|(index, _)| index).collect()
    }

    #[test]
    fn the_longest_wait_of_an_address_ends_beyond_its_bound() {
        let (waiting, limits) = (Waiting::stalled(), limits(100_000, 10 * STALLED));
        let other = waiting.begin(network("192.0.2.2/32"), &limits);
        let begin = |_| waiting.begin(network("192.0.2.1/32"), &limits);
        let mut waits: Vec<_> = (0..10).map(begin).collect();
        assert_eq!(evicted(&waits), [0; 0]);
        // One that takes something waits anew.
        drop(waits.remove(0));
        waits.extend((0..3).map(begin));
        assert_eq!(evicted(&waits), [0, 1]);
        assert_eq!(evicted(&[other]), [0; 0]);
    }

    #[test]
    fn the_longest_wait_of_all_ends_beyond_their_bound() {
        let (waiting, limits) = (Waiting::stalled(), limits(10 * STALLED, 10 * STALLED));
        let networks = ["192.0.2.1/32", "192.0.2.2/32"].map(network);
        let networks = networks.into_iter().chain([None]).cycle();
        let waits: Vec<_> =
            networks.take(12).map(|network| waiting.begin(network, &limits)).collect();
        assert_eq!(evicted(&waits), [0, 1]);
    }

    #[test]
    fn few_connections_leave_room_for_some() {
        let (waiting, limits) = (Waiting::stalled(), limits(1, 1));
        let waits: Vec<_> =
            (0..FLOOR).map(|_| waiting.begin(network("192.0.2.1/32"), &limits)).collect();
        assert_eq!(evicted(&waits), [0; 0]);
    }

    #[test]
    fn nothing_is_left_of_waits_that_are_over() {
        let (waiting, limits) = (Waiting::stalled(), limits(1, 1));
        let waits: Vec<_> =
            (0..3 * FLOOR).map(|_| waiting.begin(network("192.0.2.1/32"), &limits)).collect();
        drop(waits);
        let waits = waiting.lock();
        assert!(waits.all.is_empty() && waits.by_network.is_empty());
    }
}
