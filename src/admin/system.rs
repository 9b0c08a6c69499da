//! What is known at the moment of a scrape and need not be counted: our state, ZooKeeper, the
//! gateways of every zone.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use tokio::sync::watch;

use crate::registry::component::State;
use crate::registry::{Registry, Standing};

/// Looks at the live state.
pub(super) struct System {
    pub(super) state: watch::Receiver<State>,
    pub(super) standing: watch::Receiver<Standing>,
    pub(super) components: Registry,
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
        let mut zones: BTreeMap<String, i64> = BTreeMap::new();
        for gateway in self.components.gateways().iter() {
            *zones.entry(gateway.zone.clone().unwrap_or_default()).or_default() += 1;
        }
        let mut gateways = encoder.encode_descriptor(
            "zuul_fingergw_zone_gateways",
            "Gateways that can be dialed, by zone",
            None,
            MetricType::Gauge,
        )?;
        for (zone, count) in zones {
            let label = [("zone", zone.as_str())];
            ConstGauge::new(count).encode(gateways.encode_family(&label)?)?;
        }
        Ok(())
    }
}
