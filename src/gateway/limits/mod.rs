//! Admission limits of all listeners together: connections in total and from one address, TLS
//! handshakes, look-ups. Counted and not held as permits: every limit may change while they are
//! open.
//!
//! Where a limit is reached because peers connect and then send nothing, the oldest of those makes
//! room; a connection that has asked for a build is never closed for another one.

pub(crate) mod eviction_queue;
pub(crate) mod rate_limiter;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use self::eviction_queue::{Entry, EvictionQueue};
use self::rate_limiter::RateLimiter;
use super::Context;
use super::session::outcome::Outcome;
use crate::config::Limits;
use crate::telemetry::metrics::Rejection;

/// Refusals under way at once. What comes on top is closed without a word.
const REFUSALS: usize = 64;

/// Between two warnings that a limit is reached. The metrics tell how often.
const WARNINGS: Duration = Duration::from_secs(600);

/// Addresses that the table keeps room for, however few there are.
const ROOM: usize = 1024;

/// Addresses that are remembered for having shown a valid client certificate, and for how long.
const CERTIFIED_MAX: usize = 4096;
const CERTIFIED_FOR: Duration = Duration::from_secs(3600);

/// IPv6 networks that sites of several sizes get (RFC 6177), which count together: a /56 has twice
/// as much as a /64, a /48 twice as much as that.
const SITES: [u8; 3] = [64, 56, 48];

/// A connection that has not asked for a build yet.
pub(crate) struct Unasked {
    task: AbortHandle,
    /// The client; the balancer until its PROXY header has come.
    peer: SocketAddr,
}

impl Unasked {
    /// Sets the client that a PROXY header names.
    pub(crate) fn set_peer(&mut self, peer: SocketAddr) {
        self.peer = peer;
    }
}

/// A TLS handshake that waits for its client.
struct Handshaking {
    network: Option<IpNet>,
    certified: bool,
    evicted: CancellationToken,
}

/// Bounds on what all listeners together take.
pub(crate) struct Bounds {
    connections: Arc<AtomicUsize>,
    waiting: EvictionQueue<Unasked>,
    addresses: Arc<Addresses>,
    handshakes: EvictionQueue<Handshaking>,
    handshake_rate: RateLimiter,
    /// Addresses of clients with a certificate, and when one was seen last.
    certified: Mutex<HashMap<IpAddr, Instant>>,
    stream_rate: RateLimiter,
    lookups: Arc<AtomicUsize>,
    refusals: Arc<Semaphore>,
    /// When each limit was warned of, by its metric label.
    warned: Mutex<HashMap<&'static str, Instant>>,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            connections: Arc::default(),
            waiting: EvictionQueue::default(),
            addresses: Arc::default(),
            handshakes: EvictionQueue::default(),
            handshake_rate: RateLimiter::default(),
            certified: Mutex::default(),
            stream_rate: RateLimiter::default(),
            lookups: Arc::default(),
            refusals: Arc::new(Semaphore::new(REFUSALS)),
            warned: Mutex::default(),
        }
    }
}

impl Bounds {
    /// A place for one more connection from `ip`, as long as it counts against that address: what
    /// is dropped is free again. Can be asked for at any time, so also when somebody else turns
    /// out to be the client.
    pub(crate) fn of_address(&self, ip: IpAddr, limits: &Limits) -> Option<AddressPlace> {
        if limits.exempt_networks.iter().any(|network| network.contains(&ip)) {
            return Some(AddressPlace::of_nobody());
        }
        let prefix = limits.ipv6_prefix;
        let mut open = self.addresses.lock();
        let full = |(network, share): (IpNet, usize)| {
            let count = open.get(&network).copied().unwrap_or_default();
            count >= limits.connections_per_address.saturating_mul(share)
        };
        if networks(ip, prefix).any(full) {
            return None;
        }
        for (network, _) in networks(ip, prefix) {
            *open.entry(network).or_default() += 1;
        }
        let addresses = Arc::clone(&self.addresses);
        Some(AddressPlace { counted: Some(Counted { addresses, ip, prefix }) })
    }

    /// A place for one more TLS handshake of a client at `ip`, whose connection has `place`.
    ///
    /// There always is one: when `limits.handshakes` are under way the oldest is closed, one of an
    /// address without a certificate before one of an address that has shown one. An address that
    /// counts and has shown none has at most half of them, and closes its own oldest.
    pub(crate) fn handshake(
        &self,
        place: Option<&AddressPlace>,
        ip: IpAddr,
        limits: &Limits,
    ) -> Handshake {
        let queue = &self.handshakes;
        let evict = |which: &dyn Fn(&Handshaking) -> bool| {
            queue.evict(which).map(|oldest| oldest.evicted.cancel()).is_some()
        };
        let certified = self.is_certified(ip);
        let counted = place.and_then(|place| place.counted.as_ref()).filter(|_| !certified);
        let network = counted.map(Counted::network);
        let is_of_network = |other: &Handshaking| network.is_some() && other.network == network;
        // More than one where a reload has lowered the limit.
        while queue.count(is_of_network) >= limits.handshakes.div_ceil(2) && evict(&is_of_network) {
        }
        while queue.len() >= limits.handshakes
            && (evict(&|other| !other.certified) || evict(&|_| true))
        {}
        let evicted = CancellationToken::new();
        let entry = Handshaking { network, certified, evicted: evicted.clone() };
        Handshake { _entry: queue.insert(entry), evicted }
    }

    /// Whether one more handshake of a client at `ip`, whose connection has `place`, is within
    /// `limits.handshakes_per_minute`. Addresses that do not count and those that have shown a
    /// certificate are not limited.
    pub(crate) fn may_begin_handshake(
        &self,
        place: Option<&AddressPlace>,
        ip: IpAddr,
        limits: &Limits,
    ) -> bool {
        let counted = place.is_some_and(|place| place.counted.is_some());
        let (rate, prefix) = (limits.handshakes_per_minute, limits.ipv6_prefix);
        !counted
            || self.is_certified(ip)
            || self.handshake_rate.take(ip, prefix, rate, Instant::now())
    }

    /// Notes that a client at `ip` has shown a valid certificate: handshakes from there are closed
    /// last and not limited in their rate for the next hour.
    pub(crate) fn certify(&self, ip: IpAddr) {
        let now = Instant::now();
        let mut certified = self.certified.lock().unwrap_or_else(PoisonError::into_inner);
        if certified.len() >= CERTIFIED_MAX && !certified.contains_key(&ip) {
            certified.retain(|_, seen| now.duration_since(*seen) < CERTIFIED_FOR);
        }
        if certified.len() < CERTIFIED_MAX || certified.contains_key(&ip) {
            certified.insert(ip, now);
        }
    }

    fn is_certified(&self, ip: IpAddr) -> bool {
        let certified = self.certified.lock().unwrap_or_else(PoisonError::into_inner);
        certified.get(&ip).is_some_and(|seen| seen.elapsed() < CERTIFIED_FOR)
    }

    /// A place for one more look-up.
    pub(crate) fn lookup(&self, limits: &Limits) -> Option<Place> {
        Place::among(&self.lookups, limits.lookups)
    }

    /// Leave to tell one more client that it is refused.
    pub(crate) fn refusal(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.refusals).try_acquire_owned().ok()
    }

    /// Reserves an entry among the connections that have not asked yet.
    pub(crate) fn waiting(&self) -> Entry<Unasked> {
        self.waiting.reserve()
    }

    /// Lets the connection of `peer`, which `task` serves, be closed for another one until its
    /// entry `number` leaves.
    pub(crate) fn may_be_closed(&self, number: u64, task: AbortHandle, peer: SocketAddr) {
        self.waiting.fill(number, Unasked { task, peer });
    }

    /// Whether it is time to warn of `limit` again.
    fn warns(&self, limit: &'static str) -> bool {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = warned.get(limit).is_some_and(|warned| warned.elapsed() < WARNINGS);
        if !recent {
            warned.insert(limit, Instant::now());
        }
        !recent
    }
}

impl Context {
    /// A place for one more connection. When `limits.connections` are open, the oldest one that has
    /// not asked for a build yet is closed for it.
    pub(crate) fn connection_place(&self) -> Option<Place> {
        let (bounds, limit) = (&self.bounds, self.limits.connections);
        Place::among(&bounds.connections, limit).or_else(|| {
            let Unasked { task, peer } = bounds.waiting.evict(|_| true)?;
            task.abort();
            self.turned_away(Rejection::Limit, peer);
            self.metrics.connection_closed(Outcome::Rejected.label());
            // The closed connection gives its own place back as soon as its task is dropped.
            Some(Place::beyond(&bounds.connections))
        })
    }

    /// Whether the stream of `peer` should be logged at info: it is within
    /// `limits.streams_logged_per_minute`. A certificate changes nothing here, because a gateway
    /// relays the requests of any client of its zone.
    pub(crate) fn logs_stream_of(&self, peer: SocketAddr) -> bool {
        let Limits { streams_logged_per_minute, ipv6_prefix, exempt_networks, .. } = &self.limits;
        let ip = peer.ip();
        let exempt = exempt_networks.iter().any(|network| network.contains(&ip));
        let rate = &self.bounds.stream_rate;
        if exempt || rate.take(ip, *ipv6_prefix, *streams_logged_per_minute, Instant::now()) {
            return true;
        }
        self.metrics.stream_not_logged();
        if self.bounds.warns("streams_logged") {
            warn!(
                %peer,
                "more streams from this address than limits.streams_logged_per_minute: logging the \
                 others at debug; streams_not_logged_total counts them, this line comes at most \
                 every {} minutes",
                WARNINGS.as_secs() / 60
            );
        }
        false
    }

    /// Counts what was refused to `peer`, and warns of it now and then: whoever refuses people at
    /// night has to be told, and must not be told more than peers can bring about.
    pub(crate) fn turned_away(&self, why: Rejection, peer: SocketAddr) {
        self.metrics.connection_rejected(why);
        let (what, remedy) = match why {
            Rejection::Limit => ("connections", "limits.connections"),
            Rejection::Address => (
                "connections from one address",
                "limits.connections_per_address; limits.exempt_networks, where many people come \
                 from one address",
            ),
            Rejection::Handshakes => ("TLS handshakes at once", "limits.handshakes"),
            Rejection::HandshakeRate => (
                "TLS handshakes from one address",
                "limits.handshakes_per_minute; limits.exempt_networks, where many clients come \
                 from one address",
            ),
            Rejection::Lookups => ("look-ups at once", "limits.lookups; is ZooKeeper slow?"),
            Rejection::Accept => ("connections for the kernel", "LimitNOFILE"),
        };
        if self.bounds.warns(why.as_str()) {
            let counter = format_args!("connections_rejected_total{{reason=\"{}\"}}", why.as_str());
            warn!(
                %peer,
                "too many {what}: refusing some ({remedy}); {counter} tells how many, this line \
                 comes at most every {} minutes",
                WARNINGS.as_secs() / 60
            );
        } else {
            debug!(%peer, "too many {what}");
        }
    }
}

/// A place among a limited number; free again when dropped.
pub(crate) struct Place(Arc<AtomicUsize>);

impl Place {
    fn among(taken: &Arc<AtomicUsize>, limit: usize) -> Option<Self> {
        let more = |count: usize| (count < limit).then_some(count + 1);
        let counted = taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        counted.ok().map(|_| Self(Arc::clone(taken)))
    }

    /// A place beyond the limit, for one that is about to be given back.
    fn beyond(taken: &Arc<AtomicUsize>) -> Self {
        taken.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(taken))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The networks that a client at `ip` is counted in, the smallest first, each with how many times as
/// much as that it has: the IPv4 address alone, or the IPv6 network of `ipv6_prefix` bits, of which
/// a site chooses the rest as it likes, and the wider ones of [`SITES`].
pub(crate) fn networks(ip: IpAddr, ipv6_prefix: u8) -> impl Iterator<Item = (IpNet, usize)> {
    let (own, wider) = match ip {
        IpAddr::V4(_) => (32, [].as_slice()),
        IpAddr::V6(_) => (ipv6_prefix, SITES.as_slice()),
    };
    let wider = wider.iter().copied().filter(move |site| *site < own);
    std::iter::once(own).chain(wider).enumerate().map(move |(step, prefix)| {
        // The prefix was checked when it was read.
        let network = IpNet::new(ip, prefix).unwrap_or_else(|_| ip.into()).trunc();
        (network, 1 << step)
    })
}

/// How many connections every client network has open.
#[derive(Default)]
struct Addresses(Mutex<HashMap<IpNet, usize>>);

impl Addresses {
    fn lock(&self) -> MutexGuard<'_, HashMap<IpNet, usize>> {
        // Whole between any two statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place among the connections of an address; free again when dropped.
pub(crate) struct AddressPlace {
    counted: Option<Counted>,
}

impl AddressPlace {
    /// Of a connection that counts against no address.
    pub(crate) fn of_nobody() -> Self {
        Self { counted: None }
    }

    /// The client that it counts for, if it counts for one.
    pub(crate) fn client(&self) -> Option<CountedClient> {
        let Counted { ip, prefix, .. } = self.counted.as_ref()?;
        Some(CountedClient { ip: *ip, prefix: *prefix })
    }
}

/// A client that limits count by its address.
#[derive(Clone, Copy)]
pub(crate) struct CountedClient {
    pub(crate) ip: IpAddr,
    pub(crate) prefix: u8,
}

impl CountedClient {
    /// The networks that it is counted in, as [`networks`] returns them.
    pub(crate) fn networks(self) -> impl Iterator<Item = (IpNet, usize)> {
        networks(self.ip, self.prefix)
    }
}

struct Counted {
    addresses: Arc<Addresses>,
    ip: IpAddr,
    /// As it was when the place was taken: it may change.
    prefix: u8,
}

impl Counted {
    /// The smallest network it is counted in.
    fn network(&self) -> IpNet {
        let mut networks = networks(self.ip, self.prefix);
        networks.next().map_or(self.ip.into(), |(network, _)| network)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut open = self.addresses.lock();
        for (network, _) in networks(self.ip, self.prefix) {
            let Some(count) = open.get_mut(&network) else { continue };
            *count -= 1;
            if *count == 0 {
                open.remove(&network);
            }
        }
        // Shrink the map after a burst.
        if open.capacity() > ROOM && open.len() < open.capacity() / 8 {
            let room = open.len() * 2;
            open.shrink_to(room.max(ROOM / 2));
        }
    }
}

/// A place among the TLS handshakes; free again when dropped.
pub(crate) struct Handshake {
    _entry: Entry<Handshaking>,
    evicted: CancellationToken,
}

impl Handshake {
    /// Completes when the handshake has to be given up for a newer one.
    pub(crate) async fn evicted(&self) {
        self.evicted.cancelled().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(lines: impl FnOnce(&mut Limits)) -> Limits {
        let mut limits = Limits::default();
        lines(&mut limits);
        limits
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_has_so_many_and_another_one_as_many() {
        let (bounds, limits) = (Bounds::default(), limits(|l| l.connections_per_address = 2));
        let place = |text| bounds.of_address(ip(text), &limits);
        let held = [place("192.0.2.1"), place("192.0.2.1")];
        assert!(held.iter().all(Option::is_some));
        assert!(place("192.0.2.1").is_none());
        assert!(place("192.0.2.2").is_some());
        drop(held);
        assert!(place("192.0.2.1").is_some());
        assert!(bounds.addresses.lock().is_empty());
    }

    #[test]
    fn ipv6_counts_by_prefix() {
        let bounds = Bounds::default();
        for (prefix, near, far) in [
            (64, "2001:db8::ffff:ffff:ffff:ffff", "2001:db8:0:1::"),
            (128, "2001:db8::1", "2001:db8::2"),
            (48, "2001:db8:0:ffff::1", "2001:db8:1::1"),
            (1, "7fff::", "8000::"),
        ] {
            let limits = limits(|limits| {
                limits.connections_per_address = 1;
                limits.ipv6_prefix = prefix;
            });
            let _held = bounds.of_address(ip("2001:db8::1"), &limits).expect("the first");
            assert!(bounds.of_address(ip(near), &limits).is_none(), "/{prefix}");
            assert!(bounds.of_address(ip(far), &limits).is_some(), "/{prefix}");
        }
        assert!(bounds.addresses.lock().is_empty());
    }

    /// What was taken under one prefix is given back under it.
    #[test]
    fn another_prefix_meanwhile() {
        let bounds = Bounds::default();
        let wide = bounds.of_address(ip("2001:db8::1"), &limits(|l| l.ipv6_prefix = 32));
        let narrow = bounds.of_address(ip("2001:db8::1"), &limits(|l| l.ipv6_prefix = 128));
        assert_eq!(bounds.addresses.lock().len(), 5, "/32, and /128, /64, /56, /48");
        drop((wide, narrow));
        assert!(bounds.addresses.lock().is_empty());
    }

    /// How many connections fit from these addresses, one after the other, and stay.
    fn fit(bounds: &Bounds, limits: &Limits, addresses: impl Iterator<Item = String>) -> usize {
        let places = addresses.filter_map(|text| bounds.of_address(ip(&text), limits));
        places.map(std::mem::forget).count()
    }

    #[test]
    fn an_ipv6_site_has_twice_as_much_for_each_wider_network() {
        let limits = limits(|limits| limits.connections_per_address = 10);
        let many = |of: &'static str| (0..4096).map(move |n| of.replace('#', &format!("{n:x}")));
        for (of, fitting) in [
            ("2001:db8:0:1::#", 10),
            ("2001:db8:0:#::1", 40),
            ("2001:db8:0:1#::1", 40),
            ("2001:db8:0:ff00::#", 10),
        ] {
            assert_eq!(fit(&Bounds::default(), &limits, many(of)), fitting, "{of}");
        }
        let of_56 = (0..256).map(|n| format!("2001:db8:0:{n:x}::1"));
        let bounds = Bounds::default();
        assert_eq!(fit(&bounds, &limits, of_56), 20);
        assert!(bounds.of_address(ip("2001:db8:1::1"), &limits).is_some(), "another site");
        assert!(bounds.of_address(ip("192.0.2.1"), &limits).is_some());
    }

    #[test]
    fn exempt_networks_count_nothing() {
        let bounds = Bounds::default();
        let limits = limits(|limits| {
            limits.connections_per_address = 1;
            limits.handshakes = 4;
            limits.handshakes_per_minute = 1;
            limits.exempt_networks =
                ["192.0.2.0/24", "2001:db8::/32"].map(|net| net.parse().unwrap()).to_vec();
        });
        for text in ["192.0.2.7", "2001:db8:ffff::1"] {
            let places: Vec<_> =
                (0..3).map(|_| bounds.of_address(ip(text), &limits).expect("exempt")).collect();
            let handshake = |place| {
                assert!(bounds.may_begin_handshake(Some(place), ip(text), &limits));
                bounds.handshake(Some(place), ip(text), &limits)
            };
            let handshakes: Vec<_> = places.iter().map(handshake).collect();
            assert!(handshakes.iter().all(|one| !one.evicted.is_cancelled()), "more than half");
        }
        assert!(bounds.addresses.lock().is_empty());
        let _held = bounds.of_address(ip("192.0.3.1"), &limits).expect("the first");
        assert!(bounds.of_address(ip("192.0.3.1"), &limits).is_none());
    }

    /// Handshakes that have begun one after the other, each from an address with a place.
    struct Begun<'b> {
        bounds: &'b Bounds,
        limits: Limits,
        all: Vec<(&'static str, AddressPlace, Handshake)>,
    }

    impl Begun<'_> {
        fn begin(&mut self, address: &'static str, times: usize) {
            for _ in 0..times {
                let place = self.bounds.of_address(ip(address), &self.limits).expect("a place");
                let handshake = self.bounds.handshake(Some(&place), ip(address), &self.limits);
                self.all.push((address, place, handshake));
            }
        }

        /// Those that go on, each by the last number of its address.
        fn going_on(&self) -> String {
            let going_on = self.all.iter().filter(|(_, _, one)| !one.evicted.is_cancelled());
            going_on.map(|(address, ..)| &address[address.len() - 1..]).collect()
        }
    }

    #[test]
    fn the_oldest_handshake_makes_room() {
        let bounds = Bounds::default();
        let limits = limits(|limits| limits.handshakes = 4);
        let mut begun = Begun { bounds: &bounds, limits, all: Vec::new() };
        begun.begin("192.0.2.1", 3);
        assert_eq!(begun.going_on(), "11", "an address has half of them");
        begun.begin("192.0.2.2", 2);
        assert_eq!(begun.going_on(), "1122");
        begun.begin("192.0.2.3", 1);
        assert_eq!(begun.going_on(), "1223");
        begun.limits.handshakes = 2;
        begun.begin("192.0.2.4", 1);
        assert_eq!(begun.going_on(), "34", "a reload has lowered the limit");
        begun.all.clear();
        assert_eq!(bounds.handshakes.len(), 0);
    }

    #[test]
    fn handshakes_from_addresses_with_a_certificate_are_closed_last() {
        let bounds = Bounds::default();
        let limits = limits(|limits| limits.handshakes = 4);
        let mut begun = Begun { bounds: &bounds, limits, all: Vec::new() };
        bounds.certify(ip("192.0.2.9"));
        begun.begin("192.0.2.9", 3);
        begun.begin("192.0.2.1", 1);
        begun.begin("192.0.2.2", 2);
        assert_eq!(begun.going_on(), "9992", "more than half, and none closed for others");
        begun.begin("192.0.2.9", 2);
        assert_eq!(begun.going_on(), "9999", "one another's, where there are no others");
    }

    #[test]
    fn handshakes_have_a_rate_until_a_certificate_is_shown() {
        let (bounds, limits) = (Bounds::default(), limits(|l| l.handshakes_per_minute = 20));
        let place = bounds.of_address(ip("192.0.2.1"), &limits);
        let begin = || bounds.may_begin_handshake(place.as_ref(), ip("192.0.2.1"), &limits);
        assert_eq!((0..100).filter(|_| begin()).count(), 20);
        bounds.certify(ip("192.0.2.1"));
        assert_eq!((0..100).filter(|_| begin()).count(), 100);
    }

    #[test]
    fn remembered_certificates_are_bounded() {
        let bounds = Bounds::default();
        for number in 0..10_000_u32 {
            bounds.certify(number.to_be_bytes().into());
        }
        assert!(bounds.is_certified(ip("0.0.0.1")));
        assert_eq!(bounds.certified.lock().unwrap().len(), CERTIFIED_MAX);
    }

    #[test]
    fn the_table_is_no_larger_than_what_is_open() {
        let (bounds, limits) = (Bounds::default(), Limits::default());
        let address = |number: u32| IpAddr::from(number.to_be_bytes());
        let mut open: Vec<_> =
            (0..100_000).map(|number| bounds.of_address(address(number), &limits)).collect();
        assert!(bounds.addresses.lock().capacity() >= 100_000);
        open.truncate(10);
        let addresses = bounds.addresses.lock();
        assert_eq!(addresses.len(), 10);
        assert!(addresses.capacity() <= 2 * ROOM, "{}", addresses.capacity());
    }

    #[test]
    fn warnings_are_rare() {
        let bounds = Bounds::default();
        assert!(bounds.warns("address") && bounds.warns("lookups"));
        assert!(!bounds.warns("address") && !bounds.warns("lookups"));
    }
}
