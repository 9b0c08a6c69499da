//! What is known at the moment of a scrape and need not be counted: our state, ZooKeeper, the
//! gateways of every zone.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use tokio::sync::watch;

use crate::gateway::memory::Memory;
use crate::registry::component::State;
use crate::registry::{Registry, Standing};

/// Looks at the live state.
pub(super) struct System {
    pub(super) state: watch::Receiver<State>,
    pub(super) standing: watch::Receiver<Standing>,
    pub(super) components: Registry,
    pub(super) memory: Arc<Memory>,
}

impl fmt::Debug for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("System").finish_non_exhaustive()
    }
}

impl Collector for System {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let registered = matches!(*self.standing.borrow(), Standing::Registered(_));
        let draining = *self.state.borrow() == State::Stopped;
        for (name, help, value) in [
            (
                "zuul_fingergw_zookeeper_connected",
                "Whether our entry stands in ZooKeeper",
                registered,
            ),
            ("zuul_fingergw_draining", "Whether the gateway is stopping", draining),
        ] {
            let gauge = ConstGauge::new(i64::from(value));
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        let mut info = encoder.encode_descriptor(
            "zuul_fingergw_build_info",
            "The version of this program",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(1i64).encode(info.encode_family(&version)?)?;

        // As many as the system has zones.
        let mut zones: BTreeMap<String, [i64; 2]> = BTreeMap::new();
        for gateway in self.components.gateways().iter() {
            let [all, avoided] = zones.entry(gateway.zone.clone().unwrap_or_default()).or_default();
            *all += 1;
            *avoided += i64::from(self.memory.standing(gateway).is_avoided());
        }
        for (index, name, help) in [
            (0, "zuul_fingergw_zone_gateways", "Gateways that can be dialed, by zone"),
            (
                1,
                "zuul_fingergw_zone_gateways_avoided",
                "Gateways that come behind the others because they failed, by zone",
            ),
        ] {
            let mut gateways = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (zone, counts) in &zones {
                let label = [("zone", zone.as_str())];
                ConstGauge::new(counts[index]).encode(gateways.encode_family(&label)?)?;
            }
        }
        Ok(())
    }
}
