//! Targets without clients. All are measured concurrently, because idle targets do not disturb each
//! other.

use std::time::Duration;

use anyhow::Result;

use super::{Effort, Scenario};
use crate::lab::Lab;
use crate::machine::Snapshot;
use crate::sample::{Entry, Figures, Sample};
use crate::targets::{Running, StartOptions};

/// The time after the start of all targets before the measurement begins.
const SETTLE: Duration = Duration::from_secs(3);

pub(crate) async fn round(
    round: usize,
    entries: &[Entry],
    lab: &mut Lab,
    effort: Effort,
) -> Result<Vec<Sample>> {
    let mut targets = Vec::new();
    for entry in entries {
        targets.push((*entry, Running::start(entry.kind, &StartOptions::default(), lab).await?));
    }
    tokio::time::sleep(SETTLE).await;
    let snapshot = Snapshot::take()?;
    let before = targets.iter().map(|(_, t)| t.cpu()).collect::<Result<Vec<_>>>()?;
    tokio::time::sleep(Duration::from_secs(effort.idle)).await;
    let foreign = snapshot.foreign(&Snapshot::take()?);
    let mut samples = Vec::new();
    for ((entry, target), before) in targets.iter().zip(before) {
        let usage = target.usage()?;
        let minutes = effort.idle as f64 / 60.0;
        let mut sample = Sample::empty(Scenario::Idle, *entry, round);
        sample.figures = Figures::from([
            ("resident MiB", usage.resident / 1024.0),
            ("private MiB", usage.private / 1024.0),
            ("CPU ms/min", (usage.cpu - before) * 1000.0 / minutes),
            ("threads", usage.threads),
            ("descriptors", usage.descriptors),
        ]);
        // Not a reason to discard: other processes do not change an idle one.
        sample.foreign = foreign.share;
        sample.foreign_by.clone_from(&foreign.by);
        samples.push(sample);
    }
    Ok(samples)
}
