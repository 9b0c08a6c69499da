//! The socket of a TLS connection, with larger reads for bulk logs.
//!
//! rustls asks for 4 KiB at a time. That is right for a log that comes slowly; while one comes in
//! bulk, this asks the kernel for much more and passes it on in pieces.

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::buffer_pool::PooledBuffer;
use super::socket::Socket;

/// A socket that reads ahead while bytes come in bulk. Only for hops, which send logs: a client
/// sends one line, and must not make the gateway hold a buffer by sending more.
pub(crate) struct ReadAhead {
    socket: Socket,
    /// Bytes that have been read and not yet passed on.
    ahead: Option<(PooledBuffer, Range<usize>)>,
    /// The last read filled its buffer: more bytes are there.
    is_bulk: bool,
    is_allowed: bool,
}

impl ReadAhead {
    /// For the connection to a hop.
    pub(crate) fn from_hop(socket: Socket) -> Self {
        Self { socket, ahead: None, is_bulk: false, is_allowed: true }
    }

    /// For the connection to a client: never reads ahead.
    pub(crate) fn from_client(socket: Socket) -> Self {
        Self { socket, ahead: None, is_bulk: false, is_allowed: false }
    }

    /// The socket, for all but reading.
    pub(crate) fn socket(&self) -> &Socket {
        &self.socket
    }

    pub(super) fn socket_mut(&mut self) -> &mut Socket {
        &mut self.socket
    }

    /// The socket, without the bytes that were read ahead.
    pub(crate) fn into_socket(self) -> Socket {
        self.socket
    }
}

impl AsyncRead for ReadAhead {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        target: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { socket, ahead, is_bulk, is_allowed } = self.get_mut();
        if ahead.is_none() {
            if !*is_bulk {
                ready!(Pin::new(socket).poll_read(cx, target))?;
                *is_bulk = *is_allowed && target.remaining() == 0;
                return Poll::Ready(Ok(()));
            }
            let mut buffer = PooledBuffer::acquire();
            let mut read_buf = ReadBuf::new(&mut buffer);
            let read = Pin::new(socket).poll_read(cx, &mut read_buf);
            let count = read_buf.filled().len();
            *is_bulk = read_buf.remaining() == 0;
            ready!(read)?;
            *ahead = Some((buffer, 0..count));
        }
        let Some((buffer, range)) = ahead else { return Poll::Ready(Ok(())) };
        let count = range.len().min(target.remaining());
        target.put_slice(&buffer[range.start..range.start + count]);
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
        Pin::new(&mut self.get_mut().socket).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().socket).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    #[tokio::test]
    async fn reads_of_any_size_return_what_was_sent() {
        assert!(reads_ahead(|stream| ReadAhead::from_hop(Socket::from_hop(stream))).await);
        assert!(!reads_ahead(|stream| ReadAhead::from_client(Socket::from_client(stream))).await);
    }

    /// Whether the socket held a buffer while it received three megabytes.
    async fn reads_ahead(read_ahead: fn(TcpStream) -> ReadAhead) -> bool {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let sent: Vec<u8> = (0..3_000_000u32).map(|i| i.to_le_bytes()[(i % 3) as usize]).collect();
        let expected = sent.clone();
        let sending = tokio::spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            for chunk in sent.chunks(70_001) {
                stream.write_all(chunk).await.unwrap();
            }
        });
        let mut stream = read_ahead(listener.accept().await.unwrap().0);
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
        assert!(stream.ahead.is_none(), "no buffer is held at the end");
        ahead
    }
}
