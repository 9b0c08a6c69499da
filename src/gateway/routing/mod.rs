//! Where to: from a build id to the hops worth trying, in order.
//!
//! The rule is Zuul's (`zuul/lib/streamer_utils.py`): the zone of the executor that has the build
//! decides. In our own zone, or with none, the executor is dialed; else a gateway of that zone,
//! and the executor directly if there is none. Beyond upstream: only gateways that can be dialed
//! count, and every one of them is tried before the executor is.

pub(crate) mod access;
pub(crate) mod explain;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use self::access::Access;
use super::health::{GatewayHealth, Rank, RankedHop};
use super::protocol::reply::{Reply, ReplyError};
use crate::model::build_id::BuildId;
use crate::model::build_request::{Build, BuildLocation, Executor};
use crate::model::component::{Gateway, OwnComponent};
use crate::model::hop::Hop;
use crate::model::trace_parent::TraceParent;
use crate::registry::{LookupError, Registry};

/// Resolves builds as seen from one gateway.
pub(crate) struct Resolver {
    registry: Registry,
    own: OwnComponent,
    health: Arc<GatewayHealth>,
}

impl Resolver {
    /// For the gateway that announces `own`.
    pub(crate) fn new(registry: Registry, own: OwnComponent) -> Self {
        Self { registry, own, health: Arc::default() }
    }

    /// Who we are, for people: host name, port and zone.
    pub(crate) fn own(&self) -> String {
        let OwnComponent { hostname, public_port, zone, .. } = &self.own;
        let port = public_port.map(|port| format!(":{port}")).unwrap_or_default();
        let zone = zone.as_deref().map(|zone| format!(" of zone {}", zone.escape_default()));
        format!("{}{port}{}", hostname.escape_default(), zone.unwrap_or_default())
    }

    /// Returns the health of the gateways that have been tried.
    pub(crate) fn health(&self) -> &Arc<GatewayHealth> {
        &self.health
    }

    /// Sorts `hops` by rank.
    pub(crate) fn rank(&self, hops: Vec<Hop>) -> Vec<RankedHop> {
        self.health.rank(hops, self.registry.gateways(), Instant::now())
    }

    /// Where `build` runs. The caller sets the deadline.
    pub(crate) async fn find(&self, build: &BuildId) -> Result<Option<Build>, LookupError> {
        self.registry.find_build(build).await
    }

    /// The hops worth trying for a build of `executor`'s, which comes last. Waits until the gateways
    /// are known where they matter; the caller sets the deadline.
    pub(crate) async fn hops(&self, executor: Executor) -> Vec<Hop> {
        if is_elsewhere(&executor, &self.own) {
            self.registry.wait_for_gateways().await;
        }
        route(executor, &self.own, &self.registry.gateways())
    }

    /// Host name and port that this gateway is registered with.
    pub(crate) fn own_address(&self) -> Option<(&str, u16)> {
        Some((&self.own.hostname, self.own.public_port?))
    }

    /// Whether a gateway is registered with the address of `executor`, so that requests for its
    /// builds may come back.
    pub(crate) fn is_gateway(&self, executor: &Executor) -> bool {
        let Executor { hostname, port, .. } = executor;
        let gateways = self.registry.gateways();
        gateways.iter().any(|gateway| gateway.port == *port && gateway.hostname == *hostname)
    }

    /// The zones that have a gateway that can be dialed, in alphabetical order.
    pub(crate) fn zones_with_gateways(&self) -> BTreeSet<String> {
        self.registry.gateways().iter().filter_map(|gateway| gateway.zone.clone()).collect()
    }

    /// Why ZooKeeper does not answer, as far as is known.
    pub(crate) fn registry_trouble(&self) -> Option<String> {
        self.registry.outage().map(|trouble| trouble.cause)
    }

    /// Our zone.
    pub(crate) fn zone(&self) -> Option<&str> {
        self.own.zone.as_deref()
    }

    /// The hops to try for `build`, at least one, and the trace it is part of; or what the client
    /// is told instead, and why. Where there are rules, `access` is what they give to the client.
    pub(crate) async fn resolve(
        &self,
        build: &BuildId,
        access: Option<&Access<'_>>,
    ) -> Result<(Vec<Hop>, Option<Arc<TraceParent>>), (Reply, String)> {
        let found = match access {
            None => self.find(build).await,
            // Boxed: who has no rules is to pay nothing for those that have.
            Some(access) => Box::pin(self.find_allowed(build, access)).await?,
        };
        match found
            .map(|found| found.map(|Build { location, trace_parent, .. }| (location, trace_parent)))
        {
            Ok(None) => Err((Reply::NotFound, "no queue knows it".to_owned())),
            Ok(Some((BuildLocation::Queued, _))) => {
                Err((Reply::NotStarted, "no executor yet".to_owned()))
            }
            Ok(Some((BuildLocation::Executor(executor), trace_parent))) => {
                let mut hops = self.hops(executor).await;
                // All gateways of a zone are equal; the executor behind them is the last resort.
                let gateways = hops.len() - 1;
                fastrand::shuffle(&mut hops[..gateways]);
                if gateways > 0 {
                    let tried =
                        self.rank(hops).into_iter().filter(|ranked| ranked.rank != Rank::Loop);
                    hops = tried.map(|ranked| ranked.hop).collect();
                }
                Ok((hops, trace_parent))
            }
            Err(LookupError::Unavailable(cause)) => {
                Err((Reply::Error(ReplyError::RegistryUnavailable), cause))
            }
            Err(LookupError::Malformed(fault)) => {
                Err((Reply::Error(ReplyError::MalformedEntry), fault))
            }
        }
    }

    /// Finds `build`; an error if it is there but denied.
    ///
    /// A denial needs ZooKeeper's own answer, as "not found" does, and not that of a kept build:
    /// while ZooKeeper does not answer, both are reported in the same way. The session hides how
    /// long the look-ups took.
    async fn find_allowed(
        &self,
        build: &BuildId,
        access: &Access<'_>,
    ) -> Result<Result<Option<Build>, LookupError>, (Reply, String)> {
        let found = self.registry.find_build(build).await;
        let allowed = match &found {
            Ok(Some(build)) => access.allows(build.tenant.as_deref()),
            // Its tenant cannot be read either.
            Err(LookupError::Malformed(_)) => access.allows(None),
            Ok(None) | Err(LookupError::Unavailable(_)) => Ok(()),
        };
        let Err(denial) = allowed else { return Ok(found) };
        match self.registry.find_build_uncached(build).await {
            Err(away @ LookupError::Unavailable(_)) => Ok(Err(away)),
            _ => Err((Reply::Denied, format!("denied: {denial}"))),
        }
    }
}

/// The gateways to try, then the executor.
fn route(executor: Executor, own: &OwnComponent, gateways: &[Gateway]) -> Vec<Hop> {
    // Most often the executor alone, for as long as its log is watched.
    let mut hops = Vec::with_capacity(1);
    if is_elsewhere(&executor, own) {
        let there = gateways.iter().filter(|gateway| gateway.zone == executor.zone);
        hops.extend(there.filter(|gateway| !leads_to(gateway, own)).cloned().map(Hop::Gateway));
    }
    hops.push(Hop::Executor(executor));
    hops
}

/// Whether `executor` is in a zone that is not ours, so that a gateway of that zone is asked.
fn is_elsewhere(executor: &Executor, own: &OwnComponent) -> bool {
    executor.zone.is_some() && executor.zone != own.zone
}

/// Whether dialing `gateway` would reach the gateway that announces `own`: an entry of another
/// zone with our address is a mistake that would make a circle.
fn leads_to(gateway: &Gateway, own: &OwnComponent) -> bool {
    gateway.hostname == own.hostname && Some(gateway.port) == own.public_port
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn executor(zone: Option<&str>) -> Executor {
        Executor { hostname: "ze01".into(), port: 7900, zone: zone.map(str::to_owned) }
    }

    fn gateway(host: &str, zone: Option<&str>) -> Gateway {
        Gateway { hostname: host.into(), port: 7979, zone: zone.map(str::to_owned), tls: true }
    }

    fn own(zone: Option<&str>) -> OwnComponent {
        OwnComponent {
            hostname: "own".into(),
            public_port: Some(7979),
            zone: zone.map(str::to_owned),
            use_ssl: true,
        }
    }

    fn hosts(hops: &[Hop]) -> Vec<&str> {
        hops.iter().map(|hop| hop.address().0).collect()
    }

    #[test]
    fn the_table_of_zones() {
        let gateways = [
            gateway("west1", Some("west")),
            gateway("east1", Some("east")),
            gateway("west2", Some("west")),
            gateway("nowhere", None),
        ];
        let cases: [(Option<&str>, Option<&str>, &[&str]); 7] = [
            (None, None, &["ze01"]),
            (Some("west"), None, &["ze01"]),
            (Some("west"), Some("west"), &["ze01"]),
            (None, Some("west"), &["west1", "west2", "ze01"]),
            (Some("east"), Some("west"), &["west1", "west2", "ze01"]),
            (Some("west"), Some("east"), &["east1", "ze01"]),
            (Some("west"), Some("north"), &["ze01"]),
        ];
        for (ours, theirs, expected) in cases {
            let hops = route(executor(theirs), &own(ours), &gateways);
            assert_eq!(hosts(&hops), expected, "{ours:?} -> {theirs:?}");
        }
    }

    #[test]
    fn never_to_ourselves() {
        let gateways = [gateway("own", Some("west")), gateway("west1", Some("west"))];
        let hops = route(executor(Some("west")), &own(Some("east")), &gateways);
        assert_eq!(hosts(&hops), ["west1", "ze01"]);
    }

    proptest! {
        /// The executor comes last, once; all before it are gateways of its zone and not of ours.
        #[test]
        fn any_system(
            ours in prop::option::of("[ab]"),
            theirs in prop::option::of("[abc]"),
            zones in prop::collection::vec(prop::option::of("[abc]"), 0..8),
        ) {
            let gateways: Vec<_> =
                zones.iter().map(|zone| gateway("gw", zone.as_deref())).collect();
            let executor = executor(theirs.as_deref());
            let hops = route(executor.clone(), &own(ours.as_deref()), &gateways);
            prop_assert_eq!(hops.last(), Some(&Hop::Executor(executor)));
            let direct = theirs.is_none() || theirs == ours;
            let there = zones.iter().filter(|zone| **zone == theirs).count();
            prop_assert_eq!(hops.len() - 1, if direct { 0 } else { there });
            for hop in &hops[..hops.len() - 1] {
                prop_assert!(matches!(hop, Hop::Gateway(gateway) if gateway.zone == theirs));
            }
        }
    }
}
