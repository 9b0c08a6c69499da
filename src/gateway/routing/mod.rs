//! Routing: from a build ID to the hops that may have its log, in the order in which they are
//! tried.
//!
//! The rule is Zuul's (`zuul/lib/streamer_utils.py`): the zone of the executor that has the build
//! decides. An executor of our own zone, or without a zone, gets the request directly. For another
//! zone a gateway of that zone gets it, or the executor if there is none. Unlike Zuul's gateway,
//! this one only considers gateways that have a port, and prefers all of them to the executor.

pub(crate) mod access;
pub(crate) mod explain;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use thiserror::Error;

use self::access::{Access, Denial};
use super::health::{GatewayHealth, Rank, RankedHop};
use super::protocol::reply::{ErrorReason, Reply};
use crate::model::build_id::BuildId;
use crate::model::build_request::{Build, BuildLocation, Executor};
use crate::model::component::{Gateway, OwnComponent};
use crate::model::hop::Hop;
use crate::model::trace_parent::TraceParent;
use crate::registry::{LookupError, Registry};

/// Routes requests as seen from one gateway.
pub(crate) struct Router {
    registry: Registry,
    own: OwnComponent,
    health: Arc<GatewayHealth>,
}

impl Router {
    /// Returns the router of the gateway that is registered as `own`.
    pub(crate) fn new(registry: Registry, own: OwnComponent) -> Self {
        Self { registry, own, health: Arc::default() }
    }

    /// Returns host name, port and zone of this gateway, for log lines.
    pub(crate) fn describe_self(&self) -> String {
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
        self.health.retain_registered(self.registry.gateways());
        self.health.rank(hops, Instant::now())
    }

    /// Looks up `build`. The caller sets the deadline.
    pub(crate) async fn find_build(&self, build: &BuildId) -> Result<Option<Build>, LookupError> {
        self.registry.find_build(build).await
    }

    /// Returns the candidate hops for a build of `executor`, which is the last one. Waits until the
    /// gateways are known if the executor is in another zone; the caller sets the deadline.
    pub(crate) async fn candidates(&self, executor: Executor) -> Vec<Hop> {
        if is_in_other_zone(&executor, &self.own) {
            self.registry.wait_for_gateways().await;
        }
        candidates(executor, &self.own, &self.registry.gateways())
    }

    /// Returns the host name and port with which this gateway is registered.
    pub(crate) fn own_address(&self) -> Option<(&str, u16)> {
        Some((&self.own.hostname, self.own.public_port?))
    }

    /// Returns whether a gateway is registered with the address of `executor`, so that requests for
    /// its builds may come back.
    pub(crate) fn is_gateway(&self, executor: &Executor) -> bool {
        let Executor { hostname, port, .. } = executor;
        let gateways = self.registry.gateways();
        gateways.iter().any(|gateway| gateway.port == *port && gateway.hostname == *hostname)
    }

    /// Returns the zones that have a gateway with a port, in alphabetical order.
    pub(crate) fn zones_with_gateways(&self) -> BTreeSet<String> {
        self.registry.gateways().iter().filter_map(|gateway| gateway.zone.clone()).collect()
    }

    /// Returns why ZooKeeper does not answer, if that is known.
    pub(crate) fn registry_outage(&self) -> Option<String> {
        self.registry.outage().map(|outage| outage.cause)
    }

    /// Returns the zone of this gateway.
    pub(crate) fn zone(&self) -> Option<&str> {
        self.own.zone.as_deref()
    }

    /// Returns the hops to try for `build`, at least one, and the trace that it belongs to.
    /// `access` has the rules of the listener, if there are any. The caller sets the deadline.
    ///
    /// # Errors
    /// There is no hop to try.
    pub(crate) async fn route(
        &self,
        build: &BuildId,
        access: Option<&Access<'_>>,
    ) -> Result<(Vec<Hop>, Option<Arc<TraceParent>>), RouteError> {
        let found = match access {
            None => self.find_build(build).await?,
            // Boxed so that listeners without access rules do not pay for its size.
            Some(access) => Box::pin(self.find_allowed(build, access)).await?,
        };
        let Build { location, trace_parent, .. } = found.ok_or(RouteError::NotFound)?;
        let BuildLocation::Executor(executor) = location else {
            return Err(RouteError::NotStarted);
        };
        let mut hops = self.candidates(executor).await;
        // Gateways of the same rank are tried in random order.
        let gateways = hops.len() - 1;
        fastrand::shuffle(&mut hops[..gateways]);
        if gateways > 0 {
            let tried = self.rank(hops).into_iter().filter(|ranked| ranked.rank != Rank::Loop);
            hops = tried.map(|ranked| ranked.hop).collect();
        }
        Ok((hops, trace_parent))
    }

    /// Looks up `build`; an error if the rules deny it.
    ///
    /// A denial needs an answer of ZooKeeper, as "not found" does, and not a cached build: while
    /// ZooKeeper does not answer, both must get the same reply. The session hides how long the
    /// lookups took.
    async fn find_allowed(
        &self,
        build: &BuildId,
        access: &Access<'_>,
    ) -> Result<Option<Build>, RouteError> {
        let found = self.registry.find_build(build).await;
        let allowed = match &found {
            Ok(Some(build)) => access.allows(build.tenant.as_deref()),
            // Its tenant cannot be read either.
            Err(LookupError::Malformed(_)) => access.allows(None),
            Ok(None) | Err(LookupError::Unavailable(_)) => Ok(()),
        };
        let Err(denial) = allowed else { return Ok(found?) };
        match self.registry.find_build_uncached(build).await {
            Err(unavailable @ LookupError::Unavailable(_)) => Err(unavailable.into()),
            _ => Err(RouteError::Denied(denial)),
        }
    }
}

/// Why there is no hop to send a request to.
#[derive(Debug, Error)]
pub(crate) enum RouteError {
    #[error("the build is in no queue")]
    NotFound,
    #[error("no executor has taken the build")]
    NotStarted,
    #[error("denied: {0}")]
    Denied(Denial),
    #[error(transparent)]
    Lookup(#[from] LookupError),
}

impl RouteError {
    /// Returns the reply to the client.
    pub(crate) fn reply(&self) -> Reply {
        match self {
            Self::NotFound => Reply::NotFound,
            Self::NotStarted => Reply::NotStarted,
            Self::Denied(_) => Reply::Denied,
            Self::Lookup(LookupError::Unavailable(_)) => {
                Reply::Error(ErrorReason::RegistryUnavailable)
            }
            Self::Lookup(LookupError::Malformed(_)) => Reply::Error(ErrorReason::MalformedEntry),
        }
    }
}

/// Returns the gateways of the zone of `executor`, except this one, and then the executor.
fn candidates(executor: Executor, own: &OwnComponent, gateways: &[Gateway]) -> Vec<Hop> {
    // Usually the executor alone, and kept as long as the stream.
    let mut hops = Vec::with_capacity(1);
    if is_in_other_zone(&executor, own) {
        let there = gateways.iter().filter(|gateway| gateway.zone == executor.zone);
        hops.extend(there.filter(|gateway| !is_self(gateway, own)).cloned().map(Hop::Gateway));
    }
    hops.push(Hop::Executor(executor));
    hops
}

/// Returns whether `executor` is in another zone, so that gateways of that zone are candidates.
fn is_in_other_zone(executor: &Executor, own: &OwnComponent) -> bool {
    executor.zone.is_some() && executor.zone != own.zone
}

/// Returns whether `gateway` has the address of the gateway that is registered as `own`. An entry
/// of another zone with our address would make a loop.
fn is_self(gateway: &Gateway, own: &OwnComponent) -> bool {
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
    fn zones_of_executor_and_gateway_decide() {
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
            let hops = candidates(executor(theirs), &own(ours), &gateways);
            assert_eq!(hosts(&hops), expected, "{ours:?} -> {theirs:?}");
        }
    }

    #[test]
    fn gateway_with_our_own_address_is_no_candidate() {
        let gateways = [gateway("own", Some("west")), gateway("west1", Some("west"))];
        let hops = candidates(executor(Some("west")), &own(Some("east")), &gateways);
        assert_eq!(hosts(&hops), ["west1", "ze01"]);
    }

    proptest! {
        /// The executor comes last, once; all before it are gateways of its zone and not of ours.
        #[test]
        fn executor_is_last_after_gateways_of_its_zone(
            ours in prop::option::of("[ab]"),
            theirs in prop::option::of("[abc]"),
            zones in prop::collection::vec(prop::option::of("[abc]"), 0..8),
        ) {
            let gateways: Vec<_> =
                zones.iter().map(|zone| gateway("gw", zone.as_deref())).collect();
            let executor = executor(theirs.as_deref());
            let hops = candidates(executor.clone(), &own(ours.as_deref()), &gateways);
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
