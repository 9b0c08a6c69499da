//! A TCP socket, with the socket options and queries that a connection needs.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::ioctl::{Getter, Opcode, ioctl};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tracing::debug;

#[cfg(test)]
use super::in_memory::InMemory;

/// Time between two keepalive probes, and the number of unanswered ones after which the peer counts
/// as gone.
const PROBE_INTERVAL: Duration = Duration::from_secs(10);
const PROBES: u32 = 6;

/// A TCP socket that is closed, or reset, when it is dropped.
#[derive(Debug)]
pub(crate) struct Socket {
    stream: Stream,
    reset_on_drop: bool,
    /// Bytes read and thrown away.
    pub(super) discarded: u32,
    /// An upper bound on the bytes that the peer has not acknowledged.
    pub(super) max_unacked: u32,
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    #[cfg(test)]
    InMemory(InMemory),
}

impl Socket {
    /// A socket to a client: dropping it closes it.
    pub(crate) fn from_client(stream: TcpStream) -> Self {
        Self::new(Stream::Tcp(stream), false)
    }

    /// A socket to a hop: dropping it resets the connection, unless [`Self::close`] is called.
    ///
    /// The side that closes first keeps the pair of ports for a minute (TIME_WAIT, RFC 9293,
    /// section 3.6.1). Clients decide when a stream ends, so they could use up the ports towards
    /// one hop.
    pub(crate) fn from_hop(stream: TcpStream) -> Self {
        Self::new(Stream::Tcp(stream), true)
    }

    #[cfg(test)]
    pub(super) fn in_memory(stream: InMemory) -> Self {
        Self::new(Stream::InMemory(stream), false)
    }

    fn new(stream: Stream, reset_on_drop: bool) -> Self {
        Self { stream, reset_on_drop, discarded: 0, max_unacked: 0 }
    }

    /// Closes the socket without a reset: everything sent arrives.
    pub(crate) fn close(mut self) {
        self.reset_on_drop = false;
    }

    /// Sets whether dropping this resets the connection.
    pub(super) fn set_reset_on_drop(&mut self, reset: bool) {
        self.reset_on_drop = reset;
    }

    /// The TCP stream; `None` for a stream in memory.
    pub(crate) fn tcp(&self) -> Option<&TcpStream> {
        match &self.stream {
            Stream::Tcp(stream) => Some(stream),
            #[cfg(test)]
            Stream::InMemory(_) => None,
        }
    }

    #[cfg(test)]
    fn in_memory_stream(&self) -> Option<&InMemory> {
        match &self.stream {
            Stream::Tcp(_) => None,
            Stream::InMemory(stream) => Some(stream),
        }
    }

    /// Enables keepalive, with the first probe after `idle` of silence. Where a sandbox refuses
    /// that, a peer that vanished is found only when something is sent to it.
    pub(super) fn enable_keepalive(&self, idle: Duration) {
        #[cfg(test)]
        if let Some(stream) = self.in_memory_stream() {
            stream.enable_keepalive();
        }
        let keepalive =
            TcpKeepalive::new().with_time(idle).with_interval(PROBE_INTERVAL).with_retries(PROBES);
        if let Some(stream) = self.tcp()
            && let Err(error) = SockRef::from(stream).set_tcp_keepalive(&keepalive)
        {
            debug!(%error, "cannot enable keepalive");
        }
    }

    /// Sends small writes immediately (TCP_NODELAY).
    ///
    /// # Errors
    /// The system refuses the option.
    pub(crate) fn set_nodelay(&self) -> io::Result<()> {
        self.tcp().map_or(Ok(()), |stream| stream.set_nodelay(true))
    }

    /// Acknowledges what was received immediately, until the next read (TCP_QUICKACK, tcp(7)).
    /// Systems without it delay the acknowledgement.
    pub(crate) fn acknowledge_immediately(&self) {
        if let Some(stream) = self.tcp() {
            let _ = SockRef::from(stream).set_tcp_quickack(true);
        }
    }

    /// Bounds what the kernel holds of bytes that the peer has not acknowledged, its bookkeeping
    /// included. Without a bound it is as much as `net.ipv4.tcp_wmem` allows.
    pub(super) fn bound_send_buffer(&self, bytes: usize) {
        // The kernel doubles the number (socket(7)).
        if let Some(stream) = self.tcp()
            && let Err(error) = SockRef::from(stream).set_send_buffer_size(bytes / 2)
        {
            debug!(%error, "cannot bound the send buffer");
        }
    }

    /// Makes the kernel hold as little as it can of bytes that have not been read.
    pub(super) fn shrink_receive_buffer(&self) {
        if let Some(stream) = self.tcp()
            // The kernel has a minimum, some 2 KiB.
            && let Err(error) = SockRef::from(stream).set_recv_buffer_size(1)
        {
            debug!(%error, "cannot shrink the receive buffer");
        }
    }

    /// The number of bytes written that the peer has not acknowledged; 0 where the system cannot
    /// say.
    #[expect(unsafe_code, reason = "no library offers SIOCOUTQ (tcp(7)) as a safe call")]
    pub(super) fn unacked_bytes(&self) -> usize {
        const SIOCOUTQ: Opcode = 0x5411;
        #[cfg(test)]
        if let Some(stream) = self.in_memory_stream() {
            return stream.unacked_bytes();
        }
        let Some(stream) = self.tcp() else { return 0 };
        // SAFETY: SIOCOUTQ of a TCP socket writes one int, the type that this `Getter` has room
        // for.
        let bytes = unsafe { ioctl(stream, Getter::<SIOCOUTQ, i32>::new()) };
        bytes.ok().and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or_default()
    }

    /// Whether the connection has failed: by a reset, or because the peer does not answer.
    pub(super) fn has_failed(&self) -> bool {
        self.tcp().is_some_and(|stream| !matches!(stream.take_error(), Ok(None)))
    }

    /// Waits until the connection fails. Returns the error, if it is known.
    pub(super) async fn wait_error(&self) -> Option<io::Error> {
        #[cfg(test)]
        if let Some(stream) = self.in_memory_stream() {
            return Some(stream.wait_error().await);
        }
        let stream = self.tcp()?;
        loop {
            if let Err(error) = stream.ready(Interest::ERROR).await {
                return Some(error);
            }
            match stream.take_error() {
                // Clears the readiness, so that the next wait really waits.
                Ok(None) => {
                    let blocks = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
                    let _ = stream.try_io(Interest::ERROR, blocks);
                }
                Ok(error) => return error,
                Err(error) => return Some(error),
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if !self.reset_on_drop {
            return;
        }
        // Where a sandbox refuses the option, the connection is closed instead.
        if let Some(stream) = self.tcp() {
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
        }
        #[cfg(test)]
        if let Some(stream) = self.in_memory_stream() {
            stream.reset();
        }
    }
}

macro_rules! with_stream {
    ($self:ident, $stream:ident => $call:expr) => {
        match &mut $self.get_mut().stream {
            Stream::Tcp($stream) => $call,
            #[cfg(test)]
            Stream::InMemory($stream) => $call,
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        with_stream!(self, stream => Pin::new(stream).poll_read(cx, buffer))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        with_stream!(self, stream => Pin::new(stream).poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        with_stream!(self, stream => Pin::new(stream).poll_write_vectored(cx, bytes))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        with_stream!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        with_stream!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}
