//! Streams that stay open and are mostly idle.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Ends, Lines, Opened, PATIENCE};
use crate::clock;
use crate::executor::sent;
use crate::log::LINE;
use crate::statistics::Spread;

/// The time limit of a line: longer than the executor takes to send all.
const LINES: Duration = Duration::from_secs(40);

#[derive(Default)]
pub(super) struct Streams {
    open: Vec<TcpStream>,
}

impl Streams {
    pub(super) async fn open(
        &mut self,
        address: SocketAddr,
        builds: Vec<String>,
        concurrency: usize,
    ) -> Opened {
        let start = Instant::now();
        let permits = Arc::new(Semaphore::new(concurrency));
        let mut opening = JoinSet::new();
        for build in builds {
            let permits = Arc::clone(&permits);
            opening.spawn(async move {
                let _permit = permits.acquire().await;
                let start = clock::now();
                let opened = timeout(PATIENCE, open(address, &build)).await;
                opened.ok().and_then(Result::ok).map(|stream| (stream, clock::now() - start))
            });
        }
        let mut waits = Vec::new();
        while let Some(opened) = opening.join_next().await {
            if let Ok(Some((stream, wait))) = opened {
                self.open.push(stream);
                waits.push(wait);
            }
        }
        Opened {
            open: waits.len(),
            seconds: start.elapsed().as_secs_f64(),
            first_byte: Spread::of(waits),
        }
    }

    /// Reads a line of each stream, and calls `ready` when all are being read. Streams without a
    /// valid line are closed.
    pub(super) async fn lines(&mut self, ready: impl FnOnce() -> Result<()>) -> Result<Lines> {
        let mut reading = JoinSet::new();
        for mut stream in self.open.drain(..) {
            reading.spawn(async move {
                let sent = timeout(LINES, line(&mut stream)).await.ok()?.ok()?;
                Some((stream, sent, clock::now()))
            });
        }
        // The only worker runs tasks in order: when this one has ended, all others have begun.
        tokio::spawn(async {}).await?;
        ready()?;
        let (mut delays, mut first, mut last) = (Vec::new(), u64::MAX, 0);
        while let Some(read) = reading.join_next().await {
            if let Ok(Some((stream, sent, received))) = read {
                self.open.push(stream);
                delays.push(received.saturating_sub(sent));
                first = first.min(sent);
                last = last.max(received);
            }
        }
        Ok(Lines {
            received: delays.len(),
            delay: Spread::of(delays),
            seconds: last.saturating_sub(first) as f64 / 1e9,
        })
    }

    pub(super) async fn ends(&mut self) -> Ends {
        let mut reading = JoinSet::new();
        for mut stream in self.open.drain(..) {
            reading.spawn(async move {
                let read = timeout(PATIENCE, stream.read(&mut [0; 16])).await;
                matches!(read, Ok(Ok(0)))
            });
        }
        Ends { clean: reading.join_all().await.into_iter().filter(|clean| *clean).count() }
    }
}

async fn open(address: SocketAddr, build: &str) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(format!("{build}\n").as_bytes()).await?;
    line(&mut stream).await?;
    Ok(stream)
}

/// Reads a line and returns when it was sent.
async fn line(stream: &mut TcpStream) -> io::Result<u64> {
    let mut line = [0; LINE];
    stream.read_exact(&mut line).await?;
    sent(&line).ok_or_else(|| io::Error::other("not a line of an idle log"))
}
