//! Clients that connect concurrently.

use anyhow::{Context as _, Result};

use crate::client::{Burst, Job};
use crate::lab::Lab;
use crate::log::{Log, SHORT};
use crate::sample::{Figures, Interval, Measured};
use crate::statistics::Median;
use crate::targets::Running;

/// The most bursts of one measurement: one is too short to measure the use of the machine.
const BURSTS: usize = 7;

/// The seconds after which no further burst is started.
const ENOUGH: f64 = 3.0;

/// Times are medians of the bursts, counts are those of the worst burst.
pub(super) async fn measure(clients: usize, target: &Running, lab: &mut Lab) -> Result<Measured> {
    let builds = target.builds(Log::Short(SHORT), clients * BURSTS).await?;
    let interval = Interval::begin(target)?;
    let mut bursts: Vec<Burst> = Vec::new();
    for builds in builds.chunks(clients) {
        let job =
            Job::Burst { address: target.address, builds: builds.to_vec(), bytes: SHORT as usize };
        bursts.push(lab.client.run(&job).await?);
        if bursts.iter().map(|burst| burst.seconds).sum::<f64>() > ENOUGH {
            break;
        }
    }
    let spent = interval.end(target)?;
    target.forget(&builds).await?;
    let middle = |of: fn(&Burst) -> f64| {
        Median::of(bursts.iter().map(of).collect()).map(|median| median.median)
    };
    let most = |of: fn(&Burst) -> usize| bursts.iter().map(of).max().unwrap_or(0) as f64;
    let served = bursts.iter().map(|burst| burst.served).min().context("a burst")?;
    Ok(Measured {
        figures: Figures::from([
            ("served", served as f64),
            ("refused", most(|burst| burst.refused)),
            ("failed", most(|burst| burst.failed)),
            ("seconds", middle(|burst| burst.seconds).context("a burst")?),
            ("first byte p50 ms", middle(|b| b.first_byte.p50).context("a burst")?),
            ("first byte p99 ms", middle(|b| b.first_byte.p99).context("a burst")?),
        ]),
        foreign: spent.foreign,
    })
}
