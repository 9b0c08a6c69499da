//! Admission limits, shared by all listeners: connections in total and per address, TLS handshakes,
//! lookups. Every limit may change while permits are held, so permits are counted.
//!
//! If a limit is reached because peers connect and then send nothing, the oldest such connection is
//! evicted; a connection that has sent its request is never closed for another one.

mod addresses;
pub(crate) mod eviction_queue;
pub(crate) mod rate_limiter;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use self::addresses::AddressTable;
pub(crate) use self::addresses::{AddressPermit, CountedClient};
use self::eviction_queue::{Entry, EvictionQueue};
use self::rate_limiter::RateLimiter;
use crate::config::Limits;
use crate::telemetry::metrics::{Metrics, Rejection};

/// The number of rejected clients that are sent a reply at a time. Others are closed without one.
const REJECTIONS: usize = 64;

/// The interval between two warnings of one limit. The metrics count each case.
const WARNING_INTERVAL: Duration = Duration::from_secs(600);

/// The number of addresses that are remembered for a valid client certificate, and for how long.
const CERTIFIED_MAX: usize = 4096;
const CERTIFIED_FOR: Duration = Duration::from_secs(3600);

/// A connection that has not sent its request.
pub(crate) struct PendingConnection {
    task: AbortHandle,
    /// The client; the proxy until its PROXY header has been read.
    peer: SocketAddr,
}

impl PendingConnection {
    /// Sets the client that a PROXY header names.
    pub(crate) fn set_peer(&mut self, peer: SocketAddr) {
        self.peer = peer;
    }
}

/// A TLS handshake in progress.
struct PendingHandshake {
    network: Option<IpNet>,
    has_certificate: bool,
    evicted: CancellationToken,
}

/// The admission limits.
pub(crate) struct Limiter {
    metrics: Metrics,
    connections: Arc<AtomicUsize>,
    pending_connections: EvictionQueue<PendingConnection>,
    addresses: AddressTable,
    handshakes: EvictionQueue<PendingHandshake>,
    handshake_rate: RateLimiter,
    /// When a client at an address last presented a valid certificate.
    certified: Mutex<HashMap<IpAddr, Instant>>,
    stream_rate: RateLimiter,
    lookups: Arc<AtomicUsize>,
    rejections: Arc<Semaphore>,
    /// When each limit was last warned of.
    warned: Mutex<HashMap<&'static str, Instant>>,
}

impl Limiter {
    pub(crate) fn new(metrics: Metrics) -> Self {
        Self {
            metrics,
            connections: Arc::default(),
            pending_connections: EvictionQueue::default(),
            addresses: AddressTable::default(),
            handshakes: EvictionQueue::default(),
            handshake_rate: RateLimiter::default(),
            certified: Mutex::default(),
            stream_rate: RateLimiter::default(),
            lookups: Arc::default(),
            rejections: Arc::new(Semaphore::new(REJECTIONS)),
            warned: Mutex::default(),
        }
    }

    /// A permit for one more connection. If `limits.connections` are open, the oldest one that has
    /// not sent its request is evicted.
    pub(crate) fn acquire_connection(&self, limits: &Limits) -> Option<Permit> {
        if let Some(permit) = Permit::try_acquire(&self.connections, limits.connections) {
            return Some(permit);
        }
        let PendingConnection { task, peer } = self.pending_connections.evict(|_| true)?;
        task.abort();
        self.record_rejection(Rejection::Limit, peer);
        self.metrics.connection_closed("rejected");
        // The evicted connection releases its permit as soon as its task is dropped.
        Some(Permit::exceed(&self.connections))
    }

    /// A permit for one more connection of the client at `ip`.
    pub(crate) fn acquire_for_address(&self, ip: IpAddr, limits: &Limits) -> Option<AddressPermit> {
        if is_exempt(ip, limits) {
            return Some(AddressPermit::uncounted());
        }
        let client = CountedClient { ip, prefix: limits.ipv6_prefix };
        self.addresses.try_acquire(client, limits.connections_per_address)
    }

    /// Reserves an entry in the queue of connections that have not sent their request.
    pub(crate) fn pending_connection(&self) -> Entry<PendingConnection> {
        self.pending_connections.reserve()
    }

    /// Makes the connection of `peer`, which `task` serves, evictable until its entry `number`
    /// leaves the queue.
    pub(crate) fn make_evictable(&self, number: u64, task: AbortHandle, peer: SocketAddr) {
        self.pending_connections.fill(number, PendingConnection { task, peer });
    }

    /// A permit for one more TLS handshake of the client at `ip`, whose connection has this
    /// `permit`.
    ///
    /// It is always granted: if `limits.handshakes` are in progress, the oldest is evicted, first
    /// those from addresses that have not presented a certificate. A counted address without a
    /// certificate has at most half of them, and evicts its own oldest.
    pub(crate) fn acquire_handshake(
        &self,
        permit: Option<&AddressPermit>,
        ip: IpAddr,
        limits: &Limits,
    ) -> HandshakePermit {
        let queue = &self.handshakes;
        let evict = |is_eligible: &dyn Fn(&PendingHandshake) -> bool| {
            queue.evict(is_eligible).map(|oldest| oldest.evicted.cancel()).is_some()
        };
        let has_certificate = self.has_shown_certificate(ip);
        let client = permit.and_then(AddressPermit::client).filter(|_| !has_certificate);
        let network = client.map(CountedClient::network);
        let is_of_network =
            |other: &PendingHandshake| network.is_some() && other.network == network;
        // More than one after a reload that lowers the limit.
        while queue.count(is_of_network) >= limits.handshakes.div_ceil(2) && evict(&is_of_network) {
        }
        while queue.len() >= limits.handshakes
            && (evict(&|other| !other.has_certificate) || evict(&|_| true))
        {}
        let evicted = CancellationToken::new();
        let handshake = PendingHandshake { network, has_certificate, evicted: evicted.clone() };
        HandshakePermit { _entry: queue.insert(handshake), evicted }
    }

    /// Counts one more handshake of the client at `ip`, whose connection has this `permit`. Returns
    /// whether it is within `limits.handshakes_per_minute`. Uncounted addresses and those that have
    /// presented a certificate are not limited.
    pub(crate) fn take_handshake(
        &self,
        permit: Option<&AddressPermit>,
        ip: IpAddr,
        limits: &Limits,
    ) -> bool {
        permit.and_then(AddressPermit::client).is_none()
            || self.has_shown_certificate(ip)
            || self.handshake_rate.take(
                ip,
                limits.ipv6_prefix,
                limits.handshakes_per_minute,
                Instant::now(),
            )
    }

    /// Records that a client at `ip` has presented a valid certificate: for the next hour
    /// handshakes of this address are evicted last and have no rate limit.
    pub(crate) fn remember_certificate(&self, ip: IpAddr) {
        let now = Instant::now();
        let mut certified = self.certified.lock().unwrap_or_else(PoisonError::into_inner);
        if certified.len() >= CERTIFIED_MAX && !certified.contains_key(&ip) {
            certified.retain(|_, seen| now.duration_since(*seen) < CERTIFIED_FOR);
        }
        if certified.len() < CERTIFIED_MAX || certified.contains_key(&ip) {
            certified.insert(ip, now);
        }
    }

    fn has_shown_certificate(&self, ip: IpAddr) -> bool {
        let certified = self.certified.lock().unwrap_or_else(PoisonError::into_inner);
        certified.get(&ip).is_some_and(|seen| seen.elapsed() < CERTIFIED_FOR)
    }

    /// A permit for one more lookup.
    pub(crate) fn acquire_lookup(&self, limits: &Limits) -> Option<Permit> {
        Permit::try_acquire(&self.lookups, limits.lookups)
    }

    /// A permit to send one more rejected client a reply.
    pub(crate) fn acquire_rejection(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.rejections).try_acquire_owned().ok()
    }

    /// Counts one more stream of `peer`. Returns whether it is within
    /// `limits.streams_logged_per_minute` and should be logged at info. A certificate does not lift
    /// this limit, because a gateway relays the requests of any client of its zone.
    pub(crate) fn take_stream_log(&self, peer: SocketAddr, limits: &Limits) -> bool {
        let ip = peer.ip();
        if is_exempt(ip, limits)
            || self.stream_rate.take(
                ip,
                limits.ipv6_prefix,
                limits.streams_logged_per_minute,
                Instant::now(),
            )
        {
            return true;
        }
        self.metrics.stream_not_logged();
        if self.should_warn("streams_logged") {
            warn!(
                %peer,
                "more streams from this address than limits.streams_logged_per_minute: the others are \
                 logged at debug; streams_not_logged_total counts them; logged at most every {} \
                 minutes",
                WARNING_INTERVAL.as_secs() / 60
            );
        }
        false
    }

    /// Counts the rejection of `peer` and logs a warning, at most one per limit every ten minutes,
    /// so that clients cannot flood the log.
    pub(crate) fn record_rejection(&self, reason: Rejection, peer: SocketAddr) {
        self.metrics.connection_rejected(reason);
        let (what, remedy) = match reason {
            Rejection::Limit => ("connections", "limits.connections"),
            Rejection::Address => (
                "connections from one address",
                "limits.connections_per_address; limits.exempt_networks, if many clients \
                 share one",
            ),
            Rejection::Handshakes => ("concurrent TLS handshakes", "limits.handshakes"),
            Rejection::HandshakeRate => (
                "TLS handshakes from one address",
                "limits.handshakes_per_minute; limits.exempt_networks, if many clients \
                 share one",
            ),
            Rejection::Lookups => ("concurrent lookups", "limits.lookups; is ZooKeeper slow?"),
            Rejection::Accept => ("open files", "LimitNOFILE"),
        };
        if self.should_warn(reason.as_str()) {
            let reason = reason.as_str();
            let counter = format_args!("connections_rejected_total{{reason=\"{reason}\"}}");
            warn!(
                %peer,
                "too many {what}: rejecting some (see {remedy}); {counter} counts them; logged at most \
                 every {} minutes",
                WARNING_INTERVAL.as_secs() / 60
            );
        } else {
            debug!(%peer, "too many {what}");
        }
    }

    /// Counts a panic in the session of `peer`, and logs an error, at most one every ten minutes.
    /// The panic hook logs where it happened.
    pub(crate) fn record_panic(&self, peer: SocketAddr) {
        self.metrics.panicked();
        if self.should_warn("panic") {
            error!(%peer, "the task of a connection panicked; please report this");
        } else {
            debug!(%peer, "the task of a connection panicked");
        }
    }

    /// Whether it is time to warn of `limit` again.
    fn should_warn(&self, limit: &'static str) -> bool {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = warned.get(limit).is_some_and(|warned| warned.elapsed() < WARNING_INTERVAL);
        if !recent {
            warned.insert(limit, Instant::now());
        }
        !recent
    }
}

fn is_exempt(ip: IpAddr, limits: &Limits) -> bool {
    limits.exempt_networks.iter().any(|network| network.contains(&ip))
}

/// A permit among a limited number; released when dropped.
pub(crate) struct Permit(Arc<AtomicUsize>);

impl Permit {
    fn try_acquire(count: &Arc<AtomicUsize>, limit: usize) -> Option<Self> {
        let more = |count: usize| (count < limit).then_some(count + 1);
        let acquired = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        acquired.ok().map(|_| Self(Arc::clone(count)))
    }

    /// A permit beyond the limit, because another one is about to be released.
    fn exceed(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A permit among the TLS handshakes; released when dropped.
pub(crate) struct HandshakePermit {
    _entry: Entry<PendingHandshake>,
    evicted: CancellationToken,
}

impl HandshakePermit {
    /// Completes when the handshake is evicted.
    pub(crate) async fn wait_evicted(&self) {
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

    fn limiter() -> Limiter {
        Limiter::new(Metrics::default())
    }

    #[test]
    fn connections_of_exempt_networks_do_not_count() {
        let limiter = limiter();
        let limits = limits(|limits| {
            limits.connections_per_address = 1;
            limits.handshakes = 4;
            limits.handshakes_per_minute = 1;
            limits.exempt_networks =
                ["192.0.2.0/24", "2001:db8::/32"].map(|net| net.parse().unwrap()).to_vec();
        });
        for text in ["192.0.2.7", "2001:db8:ffff::1"] {
            let permits: Vec<_> = (0..3)
                .map(|_| limiter.acquire_for_address(ip(text), &limits).expect("exempt"))
                .collect();
            let handshake = |permit| {
                assert!(limiter.take_handshake(Some(permit), ip(text), &limits));
                limiter.acquire_handshake(Some(permit), ip(text), &limits)
            };
            let handshakes: Vec<_> = permits.iter().map(handshake).collect();
            assert!(handshakes.iter().all(|one| !one.evicted.is_cancelled()), "more than half");
        }
        assert!(limiter.addresses.is_empty());
        let _held = limiter.acquire_for_address(ip("192.0.3.1"), &limits).expect("the first");
        assert!(limiter.acquire_for_address(ip("192.0.3.1"), &limits).is_none());
    }

    /// Handshakes in the order in which they began, each of an address with a permit.
    struct Handshakes<'b> {
        limiter: &'b Limiter,
        limits: Limits,
        all: Vec<(&'static str, AddressPermit, HandshakePermit)>,
    }

    impl Handshakes<'_> {
        fn begin(&mut self, address: &'static str, times: usize) {
            for _ in 0..times {
                let permit =
                    self.limiter.acquire_for_address(ip(address), &self.limits).expect("a permit");
                let handshake =
                    self.limiter.acquire_handshake(Some(&permit), ip(address), &self.limits);
                self.all.push((address, permit, handshake));
            }
        }

        /// The last digit of the address of each handshake that was not evicted.
        fn not_evicted(&self) -> String {
            let not_evicted = self.all.iter().filter(|(_, _, one)| !one.evicted.is_cancelled());
            not_evicted.map(|(address, ..)| &address[address.len() - 1..]).collect()
        }
    }

    #[test]
    fn too_many_handshakes_evict_the_oldest() {
        let limiter = limiter();
        let limits = limits(|limits| limits.handshakes = 4);
        let mut handshakes = Handshakes { limiter: &limiter, limits, all: Vec::new() };
        handshakes.begin("192.0.2.1", 3);
        assert_eq!(handshakes.not_evicted(), "11", "an address has half of them");
        handshakes.begin("192.0.2.2", 2);
        assert_eq!(handshakes.not_evicted(), "1122");
        handshakes.begin("192.0.2.3", 1);
        assert_eq!(handshakes.not_evicted(), "1223");
        handshakes.limits.handshakes = 2;
        handshakes.begin("192.0.2.4", 1);
        assert_eq!(handshakes.not_evicted(), "34", "a reload has lowered the limit");
        handshakes.all.clear();
        assert_eq!(limiter.handshakes.len(), 0);
    }

    #[test]
    fn handshakes_of_addresses_with_a_certificate_are_evicted_last() {
        let limiter = limiter();
        let limits = limits(|limits| limits.handshakes = 4);
        let mut handshakes = Handshakes { limiter: &limiter, limits, all: Vec::new() };
        limiter.remember_certificate(ip("192.0.2.9"));
        handshakes.begin("192.0.2.9", 3);
        handshakes.begin("192.0.2.1", 1);
        handshakes.begin("192.0.2.2", 2);
        assert_eq!(handshakes.not_evicted(), "9992", "more than half, and none closed for others");
        handshakes.begin("192.0.2.9", 2);
        assert_eq!(handshakes.not_evicted(), "9999", "one another's, where there are no others");
    }

    #[test]
    fn handshakes_have_a_rate_limit_until_a_certificate_is_presented() {
        let (limiter, limits) = (limiter(), limits(|l| l.handshakes_per_minute = 20));
        let permit = limiter.acquire_for_address(ip("192.0.2.1"), &limits);
        let begin = || limiter.take_handshake(permit.as_ref(), ip("192.0.2.1"), &limits);
        assert_eq!((0..100).filter(|_| begin()).count(), 20);
        limiter.remember_certificate(ip("192.0.2.1"));
        assert_eq!((0..100).filter(|_| begin()).count(), 100);
    }

    #[test]
    fn remembered_addresses_with_a_certificate_are_bounded() {
        let limiter = limiter();
        for number in 0..10_000_u32 {
            limiter.remember_certificate(number.to_be_bytes().into());
        }
        assert!(limiter.has_shown_certificate(ip("0.0.0.1")));
        assert_eq!(limiter.certified.lock().unwrap().len(), CERTIFIED_MAX);
    }

    #[test]
    fn each_limit_is_warned_of_once_in_an_interval() {
        let limiter = limiter();
        assert!(limiter.should_warn("address") && limiter.should_warn("lookups"));
        assert!(!limiter.should_warn("address") && !limiter.should_warn("lookups"));
    }
}
