//! One measurement: what it was of, what came out, and whether it may count.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Result;
use serde::{Serialize, Serializer};

use crate::machine::{Foreign, Look};
use crate::scenarios::Scenario;
use crate::targets::{Kind, Running};

/// A target and how it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    /// Every request asks for another build. Only a target that looks builds up can tell.
    pub(crate) cold: bool,
    /// Zones of its system; 0 is one, where it does not matter.
    pub(crate) zones: usize,
}

impl Entry {
    /// The same builds again and again, where that makes a difference.
    pub(crate) const fn warm(kind: Kind) -> Self {
        Self { kind, cold: false, zones: 0 }
    }

    /// Another build with every request.
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

/// What came out, by name and unit.
pub(crate) type Figures = BTreeMap<&'static str, f64>;

/// Figures, and who else used the machine meanwhile.
pub(crate) struct Measured {
    pub(crate) figures: Figures,
    pub(crate) foreign: Foreign,
}

/// One measurement as it is kept.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Sample {
    #[serde(serialize_with = "as_text")]
    pub(crate) scenario: Scenario,
    #[serde(serialize_with = "as_text")]
    pub(crate) entry: Entry,
    /// From 1.
    pub(crate) round: usize,
    pub(crate) figures: Figures,
    /// What others used of the machine, 0 to 1.
    pub(crate) foreign: f64,
    pub(crate) foreign_by: String,
    /// Others used too much: it does not count.
    pub(crate) refused: bool,
    /// Why there are no figures.
    pub(crate) error: Option<String>,
}

impl Sample {
    /// Without figures yet.
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

/// The time something is measured in.
pub(crate) struct Interval {
    look: Look,
    cpu: f64,
}

/// What happened in an [`Interval`].
pub(crate) struct Spent {
    /// Seconds of processor time of the target.
    pub(crate) cpu: f64,
    pub(crate) foreign: Foreign,
}

impl Interval {
    pub(crate) fn begin(target: &Running) -> Result<Self> {
        Ok(Self { look: Look::take()?, cpu: target.cpu()? })
    }

    pub(crate) fn end(self, target: &Running) -> Result<Spent> {
        let cpu = target.cpu()? - self.cpu;
        Ok(Spent { cpu, foreign: self.look.foreign(&Look::take()?) })
    }
}
