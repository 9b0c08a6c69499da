//! How much there may be at once: connections in total and from one address, TLS handshakes,
//! look-ups. Counted and not held as permits: every limit may change while they are open.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{debug, warn};

use super::Context;
use crate::admin::metrics::Rejection;
use crate::config::Limits;

/// Refusals under way at once. What comes on top is closed without a word.
const REFUSALS: usize = 64;

/// Between two warnings that a limit is reached. The metrics tell how often.
const WARNINGS: Duration = Duration::from_secs(600);

/// Addresses that the table keeps room for, however few there are.
const ROOM: usize = 1024;

/// Bounds on what all listeners together take.
pub(crate) struct Bounds {
    connections: Arc<AtomicUsize>,
    addresses: Arc<Addresses>,
    handshakes: Arc<AtomicUsize>,
    lookups: Arc<AtomicUsize>,
    refusals: Arc<Semaphore>,
    /// When each kind was warned of.
    warned: Mutex<HashMap<Rejection, Instant>>,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            connections: Arc::default(),
            addresses: Arc::default(),
            handshakes: Arc::default(),
            lookups: Arc::default(),
            refusals: Arc::new(Semaphore::new(REFUSALS)),
            warned: Mutex::default(),
        }
    }
}

impl Bounds {
    /// A place for one more connection in total.
    pub(crate) fn connection(&self, limits: &Limits) -> Option<Place> {
        Place::among(&self.connections, limits.connections)
    }

    /// A place for one more connection from `ip`, as long as it counts against that address: what
    /// is dropped is free again. Can be asked for at any time, so also when somebody else turns
    /// out to be the client.
    pub(crate) fn of_address(&self, ip: IpAddr, limits: &Limits) -> Option<AddressPlace> {
        let ip = ip.to_canonical();
        if limits.exempt_networks.iter().any(|network| network.contains(&ip)) {
            return Some(AddressPlace::of_nobody());
        }
        let network = network(ip, limits.ipv6_prefix);
        let mut addresses = self.addresses.lock();
        let open = addresses.entry(network).or_default();
        if open.connections >= limits.connections_per_address {
            return None;
        }
        open.connections += 1;
        let addresses = Arc::clone(&self.addresses);
        Some(AddressPlace { counted: Some(Counted { addresses, network }) })
    }

    /// A place for one more TLS handshake, of the connection that has `place`. No address that
    /// counts has more than half of them.
    pub(crate) fn handshake<'p>(
        &self,
        place: &'p AddressPlace,
        limits: &Limits,
    ) -> Option<Handshake<'p>> {
        let among_all = Place::among(&self.handshakes, limits.handshakes)?;
        if let Some(Counted { addresses, network }) = &place.counted {
            let share = limits.handshakes.div_ceil(2);
            let mut addresses = addresses.lock();
            let open = addresses.get_mut(network)?;
            if open.handshakes >= share {
                return None;
            }
            open.handshakes += 1;
        }
        Some(Handshake { _among_all: among_all, place })
    }

    /// A place for one more look-up.
    pub(crate) fn lookup(&self, limits: &Limits) -> Option<Place> {
        Place::among(&self.lookups, limits.lookups)
    }

    /// Leave to tell one more client that it is refused.
    pub(crate) fn refusal(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.refusals).try_acquire_owned().ok()
    }

    /// Whether it is time to warn of refusals for this reason.
    fn warns(&self, why: Rejection) -> bool {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = warned.get(&why).is_some_and(|warned| warned.elapsed() < WARNINGS);
        if !recent {
            warned.insert(why, Instant::now());
        }
        !recent
    }
}

impl Context {
    /// Counts what was refused to `peer`, and warns of it now and then: whoever refuses people at
    /// night has to be told, and must not be told more than peers can bring about.
    pub(super) fn turned_away(&self, why: Rejection, peer: SocketAddr) {
        self.metrics.rejected(why);
        let (what, remedy) = match why {
            Rejection::Limit => ("connections", "limits.connections"),
            Rejection::Address => (
                "connections from one address",
                "limits.connections_per_address; limits.exempt_networks, where many people come \
                 from one address",
            ),
            Rejection::Handshakes => ("TLS handshakes at once", "limits.handshakes"),
            Rejection::Lookups => ("look-ups at once", "limits.lookups; is ZooKeeper slow?"),
            Rejection::Accept => ("connections for the kernel", "LimitNOFILE"),
        };
        if self.bounds.warns(why) {
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
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What one person is taken to come from: an IPv4 address, or the IPv6 network that a site gets and
/// chooses addresses in as it likes.
fn network(ip: IpAddr, ipv6_prefix: u8) -> IpNet {
    match ip {
        IpAddr::V4(_) => ip.into(),
        // The prefix was checked when it was read.
        IpAddr::V6(_) => IpNet::new(ip, ipv6_prefix).unwrap_or_else(|_| ip.into()).trunc(),
    }
}

/// All addresses that have a connection open.
#[derive(Default)]
struct Addresses(Mutex<HashMap<IpNet, Open>>);

#[derive(Default)]
struct Open {
    connections: usize,
    handshakes: usize,
}

impl Addresses {
    fn lock(&self) -> MutexGuard<'_, HashMap<IpNet, Open>> {
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

    /// The network that it counts for, if it counts for one.
    pub(crate) fn network(&self) -> Option<IpNet> {
        self.counted.as_ref().map(|counted| counted.network)
    }
}

struct Counted {
    addresses: Arc<Addresses>,
    /// As it was when the place was taken: the prefix may change.
    network: IpNet,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut addresses = self.addresses.lock();
        let Some(open) = addresses.get_mut(&self.network) else { return };
        open.connections -= 1;
        if open.connections == 0 {
            addresses.remove(&self.network);
            // A crowd that has left takes its room along.
            if addresses.capacity() > ROOM && addresses.len() < addresses.capacity() / 8 {
                let room = addresses.len() * 2;
                addresses.shrink_to(room.max(ROOM / 2));
            }
        }
    }
}

/// A place among the TLS handshakes; free again when dropped.
pub(crate) struct Handshake<'p> {
    _among_all: Place,
    place: &'p AddressPlace,
}

impl Drop for Handshake<'_> {
    fn drop(&mut self) {
        if let Some(Counted { addresses, network }) = &self.place.counted
            && let Some(open) = addresses.lock().get_mut(network)
        {
            open.handshakes -= 1;
        }
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
        let held = [place("192.0.2.1"), place("::ffff:192.0.2.1")];
        assert!(held.iter().all(Option::is_some));
        assert!(place("192.0.2.1").is_none() && place("::ffff:192.0.2.1").is_none());
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
        assert_eq!(bounds.addresses.lock().len(), 2);
        drop((wide, narrow));
        assert!(bounds.addresses.lock().is_empty());
    }

    #[test]
    fn exempt_networks_count_nothing() {
        let bounds = Bounds::default();
        let limits = limits(|limits| {
            limits.connections_per_address = 1;
            limits.handshakes = 4;
            limits.exempt_networks =
                ["192.0.2.0/24", "2001:db8::/32"].map(|net| net.parse().unwrap()).to_vec();
        });
        for text in ["192.0.2.7", "::ffff:192.0.2.7", "2001:db8:ffff::1"] {
            let places: Vec<_> =
                (0..3).map(|_| bounds.of_address(ip(text), &limits).expect("exempt")).collect();
            let handshakes = places.iter().map(|place| bounds.handshake(place, &limits));
            assert!(handshakes.collect::<Vec<_>>().iter().all(Option::is_some), "more than half");
        }
        assert!(bounds.addresses.lock().is_empty());
        let _held = bounds.of_address(ip("192.0.3.1"), &limits).expect("the first");
        assert!(bounds.of_address(ip("192.0.3.1"), &limits).is_none());
    }

    #[test]
    fn half_of_the_handshakes_are_for_others() {
        let (bounds, limits) = (Bounds::default(), limits(|limits| limits.handshakes = 4));
        let connection = |text| bounds.of_address(ip(text), &limits).expect("a place");
        let (greedy, other) = (connection("192.0.2.1"), connection("192.0.2.2"));
        let mut held = vec![bounds.handshake(&greedy, &limits), bounds.handshake(&greedy, &limits)];
        assert!(held.iter().all(Option::is_some));
        assert!(bounds.handshake(&greedy, &limits).is_none(), "its share is used up");
        held.push(bounds.handshake(&other, &limits));
        held.push(bounds.handshake(&other, &limits));
        assert!(held.iter().all(Option::is_some));
        assert!(bounds.handshake(&connection("192.0.2.3"), &limits).is_none(), "all are taken");
        held.remove(0);
        assert!(bounds.handshake(&greedy, &limits).is_some());
        drop(held);
        assert_eq!(bounds.handshakes.load(Ordering::Relaxed), 0);
        assert_eq!(bounds.addresses.lock()[&ip("192.0.2.1").into()].handshakes, 0);
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
        assert!(bounds.warns(Rejection::Address) && bounds.warns(Rejection::Lookups));
        assert!(!bounds.warns(Rejection::Address) && !bounds.warns(Rejection::Lookups));
    }
}
