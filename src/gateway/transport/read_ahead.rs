//! The socket below a TLS connection.
//!
//! rustls asks for 4 KiB at a time. That is right for a log that trickles; while one pours, this
//! asks the kernel for much more and hands it up in pieces.

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::buffer_pool::Lent;

/// A socket that reads ahead while bytes pour in. Only next hops have a log to pour: what a client
/// sends is one line, and whoever sends more has no claim to a buffer.
pub(crate) struct ReadAhead {
    stream: TcpStream,
    /// What has been read and not yet been handed up.
    ahead: Option<(Lent, Range<usize>)>,
    /// The last read got all it had room for: there is more.
    pouring: bool,
    allowed: bool,
}

impl ReadAhead {
    /// Below the connection to a next hop.
    pub(crate) fn from_next_hop(stream: TcpStream) -> Self {
        Self { stream, ahead: None, pouring: false, allowed: true }
    }

    /// Below the connection of a client: never reads ahead.
    pub(crate) fn from_client(stream: TcpStream) -> Self {
        Self { stream, ahead: None, pouring: false, allowed: false }
    }

    /// The socket itself, for all but reading.
    pub(crate) fn socket(&self) -> &TcpStream {
        &self.stream
    }

    /// The socket without what was read ahead.
    pub(crate) fn into_socket(self) -> TcpStream {
        self.stream
    }
}

impl AsyncRead for ReadAhead {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        wanted: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { stream, ahead, pouring, allowed } = self.get_mut();
        if ahead.is_none() {
            if !*pouring {
                ready!(Pin::new(stream).poll_read(cx, wanted))?;
                *pouring = *allowed && wanted.remaining() == 0;
                return Poll::Ready(Ok(()));
            }
            let mut lent = Lent::take();
            let mut buffer = ReadBuf::new(&mut lent);
            let read = Pin::new(stream).poll_read(cx, &mut buffer);
            let (count, room) = (buffer.filled().len(), buffer.remaining());
            *pouring = room == 0;
            ready!(read)?;
            *ahead = Some((lent, 0..count));
        }
        let Some((lent, range)) = ahead else { return Poll::Ready(Ok(())) };
        let count = range.len().min(wanted.remaining());
        wanted.put_slice(&lent[range.start..range.start + count]);
        range.start += count;
        if range.start == range.end {
            *ahead = None;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ReadAhead {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// Whatever sizes are asked for, what comes up is what was sent.
    #[tokio::test]
    async fn nothing_is_lost_or_doubled() {
        assert!(poured(ReadAhead::from_next_hop).await, "never read ahead: this shows nothing");
        assert!(!poured(ReadAhead::from_client).await, "a client has no claim to a buffer");
    }

    /// Whether a buffer was held while three megabytes poured.
    async fn poured(below: fn(TcpStream) -> ReadAhead) -> bool {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let sent: Vec<u8> = (0..3_000_000u32).map(|i| i.to_le_bytes()[(i % 3) as usize]).collect();
        let expected = sent.clone();
        let sending = tokio::spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            for piece in sent.chunks(70_001) {
                stream.write_all(piece).await.unwrap();
            }
        });
        let mut stream = below(listener.accept().await.unwrap().0);
        let mut ahead = false;
        let (mut got, mut sizes) = (Vec::new(), [1, 4096, 4096, 4096, 100, 18_000].iter().cycle());
        loop {
            let mut buffer = vec![0; *sizes.next().unwrap()];
            match stream.read(&mut buffer).await.unwrap() {
                0 => break,
                count => got.extend_from_slice(&buffer[..count]),
            }
            ahead |= stream.ahead.is_some();
        }
        sending.await.unwrap();
        assert!(got == expected, "{} bytes of {}", got.len(), expected.len());
        assert!(stream.ahead.is_none(), "a buffer is held at the end");
        ahead
    }
}
