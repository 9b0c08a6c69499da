//! Counts connections by client address.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;

/// The number of networks for which a table keeps memory, however few there are.
const CAPACITY_MIN: usize = 1024;

/// IPv6 networks of sites of several sizes (RFC 6177), each with a limit: a /56 has twice that of a
/// /64, and a /48 twice that of a /56.
const SITE_PREFIXES: [u8; 3] = [64, 56, 48];

/// Returns the networks whose limits a client at `ip` counts towards, the smallest first, each with
/// the factor by which its limit is larger. The smallest is the IPv4 address, or the IPv6 network
/// of `ipv6_prefix` bits, in which a client may choose its address; then come the wider ones of
/// [`SITE_PREFIXES`].
pub(super) fn networks(ip: IpAddr, ipv6_prefix: u8) -> impl Iterator<Item = (IpNet, usize)> {
    let (own, wider) = match ip {
        IpAddr::V4(_) => (32, [].as_slice()),
        IpAddr::V6(_) => (ipv6_prefix, SITE_PREFIXES.as_slice()),
    };
    let wider = wider.iter().copied().filter(move |site| *site < own);
    std::iter::once(own).chain(wider).enumerate().map(move |(step, prefix)| {
        // The prefix was checked when the configuration was read.
        let network = IpNet::new(ip, prefix).unwrap_or_else(|_| ip.into()).trunc();
        (network, 1 << step)
    })
}

/// A client that limits count by its address.
#[derive(Clone, Copy)]
pub(crate) struct CountedClient {
    pub(crate) ip: IpAddr,
    /// The value of `limits.ipv6_prefix` when the connection began; a reload may change it.
    pub(crate) prefix: u8,
}

impl CountedClient {
    /// The networks that it counts for, as [`networks`] returns them.
    pub(crate) fn networks(self) -> impl Iterator<Item = (IpNet, usize)> {
        networks(self.ip, self.prefix)
    }

    /// The smallest network that it counts for.
    pub(super) fn network(self) -> IpNet {
        self.networks().next().map_or(self.ip.into(), |(network, _)| network)
    }
}

/// The number of open connections of each client network. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct AddressTable(Arc<Mutex<HashMap<IpNet, usize>>>);

impl AddressTable {
    /// Counts one more connection of `client`, unless one of its networks has `limit` times its
    /// share already.
    pub(super) fn try_acquire(&self, client: CountedClient, limit: usize) -> Option<AddressPermit> {
        let mut open = self.lock();
        let is_full = |(network, factor): (IpNet, usize)| {
            let count = open.get(&network).copied().unwrap_or_default();
            count >= limit.saturating_mul(factor)
        };
        if client.networks().any(is_full) {
            return None;
        }
        for (network, _) in client.networks() {
            *open.entry(network).or_default() += 1;
        }
        Some(AddressPermit(Some((client, self.clone()))))
    }

    fn release(&self, client: CountedClient) {
        let mut open = self.lock();
        for (network, _) in client.networks() {
            let Some(count) = open.get_mut(&network) else { continue };
            *count -= 1;
            if *count == 0 {
                open.remove(&network);
            }
        }
        // Shrinks the map after a burst.
        if open.capacity() > CAPACITY_MIN && open.len() < open.capacity() / 8 {
            let capacity = open.len() * 2;
            open.shrink_to(capacity.max(CAPACITY_MIN / 2));
        }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpNet, usize>> {
        // Consistent between any two statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A permit among the connections of one address; released when dropped.
pub(crate) struct AddressPermit(Option<(CountedClient, AddressTable)>);

impl AddressPermit {
    /// The permit of a connection that counts for no address.
    pub(crate) fn uncounted() -> Self {
        Self(None)
    }

    /// The client that the connection counts for, if it counts for one.
    pub(crate) fn client(&self) -> Option<CountedClient> {
        self.0.as_ref().map(|(client, _)| *client)
    }
}

impl Drop for AddressPermit {
    fn drop(&mut self) {
        if let Some((client, table)) = self.0.take() {
            table.release(client);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(ip: &str, prefix: u8) -> CountedClient {
        CountedClient { ip: ip.parse().expect("an address"), prefix }
    }

    fn acquire(table: &AddressTable, ip: &str, limit: usize) -> Option<AddressPermit> {
        table.try_acquire(client(ip, 64), limit)
    }

    #[test]
    fn each_address_has_its_own_limit() {
        let table = AddressTable::default();
        let held = [acquire(&table, "192.0.2.1", 2), acquire(&table, "192.0.2.1", 2)];
        assert!(held.iter().all(Option::is_some));
        assert!(acquire(&table, "192.0.2.1", 2).is_none());
        assert!(acquire(&table, "192.0.2.2", 2).is_some());
        drop(held);
        assert!(acquire(&table, "192.0.2.1", 2).is_some());
        assert!(table.lock().is_empty());
    }

    #[test]
    fn ipv6_addresses_count_by_prefix() {
        let table = AddressTable::default();
        for (prefix, near, far) in [
            (64, "2001:db8::ffff:ffff:ffff:ffff", "2001:db8:0:1::"),
            (128, "2001:db8::1", "2001:db8::2"),
            (48, "2001:db8:0:ffff::1", "2001:db8:1::1"),
            (1, "7fff::", "8000::"),
        ] {
            let _held = table.try_acquire(client("2001:db8::1", prefix), 1).expect("the first");
            assert!(table.try_acquire(client(near, prefix), 1).is_none(), "/{prefix}");
            assert!(table.try_acquire(client(far, prefix), 1).is_some(), "/{prefix}");
        }
        assert!(table.lock().is_empty());
    }

    #[test]
    fn permit_is_released_under_the_prefix_it_was_acquired_with() {
        let table = AddressTable::default();
        let wide = table.try_acquire(client("2001:db8::1", 32), 1);
        let narrow = table.try_acquire(client("2001:db8::1", 128), 1);
        assert_eq!(table.lock().len(), 5, "/32, and /128, /64, /56, /48");
        drop((wide, narrow));
        assert!(table.lock().is_empty());
    }

    /// How many connections of these addresses the table permits together.
    fn count(table: &AddressTable, limit: usize, addresses: impl Iterator<Item = String>) -> usize {
        let permits = addresses.filter_map(|ip| acquire(table, &ip, limit));
        permits.map(std::mem::forget).count()
    }

    #[test]
    fn ipv6_site_has_twice_as_much_for_each_wider_network() {
        let many = |of: &'static str| (0..4096).map(move |n| of.replace('#', &format!("{n:x}")));
        for (of, permitted) in [
            ("2001:db8:0:1::#", 10),
            ("2001:db8:0:#::1", 40),
            ("2001:db8:0:1#::1", 40),
            ("2001:db8:0:ff00::#", 10),
        ] {
            assert_eq!(count(&AddressTable::default(), 10, many(of)), permitted, "{of}");
        }
        let of_56 = (0..256).map(|n| format!("2001:db8:0:{n:x}::1"));
        let table = AddressTable::default();
        assert_eq!(count(&table, 10, of_56), 20);
        assert!(acquire(&table, "2001:db8:1::1", 10).is_some(), "another site");
        assert!(acquire(&table, "192.0.2.1", 10).is_some());
    }

    #[test]
    fn table_shrinks_after_a_burst() {
        let table = AddressTable::default();
        let ip = |number: u32| IpAddr::from(number.to_be_bytes());
        let mut permits: Vec<_> = (0..100_000)
            .map(|number| table.try_acquire(CountedClient { ip: ip(number), prefix: 64 }, 1))
            .collect();
        assert!(table.lock().capacity() >= 100_000);
        permits.truncate(10);
        let open = table.lock();
        assert_eq!(open.len(), 10);
        assert!(open.capacity() <= 2 * CAPACITY_MIN, "{}", open.capacity());
    }
}
