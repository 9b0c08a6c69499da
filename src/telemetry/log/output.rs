//! The log file, followed through rotation.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::{Path, PathBuf};

use nix::unistd::getuid;
use rustix::fs::{Access, AtFlags, CWD, accessat};

use super::writer::write_lines;
use crate::os::file::open_for_writing;

/// Checks whether [`Followed::open`] would succeed at `path`, without creating a file.
///
/// # Errors
/// It would not.
pub(crate) fn check(path: &Path) -> io::Result<()> {
    match open_for_writing(path, OpenOptions::new().append(true), getuid().is_root()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let directory = directory.unwrap_or(Path::new("."));
            let access = Access::WRITE_OK | Access::EXEC_OK;
            Ok(accessat(CWD, directory, access, AtFlags::EACCESS)?)
        }
        opened => opened.map(|_| ()),
    }
}

/// Whether nobody but root can change what `path` leads to: all directories above it are root's, and
/// nobody else may write to them.
pub(crate) fn is_controlled_by_root(path: &Path) -> bool {
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

/// A file that is appended to, and opened again when its name leads to another file.
pub(crate) struct Followed {
    /// Absolute, because the working directory may change.
    path: PathBuf,
    file: File,
    /// Device and inode of the open file.
    identity: (u64, u64),
    /// Whether a full disk has cut the last line in it.
    torn: bool,
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

impl Followed {
    /// Opens the file at `path`, and creates it if there is none. Started as root, the program follows
    /// no links, also while it acts as another user: the directory is often that user's.
    ///
    /// # Errors
    /// It cannot be opened or created, or is something else than a file or a character device.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        // A new file is as readable as the umask lets it be, as with Zuul's gateway.
        let mut options = OpenOptions::new();
        let file = open_for_writing(&path, options.append(true).create(true), getuid().is_root())?;
        let identity = identity(&file.metadata()?);
        Ok(Self { path, file, identity, torn: false })
    }

    /// Opens the file at `path`, and creates it for `owner` (user and group) if there is none. Only for
    /// a path that no other user than root controls ([`is_controlled_by_root`]).
    ///
    /// # Errors
    /// As those of [`Self::open`].
    pub(crate) fn open_for(path: &Path, (user, group): (u32, u32)) -> io::Result<Self> {
        match OpenOptions::new().append(true).create_new(true).open(path) {
            Ok(file) => fchown(&file, Some(user), Some(group))?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        Self::open(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Opens the file again if its name leads to another file or to none: it was rotated. This is
    /// one call of stat(2) for all lines that wait; Python's WatchedFileHandler makes one for each.
    ///
    /// # Errors
    /// There is no such file and none can be created, and the open one has no name either. A file
    /// that was renamed where no new one can be created is still written to.
    pub(crate) fn follow(&mut self) -> io::Result<()> {
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

    /// Appends `lines`.
    ///
    /// # Errors
    /// They cannot be written, or only as many bytes of them as are returned.
    pub(crate) fn write(&mut self, lines: &[u8]) -> Result<(), (usize, io::Error)> {
        write_lines(&self.file, &mut self.torn, lines)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::symlink;

    use rustix::fs::{FileType, Mode, mknodat};
    use tempfile::TempDir;

    use super::*;

    fn read(path: &Path) -> String {
        fs::read_to_string(path).expect("a log file")
    }

    /// Follows and writes.
    fn write(file: &mut Followed, line: &str) -> io::Result<()> {
        file.follow()?;
        file.write(line.as_bytes()).map_err(|(_, error)| error)
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

    /// Where an unprivileged user could have put them, to have root write to a file of its choice.
    #[test]
    fn root_refuses_links() {
        let directory = TempDir::new().unwrap();
        let (path, target) = (directory.path().join("log"), directory.path().join("target"));
        fs::write(&target, "dear").unwrap();
        symlink(&target, &path).unwrap();
        let refused = |what: &str| {
            if getuid().is_root() {
                let error = Followed::open(&path).err().expect("a refusal").to_string();
                assert!(error.contains(what), "{error}");
                assert_eq!(check(&path).unwrap_err().to_string(), error);
            } else {
                assert!(Followed::open(&path).is_ok() && check(&path).is_ok());
            }
        };
        refused("symbolic link");
        fs::remove_file(&path).unwrap();
        fs::hard_link(&target, &path).unwrap();
        refused("hard links");
        fs::remove_file(&path).unwrap();
        fs::remove_file(&target).unwrap();
        symlink(&target, &path).unwrap();
        refused("symbolic link");
        assert!(!target.exists() || !getuid().is_root(), "nothing is created where a link leads");
    }

    /// Opening a FIFO without a reader would block for ever.
    #[test]
    fn fifo_is_refused_without_blocking() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("log");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        for has_reader in [true, false] {
            let mut both = OpenOptions::new();
            let _reader = has_reader.then(|| both.read(true).write(true).open(&path).unwrap());
            let error = Followed::open(&path).err().expect("a refusal").to_string();
            assert_eq!(error, "not a regular file");
            assert_eq!(check(&path).unwrap_err().to_string(), error);
        }
    }
}
