//! The queue of log lines and the thread that writes them.
//!
//! A disk may hang (NFS, a failing device), and a process that reads our standard output may stall.
//! Tasks that serve must not wait for either, so every output goes through a bounded queue to a
//! thread of its own; lines that do not fit are dropped and counted. `tracing-appender` is not used,
//! because its thread ignores write errors: lost lines would not be reported, and a file on a full
//! disk would keep a partial line.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::mem;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use rustix::fs::fstat;
use tracing_subscriber::fmt::MakeWriter;

use super::output::Followed;
use super::stderr;

/// The most bytes that wait to be written: seconds of a busy gateway at debug level, hours at info.
const QUEUE_MAX: usize = 4 << 20;

/// The most bytes of one write: what a pipe takes whole (`PIPE_BUF` of pipe(7)), so that lines of other
/// writers come between ours and not into them.
const WRITE_MAX: usize = 4096;

/// How long lines gather after others were written, and up to how many bytes. A busy gateway then
/// wakes the writer thread 200 times a second and not for every line. The first line after a pause is
/// written immediately.
const GATHER_TIME: Duration = Duration::from_millis(5);
const GATHER_MAX: usize = 64 << 10;

/// How long the end of the program may wait for the output.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// The formatter's end of the queue. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Lines(Arc<Queue>);

/// The log's output. Lines are queued until [`Self::begin`] starts the writer thread. Dropping it
/// waits until queued lines are written, for at most [`FLUSH_TIMEOUT`].
pub(crate) struct Sink {
    queue: Arc<Queue>,
    /// `None` once the writer thread has it.
    output: Option<Output>,
}

/// How many lines were lost since the start. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct LostLines(Arc<AtomicU64>);

impl LostLines {
    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Sink {
    /// Returns a sink that writes to `output`, and what formatters write to.
    pub(crate) fn new(output: Output) -> (Lines, Self) {
        let queue = Arc::new(Queue::default());
        (Lines(Arc::clone(&queue)), Self { queue, output: Some(output) })
    }

    pub(crate) fn lost_lines(&self) -> LostLines {
        self.queue.lost_lines.clone()
    }

    /// Starts the writer thread. Later calls do nothing. A fork would leave the thread behind, so
    /// call this after the last one.
    ///
    /// # Errors
    /// The kernel gives no thread.
    pub(crate) fn begin(&mut self) -> io::Result<()> {
        if self.output.is_none() {
            return Ok(());
        }
        // The thread takes the output only once it runs, so that without a thread it is still here.
        let (hand_over, taken) = mpsc::channel();
        let queue = Arc::clone(&self.queue);
        let write = move || {
            let Ok(mut output) = taken.recv() else { return };
            let mut failing = false;
            loop {
                write_batch(&mut output, &queue, &mut failing);
            }
        };
        thread::Builder::new().name("log".to_owned()).spawn(write)?;
        if let Some(output) = self.output.take() {
            // The thread waits for exactly this.
            let _ = hand_over.send(output);
        }
        Ok(())
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if self.begin().is_err()
            && let Some(output) = &mut self.output
            && !self.queue.lock().text.is_empty()
        {
            write_batch(output, &self.queue, &mut false);
            return;
        }
        let mut waiting = self.queue.lock();
        waiting.flushing = true;
        self.queue.changed.notify_all();
        let busy = |waiting: &mut Waiting| waiting.writing || !waiting.text.is_empty();
        drop(self.queue.changed.wait_timeout_while(waiting, FLUSH_TIMEOUT, busy));
    }
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    lost_lines: LostLines,
}

#[derive(Default)]
struct Waiting {
    /// Whole lines.
    text: Vec<u8>,
    /// Lines lost since the last report of lost lines.
    lost: u64,
    /// Whether the writer thread is busy: it holds lines that may not be written yet, or lets lines
    /// gather.
    writing: bool,
    /// Whether the end of the program waits for the last line.
    flushing: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &[u8]) {
        let mut waiting = self.lock();
        if waiting.text.len() + line.len() > QUEUE_MAX {
            self.lose(&mut waiting, 1);
            return;
        }
        let before = waiting.text.len();
        waiting.text.extend_from_slice(line);
        let is_enough = before < GATHER_MAX && waiting.text.len() >= GATHER_MAX;
        if !waiting.writing || is_enough {
            self.changed.notify_all();
        }
    }

    /// Counts lines that are lost.
    fn lose(&self, waiting: &mut Waiting, lines: u64) {
        waiting.lost += lines;
        self.lost_lines.0.fetch_add(lines, Ordering::Relaxed);
    }

    /// Waits for lines and takes all of them. The lines of the previous call count as written.
    fn take(&self) -> Vec<u8> {
        let mut waiting = self.lock();
        if waiting.writing {
            let gathers =
                |waiting: &mut Waiting| !waiting.flushing && waiting.text.len() < GATHER_MAX;
            let gathered = self.changed.wait_timeout_while(waiting, GATHER_TIME, gathers);
            waiting = gathered.unwrap_or_else(PoisonError::into_inner).0;
            waiting.writing = false;
            // A system call, even if nothing waits.
            if waiting.flushing {
                self.changed.notify_all();
            }
        }
        let empty = |waiting: &mut Waiting| waiting.text.is_empty();
        let mut waiting =
            self.changed.wait_while(waiting, empty).unwrap_or_else(PoisonError::into_inner);
        waiting.writing = true;
        mem::take(&mut waiting.text)
    }
}

impl Write for &Lines {
    /// Never fails and never waits: code that logs could not do anything about it.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> &'a Self {
        self
    }
}

/// Where the writer thread writes.
pub(crate) enum Output {
    File(Followed),
    Stream(Stream),
}

/// Standard output or standard error. It has a descriptor of its own: the lock of [`io::stdout`]
/// would be held as long as a reader stalls, and others would wait for it.
pub(crate) struct Stream {
    name: &'static str,
    file: File,
    torn: bool,
}

impl Output {
    /// # Errors
    /// There is no descriptor left.
    pub(crate) fn stdout() -> io::Result<Self> {
        let file = io::stdout().as_fd().try_clone_to_owned()?.into();
        Ok(Self::Stream(Stream { name: "standard output", file, torn: false }))
    }

    /// # Errors
    /// There is no descriptor left.
    pub(crate) fn stderr() -> io::Result<Self> {
        let file = io::stderr().as_fd().try_clone_to_owned()?.into();
        Ok(Self::Stream(Stream { name: "standard error", file, torn: false }))
    }

    /// Opens a file again that was rotated. Called once for all lines that wait.
    fn follow(&mut self) -> io::Result<()> {
        match self {
            Self::File(file) => file.follow(),
            Self::Stream(_) => Ok(()),
        }
    }

    /// Writes `lines`, or as many bytes of them as it returns with the error.
    fn write(&mut self, lines: &[u8]) -> Result<(), (usize, io::Error)> {
        match self {
            Self::File(file) => file.write(lines),
            Self::Stream(Stream { file, torn, .. }) => write_lines(file, torn, lines),
        }
    }

    /// Whether this is the file, pipe or terminal that standard error is.
    pub(crate) fn is_stderr(&self) -> bool {
        let file = match self {
            Self::File(file) => file.file(),
            Self::Stream(stream) => &stream.file,
        };
        match (fstat(file), fstat(io::stderr())) {
            (Ok(ours), Ok(other)) => (ours.st_dev, ours.st_ino) == (other.st_dev, other.st_ino),
            _ => false,
        }
    }

    pub(crate) fn is_terminal(&self) -> bool {
        match self {
            Self::File(_) => false,
            Self::Stream(stream) => stream.file.is_terminal(),
        }
    }

    fn name(&self) -> String {
        match self {
            Self::File(file) => file.path().display().to_string(),
            Self::Stream(stream) => stream.name.to_owned(),
        }
    }
}

/// Waits for lines and writes all of them.
fn write_batch(output: &mut Output, queue: &Queue, failing: &mut bool) {
    let text = queue.take();
    let mut followed = output.follow();
    let mut reported = false;
    let mut rest = text.as_slice();
    while !rest.is_empty() {
        let (lines, after) = rest.split_at(end_of_lines(rest));
        rest = after;
        let followed_now = mem::replace(&mut followed, Ok(()));
        let written = followed_now.map_err(|error| (0, error)).and_then(|()| output.write(lines));
        match written {
            Ok(()) => {
                *failing = false;
                // Once a batch: the queue was emptied for it, so the report itself fits.
                if !mem::replace(&mut reported, true) {
                    report_lost(queue);
                }
            }
            Err((count, error)) => {
                let lost = lines[count..].iter().filter(|byte| **byte == b'\n').count();
                queue.lose(&mut queue.lock(), lost as u64);
                if !mem::replace(failing, true) {
                    let name = output.name();
                    stderr::write(
                        &format!(
                            "{name}: cannot be written: {error}; log lines are lost until it can"
                        ),
                        Duration::ZERO,
                    );
                }
                // The next lines are tried again: the directory may be back.
                followed = output.follow();
            }
        }
    }
}

/// How many bytes of `text` to write: whole lines, as many as [`WRITE_MAX`] allows, at least one.
fn end_of_lines(text: &[u8]) -> usize {
    if text.len() <= WRITE_MAX {
        return text.len();
    }
    let (fitting, longer) = text.split_at(WRITE_MAX);
    let newline = |byte: &u8| *byte == b'\n';
    match fitting.iter().rposition(newline) {
        Some(last) => last + 1,
        None => longer.iter().position(newline).map_or(text.len(), |at| WRITE_MAX + at + 1),
    }
}

/// Logs how many lines were lost since the last call. The line goes through the queue, to have the
/// configured format.
fn report_lost(queue: &Queue) {
    let lost = mem::take(&mut queue.lock().lost);
    if lost > 0 {
        tracing::warn!(lost, "log lines were lost: they could not be written in time");
    }
}

/// Appends `lines`, or as many bytes of them as it returns with the error. `torn` is whether the last
/// line in `file` is a partial one; it is ended first.
pub(crate) fn write_lines(
    file: &File,
    torn: &mut bool,
    lines: &[u8],
) -> Result<(), (usize, io::Error)> {
    if *torn {
        write_all(file, b"\n").map_err(|(_, error)| (0, error))?;
        *torn = false;
    }
    write_all(file, lines).inspect_err(|(count, _)| {
        *torn = lines[..*count].last().is_some_and(|byte| *byte != b'\n');
    })
}

fn write_all(mut file: &File, bytes: &[u8]) -> Result<(), (usize, io::Error)> {
    let mut count = 0;
    while count < bytes.len() {
        let written = match file.write(&bytes[count..]) {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            // Another process that shares the pipe or terminal has made it non-blocking.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                stderr::wait_writable(file, None).map(|()| 0)
            }
            written => written,
        };
        count += written.map_err(|error| (count, error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{PipeReader, Read, pipe};
    use std::os::fd::OwnedFd;
    use std::path::Path;

    use tempfile::TempDir;

    use super::*;
    use crate::telemetry::log::output::Followed;

    /// A sink that writes to a pipe, as to standard output.
    fn piped() -> (Lines, Sink, PipeReader) {
        let (reader, writer) = pipe().unwrap();
        let file = OwnedFd::from(writer).into();
        let (lines, sink) = Sink::new(Output::Stream(Stream { name: "a pipe", file, torn: false }));
        (lines, sink, reader)
    }

    fn read(path: &Path) -> String {
        fs::read_to_string(path).expect("a log file")
    }

    #[test]
    fn queue_beyond_its_bound_loses_and_counts_lines() {
        let lines = Lines(Arc::default());
        let line = vec![b'x'; QUEUE_MAX / 4];
        for _ in 0..6 {
            (&lines).write_all(&line).unwrap();
        }
        let waiting = lines.0.lock();
        assert_eq!((waiting.text.len(), waiting.lost), (4 * line.len(), 2));
        drop(waiting);
        assert_eq!(lines.0.take().len(), 4 * line.len());
        (&lines).write_all(b"room again").unwrap();
        assert_eq!(lines.0.lock().text, b"room again");
    }

    #[test]
    fn writes_are_whole_lines_of_at_most_a_pipes_atomic_write() {
        let line = |length: usize| [vec![b'x'; length - 1], vec![b'\n']].concat();
        for (lengths, end) in [
            (vec![10], 10),
            (vec![WRITE_MAX], WRITE_MAX),
            (vec![WRITE_MAX - 10, 10, 1], WRITE_MAX),
            (vec![WRITE_MAX - 10, 11, 1], WRITE_MAX - 10),
            (vec![2 * WRITE_MAX, 5], 2 * WRITE_MAX),
        ] {
            let text: Vec<u8> = lengths.iter().flat_map(|length| line(*length)).collect();
            assert_eq!(end_of_lines(&text), end, "{lengths:?}");
        }
        assert_eq!(end_of_lines(&[b'x'; 2 * WRITE_MAX]), 2 * WRITE_MAX, "no line at all");
    }

    #[test]
    fn broken_pipe_is_an_error_without_a_partial_line() {
        let (reader, writer) = pipe().unwrap();
        let file = File::from(OwnedFd::from(writer));
        let mut torn = false;
        assert!(write_lines(&file, &mut torn, b"one\ntwo\n").is_ok() && !torn);
        drop(reader);
        let (count, error) = write_lines(&file, &mut torn, b"three\n").unwrap_err();
        assert_eq!((count, error.kind(), torn), (0, io::ErrorKind::BrokenPipe, false));
    }

    #[test]
    fn dropped_sink_has_written_every_line() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("log");
        for begins in [true, false] {
            let (lines, mut sink) = Sink::new(Output::File(Followed::open(&path).unwrap()));
            (&lines).write_all(b"early\n").unwrap();
            if begins {
                sink.begin().unwrap();
            }
            for number in 1..1000 {
                (&lines).write_all(format!("{number}\n").as_bytes()).unwrap();
            }
            drop(sink);
            assert_eq!(read(&path).lines().count(), 1000);
            fs::remove_file(&path).unwrap();
        }
    }

    /// A reader that stalls holds up neither those who log nor the end of the program, and gets
    /// whole lines when it reads on.
    #[test]
    fn stalled_reader_loses_whole_lines_and_blocks_no_writer() {
        let (lines, mut sink, mut reader) = piped();
        sink.begin().unwrap();
        let line = [vec![b'x'; 1023], b"\n".to_vec()].concat();
        // More than the pipe and the queue hold.
        for _ in 0..2 * QUEUE_MAX / line.len() {
            (&lines).write_all(&line).unwrap();
        }
        let lost = sink.lost_lines().count();
        assert!(lost > 0);
        let reading = thread::spawn(move || {
            let mut text = Vec::new();
            reader.read_to_end(&mut text).map(|_| text)
        });
        drop(sink);
        let waiting = lines.0.lock();
        assert!(waiting.text.is_empty() && !waiting.writing, "all was written");
        drop(waiting);
        // The writer thread lives as long as the process, and with it the pipe's other end.
        assert!(!reading.is_finished());
    }

    #[test]
    fn non_blocking_pipe_takes_every_line() {
        let (lines, mut sink, mut reader) = piped();
        let Some(Output::Stream(stream)) = &sink.output else { panic!("a stream") };
        rustix::io::ioctl_fionbio(&stream.file, true).unwrap();
        sink.begin().unwrap();
        let line = [vec![b'x'; 1023], b"\n".to_vec()].concat();
        let count = QUEUE_MAX / line.len() / 2;
        for _ in 0..count {
            (&lines).write_all(&line).unwrap();
        }
        let mut text = vec![0; count * line.len()];
        reader.read_exact(&mut text).unwrap();
        assert!(text.chunks(line.len()).all(|read| read == line));
        assert_eq!(sink.lost_lines().count(), 0);
    }
}
