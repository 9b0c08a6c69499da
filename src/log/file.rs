//! The log file and the thread that writes it.
//!
//! A disk may hang (NFS, a failing device), and a task that waits for it would hold up streams that
//! want nothing of it. So lines go through a bounded queue to a thread of their own, and what does
//! not fit is lost and counted. By hand and not by `tracing-appender`, whose thread drops errors:
//! nobody would learn that lines were lost, and the file would be left torn.

use std::collections::VecDeque;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::mem;
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

use crate::service::privileges::Account;

/// What may wait for the disk: seconds of a busy gateway at debug level, hours of one at info.
const WAITING_MAX: usize = 4 << 20;

/// How long the end of the program may wait for the disk.
const FLUSH_PATIENCE: Duration = Duration::from_secs(2);

/// The way to the file, for the formatter.
#[derive(Clone)]
pub(super) struct Lines(Arc<Queue>);

/// The file. Lines wait until it is [begun](Self::begin); when it is dropped they are written, or
/// waited for, though not for ever.
pub(crate) struct LogFile {
    queue: Arc<Queue>,
    /// Until it is begun.
    file: Option<Followed>,
}

/// Opens the file at `path`. One that is made belongs to `account`.
///
/// # Errors
/// The file cannot be opened.
pub(super) fn open(path: &Path, account: Option<&Account>) -> io::Result<(Lines, LogFile)> {
    // The working directory may become another, and the file is opened again.
    let path = std::path::absolute(path)?;
    let is_new = !path.exists();
    let file = Followed::open(&path)?;
    if let Some((user, group)) = account.filter(|_| is_new).map(Account::ids) {
        fchown(&file.file, Some(user), Some(group))?;
    }
    let queue = Arc::new(Queue::default());
    Ok((Lines(Arc::clone(&queue)), LogFile { queue, file: Some(file) }))
}

/// How many lines were lost since the start. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct LostLines(Arc<AtomicU64>);

impl LostLines {
    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl LogFile {
    pub(super) fn lost_lines(&self) -> LostLines {
        self.queue.lost_lines.clone()
    }

    /// Starts the thread that writes: after the last fork, which would leave it behind, and after
    /// the last change of user.
    ///
    /// # Errors
    /// The kernel gives no thread.
    pub(crate) fn begin(&mut self) -> io::Result<()> {
        let Some(mut file) = self.file.take() else { return Ok(()) };
        let queue = Arc::clone(&self.queue);
        let write = move || {
            let mut trouble = false;
            loop {
                write_all(&mut file, &queue, &mut trouble);
            }
        };
        thread::Builder::new().name("log".to_owned()).spawn(write).map(|_| ())
    }
}

/// Whether a start would find the file usable. Makes none.
///
/// # Errors
/// It would not.
pub(super) fn check(path: &Path) -> io::Result<()> {
    match OpenOptions::new().append(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            directory.unwrap_or(Path::new(".")).metadata().map(|_| ())
        }
        opened => opened.map(|_| ()),
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
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Since it was last said.
    lost: u64,
    /// The thread holds lines that are not in the file yet.
    writing: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &[u8]) {
        let mut waiting = self.lock();
        if waiting.bytes + line.len() > WAITING_MAX {
            self.lose(&mut waiting);
            return;
        }
        waiting.bytes += line.len();
        waiting.lines.push_back(line.to_vec());
        self.changed.notify_all();
    }

    /// Counts a line that is lost.
    fn lose(&self, waiting: &mut Waiting) {
        waiting.lost += 1;
        self.lost_lines.0.fetch_add(1, Ordering::Relaxed);
    }

    /// All that waits, once something does. The lines of the last call are taken for dealt with.
    fn take(&self) -> VecDeque<Vec<u8>> {
        let mut waiting = self.lock();
        waiting.writing = false;
        self.changed.notify_all();
        let empty = |waiting: &mut Waiting| waiting.lines.is_empty();
        let mut waiting =
            self.changed.wait_while(waiting, empty).unwrap_or_else(PoisonError::into_inner);
        waiting.writing = true;
        waiting.bytes = 0;
        mem::take(&mut waiting.lines)
    }
}

impl Write for &Lines {
    /// Never fails and never waits: nobody who logs could do anything about it.
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

impl Drop for LogFile {
    fn drop(&mut self) {
        if let Some(file) = &mut self.file {
            // Never begun: whatever kept the program from starting is the last line.
            if !self.queue.lock().lines.is_empty() {
                write_all(file, &self.queue, &mut false);
            }
            return;
        }
        let busy = |waiting: &mut Waiting| waiting.writing || !waiting.lines.is_empty();
        drop(self.queue.changed.wait_timeout_while(self.queue.lock(), FLUSH_PATIENCE, busy));
    }
}

/// Writes all that waits, once something does.
fn write_all(file: &mut Followed, queue: &Queue, trouble: &mut bool) {
    let lines = queue.take();
    let mut followed = file.follow();
    for line in lines {
        let written = mem::replace(&mut followed, Ok(())).and_then(|()| file.write(&line));
        match written {
            Ok(()) => {
                *trouble = false;
                let lost = mem::take(&mut queue.lock().lost);
                if lost > 0 {
                    // By the usual way, to have the usual shape; a line or two later, then.
                    tracing::warn!(lost, "log lines were lost: the file could not be written");
                }
            }
            Err(error) => {
                queue.lose(&mut queue.lock());
                if !mem::replace(trouble, true) {
                    say(&file.path, &error);
                }
                // Each line tries anew: the directory may be back.
                followed = file.follow();
            }
        }
    }
}

/// Tells standard error, the only place left; `eprintln` would panic without one.
fn say(path: &Path, error: &io::Error) {
    let path = path.display();
    let text = format!("{path}: cannot be written: {error}; log lines are lost until it can\n");
    let _ = io::stderr().write_all(text.as_bytes());
}

/// A file that is appended to under its name, whatever file that is.
struct Followed {
    path: PathBuf,
    file: File,
    /// Which file was opened: device and inode.
    identity: (u64, u64),
    /// The last line in it was cut by a full disk.
    torn: bool,
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

impl Followed {
    fn open(path: &Path) -> io::Result<Self> {
        // A new one is as readable as the umask lets it be, as upstream's is.
        let file = OpenOptions::new().append(true).create(true).open(path)?;
        let identity = identity(&file.metadata()?);
        Ok(Self { path: path.to_owned(), file, identity, torn: false })
    }

    /// Opens the file anew if its name has come to mean another one or none: rotated. One call of
    /// stat(2) for all lines that wait; upstream's handler does it for each.
    ///
    /// # Errors
    /// There is no such file and none can be made, and the open one has no name either. A file
    /// that was renamed where no new one may be made is still read by somebody.
    fn follow(&mut self) -> io::Result<()> {
        if self.path.metadata().is_ok_and(|found| identity(&found) == self.identity) {
            return Ok(());
        }
        match Self::open(&self.path) {
            Ok(opened) => {
                *self = opened;
                Ok(())
            }
            Err(error) => match self.file.metadata() {
                Ok(open) if open.nlink() > 0 => Ok(()),
                _ => Err(error),
            },
        }
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.torn {
            self.file.write_all(b"\n")?;
            self.torn = false;
        }
        let mut rest = line;
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => rest = &rest[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.torn = rest.len() < line.len();
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    fn read(path: &Path) -> String {
        fs::read_to_string(path).expect("a log file")
    }

    /// Follows and writes.
    fn write(file: &mut Followed, line: &str) -> io::Result<()> {
        file.follow()?;
        file.write(line.as_bytes())
    }

    #[test]
    fn a_rotated_file_is_followed() {
        let directory = TempDir::new().unwrap();
        let (path, old) = (directory.path().join("log"), directory.path().join("log.1"));
        fs::write(&path, "before\n").unwrap();
        let mut file = Followed::open(&path).unwrap();
        write(&mut file, "one\n").unwrap();
        fs::rename(&path, &old).unwrap();
        write(&mut file, "two\n").unwrap();
        assert_eq!((read(&old).as_str(), read(&path).as_str()), ("before\none\n", "two\n"));
        // By logrotate's `create`, and by `copytruncate`.
        fs::rename(&path, &old).unwrap();
        fs::write(&path, "new\n").unwrap();
        write(&mut file, "three\n").unwrap();
        assert_eq!((read(&old).as_str(), read(&path).as_str()), ("two\n", "new\nthree\n"));
        fs::write(&path, "").unwrap();
        write(&mut file, "four\n").unwrap();
        assert_eq!(read(&path), "four\n");
    }

    #[test]
    fn a_directory_may_go_and_come() {
        let parent = TempDir::new().unwrap();
        let directory = parent.path().join("zuul");
        let path = directory.join("log");
        fs::create_dir(&directory).unwrap();
        let mut file = Followed::open(&path).unwrap();
        fs::remove_dir_all(&directory).unwrap();
        assert_eq!(write(&mut file, "one\n").unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::create_dir(&directory).unwrap();
        write(&mut file, "two\n").unwrap();
        assert_eq!(read(&path), "two\n");
    }

    #[test]
    fn a_renamed_file_is_better_than_none() {
        let parent = TempDir::new().unwrap();
        let (one, other) = (parent.path().join("one"), parent.path().join("other"));
        fs::create_dir(&one).unwrap();
        let mut file = Followed::open(&one.join("log")).unwrap();
        fs::rename(&one, &other).unwrap();
        write(&mut file, "line\n").unwrap();
        assert_eq!(read(&other.join("log")), "line\n");
    }

    #[test]
    fn a_line_cut_by_a_full_disk_stands_alone() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("log");
        let mut file = Followed::open(&path).unwrap();
        file.file.write_all(b"ha").unwrap();
        file.torn = true;
        write(&mut file, "one\n").unwrap();
        write(&mut file, "two\n").unwrap();
        assert_eq!(read(&path), "ha\none\ntwo\n");
        let mut full = Followed::open(Path::new("/dev/full")).unwrap();
        assert_eq!(write(&mut full, "x\n").unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(!full.torn, "nothing of it was written");
    }

    #[test]
    fn what_waits_is_bounded_and_the_rest_is_counted() {
        let lines = Lines(Arc::default());
        let line = vec![b'x'; WAITING_MAX / 4];
        for _ in 0..6 {
            (&lines).write_all(&line).unwrap();
        }
        let waiting = lines.0.lock();
        assert_eq!((waiting.lines.len(), waiting.lost), (4, 2));
        drop(waiting);
        assert_eq!(lines.0.take().len(), 4);
        (&lines).write_all(b"room again").unwrap();
        assert_eq!(lines.0.lock().lines.len(), 1);
    }

    #[test]
    fn the_end_waits_for_the_last_line() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("log");
        for begins in [true, false] {
            let (lines, mut file) = open(&path, None).unwrap();
            (&lines).write_all(b"early\n").unwrap();
            if begins {
                file.begin().unwrap();
            }
            for number in 1..1000 {
                (&lines).write_all(format!("{number}\n").as_bytes()).unwrap();
            }
            drop(file);
            assert_eq!(read(&path).lines().count(), 1000);
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn a_check_makes_no_file() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("log");
        assert!(check(&path).is_ok() && !path.exists());
        assert!(check(&path.join("log")).is_err());
        assert!(check(directory.path()).is_err(), "a directory");
        fs::write(&path, "x").unwrap();
        assert!(check(&path).is_ok());
        assert_eq!(read(&path), "x");
    }
}
