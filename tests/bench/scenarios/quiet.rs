//! Streams that are mostly idle: memory, and the delay of a line.

use anyhow::{Result, ensure};

use crate::client::{self, Opened, Ready};
use crate::executor;
use crate::lab::Lab;
use crate::log::Log;
use crate::machine::kernel_memory;
use crate::sample::{Entry, Figures, Interval, Measured};
use crate::targets::Running;

/// Streams that are opened concurrently. Zuul's gateway, whose backlog is 5, loses connections if
/// there are more.
const CONCURRENT: usize = 64;
const ZUUL_CONCURRENT: usize = 4;

/// Lines per second over all streams, each of which gets one.
const PACE: u32 = 1000;

pub(super) async fn measure(
    streams: usize,
    entry: Entry,
    target: &Running,
    lab: &mut Lab,
) -> Result<Measured> {
    let builds = target.builds(Log::Quiet, streams).await?;
    let interval = Interval::begin(target)?;
    let (before, kernel_before) = (target.usage()?, kernel_memory()?);
    let concurrency = if entry.kind.is_zuul() { ZUUL_CONCURRENT } else { CONCURRENT };
    let job = client::Job::Open { address: target.address, builds: builds.clone(), concurrency };
    let opened: Opened = lab.client.run(&job).await?;
    ensure!(opened.open > 0, "no stream was opened");
    let (open, kernel_open) = (target.usage()?, kernel_memory()?);
    let paced = lines(lab, PACE).await?;
    let after = target.usage()?;
    let wave = lines(lab, 0).await?;
    let spent = interval.end(target)?;
    let clean = lab.end_quiet().await?;
    target.forget(&builds).await?;
    let each = |more: f64| more / opened.open as f64;
    Ok(Measured {
        figures: Figures::from([
            ("resident KiB/stream", each(open.resident - before.resident)),
            ("resident after lines KiB/stream", each(after.resident - before.resident)),
            ("resident MiB", open.resident / 1024.0),
            ("kernel KiB/stream", each(kernel_open - kernel_before)),
            ("open", opened.open as f64),
            ("open seconds", opened.seconds),
            ("first byte p50 ms", opened.first_byte.p50),
            ("first byte p99 ms", opened.first_byte.p99),
            ("first byte max ms", opened.first_byte.max),
            ("lines", paced.received as f64),
            ("line p50 ms", paced.delay.p50),
            ("line p99 ms", paced.delay.p99),
            ("line max ms", paced.delay.max),
            ("CPU ms/line", (after.cpu - open.cpu) * 1000.0 / paced.received.max(1) as f64),
            ("wave lines", wave.received as f64),
            ("wave s", wave.seconds),
            ("ended clean", clean as f64),
            ("threads", open.threads),
            ("descriptors", open.descriptors),
        ]),
        foreign: spent.foreign,
    })
}

/// Sends a line on each stream, `pace` per second; 0 is as fast as possible.
pub(super) async fn lines(lab: &mut Lab, pace: u32) -> Result<client::Lines> {
    let _: Ready = lab.client.run(&client::Job::Lines).await?;
    let _: executor::Done = lab.executor.run(&executor::Job::Lines { pace }).await?;
    lab.client.reply().await
}
