//! The file of the command socket: its directory, its creation and its removal.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, lchown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::io::Errno;
use socket2::{Domain, SockAddr, Socket, Type};
use tracing::debug;

use crate::os::privileges::RunAsUser;

/// Directories that are empty after a boot. A service manager creates the directory of a service
/// there; without a service manager, this program does.
const RUN_DIRECTORIES: [&str; 2] = ["/run", "/var/run"];

/// The number of connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// How long to wait for another gateway that is starting or stopping with the same directory.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
const LOCK_RETRY: Duration = Duration::from_millis(5);

/// The directory of the command socket does not exist and cannot be created, or is not writable.
#[derive(Debug, thiserror::Error)]
#[error("cannot create the command socket {}: {reason}", path.display())]
pub(crate) struct DirectoryError {
    path: PathBuf,
    reason: String,
}

impl DirectoryError {
    fn new(path: &Path, reason: String) -> Self {
        Self { path: path.to_owned(), reason }
    }
}

/// The file of a bound socket. Dropping this removes the file.
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Distinguishes this socket from one that another gateway has since created at the same path.
    identity: FileIdentity,
}

/// Device, inode, and time of the last modification, because inode numbers are reused.
#[derive(PartialEq, Eq)]
struct FileIdentity(u64, u64, i64, i64);

impl FileIdentity {
    fn read(path: &Path) -> io::Result<Self> {
        let file = fs::symlink_metadata(path)?;
        Ok(Self(file.dev(), file.ino(), file.mtime(), file.mtime_nsec()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _lock = lock_directory(&self.path);
        if FileIdentity::read(&self.path).is_ok_and(|identity| identity == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            debug!(path = %self.path.display(), %error, "command socket not removed");
        }
    }
}

/// Creates the directory of the socket at `path` if it is missing and lies directly in `/run`: mode
/// 0750, owned by `user`. Call before root is given up.
///
/// # Errors
/// The directory is missing and cannot be created, or is missing and not in `/run`.
pub(crate) fn create_directory(
    path: &Path,
    user: Option<&RunAsUser>,
) -> Result<(), DirectoryError> {
    let Some(directory) = missing_directory(path)? else { return Ok(()) };
    let created = DirBuilder::new().mode(0o750).create(&directory).and_then(|()| {
        let ids = user.map(RunAsUser::ids);
        ids.map_or(Ok(()), |(user, group)| lchown(&directory, Some(user), Some(group)))
    });
    match created {
        // Created by another gateway that is starting as well.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        created => created.map_err(|error| {
            let directory = directory.display();
            DirectoryError::new(path, format!("cannot create its directory {directory}: {error}"))
        }),
    }
}

/// Returns the directory of the socket at `path` if it is missing, and [`create_directory`] creates
/// it.
///
/// # Errors
/// The directory is missing, and the operator must create it.
pub(crate) fn missing_directory(path: &Path) -> Result<Option<PathBuf>, DirectoryError> {
    let absolute =
        std::path::absolute(path).map_err(|error| DirectoryError::new(path, error.to_string()))?;
    let Some(directory) = absolute.parent().filter(|directory| !directory.exists()) else {
        return Ok(None);
    };
    if directory.parent().is_some_and(|parent| RUN_DIRECTORIES.map(Path::new).contains(&parent)) {
        return Ok(Some(directory.to_owned()));
    }
    let reason = format!("the directory {} does not exist; create it", directory.display());
    Err(DirectoryError::new(&absolute, reason))
}

/// Creates the socket at `path`, and replaces one without a listening process, which remains when a
/// process is killed. Only the user of this process and root may connect.
///
/// # Errors
/// A process listens there, something else than a socket is there, or the directory cannot be
/// written.
pub(crate) fn bind(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    // Daemonizing changes the working directory.
    let absolute = std::path::absolute(path)?;
    let _lock = lock_directory(&absolute);
    match fs::symlink_metadata(path) {
        Ok(file) if !file.file_type().is_socket() => {
            return Err(io::Error::new(
                ErrorKind::AlreadyExists,
                "the file there is not a socket; remove it, or set another path",
            ));
        }
        Ok(_) if is_in_use(path)? => {
            return Err(io::Error::new(
                ErrorKind::AddrInUse,
                "another process listens on it; give each gateway a command socket of its own",
            ));
        }
        Ok(_) => fs::remove_file(path)?,
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // Linux creates the file with the mode of the socket's descriptor. A umask would have the same
    // effect, but for the whole process.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    let identity = FileIdentity::read(&absolute)?;
    Ok((socket.into(), SocketFile { path: absolute, identity }))
}

/// Returns whether a process listens on the socket at `path`. A connection without a request harms
/// neither this program nor Zuul's.
fn is_in_use(path: &Path) -> io::Result<bool> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::unix(path)?) {
        Ok(()) => Ok(true),
        // The queue of the listener is full.
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(true),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(false),
        Err(error) => Err(error),
    }
}

/// Locks the directory of `path`, so that only one of several gateways that start or stop at the
/// same time examines, replaces or removes the socket. Any user who can read the directory could
/// hold the lock, so the wait is limited to [`LOCK_TIMEOUT`].
fn lock_directory(path: &Path) -> Option<File> {
    let directory = File::open(path.parent()?).ok()?;
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(directory),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => thread::sleep(LOCK_RETRY),
            Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use tempfile::tempdir;

    #[test]
    fn socket_without_a_listener_is_replaced_and_one_with_a_listener_is_not() {
        let directory = tempdir().unwrap();
        let path = directory.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let (listener, file) = bind(&path).unwrap();
        assert_eq!(bind(&path).err().unwrap().kind(), ErrorKind::AddrInUse);
        // The file remains, as after a kill.
        drop(listener);
        let (_listener, second) = bind(&path).unwrap();
        drop(file);
        assert!(path.exists(), "the first file object removes only its own socket");
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn of_many_concurrent_starts_only_one_gets_the_socket() {
        let directory = tempdir().unwrap();
        // Often enough to find a race.
        for round in 0..50 {
            let path = directory.path().join(format!("socket{round}"));
            drop(UnixListener::bind(&path).unwrap());
            let barrier = std::sync::Barrier::new(8);
            let bound = thread::scope(|scope| {
                let start = || {
                    barrier.wait();
                    bind(&path).ok()
                };
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
                threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
            });
            assert_eq!(bound.len(), 1);
        }
    }

    #[test]
    fn missing_directory_outside_run_is_an_error() {
        let directory = tempdir().unwrap();
        let missing = directory.path().join("missing/socket");
        for checked in [missing_directory(&missing).map(drop), create_directory(&missing, None)] {
            let error = checked.expect_err("missing").to_string();
            assert!(error.contains("missing does not exist"), "{error}");
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        assert!(missing_directory(Path::new("/run/no-such-directory/socket")).is_ok());
        assert!(missing_directory(Path::new("/run/no-such-directory/deeper/socket")).is_err());
    }
}
