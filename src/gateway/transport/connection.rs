//! One TCP connection, plain or with TLS, and its two ways to end: gracefully, or aborted by a
//! reset.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::HandshakeKind;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsStream;

use super::buffer_pool::{BUFFER_SIZE, Chunk, PooledBuffer};
use super::read_ahead::ReadAhead;
use super::socket::Socket;
use crate::tls;

/// How long the peer may take to close after we have. A close while bytes of the peer are unread
/// sends a reset, which may overtake the end of the log.
const LINGER: Duration = Duration::from_secs(1);

/// Intervals between two queries of the send queue (SIOCOUTQ): doubled each time.
const QUERY_MIN: Duration = Duration::from_millis(10);
const QUERY_MAX: Duration = Duration::from_secs(1);

/// The most bytes after the request that are read from a client and thrown away. Bytes that come
/// after these turn our close into a reset.
const DISCARDED_MAX: u32 = 1024 * 1024;

/// After this many discarded bytes the client's receive buffer is made as small as the kernel
/// allows, so that the kernel holds little of what comes after [`DISCARDED_MAX`].
const DISCARDED_MANY: u32 = DISCARDED_MAX / 2;

/// A peer counts as having received everything if it has at most this many bytes to acknowledge:
/// the kernel then holds no more for it than for an idle stream.
pub(crate) const UNACKED_FEW: usize = 16 * 1024;

/// Added to the size of each write for the upper bound on what the peer has not acknowledged: more
/// than a TLS record adds to its content.
const WRITE_OVERHEAD: usize = 64;

/// The most that one read returns between two plain connections, in bytes. A read of this size
/// shows that the log comes in bulk.
pub(crate) const BULK_READ: usize = 16 * 1024;

/// The most that one read of a log returns, in bytes, by whether the connections use TLS.
pub(crate) fn read_size(is_upstream_tls: bool, is_client_tls: bool) -> usize {
    if is_upstream_tls || is_client_tls { BUFFER_SIZE } else { BULK_READ }
}

/// A connection to a client or to a hop.
pub(crate) enum Connection {
    Plain(Socket),
    Tls(Box<TlsConnection>),
}

/// A connection with TLS.
pub(crate) struct TlsConnection {
    stream: TlsStream<ReadAhead>,
    /// An error that the last read met after the bytes that it returned.
    read_error: Option<io::Error>,
}

impl Connection {
    /// A connection after its TLS handshake.
    pub(crate) fn tls(stream: impl Into<TlsStream<ReadAhead>>) -> Self {
        Self::Tls(Box::new(TlsConnection { stream: stream.into(), read_error: None }))
    }

    /// The certificates that a TLS peer has presented, its own first; they have been verified.
    pub(crate) fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(tls) => tls.stream.get_ref().1.peer_certificates(),
        }
    }

    /// How the TLS handshake was made; `None` without TLS.
    pub(crate) fn handshake_kind(&self) -> Option<HandshakeKind> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(tls) => tls.stream.get_ref().1.handshake_kind(),
        }
    }

    pub(crate) fn is_tls(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// Whether the peer is a peer gateway, which ends no log without close_notify.
    pub(crate) fn is_peer_gateway(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(tls) => tls::is_peer_gateway(tls.stream.get_ref().1),
        }
    }

    /// The socket of a plain connection.
    pub(crate) fn plain_tcp(&self) -> Option<&TcpStream> {
        match self {
            Self::Plain(socket) => socket.tcp(),
            Self::Tls(_) => None,
        }
    }

    fn socket(&self) -> &Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(tls) => tls.stream.get_ref().0.socket(),
        }
    }

    fn socket_mut(&mut self) -> &mut Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(tls) => tls.stream.get_mut().0.socket_mut(),
        }
    }

    /// Enables TCP keepalive, which finds a peer that vanished while nothing is sent, with the
    /// first probe after `idle` of silence.
    pub(crate) fn enable_keepalive(&self, idle: Duration) {
        self.socket().enable_keepalive(idle);
    }

    /// Bounds what the kernel holds of bytes that the peer has not acknowledged.
    pub(crate) fn bound_send_buffer(&self, bytes: usize) {
        self.socket().bound_send_buffer(bytes);
    }

    /// Counts `bytes` that were written by another way than [`AsyncWrite`].
    pub(crate) fn add_written(&mut self, bytes: usize) {
        let unacked = u32::try_from(bytes + WRITE_OVERHEAD).unwrap_or(u32::MAX);
        let socket = self.socket_mut();
        socket.max_unacked = socket.max_unacked.saturating_add(unacked);
    }

    /// Whether more than [`UNACKED_FEW`] bytes are possibly still unacknowledged. Makes no system
    /// call.
    pub(crate) fn may_be_unacked(&self) -> bool {
        self.socket().max_unacked as usize > UNACKED_FEW
    }

    /// The number of bytes written that the peer has not acknowledged; 0 where the system cannot
    /// say.
    pub(crate) fn unacked_bytes(&mut self) -> usize {
        let socket = self.socket_mut();
        let unacked = socket.unacked_bytes();
        socket.max_unacked = u32::try_from(unacked).unwrap_or(u32::MAX);
        unacked
    }

    /// Closes the connection to a hop that has ended its side, without the reset that a drop sends.
    pub(crate) fn close(mut self) {
        self.socket_mut().set_reset_on_drop(false);
    }

    /// Reads the next bytes of a log, at most `max`; an empty chunk is the end. Holds no buffer
    /// while it waits.
    ///
    /// From TLS it takes all records that are there. An error that it meets after some bytes is
    /// kept for the next call.
    ///
    /// # Errors
    /// The connection failed. A TLS peer that closes without close_notify has ended its log like
    /// any other, because Python's ssl module never sends close_notify; a peer gateway that does so
    /// has died.
    pub(crate) async fn read_chunk(&mut self, max: usize) -> io::Result<Chunk> {
        poll_fn(|cx| self.poll_read_chunk(cx, max)).await
    }

    fn poll_read_chunk(&mut self, cx: &mut Context<'_>, max: usize) -> Poll<io::Result<Chunk>> {
        if let Self::Tls(tls) = self
            && let Some(error) = tls.read_error.take()
        {
            return Poll::Ready(Err(error));
        }
        let mut buffer = PooledBuffer::acquire();
        let max = max.min(buffer.len());
        let mut read_buf = ReadBuf::new(&mut buffer[..max]);
        let length = loop {
            let before = read_buf.filled().len();
            let read = Pin::new(&mut *self).poll_read(cx, &mut read_buf);
            let length = read_buf.filled().len();
            match read {
                Poll::Ready(Ok(())) if self.is_tls() && length > before && length < max => {}
                Poll::Ready(Ok(())) => break length,
                Poll::Pending if length > 0 => break length,
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => {
                    let is_end =
                        error.kind() == io::ErrorKind::UnexpectedEof && !self.is_peer_gateway();
                    match self {
                        Self::Tls(_) if is_end => {}
                        Self::Tls(tls) if length > 0 => tls.read_error = Some(error),
                        _ => return Poll::Ready(Err(error)),
                    }
                    break length;
                }
            }
        };
        Poll::Ready(Ok(Chunk::new(buffer, length)))
    }

    /// Reads and throws away, without a buffer while it waits. Returns the number of bytes, 0 at
    /// the end.
    async fn discard(&mut self) -> io::Result<usize> {
        poll_fn(|cx| {
            let mut buffer = [0; 1024];
            let mut buffer = ReadBuf::new(&mut buffer);
            let read = Pin::new(&mut *self).poll_read(cx, &mut buffer);
            read.map_ok(|()| buffer.filled().len())
        })
        .await
    }

    /// Waits until the peer is gone and throws away what it sends meanwhile. Returns the error that
    /// showed it, if there was one. Can be dropped and called again at any time.
    ///
    /// The end of the peer's input does not mean that the peer has stopped reading: `printf ... |
    /// nc -N` half-closes and goes on reading, and so may a TLS client after its close_notify,
    /// which ends one direction only (RFC 8446, section 6.1). After either only an error shows that
    /// the peer is gone: a reset, or unanswered keepalive probes. A TCP connection that ends
    /// without close_notify is one whose TLS client does not shut TLS down, as zuul-web does not:
    /// that client is gone.
    pub(crate) async fn wait_closed(&mut self) -> Option<io::Error> {
        while self.socket().discarded < DISCARDED_MAX {
            match self.discard().await {
                Ok(0) => break,
                Ok(count) => {
                    let socket = self.socket_mut();
                    let before = socket.discarded;
                    socket.discarded += u32::try_from(count).unwrap_or(DISCARDED_MAX);
                    if before < DISCARDED_MANY && socket.discarded >= DISCARDED_MANY {
                        socket.shrink_receive_buffer();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return None,
                Err(error) => return Some(error),
            }
        }
        self.socket().wait_error().await
    }

    /// Closes the connection after everything sent has arrived, with TLS after a close_notify.
    ///
    /// While the peer does not take what was sent, `deadline` runs; it starts again whenever the
    /// peer has taken some, and at its end the connection is reset. After a close the kernel would
    /// hold what was not delivered, without a bound on the number of such connections.
    pub(crate) async fn close_gracefully<D: Future>(mut self, deadline: impl Fn() -> D) {
        let is_shut_down = tokio::select! {
            biased;
            result = self.shutdown() => result.is_ok(),
            // Boxed, here and below: most clients have taken everything.
            _ = Box::pin(async { deadline().await }) => false,
        };
        if !is_shut_down
            || (self.may_be_unacked() && !Box::pin(self.wait_acked(UNACKED_FEW, deadline)).await)
        {
            self.socket_mut().set_reset_on_drop(true);
            return;
        }
        let peer_closed = async { while matches!(self.discard().await, Ok(1..)) {} };
        // A peer that does not close in time is closed nevertheless.
        let _ = timeout(LINGER, peer_closed).await;
    }

    /// Resets the connection, with TLS without a close_notify, after the peer has acknowledged
    /// everything that was sent, or `deadline` has ended, which starts again whenever the peer has
    /// acknowledged some.
    ///
    /// A missing close_notify alone would not show that the log is incomplete: Python's TLS ends
    /// every connection so. A reset discards what the kernel has not delivered, hence the wait.
    pub(crate) async fn abort<D: Future>(mut self, deadline: impl Fn() -> D) {
        self.socket_mut().set_reset_on_drop(true);
        self.wait_acked(0, deadline).await;
    }

    /// Waits until the peer has acknowledged all but `few` bytes. Returns whether it has.
    async fn wait_acked<D: Future>(&mut self, few: usize, deadline: impl Fn() -> D) -> bool {
        let mut unacked = self.unacked_bytes();
        while unacked > few {
            let progress = async {
                let mut interval = QUERY_MIN;
                loop {
                    let now = self.unacked_bytes();
                    if now <= few || now + UNACKED_FEW <= unacked {
                        return Some(now);
                    }
                    if self.socket().has_failed() {
                        return None;
                    }
                    sleep(interval).await;
                    interval = (interval * 2).min(QUERY_MAX);
                }
            };
            unacked = tokio::select! {
                biased;
                progress = progress => match progress {
                    Some(now) => now,
                    None => return false,
                },
                _ = deadline() => return false,
            };
        }
        true
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(tls) => Pin::new(&mut tls.stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let connection = self.get_mut();
        let written = match connection {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(tls) => Pin::new(&mut tls.stream).poll_write(cx, bytes),
        };
        if let Poll::Ready(Ok(count)) = written {
            connection.add_written(count);
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(tls) => Pin::new(&mut tls.stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(tls) => Pin::new(&mut tls.stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::ready;

    use tokio::io::AsyncReadExt;
    use tokio::time::Instant;

    use super::super::in_memory::{self, Peer};
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(300);

    fn connection() -> (Connection, Peer) {
        in_memory::connection(1 << 20)
    }

    #[tokio::test(start_paused = true)]
    async fn chunk_is_what_is_there_and_an_empty_one_the_end() {
        let (mut connection, mut peer) = connection();
        peer.stream.write_all(&[b'x'; 20_000]).await.unwrap();
        assert_eq!(connection.read_chunk(16_384).await.unwrap().len(), 16_384);
        assert_eq!(connection.read_chunk(16_384).await.unwrap().len(), 20_000 - 16_384);
        peer.stream.shutdown().await.unwrap();
        assert_eq!(connection.read_chunk(16_384).await.unwrap().len(), 0);
        peer.reset();
        connection.read_chunk(16_384).await.map(|_| ()).unwrap_err();
    }

    #[tokio::test(start_paused = true)]
    async fn peer_that_half_closes_is_gone_only_after_an_error() {
        let (mut connection, mut peer) = connection();
        peer.stream.write_all(b"unwanted").await.unwrap();
        peer.stream.shutdown().await.unwrap();
        assert!(timeout(DEADLINE, connection.wait_closed()).await.is_err());
        peer.reset();
        let error = connection.wait_closed().await.expect("an error");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test(start_paused = true)]
    async fn bounded_number_of_unwanted_bytes_is_read() {
        let (mut connection, mut peer) = connection();
        let mut sent = 0;
        let endless = async {
            loop {
                peer.stream.write_all(&[b'x'; 1024]).await.unwrap();
                sent += 1024;
            }
        };
        let both = async {
            // Dropped and called again, as in the relay.
            tokio::select! {
                () = endless => {}
                () = async { loop { let _ = timeout(DEADLINE, connection.wait_closed()).await; } } => {}
            }
        };
        assert!(timeout(4 * DEADLINE, both).await.is_err());
        // What is read, and what the buffer of the connection holds.
        assert_eq!(sent, DISCARDED_MAX as usize + (1 << 20));
    }

    #[tokio::test(start_paused = true)]
    async fn graceful_close_ends_when_the_peer_closes() {
        let (mut connection, mut peer) = connection();
        connection.write_all(b"log").await.unwrap();
        let began = Instant::now();
        let peer = async {
            let mut log = Vec::new();
            peer.stream.read_to_end(&mut log).await.unwrap();
            assert_eq!(log, b"log");
            peer.stream.shutdown().await.unwrap();
            peer
        };
        let deadline = || sleep(DEADLINE);
        let ((), peer) = tokio::join!(connection.close_gracefully(deadline), peer);
        assert!(!peer.is_reset());
        assert!(began.elapsed() < LINGER);
    }

    #[tokio::test(start_paused = true)]
    async fn graceful_close_does_not_wait_long_for_a_peer_that_does_not_close() {
        let (mut connection, peer) = connection();
        connection.write_all(b"log").await.unwrap();
        let began = Instant::now();
        connection.close_gracefully(|| sleep(DEADLINE)).await;
        assert_eq!(began.elapsed(), LINGER);
        assert!(!peer.is_reset());
    }

    #[tokio::test(start_paused = true)]
    async fn graceful_close_resets_a_peer_that_takes_nothing_for_the_write_deadline() {
        let (mut connection, peer) = connection();
        connection.write_all(&[b'x'; 100_000]).await.unwrap();
        peer.set_unacked_bytes(100_000);
        let began = Instant::now();
        let taking = async {
            // Takes some once, which starts the deadline again.
            sleep(DEADLINE / 2).await;
            peer.set_unacked_bytes(50_000);
        };
        tokio::join!(connection.close_gracefully(|| sleep(DEADLINE)), taking);
        assert!(peer.is_reset());
        let elapsed = began.elapsed();
        assert!(
            (DEADLINE * 3 / 2..DEADLINE * 3 / 2 + QUERY_MAX * 2).contains(&elapsed),
            "{elapsed:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn abort_resets_after_everything_has_arrived_or_the_deadline() {
        for (unacked, taken_after, expected) in [
            (0, Duration::ZERO, Duration::ZERO),
            (1, DEADLINE / 2, DEADLINE / 2),
            (100_000, DEADLINE / 2, DEADLINE / 2),
            (1, DEADLINE * 2, DEADLINE),
        ] {
            let (mut connection, peer) = connection();
            connection.write_all(b"log").await.unwrap();
            peer.set_unacked_bytes(unacked);
            let began = Instant::now();
            let aborted = async {
                connection.abort(|| sleep(DEADLINE)).await;
                began.elapsed()
            };
            let taking = async {
                sleep(taken_after).await;
                peer.set_unacked_bytes(0);
            };
            let (elapsed, ()) = tokio::join!(aborted, taking);
            assert!(peer.is_reset());
            assert!((expected..=expected + QUERY_MAX).contains(&elapsed), "{unacked}: {elapsed:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn abort_without_time_resets_immediately() {
        let (mut connection, peer) = connection();
        connection.write_all(b"log").await.unwrap();
        peer.set_unacked_bytes(3);
        let began = Instant::now();
        connection.abort(|| ready(())).await;
        assert!(peer.is_reset());
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}
