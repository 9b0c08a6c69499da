//! One measurement: its target, its figures, and whether it counts.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Result;
use serde::{Serialize, Serializer};

use crate::machine::{Foreign, Snapshot};
use crate::scenarios::Scenario;
use crate::targets::{Kind, Running};

/// A target and the kind of requests to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    /// Every request is for another build, which only targets with lookups can tell.
    pub(crate) cold: bool,
    /// Zones of its system; 0 is one zone, in scenarios that do not vary it.
    pub(crate) zones: usize,
}

impl Entry {
    /// Requests the same builds repeatedly.
    pub(crate) const fn warm(kind: Kind) -> Self {
        Self { kind, cold: false, zones: 0 }
    }

    /// Requests another build every time.
    pub(crate) const fn cold(kind: Kind) -> Self {
        Self { kind, cold: true, zones: 0 }
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        if self.cold {
            f.write_str(", cold")?;
        }
        match self.zones {
            0 => Ok(()),
            1 => f.write_str(", 1 zone"),
            zones => write!(f, ", {zones} zones"),
        }
    }
}

/// Measured values by name and unit.
pub(crate) type Figures = BTreeMap<&'static str, f64>;

/// Figures, and the use of the machine by other processes meanwhile.
pub(crate) struct Measured {
    pub(crate) figures: Figures,
    pub(crate) foreign: Foreign,
}

/// One measurement as it is stored.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Sample {
    #[serde(serialize_with = "as_text")]
    pub(crate) scenario: Scenario,
    #[serde(serialize_with = "as_text")]
    pub(crate) entry: Entry,
    /// From 1.
    pub(crate) round: usize,
    pub(crate) figures: Figures,
    /// The share of the machine that other processes used, 0 to 1.
    pub(crate) foreign: f64,
    pub(crate) foreign_by: String,
    /// Discarded because other processes used too much.
    pub(crate) refused: bool,
    /// Why there are no figures.
    pub(crate) error: Option<String>,
}

impl Sample {
    /// A sample without figures.
    pub(crate) fn empty(scenario: Scenario, entry: Entry, round: usize) -> Self {
        Self {
            scenario,
            entry,
            round,
            figures: Figures::new(),
            foreign: 0.0,
            foreign_by: String::new(),
            refused: false,
            error: None,
        }
    }

    pub(crate) fn counts(&self) -> bool {
        !self.refused && self.error.is_none()
    }
}

fn as_text<S: Serializer>(value: &impl fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

/// The time of a measurement.
pub(crate) struct Interval {
    begin: Snapshot,
    cpu: f64,
}

/// The use of the machine in an [`Interval`].
pub(crate) struct Spent {
    /// CPU seconds of the target.
    pub(crate) cpu: f64,
    pub(crate) foreign: Foreign,
}

impl Interval {
    pub(crate) fn begin(target: &Running) -> Result<Self> {
        Ok(Self { begin: Snapshot::take()?, cpu: target.cpu()? })
    }

    pub(crate) fn end(self, target: &Running) -> Result<Spent> {
        let cpu = target.cpu()? - self.cpu;
        Ok(Spent { cpu, foreign: self.begin.foreign(&Snapshot::take()?) })
    }
}
