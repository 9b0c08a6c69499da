//! Nothing to do: what each target costs just by being there. All of them at once, since waiting
//! disturbs nobody.

use std::time::Duration;

use anyhow::Result;

use super::{Effort, Scenario};
use crate::lab::Lab;
use crate::machine::Look;
use crate::sample::{Entry, Figures, Sample};
use crate::targets::{Around, Running};

/// Behind the start of all, before it counts.
const SETTLE: Duration = Duration::from_secs(3);

pub(crate) async fn round(
    round: usize,
    entries: &[Entry],
    lab: &mut Lab,
    effort: Effort,
) -> Result<Vec<Sample>> {
    let mut targets = Vec::new();
    for entry in entries {
        targets.push((*entry, Running::start(entry.kind, &Around::default(), lab).await?));
    }
    tokio::time::sleep(SETTLE).await;
    let look = Look::take()?;
    let before = targets.iter().map(|(_, t)| t.cpu()).collect::<Result<Vec<_>>>()?;
    tokio::time::sleep(Duration::from_secs(effort.idle)).await;
    let foreign = look.foreign(&Look::take()?);
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
        // Said, but no reason to refuse: others make an idle process neither larger nor busier.
        sample.foreign = foreign.share;
        sample.foreign_by.clone_from(&foreign.by);
        samples.push(sample);
    }
    Ok(samples)
}
