//! One TCP connection, plain or TLS, with the two ways it can end.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::ioctl::{Getter, Opcode, ioctl};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsStream;

/// How long a client is given to close after we have. Closing with its bytes unread would send a
/// reset, which may overtake the end of the log.
const LINGER: Duration = Duration::from_secs(1);

/// Between two looks at a send queue that is nearly empty.
const ASK_AGAIN: Duration = Duration::from_millis(10);

/// Between two keepalive probes, and how many stay unanswered before the peer counts as gone.
const PROBE_INTERVAL: Duration = Duration::from_secs(10);
const PROBES: u32 = 6;

/// A connection to a client or to the next hop.
pub(crate) enum Connection {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Sets what every connection needs: no delay for lines that trickle, and probes that find a peer
/// that vanished while nothing was sent, the first after `keepalive` of silence.
pub(crate) fn prepare(stream: &TcpStream, keepalive: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let probes =
        TcpKeepalive::new().with_time(keepalive).with_interval(PROBE_INTERVAL).with_retries(PROBES);
    SockRef::from(stream).set_tcp_keepalive(&probes)
}

impl Connection {
    fn is_tls(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// Reads the next bytes of a log. A TLS peer that closes without close_notify, as Python's
    /// does, has ended like any other.
    pub(crate) async fn read_log(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.read(buffer).await {
            Err(error) if self.is_tls() && error.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
            read => read,
        }
    }

    /// Waits until the peer is gone, throwing away what it sends meanwhile.
    ///
    /// On a plain connection the end of its input is not its end: `printf ... | nc -N` half-closes
    /// and goes on reading. Only an error, a reset or unanswered probes, says that it left. Nobody
    /// half-closes TLS. Can be dropped and called again at any time.
    pub(crate) async fn departed(&mut self) -> Option<io::Error> {
        let mut unwanted = [0; 1024];
        loop {
            match self.read(&mut unwanted).await {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                Err(error) => return Some(error),
            }
        }
        let Self::Plain(stream) = self else { return None };
        loop {
            match stream.ready(Interest::ERROR).await {
                Ok(_) => match stream.take_error() {
                    Ok(None) => stream_error_cleared(stream),
                    Ok(error) => return error,
                    Err(error) => return Some(error),
                },
                Err(error) => return Some(error),
            }
        }
    }

    /// Ends as finished: everything sent arrives, then FIN, on TLS behind a close_notify. Waits up
    /// to `patience` for a client that reads slowly.
    pub(crate) async fn finish(mut self, patience: Duration) {
        if !matches!(timeout(patience, self.shutdown()).await, Ok(Ok(()))) {
            return;
        }
        let mut unwanted = [0; 1024];
        let gone = async { while matches!(self.read(&mut unwanted).await, Ok(1..)) {} };
        // Not gone in time: closed all the same.
        let _ = timeout(LINGER, gone).await;
    }

    /// Ends as cut: a reset, on TLS no close_notify.
    ///
    /// A reset throws away what the kernel has not delivered yet, so the peer is given up to
    /// `patience` to take it first.
    pub(crate) async fn cut(self, patience: Duration) {
        // Dropping TLS sends no close_notify, and what was written still arrives.
        let Self::Plain(stream) = self else { return };
        // A failure, here and below, means that the connection is gone already.
        let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
        if !patience.is_zero() {
            let _ = timeout(patience, delivered(stream)).await;
        }
    }
}

/// Waits until the peer has acknowledged everything that was written, then closes.
///
/// The kernel tells of room in the send buffer, not of its emptiness. With the smallest of buffers
/// the one is close to the other (Linux, `__sk_stream_is_writeable`), and little is left to ask
/// for again and again. Registering the socket anew makes the kernel look at the new size.
async fn delivered(stream: TcpStream) -> io::Result<()> {
    SockRef::from(&stream).set_send_buffer_size(1)?;
    let stream = TcpStream::from_std(stream.into_std()?)?;
    stream.writable().await?;
    while unacknowledged(&stream)? > 0 && stream.take_error()?.is_none() {
        sleep(ASK_AGAIN).await;
    }
    Ok(())
}

/// The bytes written to `stream` that its peer has not acknowledged.
#[expect(unsafe_code, reason = "no library offers SIOCOUTQ (tcp(7)) as a safe call")]
fn unacknowledged(stream: &TcpStream) -> io::Result<i32> {
    const SIOCOUTQ: Opcode = 0x5411;
    // SAFETY: SIOCOUTQ of a TCP socket writes one int, the type that this `Getter` has room for.
    Ok(unsafe { ioctl(stream, Getter::<SIOCOUTQ, i32>::new()) }?)
}

/// Forgets a readiness that turned out to be no error, so that the next wait really waits.
fn stream_error_cleared(stream: &TcpStream) {
    let _ = stream.try_io(Interest::ERROR, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
