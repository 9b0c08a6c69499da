//! The client: what people's finger clients do, many at a time. Always plain; TLS is between
//! gateways.
//!
//! Everything here closes a connection behind the other side. So no local port is left in TIME_WAIT
//! at this end, and some ten thousand ports last for any number of requests.

mod bulk;
mod burst;
mod quiet;
mod requests;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::role::{Driver, runtime, say};
use crate::statistics::Spread;

/// Longer than anything but a fault; a stream that takes longer counts as failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the driver can ask for. Each has an answer of its own.
#[derive(Serialize, Deserialize)]
pub(crate) enum Job {
    /// A stream for each build, all at once, read as fast as possible.
    Bulk { address: SocketAddr, builds: Vec<String> },
    /// Clients that ask for one build after the other, round and round or each once.
    Requests {
        address: SocketAddr,
        builds: Vec<String>,
        /// Ends when each build has been asked for.
        once: bool,
        clients: usize,
        /// Ends then, if there are builds left.
        milliseconds: u64,
        /// What each log is to be, in bytes.
        bytes: usize,
    },
    /// A stream for each build, opened a few at a time and left open.
    Open { address: SocketAddr, builds: Vec<String>, at_once: usize },
    /// The next line on each open stream.
    Lines,
    /// The end of each open stream.
    Ends,
    /// A stream for each build, all connected at one moment, each read to its end.
    Burst { address: SocketAddr, builds: Vec<String>, bytes: usize },
}

/// Of [`Job::Bulk`].
#[derive(Serialize, Deserialize)]
pub(crate) struct Bulk {
    pub(crate) bytes: u64,
    /// From the first byte of any stream to the last of all.
    pub(crate) seconds: f64,
}

/// Of [`Job::Requests`].
#[derive(Serialize, Deserialize)]
pub(crate) struct Requests {
    /// Served a second, as long as there was time and there were builds left: whoever is waiting for
    /// the last ones then is no longer load.
    pub(crate) rate: f64,
    /// Served as they should be.
    pub(crate) served: usize,
    pub(crate) failed: usize,
    /// From the connect to the first byte.
    pub(crate) first_byte: Spread,
    /// From the connect to the end.
    pub(crate) whole: Spread,
}

/// Of [`Job::Open`].
#[derive(Serialize, Deserialize)]
pub(crate) struct Opened {
    pub(crate) open: usize,
    pub(crate) seconds: f64,
    /// From the connect to the first byte.
    pub(crate) first_byte: Spread,
}

/// Of [`Job::Lines`], first: lines may come.
#[derive(Serialize, Deserialize)]
pub(crate) struct Ready;

/// Of [`Job::Lines`], when they have come.
#[derive(Serialize, Deserialize)]
pub(crate) struct Lines {
    /// How many streams got theirs.
    pub(crate) received: usize,
    /// From the executor's write to the client's read.
    pub(crate) delay: Spread,
    /// From the first line's write to the last one's read.
    pub(crate) seconds: f64,
}

/// Of [`Job::Ends`].
#[derive(Serialize, Deserialize)]
pub(crate) struct Ends {
    /// How many streams ended as they should.
    pub(crate) clean: usize,
}

/// Of [`Job::Burst`].
#[derive(Serialize, Deserialize)]
pub(crate) struct Burst {
    pub(crate) served: usize,
    /// Whose connection was refused.
    pub(crate) refused: usize,
    /// Whose log came not, not whole, or not in time.
    pub(crate) failed: usize,
    /// From the first connect to the last end of a log.
    pub(crate) seconds: f64,
    /// From the first connect to each first byte.
    pub(crate) first_byte: Spread,
}

/// Does jobs until the driver ends.
pub(crate) fn run() -> Result<()> {
    runtime(1)?.block_on(async {
        let mut driver = Driver::new();
        let mut open = quiet::Streams::default();
        while let Some(job) = driver.job().await? {
            match job {
                Job::Bulk { address, builds } => say(bulk::run(address, &builds))?,
                Job::Requests { address, builds, once, clients, milliseconds, bytes } => {
                    let time = Duration::from_millis(milliseconds);
                    let ask = requests::Ask { address, builds: &builds, once, bytes, time };
                    say(Ok(ask.run(clients)))?;
                }
                Job::Open { address, builds, at_once } => {
                    say(Ok(open.open(address, builds, at_once).await))?;
                }
                Job::Lines => {
                    let lines = open.lines(|| say(Ok(Ready))).await;
                    say(lines)?;
                }
                Job::Ends => say(Ok(open.ends().await))?,
                Job::Burst { address, builds, bytes } => {
                    say(burst::run(address, builds, bytes).await)?;
                }
            }
        }
        Ok(())
    })
}
