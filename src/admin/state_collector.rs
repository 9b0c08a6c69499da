//! What is known at the moment of a scrape and need not be counted: our state, ZooKeeper, the
//! gateways of every zone.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use tokio::sync::watch;

use crate::gateway::health::Memory;
use crate::gateway::routing::Resolver;
use crate::model::component::State;
use crate::registry::{Registration, RegistrationStatus, Registry};
use crate::telemetry::log::LostLines;
use crate::telemetry::metrics::definitions;

/// Looks at the live state.
pub(crate) struct System {
    pub(crate) state: watch::Receiver<State>,
    pub(crate) standing: watch::Receiver<RegistrationStatus>,
    pub(crate) components: Registry,
    pub(crate) memory: Arc<Memory>,
    pub(crate) lost_lines: LostLines,
    /// Our own.
    pub(crate) zone: Option<String>,
}

impl System {
    /// Of the gateway that `registration` keeps and `resolver` resolves for.
    pub(crate) fn new(
        registration: &Registration,
        components: Registry,
        resolver: &Resolver,
        lost_lines: LostLines,
    ) -> Self {
        Self {
            state: registration.state(),
            standing: registration.status(),
            components,
            memory: Arc::clone(resolver.memory()),
            lost_lines,
            zone: resolver.zone().map(str::to_owned),
        }
    }
}

/// Whether new streams can be served: our entry stands, we serve, and ZooKeeper answers.
pub(crate) fn is_ready(state: State, standing: &RegistrationStatus) -> bool {
    state == State::Running && matches!(standing, RegistrationStatus::Registered(_))
}

impl fmt::Debug for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("System").finish_non_exhaustive()
    }
}

impl Collector for System {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let (state, standing) = (*self.state.borrow(), self.standing.borrow().clone());
        let registered = matches!(standing, RegistrationStatus::Registered(_));
        for (descriptor, value) in [
            (&definitions::READY, is_ready(state, &standing)),
            (&definitions::ZOOKEEPER_CONNECTED, registered),
            (&definitions::DRAINING, state == State::Stopped),
        ] {
            let gauge = ConstGauge::new(i64::from(value));
            descriptor.encode(&mut encoder, |encoder| gauge.encode(encoder))?;
        }
        let lost = ConstCounter::new(self.lost_lines.count());
        definitions::LOG_LINES_LOST.encode(&mut encoder, |encoder| lost.encode(encoder))?;
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        definitions::BUILD_INFO.encode(&mut encoder, |mut encoder| {
            ConstGauge::new(1i64).encode(encoder.encode_family(&version)?)
        })?;
        let zone = [("zone", self.zone.as_deref().unwrap_or_default())];
        definitions::ZONE_INFO.encode(&mut encoder, |mut encoder| {
            ConstGauge::new(1i64).encode(encoder.encode_family(&zone)?)
        })?;

        // As many as the system has zones.
        let mut zones: BTreeMap<String, [i64; 2]> = BTreeMap::new();
        for gateway in self.components.gateways().iter() {
            let [all, avoided] = zones.entry(gateway.zone.clone().unwrap_or_default()).or_default();
            *all += 1;
            *avoided += i64::from(self.memory.standing(gateway).is_avoided());
        }
        for (index, descriptor) in
            [(0, &definitions::ZONE_GATEWAYS), (1, &definitions::ZONE_GATEWAYS_AVOIDED)]
        {
            descriptor.encode(&mut encoder, |mut encoder| {
                zones.iter().try_for_each(|(zone, counts)| {
                    let label = [("zone", zone.as_str())];
                    ConstGauge::new(counts[index]).encode(encoder.encode_family(&label)?)
                })
            })?;
        }
        Ok(())
    }
}
