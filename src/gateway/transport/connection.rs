//! One TCP connection, plain or TLS, with the two ways it can end.

use std::future::poll_fn;
use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::ioctl::{Getter, Opcode, ioctl};
use rustls::pki_types::CertificateDer;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsStream;
use tracing::debug;

use super::buffer_pool::{Lent, Piece};
use super::read_ahead::ReadAhead;
use crate::tls;

/// How long a client is given to close after we have. Closing with its bytes unread would send a
/// reset, which may overtake the end of the log.
const LINGER: Duration = Duration::from_secs(1);

/// Between two looks at a send queue that is nearly empty: twice as long each time.
const ASK_AGAIN_MIN: Duration = Duration::from_millis(10);
const ASK_AGAIN_MAX: Duration = Duration::from_secs(1);

/// The most of a client's unwanted bytes that is read, so that one that sends for ever costs
/// nothing; what comes then makes our close a reset.
const UNWANTED_MAX: u32 = 1024 * 1024;

/// After so many unwanted bytes the client's receive buffer is made as small as the kernel allows, so
/// that little is held of what comes after [`UNWANTED_MAX`].
const UNWANTED_MANY: u32 = UNWANTED_MAX / 2;

/// A peer that has not acknowledged more than this, in bytes, is waited for: the kernel holds more for
/// it than for a quiet stream.
pub(crate) const UNACKNOWLEDGED_FEW: usize = 16 * 1024;

/// Between two keepalive probes, and how many stay unanswered before the peer counts as gone.
const PROBE_INTERVAL: Duration = Duration::from_secs(10);
const PROBES: u32 = 6;

/// A connection to a client or to the next hop.
pub(crate) enum Connection {
    Plain(TcpStream),
    Tls(Box<TlsStream<ReadAhead>>),
}

impl Connection {
    fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.get_ref().0.socket(),
        }
    }

    /// The certificates that a TLS client has shown, its own first; they have been verified.
    pub(crate) fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(stream) => stream.get_ref().1.peer_certificates(),
        }
    }

    pub(crate) fn is_tls(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// Whether the peer is a gateway of our own kind, which ends no log without close_notify.
    pub(crate) fn is_to_own_kind(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(stream) => tls::is_own_kind(stream.get_ref().1),
        }
    }

    /// Has the kernel send probes that find a peer that vanished while nothing was sent, the first
    /// after `keepalive` of silence. Where the system refuses an option, as sandboxes may, it goes
    /// without: a peer that vanished is found when something is sent to it.
    pub(crate) fn probe(&self, keepalive: Duration) {
        let probes = TcpKeepalive::new()
            .with_time(keepalive)
            .with_interval(PROBE_INTERVAL)
            .with_retries(PROBES);
        if let Err(error) = SockRef::from(self.tcp()).set_tcp_keepalive(&probes) {
            debug!(%error, "no keepalive probes");
        }
    }

    /// Bounds what the kernel holds for a peer that has not acknowledged it, its bookkeeping included.
    /// Without a bound it is as much as `net.ipv4.tcp_wmem` allows.
    pub(crate) fn bound_send_buffer(&self, bytes: usize) {
        // The kernel doubles the number (socket(7)).
        if let Err(error) = SockRef::from(self.tcp()).set_send_buffer_size(bytes / 2) {
            debug!(%error, "no bound on the send buffer");
        }
    }

    /// The bytes written that the peer has not acknowledged; 0 where the system does not tell.
    pub(crate) fn unacknowledged(&self) -> usize {
        unacknowledged(self.tcp()).unwrap_or_default()
    }

    /// Closes the connection to a next hop that has ended its side, without the reset that a drop
    /// sends.
    pub(crate) fn close(self) {
        end_gracefully(self.tcp());
    }

    /// Reads the next bytes of a log, at most `room`; none at its end. A TLS peer that closes
    /// without close_notify, as Python's does, has ended like any other; one of our own kind has
    /// died. Holds no buffer while it waits.
    ///
    /// From TLS it takes all that is there, record by record. A fault that it meets behind some
    /// bytes is kept in `failure` for the next call.
    pub(crate) async fn read_log(
        &mut self,
        room: usize,
        failure: &mut Option<io::Error>,
    ) -> io::Result<Piece> {
        if let Some(failure) = failure.take() {
            return Err(failure);
        }
        let is_tls = self.is_tls();
        poll_fn(|cx| {
            let mut lent = Lent::take();
            let room = room.min(lent.len());
            let mut buffer = ReadBuf::new(&mut lent[..room]);
            let length = loop {
                let before = buffer.filled().len();
                let read = Pin::new(&mut *self).poll_read(cx, &mut buffer);
                let length = buffer.filled().len();
                match read {
                    Poll::Ready(Ok(())) if is_tls && length > before && length < room => {}
                    Poll::Ready(Ok(())) => break length,
                    Poll::Pending if length > 0 => break length,
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Err(error)) => {
                        let ended = is_tls
                            && error.kind() == io::ErrorKind::UnexpectedEof
                            && !self.is_to_own_kind();
                        if !ended && length == 0 {
                            return Poll::Ready(Err(error));
                        }
                        if !ended {
                            *failure = Some(error);
                        }
                        break length;
                    }
                }
            };
            Poll::Ready(Ok(Piece::new(lent, length)))
        })
        .await
    }

    /// Reads and throws away, without a buffer while it waits. Returns how many bytes, 0 at the
    /// end.
    async fn discard(&mut self) -> io::Result<usize> {
        poll_fn(|cx| {
            let mut unwanted = [0; 1024];
            let mut buffer = ReadBuf::new(&mut unwanted);
            let read = Pin::new(&mut *self).poll_read(cx, &mut buffer);
            read.map_ok(|()| buffer.filled().len())
        })
        .await
    }

    /// Waits until the peer is gone, throwing away what it sends meanwhile. Returns the error that
    /// showed it, if there was one.
    ///
    /// The end of the peer's input does not end its reading: `printf ... | nc -N` half-closes and
    /// goes on reading, and so does a TLS client after its close_notify, which ends one direction
    /// only (RFC 8446, section 6.1). After either of them only an error shows that the peer is gone:
    /// a reset, or keepalive probes without an answer. TCP that ends without a close_notify is how
    /// a TLS client leaves that does not shut TLS down, as zuul-web does.
    ///
    /// Can be dropped and called again at any time; `discarded` counts over all calls.
    pub(crate) async fn departed(&mut self, discarded: &mut u32) -> Option<io::Error> {
        while *discarded < UNWANTED_MAX {
            match self.discard().await {
                Ok(0) => break,
                Ok(count) => {
                    let before = *discarded;
                    *discarded += u32::try_from(count).unwrap_or(UNWANTED_MAX);
                    if before < UNWANTED_MANY && *discarded >= UNWANTED_MANY {
                        // Refused by a sandbox, it goes without. The kernel has a minimum.
                        let _ = SockRef::from(self.tcp()).set_recv_buffer_size(1);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return None,
                Err(error) => return Some(error),
            }
        }
        let stream = self.tcp();
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

    /// Ends as finished: everything sent arrives, then FIN, on TLS after a close_notify.
    ///
    /// `patience` is started for each wait for the client to take something; when it ends, the
    /// connection is reset. The kernel would otherwise hold what was not delivered after the close,
    /// without a bound on its number of connections.
    pub(crate) async fn finish<P: Future>(mut self, patience: impl Fn() -> P) {
        let finished = tokio::select! {
            biased;
            finished = self.shutdown() => finished,
            // Boxed, here and below: most clients have taken everything.
            _ = Box::pin(async { patience().await }) => Err(io::ErrorKind::TimedOut.into()),
        };
        if finished.is_err()
            || (self.unacknowledged() > UNACKNOWLEDGED_FEW && !Box::pin(self.taken(patience)).await)
        {
            reset_on_drop(self.tcp());
            return;
        }
        let gone = async { while matches!(self.discard().await, Ok(1..)) {} };
        // Not gone in time: closed all the same.
        let _ = timeout(LINGER, gone).await;
    }

    /// Waits until the peer has acknowledged nearly everything. Returns whether it did.
    async fn taken<P: Future>(&mut self, patience: impl Fn() -> P) -> bool {
        let mut left = self.unacknowledged();
        while left > UNACKNOWLEDGED_FEW {
            let some_taken = async {
                let mut pause = ASK_AGAIN_MIN;
                loop {
                    let now = self.unacknowledged();
                    if now <= UNACKNOWLEDGED_FEW || now + UNACKNOWLEDGED_FEW <= left {
                        return Some(now);
                    }
                    if !matches!(self.tcp().take_error(), Ok(None)) {
                        return None;
                    }
                    sleep(pause).await;
                    pause = (pause * 2).min(ASK_AGAIN_MAX);
                }
            };
            left = tokio::select! {
                biased;
                now = some_taken => match now {
                    Some(now) => now,
                    None => return false,
                },
                _ = patience() => return false,
            };
        }
        true
    }

    /// Ends as cut: a reset, on TLS without a close_notify before it.
    ///
    /// A missing close_notify alone would say nothing: Python's TLS ends every stream so, and the
    /// next gateway takes it for an end. A reset throws away what the kernel has not delivered
    /// yet, so the peer may take it until `patience` ends.
    pub(crate) async fn cut(self, patience: impl Future) {
        let stream = match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => match *stream {
                TlsStream::Client(stream) => stream.into_inner().0.into_socket(),
                TlsStream::Server(stream) => stream.into_inner().0.into_socket(),
            },
        };
        // A failure, here and below, means that the connection is gone already.
        reset_on_drop(&stream);
        tokio::select! {
            biased;
            _ = patience => {}
            _ = delivered(stream) => {}
        }
    }
}

/// Has the kernel reset `stream` whenever it is dropped before the peer has ended it. The side that
/// closes first keeps the pair of ports for a minute (TIME_WAIT, RFC 9293, section 3.6.1); with
/// clients that decide when that is, the ports towards one next hop would run out. Refused by a
/// sandbox, it goes without.
pub(crate) fn reset_on_drop(stream: &impl AsFd) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Takes [`reset_on_drop`] back: what has been sent arrives, such as an alert that says why a
/// handshake failed.
pub(crate) fn end_gracefully(stream: &impl AsFd) {
    let _ = SockRef::from(stream).set_linger(None);
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
    let mut pause = ASK_AGAIN_MIN;
    while unacknowledged(&stream)? > 0 && stream.take_error()?.is_none() {
        sleep(pause).await;
        pause = (pause * 2).min(ASK_AGAIN_MAX);
    }
    Ok(())
}

/// The bytes written to `stream` that its peer has not acknowledged.
#[expect(unsafe_code, reason = "no library offers SIOCOUTQ (tcp(7)) as a safe call")]
fn unacknowledged(stream: &TcpStream) -> io::Result<usize> {
    const SIOCOUTQ: Opcode = 0x5411;
    // SAFETY: SIOCOUTQ of a TCP socket writes one int, the type that this `Getter` has room for.
    let bytes = unsafe { ioctl(stream, Getter::<SIOCOUTQ, i32>::new()) }?;
    Ok(usize::try_from(bytes).unwrap_or_default())
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
