//! Who is measured in which scenario.

use super::Scenario;
use crate::sample::Entry;
use crate::targets::{
    HAPROXY, HAPROXY_1, HAPROXY_COPY, HAPROXY_PAIR, HAPROXY_PAIR_RESUMING, Kind, OURS, OURS_PAIR,
};

/// Quiet streams that upstream is given at most: each costs it a thread, and the rest is known.
const ZUUL_MAX_STREAMS: usize = 3000;

/// Clients at one moment that upstream is given at most: it does not serve these.
const ZUUL_MAX_BURST: usize = 200;

/// How many clients must ask at once for cold requests to be worth their while: each wants thousands
/// of builds in ZooKeeper.
const COLD_CLIENTS: std::ops::RangeInclusive<usize> = 16..=64;

impl Scenario {
    /// Whom it is measured on; `also` more binaries of ours are given.
    pub(crate) fn entries(self, also: usize) -> Vec<Entry> {
        let mut entries = match self {
            Self::Bulk { .. } => warm(&[
                Kind::Direct,
                HAPROXY,
                HAPROXY_1,
                HAPROXY_COPY,
                HAPROXY_PAIR,
                Kind::Zuul,
                Kind::ZuulPair,
                OURS,
                OURS_PAIR,
            ]),
            Self::Requests { .. } | Self::FirstByte => warm(&[
                Kind::Direct,
                HAPROXY,
                HAPROXY_1,
                HAPROXY_COPY,
                HAPROXY_PAIR,
                HAPROXY_PAIR_RESUMING,
                Kind::Zuul,
                Kind::ZuulPair,
                OURS,
                OURS_PAIR,
            ]),
            Self::Zones => warm(&[Kind::Zuul, OURS]),
            Self::Quiet { .. } | Self::Burst { .. } => warm(&[
                Kind::Direct,
                HAPROXY,
                HAPROXY_PAIR,
                Kind::Zuul,
                Kind::ZuulPair,
                OURS,
                OURS_PAIR,
            ]),
            Self::Idle | Self::Counts => {
                warm(&[HAPROXY, HAPROXY_PAIR, Kind::Zuul, Kind::ZuulPair, OURS, OURS_PAIR])
            }
        };
        match self {
            Self::Requests { clients } if !COLD_CLIENTS.contains(&clients) => {}
            Self::Requests { .. } | Self::FirstByte | Self::Counts => {
                entries.extend([OURS, OURS_PAIR].map(Entry::cold));
            }
            Self::Zones => {
                entries.push(Entry::cold(OURS));
                let zones = |entry: &Entry| [1, 10, 50, 200].map(|zones| Entry { zones, ..*entry });
                entries = entries.iter().flat_map(zones).collect();
            }
            Self::Quiet { streams } if streams > ZUUL_MAX_STREAMS => {
                entries.retain(|entry| !entry.kind.is_zuul());
            }
            Self::Burst { clients } => {
                // Nobody asks for one and the same at one moment.
                for entry in &mut entries {
                    entry.cold = matches!(entry.kind, Kind::Ours(_) | Kind::OursPair(_));
                }
                entries.retain(|entry| clients <= ZUUL_MAX_BURST || !entry.kind.is_zuul());
            }
            Self::Bulk { .. } | Self::Quiet { .. } | Self::Idle => {}
        }
        let others: Vec<Entry> =
            (1..=also).flat_map(|other| entries.iter().filter_map(move |e| e.of(other))).collect();
        [entries, others].concat()
    }
}

fn warm(kinds: &[Kind]) -> Vec<Entry> {
    kinds.iter().copied().map(Entry::warm).collect()
}

impl Entry {
    /// The same of another binary of ours, if it is one of ours.
    fn of(&self, other: usize) -> Option<Self> {
        let kind = match self.kind {
            Kind::Ours(_) => Kind::Ours(other),
            Kind::OursPair(_) => Kind::OursPair(other),
            _ => return None,
        };
        Some(Self { kind, ..*self })
    }
}
