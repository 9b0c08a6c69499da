//! What a metric is called and what it tells. One of these is all that is said of a metric: what is
//! exported has its words, and so has `docs/metrics.md`.

#![cfg_attr(not(test), expect(dead_code, reason = "a test writes the page with the rest"))]

use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{self, Metric, Registry};

/// A metric, in words.
#[derive(Debug)]
pub(crate) struct Descriptor {
    /// With its unit, without the `_total` that samples of a counter have.
    pub(crate) name: &'static str,
    pub(crate) kind: MetricType,
    pub(crate) unit: Unit,
    /// For people: a sentence without the full stop.
    pub(crate) help: &'static str,
    pub(crate) labels: &'static [Label],
    /// What an operator does when it moves. In the documentation only.
    pub(crate) advice: &'static str,
}

/// What a value is a number of.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unit {
    /// Of these.
    Count(&'static str),
    /// 1 for yes, 0 for no.
    YesNo,
    Seconds,
    /// Seconds since the epoch.
    Time,
    Bytes,
}

/// A label and its values.
#[derive(Debug)]
pub(crate) struct Label {
    pub(crate) name: &'static str,
    pub(crate) values: Values,
}

/// The values that a label may have.
#[derive(Debug)]
pub(crate) enum Values {
    /// These, each with its meaning. All are there from the start.
    These(&'static [(&'static str, &'static str)]),
    /// As many as there are: of what.
    Any(&'static str),
}

impl Unit {
    /// For people.
    #[cfg(test)]
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Count(what) => what,
            Self::YesNo => "0 or 1",
            Self::Seconds => "seconds",
            Self::Time => "seconds since the epoch",
            Self::Bytes => "bytes",
        }
    }

    /// As OpenMetrics knows it; it ends the name.
    fn base(self) -> Option<registry::Unit> {
        match self {
            Self::Count(_) | Self::YesNo => None,
            Self::Seconds | Self::Time => Some(registry::Unit::Seconds),
            Self::Bytes => Some(registry::Unit::Bytes),
        }
    }
}

impl Label {
    /// The values that are there from the start.
    pub(crate) fn values(&self) -> impl Iterator<Item = &'static str> {
        let values: &[_] = match self.values {
            Values::These(values) => values,
            Values::Any(_) => &[],
        };
        values.iter().map(|(value, _)| *value)
    }
}

impl Descriptor {
    /// The values that its label `index` has from the start.
    pub(crate) fn values(&self, index: usize) -> impl Iterator<Item = &'static str> {
        self.labels[index].values()
    }

    /// Whether its label `index` may have this value.
    pub(crate) fn has(&self, index: usize, value: &str) -> bool {
        self.values(index).any(|known| known == value)
    }

    /// Its name without its unit, which the library adds.
    fn stem(&self, unit: Option<&registry::Unit>) -> &'static str {
        let Some(unit) = unit else { return self.name };
        let stem = self.name.strip_suffix(unit.as_str()).and_then(|name| name.strip_suffix('_'));
        stem.unwrap_or(self.name)
    }

    /// Has `registry` tell `metric` by this.
    pub(crate) fn register(&self, registry: &mut Registry, metric: impl Metric) {
        let unit = self.unit.base();
        let stem = self.stem(unit.as_ref());
        match unit {
            Some(unit) => registry.register_with_unit(stem, self.help, unit, metric),
            None => registry.register(stem, self.help, metric),
        }
    }

    /// Tells this, and has `tell` tell the values.
    pub(crate) fn encode(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        tell: impl FnOnce(MetricEncoder<'_>) -> fmt::Result,
    ) -> fmt::Result {
        let unit = self.unit.base();
        let help = format!("{}.", self.help);
        let stem = self.stem(unit.as_ref());
        tell(encoder.encode_descriptor(stem, &help, unit.as_ref(), self.kind)?)
    }
}
