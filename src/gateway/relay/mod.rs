//! Copies a log from an established upstream connection to the client.
//!
//! A log that comes slowly is read into a buffer and written; one that comes in bulk between two
//! plain connections goes through a pipe in the kernel ([`splice`]). An idle stream holds neither.
//!
//! Bytes go one way only. The client's end of input is never forwarded: an executor takes it for a
//! client that left and ends the stream (`zuul/lib/log_streamer.py`). A build may be silent for
//! hours, so the wait for the next byte of a log has no deadline unless the configuration sets one.
//! TCP keepalive finds peers that vanish meanwhile.

pub(crate) mod client_waits;
mod context;
mod end_reason;
pub(crate) mod splice;
#[cfg(test)]
mod tests;
mod timeouts;

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::task::consume_budget;
use tokio::time::{self, Sleep, sleep};

pub(crate) use self::context::RelayContext;
pub(crate) use self::end_reason::EndReason;
use self::splice::PooledPipe;
use super::transport::buffer_pool::Chunk;
use super::transport::connection::{BULK_READ, Connection, UNACKED_FEW, read_size};

/// How long a stream runs before keepalive is enabled: eight system calls, which a short log does
/// without.
const KEEPALIVE_DELAY: Duration = Duration::from_millis(250);

/// Interval between two checks of what the client of an idle stream has not acknowledged.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// How long a stream keeps its pipe while the client takes nothing. There are few pipes.
const PIPE_STALL: Duration = Duration::from_secs(1);

/// Copies the log, which begins with `first`, until one side ends or the gateway aborts its
/// streams. Closes neither connection.
pub(crate) async fn run(
    upstream: &mut Connection,
    first: Chunk,
    client: &mut Connection,
    cx: &RelayContext<'_>,
) -> EndReason {
    let mut relay = Relay {
        cx,
        is_bulk: false,
        is_send_buffer_bounded: false,
        keepalive_on: false,
        keepalive_delay: None,
        wait: None,
    };
    let mut timeout = timeouts::stream_timeout(cx);
    tokio::select! {
        biased;
        () = cx.abort.cancelled() => EndReason::Stopped,
        end = relay.copy(upstream, first, client) => end,
        end = poll_fn(|cx| timeout.as_mut().map_or(Poll::Pending, |timeout| timeout.as_mut().poll(cx))) => end,
    }
}

/// A relay in progress. Every idle stream holds one.
struct Relay<'a> {
    cx: &'a RelayContext<'a>,
    /// The log comes in bulk: the next bytes go through a pipe.
    is_bulk: bool,
    /// The kernel's send buffer for the client is bounded.
    is_send_buffer_bounded: bool,
    keepalive_on: bool,
    /// Ends when keepalive is due.
    keepalive_delay: Option<Pin<Box<Sleep>>>,
    /// The client of this stream does not take what was written, or may not have taken it.
    wait: Option<Box<ClientWait<'a>>>,
}

/// Completes when a stream that waits for its client must end.
type WriteDeadline<'a> = Pin<Box<dyn Future<Output = EndReason> + Send + 'a>>;

/// A client that has not acknowledged what the kernel holds for it.
struct ClientWait<'a> {
    /// The unacknowledged bytes when the wait began, and the bytes written until then.
    unacked: usize,
    bytes: u64,
    deadline: WriteDeadline<'a>,
    next_check: Pin<Box<Sleep>>,
}

impl<'a> Relay<'a> {
    async fn copy(
        &mut self,
        upstream: &mut Connection,
        first: Chunk,
        client: &mut Connection,
    ) -> EndReason {
        let read_size = read_size(upstream.is_tls(), client.is_tls());
        let can_splice = upstream.plain_tcp().is_some() && client.plain_tcp().is_some();
        let mut chunk = first;
        while !chunk.is_empty() {
            self.is_bulk = can_splice && chunk.len() == read_size;
            // A short log is a single chunk, which fits anyway: one system call less for it.
            if !self.is_send_buffer_bounded && (self.cx.bytes() > 0 || chunk.len() >= BULK_READ) {
                self.is_send_buffer_bounded = true;
                client.bound_send_buffer(self.cx.limits.stream_buffer);
            }
            if let Err(end) = self.forward(client, chunk).await {
                return end;
            }
            chunk = match self.next_chunk(upstream, client, read_size).await {
                Ok(chunk) => chunk,
                Err(end) => return end,
            };
        }
        EndReason::Finished
    }

    /// Waits for the next bytes of the log, which are read unless they go through a pipe. An empty
    /// chunk is the end.
    async fn next_chunk(
        &mut self,
        upstream: &mut Connection,
        client: &mut Connection,
        read_size: usize,
    ) -> Result<Chunk, EndReason> {
        loop {
            if self.is_bulk {
                // Boxed: no idle stream should have room for it.
                Box::pin(self.splice_loop(upstream, client)).await?;
            }
            let is_bulk = self.is_bulk;
            let next = async {
                if is_bulk && let Some(tcp) = upstream.plain_tcp() {
                    // The next read or splice returns the error.
                    let _ = tcp.readable().await;
                    return Ok(None);
                }
                upstream.read_chunk(read_size).await.map(Some)
            };
            // Only for a stream that has run for a moment, so that a short log costs no query.
            let checks_client =
                self.wait.is_some() || (self.keepalive_on && client.may_be_unacked());
            tokio::select! {
                biased;
                next = next => match next {
                    Ok(Some(chunk)) => return Ok(chunk),
                    Ok(None) => {}
                    Err(error) => return Err(EndReason::UpstreamFailed(error)),
                },
                error = client.wait_closed() => return Err(EndReason::ClientLeft(error)),
                end = wait_event(&mut self.wait), if checks_client => match end {
                    Some(end) => return Err(end),
                    None => self.check_client(client),
                },
                () = sleep_once(&mut self.keepalive_delay), if !self.keepalive_on => {
                    self.keepalive_on = true;
                    self.keepalive_delay = None;
                    upstream.enable_keepalive(self.cx.limits.keepalive);
                    client.enable_keepalive(self.cx.limits.keepalive);
                }
            }
        }
    }

    /// Finds out whether the kernel holds much for the client. If so, the stream counts as waiting
    /// until the client has acknowledged some of it. A log that is smaller than the send buffer
    /// never makes a write wait.
    fn check_client(&mut self, client: &mut Connection) {
        let unacked = client.unacked_bytes();
        if unacked <= UNACKED_FEW {
            self.wait = None;
            return;
        }
        if let Some(wait) = &mut self.wait {
            let written = usize::try_from(self.cx.bytes() - wait.bytes).unwrap_or(usize::MAX);
            let acked = wait.unacked.saturating_add(written).saturating_sub(unacked);
            if acked < UNACKED_FEW {
                wait.next_check.as_mut().reset(time::Instant::now() + CHECK_INTERVAL);
                return;
            }
        }
        self.begin_wait(unacked, self.begin_deadline());
    }

    fn begin_wait(&mut self, unacked: usize, deadline: WriteDeadline<'a>) {
        let next_check = Box::pin(sleep(CHECK_INTERVAL));
        let bytes = self.cx.bytes();
        self.wait = Some(Box::new(ClientWait { unacked, bytes, deadline, next_check }));
    }

    fn begin_deadline(&self) -> WriteDeadline<'a> {
        let RelayContext { limits, client_waits, client, .. } = self.cx;
        Box::pin(client_waits.wait_for_client(limits, *client))
    }

    /// Writes `chunk` and flushes it.
    async fn forward(&mut self, client: &mut Connection, chunk: Chunk) -> Result<(), EndReason> {
        let written = poll_fn(|cx| match Pin::new(&mut *client).poll_write(cx, &chunk) {
            Poll::Pending => Poll::Ready(Ok(0)),
            written => written,
        });
        let written = written.await.map_err(|error| EndReason::ClientLeft(Some(error)))?;
        self.add_bytes(written);
        // Copied: other streams get the buffer while the client takes its time.
        let rest = chunk[written..].to_vec();
        drop(chunk);
        self.write_all(client, &rest).await?;
        drop(rest);
        self.with_write_timeout(client.flush()).await
    }

    async fn write_all(
        &mut self,
        client: &mut Connection,
        mut bytes: &[u8],
    ) -> Result<(), EndReason> {
        while !bytes.is_empty() {
            let written = self.with_write_timeout(client.write(bytes)).await?;
            if written == 0 {
                return Err(EndReason::ClientLeft(Some(io::ErrorKind::WriteZero.into())));
            }
            self.add_bytes(written);
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Moves a bulk log through a pipe, if one is free, until the upstream has nothing more at the
    /// moment. Sets [`Self::is_bulk`] to whether that was a lot. If not, the caller must read next.
    async fn splice_loop(
        &mut self,
        upstream: &Connection,
        client: &mut Connection,
    ) -> Result<(), EndReason> {
        self.is_bulk = false;
        let Some(from) = upstream.plain_tcp() else { return Ok(()) };
        let Some(mut pipe) = PooledPipe::acquire() else { return Ok(()) };
        let before = self.cx.bytes();
        loop {
            match pipe.fill(from) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(EndReason::UpstreamFailed(error)),
            }
            match self.empty_pipe(pipe, client).await? {
                Some(emptied) => pipe = emptied,
                None => return Ok(()),
            }
            // Lets other tasks run.
            consume_budget().await;
        }
        self.is_bulk = self.cx.bytes() - before >= BULK_READ as u64;
        Ok(())
    }

    /// Moves what is in `pipe` to the client. Returns the pipe, or `None` if the client has stalled
    /// and the rest was copied, so that another stream could have the pipe meanwhile.
    async fn empty_pipe(
        &mut self,
        mut pipe: PooledPipe,
        client: &mut Connection,
    ) -> Result<Option<PooledPipe>, EndReason> {
        while pipe.len() > 0 {
            let Some(to) = client.plain_tcp() else { return Ok(None) };
            match pipe.empty_into(to) {
                Ok(0) => return Err(EndReason::ClientLeft(Some(io::ErrorKind::WriteZero.into()))),
                Ok(moved) => {
                    client.add_written(moved);
                    self.add_bytes(moved);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut deadline = self.take_write_deadline();
                    tokio::select! {
                        biased;
                        // The next `empty_into` returns the error.
                        _ = to.writable() => {}
                        end = &mut deadline => return Err(end),
                        () = sleep(PIPE_STALL), if pipe.may_be_copied() => {
                            let unacked = client.unacked_bytes();
                            self.begin_wait(unacked, deadline);
                            let rest = pipe.into_bytes().map_err(EndReason::UpstreamFailed)?;
                            self.write_all(client, &rest).await?;
                            return Ok(None);
                        }
                    }
                }
                Err(error) => return Err(EndReason::ClientLeft(Some(error))),
            }
        }
        Ok(Some(pipe))
    }

    /// Does `step`, which may have to wait for the client: up to the write deadline, and until the
    /// stream is evicted.
    async fn with_write_timeout<T>(
        &mut self,
        step: impl Future<Output = io::Result<T>>,
    ) -> Result<T, EndReason> {
        let mut step = pin!(step);
        let result = match poll_fn(|cx| Poll::Ready(step.as_mut().poll(cx))).await {
            Poll::Ready(result) => result,
            // Boxed: no idle stream should have room for it.
            Poll::Pending => {
                let mut deadline = self.take_write_deadline();
                let waiting = async {
                    tokio::select! {
                        biased;
                        result = step => Ok(result),
                        end = &mut deadline => Err(end),
                    }
                };
                Box::pin(waiting).await?
            }
        };
        result.map_err(|error| EndReason::ClientLeft(Some(error)))
    }

    /// The deadline of the current wait, or of a new one.
    fn take_write_deadline(&mut self) -> WriteDeadline<'a> {
        let wait = self.wait.take();
        wait.map_or_else(|| self.begin_deadline(), |wait| wait.deadline)
    }

    /// Counts bytes written to the client.
    fn add_bytes(&self, bytes: usize) {
        let bytes = bytes as u64;
        self.cx.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.cx.metrics.bytes_sent(bytes);
    }
}

/// Completes when the stream must end, or with `None` when it is time to check the client:
/// immediately while the stream does not wait for it.
fn wait_event(wait: &mut Option<Box<ClientWait<'_>>>) -> impl Future<Output = Option<EndReason>> {
    poll_fn(|cx| {
        let Some(wait) = wait else { return Poll::Ready(None) };
        if let Poll::Ready(end) = wait.deadline.as_mut().poll(cx) {
            return Poll::Ready(Some(end));
        }
        wait.next_check.as_mut().poll(cx).map(|()| None)
    })
}

/// Completes [`KEEPALIVE_DELAY`] after the first call with this `timer`.
async fn sleep_once(timer: &mut Option<Pin<Box<Sleep>>>) {
    timer.get_or_insert_with(|| Box::pin(sleep(KEEPALIVE_DELAY))).await;
}
