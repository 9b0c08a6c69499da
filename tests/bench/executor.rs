//! The executor: a log streamer with generated logs.
//!
//! It speaks Zuul's protocol: it reads a line with the build's UUID, sends the log, and closes the
//! connection at its end. Zuul's own, in Python, would be the bottleneck of all measurements.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::fs::{MemfdFlags, memfd_create, sendfile};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::clock;
use crate::log::{LINE, Log};
use crate::role::{Driver, reply, runtime};

/// A job from the driver.
#[derive(Serialize, Deserialize)]
pub(crate) enum Job {
    /// Sends one line on each idle stream.
    Lines {
        /// Lines per second over all streams; 0 is as fast as possible.
        pace: u32,
    },
    /// Ends all idle streams.
    End,
}

/// The reply to each job.
#[derive(Serialize, Deserialize)]
pub(crate) struct Done {
    /// The number of idle streams.
    pub(crate) streams: usize,
}

/// The listen backlog; the kernel lowers it to net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// The bytes of a bulk log that are sent again and again. They fit into a processor's cache, so
/// that the relay is measured and not the machine's memory.
const PIECE: usize = 1 << 20;

/// The open idle streams.
type Quiet = Arc<Mutex<Vec<TcpStream>>>;

/// Listens, sends the address to the driver, and serves until the driver ends.
pub(crate) fn run() -> Result<()> {
    runtime(2)?.block_on(serve())
}

async fn serve() -> Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    socket.listen(BACKLOG)?;
    let listener = TcpListener::from_std(socket.into())?;
    reply(Ok(listener.local_addr()?))?;
    let bulk = Arc::new(bulk_file().context("a file in memory")?);
    let quiet = Quiet::default();
    tokio::spawn(accept(listener, bulk, Arc::clone(&quiet)));

    let mut driver = Driver::new();
    while let Some(job) = driver.job().await? {
        let mut streams = std::mem::take(&mut *quiet.lock().expect("no panic under it"));
        let done = Done { streams: streams.len() };
        match job {
            Job::Lines { pace } => {
                lines(&mut streams, pace).await?;
                quiet.lock().expect("no panic under it").append(&mut streams);
            }
            Job::End => drop(streams),
        }
        reply(Ok(done))?;
    }
    Ok(())
}

async fn accept(listener: TcpListener, bulk: Arc<OwnedFd>, quiet: Quiet) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (bulk, quiet) = (Arc::clone(&bulk), Arc::clone(&quiet));
                // The client reports a connection that fails.
                tokio::spawn(async move { answer(stream, bulk, quiet).await });
            }
            Err(error) => {
                eprintln!("executor: accept: {error}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

async fn answer(mut stream: TcpStream, bulk: Arc<OwnedFd>, quiet: Quiet) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut request = Vec::with_capacity(64);
    while !request.ends_with(b"\n") {
        if stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    match Log::of(&String::from_utf8_lossy(&request)) {
        None => stream.write_all(b"not a build of these measurements\n").await,
        Some(Log::Short(bytes)) => stream.write_all(&vec![b'x'; bytes as usize]).await,
        Some(Log::Bulk(milliseconds)) => {
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            let time = Duration::from_millis(milliseconds.into());
            tokio::task::spawn_blocking(move || send_bulk(&stream, &bulk, time)).await?
        }
        Some(Log::Quiet) => {
            stream.write_all(&line()).await?;
            quiet.lock().expect("no panic under it").push(stream);
            Ok(())
        }
    }
}

fn bulk_file() -> Result<OwnedFd> {
    let file = memfd_create("bulk", MemfdFlags::CLOEXEC)?;
    let text = b"2026-01-01 00:00:00.000000 | localhost | a line of a build's log, sixty-four\n";
    let piece: Vec<u8> = text.iter().copied().cycle().take(PIECE).collect();
    rustix::io::pwrite(&file, &piece, 0)?;
    Ok(file)
}

/// Sends for `time` with sendfile(2), without copying.
fn send_bulk(stream: &std::net::TcpStream, bulk: &OwnedFd, time: Duration) -> io::Result<()> {
    let start = Instant::now();
    while start.elapsed() < time {
        let mut offset = 0;
        while offset < PIECE as u64 {
            sendfile(stream, bulk, Some(&mut offset), PIECE)?;
        }
    }
    Ok(())
}

/// A line that begins with the time when it was sent.
fn line() -> [u8; LINE] {
    let mut line = [b'.'; LINE];
    line[..20].copy_from_slice(format!("{:020}", clock::now()).as_bytes());
    line[LINE - 1] = b'\n';
    line
}

/// The time when a [`line`] was sent.
pub(crate) fn sent(line: &[u8; LINE]) -> Option<u64> {
    std::str::from_utf8(&line[..20]).ok()?.parse().ok()
}

async fn lines(streams: &mut [TcpStream], pace: u32) -> Result<()> {
    // Not in the order in which they were opened.
    fastrand::shuffle(streams);
    let start = Instant::now();
    for (number, stream) in streams.iter_mut().enumerate() {
        if pace > 0 {
            let due = start + Duration::from_secs_f64(number as f64 / f64::from(pace));
            tokio::time::sleep_until(due.into()).await;
        }
        // The client reports a stream that is closed.
        let _ = stream.write_all(&line()).await;
    }
    Ok(())
}
