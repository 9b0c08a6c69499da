//! Streams whose clients do not take what was written: bounded in number, in total and per client
//! address.
//!
//! Such a stream holds what the kernel has received from the hop and not delivered, and a chunk of
//! the log: much more than an idle one. The limits on connections alone would let clients that stop
//! reading take all memory that the host has for TCP. Beyond the bound the stream that has waited
//! longest is evicted. A wait ends as soon as the client takes some bytes, so that is one whose
//! client has stopped reading, or the slowest of very many.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::Notify;
use tokio::time::sleep;

use super::end_reason::EndReason;
use crate::config::Limits;
use crate::gateway::limits::CountedClient;

/// One address may have `limits.connections_per_address` divided by this many waits. That is twice
/// the share of the total, because clients that share an address and request one log at the same
/// moment each wait for a round trip.
const ADDRESS_DIVISOR: usize = 4;

/// Of the waits that have lasted for [`STALL`], both limits divided by this are permitted.
const STALL_DIVISOR: usize = 16;

/// A wait that lasts this long is a stall: the client has stopped reading and is not merely slower
/// than its log: the kernel lets a stream continue when a third of its send buffer is free.
const STALL: Duration = Duration::from_secs(1);

/// The number of waits that are always permitted.
const MIN_WAITS: usize = 8;

/// The streams that wait for their clients. Cheap to clone.
#[derive(Clone)]
pub(crate) struct ClientWaits {
    /// All waits.
    waits: WaitQueue,
    /// Those that have lasted for [`STALL`].
    stalls: WaitQueue,
}

/// Waits with a bound on their number.
#[derive(Clone)]
struct WaitQueue {
    divisor: usize,
    address_divisor: usize,
    waits: Arc<Mutex<Waits>>,
}

#[derive(Default)]
struct Waits {
    next: u64,
    /// By number, and so in the order in which they began.
    all: BTreeMap<u64, Wait>,
    /// The numbers of the waits that count for a client network; under `None` those that count for
    /// none.
    by_network: HashMap<Option<IpNet>, BTreeSet<u64>>,
}

struct Wait {
    client: Option<CountedClient>,
    evicted: Arc<Notify>,
}

/// A stream's entry in a queue; dropping it ends the wait.
struct WaitGuard {
    queue: WaitQueue,
    number: u64,
    evicted: Arc<Notify>,
}

impl Default for ClientWaits {
    fn default() -> Self {
        Self {
            waits: WaitQueue::new(Limits::WAITING, ADDRESS_DIVISOR),
            stalls: WaitQueue::new(STALL_DIVISOR, STALL_DIVISOR),
        }
    }
}

impl ClientWaits {
    /// Counts a stream that waits for `client` to take bytes, for as long as this is polled.
    /// Completes when the stream must end: after `limits.write_timeout`, or earlier when it is
    /// evicted.
    pub(crate) async fn wait_for_client(
        &self,
        limits: &Limits,
        client: Option<CountedClient>,
    ) -> EndReason {
        let wait = self.waits.begin(client, limits);
        let stall = async {
            sleep(STALL).await;
            self.stalls.begin(client, limits).wait_evicted().await;
        };
        tokio::select! {
            biased;
            () = wait.wait_evicted() => EndReason::ClientEvicted,
            () = stall => EndReason::ClientEvicted,
            () = sleep(limits.write_timeout) => EndReason::ClientStalled,
        }
    }
}

impl WaitQueue {
    fn new(divisor: usize, address_divisor: usize) -> Self {
        Self { divisor, address_divisor, waits: Arc::default() }
    }

    /// Adds the wait of a stream to the networks of its `client`. If that is one too many, evicts
    /// the stream that has waited longest: of such a network, or in total of the network with the
    /// most waits.
    fn begin(&self, client: Option<CountedClient>, limits: &Limits) -> WaitGuard {
        let total = (limits.connections / self.divisor).max(MIN_WAITS);
        // However low the total is, no address has more than half of it.
        let per_address = (limits.connections_per_address / self.address_divisor).min(total / 2);
        let evicted = Arc::new(Notify::new());
        let mut waits = self.lock();
        let number = waits.next;
        waits.next += 1;
        waits.all.insert(number, Wait { client, evicted: Arc::clone(&evicted) });
        for (network, factor) in networks(client) {
            let of_network = waits.by_network.entry(network).or_default();
            of_network.insert(number);
            let is_full = of_network.len() > per_address.max(MIN_WAITS).saturating_mul(factor);
            if network.is_some() && is_full {
                waits.evict_from(network);
            }
        }
        if waits.all.len() > total {
            let largest = waits.by_network.iter().max_by_key(|(_, waits)| waits.len());
            if let Some(network) = largest.map(|(network, _)| *network) {
                waits.evict_from(network);
            }
        }
        drop(waits);
        WaitGuard { queue: self.clone(), number, evicted }
    }

    fn lock(&self) -> MutexGuard<'_, Waits> {
        // Nothing panics while it is locked.
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The networks that a stream of `client` counts towards, each with the factor of its limit.
fn networks(client: Option<CountedClient>) -> impl Iterator<Item = (Option<IpNet>, usize)> {
    let counted = client.into_iter().flat_map(CountedClient::networks);
    let counted = counted.map(|(network, factor)| (Some(network), factor));
    client.is_none().then_some((None, 1)).into_iter().chain(counted)
}

impl Waits {
    /// Evicts the stream of `network` that has waited longest.
    fn evict_from(&mut self, network: Option<IpNet>) {
        let oldest = self.by_network.get(&network).and_then(BTreeSet::first).copied();
        if let Some(wait) = oldest.and_then(|oldest| self.remove(oldest)) {
            wait.evicted.notify_one();
        }
    }

    fn remove(&mut self, number: u64) -> Option<Wait> {
        let wait = self.all.remove(&number)?;
        for (network, _) in networks(wait.client) {
            if let Some(of_network) = self.by_network.get_mut(&network) {
                of_network.remove(&number);
                if of_network.is_empty() {
                    self.by_network.remove(&network);
                }
            }
        }
        Some(wait)
    }
}

impl WaitGuard {
    /// Waits until the stream is evicted.
    async fn wait_evicted(&self) {
        self.evicted.notified().await;
    }
}

impl Drop for WaitGuard {
    fn drop(&mut self) {
        self.queue.lock().remove(self.number);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn limits(connections: usize, per_address: usize) -> Limits {
        Limits { connections, connections_per_address: per_address, ..Limits::default() }
    }

    fn client(ip: &str) -> Option<CountedClient> {
        Some(CountedClient { ip: ip.parse().expect("an address"), prefix: 64 })
    }

    fn evicted(waits: &[WaitGuard]) -> Vec<usize> {
        let over = |wait: &WaitGuard| wait.wait_evicted().now_or_never().is_some();
        waits.iter().enumerate().filter(|(_, wait)| over(wait)).map(|(index, _)| index).collect()
    }

    #[test]
    fn too_many_waits_of_an_address_evict_its_longest() {
        let (queue, limits) = (ClientWaits::default().stalls, limits(100_000, 10 * STALL_DIVISOR));
        let other = queue.begin(client("192.0.2.2"), &limits);
        let begin = |_| queue.begin(client("192.0.2.1"), &limits);
        let mut waits: Vec<_> = (0..10).map(begin).collect();
        assert_eq!(evicted(&waits), [0; 0]);
        // A client that takes bytes ends its wait; the next one is new.
        drop(waits.remove(0));
        waits.extend((0..3).map(begin));
        assert_eq!(evicted(&waits), [0, 1]);
        assert_eq!(evicted(&[other]), [0; 0]);
    }

    #[test]
    fn too_many_waits_in_total_evict_the_longest() {
        let (queue, limits) =
            (ClientWaits::default().stalls, limits(10 * STALL_DIVISOR, 10 * STALL_DIVISOR));
        let waits: Vec<_> = (0..12).map(|_| queue.begin(None, &limits)).collect();
        assert_eq!(evicted(&waits), [0, 1]);
    }

    #[test]
    fn too_many_waits_in_total_evict_from_the_network_with_the_most() {
        let (queue, limits) =
            (ClientWaits::default().stalls, limits(20 * STALL_DIVISOR, 20 * STALL_DIVISOR));
        let few: Vec<_> = (0..2).map(|_| queue.begin(client("192.0.2.1"), &limits)).collect();
        let mut waits: Vec<_> = (0..8).map(|_| queue.begin(None, &limits)).collect();
        waits.extend((0..12).map(|_| queue.begin(client("192.0.2.2"), &limits)));
        // The first of them by the bound of its address, half of the total.
        assert_eq!(evicted(&waits), [8, 9]);
        assert_eq!(evicted(&few), [0; 0]);
    }

    #[test]
    fn one_address_has_at_most_half_of_few_waits() {
        let (queue, limits) = (ClientWaits::default().waits, limits(20 * Limits::WAITING, 10_000));
        let begin = |_| queue.begin(client("192.0.2.1"), &limits);
        let waits: Vec<_> = (0..11).map(begin).collect();
        assert_eq!(evicted(&waits), [0]);
    }

    #[test]
    fn waits_of_an_ipv6_site_are_bounded() {
        let (queue, limits) = (ClientWaits::default().stalls, limits(100_000, 10 * STALL_DIVISOR));
        let begin = |n| queue.begin(client(&format!("2001:db8:0:{n:x}::1")), &limits);
        let of_56: Vec<_> = (0..21).map(begin).collect();
        assert_eq!(evicted(&of_56), [0], "a /56 has twice as many as a /64");
        drop(of_56);
        let of_48: Vec<_> = (0..41).map(|n| begin(n * 256)).collect();
        assert_eq!(evicted(&of_48), [0], "a /48 has four times as many");
    }

    #[test]
    fn many_clients_of_one_address_may_wait() {
        let (queue, limits) = (ClientWaits::default().waits, Limits::default());
        let waits: Vec<_> = (0..200).map(|_| queue.begin(client("192.0.2.1"), &limits)).collect();
        assert_eq!(evicted(&waits), [0; 0]);
    }

    #[test]
    fn some_waits_are_permitted_however_low_the_limits() {
        let (queue, limits) = (ClientWaits::default().stalls, limits(1, 1));
        let begin = |_| queue.begin(client("192.0.2.1"), &limits);
        let waits: Vec<_> = (0..MIN_WAITS).map(begin).collect();
        assert_eq!(evicted(&waits), [0; 0]);
    }

    #[test]
    fn ended_waits_leave_no_entries() {
        let (queue, limits) = (ClientWaits::default().stalls, limits(1, 1));
        let clients = [client("192.0.2.1"), client("2001:db8::1"), None].into_iter().cycle();
        let waits: Vec<_> =
            clients.take(3 * MIN_WAITS).map(|client| queue.begin(client, &limits)).collect();
        drop(waits);
        let waits = queue.lock();
        assert!(waits.all.is_empty() && waits.by_network.is_empty());
    }
}
