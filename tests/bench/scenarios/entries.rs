//! The targets of each scenario.

use super::Scenario;
use crate::sample::Entry;
use crate::targets::{
    HAPROXY, HAPROXY_1, HAPROXY_COPY, HAPROXY_PAIR, HAPROXY_PAIR_RESUMING, Kind, OURS, OURS_PAIR,
};

/// The most idle streams for Zuul's gateway, which has one thread per stream.
const ZUUL_MAX_STREAMS: usize = 3000;

/// The most concurrent clients for Zuul's gateway, whose listen backlog is 5.
const ZUUL_MAX_BURST: usize = 200;

/// The numbers of clients for which cold requests are measured; these need thousands of builds in
/// ZooKeeper.
const COLD_CLIENTS: std::ops::RangeInclusive<usize> = 16..=64;

impl Scenario {
    /// The targets; `also` is the number of further builds of this gateway.
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
                // Concurrent clients request different builds.
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
    /// The same entry for another build of this gateway, if it is one of this gateway.
    fn of(&self, other: usize) -> Option<Self> {
        let kind = match self.kind {
            Kind::Ours(_) => Kind::Ours(other),
            Kind::OursPair(_) => Kind::OursPair(other),
            _ => return None,
        };
        Some(Self { kind, ..*self })
    }
}
