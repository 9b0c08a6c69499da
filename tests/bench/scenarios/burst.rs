//! Everybody at one moment.

use anyhow::Result;

use crate::client::{Burst, Job};
use crate::lab::Lab;
use crate::log::{Log, SHORT};
use crate::sample::{Figures, Interval, Measured};
use crate::targets::Running;

pub(super) async fn measure(clients: usize, target: &Running, lab: &mut Lab) -> Result<Measured> {
    let builds = target.builds(Log::Short(SHORT), clients).await?;
    let interval = Interval::begin(target)?;
    let job = Job::Burst { address: target.address, builds: builds.clone(), bytes: SHORT as usize };
    let burst: Burst = lab.client.ask(&job).await?;
    let spent = interval.end(target)?;
    target.forget(&builds).await?;
    Ok(Measured {
        figures: Figures::from([
            ("served", burst.served as f64),
            ("refused", burst.refused as f64),
            ("failed", burst.failed as f64),
            ("seconds", burst.seconds),
            ("first byte p50 ms", burst.first_byte.p50),
            ("first byte p99 ms", burst.first_byte.p99),
        ]),
        foreign: spent.foreign,
    })
}
