//! Clients that request short logs in sequence.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::{PATIENCE, Requests};
use crate::statistics::Spread;

pub(super) struct RequestLoad<'a> {
    pub(super) address: SocketAddr,
    pub(super) builds: &'a [String],
    pub(super) once: bool,
    pub(super) bytes: usize,
    pub(super) time: Duration,
}

/// Waits of one client, in nanoseconds.
#[derive(Default)]
struct Waits {
    first_byte: Vec<u64>,
    whole: Vec<u64>,
    /// The number of logs that ended within the time.
    in_time: usize,
    failed: usize,
}

impl RequestLoad<'_> {
    pub(super) fn run(&self, clients: usize) -> Requests {
        let next = AtomicUsize::new(0);
        let start = Instant::now();
        let all: Vec<Waits> = thread::scope(|scope| {
            let threads: Vec<_> =
                (0..clients).map(|_| scope.spawn(|| self.client(start, &next))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("no panic in the thread"))
                .collect()
        });
        let seconds = start.elapsed().min(self.time).as_secs_f64();
        let in_time: usize = all.iter().map(|waits| waits.in_time).sum();
        let failed = all.iter().map(|waits| waits.failed).sum();
        let (first_byte, whole): (Vec<_>, Vec<_>) =
            all.into_iter().map(|waits| (waits.first_byte, waits.whole)).unzip();
        Requests {
            rate: in_time as f64 / seconds,
            served: whole.iter().map(Vec::len).sum(),
            failed,
            first_byte: Spread::of(first_byte.concat()),
            whole: Spread::of(whole.concat()),
        }
    }

    fn client(&self, start: Instant, next: &AtomicUsize) -> Waits {
        let (mut waits, mut buffer) = (Waits::default(), vec![0; 64 * 1024]);
        while start.elapsed() < self.time {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if self.once && number >= self.builds.len() {
                break;
            }
            let build = &self.builds[number % self.builds.len()];
            match self.request(build, &mut buffer) {
                Ok((first_byte, whole)) => {
                    waits.first_byte.push(first_byte);
                    waits.whole.push(whole);
                    waits.in_time += usize::from(start.elapsed() <= self.time);
                }
                Err(_) => waits.failed += 1,
            }
        }
        waits
    }

    /// The waits for the first byte and for the end.
    fn request(&self, build: &str, buffer: &mut [u8]) -> io::Result<(u64, u64)> {
        let start = Instant::now();
        let mut stream = TcpStream::connect_timeout(&self.address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(format!("{build}\n").as_bytes())?;
        let (mut bytes, mut first_byte) = (0, 0);
        loop {
            let count = stream.read(buffer)?;
            if bytes == 0 {
                first_byte = nanoseconds(start);
            }
            if count == 0 {
                break;
            }
            bytes += count;
        }
        if bytes != self.bytes {
            return Err(io::Error::other("not the log of the build"));
        }
        Ok((first_byte, nanoseconds(start)))
    }
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
