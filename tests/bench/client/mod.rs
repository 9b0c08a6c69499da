//! The client: many concurrent finger clients, always without TLS, which only gateways use.
//!
//! It closes each connection after the other side has. So no local port of the client stays in
//! TIME_WAIT, and about 28,000 ports suffice for any number of requests.

mod bulk;
mod burst;
mod quiet;
mod requests;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::role::{Driver, reply, runtime};
use crate::statistics::Spread;

/// The time limit of a stream, after which it counts as failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// A job from the driver. Each has a reply of its own.
#[derive(Serialize, Deserialize)]
pub(crate) enum Job {
    /// Reads a stream for each build, concurrently and as fast as possible.
    Bulk { address: SocketAddr, builds: Vec<String> },
    /// Lets each client request builds in sequence, repeatedly or each once.
    Requests {
        address: SocketAddr,
        builds: Vec<String>,
        /// End when each build has been requested.
        once: bool,
        clients: usize,
        /// End after this time, even if builds are left.
        milliseconds: u64,
        /// The expected length of each log, in bytes.
        bytes: usize,
    },
    /// Opens a stream for each build and leaves it open.
    Open { address: SocketAddr, builds: Vec<String>, concurrency: usize },
    /// Reads the next line of each open stream.
    Lines,
    /// Reads the end of each open stream.
    Ends,
    /// Connects a stream for each build concurrently, and reads each to its end.
    Burst { address: SocketAddr, builds: Vec<String>, bytes: usize },
}

/// The reply to [`Job::Bulk`].
#[derive(Serialize, Deserialize)]
pub(crate) struct Bulk {
    pub(crate) bytes: u64,
    /// From the first byte of any stream to the last byte of all.
    pub(crate) seconds: f64,
}

/// The reply to [`Job::Requests`].
#[derive(Serialize, Deserialize)]
pub(crate) struct Requests {
    /// Requests served per second while the time lasted and builds were left. Clients that wait for
    /// their last log after that are no full load.
    pub(crate) rate: f64,
    /// Logs with the expected length.
    pub(crate) served: usize,
    pub(crate) failed: usize,
    /// From the connect to the first byte.
    pub(crate) first_byte: Spread,
    /// From the connect to the end.
    pub(crate) whole: Spread,
}

/// The reply to [`Job::Open`].
#[derive(Serialize, Deserialize)]
pub(crate) struct Opened {
    pub(crate) open: usize,
    pub(crate) seconds: f64,
    /// From the connect to the first byte.
    pub(crate) first_byte: Spread,
}

/// The first reply to [`Job::Lines`]: all streams are being read.
#[derive(Serialize, Deserialize)]
pub(crate) struct Ready;

/// The second reply to [`Job::Lines`], after all lines.
#[derive(Serialize, Deserialize)]
pub(crate) struct Lines {
    /// The number of streams that received a line.
    pub(crate) received: usize,
    /// From the executor's write to the client's read.
    pub(crate) delay: Spread,
    /// From the first line's write to the last one's read.
    pub(crate) seconds: f64,
}

/// The reply to [`Job::Ends`].
#[derive(Serialize, Deserialize)]
pub(crate) struct Ends {
    /// The number of streams that ended cleanly.
    pub(crate) clean: usize,
}

/// The reply to [`Job::Burst`].
#[derive(Serialize, Deserialize)]
pub(crate) struct Burst {
    pub(crate) served: usize,
    /// Clients whose connection was refused.
    pub(crate) refused: usize,
    /// Clients without a complete log in time.
    pub(crate) failed: usize,
    /// From the first connect to the last end of a log.
    pub(crate) seconds: f64,
    /// From the first connect to each first byte.
    pub(crate) first_byte: Spread,
}

/// Runs jobs until the driver ends.
pub(crate) fn run() -> Result<()> {
    runtime(1)?.block_on(async {
        let mut driver = Driver::new();
        let mut open = quiet::Streams::default();
        while let Some(job) = driver.job().await? {
            match job {
                Job::Bulk { address, builds } => reply(bulk::run(address, &builds))?,
                Job::Requests { address, builds, once, clients, milliseconds, bytes } => {
                    let time = Duration::from_millis(milliseconds);
                    let load =
                        requests::RequestLoad { address, builds: &builds, once, bytes, time };
                    reply(Ok(load.run(clients)))?;
                }
                Job::Open { address, builds, concurrency } => {
                    reply(Ok(open.open(address, builds, concurrency).await))?;
                }
                Job::Lines => {
                    let lines = open.lines(|| reply(Ok(Ready))).await;
                    reply(lines)?;
                }
                Job::Ends => reply(Ok(open.ends().await))?,
                Job::Burst { address, builds, bytes } => {
                    reply(burst::run(address, builds, bytes).await)?;
                }
            }
        }
        Ok(())
    })
}
