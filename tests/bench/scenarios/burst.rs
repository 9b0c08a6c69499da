//! Everybody at one moment.

use anyhow::{Context as _, Result};

use crate::client::{Burst, Job};
use crate::lab::Lab;
use crate::log::{Log, SHORT};
use crate::sample::{Figures, Interval, Measured};
use crate::statistics::Median;
use crate::targets::Running;

/// Bursts for one measurement: a single one is over before it can be told who used the machine.
const BURSTS: usize = 7;

/// Seconds that are long enough to tell.
const ENOUGH: f64 = 3.0;

/// The times are medians of some bursts, the counts those of the worst.
pub(super) async fn measure(clients: usize, target: &Running, lab: &mut Lab) -> Result<Measured> {
    let builds = target.builds(Log::Short(SHORT), clients * BURSTS).await?;
    let interval = Interval::begin(target)?;
    let mut bursts: Vec<Burst> = Vec::new();
    for builds in builds.chunks(clients) {
        let job =
            Job::Burst { address: target.address, builds: builds.to_vec(), bytes: SHORT as usize };
        bursts.push(lab.client.ask(&job).await?);
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
