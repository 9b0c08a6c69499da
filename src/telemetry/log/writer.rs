//! The queue of log lines and the thread that writes them.
//!
//! A disk can hang (NFS, a failing device), and a process that reads our standard output can stall.
//! Tasks that serve must not wait for either, so lines go through a bounded queue to a thread;
//! lines that do not fit are dropped and counted. `tracing-appender` is not used, because its
//! thread ignores write errors: lost lines would not be counted, and a full disk would leave a cut
//! line.

use std::io::{self, Write};
use std::mem;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

use super::output::Output;
use super::stderr;

/// The most bytes that are queued: seconds of a busy gateway at debug level, hours at info level.
const QUEUE_MAX: usize = 4 << 20;

/// The most bytes of one write: what a pipe accepts as a whole (`PIPE_BUF` of pipe(7)), so that
/// lines of other writers come between ours and not into them.
const WRITE_MAX: usize = 4096;

/// After a write, how long lines are collected, and up to how many bytes. The thread of a busy
/// gateway then wakes 200 times a second and not for every line. The first line after a pause is
/// written immediately.
const COLLECT_TIME: Duration = Duration::from_millis(5);
const COLLECT_MAX: usize = 64 << 10;

/// How long the end of the program may wait for the output.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Queues lines. Cheap to clone.
#[derive(Clone)]
pub(super) struct LogWriter(Arc<Queue>);

/// The output of the queue. Dropping it waits until queued lines are written, for at most
/// [`FLUSH_TIMEOUT`].
pub(super) struct WriterThread {
    queue: Arc<Queue>,
    /// `None` once the thread has it.
    output: Option<Output>,
}

/// The number of lines lost since the start. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct LostLines(Arc<AtomicU64>);

impl LostLines {
    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Returns a writer and the thread, not started yet, that writes its lines to `output`.
pub(super) fn new(output: Output) -> (LogWriter, WriterThread) {
    let queue = Arc::new(Queue::default());
    (LogWriter(Arc::clone(&queue)), WriterThread { queue, output: Some(output) })
}

impl WriterThread {
    pub(super) fn lost_lines(&self) -> LostLines {
        self.queue.lost_lines.clone()
    }

    /// Starts the thread. Later calls do nothing. A fork would not copy the thread, so call this
    /// after the last fork.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(super) fn start(&mut self) -> io::Result<()> {
        if self.output.is_none() {
            return Ok(());
        }
        // Moved to the thread once it runs, so that without a thread it is still here.
        let (sender, receiver) = mpsc::channel();
        let queue = Arc::clone(&self.queue);
        let run = move || {
            let Ok(mut output) = receiver.recv() else { return };
            let mut is_failing = false;
            loop {
                write_batch(&mut output, &queue, &mut is_failing);
            }
        };
        thread::Builder::new().name("log".to_owned()).spawn(run)?;
        if let Some(output) = self.output.take() {
            // Cannot fail: the thread waits for it.
            let _ = sender.send(output);
        }
        Ok(())
    }
}

impl Drop for WriterThread {
    fn drop(&mut self) {
        if self.start().is_err()
            && let Some(output) = &mut self.output
            && !self.queue.lock().text.is_empty()
        {
            write_batch(output, &self.queue, &mut false);
            return;
        }
        let mut state = self.queue.lock();
        state.is_flushing = true;
        self.queue.changed.notify_all();
        let is_busy = |state: &mut State| state.is_writing || !state.text.is_empty();
        drop(self.queue.changed.wait_timeout_while(state, FLUSH_TIMEOUT, is_busy));
    }
}

#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    lost_lines: LostLines,
}

#[derive(Default)]
struct State {
    /// Whole lines.
    text: Vec<u8>,
    /// Lines lost since the last report.
    lost: u64,
    /// Whether the thread is busy: it writes lines, or lets them collect.
    is_writing: bool,
    /// Whether the end of the program waits for the last line.
    is_flushing: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &[u8]) {
        let mut state = self.lock();
        if state.text.len() + line.len() > QUEUE_MAX {
            self.count_lost(&mut state, 1);
            return;
        }
        let before = state.text.len();
        state.text.extend_from_slice(line);
        let is_collected = before < COLLECT_MAX && state.text.len() >= COLLECT_MAX;
        if !state.is_writing || is_collected {
            self.changed.notify_all();
        }
    }

    fn count_lost(&self, state: &mut State, lines: u64) {
        state.lost += lines;
        self.lost_lines.0.fetch_add(lines, Ordering::Relaxed);
    }

    /// Waits for lines and takes all of them. The lines of the previous call count as written.
    fn take(&self) -> Vec<u8> {
        let mut state = self.lock();
        if state.is_writing {
            let is_collecting =
                |state: &mut State| !state.is_flushing && state.text.len() < COLLECT_MAX;
            let waited = self.changed.wait_timeout_while(state, COLLECT_TIME, is_collecting);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.is_writing = false;
            // Notifying is a system call even if no thread waits.
            if state.is_flushing {
                self.changed.notify_all();
            }
        }
        let is_empty = |state: &mut State| state.text.is_empty();
        let waited = self.changed.wait_while(state, is_empty);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        state.is_writing = true;
        mem::take(&mut state.text)
    }
}

impl Write for &LogWriter {
    /// Never fails and never waits: the code that logs could not do anything about it.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> &'a Self {
        self
    }
}

/// Waits for lines and writes all of them. `is_failing` is whether the last write failed; the first
/// failure is reported on standard error.
fn write_batch(output: &mut Output, queue: &Queue, is_failing: &mut bool) {
    let text = queue.take();
    let mut rest = text.as_slice();
    while !rest.is_empty() {
        let (lines, after) = rest.split_at(end_of_lines(rest));
        rest = after;
        match output.write(lines) {
            Ok(()) => {
                *is_failing = false;
                let lost = mem::take(&mut queue.lock().lost);
                if lost > 0 {
                    // Through the queue, to have the configured format.
                    tracing::warn!(lost, "cannot write log lines in time: some were lost");
                }
            }
            Err((count, error)) => {
                let lost = lines[count..].iter().filter(|byte| **byte == b'\n').count();
                queue.count_lost(&mut queue.lock(), lost as u64);
                if !mem::replace(is_failing, true) {
                    let text = format!(
                        "{}: cannot be written: {error}; log lines are lost until it can",
                        output.name()
                    );
                    stderr::write(&text, Duration::ZERO);
                }
            }
        }
    }
}

/// Returns how many bytes of `text` to write: whole lines, as many as [`WRITE_MAX`] allows, at
/// least one.
fn end_of_lines(text: &[u8]) -> usize {
    if text.len() <= WRITE_MAX {
        return text.len();
    }
    let (fitting, longer) = text.split_at(WRITE_MAX);
    let is_newline = |byte: &u8| *byte == b'\n';
    match fitting.iter().rposition(is_newline) {
        Some(last) => last + 1,
        None => longer.iter().position(is_newline).map_or(text.len(), |at| WRITE_MAX + at + 1),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{PipeReader, Read, pipe};
    use std::os::fd::{AsFd, OwnedFd};

    use tempfile::TempDir;

    use super::*;

    /// Returns a writer whose output is a pipe, and the pipe's reader.
    fn piped(is_non_blocking: bool) -> (LogWriter, WriterThread, PipeReader) {
        let (reader, writer) = pipe().unwrap();
        let writer = OwnedFd::from(writer);
        rustix::io::ioctl_fionbio(&writer, is_non_blocking).unwrap();
        let (writer, thread) = new(Output::stream("a pipe", writer.as_fd()).unwrap());
        (writer, thread, reader)
    }

    #[test]
    fn lines_beyond_the_queue_limit_are_counted_as_lost() {
        let writer = LogWriter(Arc::default());
        let line = vec![b'x'; QUEUE_MAX / 4];
        for _ in 0..6 {
            (&writer).write_all(&line).unwrap();
        }
        let state = writer.0.lock();
        assert_eq!((state.text.len(), state.lost), (4 * line.len(), 2));
        drop(state);
        assert_eq!(writer.0.take().len(), 4 * line.len());
        (&writer).write_all(b"room again").unwrap();
        assert_eq!(writer.0.lock().text, b"room again");
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
    fn drop_waits_until_every_line_is_written() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("log");
        for is_started in [true, false] {
            let (writer, mut thread) = new(Output::open(&path).unwrap());
            (&writer).write_all(b"early\n").unwrap();
            if is_started {
                thread.start().unwrap();
            }
            for number in 1..1000 {
                (&writer).write_all(format!("{number}\n").as_bytes()).unwrap();
            }
            drop(thread);
            assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 1000);
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn stalled_reader_loses_whole_lines_and_blocks_neither_writers_nor_the_drop() {
        let (writer, mut thread, mut reader) = piped(false);
        thread.start().unwrap();
        let line = [vec![b'x'; 1023], b"\n".to_vec()].concat();
        // More than the pipe and the queue hold.
        for _ in 0..2 * QUEUE_MAX / line.len() {
            (&writer).write_all(&line).unwrap();
        }
        let lost = thread.lost_lines().count();
        assert!(lost > 0);
        let reading = thread::spawn(move || {
            let mut text = Vec::new();
            reader.read_to_end(&mut text).map(|_| text)
        });
        drop(thread);
        let state = writer.0.lock();
        assert!(state.text.is_empty() && !state.is_writing, "all was written");
        drop(state);
        // The thread, and with it the pipe's other end, lives as long as the process.
        assert!(!reading.is_finished());
    }

    #[test]
    fn non_blocking_pipe_gets_every_line() {
        let (writer, mut thread, mut reader) = piped(true);
        thread.start().unwrap();
        let line = [vec![b'x'; 1023], b"\n".to_vec()].concat();
        let count = QUEUE_MAX / line.len() / 2;
        for _ in 0..count {
            (&writer).write_all(&line).unwrap();
        }
        let mut text = vec![0; count * line.len()];
        reader.read_exact(&mut text).unwrap();
        assert!(text.chunks(line.len()).all(|read| read == line));
        assert_eq!(thread.lost_lines().count(), 0);
    }
}
