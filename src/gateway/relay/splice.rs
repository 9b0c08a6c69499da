//! A pool of pipes, through which the kernel moves bytes from one socket to another: `splice(2)`.
//!
//! A stream holds a pipe only while bytes move. The number of pipes is bounded, because the system
//! bounds what all pipes of an unprivileged user may hold (`pipe-user-pages-soft`, pipe(7)).
//!
//! Sandboxes may deny the call and kernels may lack it. If the first use in this process shows
//! that, the pool gives out no more pipes and all logs are copied.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::{Errno, read};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tracing::info;

/// The capacity of a pipe, in bytes: the default of `pipe-max-size` (pipe(7)), which every user may
/// set. Each packet takes a page of it, however small the packet is.
const CAPACITY: usize = 1024 * 1024;

/// The most bytes that are copied out of a pipe when the client stalls for a second. `client_waits`
/// permits such stalls to 1/16 of the streams: 1/16 × 256 KiB = 1/8 × 128 KiB, which is the memory
/// that the waiting 1/8 of the streams may hold.
const COPY_MAX: usize = 256 * 1024;

/// The number of pipes that are filled up to [`CAPACITY`], for speed. The others hold at most
/// [`COPY_MAX`], so that stalled clients cannot keep all pipes.
pub(super) const LARGE_PIPES: usize = PIPES / 2;

/// The number of pipes: half of what the default of `pipe-user-pages-soft` allows. Further streams
/// copy.
const PIPES: usize = 32;

/// The number of free pipes that are kept for the next streams.
const IDLE_MAX: usize = 8;

/// The number of pipes that exist.
static EXISTING: AtomicUsize = AtomicUsize::new(0);

/// The free pipes of all threads: they are few, and a thread that kept some for itself would keep
/// them from others.
static IDLE: Mutex<Vec<Pipe>> = Mutex::new(Vec::new());

/// What this process knows about splice(2): one of the three states below.
static SUPPORT: AtomicU8 = AtomicU8::new(UNKNOWN);
const UNKNOWN: u8 = 0;
const AVAILABLE: u8 = 1;
const UNAVAILABLE: u8 = 2;

/// An empty pipe.
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipe {
    /// Creates a pipe, unless there are too many. Without descriptors, or if the user's share of
    /// pipes is used up, there is none either.
    fn create() -> Option<Self> {
        let more = |pipes| (pipes < PIPES).then_some(pipes + 1);
        EXISTING.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        let create = || {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
            fcntl_setpipe_size(&write, CAPACITY)?;
            Ok::<_, Errno>((read, write))
        };
        match create() {
            Ok((read, write)) => Some(Self { read, write }),
            Err(_) => {
                EXISTING.fetch_sub(1, Ordering::Relaxed);
                None
            }
        }
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        EXISTING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A pipe from the pool.
pub(crate) struct PooledPipe {
    /// `None` only while this is dropped.
    pipe: Option<Pipe>,
    /// The number of bytes in it, and the most that [`Self::fill`] moves into it.
    len: usize,
    fill_max: usize,
}

impl PooledPipe {
    /// Takes an empty pipe; `None` if all are in use or splice(2) is unavailable.
    pub(crate) fn acquire() -> Option<Self> {
        if SUPPORT.load(Ordering::Relaxed) == UNAVAILABLE {
            return None;
        }
        let (free, in_use) = {
            let mut idle = idle();
            let in_use = EXISTING.load(Ordering::Relaxed).saturating_sub(idle.len());
            (idle.pop(), in_use)
        };
        let pipe = free.or_else(Pipe::create)?;
        let fill_max = if in_use < LARGE_PIPES { CAPACITY } else { COPY_MAX };
        Some(Self { pipe: Some(pipe), len: 0, fill_max })
    }

    /// The number of bytes that have been filled in and not moved out.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Whether [`Self::into_bytes`] may copy the bytes.
    pub(crate) fn may_be_copied(&self) -> bool {
        self.len <= COPY_MAX
    }

    /// Moves what `from` has into the pipe, which must be empty: a full one would look like an idle
    /// socket. Returns the number of bytes moved. 0 means that only a read can tell why: at the
    /// end, at a mark of urgent data, or where splice(2) is unavailable.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing at the moment; any other if the connection has failed.
    pub(crate) fn fill(&mut self, from: &TcpStream) -> io::Result<usize> {
        debug_assert_eq!(self.len, 0);
        let Some(pipe) = &self.pipe else { return Err(io::ErrorKind::WouldBlock.into()) };
        let moved = from.try_io(Interest::READABLE, || {
            match splice(from, None, &pipe.write, None, self.fill_max, SpliceFlags::NONBLOCK) {
                Err(error) if is_unavailable(error) => Ok(0),
                moved => Ok(moved?),
            }
        })?;
        if moved > 0 {
            SUPPORT.store(AVAILABLE, Ordering::Relaxed);
        }
        self.len += moved;
        Ok(moved)
    }

    /// Moves as much as `to` takes out of the pipe. Returns the number of bytes moved.
    ///
    /// # Errors
    /// `WouldBlock` if it takes nothing at the moment; any other if the connection has failed.
    pub(crate) fn empty_into(&mut self, to: &TcpStream) -> io::Result<usize> {
        let Some(pipe) = &self.pipe else { return Err(io::ErrorKind::WouldBlock.into()) };
        let moved = to.try_io(Interest::WRITABLE, || {
            Ok(splice(&pipe.read, None, to, None, self.len, SpliceFlags::NONBLOCK)?)
        })?;
        self.len -= moved;
        Ok(moved)
    }

    /// Copies the bytes in the pipe and returns the pipe to the pool.
    ///
    /// # Errors
    /// The pipe cannot be read.
    pub(crate) fn into_bytes(mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.len];
        let mut count = 0;
        while let Some(pipe) = &self.pipe
            && count < bytes.len()
        {
            match read(&pipe.read, &mut bytes[count..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                more => count += more,
            }
        }
        self.len = 0;
        Ok(bytes)
    }
}

fn idle() -> MutexGuard<'static, Vec<Pipe>> {
    // Consistent between any two statements.
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether `error` shows that splice(2) cannot be used here, and records it. After one success such
/// an error concerns the connection: an ICMP message can cause EACCES.
fn is_unavailable(error: Errno) -> bool {
    let is_denied = matches!(
        error,
        Errno::PERM | Errno::ACCESS | Errno::NOSYS | Errno::INVAL | Errno::OPNOTSUPP
    );
    if !is_denied {
        return false;
    }
    match SUPPORT.compare_exchange(UNKNOWN, UNAVAILABLE, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => {
            info!(%error, "splice(2) is unavailable: logs are copied, which takes more processor time");
            true
        }
        // Another thread may have found, and logged, the same.
        Err(support) => support == UNAVAILABLE,
    }
}

impl Drop for PooledPipe {
    fn drop(&mut self) {
        let Some(pipe) = self.pipe.take() else { return };
        // The next stream must not get bytes of this one.
        if self.len > 0 {
            return;
        }
        let mut idle = idle();
        if idle.len() < IDLE_MAX {
            idle.push(pipe);
        }
    }
}

/// The number of pipes that streams hold. Tests that use the pool hold [`SERIAL`].
#[cfg(test)]
pub(super) fn pipes_in_use() -> usize {
    EXISTING.load(Ordering::Relaxed) - idle().len()
}

#[cfg(test)]
pub(super) static SERIAL: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (near, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn bytes_that_are_filled_in_are_drained() {
        let _serial = SERIAL.lock().await;
        let ((mut source, from), (to, mut sink)) = (pair().await, pair().await);
        let mut pipe = PooledPipe::acquire().expect("a pipe");
        assert_eq!(pipe.fill(&from).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        source.write_all(b"some bytes").await.unwrap();
        from.readable().await.unwrap();
        assert_eq!(pipe.fill(&from).unwrap(), 10);
        assert_eq!(pipe.len(), 10);
        to.writable().await.unwrap();
        assert_eq!(pipe.empty_into(&to).unwrap(), 10);
        let mut got = [0; 10];
        sink.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"some bytes");
        drop(source);
        from.readable().await.unwrap();
        assert_eq!(pipe.fill(&from).unwrap(), 0, "nothing more to move");
    }

    /// With the end after the mark, splice(2) returns 0 as it does at the end.
    #[tokio::test]
    async fn mark_of_urgent_data_is_not_the_end() {
        let _serial = SERIAL.lock().await;
        let (mut source, from) = pair().await;
        source.write_all(b"before").await.unwrap();
        socket2::SockRef::from(&source).send_out_of_band(b"!").unwrap();
        source.write_all(b"after").await.unwrap();
        source.shutdown().await.unwrap();
        from.ready(Interest::READABLE).await.unwrap();
        let mut pipe = PooledPipe::acquire().expect("a pipe");
        assert_eq!(pipe.fill(&from).unwrap(), 6);
        pipe.len = 0;
        while pipe.fill(&from).is_err() {
            from.readable().await.unwrap();
        }
        assert_eq!(pipe.len(), 0, "it stops at the mark");
        let mut rest = Vec::new();
        let mut from = from;
        from.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"after");
        // The bytes from before the mark are still in it.
        drop(pipe.pipe.take());
    }

    #[tokio::test]
    async fn pipe_that_is_not_empty_does_not_return_to_the_pool() {
        let _serial = SERIAL.lock().await;
        let (mut source, from) = pair().await;
        let mut pipe = PooledPipe::acquire().expect("a pipe");
        source.write_all(b"left over").await.unwrap();
        from.readable().await.unwrap();
        pipe.fill(&from).unwrap();
        let before = idle().len();
        drop(pipe);
        assert_eq!(idle().len(), before);
        drop(PooledPipe::acquire().expect("a pipe"));
        assert_eq!(idle().len(), before.max(1));
    }

    #[tokio::test]
    async fn copying_the_bytes_of_a_pipe_returns_it_to_the_pool() {
        let _serial = SERIAL.lock().await;
        let (mut source, from) = pair().await;
        let mut pipe = PooledPipe::acquire().expect("a pipe");
        source.write_all(b"some bytes").await.unwrap();
        from.readable().await.unwrap();
        pipe.fill(&from).unwrap();
        let before = idle().len();
        assert_eq!(pipe.into_bytes().unwrap(), b"some bytes");
        assert_eq!(idle().len(), before + 1);
    }

    #[tokio::test]
    async fn number_of_pipes_is_bounded() {
        let _serial = SERIAL.lock().await;
        let many: Vec<_> = std::iter::from_fn(PooledPipe::acquire).take(2 * PIPES).collect();
        assert!(many.len() <= PIPES, "{} pipes", many.len());
        drop(many);
        assert!(PooledPipe::acquire().is_some(), "pipes return to the pool");
    }

    #[tokio::test]
    async fn half_of_the_pipes_can_always_be_copied() {
        let _serial = SERIAL.lock().await;
        let many: Vec<_> = std::iter::from_fn(PooledPipe::acquire).take(2 * PIPES).collect();
        let large = many.iter().filter(|pipe| pipe.fill_max > COPY_MAX).count();
        assert!((1..=LARGE_PIPES).contains(&large), "{large} of {}", many.len());
    }

    #[tokio::test]
    async fn idle_threads_keep_no_pipes_from_others() {
        let _serial = SERIAL.lock().await;
        let acquire_all =
            || std::iter::from_fn(PooledPipe::acquire).take(2 * PIPES).collect::<Vec<_>>().len();
        std::thread::scope(|scope| {
            let (used, is_used) = std::sync::mpsc::channel();
            let (done, is_done) = std::sync::mpsc::channel::<()>();
            scope.spawn(move || {
                used.send(acquire_all()).unwrap();
                // The thread is idle until the other one has counted.
                let _ = is_done.recv();
            });
            let in_other_thread = is_used.recv().unwrap();
            assert_eq!(acquire_all(), in_other_thread);
            drop(done);
        });
    }
}
