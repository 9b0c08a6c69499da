//! Streams read as fast as they come.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::thread;

use anyhow::{Context as _, Result, bail};
use rustix::net::{RecvFlags, recv};

use super::{Bulk, PATIENCE};
use crate::clock;

/// Read at once, in bytes.
const READ: usize = 1 << 20;

/// What one stream got, and when its first and last byte came.
struct Got {
    bytes: u64,
    first: u64,
    last: u64,
}

pub(super) fn run(address: SocketAddr, builds: &[String]) -> Result<Bulk> {
    let streams = thread::scope(|scope| {
        let threads: Vec<_> =
            builds.iter().map(|build| scope.spawn(move || read(address, build))).collect();
        let ends = threads.into_iter().map(|thread| thread.join().expect("no panic in it"));
        ends.collect::<Result<Vec<Got>>>()
    })?;
    let first = streams.iter().map(|got| got.first).min().context("streams")?;
    let last = streams.iter().map(|got| got.last).max().context("streams")?;
    let bytes = streams.iter().map(|got| got.bytes).sum();
    Ok(Bulk { bytes, seconds: (last - first) as f64 / 1e9 })
}

/// Reads with MSG_TRUNC: the kernel drops the bytes instead of copying them, so that this end costs
/// as little as can be.
fn read(address: SocketAddr, build: &str) -> Result<Got> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{build}\n").as_bytes())?;
    let mut buffer = vec![0; READ];
    let (mut bytes, mut first, mut last) = (0, 0, 0);
    loop {
        let (_, count) = recv(&stream, &mut buffer[..], RecvFlags::TRUNC)?;
        let now = clock::now();
        if count == 0 {
            break;
        }
        if bytes == 0 {
            first = now;
        }
        last = now;
        bytes += count as u64;
    }
    // Less is one of the gateway's sorry lines.
    if bytes < READ as u64 {
        bail!("{bytes} bytes instead of a log without an end");
    }
    Ok(Got { bytes, first, last })
}
