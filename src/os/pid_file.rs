//! The pid file of a daemonized process, which also prevents a second start.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tracing::debug;

use super::file::open_for_writing;
use super::privileges::RunAsUser;

/// The most that is read of a pid file, in bytes: more than any process ID.
const CONTENT_MAX: u64 = 32;

/// A pid file that this process has locked. The lock ends with the process. Dropping it removes the
/// file, unless another process created it and nothing was written.
pub(crate) struct PidFile {
    path: PathBuf,
    file: File,
    is_ours: bool,
}

impl PidFile {
    /// Creates and locks the file at `path`, which then belongs to `user`. A file that a process
    /// left behind is used as it is.
    ///
    /// # Errors
    /// The file cannot be created, or another process has locked it.
    pub(crate) fn lock(path: &Path, user: Option<&RunAsUser>) -> Result<Self> {
        // Daemonizing changes the working directory.
        let path = std::path::absolute(path).with_context(|| describe(path))?;
        let (file, is_new) = open(&path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => {
                let holder = match read_pid(&file) {
                    Some(pid) => format!("process {pid}"),
                    None => "another process".to_owned(),
                };
                bail!(
                    "{}: {holder} has locked it: a gateway is running; stop it first",
                    describe(&path)
                );
            }
            locked => locked.with_context(|| format!("{}: cannot be locked", describe(&path)))?,
        }
        if !is_at(&path, &file) {
            bail!("{}: removed by a gateway that was ending; start again", describe(&path));
        }
        // Only a new file: an existing one may be another user's, put here by a rename.
        if let Some((uid, gid)) = user.filter(|_| is_new).map(RunAsUser::ids) {
            fchown(&file, Some(uid), Some(gid)).with_context(|| describe(&path))?;
        }
        Ok(Self { path, file, is_ours: is_new })
    }

    /// Writes `pid` to the file.
    pub(crate) fn write(&mut self, pid: u32) -> Result<()> {
        self.is_ours = true;
        let written = self
            .file
            .set_len(0)
            .and_then(|()| self.file.rewind())
            .and_then(|()| self.file.write_all(format!("{pid}\n").as_bytes()));
        written.with_context(|| format!("{}: cannot be written", describe(&self.path)))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if self.is_ours
            && is_at(&self.path, &self.file)
            && let Err(error) = fs::remove_file(&self.path)
        {
            // A user who may not remove files from the directory can still empty this one.
            debug!(path = %self.path.display(), %error, "pid file emptied, not removed");
            let _ = self.file.set_len(0);
        }
    }
}

/// Opens the file without following links (the directory is often that of the unprivileged user,
/// and this process is root), and returns whether it was created.
fn open(path: &Path) -> Result<(File, bool)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o644);
    let opened = match open_for_writing(path, options.clone().create_new(true), true) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            open_for_writing(path, options.create(true).truncate(false), true)
                .map(|file| (file, false))
        }
        created => created.map(|file| (file, true)),
    };
    let (file, is_new) = opened.with_context(|| {
        format!(
            "{}: cannot be created (create its directory, set pidfile, or stay in the foreground with \
             -f)",
            describe(path)
        )
    })?;
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        bail!("{}: is not a regular file", describe(path));
    }
    Ok((file, is_new))
}

fn describe(path: &Path) -> String {
    format!("pid file {}", path.display())
}

/// Returns the process ID that `file` contains.
fn read_pid(file: &File) -> Option<u32> {
    let mut text = String::new();
    file.take(CONTENT_MAX).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// Returns whether `file` is the one at `path`.
fn is_at(path: &Path, file: &File) -> bool {
    match (fs::symlink_metadata(path), file.metadata()) {
        (Ok(there), Ok(ours)) => (there.dev(), there.ino()) == (ours.dev(), ours.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::os::unix::fs::symlink;

    #[test]
    fn locked_file_is_refused_and_its_process_named() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pid");
        let mut first = PidFile::lock(&path, None).expect("the first");
        first.write(123).expect("a process ID");
        first.write(45).expect("a shorter one");
        assert_eq!(fs::read_to_string(&path).expect("the file"), "45\n");
        let refused = PidFile::lock(&path, None).err().expect("an error").to_string();
        assert!(refused.contains("process 45 has locked it"), "{refused}");
        drop(first);
        assert!(!path.exists());
        drop(PidFile::lock(&path, None).expect("the next"));
    }

    #[test]
    fn unlocked_file_is_used() {
        let directory = tempfile::tempdir().expect("a directory");
        for content in ["", "4194304000\n", "nonsense", "1\n"] {
            let path = directory.path().join("pid");
            fs::write(&path, content).expect("a file");
            let mut pid_file = PidFile::lock(&path, None).expect("a lock");
            pid_file.write(7).expect("a process ID");
            drop(pid_file);
            assert!(!path.exists(), "{content:?}");
        }
    }

    /// Zuul's own program has a pid file without a lock, and its port; ours then fails to bind.
    #[test]
    fn existing_file_is_left_alone_if_the_start_fails() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pid");
        fs::write(&path, "4711\n").expect("a file");
        drop(PidFile::lock(&path, None).expect("a lock"));
        assert_eq!(fs::read_to_string(&path).expect("the file"), "4711\n");
    }

    #[test]
    fn file_of_another_process_at_the_same_path_is_not_removed() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pid");
        let first = PidFile::lock(&path, None).expect("the first");
        fs::remove_file(&path).expect("the file");
        let second = PidFile::lock(&path, None).expect("the second");
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn links_and_directories_are_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pid");
        let target = directory.path().join("target");
        fs::write(&target, "content").expect("a file");
        symlink(&target, &path).expect("a link");
        assert!(PidFile::lock(&path, None).is_err());
        assert!(PidFile::lock(directory.path(), None).is_err());
        assert_eq!(fs::read_to_string(&target).expect("the file"), "content");
        fs::remove_file(&target).expect("the file");
        assert!(PidFile::lock(&path, None).is_err());
        assert!(!target.exists(), "no file is created through a link");
        fs::remove_file(&path).expect("the link");
        fs::write(&target, "content").expect("a file");
        fs::hard_link(&target, &path).expect("a hard link");
        assert!(PidFile::lock(&path, None).is_err());
        assert_eq!(fs::read_to_string(&target).expect("the file"), "content");
    }
}
