//! Sockets in memory, for unit tests with paused time.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf, duplex};
use tokio_util::sync::CancellationToken;

use super::connection::Connection;
use super::socket::Socket;

/// The gateway's end of a connection in memory.
#[derive(Debug)]
pub(super) struct InMemory {
    stream: DuplexStream,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    has_keepalive: AtomicBool,
    unacked_bytes: AtomicUsize,
    /// Cancelled when the peer has reset the connection.
    reset_by_peer: CancellationToken,
    reset_by_us: AtomicBool,
}

/// The peer's end of a connection in memory. Dropping it closes the connection.
pub(crate) struct Peer {
    pub(crate) stream: DuplexStream,
    state: Arc<State>,
}

/// Returns a plain connection that buffers up to `buffer` bytes in each direction.
pub(crate) fn connection(buffer: usize) -> (Connection, Peer) {
    let (ours, stream) = duplex(buffer);
    let state = Arc::<State>::default();
    let socket = Socket::in_memory(InMemory { stream: ours, state: Arc::clone(&state) });
    (Connection::Plain(socket), Peer { stream, state })
}

impl Peer {
    /// Resets the connection.
    pub(crate) fn reset(self) {
        self.state.reset_by_peer.cancel();
    }

    /// Whether the gateway has enabled keepalive.
    pub(crate) fn has_keepalive(&self) -> bool {
        self.state.has_keepalive.load(Ordering::Relaxed)
    }

    /// Whether the gateway has reset the connection.
    pub(crate) fn is_reset(&self) -> bool {
        self.state.reset_by_us.load(Ordering::Relaxed)
    }

    /// Sets the number of bytes that this peer has not acknowledged.
    pub(crate) fn set_unacked_bytes(&self, bytes: usize) {
        self.state.unacked_bytes.store(bytes, Ordering::Relaxed);
    }
}

impl InMemory {
    pub(super) fn enable_keepalive(&self) {
        self.state.has_keepalive.store(true, Ordering::Relaxed);
    }

    pub(super) fn unacked_bytes(&self) -> usize {
        self.state.unacked_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn reset(&self) {
        self.state.reset_by_us.store(true, Ordering::Relaxed);
    }

    pub(super) async fn wait_error(&self) -> io::Error {
        self.state.reset_by_peer.cancelled().await;
        io::ErrorKind::ConnectionReset.into()
    }

    fn check(&self) -> io::Result<()> {
        match self.state.reset_by_peer.is_cancelled() {
            true => Err(io::ErrorKind::ConnectionReset.into()),
            false => Ok(()),
        }
    }
}

impl AsyncRead for InMemory {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for InMemory {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
