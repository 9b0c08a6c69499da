//! Rates per client network: how often something may happen from one address.
//!
//! A token bucket for each network, in the form of the generic cell rate algorithm (ITU-T I.371):
//! of each bucket only the time is stored at which it would be full again.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::addresses::networks;

/// The period of a rate. An address without recent events may spend those of a whole period
/// immediately.
const PERIOD: Duration = Duration::from_secs(60);

/// Networks that are remembered, about 4 MiB. Beyond that those with full buckets are forgotten,
/// and all of them if that frees less than half of the table.
const NETWORKS_MAX: usize = 65_536;

/// One rate, counted for every network on its own.
#[derive(Default)]
pub(crate) struct RateLimiter {
    /// When the bucket of a network is full again.
    full_at: Mutex<HashMap<IpNet, Instant>>,
}

impl RateLimiter {
    /// Takes one event from the buckets of `ip`: of its own network and, for IPv6, of the wider
    /// ones. Returns whether all of them had one left; if not, nothing is taken.
    pub(crate) fn take(
        &self,
        ip: IpAddr,
        ipv6_prefix: u8,
        per_minute: usize,
        now: Instant,
    ) -> bool {
        let mut full_at = self.lock();
        let next = |full_at: &HashMap<IpNet, Instant>, network, share: usize| {
            let per_minute = u32::try_from(per_minute.saturating_mul(share)).unwrap_or(u32::MAX);
            let full = full_at.get(&network).map_or(now, |full| (*full).max(now));
            full + PERIOD / per_minute.max(1)
        };
        if networks(ip, ipv6_prefix)
            .any(|(network, share)| next(&full_at, network, share) > now + PERIOD)
        {
            return false;
        }
        for (network, share) in networks(ip, ipv6_prefix) {
            let next = next(&full_at, network, share);
            full_at.insert(network, next);
        }
        if full_at.len() > NETWORKS_MAX {
            full_at.retain(|_, full| *full > now);
            if full_at.len() > NETWORKS_MAX / 2 {
                full_at.clear();
            }
            full_at.shrink_to_fit();
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpNet, Instant>> {
        // The map is whole between any two statements.
        self.full_at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// How many of 1,000 events from `ip` in one moment are let through.
    fn burst(rates: &RateLimiter, address: &str, now: Instant) -> usize {
        (0..1000).filter(|_| rates.take(ip(address), 64, 60, now)).count()
    }

    #[test]
    fn minute_in_one_moment_and_then_the_rate() {
        let (rates, start) = (RateLimiter::default(), Instant::now());
        assert_eq!(burst(&rates, "192.0.2.1", start), 60);
        assert_eq!(burst(&rates, "192.0.2.2", start), 60, "another address has its own");
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(burst(&rates, "192.0.2.1", start + Duration::from_millis(999)), 0);
        assert_eq!(burst(&rates, "192.0.2.1", after(1)), 1);
        assert_eq!(burst(&rates, "192.0.2.1", after(11)), 10);
        assert_eq!(burst(&rates, "192.0.2.1", after(3600)), 60, "no more than a minute is saved");
    }

    #[test]
    fn wider_ipv6_networks_have_twice_as_much_each() {
        let (rates, now) = (RateLimiter::default(), Instant::now());
        let spent = |networks: std::ops::Range<u32>, of: &str| -> usize {
            networks.map(|n| burst(&rates, &of.replace('#', &format!("{n:02x}")), now)).sum()
        };
        assert_eq!(spent(0..1, "2001:db8:0:#::1"), 60, "a /64");
        assert_eq!(spent(0..16, "2001:db8:0:#::2"), 60, "its /56 has twice as much");
        assert_eq!(spent(1..16, "2001:db8:0:#00::1"), 120, "its /48 four times as much");
        assert_eq!(spent(1..2, "2001:db8:#::1"), 60, "another /48");
    }

    #[test]
    fn table_is_bounded() {
        let (rates, now) = (RateLimiter::default(), Instant::now());
        let address = |number: u32| IpAddr::from(number.to_be_bytes());
        for number in 0..200_000 {
            assert!(rates.take(address(number), 64, 60, now));
            assert!(rates.lock().len() <= NETWORKS_MAX);
        }
    }

    #[test]
    fn full_buckets_are_forgotten_first() {
        let (rates, now) = (RateLimiter::default(), Instant::now());
        let address = |number: u32| IpAddr::from(number.to_be_bytes());
        for number in 0..60_000 {
            rates.take(address(number), 64, 60, now);
        }
        let later = now + Duration::from_secs(2);
        assert_eq!(burst(&rates, "192.0.2.1", later), 60);
        for number in 100_000..106_000 {
            rates.take(address(number), 64, 60, later);
        }
        assert!(rates.lock().len() < 10_000, "the table was full");
        assert_eq!(burst(&rates, "192.0.2.1", later), 0);
    }
}
