//! Streams that are read as fast as possible.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::thread;

use anyhow::{Context as _, Result, bail};
use rustix::net::{RecvFlags, recv};

use super::{Bulk, PATIENCE};
use crate::clock;

/// The bytes of one read.
const READ: usize = 1 << 20;

/// The bytes of one stream, and when its first and last byte were received.
struct StreamResult {
    bytes: u64,
    first: u64,
    last: u64,
}

pub(super) fn run(address: SocketAddr, builds: &[String]) -> Result<Bulk> {
    let streams = thread::scope(|scope| {
        let threads: Vec<_> =
            builds.iter().map(|build| scope.spawn(move || read(address, build))).collect();
        let ends = threads.into_iter().map(|thread| thread.join().expect("no panic in the thread"));
        ends.collect::<Result<Vec<StreamResult>>>()
    })?;
    let first = streams.iter().map(|stream| stream.first).min().context("streams")?;
    let last = streams.iter().map(|stream| stream.last).max().context("streams")?;
    let bytes = streams.iter().map(|stream| stream.bytes).sum();
    Ok(Bulk { bytes, seconds: (last - first) as f64 / 1e9 })
}

/// Reads with MSG_TRUNC: the kernel drops the bytes instead of copying them, which makes the client
/// cheap.
fn read(address: SocketAddr, build: &str) -> Result<StreamResult> {
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
    // Fewer bytes are a reply of a gateway.
    if bytes < READ as u64 {
        bail!("{bytes} bytes instead of a bulk log");
    }
    Ok(StreamResult { bytes, first, last })
}
