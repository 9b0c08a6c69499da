//! Clients that connect concurrently.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Burst, PATIENCE};
use crate::clock;
use crate::statistics::Spread;

/// The outcome of one client; if it was served, when its first byte and its end were received.
enum Outcome {
    Served { first_byte: u64, end: u64 },
    Refused,
    Failed,
}

/// Creates all sockets first, then connects them from one thread.
pub(super) async fn run(address: SocketAddr, builds: Vec<String>, bytes: usize) -> Result<Burst> {
    let sockets: Vec<_> = builds.iter().map(|_| TcpSocket::new_v4()).collect::<io::Result<_>>()?;
    let mut clients = JoinSet::new();
    let start = clock::now();
    for (socket, build) in sockets.into_iter().zip(builds) {
        clients.spawn(async move {
            let served = async { read(socket.connect(address).await?, &build, bytes).await };
            match timeout(PATIENCE, served).await {
                Ok(Ok((first_byte, end))) => Outcome::Served { first_byte, end },
                Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => Outcome::Refused,
                Ok(Err(_)) | Err(_) => Outcome::Failed,
            }
        });
    }
    let (mut first_bytes, mut last, mut refused, mut failed) = (Vec::new(), start, 0, 0);
    for outcome in clients.join_all().await {
        match outcome {
            Outcome::Served { first_byte, end } => {
                first_bytes.push(first_byte - start);
                last = last.max(end);
            }
            Outcome::Refused => refused += 1,
            Outcome::Failed => failed += 1,
        }
    }
    Ok(Burst {
        served: first_bytes.len(),
        refused,
        failed,
        seconds: (last - start) as f64 / 1e9,
        first_byte: Spread::of(first_bytes),
    })
}

async fn read(mut stream: TcpStream, build: &str, bytes: usize) -> io::Result<(u64, u64)> {
    stream.write_all(format!("{build}\n").as_bytes()).await?;
    let mut log = Vec::with_capacity(bytes + 1);
    stream.read_buf(&mut log).await?;
    let first_byte = clock::now();
    while stream.read_buf(&mut log).await? > 0 {}
    if log.len() == bytes {
        Ok((first_byte, clock::now()))
    } else {
        Err(io::Error::other("not the log of the build"))
    }
}
