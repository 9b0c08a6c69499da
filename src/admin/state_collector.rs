//! Metrics of live state that is read at each scrape: registration, ZooKeeper, and the gateways of
//! every zone.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use tokio::sync::watch;

use super::encoding::{encode_gauges, encode_metric};
use crate::gateway::health::{GatewayHealth, Health};
use crate::gateway::routing::Router;
use crate::model::component::State;
use crate::registry::{Registration, RegistrationStatus, Registry};
use crate::telemetry::log::LostLines;

/// Reads the live state at each scrape.
pub(crate) struct StateCollector {
    pub(super) state: watch::Receiver<State>,
    pub(super) registration: watch::Receiver<RegistrationStatus>,
    registry: Registry,
    health: Arc<GatewayHealth>,
    lost_lines: LostLines,
    zone: Option<String>,
}

impl StateCollector {
    pub(crate) fn new(
        registration: &Registration,
        registry: Registry,
        router: &Router,
        lost_lines: LostLines,
    ) -> Self {
        Self {
            state: registration.state(),
            registration: registration.status(),
            registry,
            health: Arc::clone(router.health()),
            lost_lines,
            zone: router.zone().map(str::to_owned),
        }
    }
}

/// Returns whether new streams can be served: this gateway is registered as running.
pub(super) fn is_ready(state: State, registration: &RegistrationStatus) -> bool {
    state == State::Running && matches!(registration, RegistrationStatus::Registered(_))
}

impl fmt::Debug for StateCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StateCollector").finish_non_exhaustive()
    }
}

impl Collector for StateCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let encoder = &mut encoder;
        let state = *self.state.borrow();
        let registration = self.registration.borrow().clone();
        for (name, help, value) in [
            (
                "zuul_fingergw_ready",
                "1 if new streams can be served, as /health/ready reports it, else 0",
                is_ready(state, &registration),
            ),
            (
                "zuul_fingergw_zookeeper_connected",
                "1 if this gateway's registry entry is known to exist in ZooKeeper, else 0",
                matches!(registration, RegistrationStatus::Registered(_)),
            ),
            (
                "zuul_fingergw_draining",
                "1 if the gateway is stopping: deregistered, while running streams end, else 0",
                state == State::Stopped,
            ),
        ] {
            encode_metric(encoder, name, help, &ConstGauge::new(i64::from(value)))?;
        }
        encode_metric(
            encoder,
            "zuul_fingergw_log_lines_lost",
            "Log lines that could not be written",
            &ConstCounter::new(self.lost_lines.count()),
        )?;
        encode_gauges(
            encoder,
            "zuul_fingergw_build_info",
            "Always 1; the label has the version of this program",
            "version",
            [(env!("CARGO_PKG_VERSION"), 1)],
        )?;
        encode_gauges(
            encoder,
            "zuul_fingergw_zone_info",
            "Always 1; the label has the zone of this gateway",
            "zone",
            [(self.zone.as_deref().unwrap_or_default(), 1)],
        )?;

        let now = Instant::now();
        let mut zones: BTreeMap<String, [i64; 2]> = BTreeMap::new();
        for gateway in self.registry.gateways().iter() {
            let [all, unhealthy] =
                zones.entry(gateway.zone.clone().unwrap_or_default()).or_default();
            *all += 1;
            let health = self.health.health(gateway, now);
            *unhealthy += i64::from(matches!(health, Health::BackingOff { .. }));
        }
        encode_gauges(
            encoder,
            "zuul_fingergw_zone_gateways",
            "Gateways that are registered, running and have a port, by zone, this one included",
            "zone",
            zones.iter().map(|(zone, [all, _])| (zone.as_str(), *all)),
        )?;
        encode_gauges(
            encoder,
            "zuul_fingergw_zone_gateways_unhealthy",
            "Gateways of zuul_fingergw_zone_gateways that are tried last because they failed here, \
             each for at most 60 s",
            "zone",
            zones.iter().map(|(zone, [_, unhealthy])| (zone.as_str(), *unhealthy)),
        )
    }
}
