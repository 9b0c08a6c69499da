//! Streams at full speed.

use anyhow::Result;

use super::Effort;
use crate::client::{Bulk, Job};
use crate::lab::Lab;
use crate::log::Log;
use crate::sample::{Figures, Interval, Measured};
use crate::targets::Running;

pub(super) async fn measure(
    streams: usize,
    target: &Running,
    lab: &mut Lab,
    effort: Effort,
) -> Result<Measured> {
    let builds = target.builds(Log::Bulk(effort.milliseconds), streams).await?;
    let interval = Interval::begin(target)?;
    let job = Job::Bulk { address: target.address, builds: builds.clone() };
    let bulk: Bulk = lab.client.run(&job).await?;
    let spent = interval.end(target)?;
    target.forget(&builds).await?;
    let bytes = bulk.bytes as f64;
    Ok(Measured {
        figures: Figures::from([
            ("MB/s", bytes / 1e6 / bulk.seconds),
            ("CPU s/GiB", spent.cpu / (bytes / f64::from(1 << 30))),
        ]),
        foreign: spent.foreign,
    })
}
