//! Failed TLS handshakes with gateways that the registry knows.
//!
//! Port scanners fail all the time and are worth no line. A gateway of a zone that fails again and
//! again is somebody's mistake: a certificate, an authority, a clock. It is named, once.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::lookup_host;
use tokio::time::timeout;
use tracing::warn;

use crate::model::component::Gateway;

/// Failures in a row that are no accident.
const REPEATED: u32 = 2;

/// How long the addresses of the gateways are believed. Peers that fail on purpose make us ask the
/// name servers no more often than this.
const KEEP_ADDRESSES: Duration = Duration::from_secs(60);

/// For one name, which is asked for behind a failure, when nobody waits.
const NAME_PATIENCE: Duration = Duration::from_secs(5);

/// Gateways whose failures are remembered. More than that are forgotten together, which costs
/// no more than a second warning.
const REMEMBERED: usize = 1024;

/// What has gone wrong with gateways we know.
#[derive(Default)]
pub(crate) struct Familiar {
    failures: Mutex<HashMap<Who, u32>>,
    addresses: tokio::sync::Mutex<Addresses>,
}

/// Which gateway, and who dialed.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Who {
    WeDialed(String, u16),
    DialedUs(IpAddr),
}

#[derive(Default)]
struct Addresses {
    asked: Option<Instant>,
    zones: Arc<BTreeMap<IpAddr, String>>,
}

impl Familiar {
    /// Notes that dialing `gateway` got no TLS session.
    pub(crate) fn dialing_failed(&self, gateway: &Gateway, error: &(dyn fmt::Display + Sync)) {
        let Gateway { hostname, port, zone, .. } = gateway;
        if self.fails_again(Who::WeDialed(hostname.clone(), *port)) {
            let zone = zone.as_deref().unwrap_or_default().escape_default();
            let hostname = hostname.escape_default();
            warn!(
                %zone, gateway = %format_args!("{hostname}:{port}"), %error,
                "TLS with this gateway fails again and again: compare its certificate and tls.ca \
                 with ours (zuul-fingergw check on both hosts)"
            );
        }
    }

    /// Notes that it did.
    pub(crate) fn dialed(&self, gateway: &Gateway) {
        self.forget(&Who::WeDialed(gateway.hostname.clone(), gateway.port));
    }

    /// Notes that `peer` got no TLS session, which matters if it is one of `gateways`, which are those
    /// that have reason to come.
    pub(crate) async fn greeting_failed(
        &self,
        peer: IpAddr,
        gateways: &[Gateway],
        error: &(dyn fmt::Display + Sync),
    ) {
        let peer = peer.to_canonical();
        let zones = self.addresses(gateways).await;
        let Some(zone) = zones.get(&peer) else { return };
        if self.fails_again(Who::DialedUs(peer)) {
            let zone = zone.escape_default();
            warn!(
                %zone, %peer, %error,
                "a gateway of this zone gets no TLS session with us, again and again: compare its \
                 certificate and tls.ca with ours (zuul-fingergw check on both hosts)"
            );
        }
    }

    /// Notes that `peer` got one.
    pub(crate) fn greeted(&self, peer: IpAddr) {
        self.forget(&Who::DialedUs(peer.to_canonical()));
    }

    /// Whether this is the failure that is told.
    fn fails_again(&self, who: Who) -> bool {
        let mut failures = self.lock();
        if failures.len() >= REMEMBERED && !failures.contains_key(&who) {
            failures.clear();
        }
        let count = failures.entry(who).or_default();
        *count = count.saturating_add(1);
        *count == REPEATED
    }

    fn forget(&self, who: &Who) {
        self.lock().remove(who);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Who, u32>> {
        // The map is whole between any two statements.
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The addresses of `gateways` with their zones. Whoever comes while another one asks for them
    /// takes what there is.
    async fn addresses(&self, gateways: &[Gateway]) -> Arc<BTreeMap<IpAddr, String>> {
        let Ok(mut known) = self.addresses.try_lock() else { return Arc::default() };
        // None at all means that the registry has not been read yet.
        let are_known = !gateways.is_empty();
        if are_known && known.asked.is_none_or(|asked| asked.elapsed() > KEEP_ADDRESSES) {
            known.asked = Some(Instant::now());
            let mut zones = BTreeMap::new();
            for gateway in gateways {
                let Some(zone) = &gateway.zone else { continue };
                let asked = lookup_host((gateway.hostname.as_str(), gateway.port));
                let Ok(Ok(found)) = timeout(NAME_PATIENCE, asked).await else { continue };
                zones.extend(found.map(|at| (at.ip().to_canonical(), zone.clone())));
            }
            known.zones = Arc::new(zones);
        }
        Arc::clone(&known.zones)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gateway(hostname: &str, zone: &str) -> Gateway {
        Gateway { hostname: hostname.into(), port: 7979, zone: Some(zone.into()), tls: true }
    }

    #[tokio::test]
    async fn only_the_second_failure_in_a_row_is_told() {
        let familiar = Familiar::default();
        let who = || Who::WeDialed("gw".to_owned(), 79);
        let told: Vec<_> = (0..4).map(|_| familiar.fails_again(who())).collect();
        assert_eq!(told, [false, true, false, false]);
        familiar.forget(&who());
        let told: Vec<_> = (0..3).map(|_| familiar.fails_again(who())).collect();
        assert_eq!(told, [false, true, false], "it worked in between");
    }

    #[tokio::test]
    async fn memory_is_bounded() {
        let familiar = Familiar::default();
        for port in 0..3000 {
            familiar.fails_again(Who::WeDialed("gw".to_owned(), port));
            assert!(familiar.lock().len() <= REMEMBERED);
        }
    }

    #[tokio::test]
    async fn addresses_are_those_of_gateways_in_zones_and_are_kept() {
        let familiar = Familiar::default();
        assert!(familiar.addresses(&[]).await.is_empty(), "not known yet");
        let gateways = [gateway("192.0.2.1", "west"), gateway("2001:db8::1", "east")];
        let zones = familiar.addresses(&gateways).await;
        let at = |address: &str| zones.get(&address.parse().expect("an address")).cloned();
        assert_eq!(at("192.0.2.1").as_deref(), Some("west"));
        assert_eq!(at("2001:db8::1").as_deref(), Some("east"));
        assert_eq!(at("192.0.2.2"), None);
        assert_eq!(familiar.addresses(&[]).await.len(), 2, "not asked again yet");
    }
}
