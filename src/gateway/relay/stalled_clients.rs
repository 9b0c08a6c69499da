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
use tokio::time::sleep;

use super::End;
use crate::config::Limits;
use crate::gateway::Context;
use crate::gateway::limits::CountedClient;

/// Of the connections of one address, one in so many may wait. Twice the share in total: people who
/// share an address and ask for one log in the same moment wait for a round trip each.
const OF_ADDRESS: usize = 4;

/// One in so many may have waited for [`STALL`].
const STALLED: usize = 16;

/// A client that takes nothing for so long is no longer one that is merely slower than its log: the
/// kernel lets a stream go on when a third of its send buffer is free, after a second at 170 kB/s.
const STALL: Duration = Duration::from_secs(1);

/// So many may wait where the share is smaller.
const FLOOR: usize = 8;

/// The streams that wait for their clients.
#[derive(Clone)]
pub(crate) struct WaitingStreams {
    share: usize,
    share_of_address: usize,
    waits: Arc<Mutex<Waits>>,
}

#[derive(Default)]
struct Waits {
    begun: u64,
    /// By number, so in the order in which they began.
    all: BTreeMap<u64, Wait>,
    /// The numbers of those that count for a client network; `None` for those that count for none.
    by_network: HashMap<Option<IpNet>, BTreeSet<u64>>,
}

struct Wait {
    client: Option<CountedClient>,
    evicted: Arc<Notify>,
}

/// A stream's place among those that wait; free again when dropped.
pub(crate) struct WaitGuard {
    waiting: WaitingStreams,
    number: u64,
    evicted: Arc<Notify>,
}

/// Holds a place for a stream of `client`'s that waits for it. Completes when the stream must end.
pub(crate) async fn wait(cx: &Context, client: Option<CountedClient>) -> End {
    let limits = &cx.limits;
    let waiting = cx.waiting.begin(client, limits);
    let stalled = async {
        sleep(STALL).await;
        cx.stalled.begin(client, limits).evicted().await;
    };
    tokio::select! {
        biased;
        () = waiting.evicted() => End::ClientEvicted,
        () = stalled => End::ClientEvicted,
        () = sleep(limits.write_timeout) => End::ClientStalled,
    }
}

impl WaitingStreams {
    /// Those that wait at all.
    pub(crate) fn all() -> Self {
        Self { share: Limits::WAITING, share_of_address: OF_ADDRESS, waits: Arc::default() }
    }

    /// Those that have waited for [`STALL`].
    pub(crate) fn stalled() -> Self {
        Self { share: STALLED, share_of_address: STALLED, waits: Arc::default() }
    }

    /// Notes that a stream waits for its client, which counts for the networks of `client`. Where
    /// that is one too many, evicts the stream that has waited longest: of such a network, or in
    /// total of the network with the most waits.
    pub(crate) fn begin(&self, client: Option<CountedClient>, limits: &Limits) -> WaitGuard {
        let total = (limits.connections / self.share).max(FLOOR);
        // No address has more than half of all places, however low the total is.
        let of_address = (limits.connections_per_address / self.share_of_address).min(total / 2);
        let evicted = Arc::new(Notify::new());
        let mut waits = self.lock();
        let number = waits.begun;
        waits.begun += 1;
        waits.all.insert(number, Wait { client, evicted: Arc::clone(&evicted) });
        for (network, share) in networks(client) {
            let here = waits.by_network.entry(network).or_default();
            here.insert(number);
            let too_many = here.len() > of_address.max(FLOOR).saturating_mul(share);
            if network.is_some() && too_many {
                waits.evict_of(network);
            }
        }
        if waits.all.len() > total {
            let most = waits.by_network.iter().max_by_key(|(_, here)| here.len());
            if let Some(network) = most.map(|(network, _)| *network) {
                waits.evict_of(network);
            }
        }
        drop(waits);
        WaitGuard { waiting: self.clone(), number, evicted }
    }

    fn lock(&self) -> MutexGuard<'_, Waits> {
        // Nothing panics while it is locked.
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The networks that a stream of `client`'s counts for, each with its share.
fn networks(client: Option<CountedClient>) -> impl Iterator<Item = (Option<IpNet>, usize)> {
    let counted = client.into_iter().flat_map(CountedClient::networks);
    let counted = counted.map(|(network, share)| (Some(network), share));
    client.is_none().then_some((None, 1)).into_iter().chain(counted)
}

impl Waits {
    /// Evicts the stream of `network` that has waited longest.
    fn evict_of(&mut self, network: Option<IpNet>) {
        let oldest = self.by_network.get(&network).and_then(BTreeSet::first).copied();
        if let Some(wait) = oldest.and_then(|oldest| self.remove(oldest)) {
            wait.evicted.notify_one();
        }
    }

    fn remove(&mut self, number: u64) -> Option<Wait> {
        let wait = self.all.remove(&number)?;
        for (network, _) in networks(wait.client) {
            if let Some(here) = self.by_network.get_mut(&network) {
                here.remove(&number);
                if here.is_empty() {
                    self.by_network.remove(&network);
                }
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

    fn client(ip: &str) -> Option<CountedClient> {
        Some(CountedClient { ip: ip.parse().expect("an address"), prefix: 64 })
    }

    fn evicted(waits: &[WaitGuard]) -> Vec<usize> {
        let over = |wait: &WaitGuard| wait.evicted().now_or_never().is_some();
        waits.iter().enumerate().filter(|(_, wait)| over(wait)).map(|(index, _)| index).collect()
    }

    #[test]
    fn the_longest_wait_of_an_address_ends_beyond_its_bound() {
        let (waiting, limits) = (WaitingStreams::stalled(), limits(100_000, 10 * STALLED));
        let other = waiting.begin(client("192.0.2.2"), &limits);
        let begin = |_| waiting.begin(client("192.0.2.1"), &limits);
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
        let (waiting, limits) = (WaitingStreams::stalled(), limits(10 * STALLED, 10 * STALLED));
        let waits: Vec<_> = (0..12).map(|_| waiting.begin(None, &limits)).collect();
        assert_eq!(evicted(&waits), [0, 1]);
    }

    #[test]
    fn beyond_the_bound_of_all_the_network_with_the_most_waits_loses_one() {
        let (waiting, limits) = (WaitingStreams::stalled(), limits(20 * STALLED, 20 * STALLED));
        let few: Vec<_> = (0..2).map(|_| waiting.begin(client("192.0.2.1"), &limits)).collect();
        let mut waits: Vec<_> = (0..8).map(|_| waiting.begin(None, &limits)).collect();
        waits.extend((0..12).map(|_| waiting.begin(client("192.0.2.2"), &limits)));
        // The first of them for the bound of their address, half of all.
        assert_eq!(evicted(&waits), [8, 9]);
        assert_eq!(evicted(&few), [0; 0]);
    }

    #[test]
    fn one_address_has_half_of_few_places() {
        let (waiting, limits) = (WaitingStreams::all(), limits(20 * Limits::WAITING, 10_000));
        let begin = |_| waiting.begin(client("192.0.2.1"), &limits);
        let waits: Vec<_> = (0..11).map(begin).collect();
        assert_eq!(evicted(&waits), [0]);
    }

    #[test]
    fn the_waits_of_an_ipv6_site_are_bounded() {
        let (waiting, limits) = (WaitingStreams::stalled(), limits(100_000, 10 * STALLED));
        let begin = |n| waiting.begin(client(&format!("2001:db8:0:{n:x}::1")), &limits);
        let of_56: Vec<_> = (0..21).map(begin).collect();
        assert_eq!(evicted(&of_56), [0], "twice as many as a /64");
        drop(of_56);
        let of_48: Vec<_> = (0..41).map(|n| begin(n * 256)).collect();
        assert_eq!(evicted(&of_48), [0], "four times as many");
    }

    #[test]
    fn a_crowd_behind_one_address_may_wait_for_a_moment() {
        let (waiting, limits) = (WaitingStreams::all(), Limits::default());
        let waits: Vec<_> = (0..200).map(|_| waiting.begin(client("192.0.2.1"), &limits)).collect();
        assert_eq!(evicted(&waits), [0; 0]);
    }

    #[test]
    fn few_connections_leave_room_for_some() {
        let (waiting, limits) = (WaitingStreams::stalled(), limits(1, 1));
        let begin = |_| waiting.begin(client("192.0.2.1"), &limits);
        let waits: Vec<_> = (0..FLOOR).map(begin).collect();
        assert_eq!(evicted(&waits), [0; 0]);
    }

    #[test]
    fn nothing_is_left_of_waits_that_are_over() {
        let (waiting, limits) = (WaitingStreams::stalled(), limits(1, 1));
        let clients = [client("192.0.2.1"), client("2001:db8::1"), None].into_iter().cycle();
        let waits: Vec<_> =
            clients.take(3 * FLOOR).map(|client| waiting.begin(client, &limits)).collect();
        drop(waits);
        let waits = waiting.lock();
        assert!(waits.all.is_empty() && waits.by_network.is_empty());
    }
}
