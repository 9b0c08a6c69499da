//! Pipes through which the kernel moves bytes from one socket to another: `splice(2)`.
//!
//! A pipe is lent while bytes move, so that a quiet stream holds none, and their number is bounded:
//! what all pipes of an unprivileged user may hold is (`pipe-user-pages-soft`, pipe(7)).
//!
//! Sandboxes may deny the call and kernels may lack it. Where the first use of it in this process
//! shows that, no pipes are lent any more and all logs are copied.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tracing::info;

/// What a pipe is to hold, in bytes: `pipe-max-size` as it comes (pipe(7)), which the kernel lets
/// everybody have. A smaller one works, and costs more.
const CAPACITY: usize = 1024 * 1024;

/// Pipes at once, in all threads: half of what `pipe-user-pages-soft` allows, as it comes. Streams
/// beyond that copy.
const PIPES: usize = 32;

/// Kept by each thread for whoever comes next.
const KEPT: usize = 2;

static MADE: AtomicUsize = AtomicUsize::new(0);

/// What this process knows about splice(2): one of the three states below.
static SUPPORT: AtomicU8 = AtomicU8::new(UNKNOWN);
const UNKNOWN: u8 = 0;
const AVAILABLE: u8 = 1;
const UNAVAILABLE: u8 = 2;

thread_local! {
    static FREE: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// One pipe, empty unless a holder left something in it.
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    capacity: usize,
}

impl Pipe {
    fn make() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let capacity = fcntl_setpipe_size(&write, CAPACITY)?;
        Ok(Self { read, write, capacity })
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        MADE.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A pipe for as long as somebody holds it.
pub(crate) struct Lent {
    pipe: Option<Pipe>,
    /// Bytes in it.
    held: usize,
}

impl Lent {
    /// An empty pipe, or `None` where there may be no more of them, or splice(2) is unavailable.
    pub(crate) fn take() -> Option<Self> {
        if SUPPORT.load(Ordering::Relaxed) == UNAVAILABLE {
            return None;
        }
        let free = FREE.with_borrow_mut(Vec::pop);
        let pipe = free.or_else(|| {
            if MADE.fetch_add(1, Ordering::Relaxed) < PIPES {
                // Without descriptors, or with the user's share of pipes used up, copying works.
                if let Ok(pipe) = Pipe::make() {
                    return Some(pipe);
                }
            }
            MADE.fetch_sub(1, Ordering::Relaxed);
            None
        })?;
        Some(Self { pipe: Some(pipe), held: 0 })
    }

    /// Bytes that have been filled in and not drained.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// Moves what `from` has into the pipe, which has to be empty: a full one would look like a
    /// quiet socket. Returns the bytes moved. 0 means that this call moves no more, and only a read
    /// can tell why: at the end, at a mark of urgent data, or where splice(2) is unavailable.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing now; else the connection has failed.
    pub(crate) fn fill(&mut self, from: &TcpStream) -> io::Result<usize> {
        debug_assert_eq!(self.held, 0);
        let Some(pipe) = &self.pipe else { return Err(io::ErrorKind::WouldBlock.into()) };
        let moved = from.try_io(Interest::READABLE, || {
            match splice(from, None, &pipe.write, None, pipe.capacity, SpliceFlags::NONBLOCK) {
                Err(error) if is_unavailable(error) => Ok(0),
                moved => Ok(moved?),
            }
        })?;
        if moved > 0 {
            SUPPORT.store(AVAILABLE, Ordering::Relaxed);
        }
        self.held += moved;
        Ok(moved)
    }

    /// Moves what the pipe holds to `to`, as much as that takes. Returns the bytes moved.
    ///
    /// # Errors
    /// `WouldBlock` if it takes nothing now; else the connection has failed.
    pub(crate) fn drain(&mut self, to: &TcpStream) -> io::Result<usize> {
        let Some(pipe) = &self.pipe else { return Err(io::ErrorKind::WouldBlock.into()) };
        let moved = to.try_io(Interest::WRITABLE, || {
            Ok(splice(&pipe.read, None, to, None, self.held, SpliceFlags::NONBLOCK)?)
        })?;
        self.held -= moved;
        Ok(moved)
    }
}

/// Whether `error` says that splice(2) cannot be used here, and notes it. After one success such an
/// error is the connection's: an ICMP message can make it EACCES.
fn is_unavailable(error: Errno) -> bool {
    let denied = matches!(
        error,
        Errno::PERM | Errno::ACCESS | Errno::NOSYS | Errno::INVAL | Errno::OPNOTSUPP
    );
    if !denied {
        return false;
    }
    match SUPPORT.compare_exchange(UNKNOWN, UNAVAILABLE, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => {
            info!(%error, "splice(2) is unavailable: logs are copied, which takes more processor time");
            true
        }
        // Another thread may have noted, and logged, the same.
        Err(known) => known == UNAVAILABLE,
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let Some(pipe) = self.pipe.take() else { return };
        // What is left in it is not for anybody else.
        if self.held > 0 {
            return;
        }
        FREE.with_borrow_mut(|free| {
            if free.len() < KEPT {
                free.push(pipe);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// They share the number of pipes.
    static ONE_AFTER_THE_OTHER: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (near, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn what_goes_in_comes_out() {
        let _turn = ONE_AFTER_THE_OTHER.lock().await;
        let ((mut source, from), (to, mut sink)) = (pair().await, pair().await);
        let mut pipe = Lent::take().expect("a pipe");
        assert_eq!(pipe.fill(&from).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        source.write_all(b"some bytes").await.unwrap();
        from.readable().await.unwrap();
        assert_eq!(pipe.fill(&from).unwrap(), 10);
        assert_eq!(pipe.held(), 10);
        to.writable().await.unwrap();
        assert_eq!(pipe.drain(&to).unwrap(), 10);
        let mut got = [0; 10];
        sink.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"some bytes");
        drop(source);
        from.readable().await.unwrap();
        assert_eq!(pipe.fill(&from).unwrap(), 0, "nothing more to move");
    }

    /// With the end behind the mark, splice(2) says 0 as it does at the end.
    #[tokio::test]
    async fn a_mark_of_urgent_data_is_not_the_end() {
        let _turn = ONE_AFTER_THE_OTHER.lock().await;
        let (mut source, from) = pair().await;
        source.write_all(b"before").await.unwrap();
        socket2::SockRef::from(&source).send_out_of_band(b"!").unwrap();
        source.write_all(b"after").await.unwrap();
        source.shutdown().await.unwrap();
        from.ready(Interest::READABLE).await.unwrap();
        let mut pipe = Lent::take().expect("a pipe");
        assert_eq!(pipe.fill(&from).unwrap(), 6);
        pipe.held = 0;
        while pipe.fill(&from).is_err() {
            from.readable().await.unwrap();
        }
        assert_eq!(pipe.held(), 0, "it stops at the mark");
        let mut rest = Vec::new();
        let mut from = from;
        from.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"after");
        // Its bytes are still in it.
        drop(pipe.pipe.take());
    }

    /// The next holder must not get another stream's bytes.
    #[tokio::test]
    async fn a_pipe_with_something_in_it_is_not_lent_again() {
        let _turn = ONE_AFTER_THE_OTHER.lock().await;
        let (mut source, from) = pair().await;
        let mut pipe = Lent::take().expect("a pipe");
        source.write_all(b"left over").await.unwrap();
        from.readable().await.unwrap();
        pipe.fill(&from).unwrap();
        drop(pipe);
        assert_eq!(FREE.with_borrow(Vec::len), 0);
        drop(Lent::take().expect("a pipe"));
        assert_eq!(FREE.with_borrow(Vec::len), 1);
    }

    #[tokio::test]
    async fn their_number_is_bounded() {
        let _turn = ONE_AFTER_THE_OTHER.lock().await;
        let many: Vec<_> = std::iter::from_fn(Lent::take).take(2 * PIPES).collect();
        assert!(many.len() <= PIPES, "{}", many.len());
        drop(many);
        assert!(Lent::take().is_some(), "they come back");
    }
}
