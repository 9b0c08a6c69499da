//! Copies a log from the next hop to the client.
//!
//! A log that trickles is read into a buffer and written; one that pours from one plain connection
//! to another goes through a pipe in the kernel. A stream that waits holds neither.
//!
//! Bytes go one way only. The client's end of input is never passed on: an executor takes it for
//! the client's leaving and cuts the stream (`zuul/lib/log_streamer.py`). A build may be silent
//! for hours, so the one wait without a deadline is the one for the next byte of a log that has
//! begun; keepalive probes find peers that vanished meanwhile.

pub(crate) mod splice;
pub(crate) mod stalled_clients;
pub(crate) mod timeouts;

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::consume_budget;
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::Context;
use super::session::stream_table::Listed;
use super::transport::buffer_pool;
use super::transport::buffer_pool::Piece;
use super::transport::connection::{Connection, UNACKNOWLEDGED_FEW};
use crate::tls;

/// A read of this many bytes, between plain connections, shows a log that pours.
const POURS: usize = 16 * 1024;

/// How long a stream that has begun waits until its peers are probed: eight system calls, which a
/// short log does without.
const SILENCE: Duration = Duration::from_millis(250);

/// Between two looks at what the client of a silent stream has not acknowledged.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Added for each write to the bytes that the client may not have acknowledged: more than a TLS record
/// adds to its content.
const OVERHEAD: usize = 64;

/// How a relay went.
pub(crate) struct Relayed {
    /// Handed to the client's connection.
    pub(crate) bytes: u64,
    pub(crate) end: End,
    /// It ended as the first byte did not come in time.
    pub(crate) timed_out: bool,
}

/// Why a relay ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The next hop closed behind a log: it is whole, as far as anybody can tell.
    Finished,
    /// The next hop's connection failed.
    UpstreamFailed(io::Error),
    /// Not one byte came within the deadline, or before the next hop closed. A log has at least its
    /// first line before anybody can ask for it.
    UpstreamSilent,
    /// The client closed TLS without a close_notify, reset, or vanished.
    ClientLeft(Option<io::Error>),
    /// The client took nothing within the write deadline.
    ClientStalled,
    /// The client took nothing for longest of all, and there were too many that took nothing.
    ClientEvicted,
    /// This gateway stops and the grace period is over.
    Stopped,
    /// Not one byte was handed on for `limits.stream_idle`.
    Idle,
    /// It took longer than `limits.stream_total`.
    Overlong,
}

impl End {
    /// Whether the next hop is at fault.
    pub(crate) fn is_upstreams_fault(&self) -> bool {
        matches!(self, Self::UpstreamFailed(_) | Self::UpstreamSilent)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Finished => f.write_str("finished"),
            Self::UpstreamFailed(error) => {
                write!(f, "cut by the next hop: {}", tls::describe(error))
            }
            Self::UpstreamSilent => f.write_str("the next hop said nothing"),
            Self::ClientLeft(None) => f.write_str("client left"),
            Self::ClientLeft(Some(error)) => {
                write!(f, "client left: {}", tls::describe(error))
            }
            Self::ClientStalled => f.write_str("client stopped reading"),
            Self::ClientEvicted => f.write_str("client stopped reading, as too many did"),
            Self::Stopped => f.write_str("stopped"),
            Self::Idle => f.write_str("silent for limits.stream_idle"),
            Self::Overlong => f.write_str("ran for limits.stream_total"),
        }
    }
}

/// What is read at once between connections that speak TLS or do not, in bytes.
pub(crate) fn room(upstream_tls: bool, client_tls: bool) -> usize {
    if upstream_tls || client_tls { buffer_pool::LENGTH } else { POURS }
}

/// What a relay begins with.
pub(crate) enum Begin {
    /// Waiting for the first byte, this long.
    Wait(Duration),
    /// What has been read already, and the error that the read met after it.
    Read(Piece, Option<io::Error>),
}

/// Copies until one side ends or the gateway cuts its streams. Closes neither. Calls `first_byte` when
/// there is one; counts in the list what it has handed on.
pub(crate) async fn run(
    upstream: &mut Connection,
    client: &mut Connection,
    cx: &Context,
    begin: Begin,
    first_byte: impl FnOnce(),
    listed: &Listed,
) -> Relayed {
    let (patience, begun, failure) = match begin {
        Begin::Wait(patience) => (patience, None, None),
        Begin::Read(piece, failure) => (Duration::ZERO, Some(piece), failure),
    };
    let patience_ms = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
    let mut relay = Relay {
        cx,
        listed,
        patience_ms,
        bytes: 0,
        discarded: 0,
        failure,
        pours: false,
        probed: false,
        silence: None,
        bounded: false,
        unacknowledged: 0,
        undelivered: None,
        timed_out: false,
    };
    let mut allowance = timeouts::of(listed, &cx.limits);
    let end = tokio::select! {
        biased;
        () = cx.cut.cancelled() => End::Stopped,
        end = relay.copy(upstream, client, begun, first_byte) => end,
        end = async { allowance.as_mut().expect("asked for only where there is one").await },
            if allowance.is_some() => end,
    };
    Relayed { bytes: relay.bytes, end, timed_out: relay.timed_out }
}

/// A relay under way.
struct Relay<'a> {
    cx: &'a Context,
    listed: &'a Listed,
    /// How long to wait for the first byte. In four bytes, as each quiet stream holds them.
    patience_ms: u32,
    bytes: u64,
    /// Bytes of the client's that nobody wants.
    discarded: u32,
    /// What the last read met behind the bytes that it returned.
    failure: Option<io::Error>,
    /// The log pours: the next bytes go through a pipe at once.
    pours: bool,
    /// Both sides are probed while they are silent.
    probed: bool,
    /// When they are, from the first moment without bytes.
    silence: Option<Pin<Box<Sleep>>>,
    /// The kernel's send buffer towards the client has its bound.
    bounded: bool,
    /// The most that the client may not have acknowledged, in bytes.
    unacknowledged: u32,
    /// The wait for the client of a silent stream, if it has not acknowledged much.
    undelivered: Option<Box<Undelivered<'a>>>,
    /// The first byte did not come in time.
    timed_out: bool,
}

/// Completes when a stream that waits for its client must end.
type MustEnd<'a> = Pin<Box<dyn Future<Output = End> + Send + 'a>>;

/// The wait for a client that has not acknowledged what the kernel holds for it.
struct Undelivered<'a> {
    /// What it had not acknowledged when the wait began, in bytes, and what had been handed on by then.
    unacknowledged: usize,
    handed_on: u64,
    must_end: MustEnd<'a>,
    look: Pin<Box<Sleep>>,
}

/// Completes when the stream must end, or with `None` when it is time to look at the client: the first
/// time immediately.
fn undelivered(wait: &mut Option<Box<Undelivered<'_>>>) -> impl Future<Output = Option<End>> {
    poll_fn(|cx| {
        let Some(wait) = wait else { return Poll::Ready(None) };
        if let Poll::Ready(end) = wait.must_end.as_mut().poll(cx) {
            return Poll::Ready(Some(end));
        }
        wait.look.as_mut().poll(cx).map(|()| None)
    })
}

impl<'a> Relay<'a> {
    async fn copy(
        &mut self,
        upstream: &mut Connection,
        client: &mut Connection,
        mut begun: Option<Piece>,
        first_byte: impl FnOnce(),
    ) -> End {
        let mut first_byte = Some(first_byte);
        loop {
            if let (Connection::Plain(from), true) = (&*upstream, self.pours) {
                tokio::select! {
                    biased;
                    // An error is met by the next read.
                    _ = from.readable() => {}
                    reason = client.departed(&mut self.discarded) => return End::ClientLeft(reason),
                    end = undelivered(&mut self.undelivered), if self.is_to_be_looked_at() => {
                        match end {
                            Some(end) => return end,
                            None => self.look(client),
                        }
                        continue;
                    }
                    () = is_silent(&mut self.silence), if !self.probed => {
                        self.probe(upstream, client);
                        continue;
                    }
                }
                // Boxed: no quiet stream is to have room for it.
                if let Some(end) = Box::pin(self.pour(upstream, client)).await {
                    return end;
                }
            }
            let plain = !upstream.is_tls() && !client.is_tls();
            let room = room(upstream.is_tls(), client.is_tls());
            let patience = (self.bytes == 0).then_some(u64::from(self.patience_ms));
            let read = tokio::select! {
                biased;
                piece = async { begun.take().expect("looked") }, if begun.is_some() => Some(Ok(piece)),
                read = within(patience.map(Duration::from_millis), upstream.read_log(room, &mut self.failure)) => read,
                reason = client.departed(&mut self.discarded) => return End::ClientLeft(reason),
                end = undelivered(&mut self.undelivered), if self.is_to_be_looked_at() => {
                    match end {
                        Some(end) => return end,
                        None => self.look(client),
                    }
                    continue;
                }
                // Neither side has anything to say. Up to the first byte there is a deadline, and a
                // log that has ended already is not silent for long: its end may come as a record of
                // its own.
                () = is_silent(&mut self.silence), if self.bytes > 0 && !self.probed => {
                    self.probe(upstream, client);
                    continue;
                }
            };
            let piece = match read {
                None => {
                    self.timed_out = true;
                    return End::UpstreamSilent;
                }
                Some(Err(error)) => return End::UpstreamFailed(error),
                Some(Ok(piece)) if piece.is_empty() && self.bytes == 0 => {
                    return End::UpstreamSilent;
                }
                Some(Ok(piece)) if piece.is_empty() => return End::Finished,
                Some(Ok(piece)) => piece,
            };
            if let Some(first_byte) = first_byte.take() {
                first_byte();
            }
            // A short log is a single piece, which fits anyway; a system call less for it.
            if !self.bounded && (self.bytes > 0 || piece.len() >= POURS) {
                self.bounded = true;
                client.bound_send_buffer(self.cx.limits.stream_buffer);
            }
            self.pours = plain && piece.len() == room;
            if let Err(end) = self.hand_on(client, piece).await {
                return end;
            }
            if self.pours
                && let Some(end) = Box::pin(self.pour(upstream, client)).await
            {
                return end;
            }
        }
    }

    /// Whether the kernel holds much for the client of a silent stream, or may do so: only for one that
    /// has been silent before, so that a short log does without a look.
    fn is_to_be_looked_at(&self) -> bool {
        self.undelivered.is_some()
            || self.probed && self.unacknowledged as usize > UNACKNOWLEDGED_FEW
    }

    /// Finds out whether the kernel holds much for the client. A stream that does counts as waiting
    /// until the client has acknowledged some of it: with a log that is smaller than the send buffer
    /// no write would wait.
    fn look(&mut self, client: &Connection) {
        let now = client.unacknowledged();
        self.unacknowledged = u32::try_from(now).unwrap_or(u32::MAX);
        if now <= UNACKNOWLEDGED_FEW {
            self.undelivered = None;
            return;
        }
        if let Some(wait) = &mut self.undelivered {
            let since = usize::try_from(self.bytes - wait.handed_on).unwrap_or(usize::MAX);
            let taken = wait.unacknowledged.saturating_add(since).saturating_sub(now);
            if taken < UNACKNOWLEDGED_FEW {
                wait.look.as_mut().reset(Instant::now() + LOOK_AGAIN);
                return;
            }
        }
        self.undelivered = Some(Box::new(Undelivered {
            unacknowledged: now,
            handed_on: self.bytes,
            must_end: self.must_end(),
            look: Box::pin(sleep(LOOK_AGAIN)),
        }));
    }

    fn must_end(&self) -> MustEnd<'a> {
        Box::pin(stalled_clients::wait(self.cx, self.listed.client()))
    }

    /// Sees to it that a side that vanishes while it is silent is found.
    fn probe(&mut self, upstream: &Connection, client: &Connection) {
        self.probed = true;
        self.silence = None;
        let keepalive = self.cx.limits.keepalive;
        upstream.probe(keepalive);
        client.probe(keepalive);
    }

    /// Writes `piece`, on TLS with all that is to be written for it.
    async fn hand_on(&mut self, client: &mut Connection, piece: Piece) -> Result<(), End> {
        let now = poll_fn(|cx| match Pin::new(&mut *client).poll_write(cx, &piece) {
            Poll::Pending => Poll::Ready(Ok(0)),
            written => written,
        });
        let taken = now.await.map_err(|error| End::ClientLeft(Some(error)))?;
        self.count(taken);
        // Copied: while a client takes its time, others get the buffer.
        let rest = piece[taken..].to_vec();
        drop(piece);
        self.write(client, &rest).await?;
        drop(rest);
        self.in_time(client.flush()).await
    }

    async fn write(&mut self, client: &mut Connection, mut bytes: &[u8]) -> Result<(), End> {
        while !bytes.is_empty() {
            let taken = self.in_time(client.write(bytes)).await?;
            if taken == 0 {
                return Err(End::ClientLeft(Some(io::ErrorKind::WriteZero.into())));
            }
            self.count(taken);
            bytes = &bytes[taken..];
        }
        Ok(())
    }

    /// Moves what pours from one plain connection to the other through a pipe, if there is one to
    /// be had, until no more can be moved (`None`) or a side has failed. Whether the log is over
    /// then, the next read shows.
    async fn pour(&mut self, upstream: &Connection, client: &Connection) -> Option<End> {
        self.pours = false;
        let (Connection::Plain(from), Connection::Plain(to)) = (upstream, client) else {
            return None;
        };
        let mut pipe = splice::Lent::take()?;
        let before = self.bytes;
        let end = loop {
            match pipe.fill(from) {
                Ok(0) => return None,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break None,
                Err(error) => break Some(End::UpstreamFailed(error)),
            }
            if let Err(end) = self.drain(&mut pipe, to).await {
                break Some(end);
            }
            // Others want to run, too.
            consume_budget().await;
        };
        self.pours = self.bytes - before >= POURS as u64;
        end
    }

    async fn drain(&mut self, pipe: &mut splice::Lent, to: &TcpStream) -> Result<(), End> {
        while pipe.held() > 0 {
            match pipe.drain(to) {
                Ok(0) => return Err(End::ClientLeft(Some(io::ErrorKind::WriteZero.into()))),
                Ok(moved) => self.count(moved),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.in_time(to.writable()).await?;
                }
                Err(error) => return Err(End::ClientLeft(Some(error))),
            }
        }
        Ok(())
    }

    /// Does a step that may have to wait for the client, up to the write deadline and as long as the
    /// stream need not make way for others.
    async fn in_time<T>(&mut self, step: impl Future<Output = io::Result<T>>) -> Result<T, End> {
        let mut step = pin!(step);
        let done = match poll_fn(|cx| Poll::Ready(step.as_mut().poll(cx))).await {
            Poll::Ready(done) => done,
            // Boxed: no quiet stream is to have room for it.
            Poll::Pending => Box::pin(self.wait(step)).await?,
        };
        done.map_err(|error| End::ClientLeft(Some(error)))
    }

    async fn wait<T>(&mut self, step: Pin<&mut impl Future<Output = T>>) -> Result<T, End> {
        let wait = self.undelivered.take();
        let must_end = wait.map_or_else(|| self.must_end(), |wait| wait.must_end);
        tokio::select! {
            biased;
            done = step => Ok(done),
            end = must_end => Err(end),
        }
    }

    /// Notes bytes that the client's connection has taken.
    fn count(&mut self, bytes: usize) {
        let held = u32::try_from(bytes + OVERHEAD).unwrap_or(u32::MAX);
        self.unacknowledged = self.unacknowledged.saturating_add(held);
        let bytes = bytes as u64;
        self.bytes += bytes;
        self.cx.metrics.sent(bytes);
        self.listed.add(bytes);
    }
}

/// Completes [`SILENCE`] after the first call, unless there are bytes first.
async fn is_silent(silence: &mut Option<Pin<Box<Sleep>>>) {
    silence.get_or_insert_with(|| Box::pin(sleep(SILENCE))).await;
}

/// `future`, or `None` when `patience`, if there is any, is over.
async fn within<T>(patience: Option<Duration>, future: impl Future<Output = T>) -> Option<T> {
    match patience {
        Some(patience) => timeout(patience, future).await.ok(),
        None => Some(future.await),
    }
}
