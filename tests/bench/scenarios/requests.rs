//! Short logs: their rate and their delay.

use anyhow::{Result, ensure};

use super::Effort;
use crate::client::Requests;
use crate::lab::Lab;
use crate::log::{Log, SHORT};
use crate::sample::{Entry, Figures, Interval, Measured, Spent};
use crate::statistics::Spread;
use crate::targets::Running;

/// The builds that warm requests repeat.
const WARM: usize = 64;

/// Builds for cold requests per second: more than a gateway can serve.
const COLD_PER_SECOND: usize = 12_000;

/// Measures clients that request logs in sequence, as fast as they are served.
pub(super) async fn rate(
    clients: usize,
    entry: Entry,
    target: &Running,
    lab: &mut Lab,
    effort: Effort,
) -> Result<Measured> {
    let milliseconds = u64::from(effort.milliseconds);
    let count =
        if entry.cold { COLD_PER_SECOND * effort.milliseconds as usize / 1000 } else { WARM };
    let builds = target.builds(Log::Short(SHORT), count).await?;
    if !entry.cold && !entry.kind.is_zuul() {
        target.fill_cache(&builds, lab).await?;
    }
    let interval = Interval::begin(target)?;
    let requests = lab.requests(target, &builds, entry.cold, clients, milliseconds).await?;
    let spent = interval.end(target)?;
    target.forget(&builds).await?;
    ensure!(requests.served > 0, "none of {} requests was served", requests.failed);
    Ok(measured(&requests, &requests.whole, spent, &[("requests/s", requests.rate)]))
}

/// Measures one request at a time.
pub(super) async fn first_byte(
    entry: Entry,
    target: &Running,
    lab: &mut Lab,
    effort: Effort,
) -> Result<Measured> {
    // With many zones Zuul's gateway needs about 60 ms per request.
    let count = if entry.zones > 0 { effort.requests / 2 } else { effort.requests };
    let builds = target.builds(Log::Short(SHORT), if entry.cold { count } else { WARM }).await?;
    if !entry.cold && !entry.kind.is_zuul() {
        target.fill_cache(&builds, lab).await?;
    }
    let requested: Vec<String> = builds.iter().cycle().take(count).cloned().collect();
    let interval = Interval::begin(target)?;
    let requests = lab.requests(target, &requested, true, 1, 60_000).await?;
    let spent = interval.end(target)?;
    target.forget(&builds).await?;
    ensure!(requests.served > 0, "none of {count} requests was served");
    Ok(measured(&requests, &requests.first_byte, spent, &[]))
}

fn measured(
    requests: &Requests,
    waits: &Spread,
    spent: Spent,
    more: &[(&'static str, f64)],
) -> Measured {
    let mut figures = Figures::from([
        ("CPU ms/request", spent.cpu * 1000.0 / requests.served as f64),
        ("p50 ms", waits.p50),
        ("p90 ms", waits.p90),
        ("p99 ms", waits.p99),
        ("max ms", waits.max),
        ("failed", requests.failed as f64),
    ]);
    figures.extend(more.iter().copied());
    Measured { figures, foreign: spent.foreign }
}
