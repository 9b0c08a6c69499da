//! Where log lines are written: standard output, standard error, or a file that is rotated.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::{Path, PathBuf};

use nix::unistd::getuid;
use rustix::fs::fstat;

use super::stderr;
use crate::os::file::{check_writable, open_for_writing};

/// An output of whole lines.
pub(super) struct Output {
    /// For error messages.
    name: String,
    file: File,
    /// The absolute path of a log file, because the working directory may change.
    path: Option<PathBuf>,
    /// Whether a full disk has cut the last line in `file`.
    is_line_cut: bool,
}

impl Output {
    /// Returns standard output.
    ///
    /// # Errors
    /// There is no free file descriptor.
    pub(super) fn stdout() -> io::Result<Self> {
        Self::stream("standard output", io::stdout().as_fd())
    }

    /// Returns standard error.
    ///
    /// # Errors
    /// There is no free file descriptor.
    pub(super) fn stderr() -> io::Result<Self> {
        Self::stream("standard error", io::stderr().as_fd())
    }

    /// Duplicates the descriptor: [`io::stdout`] would hold a lock while a reader stalls.
    pub(super) fn stream(name: &str, fd: BorrowedFd<'_>) -> io::Result<Self> {
        let file = fd.try_clone_to_owned()?.into();
        Ok(Self { name: name.to_owned(), file, path: None, is_line_cut: false })
    }

    /// Opens or creates the log file at `path`. A process started as root follows no links, also
    /// while it acts as another user: that user may be able to write to the directory.
    ///
    /// # Errors
    /// The file cannot be opened or created, or is neither a regular file nor a character device.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        // The umask decides who can read a new file, as with Zuul's gateway.
        let mut options = OpenOptions::new();
        options.append(true).create(true);
        let file = open_for_writing(&path, &mut options, getuid().is_root())?;
        Ok(Self { name: path.display().to_string(), file, path: Some(path), is_line_cut: false })
    }

    /// Opens the log file at `path`, or creates it with this owner (user and group ID). Only for a
    /// path that [`is_controlled_by_root`].
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(super) fn open_for(path: &Path, (uid, gid): (u32, u32)) -> io::Result<Self> {
        match OpenOptions::new().append(true).create_new(true).open(path) {
            Ok(file) => fchown(&file, Some(uid), Some(gid))?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        Self::open(path)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Returns whether this is the file, pipe or terminal that standard error is.
    pub(super) fn is_stderr(&self) -> bool {
        match (fstat(&self.file), fstat(io::stderr())) {
            (Ok(ours), Ok(other)) => (ours.st_dev, ours.st_ino) == (other.st_dev, other.st_ino),
            _ => false,
        }
    }

    pub(super) fn is_terminal(&self) -> bool {
        self.path.is_none() && self.file.is_terminal()
    }

    /// Appends `lines`, to a new file if the open one was rotated.
    ///
    /// # Errors
    /// Not all lines were written: the error, and how many bytes were.
    pub(super) fn write(&mut self, lines: &[u8]) -> Result<(), (usize, io::Error)> {
        self.reopen_if_rotated().map_err(|error| (0, error))?;
        if self.is_line_cut {
            self.write_all(b"\n").map_err(|(_, error)| (0, error))?;
            self.is_line_cut = false;
        }
        let written = self.write_all(lines);
        if let Err((count, _)) = written {
            self.is_line_cut = count > 0 && lines[count - 1] != b'\n';
        }
        written
    }

    /// Opens a log file again if its path leads to another file or to none. A renamed file is still
    /// used if no new one can be created.
    fn reopen_if_rotated(&mut self) -> io::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let open = self.file.metadata()?;
        if path.metadata().is_ok_and(|found| (found.dev(), found.ino()) == (open.dev(), open.ino()))
        {
            return Ok(());
        }
        match Self::open(path) {
            Ok(opened) => *self = opened,
            Err(_) if open.nlink() > 0 => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn write_all(&self, bytes: &[u8]) -> Result<(), (usize, io::Error)> {
        let mut count = 0;
        while count < bytes.len() {
            let written = match (&self.file).write(&bytes[count..]) {
                Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
                // Another process that shares the pipe or terminal has made it non-blocking.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    stderr::wait_writable(&self.file, None).map(|()| 0)
                }
                written => written,
            };
            count += written.map_err(|error| (count, error))?;
        }
        Ok(())
    }
}

/// Checks whether [`Output::open`] would succeed, without creating a file.
///
/// # Errors
/// It would not.
pub(super) fn check(path: &Path) -> io::Result<()> {
    match open_for_writing(path, OpenOptions::new().append(true), getuid().is_root()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let directory = directory.unwrap_or(Path::new("."));
            check_writable(directory)
        }
        opened => opened.map(|_| ()),
    }
}

/// Returns whether only root can change where `path` leads: root owns all directories above it, and
/// no other user can write to them.
pub(super) fn is_controlled_by_root(path: &Path) -> bool {
    let directory = std::path::absolute(path)
        .and_then(|path| path.parent().unwrap_or(Path::new("/")).canonicalize());
    directory.is_ok_and(|directory| {
        directory.ancestors().all(|directory| {
            directory
                .metadata()
                .is_ok_and(|metadata| metadata.uid() == 0 && metadata.mode() & 0o022 == 0)
        })
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::pipe;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::symlink;

    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use tempfile::TempDir;

    use super::*;

    fn read(path: &Path) -> String {
        fs::read_to_string(path).unwrap()
    }

    fn write(output: &mut Output, line: &str) -> io::Result<()> {
        output.write(line.as_bytes()).map_err(|(_, error)| error)
    }

    #[test]
    fn rotated_file_is_reopened() {
        let directory = TempDir::new().unwrap();
        let (path, old) = (directory.path().join("log"), directory.path().join("log.1"));
        fs::write(&path, "before\n").unwrap();
        let mut output = Output::open(&path).unwrap();
        write(&mut output, "one\n").unwrap();
        fs::rename(&path, &old).unwrap();
        write(&mut output, "two\n").unwrap();
        assert_eq!((read(&old).as_str(), read(&path).as_str()), ("before\none\n", "two\n"));
        // As logrotate's `create` does, and as `copytruncate` does.
        fs::rename(&path, &old).unwrap();
        fs::write(&path, "new\n").unwrap();
        write(&mut output, "three\n").unwrap();
        assert_eq!((read(&old).as_str(), read(&path).as_str()), ("two\n", "new\nthree\n"));
        fs::write(&path, "").unwrap();
        write(&mut output, "four\n").unwrap();
        assert_eq!(read(&path), "four\n");
    }

    #[test]
    fn file_is_created_when_its_directory_is_back() {
        let parent = TempDir::new().unwrap();
        let directory = parent.path().join("zuul");
        let path = directory.join("log");
        fs::create_dir(&directory).unwrap();
        let mut output = Output::open(&path).unwrap();
        fs::remove_dir_all(&directory).unwrap();
        assert_eq!(write(&mut output, "one\n").unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::create_dir(&directory).unwrap();
        write(&mut output, "two\n").unwrap();
        assert_eq!(read(&path), "two\n");
    }

    #[test]
    fn renamed_file_is_used_if_no_new_one_can_be_created() {
        let parent = TempDir::new().unwrap();
        let (one, other) = (parent.path().join("one"), parent.path().join("other"));
        fs::create_dir(&one).unwrap();
        let mut output = Output::open(&one.join("log")).unwrap();
        fs::rename(&one, &other).unwrap();
        write(&mut output, "line\n").unwrap();
        assert_eq!(read(&other.join("log")), "line\n");
    }

    #[test]
    fn cut_line_is_ended_before_the_next_write() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("log");
        let mut output = Output::open(&path).unwrap();
        output.file.write_all(b"ha").unwrap();
        output.is_line_cut = true;
        write(&mut output, "one\n").unwrap();
        write(&mut output, "two\n").unwrap();
        assert_eq!(read(&path), "ha\none\ntwo\n");
        let mut full = Output::open(Path::new("/dev/full")).unwrap();
        assert_eq!(write(&mut full, "x\n").unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(!full.is_line_cut, "nothing was written");
    }

    #[test]
    fn broken_pipe_is_an_error_without_a_cut_line() {
        let (reader, writer) = pipe().unwrap();
        let mut output = Output::stream("a pipe", OwnedFd::from(writer).as_fd()).unwrap();
        write(&mut output, "one\ntwo\n").unwrap();
        drop(reader);
        assert_eq!(write(&mut output, "three\n").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert!(!output.is_line_cut);
    }

    #[test]
    fn check_creates_no_file() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("log");
        assert!(check(&path).is_ok() && !path.exists());
        assert!(check(&path.join("log")).is_err());
        assert!(check(directory.path()).is_err(), "a directory");
        fs::write(&path, "x").unwrap();
        assert!(check(&path).is_ok());
        assert_eq!(read(&path), "x");
    }

    /// An unprivileged user could have created them, to have root write to a file of its choice.
    #[test]
    fn root_refuses_links() {
        let directory = TempDir::new().unwrap();
        let (path, target) = (directory.path().join("log"), directory.path().join("target"));
        fs::write(&target, "content").unwrap();
        symlink(&target, &path).unwrap();
        let assert_refused = |reason: &str| {
            if getuid().is_root() {
                let error = Output::open(&path).err().unwrap().to_string();
                assert!(error.contains(reason), "{error}");
                assert_eq!(check(&path).unwrap_err().to_string(), error);
            } else {
                assert!(Output::open(&path).is_ok() && check(&path).is_ok());
            }
        };
        assert_refused("symbolic link");
        fs::remove_file(&path).unwrap();
        fs::hard_link(&target, &path).unwrap();
        assert_refused("hard links");
        fs::remove_file(&path).unwrap();
        fs::remove_file(&target).unwrap();
        symlink(&target, &path).unwrap();
        assert_refused("symbolic link");
        assert!(!target.exists() || !getuid().is_root(), "the link's target is not created");
    }

    /// Opening a FIFO without a reader would block forever.
    #[test]
    fn fifo_is_refused_without_blocking() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("log");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        for has_reader in [true, false] {
            let mut both = OpenOptions::new();
            let _reader = has_reader.then(|| both.read(true).write(true).open(&path).unwrap());
            let error = Output::open(&path).err().unwrap().to_string();
            assert_eq!(error, "not a regular file");
            assert_eq!(check(&path).unwrap_err().to_string(), error);
        }
    }
}
